"""Seconds of CPU time that a conversion takes over the depth of the net, and the exponent of their growth.

Nets are the residual nets for 32x32 images. Time is that of ``localize.transform``; imports and the making of the model
are not counted. ``audit`` is the part of the static audit. The exponent is the slope of log(seconds) over log(depth)
between two depths: 1 is linear. Every case is run once to warm up, at the least depth; printed are medians::

    python benchmarks/convert_depth.py --repeat 3 --threads 1
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from localize import auditor, compiler
from localize.zoo.cifar_resnet import CifarResNet

CASES: tuple[tuple[str, Mapping[str, Any]], ...] = (("dcl", {}), ("auglocal", {"d": 2}))
DEPTHS = (20, 110, 434, 1202)
FROM = 110
"""Exponents are taken from this depth to the greatest: below, much of the time does not depend on the depth."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="times that each case is run (default 1)")
    parser.add_argument("--threads", type=int, default=None, metavar="N", help="threads of torch")
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS, metavar="L", help="6 n + 2 each")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    depths = sorted(arguments.depths)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} cores, n={arguments.repeat}")
    print(f"{'method':<10} {'depth':>6} {'total':>8} {'audit':>8} {'rest':>8}")
    for method, options in CASES:
        convert(depths[0], method, options)
        rows = {depth: _median(depth, method, options, arguments.repeat) for depth in depths}
        for depth, seconds in rows.items():
            print(f"{method:<10} {depth:>6} " + " ".join(f"{value:>8.2f}" for value in seconds))
        first, last = max(depths[0], FROM), depths[-1]
        if first in rows and first < last:
            told = [f"{_exponent(rows, first, last, column):>8.2f}" for column in range(3)]
            print(f"{method:<10} exponent from {first} to {last}: total, audit, rest {' '.join(told)}")


def convert(depth: int, method: str, options: Mapping[str, Any]) -> tuple[float, float, float]:
    """Convert a net of this depth; return the seconds of it all, of the static audit, and of the rest."""
    model = CifarResNet((depth - 2) // 6)
    x = torch.zeros(2, 3, 32, 32)
    static, audits = auditor.static, []

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return static(*args, **kwargs)
        finally:
            audits.append(time.process_time() - start)

    auditor.static = timed
    try:
        start = time.process_time()
        compiler.transform(model, method, example_input=x, **options)
        total = time.process_time() - start
    finally:
        auditor.static = static
    return total, sum(audits), total - sum(audits)


def _median(depth: int, method: str, options: Mapping[str, Any], repeat: int) -> list[float]:
    runs = [convert(depth, method, options) for _ in range(repeat)]
    return [statistics.median(column) for column in zip(*runs, strict=True)]


def _exponent(rows: Mapping[int, Sequence[float]], first: int, last: int, column: int) -> float:
    return math.log(rows[last][column] / rows[first][column]) / math.log(last / first)


if __name__ == "__main__":
    main()
