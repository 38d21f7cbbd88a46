"""Work on several items at a time, in processes that are copies of this one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.context import ForkContext
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST = 4
"""Largest number of processes by default: each holds a copy of what it follows."""


def default() -> int:
    """Return how many processes are worth starting here: one for each core, and at most :data:`MOST`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST)


def each(work: Callable[[Item], Result], items: Sequence[Item], processes: int) -> Iterator[Result]:
    """Yield ``work(item)`` for every item, in their order, computed by a number of processes.

    The processes are forked, so ``work`` may read anything that is already here; results are pickled. PyTorch may
    forbid a backward in them once this process has run one on tensors without values. Then (or without a fork, or in a
    daemon) all is done here, one item after the other, as for one process; so is what is left when a process is killed.

    Args:
        work: what it changes may be lost, and it shows nothing.
        items: each is taken by the next process that is free.
        processes: how many. For two or more, no item is done here, so that other calls may follow.
    """
    global _work
    if processes < 2 or not items or not _fork_works():
        yield from map(work, items)
        return
    before, _work = _work, work
    others = set(multiprocessing.active_children())
    try:
        with _unwarned(), ProcessPoolExecutor(min(processes, len(items)), _context(), _begin) as pool:
            done = 0
            try:
                with _interrupted_later():
                    results = pool.map(_call, items)
                for result in results:
                    done += 1
                    yield result
            except BrokenProcessPool:  # one was killed, perhaps for its memory
                yield from map(work, items[done:])
            except BaseException:  # Ctrl-C among them
                pool.shutdown(wait=False, cancel_futures=True)
                for process in set(multiprocessing.active_children()) - others:
                    process.terminate()
                raise
    finally:
        _work = before


_work: Callable[[Any], Any] | None = None
"""What the processes do; they read it as it is when they are forked."""


def _begin() -> None:
    _end_without_a_word()
    torch.set_num_threads(1)


def _end_without_a_word() -> None:
    """Let Ctrl-C end this process at once, unless it is ignored; the first process says that it was interrupted."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@contextmanager
def _interrupted_later() -> Iterator[None]:
    """Delay Ctrl-C while processes are forked, until each has set how it reacts."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _call(item: Any) -> Any:
    assert _work is not None, "set before the processes are forked"
    return _work(item)


def _context() -> ForkContext:
    return multiprocessing.get_context("fork")


def _unwarned() -> warnings.catch_warnings[None]:
    """Silence Python's warning of threads beside this one: they draw progress, and the copies draw none."""
    return warnings.catch_warnings(action="ignore", category=DeprecationWarning)


def _fork_works() -> bool:
    """Return whether a forked process can run a backward."""
    if sys.platform != "linux" or multiprocessing.current_process().daemon:
        return False
    with _unwarned(), _interrupted_later():
        probe = _context().Process(target=_probe)
        probe.start()
    probe.join()
    return probe.exitcode == 0


def _probe() -> None:
    _end_without_a_word()
    try:
        torch.ones(1, requires_grad=True).sum().backward()
    except RuntimeError:
        sys.exit(1)
