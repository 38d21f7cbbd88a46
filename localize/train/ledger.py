"""The ledger of finished runs: one JSON object per line, from which tables of results are made.

::

    {"recipe": "dcl-s-fc-mnist", "hash": "5f1c2ab09e44", "method": "dcl", "model": "cifar/fc_mnist", "data": "mnist",
     "images": [60000, 10000], "seed": 0, "epochs": 150, "last": 0.9854, "best": 0.9861, "best_epoch": 141,
     "core_hours": 0.41, "machine": "1 of 2 cores", "versions": {"localize": "0.9.0", "torch": "2.14.1"},
     "command": "localize compare --train dcl-s-fc-mnist --seeds 3"}

``last`` and ``best`` are test accuracies (0..1) after the last epoch, and in the best epoch. ``hash`` covers everything
that decides what a run learns, except its seed (:func:`digest`). ``core_hours`` is the hours of the run times the cores
that torch used; on a GPU, the hours of the device.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pydantic
from pydantic.dataclasses import dataclass

from localize.errors import MissingError

FILE = "runs.jsonl"


@dataclass(frozen=True, config=pydantic.ConfigDict(strict=True, allow_inf_nan=False, extra="forbid"))
class Line:
    """One finished run."""

    recipe: str
    hash: str
    method: str
    model: str
    data: str
    images: tuple[int, int]
    """Number of training and of test images."""
    seed: int
    epochs: int
    last: float
    best: float
    best_epoch: int
    core_hours: float
    machine: str
    versions: Mapping[str, str]
    command: str

    @property
    def key(self) -> tuple[str, str, int]:
        """What identifies a run."""
        return self.recipe, self.hash, self.seed


def digest(settings: Mapping[str, Any]) -> str:
    """Return a hash, twelve hexadecimal digits, of the settings that decide what a run learns, without the seed."""
    plain = {name: value for name, value in settings.items() if name != "seed"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:12]


def read(path: Path) -> tuple[Line, ...]:
    """Return the lines of a ledger; none if there is no such file.

    Raises:
        MissingError: a line is not a finished run.
    """
    if not path.is_file():
        return ()
    lines = []
    for number, text in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            lines.append(pydantic.TypeAdapter(Line).validate_json(text))
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            raise MissingError(
                f"line {number} of {path} is not a finished run.",
                facts=f"{'.'.join(map(str, first['loc']))}: {first['msg']}",
                help="remove that line (localize compare --train writes such lines)",
            ) from error
    return tuple(lines)


def append(path: Path, lines: Iterable[Line]) -> int:
    """Append lines to a ledger, except for runs that it already contains; return how many were written.

    Raises:
        MissingError: it cannot be written, or a line in it is not a finished run.
    """
    known = {line.key for line in read(path)}
    new = [line for line in lines if line.key not in known]
    if not new:
        return 0
    text = "".join(pydantic.TypeAdapter(Line).dump_json(line).decode() + "\n" for line in new)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise MissingError(f"{path} cannot be written.", facts=str(error), help="another --results FILE") from error
    return len(new)
