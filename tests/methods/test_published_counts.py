"""The parameters that training adds are those that the papers print, or the command that compares them says why not."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def benchmark() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "parameter_counts.py"
    spec = importlib.util.spec_from_file_location("parameter_counts", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["parameter_counts"] = module
    spec.loader.exec_module(module)
    return module


COUNTS = benchmark()
UNITS = {"K": 1e3, "M": 1e6}


def rounds_to(count: int, printed: str) -> bool:
    """Tell whether a count is a printed number such as 71.8K, in the digits that are printed."""
    digits, unit = printed[:-1], UNITS[printed[-1]]
    places = len(digits.partition(".")[2])
    return abs(count / unit - float(digits)) <= 0.5001 * 10**-places


def described(row: Any) -> str:
    return f"{row.table}-{row.recipe}-{row.model.removeprefix('cifar/')}-{row.num_classes}-{row.input_shape[1]}"


@pytest.mark.parametrize("row", [row for row in COUNTS.ROWS if row.paper[-1] in UNITS], ids=described)
def test_a_count_is_what_the_paper_prints_or_has_a_reason(row: Any) -> None:
    count = COUNTS.count(row)

    assert rounds_to(count, row.paper) != bool(row.reason), f"{count:,} beside {row.paper}: {row.reason or 'no reason'}"


# AugLocal Table 6 spells out the nets of each stage; totals measured by building them with the authors' code.
@pytest.mark.parametrize(
    ("recipe", "total"),
    [
        ("predsim-auglocal", 1113372),
        ("infopro-softmax", 1492828 + 232146),
        ("dgl-auglocal", 3375036),
        ("auglocal", 3166354),
    ],
)
def test_the_nets_of_auglocal_table_6_have_the_code_s_totals(recipe: str, total: int) -> None:
    row = next(row for row in COUNTS.ROWS if (row.table, row.recipe) == ("AugLocal 6", recipe))

    assert COUNTS.count(row) == total


@pytest.mark.parametrize(
    ("count", "printed", "same"),
    [(71750, "71.8K", True), (133190, "143K", False), (143430, "143K", True), (5120, "5.12K", True)],
)
def test_counts_are_compared_in_the_digits_that_are_printed(count: int, printed: str, same: bool) -> None:
    assert rounds_to(count, printed) is same
    assert re.fullmatch(r"[\d.]+[KM]", printed)
