"""Accuracy of resnet32 on the bundled digits: backprop, auglocal --d 2 and dcl, cut at every block, three seeds.

All methods get the same epochs, batch size, optimizer and learning rate. Runs are interleaved (every method with seed
0, then every method with seed 1, ...) and each is added to a JSONL file as soon as it ends; runs found there are not
repeated, so that an interrupted study goes on where it stopped. The accuracy is that of the last epoch, in percent of
the 360 test images; the standard deviation is that of a sample (n - 1)::

    python benchmarks/digits_accuracy.py --threads 1
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from localize.train import TrainConfig, run

METHODS: Mapping[str, Mapping[str, Any]] = {"backprop": {}, "auglocal": {"d": 2}, "dcl": {}}


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="cifar/resnet32")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N-1")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--opt", default="sgd")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument("--warmup-epochs", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = ("epochs", "batch_size", "opt", "lr", "weight_decay", "warmup_epochs")
    training = {name: getattr(args, name) for name in names}

    found = read(args.results)
    rows: dict[str, list[dict[str, Any]]] = {method: [] for method in args.methods}
    for seed in range(args.seeds):
        for method in args.methods:
            key = {"model": args.model, "method": method, "options": dict(METHODS[method]), "seed": seed, **training}
            result = next((row for row in found if row["key"] == key), None) or measure(key, args.results)
            rows[method].append(result)
    print(table(rows))


def measure(key: Mapping[str, Any], results: Path) -> dict[str, Any]:
    """Train once, in a temporary folder, and add the result to the file."""
    settings = {name: value for name, value in key.items() if name not in ("model", "method", "options")}
    folder = tempfile.mkdtemp()
    started = time.perf_counter()
    try:
        config = TrainConfig(
            key["model"], recipe=key["method"], options=key["options"], device="cpu", output=folder, **settings
        )
        last = run(config).metrics[-1]
    finally:
        shutil.rmtree(folder)
    result = {
        "key": dict(key),
        "test_accuracy": last["test_accuracy"],
        "train_loss": last["train_loss"],
        "seconds": round(time.perf_counter() - started, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    with open(results, "a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")
    return result


def read(results: Path) -> list[dict[str, Any]]:
    """Return the results of earlier runs."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def table(rows: Mapping[str, list[dict[str, Any]]]) -> str:
    """Return the results as a Markdown table, accuracies in percent."""
    lines = [
        "| method | options | test accuracy, mean | std | n | each seed | s per run |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, results in rows.items():
        accuracies = [100 * result["test_accuracy"] for result in results]
        deviation = f"{statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
        options = " ".join(f"--{name} {value}" for name, value in METHODS[method].items())
        each = ", ".join(f"{accuracy:.2f}" for accuracy in accuracies)
        seconds = statistics.mean(result["seconds"] for result in results)
        mean = statistics.mean(accuracies)
        lines.append(
            f"| {method} | {options} | {mean:.2f} | {deviation} | {len(accuracies)} | {each} | {seconds:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
