"""Check whether models convert: a row of facts for each, kept in a file.

``one`` checks a model, ``sweep`` checks many in processes of their own, ``rows`` keeps what was found, ``report``
writes it down for people.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from localize.build import versions
from localize.check import rows
from localize.check.one import Row
from localize.check.report import markdown
from localize.check.rows import Key
from localize.check.sweep import Limits, sweep

__all__ = ["Key", "Limits", "Row", "check", "known", "markdown"]


def known(keys: Sequence[Key], path: Path, *, retry: bool = False) -> dict[Key, Row]:
    """Return what a file says about these checks, found by the versions that are installed now.

    Args:
        keys: what is asked of which model.
        path: file of rows; it may be missing.
        retry: leave out what has failed.

    Raises:
        OptionError: the file holds something else than rows.
    """
    found = {key: row for key, row in rows.latest(rows.read(path)).items() if row["versions"] == versions()}
    return {key: found[key] for key in keys if key in found and (found[key]["ok"] or not retry)}


def check(keys: Sequence[Key], path: Path, *, jobs: int, limits: Limits) -> Iterator[Row]:
    """Check models; yield every row when it is done, and in the file.

    Raises:
        OptionError: the file holds something else than rows.
        MissingError: the file cannot be written.
    """
    rows.read(path)
    rows.repair(path)
    for row in sweep(keys, jobs=jobs, limits=limits):
        row = row | {"versions": versions()}
        rows.append(path, row)
        yield row
