"""Whether the order of methods by predicted time is that of measured time.

Ten ways to train ResNet-32 and a small vision transformer. Predicted is the sum of a roofline for each operation
(``localize/estimate/speed.py``, no step is run); measured is CPU time on one thread, steps interleaved, medians of the
rounds. Both are in times backprop's. Beside them stands arithmetic alone::

    python benchmarks/time_order.py            # adds rows to time_order.jsonl, and prints the table
    python benchmarks/time_order.py --print    # prints what is there
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from localize import build
from localize.errors import LocalizeError
from localize.estimate import memory
from localize.recipes import Recipe

NETS = {"cifar/resnet32": 32, "timm/vit_tiny_patch16_224": 4}
WAYS: dict[str, dict[str, Any]] = {
    "backprop": {"method": "backprop"},
    "checkpoint": {"method": "checkpoint"},
    "accumulate": {"method": "accumulate"},
    "dcl": {"method": "dcl"},
    "dcl, computed again": {"method": "dcl", "schedule": {"recompute": "all"}},
    "dcl, in parts": {"method": "dcl", "schedule": {"micro_batch": 8}},
    "auglocal": {"method": "auglocal", "options": {"d": 2}},
    "dgl": {"method": "dgl"},
    "predsim": {"method": "predsim"},
    "infopro": {"method": "infopro"},
    "deep_supervision": {"method": "deep_supervision"},
    "ff": {"method": "ff"},
}
COUNT = 10
"""How many of these are measured on a net: the first that take it."""


def main() -> None:
    """Measure what is asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--print", action="store_true", help="print what is there, and run nothing")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--net", choices=list(NETS), help="this net alone")
    arguments = parser.parse_args()
    if not arguments.print:
        for net, batch in NETS.items():
            if arguments.net in (None, net):
                for row in rows(net, batch, arguments.rounds):
                    with open(arguments.results, "a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
    print(table(arguments.results))


def rows(net: str, batch: int, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each way to train a net."""
    torch.set_num_threads(1)
    steps: dict[str, Callable[[], Any]] = {}
    found: dict[str, memory.Footprint] = {}
    for name, way in WAYS.items():
        if len(steps) == COUNT:
            break
        try:
            torch.manual_seed(0)
            local = build.build(Recipe(**way, model=net)).train()
            found[name] = memory.predict(local, batch)
        except LocalizeError as error:
            print(f"{name}: {error.problem}", file=sys.stderr)
            continue
        x, y = build.random_batch(local, batch)
        optimizer = memory.sgd(local.param_groups(lr=0.01))
        steps[name] = lambda local=local, x=x, y=y, optimizer=optimizer: local.step(x, y, optimizer)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(1 + rounds):
        for name, step in steps.items():
            started = time.process_time()
            step()
            if number:
                times[name].append(time.process_time() - started)
    base, first = found["backprop"], times["backprop"]
    return [
        {
            "net": net, "batch": batch, "way": name, "n": rounds, "torch": torch.__version__,
            "arithmetic": one.macs / base.macs, "predicted": one.seconds / base.seconds,
            "predicted_seconds": one.seconds, "seconds": statistics.median(times[name]),
            "measured": statistics.median(a / b for a, b in zip(times[name], first, strict=True)),
        }
        for name, one in found.items()
    ]  # fmt: skip


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Spearman's rank correlation; equal numbers share the mean of their ranks."""
    return statistics.correlation(_ranks(a), _ranks(b))


def _ranks(values: Sequence[float]) -> list[float]:
    return [sum(other < value for other in values) + sum(other == value for other in values) / 2 for value in values]


def table(results: Path) -> str:
    """Return the results as a Markdown table."""
    told = ["| net, batch | way | arithmetic | predicted | measured | n |", "|---|---|---:|---:|---:|---:|"]
    recorded = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    for row in recorded:
        numbers = " | ".join(f"{row[name]:.2f}" for name in ("arithmetic", "predicted", "measured"))
        told.append(f"| {row['net']}, {row['batch']} | {row['way']} | {numbers} | {row['n']} |")
    for net in dict.fromkeys(row["net"] for row in recorded):
        these = [row for row in recorded if row["net"] == net]
        measured = [row["measured"] for row in these]
        by = {name: rank_correlation([row[name] for row in these], measured) for name in ("arithmetic", "predicted")}
        told.append("")
        told.append(
            f"{net}: rank correlation with measured time is {by['predicted']:.2f} by predicted time, and "
            f"{by['arithmetic']:.2f} by arithmetic."
        )
    return "\n".join(told)


if __name__ == "__main__":
    from measuring import keep_pages  # found beside this file, where it is run as a command

    keep_pages()
    main()
