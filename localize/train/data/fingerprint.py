"""What a run records about its data, and how today's data differ from that record.

The recipe contains the summary (:class:`localize.recipes.preprocessing.DataRecord`). ``data.json`` in the run folder
contains the names and sizes of all files, so that a message can name the difference::

    {"folder": "/data/pets", "train": {"train/cat/0.png": [1234], ...}, "test": {...}, "left_out": {}}

A value is the size of the file in bytes, followed by the SHA-256 of its content if that was requested.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

import pydantic
from pydantic.dataclasses import dataclass
from torch import Tensor

from localize.errors import MissingError
from localize.recipes.preprocessing import DataRecord, PartRecord
from localize.train.data.folders import Files

FILE_NAME = "data.json"
NAMED = 5
"""Number of files that a message lists."""

Entry = tuple[int] | tuple[int, str]
"""Size of a file in bytes, and the SHA-256 of its content if that was requested."""
Entries = Mapping[str, Entry]
"""By the name of the file, relative to the data folder."""


@dataclass(frozen=True, config=pydantic.ConfigDict(strict=True, extra="forbid"))
class Listing:
    """The files that a run was started with; empty for images in memory."""

    folder: str = ""
    """Absolute path of the data folder."""
    train: Entries = field(default_factory=dict)
    test: Entries = field(default_factory=dict)
    left_out: Entries = field(default_factory=dict)
    """Damaged files that the run was asked to leave out."""


_ADAPTER = pydantic.TypeAdapter(Listing)


def dump(listing: Listing) -> str:
    """Return a listing as JSON."""
    parts = {"train": listing.train, "test": listing.test, "left_out": listing.left_out}
    return json.dumps({"folder": listing.folder, **parts}, indent=0) + "\n"


def read(path: Path) -> Listing | None:
    """Read a listing; None if there is no file or it is not a listing. Messages then cannot name files."""
    try:
        return _ADAPTER.validate_json(path.read_bytes())
    except (OSError, ValueError):
        return None


def located(data_dir: str | None, listing: Listing | None) -> str | None:
    """Return the folder of a run's data: where they were when it started or, if unknown, where its recipe says."""
    if data_dir is not None and listing is not None and listing.folder and not Path(data_dir).is_absolute():
        return listing.folder if Path(listing.folder).is_dir() else data_dir
    return data_dir


def entries(files: Files, *, hashed: bool = False) -> dict[str, Entry]:
    """Return the sizes, and on request the digests, of files by name."""
    return {name: entry(path, hashed=hashed) for name, path in zip(files.names, files.paths, strict=True)}


def entry(path: str, *, hashed: bool = False) -> Entry:
    """Return the size of a file, and on request its digest.

    A file that cannot be read or is not a regular file has size -1: opening a named pipe would block.
    """
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            return (-1,)
        size = found.st_size
        if not hashed:
            return (size,)
        with open(path, "rb") as file:
            return (size, hashlib.file_digest(file, "sha256").hexdigest())
    except OSError:
        return (-1,)


def total_size(paths: Sequence[str]) -> int:
    """Return the total size of all files in bytes; files that cannot be read count as 0."""
    return sum(max(entry(path)[0], 0) for path in paths)


def of_files(files: Files, found: Entries) -> PartRecord:
    """Return the record of images in files."""
    digest = hashlib.sha256(json.dumps(sorted(found.items())).encode()).hexdigest()
    total = sum(one[0] for one in found.values())
    return PartRecord(len(files.paths), files.per_class, digest, total, files.folder)


def of_pixels(images: Tensor, labels: Tensor, classes: int) -> PartRecord:
    """Return the record of images in memory."""
    digest = hashlib.sha256()
    for tensor in (images, labels):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        array: Any = tensor.contiguous().numpy()
        digest.update(memoryview(array).cast("B"))
    counts = labels.bincount(minlength=classes).tolist()
    return PartRecord(len(labels), tuple(counts), digest.hexdigest())


def refuse_changed(
    before: DataRecord,
    now: DataRecord,
    listings: tuple[Listing | None, Listing],
    *,
    parts: Sequence[str],
    accept: str,
) -> None:
    """Refuse data that differ from those of the run.

    Args:
        before: the data that the run was started with.
        now: the data that are there now.
        listings: the files of both.
        parts: which of ``train`` and ``test`` are compared.
        accept: the command that accepts the change.

    Raises:
        MissingError: they differ; the message shows both sides.
    """
    changes = list(differences(before, now, listings, parts=parts))
    if changes:
        raise MissingError(
            "the data have changed since the run was started.",
            facts=changes,
            help=f"restore them; or, if the change is intended, {accept}",
        )


def differences(
    before: DataRecord, now: DataRecord, listings: tuple[Listing | None, Listing], *, parts: Sequence[str]
) -> Iterator[str]:
    """Yield lines that describe the differences, with both sides; none if nothing differs."""
    yield from class_differences(before.classes, now.classes)
    for part in parts:
        was, is_now = (one.train if part == "train" else one.test for one in (before, now))
        if was is None or is_now is None:
            continue
        if was.sha256 == is_now.sha256 and was.images == is_now.images:
            continue
        yield f"{part}, in the run: {_summed(was, before.classes)}"
        yield f"{part}, now: {_summed(is_now, now.classes)}"
        old, new = listings
        if old is not None:
            yield from _named(*(one.train if part == "train" else one.test for one in (old, new)))


def class_differences(before: Sequence[str], now: Sequence[str]) -> Iterator[str]:
    """Yield both lists of class names, if they differ."""
    if tuple(before) != tuple(now):
        yield f"classes of the run: {_listed(before)}"
        yield f"classes now: {_listed(now)}"


def _summed(part: PartRecord, classes: Sequence[str]) -> str:
    counts = ", ".join(f"{name} {count:,}" for name, count in list(zip(classes, part.per_class, strict=False))[:20])
    size = "" if part.bytes is None else f", {part.bytes:,} bytes"
    digest = "" if part.bytes is not None else f", SHA-256 {part.sha256[:12]}"
    return f"{part.images:,} images ({counts}){size}{digest}"


def _named(before: Entries, now: Entries) -> Iterator[str]:
    added = [name for name in now if name not in before]
    removed = [name for name in before if name not in now]
    changed = [name for name in now if name in before and tuple(now[name]) != tuple(before[name])]
    sizes = [f"{name} ({_entry(before[name])}, now {_entry(now[name])})" for name in changed]
    for what, names in (("added", added), ("removed", removed), ("changed", sizes)):
        if names:
            yield f"{what}: {_listed(names)}"


def _entry(one: Entry) -> str:
    return f"{one[0]:,} bytes" + (f" {one[1][:8]}" if len(one) > 1 else "")


def _listed(names: Sequence[str]) -> str:
    most = 50 if all(len(name) < 20 for name in names) else NAMED
    rest = f", and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
