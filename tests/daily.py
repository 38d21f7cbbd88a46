"""Large sweeps in parts: each day runs one part of them, ``-m slow`` all others."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from typing import Any

import pytest


def in_turn(values: Sequence[Any], days: int) -> list[Any]:
    """Return values as parameters of a test, all marked slow but for those of today: each has one of so many days.

    A tuple holds one value for each of several parameters.
    """
    today = date.today().toordinal() % days
    found = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*each, marks=() if i % days == today else pytest.mark.slow) for i, each in enumerate(found)]


def parts(count: int) -> list[Any]:
    """Return the numbers from 0 to ``count - 1`` as parameters of a test, all marked slow but for that of today."""
    return in_turn(range(count), count)
