"""Resident memory of training steps: what the operating system gives a process, beside the bytes of live tensors.

On a CPU the allocator of the C library keeps much of what tensors give back, in pieces that the next ones do not fit
into. How much depends on what was allocated before, so that each step is measured in a process of its own.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from localize import build, recipes
from localize.estimate import memory
from localize.recipes import Recipe

STEPS = 3
"""Steps that are run: the first makes the optimizer's state, and what is kept between steps is kept by the third."""
SETTING = "MALLOC_MMAP_THRESHOLD_=131072"
"""Lets glibc give every block of 128 KiB and more back as soon as it is freed. By default this threshold rises with the
blocks that are freed, to 32 MiB (man 3 mallopt)."""
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def is_known() -> bool:
    """Tell whether the operating system says what is resident: Linux does."""
    return _CLEAR.exists() and "VmHWM" in _status()


def told() -> str:
    """Say how much of this process was resident at most, and what to type where the C library keeps what was freed.

    Nothing is set here: whoever wants less memory for more time says so in front of the command, as PyTorch's own guide
    to its performance has it. Empty where the operating system does not say.
    """
    most = _status().get("VmHWM")
    if most is None:
        return ""
    advice = f"; {SETTING} in front of the command: less, for longer steps (docs/cost.md)" if keeps_freed() else ""
    return f"resident: {most / 2**20:,.0f} MiB at most{advice}"


def keeps_freed() -> bool:
    """Tell whether memory comes from glibc as it is by default: no setting of it, and no other allocator."""
    set_here = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    return platform.libc_ver()[0] == "glibc" and not set_here and "malloc" not in os.environ.get("LD_PRELOAD", "")


def measured(recipe: Recipe, batch_size: int, *, opt: str = "", autocast: torch.dtype | None = None) -> int | None:
    """Return the most bytes that are resident while steps of a recipe run, in a process of their own.

    Its libraries, and what a conversion leaves, are not counted; the model's weights are, as in
    :class:`localize.estimate.memory.Footprint`.

    Args:
        recipe: which model, by which method.
        batch_size: N, the number of images, which are random.
        opt: name of the optimizer in timm; default is SGD with momentum.
        autocast: type of a surrounding ``torch.autocast``; None is none.

    Returns:
        None where the operating system does not say, or the process fails.
    """
    if not is_known():
        return None
    asked = {
        "recipe": recipes.dump(recipe),
        "batch_size": batch_size,
        "opt": opt,
        "autocast": "" if autocast is None else str(autocast).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "path": sys.path,
    }
    command = [sys.executable, "-c", "import json, sys; asked = json.load(sys.stdin); sys.path[:] = asked['path']\n"
               f"import {__name__} as it; print(it.run(asked))"]  # fmt: skip
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=False)
    return int(done.stdout.split()[-1]) if done.returncode == 0 and done.stdout.strip() else None


def run(asked: dict) -> int:
    """Run steps in this process; return the most bytes resident, above what its libraries and the conversion hold."""
    torch.set_num_threads(asked["threads"])
    local = build.build(recipes.parse(asked["recipe"], "the recipe")).train()
    x, y = build.random_batch(local, asked["batch_size"])
    dtype = getattr(torch, asked["autocast"]) if asked["autocast"] else None
    under = memory.Conditions(memory.named(asked["opt"]) if asked["opt"] else memory.sgd, dtype)
    optimizer = under.optimizer(local.param_groups(lr=0.01))
    gc.collect()
    held = sum(value.nbytes for value in (*local.parameters(), *local.buffers(), x, y))
    _CLEAR.write_text("5")  # the highest number begins anew, see man 5 proc
    before = _status()["VmRSS"]
    for _ in range(STEPS):
        with under.around("cpu"):
            result = local.step(x, y, optimizer)
    del result
    return _status()["VmHWM"] - before + held


def _status() -> dict[str, int]:
    """Return what the operating system says about this process, in bytes."""

    def lines() -> Iterator[tuple[str, int]]:
        for line in _STATUS.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if value.endswith(" kB"):
                yield name, int(value.split()[0]) * 1024

    return dict(lines()) if _STATUS.exists() else {}
