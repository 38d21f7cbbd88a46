"""Seconds that a conversion takes, and where they go: the stages of ``localize.transform``, imports not counted.

Every case is run once to warm up and then several times, the cases in turn; printed are medians. The stages are those
that ``transform`` calls; what is left (reading the recipe, drawing the heads' weights) is ``other``::

    python benchmarks/convert_time.py --repeat 5
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch

from localize import compiler
from localize.zoo import create_model, input_shape_of, resolve

CASES: tuple[tuple[str, str, Mapping[str, Any]], ...] = (
    ("tv/resnet50", "auglocal", {"d": 2}),
    ("tv/resnet50", "dcl", {}),
    ("cifar/resnet110", "auglocal", {"d": 4}),
    ("cifar/resnet110", "dcl", {}),
    ("timm/vit_tiny_patch16_224", "auglocal", {"d": 2}),
    ("tv/densenet121", "auglocal", {"d": 2}),
)
STAGES = ("trace", "place", "split", "design", "lower", "emit", "static")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="times that each case is run (default 5)")
    parser.add_argument("--threads", type=int, default=None, metavar="N", help="threads of torch")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    found: dict[int, list[dict[str, float]]] = {i: [] for i in range(len(CASES))}
    for turn in range(arguments.repeat + 1):
        for i, (name, method, options) in enumerate(CASES):
            seconds = convert(name, method, options)
            if turn > 0:
                found[i].append(seconds)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} cores, n={arguments.repeat}")
    print(f"{'model':<28} {'method':<10} {'total':>7} " + " ".join(f"{stage:>7}" for stage in (*STAGES, "other")))
    for i, (name, method, _) in enumerate(CASES):
        columns = ("total", *STAGES, "other")
        medians = [statistics.median(run[column] for run in found[i]) for column in columns]
        print(f"{name:<28} {method:<10} " + " ".join(f"{value:>7.2f}" for value in medians))


def convert(name: str, method: str, options: Mapping[str, Any]) -> dict[str, float]:
    """Convert a model; return the seconds of every stage, their rest, and the total."""
    source = resolve(name)
    model = create_model(name)
    x = torch.zeros(2, *input_shape_of(source, model))
    seconds = dict.fromkeys(STAGES, 0.0)
    timed = ("trace", "split", "design", "lower", "emit")
    originals = {key: getattr(compiler, key) for key in (*timed, "cuts", "auditor")}
    for stage in timed:
        setattr(compiler, stage, _timed(originals[stage], stage, seconds))
    compiler.cuts = _with(originals["cuts"], place=_timed(originals["cuts"].place, "place", seconds))
    compiler.auditor = _with(originals["auditor"], static=_timed(originals["auditor"].static, "static", seconds))
    try:
        start = time.perf_counter()
        compiler.transform(model, method, example_input=x, **options)
        total = time.perf_counter() - start
    finally:
        for key, value in originals.items():
            setattr(compiler, key, value)
    return {"total": total, **seconds, "other": total - sum(seconds.values())}


def _timed(function: Callable[..., Any], stage: str, seconds: dict[str, float]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[stage] += time.perf_counter() - start

    return call


def _with(module: Any, **replaced: Any) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(module), **replaced})


if __name__ == "__main__":
    main()
