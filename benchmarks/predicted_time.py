"""Predicted seconds of a step (see :mod:`localize.estimate.timing`) beside those of whole steps.

Time is that of the processor in one thread, so that what else runs on the machine does not count; the prediction and
the steps are taken in turn, ``--rounds`` times, and medians are printed::

    python benchmarks/predicted_time.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

import torch
from measuring import keep_pages

from localize import build
from localize.estimate import memory, timing
from localize.ir import CutSpec
from localize.recipes import Recipe

CASES: tuple[tuple[str, int, Recipe], ...] = (
    ("cifar/resnet110", 16, Recipe("auglocal", {"d": 2})),
    ("cifar/resnet110", 16, Recipe("auglocal", {"d": 6})),
    ("cifar/resnet110", 16, Recipe("dcl")),
    ("cifar/vgg8b", 16, Recipe("dcl")),
    ("cifar/vit", 16, Recipe("dcl")),
    ("tv/resnet50", 2, Recipe("auglocal", {"d": 2}, cut=CutSpec(4))),
    ("tv/mobilenet_v3_small", 8, Recipe("dcl")),
    ("timm/vit_tiny_patch16_224", 2, Recipe("auglocal", {"d": 2}, cut=CutSpec(4))),
    ("timm/efficientnet_b0", 2, Recipe("dcl", cut=CutSpec(8))),
    ("timm/convnext_atto", 4, Recipe("dcl")),
    ("timm/swin_tiny_patch4_window7_224", 2, Recipe("dcl", cut=CutSpec(4))),
    ("timm/mixer_s32_224", 4, Recipe("auglocal", {"d": 2}, cut=CutSpec(4))),
    ("cifar/resnet32", 32, Recipe("backprop")),
    ("cifar/resnet32", 32, Recipe("checkpoint", cut=CutSpec(6))),
    ("cifar/resnet32", 32, Recipe("accumulate", {"parts": 2})),
    ("cifar/resnet32", 32, Recipe("dcl", schedule={"recompute": "all"})),
    ("cifar/resnet32", 32, Recipe("dcl", schedule={"micro_batch": 8})),
    ("cifar/resnet32", 32, Recipe("infopro")),
    ("cifar/resnet32", 32, Recipe("predsim")),
    ("timm/vit_tiny_patch16_224", 4, Recipe("dcl", schedule={"micro_batch": 1})),
    ("timm/vit_tiny_patch16_224", 8, Recipe("accumulate", {"parts": 4})),
    ("tv/resnet50", 8, Recipe("dcl", schedule={"micro_batch": 2})),
    ("tv/mobilenet_v2", 8, Recipe("auglocal", {"head_width": 64})),
)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="times that each is taken")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    timing.now = lambda device: time.process_time()
    print(f"One thread, torch {torch.__version__}, n = {rounds}.\n")
    print("| net, batch | method | segments | timed | predicted, s | measured, s | ratio |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for model, batch, recipe in CASES:
        local = build.build(replace(recipe, model=model)).train()
        x, y = build.random_batch(local, batch)
        optimizer = memory.sgd(local.param_groups(lr=0.0))
        for _ in range(2):
            local.step(x, y, optimizer)
        ratios, pairs = [], []
        for _ in range(rounds):
            predicted = timing.predict(local, batch, {})
            taken = []
            for _ in range(3):
                started = time.process_time()
                local.step(x, y, optimizer)
                taken.append(time.process_time() - started)
            pairs.append((predicted.seconds, statistics.median(taken)))
            ratios.append(pairs[-1][0] / pairs[-1][1])
        ours, theirs = (statistics.median(values) for values in zip(*pairs, strict=True))
        flags = {**recipe.options, **recipe.schedule}
        name = " ".join([recipe.method, *(f"--{key.replace('_', '-')} {value}" for key, value in flags.items())])
        if recipe.cut:
            name += f" -K {recipe.cut.segments}"
        counts = f"{len(local.plan.segments)} | {predicted.timed}"
        row = (
            f"| {model}, {batch} | `{name}` | {counts} | {ours:.3f} | {theirs:.3f} | {statistics.median(ratios):.3f} |"
        )
        print(row, flush=True)


if __name__ == "__main__":
    keep_pages()
    main()
