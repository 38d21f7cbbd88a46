"""A progress bar on stderr for long tasks, with the results so far of a training pass."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from localize.ir import Plan
from localize.train.state import Tally

READ_AFTER = 1.0
"""Seconds between two updates of the status text: each update waits for the device."""


@contextmanager
def watching(label: str, steps: int, show: bool, done: int = 0) -> Iterator[Callable[..., None]]:
    """Show a progress bar while the body runs, and remove it afterwards.

    The yielded function advances the bar by one step. It takes an optional function that returns a status text, and
    calls it at most once in ``READ_AFTER`` seconds.
    """
    if not show:
        yield lambda standing=None: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # stdout is not used: epoch lines may go to a file while the bar is on the terminal.
    with Progress(
        *columns,
        TextColumn("{task.fields[told]}"),
        console=Console(stderr=True, force_terminal=True),
        transient=True,
        redirect_stdout=False,
    ) as bar:
        task = bar.add_task(label, total=steps, completed=done, told="")
        read = time.monotonic()

        def advance(standing: Callable[[], str] | None = None) -> None:
            nonlocal read
            if standing is not None and time.monotonic() - read >= READ_AFTER:
                bar.update(task, told=standing())
                read = time.monotonic()
            bar.advance(task)

        yield advance


def standing(tally: Tally, plan: Plan, device: torch.device) -> str:
    """Return the results of an epoch so far, in one line.

    It has the loss of the model's own output in the last step; its accuracy, and that of the worst segment, over the
    epoch; images per second; and peak memory in MiB, of tensors on CUDA and of this process on a CPU.
    """
    last = tally.losses[-1]
    loss = last.sum() if any(loss.part for loss in plan.losses) else last[-1]
    parts = [f"loss {float(loss):.3f}", f"{100 * int(tally.final_right) / tally.images:.1f} %"]
    shares = {loss.name: loss.part[1] if loss.part else 1 for loss in plan.losses}
    if len(tally.right) > 1:
        right = {name: int(count) * shares[name] for name, count in tally.right.items()}
        worst = min(right, key=right.__getitem__)
        parts.append(f"worst {worst} {100 * right[worst] / tally.images:.1f} %")
    parts += [f"{tally.images / tally.seconds:.0f} images/s", f"{_most_memory(device) / 2**20:,.0f} MiB"]
    return "  ".join(parts)


def _most_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
