"""Peak memory of a training step: backprop, its rivals in less memory, and local methods by several schedules.

Every number is predicted (:func:`localize.estimate.memory.predict`): the generated step, followed operation by
operation on tensors without values, all bytes of tensors counted that live at one time: parameters, gradients, the
state of SGD with momentum, the batch, activations. ``benchmarks/predicted_memory.py`` holds predictions against what is
measured. Arithmetic is the multiply-adds of matrix products and convolutions, forward and backward. Results go into a
JSONL file one by one; what is found there is not repeated::

    python benchmarks/memory.py
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from localize import build
from localize.estimate import memory, rivals
from localize.ir import CutSpec
from localize.recipes import Recipe

NODE = CutSpec("max", by="node")


@dataclass(frozen=True)
class Step:
    """A recipe without a model, and the type of autocast."""

    recipe: Recipe
    autocast: torch.dtype | None = None


RECOMPUTED = {"recompute": "all"}
BF16 = torch.bfloat16
STEPS = {
    "backprop": Step(Recipe("backprop")),
    "accumulate": Step(Recipe("accumulate")),
    **{f"auglocal --d {d}": Step(Recipe("auglocal", {"d": d})) for d in (2, 3, 4, 5, 6)},
    **{
        f"auglocal --d {d} --recompute all": Step(Recipe("auglocal", {"d": d}, schedule=RECOMPUTED))
        for d in (2, 3, 4, 5, 6)
    },
    "auglocal --d 2 --recompute all, bf16": Step(Recipe("auglocal", {"d": 2}, schedule=RECOMPUTED), BF16),
    "auglocal --d 6 --recompute all --update immediate": Step(
        Recipe("auglocal", {"d": 6, "update": "immediate"}, schedule=RECOMPUTED)
    ),
    "auglocal --d 6 --recompute all --update immediate, bf16": Step(
        Recipe("auglocal", {"d": 6, "update": "immediate"}, schedule=RECOMPUTED), BF16
    ),
    "dcl": Step(Recipe("dcl")),
    "dcl --cut-by node": Step(Recipe("dcl", cut=NODE)),
    "dcl --cut-by node, bf16": Step(Recipe("dcl", cut=NODE), BF16),
    "dcl --recompute body": Step(Recipe("dcl", schedule={"recompute": "body"})),
    "dcl --micro-batch 128": Step(Recipe("dcl", schedule={"micro_batch": 128})),
    "dcl --micro-batch 32": Step(Recipe("dcl", schedule={"micro_batch": 32})),
}
CNN = tuple(name for name in STEPS if "micro" not in name and "recompute body" not in name)[2:]
FEW = ("auglocal --d 2", "auglocal --d 2 --recompute all", "dcl", "dcl --recompute body")
NETS: dict[tuple[str, int], tuple[str, ...]] = {
    ("cifar/resnet110", 1024): CNN,
    ("cifar/resnet32", 1024): CNN,
    ("cifar/vgg8b", 128): FEW,
    ("cifar/vit", 512): (*FEW, "dcl --micro-batch 128", "dcl --micro-batch 32"),
    ("tv/resnet50", 64): FEW,
    **{(f"cifar/resnet{depth}", 256): ("auglocal --d 2",) for depth in (20, 56, 110, 1202)},
}


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--print", action="store_true", help="print what is there, and run nothing")
    arguments = parser.parse_args()
    if not arguments.print:
        for model, batch in NETS:
            for row in missing(model, batch, read(arguments.results)):
                with open(arguments.results, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    print(table(read(arguments.results)))


def missing(model: str, batch: int, found: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a net that are not there yet."""
    there = {(row["model"], row["batch"], row["step"].partition(" -K")[0]) for row in found}
    base = {"model": model, "batch": batch, "torch": torch.__version__}
    if (model, batch, "checkpoint") not in there and "1202" not in model:
        recipe = Recipe("backprop", model=model)
        tried = [rivals.cost(entry, batch) for entry in rivals.schedules(recipe, rivals.recorded(recipe))]
        best = rivals.least(tried)
        yield base | {"step": best.method, "peak": best.peak_bytes, "saved": best.saved_bytes, "macs": best.macs}
    for name in ("backprop", "accumulate", *NETS[model, batch]):
        if (model, batch, name) not in there:
            local = build.build(replace(STEPS[name].recipe, model=model), data=False)
            cost = memory.predict(local, batch, autocast=STEPS[name].autocast)
            yield base | {"step": name, "peak": cost.peak, "saved": cost.saved, "macs": cost.macs}


def read(results: Path) -> list[dict[str, Any]]:
    """Return the results of earlier runs."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def table(rows: list[dict[str, Any]]) -> str:
    """Return the results as a Markdown table, shares of backprop on the same net."""
    told = ["| net, batch | step | peak, MiB | share | saved, MiB | arithmetic |", "|---|---|---:|---:|---:|---:|"]
    for model, batch in NETS:
        own = [row for row in rows if (row["model"], row["batch"]) == (model, batch)]
        base = next((row for row in own if row["step"] == "backprop"), None)
        for row in sorted(own, key=lambda row: row is not base):
            shares = f"{row['peak'] / base['peak']:.4f}", f"{row['macs'] / base['macs']:.2f}"
            sizes = f"{row['peak'] / 2**20:,.1f}", f"{row['saved'] / 2**20:,.1f}"
            net = f"{model.partition('/')[2]}, {batch}"
            told.append(f"| {net} | `{row['step']}` | {sizes[0]} | {shares[0]} | {sizes[1]} | {shares[1]} |")
    return "\n".join(told)


if __name__ == "__main__":
    main()
