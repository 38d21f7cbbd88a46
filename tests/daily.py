"""Large sweeps in parts: each day runs one part, ``-m slow`` that of the next day, ``-m zoo`` the rest."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from typing import Any

import pytest


def in_turn(values: Sequence[Any], days: int) -> list[Any]:
    """Return values as parameters of a test; each has one of so many days.

    Those of today have no mark; those of tomorrow are marked slow; the rest, zoo.
    A tuple holds one value for each of several parameters.
    """
    today = date.today().toordinal()
    marks = {0: (), 1: pytest.mark.slow}
    found = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*each, marks=marks.get((i - today) % days, pytest.mark.zoo)) for i, each in enumerate(found)]


def parts(count: int) -> list[Any]:
    """Return the numbers from 0 to ``count - 1`` as parameters of a test, each of them with a day of its own."""
    return in_turn(range(count), count)
