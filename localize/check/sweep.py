"""Check many models, each in a process of its own, so that none can end the others.

The processes are forked from one that has imported everything, and so cost no import. One that takes too long, holds
too much memory or dies is a row that says so.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from localize import zoo
from localize.check import one
from localize.check.one import Row
from localize.check.rows import Key

CHECKS = {"static": one.static, "run": one.run}
PATIENCE = 0.2
"""Seconds between two looks at time and memory."""
ENDING = 10.0
"""Seconds in which a process that has sent its row may end by itself."""


@dataclass(frozen=True)
class Limits:
    """What one check may take."""

    seconds: float = 300.0
    gib: float = 8.0
    """Resident memory, what it shares with the process it was forked from included; read from /proc, where there is."""


@dataclass
class _Running:
    key: Key
    process: Any
    connection: Connection
    output: Path
    start: float = field(default_factory=time.monotonic)
    stage: str = "start"
    row: Row | None = None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def read(self) -> None:
        """Take what the process has sent: stages, and at last its row."""
        with suppress(EOFError, OSError):
            while self.connection.poll():
                sent = self.connection.recv()
                if isinstance(sent, str):
                    self.stage = sent
                else:
                    self.row = sent

    def stop(self) -> None:
        if self.row is not None:
            self.process.join(ENDING)
        self.process.kill()
        self.process.join()
        self.connection.close()
        self.output.unlink(missing_ok=True)


def sweep(tasks: Iterable[Key], *, jobs: int, limits: Limits) -> Iterator[Row]:
    """Check models, ``jobs`` at a time; yield their rows as they are done.

    A row has ``check`` and ``name``, ``library`` and ``family``, ``total`` (seconds), and what the check returns.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "localize.cli", "torchvision", "timm"])
    waiting = list(reversed(list(tasks)))
    running: list[_Running] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    running.append(_start(context, waiting.pop(), Path(folder)))
                wait([each.connection for each in running], PATIENCE)
                for each in list(running):
                    found = _look(each, limits)
                    if found is not None:
                        running.remove(each)
                        each.stop()
                        yield _described(each.key) | {"total": round(each.seconds, 2)} | found
        finally:
            for each in running:
                each.stop()


def _described(key: Key) -> Row:
    check, name = key
    return {"check": check, "name": name, "library": zoo.library(name), "family": zoo.family(name)}


def _start(context: Any, key: Key, folder: Path) -> _Running:
    ours, theirs = context.Pipe(duplex=False)
    descriptor, output = tempfile.mkstemp(dir=folder)
    os.close(descriptor)
    process = context.Process(target=_work, args=(*key, theirs, output), daemon=True)
    process.start()
    theirs.close()
    return _Running(key, process, ours, Path(output))


def _work(check: str, name: str, connection: Connection, output: str) -> None:
    """Check one model in this process; what libraries print goes into a file."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one decides
    try:
        descriptor = os.open(output, os.O_WRONLY)
    except FileNotFoundError:  # the sweep was interrupted while this process was started
        return
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    connection.send(CHECKS[check](name, connection.send))


def _look(running: _Running, limits: Limits) -> Row | None:
    """Return the row of a check that is over, or has to end."""
    alive = running.process.is_alive()  # asked before the connection is read: all it sent is there
    running.read()
    if running.row is not None:
        return running.row
    if not alive:
        return _ended(running, "Crash", _crash(running))
    if running.seconds > limits.seconds:
        return _ended(running, "Timeout", f"not done after {limits.seconds:g} s")
    held = _resident(running.process.pid)
    if held > limits.gib:
        return _ended(running, "Memory", f"held {held:.1f} GiB, more than {limits.gib:g}")
    return None


def _ended(running: _Running, error: str, message: str) -> Row:
    return {"ok": False, "failures": [{"stage": running.stage, "error": error, "message": message}]}


def _crash(running: _Running) -> str:
    code = running.process.exitcode
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    printed = running.output.read_text(errors="replace").strip().splitlines()
    return f"the process ended with {how}" + (f": {printed[-1]}" if printed else "")


def _resident(pid: int) -> float:
    """Return the memory that a process holds, in GiB; 0 where the system does not tell in /proc."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30
