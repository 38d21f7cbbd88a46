"""Resident memory: measured in a process of its own, printed beside live bytes, and what a run says of it."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from localize import build, train
from localize.cli import app
from localize.estimate import memory, resident, sharing
from localize.estimate.compare import Entry, cost
from localize.recipes import Recipe

LINUX = pytest.mark.skipif(not resident.is_known(), reason="the operating system does not say what is resident")
MODEL = "cifar/resnet20"


@LINUX
def test_as_much_is_resident_as_lives_at_least() -> None:
    recipe = Recipe("backprop", model=MODEL)
    live = memory.predict(build.build(recipe, data=False), 128).peak

    found = resident.measured(recipe, 128)

    assert found is not None
    assert 0.95 * live < found < 8 * live


def test_a_process_that_fails_says_nothing() -> None:
    assert resident.measured(Recipe("backprop", model=MODEL), 8, opt="none-of-that-name") is None


@LINUX
def test_compare_prints_what_is_resident_beside_what_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int, str]] = []

    def measured(recipe: Recipe, batch_size: int, *, opt: str, autocast: Any) -> int:
        asked.append((recipe.method, batch_size, opt))
        return 3 * 2**20

    monkeypatch.setattr(resident, "measured", measured)
    words = ["compare", "cifar/fc_cifar10", "--methods", "dcl", "-b", "4", "--measure", "--opt", "adamw"]
    answer = CliRunner().invoke(app, words)

    assert answer.exit_code == 0, answer.output
    assert {("backprop", 4, "adamw"), ("dcl", 4, "adamw")} <= set(asked)
    head, *rows = answer.stdout.splitlines()
    assert head.split() == ["parameters", "multiply-adds", "saved", "peak", "resident", "time", "step"]
    assert next(row for row in rows if row.startswith("backprop")).count(" 3.0 MiB ") == 1


@pytest.mark.parametrize(
    ("variables", "advice"),
    [
        ({}, platform.libc_ver()[0] == "glibc"),
        ({"MALLOC_MMAP_THRESHOLD_": "131072"}, False),
        ({"LD_PRELOAD": "/usr/lib/libjemalloc.so"}, False),
    ],
)
@LINUX
def test_a_run_on_the_cpu_says_what_was_resident(
    variables: dict[str, str], advice: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(train, "run", lambda config, force: None)
    answer = CliRunner().invoke(app, ["train", "resnet20", "-m", "dgl", "--device", "cpu", "-o", str(tmp_path)])

    assert answer.exit_code == 0, answer.output
    assert "resident: " in answer.stdout
    assert (resident.SETTING in answer.stdout) == advice


def test_shared_moments_are_suggested_where_they_decide() -> None:
    recipes = {"dcl": Recipe("dcl", model=MODEL)}
    rows = [cost(Entry(name, recipe), 2) for name, recipe in recipes.items()]
    shared = cost(Entry("shared", Recipe(**{**vars(recipes["dcl"]), "options": sharing.SHARED})), 2)
    middle = (rows[0].peak_bytes + shared.peak_bytes) // 2

    def told(peak: int, name: str = "checkpoint -K 9") -> list[str]:
        rival = type(rows[0])(name, 1, 1, 1, peak)
        return list(sharing.suggestions([rival, *rows], recipes, 2))

    (line,) = told(middle)
    assert "dcl needs less memory than checkpoint -K 9 only with moments=shared" in line
    assert f"{shared.peak_bytes / 2**20:,.1f} MiB" in line
    assert not told(rows[0].peak_bytes + 1), "it needs less as it is"
    assert not told(shared.peak_bytes - 1), "it needs more in both forms"
    assert not told(middle, "accumulate"), "no rival of the verdict"


def test_a_method_without_shared_blocks_is_not_tried() -> None:
    recipe = Recipe("dgl", model="cifar/resnet20")
    row = cost(Entry("dgl", recipe), 2)
    rival = type(row)("backprop", 1, 1, 1, row.peak_bytes - 1)

    assert not list(sharing.suggestions([rival, row], {"dgl": recipe}, 2, tell=lambda name: pytest.fail(name)))
