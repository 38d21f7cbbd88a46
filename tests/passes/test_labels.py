"""What class scores are trained by: asked for in a recipe, lowered to text, audited, and refused where it cannot be."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import localize
from localize import auditor, build, folder, recipes
from localize.auditor import measured
from localize.errors import MethodError, OptionError, RecipeError
from localize.passes.labels import LabelLoss, create
from tests.golden import det
from tests.nets import ALL
from tests.passes.test_dense import Segmenter

X, Y = det((6, 3, 8, 8), 3), torch.tensor([0, 1, 2, 3, 4, 0])
SOFT = det((6, 5), 12).softmax(1)
W = [0.5, 1.0, 2.0, 0.0, 3.0]


def made(loss: Any, method: str = "dcl", net: str = "MLP", **options: Any) -> localize.LocalModel:
    torch.manual_seed(0)
    return localize.transform(ALL[net]().double(), method, example_input=X, loss=loss, **options).train()


# ------------------------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        ({"smoothing": 0.1}, "F.cross_entropy(scores_0, y, label_smoothing=0.1)"),
        ({"weights": W}, "F.cross_entropy(scores_0, y, weight=heads.class_weights())"),
        ("focal", "localize.losses.focal(scores_0, y, gamma=2.0)"),
        ({"name": "bce", "smoothing": 0.1}, "localize.losses.binary_cross_entropy(scores_0, y, label_smoothing=0.1)"),
    ],
)
def test_every_word_is_readable_text(loss: Any, text: str) -> None:
    local = made(loss)

    assert text in local.source
    assert text.replace("scores_0", f"h_{len(local.plan.segments) - 1}") in local.source
    assert f"loss of labels: {create(loss).name}(" in local.source
    assert not auditor.static(local).raise_if_failed().accepted


@pytest.mark.parametrize("loss", [None, "cross-entropy", {}, {"smoothing": 0}, LabelLoss()])
def test_the_plain_cross_entropy_leaves_text_and_plan_as_they_are(loss: Any) -> None:
    assert made(loss).source == made(None).source
    assert made(loss).plan.deviations == made(None).plan.deviations


def test_a_loss_of_ones_own_takes_the_place_of_the_recipes() -> None:
    recipe = {"method": "dcl", "loss": {"name": "focal", "gamma": 3.0}}

    assert "gamma=3.0" in localize.transform(ALL["MLP"](), recipe, example_input=X).source
    assert "gamma" not in localize.transform(ALL["MLP"](), recipe, example_input=X, loss="bce").source


def test_a_methods_own_option_of_that_name_keeps_its_values() -> None:
    assert made("softmax", "infopro", "ResNet").plan.options["loss"] == "softmax"
    both = localize.transform(
        ALL["ResNet"](), {"method": "infopro", "options": {"loss": "softmax"}}, example_input=X, loss="focal"
    )
    assert both.plan.options["loss"] == "softmax" and both.plan.loss["name"] == "focal"


def test_what_is_added_by_a_recipe_is_trained_by_it_too() -> None:
    recipe = {"method": "ll-cont", "terms": [{"branch": "softmax", "weight": 0.5}], "loss": {"smoothing": 0.1}}

    local = localize.transform(ALL["MLP"](), recipe, example_input=X)

    assert local.source.count("label_smoothing=0.1") == len(local.plan.losses)
    assert "stays as in the sources: supervised_contrastive (e.g. loss_0)" in local.plan.deviations[-1]


def test_weights_are_not_in_the_state_dict_and_come_back_from_the_recipe(tmp_path: Path) -> None:
    recipe = recipes.load({"method": "dcl", "model": "cifar/fc_mnist", "loss": {"name": "focal", "weights": [2] * 10}})
    local = build.build(recipe)
    folder.write(local, recipe, auditor.static(local), str(tmp_path / "made"))
    again, report = folder.reaudit(str(tmp_path / "made"))

    report.raise_if_failed()
    assert not [key for key in local.state_dict() if "class_weights" in key]
    assert again.heads.class_weights().tolist() == [2.0] * 10
    plan = json.loads((tmp_path / "made" / "plan.json").read_text())
    assert plan["loss"] == {"name": "focal", "weights": [2.0] * 10, "gamma": 2.0}
    assert (
        "| `loss of labels` | focal, weights of 10 classes, gamma 2.0 |"
        in (tmp_path / "made" / "README.md").read_text()
    )
    term = plan["losses"][0]["terms"][0]
    assert (term["loss"], term["options"], term["weights"]) == (
        "localize.losses.focal", {"gamma": 2.0}, "class_weights"
    )  # fmt: skip
    assert recipes.load(tmp_path / "made" / "recipe.yaml").loss == plan["loss"]


def test_a_loss_is_written_to_a_recipe_and_read_again() -> None:
    recipe = recipes.load({"method": "dcl", "loss": "focal"})

    assert recipe.loss == {"name": "focal"}
    assert recipes.dump(recipe).count("loss:\n  name: focal\n") == 1


def test_the_forward_as_a_graph_has_the_same_losses() -> None:
    local = made({"name": "focal", "smoothing": 0.1, "weights": W}, update="end")

    losses, _ = local.graph_module()(X, SOFT)
    result = local.step(X, SOFT, torch.optim.SGD(local.param_groups(lr=0.1), lr=0.1))

    torch.testing.assert_close({name: loss.detach() for name, loss in losses.items()}, result.losses)


@pytest.mark.slow
def test_a_compiled_step_takes_soft_labels() -> None:
    plain = made({"name": "focal", "weights": W}, "auglocal")
    compiled = localize.compile(copy.deepcopy(plain))
    for local in (plain, compiled):
        local.step(X, SOFT, torch.optim.SGD(local.param_groups(lr=0.1), lr=0.1))

    assert not [one.reason for one in compiled.functions if one.reason]
    torch.testing.assert_close(compiled.state_dict(), plain.state_dict())


# ------------------------------------------------------------------------------------------------------------- audit

WHOLE = {"smoothing": 0.1, "weights": W}
MUTANTS = [
    (WHOLE, "label_smoothing=0.1", "label_smoothing=0.2"),
    (WHOLE, "label_smoothing=0.1, ", ""),
    (WHOLE, ", weight=heads.class_weights()", ""),
    (WHOLE, "weight=heads.class_weights()", "weight=heads.class_weights().exp()"),
    (WHOLE, "F.cross_entropy(scores_0, y, label_smoothing=0.1, weight=", "localize.losses.focal(scores_0, y, weight="),
    ("focal", "y, gamma=2.0", "y, gamma=1.0"),
    ("focal", "localize.losses.focal(scores_0, y, gamma=2.0)", "localize.losses.binary_cross_entropy(scores_0, y)"),
    ("bce", "localize.losses.binary_cross_entropy(scores_0, y)", "localize.losses.squared_error(scores_0, y)"),
    (None, "F.cross_entropy(scores_0, y)", "F.cross_entropy(scores_0, y, label_smoothing=0.1)"),
]


@pytest.mark.parametrize(("loss", "old", "new"), MUTANTS)
def test_another_loss_fails_the_audit_of_the_text_and_of_what_it_does(loss: Any, old: str, new: str) -> None:
    local = made(loss, "auglocal")
    assert old in local.source
    source = local.source.replace(old, new, 1)
    changed = local.with_source(source if "localize.losses" not in new else f"import localize.losses\n{source}")

    failed = {check.id for check in auditor.static(changed).checks if not check.ok}
    ran = {check.id for check in measured.checks(changed, (X,), Y, numeric=False) if not check.ok}

    assert {"static.plan", "static.terms"} & failed, failed
    assert {"measured.values", "measured.gradients"} <= ran, ran
    assert not [check for check in measured.checks(local, (X,), Y, numeric=False) if not check.ok]


def test_weights_that_are_not_those_of_the_plan_fail_the_audit() -> None:
    local = made({"weights": W})
    local.heads.class_weights.weight[1] = 7.0

    failed = [check for check in auditor.static(local).checks if not check.ok]

    assert [check.id for check in failed] == ["static.terms"]
    assert "heads.class_weights holds 0.5, 7.0" in failed[0].evidence


# ------------------------------------------------------------------------------------------------- parts of the batch


def stepped(local: localize.LocalModel, y: Tensor) -> dict[str, Tensor]:
    local.step(X, y, torch.optim.SGD(local.param_groups(lr=0.1), lr=0.1))
    return dict(local.state_dict())


@pytest.mark.parametrize(
    ("loss", "y"), [({"smoothing": 0.1}, Y), (None, SOFT), ("focal", SOFT), ({"name": "bce", "weights": W}, Y)]
)
def test_micro_batches_train_as_the_whole_batch_does(loss: Any, y: Tensor) -> None:
    whole, parts = stepped(made(loss), y), stepped(made(loss, micro_batch=4), y)

    torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["cross-entropy", "focal"])
def test_a_weighted_mean_is_refused_where_the_batch_is_taken_in_parts(name: str) -> None:
    told = "divided by the weights of the classes in the batch"
    with pytest.raises(MethodError, match=told):
        made({"name": name, "weights": W}, micro_batch=2)
    with pytest.raises(MethodError, match=told):
        made({"name": name, "weights": W}, "accumulate")


@pytest.mark.parametrize(("loss", "y"), [({"name": "bce", "weights": W}, Y), ("focal", SOFT), (None, SOFT)])
def test_accumulated_parts_train_as_backprop_does(loss: Any, y: Tensor) -> None:
    whole, parts = stepped(made(loss, "backprop"), y), stepped(made(loss, "accumulate", parts=3), y)

    torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        ("focl", "option 'name' of the loss of labels cannot be 'focl'.\n.*cross-entropy, focal, bce.\n.*focal"),
        ({"smoothing": 1.0}, "smoothing cannot be 1"),
        ({"smoothing": -0.1}, "lowest value is 0"),
        ({"smooth": 0.1}, "has no option 'smooth'.*\n.*\n.*smoothing"),
        ({"gamma": 2.0}, "'cross-entropy' has no gamma"),
        ({"weights": [1, 2]}, "2 weights of classes were given, and MLP has 5 classes"),
        ({"weights": [1, 2, 3, 4, -1]}, "weights of the classes cannot be"),
        ({"weights": [0] * 5}, "not all of them 0"),
        ({"weights": "balanced"}, "weights of the classes cannot be 'balanced'"),
        (0.1, "loss cannot be 0.1"),
        (LabelLoss("focl"), "cannot be 'focl'"),
        (LabelLoss(smoothing=2.0), "smoothing cannot be 2"),
    ],
)
def test_what_is_no_loss_is_refused_in_words(loss: Any, told: str) -> None:
    with pytest.raises(OptionError, match=told):
        made(loss)


def test_the_values_of_a_methods_own_option_are_named_too() -> None:
    with pytest.raises(OptionError, match="'sofmax'(.|\n)*cross-entropy, focal, bce(.|\n)*contrast, softmax"):
        made("sofmax", "infopro", "ResNet")


def test_a_wrong_loss_in_a_recipe_is_placed() -> None:
    with pytest.raises(RecipeError, match="smoothing cannot be 3(.|\n)*at loss.smoothing"):
        recipes.load({"method": "dcl", "loss": {"smoothing": 3}})
    with pytest.raises(RecipeError, match="no key 'smothing' in loss(.|\n)*smoothing"):
        recipes.load({"method": "dcl", "loss": {"smothing": 0.1}})


def test_a_method_that_feeds_back_the_plain_error_names_those_that_do_not() -> None:
    with pytest.raises(MethodError, match="dfa cannot be trained by another loss(.|\n)*feeds back(.|\n)*auglocal, dcl"):
        made({"smoothing": 0.1}, "dfa")


def test_pixels_are_classified_with_smoothing_and_weights_and_with_no_other_loss() -> None:
    x, y = torch.randn(2, 3, 8, 12), torch.randint(4, (2, 8, 12))
    y[0, :4] = 255
    torch.manual_seed(0)
    local = localize.transform(
        Segmenter(), "dgl", example_input=x, loss={"smoothing": 0.1, "weights": [1, 2, 3, 4]}
    ).train()

    result = local.step(x, y, torch.optim.SGD(local.param_groups(lr=0.1), lr=0.1))

    last = f"loss_{len(local.plan.losses) - 1}"
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0])
    expected = nn.functional.cross_entropy(result.logits, y, weight, ignore_index=255, label_smoothing=0.1)
    torch.testing.assert_close(result.losses[last], expected)
    localize.audit(local, (x, y)).raise_if_failed()
    assert local.plan.labels.kinds == ("ids",)
    with pytest.raises(MethodError, match="classifies pixels(.|\n)*focal"):
        localize.transform(Segmenter(), "dgl", example_input=x, loss="focal")
