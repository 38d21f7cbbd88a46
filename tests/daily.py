"""Large sweeps in parts: each day runs one part of them, ``-m slow`` all others."""

from __future__ import annotations

from datetime import date
from typing import Any

import pytest


def parts(count: int) -> list[Any]:
    """Return the numbers from 0 to ``count - 1`` as parameters of a test, marked slow but for that of the day."""
    today = date.today().toordinal() % count
    return [pytest.param(number, marks=() if number == today else pytest.mark.slow) for number in range(count)]
