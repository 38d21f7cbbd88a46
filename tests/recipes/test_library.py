"""Recipes: what is packaged loads, what is wrong is refused with the place and the nearest right name."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

import localize
from localize import build, methods, recipes
from localize.errors import RecipeError, UnknownNameError
from localize.files import VERSION
from localize.ir import CutSpec
from localize.recipes import Recipe
from localize.train import TrainConfig

GOOD = """\
model: cifar/resnet20
method: auglocal
options:
  d: 3
  tau: 1e-1
cut:
  segments: 4
  by: macs
train:
  epochs: 2
  lr: 5e-2
expected:
- {metric: test_accuracy, value: 0.9, source: nowhere}
"""


def refused(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        recipes.parse(text, "mine.yaml")
    return str(caught.value)


@pytest.mark.parametrize("name", recipes.names())
def test_every_packaged_recipe_says_what_it_is_and_where_its_numbers_come_from(name: str) -> None:
    recipe = recipes.load(name)
    assert recipe.notes
    assert recipe.paper or recipe.method == "backprop" or "digits" in name or name.endswith("-short")
    assert all(expected.source and 0 < expected.value < 1 for expected in recipe.expected)
    assert not recipe.expected or "Table" in recipe.expected[0].source
    assert recipes.parse(recipes.dump(recipe), name) == recipe


@pytest.mark.parametrize("name", methods.names())
def test_every_method_has_a_recipe_of_its_name_that_is_its_defaults(name: str) -> None:
    recipe = recipes.load(name)
    assert (recipe.method, dict(recipe.options), recipe.model, dict(recipe.train)) == (name, {}, None, {})
    assert recipe.cut is None


@pytest.mark.parametrize(("name", "dictionary"), [("dcl-s", "static"), ("dcl-o", "last"), ("dcl-ld", "layerwise")])
def test_variants_of_dcl_are_recipes(name: str, dictionary: str) -> None:
    assert recipes.load(name).options == {"dictionary": dictionary}


def test_a_recipe_is_read_whole() -> None:
    recipe = recipes.parse(GOOD, "mine.yaml")
    assert recipe.options == {"d": 3, "tau": 0.1}
    assert recipe.cut == CutSpec(segments=4, by="macs")
    assert recipe.train == {"epochs": 2, "lr": 0.05}
    assert recipe.expected == (recipes.Expected("test_accuracy", 0.9, "nowhere"),)
    assert TrainConfig("cifar/resnet20", **recipe.train).lr == 0.05


def test_name_file_folder_dict_and_recipe_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    recipe = recipes.load(path)
    assert recipes.load(str(path)) == recipe
    assert recipes.load(tmp_path) == recipe
    assert recipes.load(recipe) == recipe
    assert recipes.load({"method": "auglocal", "options": {"d": 3}}) == Recipe("auglocal", {"d": 3})
    assert recipes.load(Recipe("auglocal", input_shape=(3, 8, 8))).input_shape == (3, 8, 8)
    assert localize.Recipe is Recipe


def test_dump_is_deterministic_and_reads_back() -> None:
    recipe = recipes.parse(GOOD, "mine.yaml")
    assert recipes.dump(recipe) == recipes.dump(dataclasses.replace(recipe))
    assert recipes.parse(recipes.dump(recipe), "again") == recipe
    at = dataclasses.replace(recipe, cut=CutSpec(at=("relu", "layer1.0")), input_shape=(3, 32, 32))
    assert "at: [relu, layer1.0]" in recipes.dump(at)
    assert recipes.parse(recipes.dump(at), "again") == at


def test_resolve_writes_out_every_option() -> None:
    assert set(recipes.resolve(Recipe("auglocal", {"d": 5})).options) == {
        field.name for field in dataclasses.fields(methods.get("auglocal"))
    }


@pytest.mark.parametrize(
    ("wrong", "line", "words"),
    [
        ("metod: auglocal", 1, ["'metod'", "did you mean 'method'"]),
        ("method: auglocal\noptions:\n  dd: 3", 3, ["'dd'", "options.dd"]),
        ("method: auglocal\ncut:\n  segment: 3", 3, ["'segment'", "did you mean 'segments'"]),
        ("method: auglocal\ntrain:\n  epoch: 3", 3, ["'epoch'", "did you mean 'epochs'"]),
        ("method: auglocal\nexpected:\n- metrik: x", 3, ["'metrik'", "did you mean 'metric'"]),
        ("method: auglokal", 1, ["'auglokal'", "did you mean 'auglocal'"]),
        ("method: auglocal\noptions:\n  d: two", 3, ["'two'"]),
        ("method: auglocal\noptions:\n  d: 1", 3, ["lowest value is 2"]),
        ("method: auglocal\noptions: [d]", 2, ["options cannot be ['d']"]),
        ("method: auglocal\nnum_classes: '10'", 2, ["num_classes cannot be '10'", "integer"]),
        ("method: auglocal\ninput_shape: [3]", 2, ["input_shape cannot be [3]"]),
        ("method: auglocal\ncut:\n  segments: many", 3, ["cut.segments cannot be 'many'"]),
        ("method: auglocal\ncut:\n  by: weight", 3, ["cut.by cannot be 'weight'", "'layer', 'node'"]),
        ("method: auglocal\ntrain:\n  lr: -1", 3, ["lr cannot be -1"]),
        ("method: auglocal\nexpected:\n- metric: x\n  value: 1.0", 3, ["'source' is missing"]),
        ("method: auglocal\ninput_shape: [3, 9999999, 9999999]", 2, ["299,999,940,000,003 values", "2,147,483,647"]),
        ("method: auglocal\ninput_shape: [3, 0, 32]", 2, ["input_shape is (3, 0, 32)"]),
        ("method: auglocal\ncut: 4", 2, ["cut cannot be 4"]),
    ],
)
def test_what_is_wrong_is_named_with_its_line(wrong: str, line: int, words: list[str]) -> None:
    message = refused(wrong)
    for word in [*words, "mine.yaml", f"line {line}."]:
        assert word in message


def test_the_line_is_that_of_the_setting_and_not_of_one_whose_name_is_part_of_it() -> None:
    text = "method: dcl\ntrain: {data: digits, epochs: 3,\n  data_dir: 5}"

    with pytest.raises(
        RecipeError, match=r"data_dir cannot be 5\.\n.*\n  at train\.data_dir of mine\.yaml, line 3\."
    ) as it:
        recipes.parse(text, "mine.yaml")

    assert it.value.keys == ("train", "data_dir")


@pytest.mark.parametrize(
    ("section", "keys"),
    [
        ("train: {epochs: 4, lr: 0.1, warmup_lr: -1.0}", ("train", "warmup_lr")),
        ("train: {epochs: 4, warmup_epochs: 4}", ("train", "warmup_epochs")),
        ("train: {amp: true, amp_dtype: float64}", ("train", "amp_dtype")),
        ("train: {model_ema: true, model_ema_decay: 1.0}", ("train", "model_ema_decay")),
        ("train: {milestones: [2, 1], sched: multistep}", ("train", "milestones")),
        ("train: {output: ../elsewhere}", ("train", "output")),
        ("schedule: {recompute: head, micro_batch: -1}", ("schedule", "micro_batch")),
        ("schedule: {loss_scaling: 1, ghost_norm: true}", ("schedule", "loss_scaling")),
        ("options: {tau: 1.0, k: -1}", ("options", "k")),
        ("options: {norm: 0.0, start: normla}", ("options", "start")),
        ("terms: [{branch: own}, {branch: own}]", ("terms", 1, "branch")),
        ("terms: [{branch: own}, {branch: reconstruction, weight: 0.0}]", ("terms", 1, "weight")),
        ("terms: [{branch: own, options: {weight: 1.0}}]", ("terms", 0, "options")),
        ("terms: [{branch: contrast, weight: 2.0, options: {tau: warm}}]", ("terms", 0, "options", "tau")),
        ("options: {nope: 1}", ("options", "nope")),
        ("trian: {}", ("trian",)),
    ],
)
def test_an_error_carries_the_keys_of_the_value_it_is_about(section: str, keys: tuple[str | int, ...]) -> None:
    with pytest.raises(RecipeError, match=re.escape(f"at {'.'.join(map(str, keys))} of mine.yaml")) as caught:
        recipes.parse(f"method: dcl\n{section}\n", "mine.yaml")

    assert caught.value.keys == keys


@pytest.mark.parametrize("method", methods.names())
def test_an_option_of_a_wrong_type_is_placed_at_the_option(method: str) -> None:
    """Whatever the other options are called, and whatever the message says of them."""
    fields = dataclasses.fields(methods.get(method))
    for item in fields:
        given = {other.name: other.default for other in fields} | {item.name: [None]}

        with pytest.raises(RecipeError, match="cannot be") as caught:
            recipes.load({"method": method, "options": given})

        assert caught.value.keys == ("options", item.name)


def test_what_is_written_says_its_version_and_what_is_read_need_not() -> None:
    recipe = recipes.parse(GOOD, "mine.yaml")

    assert recipes.dump(recipe).startswith(f"version: {VERSION}\n")
    assert recipes.parse(f"version: {VERSION}\n{GOOD}", "mine.yaml") == recipe
    assert recipes.load({"version": VERSION, "method": "dcl"}) == Recipe("dcl")


def test_a_recipe_of_a_later_version_is_refused_with_both_versions() -> None:
    """Even where it holds keys that this version does not know."""
    text = f"method: dcl\nfuture: 1\nversion: {VERSION + 1}\n"

    later = rf"of version {VERSION + 1}, (.*\n)*.*reads versions up to {VERSION}\.\n.*line 3\.\n  help: pip install"
    with pytest.raises(RecipeError, match=later) as caught:
        recipes.parse(text, "mine.yaml")

    assert caught.value.keys == ("version",)


@pytest.mark.parametrize("version", ["0.3", "2.0.0", "true", "-1", "[1]", "one"])
def test_a_version_that_is_none_is_refused(version: str) -> None:
    assert f"reads versions up to {VERSION}" in refused(f"version: {version}\nmethod: dcl\n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("method: [auglocal\n", "is not YAML"),
        ("method: auglocal\n\tmodel: x", "line 2"),
        ("a: b: c", "is not YAML"),
        ("method: &a auglocal\nmodel: *a", "does not refer to itself"),
        ("method: auglocal\nmethod: dcl", "'method' stands here twice, line 2"),
        ("method: !!python/object/apply:os.system ['true']", "is not YAML"),
        ("method: \x00", "is not YAML"),
        ("- auglocal", "holds a list"),
        ("auglocal", "holds a str"),
        ("", "holds nothing"),
        ("model: cifar/resnet20", "does not say which method"),
    ],
)
def test_what_is_not_a_recipe_is_refused(text: str, words: str) -> None:
    assert words in refused(text)


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="it is not text"):
        recipes.load(path)


def test_an_unknown_name_gets_the_nearest_one() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'auglocal'"):
        recipes.load("auglokal")
    with pytest.raises(UnknownNameError, match="did you mean 'dcl-s'"):
        recipes.text("dcl-ss")


def test_another_type_is_refused() -> None:
    with pytest.raises(RecipeError, match="an int is not a recipe"):
        recipes.load(3)  # type: ignore[arg-type]


def test_a_recipe_asks_for_options_of_its_model() -> None:
    recipe = recipes.load("predsim-vgg8b-cifar10")

    model = build.create_model(recipe)

    assert (model.layer1.dropout.p, model.layer7.act.negative_slope) == (0.2, 0.01)
    assert recipes.parse(recipes.dump(recipe), "again").model_options == recipe.model_options


def test_an_option_that_the_model_lacks_is_refused_by_name() -> None:
    recipe = recipes.load({"method": "backprop", "model": "cifar/vgg8b", "model_options": {"drop": 0.1}})

    with pytest.raises(localize.errors.OptionError, match="drop"):
        build.create_model(recipe)
