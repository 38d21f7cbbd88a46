"""Checkpoints of a run: files that are whole or not there, of which the last two are kept.

::

    RUN/checkpoints/step-00000400.pt    the run behind its 400th optimizer step

A file holds plain values and tensors only, and is read with ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from localize.errors import MissingError
from localize.files import VERSION, check_version, replacing

FOLDER = "checkpoints"
KEPT = 2
FORM = "localize run, 1"
"""What a checkpoint says under ``form``; the number is that of the layout of its values."""


def save(run: Path, step: int, values: Mapping[str, Any]) -> Path:
    """Write a checkpoint, flush it to the disk, and only then remove all but the last two.

    Checkpoints of later steps are removed too: they are of a run that was taken up again before them.

    Raises:
        MissingError: it cannot be written. Nothing is removed then.
    """
    path = run / FOLDER / f"step-{step:08d}.pt"
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            torch.save({"form": FORM, "version": VERSION, **values}, file)
    except (OSError, RuntimeError) as error:
        last = files(run)[-1:]
        raise MissingError(
            f"the checkpoint of step {step} cannot be written to {path.parent}.",
            facts=(str(error).partition("\n")[0], f"the last one is {last[0].name}." if last else "there is none yet."),
            help=f"make room, then localize train --resume {run}",
        ) from error
    kept = [file for file in files(run) if step_of(file) <= step][-KEPT:]
    for file in files(run):
        if file not in kept:
            file.unlink()
    return path


def files(run: Path) -> list[Path]:
    """Return the checkpoints of a run by ascending step."""
    found = (run / FOLDER).glob("step-*.pt")
    return sorted((path for path in found if re.fullmatch(r"step-\d+", path.stem)), key=step_of)


def step_of(path: Path) -> int:
    """Return the number of optimizer steps before a checkpoint, as its name says."""
    return int(path.stem.removeprefix("step-"))


def clean(run: Path) -> None:
    """Remove files that a killed process was writing. Who calls holds the lock of the run."""
    for left in (run / FOLDER).glob(".step-*.pt"):
        left.unlink()


def last(run: Path, tell: Callable[[str], None] = lambda line: None) -> tuple[Path, dict[str, Any]] | None:
    """Read the last checkpoint that is whole; None where none was ever written.

    Args:
        run: the folder of a run.
        tell: is called with a line for each later file that cannot be read.

    Raises:
        MissingError: there are checkpoints, and none is whole.
        VersionError: a later version of localize has written one.
    """
    problems: list[MissingError] = []
    for path in reversed(files(run)):
        try:
            values = read(path)
        except MissingError as error:
            problems.append(error)
            continue
        for error in problems:
            tell(f"{error.problem} {' '.join(error.facts)}")
        return path, values
    if problems:
        raise MissingError(
            f"no checkpoint in {run / FOLDER} is whole.",
            facts=[f"{error.problem} {' '.join(error.facts)}" for error in problems],
            help=f"localize train --recipe {run} --output NEW begins anew; so does --resume with {FOLDER}/ removed",
        )
    return None


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint, all tensors on the CPU.

    Raises:
        MissingError: it is torn, damaged, or no checkpoint of a run.
        VersionError: a later version of localize has written it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise MissingError(f"{path} is damaged.", facts=f"the checksum of {damaged} is not that of its content.")
        values = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        if isinstance(error, MissingError):
            raise
        raise MissingError(f"{path} is torn, or no checkpoint.", facts=str(error).partition("\n")[0]) from error
    if not isinstance(values, dict) or values.get("form") != FORM:
        form = values.get("form") if isinstance(values, dict) else None
        raise MissingError(
            f"{path} is not a checkpoint of a run of this version.",
            facts=f"it does not say {FORM!r}" + (f" but {form!r}." if form else "."),
        )
    check_version(values.get("version"), str(path))
    return values
