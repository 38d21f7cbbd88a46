"""Eight nets: the leanest ways to train them, by backprop's rivals and by local learning, as predicted.

For each net and optimizer: backprop; activation checkpointing and accumulation, each in its leanest form, also together
(``localize/estimate/rivals.py``); and ``dcl --moments shared`` with a schedule for each segment, cut after every local
layer or at every node: the leanest of those that were tried, and the leanest that take at most as long as backprop, or
2.2 times as long. Bytes are peaks of live tensors, times those of the model of a CPU thread. Results go into a JSONL
file one by one; what is found there is not repeated::

    python benchmarks/eight_nets.py                         # adds rows to eight_nets.jsonl, and prints the table
    python benchmarks/eight_nets.py --net tv/resnet50 --opt sgd
    python benchmarks/eight_nets.py --picture docs/eight_nets.svg
    python benchmarks/eight_nets.py --net cifar/resnet110 --opt sgd --time "ours, equal time" --rounds 3

The last line runs a plan that is in the file beside backprop, steps interleaved, and adds the ratio of CPU times of one
thread, the median over the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from localize import build
from localize.estimate import memory, rivals
from localize.estimate.memory import Conditions
from localize.estimate.repeats import Known
from localize.estimate.rivals import Entry, Row
from localize.estimate.segments import Kinds
from localize.ir import CutSpec
from localize.recipes import Recipe

NETS = {
    "cifar/resnet110": 1024, "tv/resnet50": 64, "tv/mobilenet_v2": 32, "tv/efficientnet_b0": 32, "tv/densenet121": 32,
    "timm/vit_small_patch16_224": 32, "timm/convnext_atto": 32, "tv/vit_b_16": 16,
}  # fmt: skip
OPTIMIZERS = {
    "sgd": Conditions(optimizer=memory.sgd),
    "adamw": Conditions(optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-3)),
}
SHARES = (0.5, 0.35, 0.25, 0.18, 0.12, 0.1, 0.08, 0.06, 0.045, 0.03, 0.02, 0.01)
"""Budgets that schedules are chosen for, in peaks of backprop."""
BARS = {"ours": float("inf"), "ours, 2.2 times the time": 2.2, "ours, equal time": 1.0}
"""Longest predicted time of what is shown as ours, in times backprop's."""


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--print", action="store_true", help="print what is there, and run nothing")
    parser.add_argument("--net", choices=list(NETS), help="this net alone")
    parser.add_argument("--opt", choices=list(OPTIMIZERS), help="this optimizer alone")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw what is there, and run nothing")
    parser.add_argument("--time", choices=list(BARS), help="run these plans of what is there, and plan nothing")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="times that each step is timed")
    arguments = parser.parse_args()
    if arguments.time:
        for row in read(arguments.results):
            asked = (arguments.net in (None, row["net"]), arguments.opt in (None, row["opt"]))
            if all(asked) and row["kind"] == arguments.time:
                about = {name: row[name] for name in ("net", "batch", "opt", "kind", "share", "schedule")}
                about |= {"predicted": row["time"], "n": arguments.rounds, "torch": torch.__version__}
                done = about | measured(row, arguments.rounds)
                print(done, flush=True)
                with open(arguments.results.with_name("eight_nets_timed.jsonl"), "a", encoding="utf-8") as file:
                    file.write(json.dumps(done) + "\n")
        return
    for opt in OPTIMIZERS if not (arguments.print or arguments.picture) else ():
        for net in NETS:
            done = any((row["net"], row["opt"]) == (net, opt) for row in read(arguments.results))
            if arguments.net in (None, net) and arguments.opt in (None, opt) and not done:
                rows = list(compared(net, opt))
                with open(arguments.results, "a", encoding="utf-8") as file:
                    file.writelines(json.dumps(row) + "\n" for row in rows)
    if arguments.picture:
        draw(read(arguments.results), arguments.picture)
    print(table(read(arguments.results)))


