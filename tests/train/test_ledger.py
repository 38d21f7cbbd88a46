"""The table of the docs is made from the book of finished runs."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from localize.train import ledger

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme_tables_of_runs", ROOT / "benchmarks" / "readme_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def first(tables: ModuleType) -> ledger.Line:
    return ledger.Line(
        recipe="dcl-s-fc-mnist",
        hash=tables._hash("dcl-s-fc-mnist"),
        method="dcl",
        model="cifar/fc_mnist",
        data="mnist",
        images=(60000, 10000),
        seed=0,
        epochs=150,
        last=0.98,
        best=0.99,
        best_epoch=140,
        core_hours=0.5,
        machine="1 of 2 cores",
        versions={"localize": "0"},
        command="localize compare --train dcl-s-fc-mnist --seeds 3",
    )


def test_a_recipe_that_was_run_is_a_row_and_others_are_none(
    tables: ModuleType, first: ledger.Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = dataclasses.replace(first, seed=1, last=0.97, best=0.98)
    stale = dataclasses.replace(first, recipe="feat-fc-mnist")  # the hash of another recipe
    book = tmp_path / "runs.jsonl"

    assert ledger.append(book, [first, second, stale]) == 3
    assert ledger.append(book, [second]) == 0
    rows = tables.runs_table(book).splitlines()[2:]

    command = "`localize compare --train dcl-s-fc-mnist --seeds 3`"
    numbers = "98.54 | best | 97.50 ± 0.71 | 98.50 ± 0.71 | 2 | 1.00"
    assert rows == [f"| `dcl-s-fc-mnist` | mnist | {numbers} | {command} |"]
    assert "feat-fc-mnist, seed 0, was trained by other settings" in capsys.readouterr().err


def test_each_row_stands_in_one_table_with_a_paper_s_number_or_without(
    tables: ModuleType, first: ledger.Line, tmp_path: Path
) -> None:
    names = ("cafo-fc-mnist", "dcl-fc-cifar10-short")
    lines = [dataclasses.replace(first, recipe=name, hash=tables._hash(name)) for name in names]
    ledger.append(book := tmp_path / "runs.jsonl", lines)

    (long,), (short,) = (made(book).splitlines()[2:] for made in (tables.runs_table, tables.short_table))

    assert long.startswith("| `cafo-fc-mnist` | mnist | none |  | 98.00 |")
    assert short.startswith("| `dcl-fc-cifar10-short` | 150 | 98.00 |")


def test_without_a_run_there_is_no_row(tables: ModuleType, tmp_path: Path) -> None:
    assert len(tables.runs_table(tmp_path / "none.jsonl").splitlines()) == 2
