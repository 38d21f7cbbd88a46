"""What benchmarks of steps on a CPU share: an allocator that keeps its pages, times, and what a step takes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from localize.runtime.model import LocalModel

PAGES = {
    "MALLOC_MMAP_THRESHOLD_": "34359738368",
    "MALLOC_TRIM_THRESHOLD_": "34359738368",
    "MALLOC_ARENA_MAX": "1",
}


def keep_pages() -> None:
    """Start this script again with a C library that keeps its pages, unless it does.

    Otherwise a fifth of a step is page faults that come and go.
    """
    if any(os.environ.get(name) != value for name, value in PAGES.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **PAGES})


def interleaved(
    steps: Mapping[str, LocalModel],
    x: Tensor,
    y: Tensor,
    optimizers: Mapping[str, torch.optim.Optimizer],
    rounds: int,
) -> dict[str, list[float]]:
    """Return the CPU seconds of every step in each round, in which each runs once; a first round is left out."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, local in steps.items():
            started = time.process_time()
            local.step(x, y, optimizers[name])
            if number:
                seconds[name].append(time.process_time() - started)
            optimizers[name].zero_grad(set_to_none=True)
    return seconds


def allocated(local: LocalModel, x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer) -> int:
    """Return the most bytes that the CPU allocator gave out in a step, above what it had given out before."""
    optimizer.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        local.step(x, y, optimizer)
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
