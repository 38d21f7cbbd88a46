"""Kill training runs at random moments, go on with them, and compare their end with that of an undisturbed run.

A run is a process of its own. It is sent SIGKILL at a random moment and started again with ``resume``, over and over;
when it comes to its end, another is begun, until ``--kills`` have been sent. Compared are the bytes of the trained
model and of the heads, and the lines of the metrics without the speed. The moments depend on the machine; ``--seed``
fixes only what is drawn::

    python benchmarks/kill_and_resume.py --kills 5
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from localize import recipes
from localize.train import TrainConfig, checkpoints, resume, run, runs

SMALL = {"model": "cifar/fc_mnist", "input_shape": (1, 12, 12)}
DEEP = {"model": "cifar/resnet20", "input_shape": (3, 8, 8)}
CASES: Mapping[str, Mapping[str, Any]] = {
    "dcl": SMALL | {"recipe": "dcl", "opt": "adamw", "lr": 5e-4},
    "mlaan": DEEP | {"recipe": "mlaan", "opt": "sgd", "lr": 0.05, "max_steps": 44},
    "predsim": DEEP | {"recipe": "predsim", "opt": "adam", "lr": 5e-4, "max_steps": 44},
    "auglocal": DEEP
    | {"recipe": "auglocal", "options": {"d": 2}, "opt": "sgd", "lr": 0.05, "max_steps": 44, "model_ema": True}
    | {"model_ema_decay": 0.99, "clip_grad": 1.0, "grad_accum_steps": 2, "batch_size": 32},
}
"""Shared dictionary, with AdamW moments for each loss; copies pulled along; an update by Adam after each segment;
averaged weights, accumulated and clipped gradients."""
COMMON = {"epochs": 3, "batch_size": 64, "checkpoint_every": 5, "device": "cpu"}


@dataclass
class Found:
    """What happened to a run."""

    kills: list[int]
    """The step of the last checkpoint at every kill; 0 where there was none."""
    runs: int
    """Runs that the kills fell on."""
    torn: int
    """Kills that left a half-written file."""
    same: bool
    """The end is that of the undisturbed run."""


def main() -> None:
    """Print the table; exit with 1 if a run ended otherwise than the undisturbed one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5, metavar="N", help="kills of each run (default 5)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments (default 0)")
    parser.add_argument("--only", nargs="*", choices=sorted(CASES), default=list(CASES), help="which runs")
    arguments = parser.parse_args()
    moments = random.Random(arguments.seed)
    found = {}
    for name in arguments.only:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = disturb(name, Path(folder), arguments.kills, moments)
        print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
    print("| run | optimizer | kills | step of the last checkpoint before each | half-written files | runs | ends |")
    print("|---|---|---:|---|---:|---:|---|")
    for name, one in found.items():
        steps, end = ", ".join(map(str, one.kills)), "the same, bit for bit" if one.same else "DIFFERS"
        print(f"| `{name}` | {CASES[name]['opt']} | {len(one.kills)} | {steps} | {one.torn} | {one.runs} | {end} |")
    sys.exit(not all(one.same for one in found.values()))


def disturb(name: str, folder: Path, kills: int, moments: random.Random) -> Found:
    """Train once undisturbed, and as often as it takes with kills; compare."""
    plain, killed = folder / "plain", [folder / "killed-0"]
    assert start(name, None).wait() == 0  # what all processes import
    began = time.perf_counter()
    assert start(name, plain).wait() == 0
    seconds = time.perf_counter() - began
    found = Found([], 0, 0, False)
    while len(found.kills) < kills:
        one = start(name, killed[-1])
        one.wait(moments.uniform(0, 1.2 * seconds))
        last = max(map(checkpoints.step_of, checkpoints.files(killed[-1])), default=0)
        one.process.kill()
        if one.wait() == 0:  # it had come to its end
            killed.append(folder / f"killed-{len(killed)}")
            continue
        assert one.wait() == -signal.SIGKILL
        found.kills.append(last)
        found.torn += any((killed[-1] / checkpoints.FOLDER).glob(".*"))
    assert start(name, killed[-1]).wait() == 0
    found.runs, found.same = len(killed), all(same(one, plain) for one in killed)
    return found


def same(one: Path, other: Path) -> bool:
    """Tell whether two runs have left the same weights and the same metrics, bit for bit."""
    files = [file for file in (str(runs.BACKBONE), runs.HEADS) if (other / file).exists()]
    return all((one / f).read_bytes() == (other / f).read_bytes() for f in files) and metrics(one) == metrics(other)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the metrics without the speed."""
    lines = [json.loads(line) for line in (folder / runs.METRICS).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


@dataclass(frozen=True)
class Process:
    """A run in a process of its own."""

    process: Any

    def wait(self, seconds: float | None = None) -> int | None:
        """Return the exit code, or None where the run is not at its end after so many seconds."""
        self.process.join(seconds)
        return self.process.exitcode


def start(name: str, folder: Path | None) -> Process:
    """Begin a run, or go on with it; without a folder, do nothing in a process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["localize.train.loop", "sklearn.datasets"])
    process = context.Process(target=train, args=(name, folder))
    process.start()
    return Process(process)


def train(name: str, folder: Path | None) -> None:
    """Train in this process, without a word."""
    if folder is None:
        return
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        if (folder / recipes.FILE_NAME).exists():
            resume(folder)
        else:
            run(TrainConfig(**{**COMMON, **CASES[name], "output": str(folder)}), force=True)


if __name__ == "__main__":
    main()
