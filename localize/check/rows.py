"""Keep rows in a file, one JSON object a line: what was found stays found, whatever ends the check."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from localize.check.one import Row
from localize.errors import MissingError, OptionError

Key = tuple[str, str]
"""What is checked of which model: ``static`` or ``run``, and the name."""


def key_of(row: Row) -> Key:
    """Return what was checked, and of which model."""
    return row["check"], row["name"]


def read(path: Path) -> list[Row]:
    """Return the rows of a file; none if there is no such file. A last line that was not written whole is left out.

    Raises:
        OptionError: the file holds something else than rows.
    """
    if not path.exists():
        return []
    return list(_parsed(path, _whole_lines(path.read_bytes()).splitlines()))


def _whole_lines(content: bytes) -> bytes:
    return content[: content.rfind(b"\n") + 1]


def _parsed(path: Path, lines: Iterable[bytes]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            key_of(row), row["versions"], row["ok"]
        except (ValueError, TypeError, KeyError) as error:
            raise OptionError(
                f"line {number} of {path} is not a row of a check.",
                facts=f"{type(error).__name__}: {error}",
                help="another --out, or delete that line",
            ) from error
        yield row


def latest(rows: Iterable[Row]) -> dict[Key, Row]:
    """Return the last row of every check of every model."""
    return {key_of(row): row for row in rows}


def repair(path: Path) -> None:
    """Make a file ready for further rows: cut off a last line that was not written whole.

    Raises:
        MissingError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            file.seek(0)
            file.truncate(len(_whole_lines(file.read())))
    except OSError as error:
        raise MissingError(f"{path} cannot be written.", facts=str(error), help="another --out") from error


def append(path: Path, row: Row) -> None:
    """Write a row after the others."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
