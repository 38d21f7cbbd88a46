"""A few recipes, others every day, train their own models for two steps: ``benchmarks/every_recipe.py`` trains all."""

from __future__ import annotations

import json
import random
import runpy
import sys
from datetime import date
from pathlib import Path

import pytest

from localize import recipes
from localize.errors import LocalizeError

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "every_recipe.py"
EVERY = runpy.run_path(str(BENCHMARK))
SECONDS = 0.7
"""Most that a recipe of the short form took when all were run."""
QUICK = sorted(
    name
    for name, row in EVERY["read"](BENCHMARK.with_suffix(".jsonl")).items()
    if row["ok"] and row["convert_seconds"] + EVERY["STEPS"] * row["step_seconds"] < SECONDS and name in recipes.names()
)


@pytest.mark.parametrize("name", random.Random(date.today().isoformat()).sample(QUICK, 4))
def test_a_recipe_of_the_day_trains_its_model(name: str) -> None:
    row = EVERY["tried"](name, 4)

    assert row["ok"], row
    recipe = recipes.load(name)
    assert row["method"] == recipe.method
    if recipe.model:
        assert (row["model"], row["classes"]) == (recipe.model, recipe.num_classes)
        assert recipe.input_shape in (None, tuple(row["input_shape"]))


def test_what_fails_is_a_row_with_its_reason_and_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("model: cifar/fc_mnist\nmethod: infopro\n")  # nothing with places to reconstruct
    results = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["every_recipe.py", str(mine), "backprop", "--results", str(results)])
    main = runpy.run_path(str(BENCHMARK))["main"]
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 1
    failed, ok = map(json.loads, results.read_text().splitlines())
    assert issubclass(getattr(__import__("localize.errors").errors, failed["error"]), LocalizeError)
    assert (ok["ok"], ok["model"], ok["losses"]) == (True, "cifar/resnet20", 1)
    assert capsys.readouterr().out.endswith("1 of 2 recipes train\n")