def read(results: Path) -> list[dict[str, Any]]:
    """Return the results of earlier runs."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def compared(net: str, opt: str) -> Iterator[dict[str, Any]]:
    """Yield the rivals of a net and its plans."""
    batch, under, started = NETS[net], OPTIMIZERS[opt], time.process_time()
    base: Row | None = None

    def row(kind: str, entry: Entry, found: Row) -> dict[str, Any]:
        assert base is not None and base.peak_bytes and base.macs and base.predicted_seconds
        assert found.peak_bytes and found.macs and found.predicted_seconds
        print(net, opt, kind, entry.name, found.peak_bytes / base.peak_bytes, file=sys.stderr, flush=True)
        recipe = entry.recipe
        return {
            "net": net, "batch": batch, "opt": opt, "kind": kind, "name": entry.name, "torch": torch.__version__,
            "peak": found.peak_bytes, "share": found.peak_bytes / base.peak_bytes,
            "arithmetic": found.macs / base.macs, "time": found.predicted_seconds / base.predicted_seconds,
            "changes_statistics": found.changes_statistics, "by": recipe.cut.by if recipe.cut else None,
            "schedule": dict(recipe.schedule),
        }  # fmt: skip

    for entry, found in rivals.rivals(Recipe("backprop", model=net), batch, lambda name: None, under):
        base = base or found
        if not found.refused:
            yield row("combined" if found.combined else entry.name.split()[0].rstrip(","), entry, found)
    assert base is not None
    for kind, entry, found in planned(net, batch, under, base):
        yield row(kind, entry, found)
    print(f"{net} {opt}: {time.process_time() - started:.0f} s", file=sys.stderr, flush=True)


def planned(net: str, batch: int, under: Conditions, base: Row) -> Iterator[tuple[str, Entry, Row]]:
    """Yield the leanest plan, and the leanest of those that take no longer than stated."""
    assert base.peak_bytes and base.predicted_seconds
    known: Known = {}
    recipe = Recipe("dcl", {"moments": "shared"}, model=net)
    trunk = rivals.recorded(recipe)
    tried: dict[str, tuple[int, float, Recipe]] = {}
    for cut in (CutSpec("max"), CutSpec("max", by="node")):
        kinds = Kinds(trunk, replace(recipe, cut=cut), batch, under, known)
        for share in SHARES:
            for keeping in (False, True):
                chosen = kinds.choose(int(share * base.peak_bytes), keeping=keeping)
                if chosen is not None:
                    tried[repr(chosen.recipe)] = chosen.peak, chosen.seconds, chosen.recipe
    for kind, bar in BARS.items():
        fitting = [(peak, made) for peak, seconds, made in tried.values() if seconds <= bar * base.predicted_seconds]
        for _, made in sorted(fitting, key=lambda pair: pair[0]):
            entry = Entry("dcl", made)
            found = rivals.cost(entry, batch, under, known, trunk)
            if found.predicted_seconds and found.predicted_seconds <= bar * base.predicted_seconds:
                yield kind, entry, found
                break


def measured(row: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Return the ratio of the CPU time of a planned step to that of backprop, and the seconds of both."""
    from measuring import interleaved  # here, as the tables are made where it is not on the path

    torch.set_num_threads(1)
    cut = CutSpec("max", by=row["by"])
    recipe = Recipe("dcl", {"moments": "shared"}, model=row["net"], cut=cut, schedule=row["schedule"])
    steps = {"backprop": build.build(Recipe("backprop", model=row["net"])), "ours": build.build(recipe)}
    trunk = steps["ours"].plan.segments.trunk
    x = torch.randn(row["batch"], *(trunk.inputs[0].shape or ()))
    y = torch.arange(row["batch"]) % trunk.num_classes
    optimizers = {name: OPTIMIZERS[row["opt"]].optimizer(local.param_groups(lr=1e-3)) for name, local in steps.items()}
    seconds = interleaved(steps, x, y, optimizers, rounds)
    ratios = [ours / whole for whole, ours in zip(seconds["backprop"], seconds["ours"], strict=True)]
    return {"time": statistics.median(ratios), **{name: statistics.median(each) for name, each in seconds.items()}}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the results as a Markdown table, peaks as shares of backprop's, with times."""
    columns = ("checkpoint", "accumulate", "combined", *BARS)
    told = [f"| net, batch | optimizer | backprop, MiB | {' | '.join(columns)} |"]
    told.append("|---|---|---:|" + "---:|" * len(columns))
    for net, batch in NETS.items():
        for opt in OPTIMIZERS:
            own = [row for row in rows if (row["net"], row["opt"]) == (net, opt)]
            if own:
                base = next(row for row in own if row["kind"] == "backprop")
                cells = " | ".join(cell(own, kind) for kind in columns)
                told.append(f"| {net.partition('/')[2]}, {batch} | {opt} | {base['peak'] / 2**20:,.0f} | {cells} |")
    return "\n".join(told)


def cell(rows: list[dict[str, Any]], kind: str) -> str:
    """Return the leanest of a kind: its share of backprop's memory, a star where statistics change, and its time."""
    found = [row for row in rows if row["kind"] == kind]
    if not found:
        return ""
    best = min(found, key=lambda row: row["share"])
    star = r"\*" if best["changes_statistics"] else ""
    return f"{best['share']:.3f}{star} ({best['time']:.2f})"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the shares of each net, one marker for each way, smaller is better; of SGD."""
    from matplotlib import pyplot

    kinds = {
        "checkpoint": ("s", "#999999"), "accumulate": ("^", "#999999"), "combined": ("D", "#555555"),
        "ours, equal time": ("o", "#56b4e9"), "ours": ("o", "#0072b2"),
    }  # fmt: skip
    figure, axes = pyplot.subplots(figsize=(7.5, 3.6), layout="constrained")
    nets = [net for net in NETS if any((row["net"], row["opt"]) == (net, "sgd") for row in rows)]
    for kind, (marker, color) in kinds.items():
        points = {}
        for place, net in enumerate(nets):
            own = [r["share"] for r in rows if (r["net"], r["opt"], r["kind"]) == (net, "sgd", kind)]
            if own:
                points[place] = min(own)
        hollow = {"markerfacecolor": "white"} if kind == "ours, equal time" else {}
        axes.plot(list(points), list(points.values()), marker, color=color, markersize=7, label=kind, **hollow)
    axes.set_yscale("log")
    labels = [f"{net.partition('/')[2]}\nbatch {NETS[net]}" for net in nets]
    axes.set_xticks(range(len(nets)), labels, rotation=30, ha="right")
    axes.set_yticks([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1], ["1 %", "2 %", "5 %", "10 %", "20 %", "50 %", "100 %"])
    axes.set_ylabel("peak memory of a step,\nshare of backprop's")
    axes.grid(axis="y", color="#dddddd")
    figure.legend(loc="outside upper center", ncols=5, fontsize="small", frameon=False)
    pyplot.rcParams["svg.hashsalt"] = "localize"
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    from measuring import keep_pages

    keep_pages()
    main()
