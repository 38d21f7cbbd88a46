"""A plan fits its budget, and is the quickest of those that do."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import localize
from localize import build, recipes
from localize.cli.app import app
from localize.cli.costs import _budget
from localize.compiler import convert
from localize.cutting.cuts import place
from localize.errors import LocalizeError, MethodError, OptionError
from localize.estimate import memory, planner, rivals, segments
from localize.estimate.memory import PLAIN
from localize.estimate.repeats import Known
from localize.graph.trace import trace
from localize.ir import CutSpec, Grain, Trunk
from localize.recipes import Recipe
from localize.zoo import create_empty
from tests.nets import ALL

FULLY = "cifar/fc_cifar10"
MIB = 2**20


def traced(net: str) -> Trunk:
    with torch.device("meta"):
        return trace(ALL[net]().train(), torch.empty(2, 3, 8, 8))


def needed(trunk: Trunk, recipe: Recipe, count: int) -> memory.Footprint:
    return memory.predict(convert(trunk, recipe), count)


@pytest.mark.parametrize(
    ("net", "method", "share"),
    [
        pytest.param("MLP", "predsim", 0.6, marks=pytest.mark.slow),
        pytest.param("ViT", "dcl", 0.5, marks=pytest.mark.slow),
        pytest.param("MLP", "dcl", 0.8, marks=pytest.mark.zoo),
        pytest.param("ResNet", "dcl", 0.4, marks=pytest.mark.zoo),
        pytest.param("ResNet", "auglocal", 0.5, marks=pytest.mark.zoo),
        pytest.param("ResNet", "dgl", 0.6, marks=pytest.mark.zoo),
    ],
)
def test_a_plan_is_within_five_percent_of_the_quickest_of_all(net: str, method: str, share: float) -> None:
    trunk, count = traced(net), 64
    recipe = Recipe(method, {"d": 2} if method == "auglocal" else {})
    budget = int(share * needed(trunk, recipe, count).peak)

    found = planner.ways(trunk, recipe, budget, count)

    fitting = [way.predicted for way in found if way.peak_bytes <= budget and way.recipe.options == recipe.options]
    quickest = min((f.seconds for f in every_way(trunk, recipe, count) if f.peak <= budget), default=math.inf)
    assert min(fitting, default=math.inf) <= 1.05 * quickest
    assert quickest < math.inf or not fitting


def every_way(trunk: Trunk, recipe: Recipe, count: int) -> Iterator[memory.Footprint]:
    """Yield what a step needs for every choice of cuts, and every choice of parts for each segment."""
    ends = [segment.ends_at for segment in convert(trunk, recipe).plan.segments.segments][:-1]
    known: Known = {}
    for at in itertools.chain.from_iterable(itertools.combinations(ends, n) for n in range(1, len(ends) + 1)):
        names = [*at, "output"]
        for sizes in itertools.product((0, 32, 8) if len(names) < 3 else (0, 8), repeat=len(names)):
            parts = ",".join(f"{size}@{name}" for size, name in zip(sizes, names, strict=True) if size)
            schedule = {"micro_batch_at": parts} if parts else {}
            try:
                local = convert(trunk, replace(recipe, cut=CutSpec(at=at), schedule=schedule), audited=False)
            except LocalizeError:  # the method does not take these cuts, or no parts
                continue
            yield memory.predict(local, count, known=known)


@pytest.mark.parametrize(("net", "share"), [("ViT", 0.5), ("ResNet", 0.5)])
def test_nothing_that_fits_is_over_the_budget_and_each_segment_has_its_own_schedule(net: str, share: float) -> None:
    trunk, count = traced(net), 32
    budget = int(share * needed(trunk, Recipe("dcl"), count).peak)

    found = planner.ways(trunk, Recipe("dcl"), budget, count)

    assert any(way.peak_bytes <= budget for way in found)
    for way in found:
        exact = needed(trunk, way.recipe, count)
        assert (exact.peak, exact.macs) == (way.peak_bytes, way.macs)
        assert exact.seconds == pytest.approx(way.predicted)
        assert set(way.recipe.schedule) <= {"micro_batch", "micro_batch_at", "recompute", "recompute_at", "keep_at"}


def test_what_segments_need_together_is_what_the_step_needs() -> None:
    trunk, count = traced("ResNet"), 32
    kinds = segments.Kinds(trunk, Recipe("dcl"), count, PLAIN, {})

    chosen = kinds.choose(int(0.5 * kinds.whole.peak))

    exact = needed(trunk, chosen.recipe, count)
    assert 0.85 * chosen.peak <= exact.peak <= chosen.peak, "a whole segment between parts needs less than alone"
    assert kinds.choose(2 * kinds.whole.peak).recipe == Recipe("dcl"), "where all fits, nothing is scheduled"


def test_of_equal_segments_those_run_whole_that_start_with_little_live() -> None:
    trunk = traced("ViT")
    kinds = segments.Kinds(trunk, Recipe("dcl", cut=CutSpec("max")), 64, PLAIN, {})
    key, calls = max(kinds.members.items(), key=lambda pair: len(pair[1]))
    first, last = min(called.before for called in calls), max(called.before for called in calls)
    rise = kinds.needs[key][segments.WHOLE].rise
    assert first < last

    none, one = kinds.choose(first + rise - 1), kinds.choose(first + rise)

    assert none is not None and one is not None
    assert one.seconds < none.seconds
    assert kinds.predicted(one.recipe.schedule)[1].peak <= first + rise


def test_accumulation_is_planned_with_as_few_parts_as_fit() -> None:
    recipe = Recipe("accumulate", model="cifar/resnet20", input_shape=(3, 16, 16))
    first = planner.plan(recipe, planner.Share(0.001), 128)
    least = first.leanest
    found = planner.plan(recipe, (least.peak_bytes + first.backprop.peak_bytes) // 2, 128)

    assert {way.method for way in found.ways} == {"accumulate"}
    fewest = min(found.ways, key=lambda way: way.recipe.options["parts"])
    assert found.fits(fewest) and fewest.recipe.options["parts"] < least.recipe.options["parts"]


def test_backprop_is_planned_with_a_schedule() -> None:
    found = planner.plan(Recipe("backprop", model=FULLY), planner.Share(0.9), 8192)

    assert found.fitting and found.fitting[0].recipe.schedule and found.fitting[0].keeps_gradients


def test_what_cannot_be_divided_is_not_planned() -> None:
    with pytest.raises(MethodError, match="accumulate does not work with --batch-size 1"):
        planner.plan(Recipe("accumulate", model=FULLY), MIB, 1)


def test_a_budget_that_nothing_fits_is_refused_with_the_leanest() -> None:
    choice = planner.plan(Recipe("dcl", model=FULLY), 1000, 32)

    assert not choice.fitting
    with pytest.raises(planner.BudgetError, match="the leanest of .* needs") as error:
        planner.check(choice, 32, FULLY)
    assert error.value.exit_code == 1


def test_what_fits_a_smaller_budget_fits_a_larger_one() -> None:
    trunk, recipe = rivals.recorded(Recipe("dcl", model="resnet20")), Recipe("dcl", model="resnet20")
    leanest = min(planner.ways(trunk, recipe, 1000, 32), key=lambda way: way.peak_bytes)

    found = planner.ways(trunk, recipe, int(1.01 * leanest.peak_bytes), 32)

    assert min(way.peak_bytes for way in found) <= 1.01 * leanest.peak_bytes


def test_narrower_heads_are_named_where_heads_are_most_of_what_is_left() -> None:
    done = CliRunner().invoke(app, ["plan", "tv/resnet18", "-m", "auglocal", "-b", "2", "--memory-budget", "1%"])
    other = CliRunner().invoke(app, ["plan", "resnet20", "-m", "mlaan", "-b", "16", "--memory-budget", "1%"])

    assert "or --method auglocal --head-width 64" in done.output
    assert "head-width" not in other.output


def test_a_time_budget_is_one_too() -> None:
    choice = planner.plan(Recipe("dcl", model=FULLY), planner.Share(2.0), 32, time_budget=1e-6)

    assert not choice.fitting
    with pytest.raises(planner.BudgetError, match="and 1e-06 times its time"):
        planner.check(choice, 32, FULLY)


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
        ("30%", planner.Share(0.3)), (" 12.5 %", planner.Share(0.125)), ("1e-1%", planner.Share(0.001)),
    ],
)  # fmt: skip
def test_budgets_are_read(text: str, size: float | planner.Share) -> None:
    assert _budget(text) == size


@pytest.mark.parametrize("text", ["", "much", "8 XiB", "-1GiB", "0", "0%", "-3%", "%"])
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="or a share of what backprop needs"):
        _budget(text)


def test_a_share_is_of_float32_and_steps_are_those_of_the_optimizer_asked_for() -> None:
    under = memory.Conditions(memory.named("adamw"), torch.bfloat16)
    recipe = Recipe("dcl", model=FULLY)

    choice = planner.plan(recipe, planner.Share(0.95), 512, under=under)

    base = build.build(Recipe("backprop", model=FULLY), data=False)
    assert choice.backprop.peak_bytes == memory.predict(base, 512, optimizer=torch.optim.AdamW).peak
    assert choice.budget == int(0.95 * choice.backprop.peak_bytes)
    best = choice.fitting[0]
    local = build.build(best.recipe, data=False)
    assert memory.predict(local, 512, optimizer=torch.optim.AdamW, autocast=torch.bfloat16).peak == best.peak_bytes


@pytest.mark.parametrize(
    ("size", "text"),
    [(8 * 2**30, "8.00 GiB"), (MIB, "1.0 MiB"), (MIB // 20, "51.2 KiB"), (1024, "1.0 KiB"), (8, "8 bytes")],
)
def test_sizes_are_told_in_units_that_show_them(size: int, text: str) -> None:
    assert planner.told(size) == text


def test_a_budget_without_unit_is_taken_at_its_word_and_told_so() -> None:
    found = CliRunner().invoke(app, ["plan", FULLY, "-m", "dcl", "--memory-budget", "8", "-b", "32"])

    assert found.exit_code == 1
    assert "fits 8 bytes." in found.stderr
    assert "help: 8 is 8 bytes; --memory-budget 8GiB" in found.stderr


def test_the_command_writes_a_recipe_that_converts_and_its_rows_say_what_they_are(tmp_path: Path) -> None:
    output = tmp_path / "lean.yaml"
    words = ["plan", FULLY, "-m", "dcl", "-b", "512", "--memory-budget", "95%", "--opt", "adamw", "--json"]

    found = CliRunner().invoke(app, [*words, "-o", str(output)])

    assert found.exit_code == 0, found.output
    told = json.loads(found.stdout)
    first = told["rows"][0]
    assert first["fits"] and first["peak_bytes"] <= told["budget_bytes"]
    assert {
        "name", "method", "local", "keeps_gradients", "changes_statistics", "combined", "peak_bytes", "share",
        "arithmetic", "time", "fits", "recipe",
    } <= set(first)  # fmt: skip
    assert (first["method"], first["local"], first["keeps_gradients"]) == ("dcl", True, False)
    local = localize.transform(create_empty(FULLY), first["recipe"], example_input=torch.empty(2, 3, 32, 32))
    assert memory.predict(local, 512, optimizer=torch.optim.AdamW).peak == first["peak_bytes"]
    written = recipes.load(output)
    assert written.method == "dcl"
    assert dict(written.train) == {"batch_size": 512, "opt": "adamw"}, "what it was planned for"
    assert CliRunner().invoke(app, [*words, "-o", str(output)]).exit_code == 4, "the file is there"

    refused = CliRunner().invoke(app, ["plan", FULLY, "--memory-budget", "95%", "--amp", "--measure"])
    assert refused.exit_code == 2
    assert "--measure times segments without autocast" in refused.stderr


def beside(peak: int, seconds: float) -> planner.Way:
    return planner.Way("accumulate", "accumulate", None, peak, 1, seconds)


@pytest.mark.parametrize(
    ("peak", "seconds", "sought"),
    [(1.0, 1.0, True), (0.01, math.inf, True), (0.5, 0.1, False), (1.0, 0.1, True)],
    ids=["as quick", "leaner and slow", "lean, and far quicker", "quicker, and over the budget"],
)
def test_no_schedule_is_sought_beside_a_way_that_is_far_quicker(peak: float, seconds: float, sought: bool) -> None:
    trunk, count = traced("ResNet"), 32
    whole = needed(trunk, Recipe("dcl", cut=CutSpec("max")), count)
    other = beside(int(peak * whole.peak), seconds * whole.seconds)

    (way, *_) = planner.ways(trunk, Recipe("dcl"), int(0.6 * whole.peak), count, beside=[other])

    assert bool(way.recipe.schedule) == way.sought == sought
    if not sought:
        assert (way.peak_bytes, way.predicted) == (whole.peak, pytest.approx(whole.seconds))


def test_no_schedule_is_sought_where_even_parameters_and_states_are_too_large() -> None:
    trunk, count = traced("MLP"), 4
    kinds = segments.Kinds(trunk, Recipe("dgl", cut=CutSpec("max")), count, PLAIN, {})
    budget = kinds.least - 1

    (way, *_) = planner.ways(trunk, Recipe("dgl"), budget, count, beside=[beside(budget, 1.0)])
    (alone, *_) = planner.ways(trunk, Recipe("dgl"), budget, count)

    assert way.recipe.schedule == {} and way.peak_bytes > budget
    assert alone.peak_bytes <= way.peak_bytes, "the leanest is sought where nothing else is"


def test_without_a_method_rivals_and_local_methods_stand_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner.methods, "names", lambda: ("backprop", "dcl", "checkpoint", "accumulate"))
    words = ["plan", FULLY, "-b", "256", "--memory-budget", "90%", "--time-budget", "9"]

    found = CliRunner().invoke(app, [*words, "--json"])

    rows = {row["name"]: row for row in json.loads(found.stdout)["rows"]}
    assert found.exit_code == 0, found.output
    kinds = {row["method"] for row in rows.values()}
    assert kinds == {"backprop", "dcl", "checkpoint", "accumulate"}
    fused = next(row for name, row in rows.items() if name.endswith("optimizer in the backward"))
    assert fused["recipe"] is None and fused["keeps_gradients"]
    parts = next(row for row in rows.values() if row["method"] == "accumulate")
    assert parts["keeps_gradients"] and not parts["changes_statistics"], "there is no BatchNorm"
    assert any(row["combined"] for row in rows.values())
    fits = [row["fits"] for row in rows.values()]
    assert fits == sorted(fits, reverse=True), "what fits comes first"

    table = CliRunner().invoke(app, words)
    assert "quickest within the budget: " in table.stdout and "leanest of these ways: " in table.stdout
    assert "no schedule was sought" not in table.stdout
    assert "End-to-end backpropagation" not in table.stdout, "the recipe below is of another method"


def test_methods_without_a_schedule_are_named_with_what_to_type() -> None:
    base = planner.Way("backprop", "backprop", Recipe("backprop"), 100, 1, 1.0, keeps_gradients=True)
    names = ("dgl", "mlaan")
    local = [planner.Way(name, name, Recipe(name), 90, 1, 1.0, local=True, sought=False) for name in names]
    other = replace(local[0], method="feat", recipe=Recipe("feat"), sought=True)

    *_, last = planner.verdict(planner.Choice((base, other, *local), base, 50, None))

    assert last.startswith("no schedule was sought for dgl, mlaan: ")
    assert last.endswith("--method dgl seeks one.")


def test_nothing_is_drawn_for_heads_of_a_model_without_data() -> None:
    trunk = traced("MLP")
    state = torch.get_rng_state()

    without = convert(trunk, Recipe("dgl"))
    drawn = localize.transform(ALL["MLP"](), Recipe("dgl"), example_input=torch.empty(2, 3, 8, 8))

    assert all(parameter.is_meta for parameter in without.heads.parameters())
    assert [p.shape for p in without.heads.parameters()] == [p.shape for p in drawn.heads.parameters()]
    assert not torch.equal(state, torch.get_rng_state()), "the other heads are"
    torch.set_rng_state(state)
    convert(trunk, Recipe("dgl"))
    assert torch.equal(state, torch.get_rng_state())
