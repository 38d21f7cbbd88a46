"""A plan fits its budget, and is the cheapest of those that do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from localize import build, recipes
from localize.cli.app import app
from localize.cli.costs import _budget
from localize.cutting.cuts import place
from localize.errors import MethodError, OptionError
from localize.estimate import memory, planner
from localize.graph.trace import trace
from localize.ir import CutSpec, Grain
from localize.recipes import Recipe
from localize.zoo import create_empty

RECIPE = Recipe("dcl", model="cifar/resnet20")
MIB = 2**20


@pytest.mark.parametrize("budget", [20 * MIB, pytest.param(200 * MIB, marks=pytest.mark.slow)])
def test_what_is_chosen_fits_and_nothing_cheaper_does(budget: int) -> None:
    choice = planner.plan(RECIPE, budget, 32)
    fitting = [one for one in choice.tried if one.peak_bytes <= budget]

    assert choice.chosen.peak_bytes <= budget
    assert choice.chosen.macs == min(one.macs for one in fitting)
    assert memory.predict(build.build(choice.chosen.recipe, data=False), 32).peak == choice.chosen.peak_bytes


@pytest.mark.slow
def test_a_frontier_is_sorted_and_none_of_it_is_beaten() -> None:
    choice = planner.plan(RECIPE, 20 * MIB, 32)
    found = choice.frontier

    assert [one.macs for one in found] == sorted(one.macs for one in found)
    assert [one.peak_bytes for one in found] == sorted((one.peak_bytes for one in found), reverse=True)
    for one in choice.tried:
        assert any(other.macs <= one.macs and other.peak_bytes <= one.peak_bytes for other in found)


@pytest.mark.slow
def test_a_budget_that_nothing_fits_is_refused_with_the_leanest() -> None:
    with pytest.raises(MethodError, match="the leanest of .* that were tried needs"):
        planner.plan(RECIPE, MIB, 32)


def test_segments_are_balanced_by_the_bytes_that_they_compute() -> None:
    trunk = trace(create_empty("cifar/resnet110").train(), torch.empty(2, 3, 32, 32, device="meta"))
    peaks = {}
    for by in ("layer", "memory"):
        layout = place(trunk, CutSpec(4, by=by), grain=Grain())
        ends = [cut.bytes_before for cut in layout.cuts]
        peaks[by] = max(b - a for a, b in zip([0, *ends], ends, strict=False))
    assert peaks["memory"] < 0.75 * peaks["layer"]


def test_bytes_are_those_of_the_values_of_an_image() -> None:
    trunk = trace(create_empty("cifar/fc_cifar10").train(), torch.empty(2, 3, 32, 32, device="meta"))
    layout = place(trunk, CutSpec(), grain=Grain(hidden_linear="own", classifier="own"))
    flat = 3 * 32 * 32 * 4

    assert layout.cuts[0].bytes_before % 4 == 0
    assert layout.cuts[0].bytes_before >= flat


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 * 2**30), ("500 MiB", 500 * MIB), ("2GB", 2 * 10**9), ("1.5g", 1.5 * 2**30), ("7", 7),
        ("30%", planner.Share(0.3)), (" 12.5 %", planner.Share(0.125)),
    ],
)  # fmt: skip
def test_budgets_are_read(text: str, size: float | planner.Share) -> None:
    assert _budget(text) == size


@pytest.mark.parametrize("text", ["", "much", "8 XiB", "-1GiB", "0", "0%", "-3%", "%"])
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="or a share of what backprop needs"):
        _budget(text)


def test_a_share_of_backprop_s_memory_is_a_budget_and_steps_are_those_of_the_optimizer_asked_for() -> None:
    under = memory.Conditions(memory.named("adamw"), torch.bfloat16)
    recipe = Recipe("dcl", model="cifar/fc_cifar10")

    choice = planner.plan(recipe, planner.Share(0.95), 512, under=under)

    assert choice.budget == int(0.95 * choice.backprop.peak_bytes)
    assert choice.chosen.peak_bytes <= choice.budget < choice.backprop.peak_bytes
    local = build.build(choice.chosen.recipe, data=False)
    assert memory.predict(local, 512, optimizer=torch.optim.AdamW, autocast=torch.bfloat16).peak == (
        choice.chosen.peak_bytes
    )
    assert memory.predict(local, 512).peak != choice.chosen.peak_bytes


def test_the_command_plans_for_a_share_an_optimizer_and_autocast() -> None:
    words = ["plan", "cifar/fc_cifar10", "-m", "dcl", "-b", "512", "--memory-budget", "95%", "--opt", "adamw", "--amp"]

    found = CliRunner().invoke(app, words)

    assert found.exit_code == 0, found.output
    assert "gradients, adamw, under autocast to bfloat16, batch, activations" in found.stdout
    refused = CliRunner().invoke(app, [*words, "--measure"])
    assert refused.exit_code == 2
    assert "--measure times segments without autocast" in refused.stderr


@pytest.mark.parametrize(
    ("size", "text"),
    [(8 * 2**30, "8.00 GiB"), (MIB // 20 + 1, "0.1 MiB"), (MIB // 20, "51.2 KiB"), (1024, "1.0 KiB"), (8, "8 bytes")],
)
def test_sizes_are_told_in_units_that_show_them(size: int, text: str) -> None:
    assert planner.told(size) == text


def test_a_budget_without_unit_is_taken_at_its_word_and_told_so() -> None:
    found = CliRunner().invoke(app, ["plan", "cifar/fc_cifar10", "-m", "dcl", "--memory-budget", "8", "-b", "32"])

    assert found.exit_code == 3
    assert "fits 8 bytes." in found.stderr
    assert "help: 8 is 8 bytes; --memory-budget 8GiB" in found.stderr


@pytest.mark.slow
def test_the_command_writes_a_recipe_that_converts(tmp_path: Path) -> None:
    output = tmp_path / "lean.yaml"
    arguments = ["plan", "cifar/resnet20", "-m", "dcl", "--memory-budget", "30MiB", "-b", "32"]

    found = CliRunner().invoke(app, [*arguments, "-o", str(output)])
    assert found.exit_code == 0, found.output
    assert "chosen" in found.output and f"written: {output}" in found.output
    recipe = recipes.load(output)
    assert recipe.cut is not None and recipe.cut.by == "memory"
    assert memory.predict(build.build(recipe, data=False), 32).peak <= 30 * MIB

    rows = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)["rows"]
    assert [rows[0]["row"], rows[-1]["row"]] == ["chosen", "backprop"]

    again = CliRunner().invoke(app, [*arguments, "-o", str(output)])
    assert again.exit_code == 4
