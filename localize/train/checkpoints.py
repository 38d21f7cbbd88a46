"""Checkpoints of a run: files that are either complete or absent. The last two are kept.

::

    RUN/checkpoints/step-00000400.pt    the run after its 400th optimizer step

A file contains only plain values and tensors. It is read with ``torch.load(weights_only=True)``, after a check that it
is no larger than the model needs. It also contains a digest of these values, so a file that :func:`save` did not write,
or that is incomplete, is not used.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from localize.errors import LocalizeError, MissingError
from localize.files import VERSION, check_version, replacing

FOLDER = "checkpoints"
KEPT = 2
FORM = "localize run, 2"
"""Value of ``form`` in a checkpoint; the number is the version of its layout."""
_DIGEST = "sha256"
T = TypeVar("T")


def save(run: Path, step: int, values: Mapping[str, Any]) -> Path:
    """Write a checkpoint, flush it to the disk, and only then remove all but the last two.

    Checkpoints of later steps are removed too, because the run was then resumed from an earlier checkpoint.

    Raises:
        MissingError: it cannot be written. In that case nothing is removed.
    """
    path = run / FOLDER / f"step-{step:08d}.pt"
    try:
        if path.is_dir():
            path.rmdir()  # an empty folder that somebody made; others are not removed
        with replacing(path) as temporary, temporary.open("wb") as opened:
            torch.save({"form": FORM, "version": VERSION, _DIGEST: digest(values), **values}, opened)
    except (OSError, RuntimeError) as error:
        last = files(run)[-1:]
        raise MissingError(
            f"the checkpoint of step {step} cannot be written to {path.parent}.",
            facts=(str(error).partition("\n")[0], f"the last one is {last[0].name}." if last else "there is none yet."),
            help=f"make room, then localize train --resume {run}",
        ) from error
    written = [file for file in files(run) if not file.is_dir()]
    kept = [file for file in written if step_of(file) <= step][-KEPT:]
    for file in written:
        if file not in kept:
            file.unlink()
    return path


def files(run: Path) -> list[Path]:
    """Return the checkpoints of a run by ascending step."""
    found = (run / FOLDER).glob("step-*.pt")
    return sorted((path for path in found if re.fullmatch(r"step-\d{1,18}", path.stem)), key=step_of)


def step_of(path: Path) -> int:
    """Return the number of optimizer steps before a checkpoint, from its file name."""
    return int(path.stem.removeprefix("step-"))


def take_last(
    run: Path,
    use: Callable[[Path, dict[str, Any]], T],
    *,
    limit: int | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> tuple[Path, T] | None:
    """Use the last usable checkpoint; return None if none was ever written.

    Args:
        run: the folder of a run.
        use: takes the path and the values of a checkpoint. It raises a ``LocalizeError`` if they belong to another
            run; any other exception means that the values are damaged.
        limit: size limit of a checkpoint in bytes; larger ones are not read.
        tell: called with a line for each later checkpoint that cannot be used.

    Returns:
        The path of the checkpoint, and the result of ``use``.

    Raises:
        LocalizeError: there are checkpoints, but none can be used. If the last one is intact, this is the error that
            ``use`` raised.
        VersionError: a later version of localize wrote one.
    """
    problems: list[LocalizeError] = []
    refused: LocalizeError | None = None
    for path in reversed(files(run)):
        try:
            values = read(path, limit=limit)
        except MissingError as error:
            problems.append(error)
            continue
        try:
            used = use(path, values)
        except LocalizeError as error:
            refused = refused or error
            problems.append(error)
            continue
        except Exception as error:  # values of the wrong type or shape may raise anything
            told = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            problems.append(MissingError(f"{path} is damaged.", facts=told))
            continue
        for problem in problems:
            tell(f"{problem.problem} {' '.join(problem.facts)}")
        return path, used
    if refused is not None and problems[0] is refused:
        raise refused
    if problems:
        raise MissingError(
            f"no checkpoint in {run / FOLDER} is intact.",
            facts=[f"{error.problem} {' '.join(error.facts)}" for error in problems],
            help=f"localize train --recipe {run} --output NEW starts again; so does --resume with {FOLDER}/ removed",
        )
    return None


def read(path: Path, *, limit: int | None = None) -> dict[str, Any]:
    """Read a checkpoint, all tensors on the CPU.

    Args:
        path: the file.
        limit: size limit in bytes, unpacked; larger files are not read.

    Raises:
        MissingError: it is incomplete, damaged, too large, or not a checkpoint of a run.
        VersionError: a later version of localize wrote it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            size = sum(entry.file_size for entry in entries)
            if limit is not None and size > limit:
                raise MissingError(
                    f"{path} is too large for a checkpoint of this run.",
                    facts=f"it unpacks to {size:,} bytes; the model and its optimizer need at most {limit:,} bytes.",
                )
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise MissingError(f"{path} is not a checkpoint.", facts="it is compressed, and checkpoints are not.")
            damaged = archive.testzip()
        if damaged is not None:
            raise MissingError(f"{path} is damaged.", facts=f"the checksum of {damaged} does not match its content.")
        values = torch.load(path, map_location="cpu", weights_only=True)
    except MissingError:
        raise
    except Exception as error:  # a file of another kind may raise anything
        told = str(error).partition("\n")[0] or type(error).__name__
        raise MissingError(f"{path} is incomplete, or not a checkpoint.", facts=told) from error
    if not isinstance(values, dict) or values.get("form") != FORM:
        form = values.get("form") if isinstance(values, dict) else None
        raise MissingError(
            f"{path} is not a checkpoint that this version can read.",
            facts=f"it does not say {FORM!r}" + (f" but {str(form)[:60]!r}." if form else "."),
        )
    check_version(values.get("version"), str(path))
    content = {key: value for key, value in values.items() if key not in ("form", "version", _DIGEST)}
    if values.get(_DIGEST) != digest(content):
        raise MissingError(f"{path} is damaged.", facts="parts are missing or have changed: the digest differs.")
    return content


def digest(values: Any) -> str:
    """Return the SHA-256 of plain values and tensors; the kinds of mappings and sequences do not matter."""
    found = hashlib.sha256()
    _feed(values, found.update)
    return found.hexdigest()


def _feed(value: Any, update: Callable[[bytes], None]) -> None:
    if isinstance(value, Tensor):
        update(f"tensor {value.dtype} {tuple(value.shape)}".encode())
        array: Any = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        update(array)
    elif isinstance(value, Mapping):
        update(f"mapping {len(value)}".encode())
        for key, child in value.items():
            _feed(key, update)
            _feed(child, update)
    elif isinstance(value, list | tuple):
        update(f"sequence {len(value)}".encode())
        for child in value:
            _feed(child, update)
    else:
        update(f"{type(value).__name__} {value!r}".encode())
