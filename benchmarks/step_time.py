"""Time of a training step: beside backprop, beside its own arithmetic, and beside the same loop written by hand.

The steps of all rows of a net are interleaved: in every round each is run once, and ratios are taken within the round;
printed are medians over the rounds. Arithmetic is the multiply-adds of matrix products and convolutions, forward and
backward, relative to backprop's (:func:`localize.estimate.memory.predict`). ``by hand`` is a plain loop over the same
modules, heads, losses and optimizer without any of this package's text: ratio of the generated step to it. Compiled
rows (``--compile``) are held against compiled backprop: the quicker of ``localize.compile`` and ``torch.compile``. What
the ratios are to is in each row's ``base``: the quickest backprop of the run. ``convolutions`` is the time that torch's
own convolutions and matrix products take, relative to backprop's: no step that is made of them takes less than its part
of it, whatever their number of multiply-adds.

Time is that of the processor, in one thread: what else runs on the machine does not count. SGD with momentum, float32,
random images. The allocator of the C library is told to keep its pages, since
otherwise a fifth of a step is page faults that come and go. Results go into a JSONL file::

    python benchmarks/step_time.py --compile --rounds 15
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measuring import keep_pages
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import localize
from localize import build
from localize.estimate import memory
from localize.recipes import Recipe
from localize.runtime.model import LocalModel

NETS: dict[tuple[str, int], dict[str, Recipe]] = {
    ("cifar/resnet110", 128): {
        "backprop": Recipe("backprop"),
        "auglocal --d 2": Recipe("auglocal", {"d": 2}),
        "auglocal --d 6": Recipe("auglocal", {"d": 6}),
        "dcl": Recipe("dcl"),
    },
    ("cifar/vgg8b", 128): {"backprop": Recipe("backprop"), "dcl": Recipe("dcl")},
}
RATE = 0.01
KERNELS = ("convolution", "mm")
"""In the names of the operations whose multiply-adds are counted."""
Step = Callable[[], Any]


def main() -> None:
    """Run what is asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--print", action="store_true", help="print what is there, and run nothing")
    parser.add_argument("--compile", action="store_true", help="compiled steps instead of eager ones")
    parser.add_argument("--channels-last", action="store_true", help="images and convolutions in this memory format")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="times that each step is timed")
    parser.add_argument("--net", choices=[net for net, _ in NETS], help="this net alone")
    parser.add_argument("--batch-size", type=int, metavar="N", help="instead of the net's own")
    arguments = parser.parse_args()
    if not arguments.print:
        for (net, batch), recipes in NETS.items():
            if arguments.net in (None, net):
                batch = arguments.batch_size or batch
                form = torch.channels_last if arguments.channels_last else torch.contiguous_format
                for row in rows(net, batch, recipes, form, rounds=arguments.rounds, compiled=arguments.compile):
                    with open(arguments.results, "a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
    print(table(arguments.results))


def rows(
    net: str, batch: int, recipes: dict[str, Recipe], form: torch.memory_format, *, rounds: int, compiled: bool
) -> list[dict[str, Any]]:
    """Time the steps of a net, and return a row for each method."""
    torch.set_num_threads(1)
    steps: dict[str, Step] = {}
    macs: dict[str, int] = {}
    notes: dict[str, str] = {}
    for name, recipe in recipes.items():
        local = made(net, recipe, form)
        macs[name] = memory.predict(local, batch).macs
        if compiled:
            local = localize.compile(local)
        steps[name] = generated(local, batch, form)
        if compiled:
            steps[name]()
            notes[name] = f"{local.graphs} graphs of {len(local.functions)}, {local.compile_seconds:.0f} s"
        elif name in BY_HAND and "resnet" in net:
            steps[f"{name}, by hand"] = BY_HAND[name](made(net, recipe, form), *batch_of(local, batch, form))
    if compiled:
        steps["backprop, torch.compile"] = whole(made(net, recipes["backprop"], form), *batch_of(local, batch, form))
    times = interleaved(steps, rounds)
    base = min((name for name in times if name.startswith("backprop")), key=lambda name: statistics.median(times[name]))
    spent = kernel_seconds(steps)
    found = []
    for name in steps:
        method = name.partition(",")[0]
        row = {"net": net, "batch": batch, "step": name, "compiled": compiled, "n": rounds, "torch": torch.__version__}
        row["form"] = str(form).removeprefix("torch.")
        row |= {"cores": os.cpu_count(), "base": base, "ratio": ratio(times[name], times[base])}
        row |= {"bound": macs[method] / macs["backprop"], "note": notes.get(name, "")}
        row["convolutions"] = ratio(spent[name], spent[base])
        hand = times.get(f"{name}, by hand")
        found.append(row | {"by_hand": ratio(times[name], hand) if hand else None})
    return found


def interleaved(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every step in every round, behind two rounds that are not timed."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(2 + rounds):
        for name, step in steps.items():
            started = time.process_time()
            step()
            if number >= 2:
                times[name].append(time.process_time() - started)
        print(f"\rround {number + 1} of {2 + rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return times


def kernel_seconds(steps: dict[str, Step], rounds: int = 5) -> dict[str, list[float]]:
    """Return the seconds of convolutions and matrix products in every step, in every round, by torch's profiler."""
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                step()
            found = [event for event in profiler.key_averages() if any(kind in event.key for kind in KERNELS)]
            spent[name].append(sum(event.self_cpu_time_total for event in found) / 1e6)
    return spent


def ratio(times: list[float], base: list[float]) -> float:
    """Return the median of the ratios within the rounds."""
    return statistics.median(a / b for a, b in zip(times, base, strict=True))


def made(net: str, recipe: Recipe, form: torch.memory_format) -> LocalModel:
    """Return the local model of a recipe on a net, always the same one."""
    torch.manual_seed(0)
    return build.build(replace(recipe, model=net)).train().to(memory_format=form)


def batch_of(local: LocalModel, count: int, form: torch.memory_format) -> tuple[Tensor, Tensor]:
    """Return random images and labels."""
    x, y = build.random_batch(local, count)
    return x.contiguous(memory_format=form), y


def generated(local: LocalModel, batch: int, form: torch.memory_format) -> Step:
    """Return the generated step on a batch."""
    x, y = batch_of(local, batch, form)
    optimizer = torch.optim.SGD(local.param_groups(lr=RATE), lr=RATE, momentum=0.9)
    return lambda: local.step(x, y, optimizer)


def whole(local: LocalModel, x: Tensor, y: Tensor) -> Step:
    """Return a step of backprop as users compile it: the model by ``torch.compile``, loss and update around it."""
    model = torch.compile(local.trunk)
    optimizer = torch.optim.SGD(local.trunk.parameters(), lr=RATE, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def bodies(local: LocalModel) -> list[nn.Sequential]:
    """Return the modules of each segment of a ResNet of the CIFAR kind, in the order in which they run."""
    trunk = local.trunk
    parts: list[tuple[str, nn.Module]] = [("relu", nn.Sequential(trunk.conv1, trunk.bn1, trunk.relu))]
    for stage in ("layer1", "layer2", "layer3"):
        parts += [(f"{stage}.{i}", block) for i, block in enumerate(getattr(trunk, stage))]
    found: list[list[nn.Module]] = [[]]
    ends = [segment.ends_at for segment in local.plan.segments.segments]
    for name, part in parts:
        found[-1].append(part)
        if name in ends:
            found.append([])
    found[-1] += [trunk.avgpool, nn.Flatten(), trunk.fc]
    assert len(found) == len(ends), "every segment ends behind a block"
    return [nn.Sequential(*modules) for modules in found]


def backprop_by_hand(local: LocalModel, x: Tensor, y: Tensor) -> Step:
    """Return the loop that everybody writes."""
    optimizer = torch.optim.SGD(local.trunk.parameters(), lr=RATE, momentum=0.9)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(local.trunk(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def auglocal_by_hand(local: LocalModel, images: Tensor, y: Tensor) -> Step:
    """Return a loop over segments with a head and a backward each, and one update."""
    parts = bodies(local)
    heads = [getattr(local.heads, f"head_{k}") for k in range(len(parts) - 1)]
    optimizer = torch.optim.SGD(local.parameters(), lr=RATE, momentum=0.9)

    def step() -> list[Tensor]:
        optimizer.zero_grad()
        x, losses = images, []
        for k, part in enumerate(parts):
            h = part(x)
            loss = F.cross_entropy(heads[k](h) if k < len(heads) else h, y)
            loss.backward()
            losses.append(loss.detach())
            x = h.detach()
        optimizer.step()
        return losses

    return step


def dcl_by_hand(local: LocalModel, images: Tensor, y: Tensor) -> Step:
    """Return a loop over segments with an optimizer each, all of which also update the dictionary."""
    parts = bodies(local)
    heads, dictionary = local.heads, local.heads.dictionary
    optimizers = [
        torch.optim.SGD([*part.parameters(), *dictionary.parameters()], lr=RATE, momentum=0.9) for part in parts[:-1]
    ]
    optimizers.append(torch.optim.SGD(parts[-1].parameters(), lr=RATE, momentum=0.9))

    def step() -> list[Tensor]:
        x, losses = images, []
        for k, part in enumerate(parts):
            h = part(x)
            scores = getattr(heads, f"head_{k}")(h, dictionary()) if k < len(parts) - 1 else h
            loss = F.cross_entropy(scores, y)
            loss.backward()
            optimizers[k].step()
            optimizers[k].zero_grad()
            losses.append(loss.detach())
            x = h.detach()
        return losses

    return step


BY_HAND = {
    "backprop": backprop_by_hand,
    "auglocal --d 2": auglocal_by_hand,
    "auglocal --d 6": auglocal_by_hand,
    "dcl": dcl_by_hand,
}


def table(results: Path) -> str:
    """Return the results as a Markdown table."""
    told = ["| net, batch | step | time | arithmetic | time over it | convolutions | to the loop by hand | n | |"]
    told.append("|---|---|---:|---:|---:|---:|---:|---:|---|")
    for row in [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []:
        if row["step"].endswith("by hand"):
            continue
        hand = f"{row['by_hand']:.3f}" if row["by_hand"] else ""
        name = f"`{row['step']}`{', compiled' if row['compiled'] else ''}"
        name += f", {row['form']}" * (row["form"] == "channels_last")
        shares = " | ".join(
            f"{share:.3f}" for share in (row["ratio"], row["bound"], row["ratio"] / row["bound"], row["convolutions"])
        )
        net = f"{row['net'].partition('/')[2]}, {row['batch']}"
        told.append(f"| {net} | {name} | {shares} | {hand} | {row['n']} | {row['note']} |")
    return "\n".join(told)


if __name__ == "__main__":
    keep_pages()
    main()
