"""Measure what an audit costs: conversion, the audit of the text, and the whole audit, in seconds of CPU time.

Run from the root of the repository::

    OMP_NUM_THREADS=1 python benchmarks/audit_time.py [MODEL] [--method METHOD] [--d D]

Prints one line for each number of segments, the last the model's most, so that the cost by segment shows.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

import localize
from localize.auditor import audit, static
from localize.ir import CutSpec

REPEATS = 3


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="cifar/resnet110")
    parser.add_argument("--method", default="auglocal")
    parser.add_argument("--d", type=int, default=2, help="depth of the heads of auglocal")
    asked = parser.parse_args()
    name, method = asked.model, asked.method
    torch.set_num_threads(1)
    x, y = torch.randn(4, 3, 32, 32), torch.randint(10, (4,))
    options = {"d": asked.d} if method == "auglocal" else {}
    print(f"{name} by {method}, seconds of CPU time on one thread")
    print("| segments | conversion | audit of the text | whole audit |")
    print("|---:|---:|---:|---:|")
    for count in (8, 16, 32, "max"):
        model = localize.zoo.create_model(name, num_classes=10)
        start = time.process_time()
        local = localize.transform(model, method, example_input=x, cut=CutSpec(segments=count), **options)
        converted = time.process_time() - start
        read = min(_seconds(lambda local=local: static(local)) for _ in range(REPEATS))
        whole = _seconds(lambda local=local: audit(local, (x, y)).raise_if_failed())
        print(f"| {len(local.plan.segments)} | {converted:.2f} | {read:.3f} | {whole:.1f} |", flush=True)


def _seconds(act: Callable[[], object]) -> float:
    start = time.process_time()
    act()
    return time.process_time() - start


if __name__ == "__main__":
    main()
