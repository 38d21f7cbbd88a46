"""Analyses of runs, read from the CSV files that ``localize analyze -o DIR`` has written."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from localize.errors import MissingError

MOST = 60
"""Number of lines of a table that the page shows; the file has all."""
BY_DEPTH = ["run", "group", "layer", "depth"]
"""First columns of what is found by depth."""


@dataclass(frozen=True)
class Analysed:
    """The numbers of one analysis."""

    name: str
    file: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    """The first lines, see ``MOST``."""
    count: int
    """Number of all lines."""
    words: int
    """Columns that hold text."""
    by_depth: Mapping[str, Mapping[str, Mapping[float, Sequence[float]]]]
    """By quantity and group: values of the runs of the group at each depth (% of the segments)."""


def analysed(folder: str | Path) -> list[Analysed]:
    """Read the analyses in a folder, in the order of their names.

    Raises:
        MissingError: there are none.
    """
    files = sorted(Path(folder).glob("*.csv"))
    if not files:
        raise MissingError(
            f"{folder} holds no analyses.",
            facts="an analysis writes a CSV file there.",
            help=f"localize analyze RUN... --what probe -o {folder}",
        )
    return [_read(file) for file in files]


def _read(file: Path) -> Analysed:
    with file.open(encoding="utf-8", newline="") as lines:
        header, *rows = csv.reader(lines)
    by_depth: dict[str, dict[str, dict[float, list[float]]]] = {}
    if header[: len(BY_DEPTH)] == BY_DEPTH:
        for row in rows:
            for quantity, value in zip(header[len(BY_DEPTH) :], row[len(BY_DEPTH) :], strict=True):
                if value:
                    values = by_depth.setdefault(quantity, {}).setdefault(row[1], {})
                    values.setdefault(round(100 * float(row[3]), 1), []).append(float(value))
    words = next((i for i in range(len(header)) if all(_is_number(row[i]) for row in rows)), len(header))
    told = [[_rounded(cell) for cell in row] for row in rows[:MOST]]
    return Analysed(file.stem, str(file), header, told, len(rows), words, by_depth)


def _is_number(text: str) -> bool:
    try:
        float(text or 0)
    except ValueError:
        return False
    return True


def _rounded(text: str) -> str:
    """Return a number with four digits; other text, and whole numbers, as they are."""
    return f"{float(text):.4g}" if "." in text and _is_number(text) else text
