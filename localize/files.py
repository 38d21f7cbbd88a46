"""Write files so that there is the old one or the new one, and never half of one; check which version wrote one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import localize
from localize.errors import VersionError

VERSION = 1
"""Version of the interface: the layout of recipes, ``plan.json``, ``audit.json`` and checkpoints, and the names and
signatures that generated text calls and defines. Every such file says it under ``version``; localize 0.1.0 wrote none.
"""


def check_version(version: Any, name: str) -> None:
    """Refuse a file of a later version than this localize reads.

    Args:
        version: what the file says under ``version``; None where it says nothing, as the files of localize 0.1.0.
        name: what messages call the file.

    Raises:
        VersionError: the version is a later one, or is not a whole number from 0 on.
    """
    if version is None:
        return
    ours = f"localize {localize.__version__} reads versions up to {VERSION}."
    if not isinstance(version, int) or isinstance(version, bool) or version < 0:
        raise VersionError(
            f"the version of {name} cannot be {version!r}.",
            facts=f"a version is a whole number; {ours}",
            help=f"version: {VERSION}, or leave it out",
        )
    if version > VERSION:
        raise VersionError(
            f"{name} is of version {version}, which a later localize has written.",
            facts=ours,
            help="pip install --upgrade torch-localize",
        )


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; on success it becomes ``path`` in one step, on failure it is removed.

    The file, and then its folder, are flushed to the disk: after a power cut there is the old file or the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        yield temporary
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
