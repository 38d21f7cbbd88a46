"""Where the processes of a run are, and whether they still run: those on the same host can be looked up there."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True)
class Place:
    """A process of a run."""

    host: str
    """Name of the host, and of the space in which its process numbers count."""
    pid: int
    started: str
    """When it was started, in ticks since the host was; empty where the system does not say."""


def here() -> Place:
    """Return the place of this process."""
    return Place(_host(), os.getpid(), _status(os.getpid())[1])


def trouble(place: Place) -> str | None:
    """Say what is the matter with a process.

    Returns:
        ``"has ended"``, ``"is stopped"``, or None where it runs, is on another host, or cannot be looked up.
    """
    if place.host != _host() or not place.started:
        return None
    state, started = _status(place.pid)
    if state in ("", "Z", "X") or started != place.started:
        return "has ended"
    return "is stopped" if state in ("T", "t") else None


def _host() -> str:
    try:
        space = os.readlink(PROC / "self/ns/pid")
    except OSError:
        space = ""
    return f"{socket.gethostname()} {space}"


def _status(pid: int) -> tuple[str, str]:
    """Return the state of a process, a letter, and when it was started; empty texts where it does not exist."""
    try:
        told = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return told[0], told[19]
