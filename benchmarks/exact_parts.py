"""Steps in exact parts beside backprop: peak memory as predicted, as the allocator gives it out, and CPU time.

The peak is that of live tensors (:func:`localize.estimate.memory.predict`): parameters, gradients, the state of SGD
with momentum, the batch, activations. ``allocated`` is measured: the most bytes that the allocator gave out
in a step, workspaces of convolutions included, on top of what lives before. Time is that of the processor, in one
thread, steps interleaved; printed are medians of the ratios within a round. Results go into a JSONL file::

    python benchmarks/exact_parts.py --net cifar/resnet110 --batch-size 128 --rounds 5
    python benchmarks/exact_parts.py --predict-only
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from measuring import allocated, interleaved, keep_pages

import localize
from localize import zoo
from localize.estimate import memory

MIB = 2**20


@dataclass(frozen=True)
class Net:
    """A net, the size and number of its images, and the parts that its segments take them in."""

    name: str
    pixels: int
    classes: int
    batch: int
    parts: dict[str, Any]
    at: tuple[str, ...] = ()
    """Where it is cut; nothing is as the method does."""


DENSE = tuple(f"features.{name}" for k in (1, 2, 3) for name in (f"denseblock{k}", f"transition{k}"))
NETS = (
    Net("cifar/resnet110", 32, 10, 1024, {"micro_batch_at": "64@layer1.*,128@layer2.*,512@layer3.0"}),
    Net("tv/resnet50", 224, 1000, 64, {"micro_batch_at": "4@layer1.*,16@layer2.*,4@layer2.0,32@layer3.*,16@layer3.0"}),
    Net(
        "tv/resnet50",
        224,
        1000,
        64,
        {
            "micro_batch_at": "2@layer1.*,16@layer2.*,4@layer2.0,32@layer3.*,16@layer3.0",
            "keep_at": "bn2@layer1.1,bn2@layer1.2,bn2@layer2.*,bn2@layer3.*",
        },
    ),
    Net("tv/mobilenet_v2", 224, 1000, 32, {"micro_batch_at": "8@features.1,8@features.2,16@features.3"}),
    Net("tv/mobilenet_v2", 224, 1000, 32, {"micro_batch": 2}),
    Net("tv/efficientnet_b0", 224, 1000, 32, {"micro_batch": 2}),
    Net(
        "tv/densenet121",
        224,
        1000,
        32,
        {"micro_batch": 4},
        at=("features.pool0", *DENSE, "features.denseblock4"),
    ),
)


def main() -> None:
    """Run what is asked for, and print a line for each net."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--net", choices=[net.name for net in NETS], help="this net alone")
    parser.add_argument("--batch-size", type=int, metavar="N", help="instead of the net's own; parts stay as they are")
    parser.add_argument("--keep-at", metavar="NORM@NAME,...", help="keep these inputs of norms too")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="times that each step is timed")
    parser.add_argument("--predict-only", action="store_true", help="run no step")
    arguments = parser.parse_args()
    for net in NETS:
        if arguments.net in (None, net.name):
            if arguments.keep_at:
                net = replace(net, parts={**net.parts, "keep_at": arguments.keep_at})
            row = compared(net, arguments.batch_size or net.batch, 0 if arguments.predict_only else arguments.rounds)
            with open(arguments.results, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)


def compared(net: Net, batch: int, rounds: int) -> dict[str, Any]:
    """Return what a step in parts needs beside backprop: bytes, arithmetic, and, of so many rounds, CPU time."""
    torch.set_num_threads(1)
    options = {"moments": "shared", **net.parts, **({"cut": localize.CutSpec(at=net.at)} if net.at else {})}
    steps = {"backprop": made(net, "backprop", {}), "parts": made(net, "dcl", options)}
    found = {name: memory.predict(local, batch) for name, local in steps.items()}
    peaks = {name: one.peak for name, one in found.items()}
    row: dict[str, Any] = {"net": net.name, "pixels": net.pixels, "batch": batch, "parts": net.parts, "at": net.at}
    row |= {"torch": torch.__version__, "cores": os.cpu_count(), "n": rounds}
    row |= {f"{name} MiB": round(peak / MIB, 1) for name, peak in peaks.items()}
    row |= {"memory": round(peaks["parts"] / peaks["backprop"], 4)}
    row |= {"arithmetic": round(found["parts"].macs / found["backprop"].macs, 2)}
    return row | measured(steps, net, batch, rounds, found["parts"].resident) if rounds else row


def made(net: Net, method: str, options: dict[str, Any]) -> localize.LocalModel:
    """Return a step of a net by a method."""
    torch.manual_seed(0)
    model = zoo.create_model(net.name, num_classes=net.classes).train()
    return localize.transform(model, method, example_input=torch.empty(1, 3, net.pixels, net.pixels), **options)


def measured(steps: dict[str, localize.LocalModel], net: Net, batch: int, rounds: int, resident: int) -> dict[str, Any]:
    """Return the ratio of CPU times, and the most bytes that the allocator gave out in a step in parts."""
    x, y = torch.randn(batch, 3, net.pixels, net.pixels), torch.arange(batch) % net.classes
    optimizers = {name: memory.sgd(local.param_groups(lr=0.001)) for name, local in steps.items()}
    times = interleaved(steps, x, y, optimizers, rounds)
    ratios = [parts / whole for whole, parts in zip(times["backprop"], times["parts"], strict=True)]
    given = allocated(steps["parts"], x, y, optimizers["parts"]) + resident
    seconds = {f"{name} s": round(statistics.median(values), 2) for name, values in times.items()}
    return {"time": round(statistics.median(ratios), 2), **seconds, "allocated MiB": round(given / MIB, 1)}


if __name__ == "__main__":
    keep_pages()
    main()
