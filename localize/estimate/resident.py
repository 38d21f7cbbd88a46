"""Resident memory of training steps: the memory that the operating system gives a process.

It is more than the bytes of live tensors. On a CPU the C library's allocator keeps much of the freed memory, in pieces
too small for later tensors. How much depends on earlier allocations, so each step is measured in its own process.
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
"""Number of steps to run: the first creates the optimizer's state, and memory no longer grows after the third."""
SETTING = "MALLOC_MMAP_THRESHOLD_=131072"
"""Makes glibc return every block of at least 128 KiB as soon as it is freed. By default this threshold rises with the
size of freed blocks, up to 32 MiB (man 3 mallopt)."""
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def is_known() -> bool:
    """Return whether the operating system reports resident memory, as Linux does."""
    return _CLEAR.exists() and "VmHWM" in _status()


def told() -> str:
    """Return the peak resident memory of this process in MiB, with advice if the C library keeps freed memory.

    Nothing is set here. To trade time for memory, set the variable before the command, as in PyTorch's performance
    guide. The result is empty if the operating system does not report resident memory.
    """
    most = _status().get("VmHWM")
    if most is None:
        return ""
    advice = f"; {SETTING} before the command: less memory, slower steps (docs/cost.md)" if keeps_freed() else ""
    return f"resident: {most / 2**20:,.0f} MiB at most{advice}"


def keeps_freed() -> bool:
    """Return whether memory comes from glibc with its default settings, and not from another allocator."""
    set_here = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    return platform.libc_ver()[0] == "glibc" and not set_here and "malloc" not in os.environ.get("LD_PRELOAD", "")


def measured(recipe: Recipe, batch_size: int, *, opt: str = "", autocast: torch.dtype | None = None) -> int | None:
    """Return the peak resident bytes while steps of a recipe run in a process of their own.

    Libraries, and memory left by the conversion, are not counted; the model's weights are, as in
    :class:`localize.estimate.memory.Footprint`.

    Args:
        recipe: model and method.
        batch_size: N, the number of (random) images.
        opt: name of the optimizer in timm; default: SGD with momentum.
        autocast: type of a surrounding ``torch.autocast``; None for no autocast.

    Returns:
        The number of bytes; None if the operating system does not report it, or the process fails.
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
    """Run steps in this process; return the peak resident bytes, without libraries and the conversion."""
    torch.set_num_threads(asked["threads"])
    local = build.build(recipes.parse(asked["recipe"], "the recipe")).train()
    x, y = build.random_batch(local, asked["batch_size"])
    dtype = getattr(torch, asked["autocast"]) if asked["autocast"] else None
    under = memory.Conditions(memory.named(asked["opt"]) if asked["opt"] else memory.sgd, dtype)
    optimizer = under.optimizer(local.param_groups(lr=0.01))
    gc.collect()
    held = sum(value.nbytes for value in (*local.parameters(), *local.buffers(), x, y))
    _CLEAR.write_text("5")  # resets the peak, see man 5 proc
    before = _status()["VmRSS"]
    for _ in range(STEPS):
        with under.around("cpu"):
            result = local.step(x, y, optimizer)
    del result
    return _status()["VmHWM"] - before + held


def _status() -> dict[str, int]:
    """Return the operating system's numbers for this process, in bytes."""

    def lines() -> Iterator[tuple[str, int]]:
        for line in _STATUS.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if value.endswith(" kB"):
                yield name, int(value.split()[0]) * 1024

    return dict(lines()) if _STATUS.exists() else {}
