"""Branches are added to the local losses of any method, and its own terms weighted anew."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import localize
from localize import methods, recipes
from localize.errors import LocalizeError, MethodError, OptionError, RecipeError, UnknownNameError
from localize.heads import branches
from localize.ir import Plan
from localize.passes.compose import OWN, Addition, check, compose
from tests.golden import det
from tests.nets import ALL
from tests.plans import heads, plan

X, Y = det((6, 3, 8, 8), 3), torch.tensor([0, 1, 2, 3, 4, 0])


def made(method: str, net: str = "ResNet", *terms: dict[str, Any], **options: Any) -> localize.LocalModel:
    recipe = {"method": method, "options": options, "terms": list(terms)}
    return localize.transform(ALL[net]().double(), recipe, example_input=X).train()


def step(local: localize.LocalModel) -> dict[str, Tensor]:
    return local.step(X, Y, torch.optim.SGD(local.param_groups(lr=0.0), lr=0.0)).losses


# ---------------------------------------------------------------------------------------------------------------- plan


def weights(plan: Plan, kind: str) -> list[float]:
    """Return the weight of the term with this loss in each loss of a plan that has it."""
    return [term.weight for loss in plan.losses for term in loss.terms if term.loss.endswith(kind)]


def test_weights_run_from_the_first_local_loss_to_the_last() -> None:
    base = plan("cifar/resnet20", "dcl", tau=0.07)

    found = compose(base, [Addition(OWN, (0.5, 1.5)), Addition("reconstruction", (5.0, 1.0))])

    assert weights(found, ".reconstruction") == [5 - 0.5 * i for i in range(9)]
    assert weights(found, ".cross_entropy") == [0.5 + 0.125 * i for i in range(9)] + [1.0]
    assert found.losses[-1] == base.losses[-1]


def test_the_plan_that_is_composed_stays_as_it_is() -> None:
    base = plan("cifar/resnet20", "dcl")
    before = copy.copy(base)

    compose(base, [Addition(OWN, 0.0), Addition("contrast")])

    assert base == before
    assert compose(base, []) is base


def test_a_branch_is_trained_by_the_loss_that_it_is_added_to() -> None:
    found = compose(plan("cifar/resnet20", "dcl"), [Addition("contrast", 0.1)])

    assert found.losses[2].reach == ("segment_2", "head_2", "dictionary", "contrast_2")
    assert found.block("contrast_2").size == 16 * 128 + 128


def test_scores_stay_those_of_the_method() -> None:
    found = compose(plan("cifar/resnet20", "dcl"), [Addition("softmax", 0.1)])

    assert [found.losses[k].scored.head for k in range(3)] == ["head_0", "head_1", "head_2"]


def test_what_has_weight_0_is_left_out_with_its_blocks() -> None:
    found = compose(plan("cifar/resnet20", "dcl"), [Addition(OWN, (0.0, 1.0)), Addition("softmax", (1.0, 0.0))])

    assert [term.head for term in found.losses[0].terms] == ["softmax_0"]
    assert [term.head for term in found.losses[1].terms] == ["softmax_1", "head_1"]
    assert [term.head for term in found.losses[8].terms] == ["head_8"]
    assert found.losses[0].reach == ("segment_0", "softmax_0")
    assert {"head_0", "softmax_8"}.isdisjoint(block.name for block in found.blocks)
    assert found.losses[0].scored.head == "softmax_0"


def test_a_method_can_lend_no_more_than_its_layers() -> None:
    found = compose(plan("cifar/resnet20", "dcl"), [Addition(OWN, 0.0), Addition("mlp")])

    assert [term.head for loss in found.losses[:-1] for term in loss.terms] == [f"mlp_{i}" for i in range(9)]
    assert "dictionary" not in [block.name for block in found.blocks]


# ---------------------------------------------------------------------------------------------------------------- step


# LL-contrec is LL-cont with a reconstruction: weights l / (L - 1) and 1 - l / (L - 1), l = 1 .. L - 1.
@pytest.mark.parametrize("net", ["ResNet", "TwoStreams", "ViT"])
def test_a_method_that_is_composed_of_two_is_the_one_that_has_both(net: str) -> None:
    whole = made("ll-contrec", net)
    first = 1 / (len(whole.plan.losses) - 1)
    terms = ({"branch": OWN, "weight": [first, 1.0]}, {"branch": "reconstruction", "weight": [1 - first, 0.0]})
    composed = made("ll-cont", net, *terms)
    names = {name: name.replace("heads.decoder", "heads.reconstruction") for name in whole.state_dict()}
    composed.load_state_dict({names[name]: value for name, value in whole.state_dict().items()}, strict=True)

    torch.manual_seed(0)
    expected = step(whole)
    torch.manual_seed(0)
    found = step(composed)

    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=0)
    gradients = {name: p.grad for name, p in composed.named_parameters()}
    for name, p in whole.named_parameters():
        torch.testing.assert_close(gradients[names[name]], p.grad, rtol=1e-9, atol=1e-12)


BASES = ["auglocal", "dcl", "infopro", "cfl", "feat", "ll-cont", "ll-contrec"]


@pytest.mark.parametrize(("method", "branch"), list(itertools.product(BASES, ["reconstruction", "feature"])))
def test_every_method_with_every_branch_passes_the_whole_audit(method: str, branch: str) -> None:
    local = made(method, "ResNet", {"branch": OWN, "weight": [0.5, 1.0]}, {"branch": branch, "weight": [2.0, 0.5]})

    localize.audit(local, (X, Y)).raise_if_failed()


@pytest.mark.parametrize("branch", branches.BRANCHES)
@pytest.mark.parametrize("net", ALL)
def test_every_branch_stands_behind_every_net_or_says_why_not(branch: str, net: str) -> None:
    try:
        local = made("feat", net, {"branch": branch, "weight": [1.0, 0.5]})
    except MethodError as error:
        # Their last local layer gives a flat vector.
        assert branch == "reconstruction" and net in ("MLP", "TwoStreams"), error
        return

    assert all(loss.isfinite() for loss in step(local).values())


@pytest.mark.parametrize("branch", branches.BRANCHES)
def test_every_branch_passes_the_whole_audit(branch: str) -> None:
    local = made("feat", "ResNet", {"branch": branch, "weight": [1.0, 0.5]})

    localize.audit(local, (X, Y)).raise_if_failed()


def test_methods_without_a_local_loss_are_refused() -> None:
    with pytest.raises(MethodError, match="backprop has no local loss.*\n.*it has 1 loss, on"):
        made("backprop", "ResNet", {"branch": "contrast"})


def test_a_block_of_the_method_is_shared_only_if_it_is_the_same() -> None:
    made("infopro", "ResNet", {"branch": "reconstruction"})
    options = {"mean": "0.5", "std": "0.5"}

    with pytest.raises(MethodError, match="infopro already has another block called 'pixels'.*\n.*own range"):
        made("infopro", "ResNet", {"branch": "reconstruction", "options": options})


def test_nothing_left_of_a_loss_is_refused() -> None:
    with pytest.raises(MethodError, match="nothing is left of loss_0: all of its weights are 0"):
        made("feat", "ResNet", {"branch": OWN, "weight": 0.0}, {"branch": "contrast", "weight": [0.0, 1.0]})


# -------------------------------------------------------------------------------------------------------------- recipe


@pytest.mark.parametrize(
    ("additions", "kind", "message"),
    [
        (
            [Addition("contrst")],
            UnknownNameError,
            "no branch 'contrst'.*\n.*are own, .*\n.*did you mean 'contrast'",
        ),
        ([Addition("contrast"), Addition("contrast")], OptionError, "branch 'contrast' is given twice"),
        ([Addition("contrast", -1.0)], OptionError, "cannot have the weight -1.0"),
        ([Addition("contrast", (1.0, float("inf")))], OptionError, "cannot have the weight"),
        ([Addition("contrast", 0.0)], OptionError, "weight 0 everywhere"),
        ([Addition("contrast", 1.0, {"tua": 1.0})], OptionError, "no option 'tua'.*\n.*\n.*did you mean 'tau'"),
        ([Addition("contrast", 1.0, {"tau": "a"})], OptionError, "'tau' of branch 'contrast' cannot be 'a'"),
        ([Addition(OWN, 1.0, {"tau": 0.1})], OptionError, "own terms have no option 'tau' here"),
    ],
)
def test_what_cannot_be_added_is_refused(additions: list[Addition], kind: type[LocalizeError], message: str) -> None:
    with pytest.raises(kind, match=message):
        check(additions)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("- {branch: contrst}", "no branch 'contrst'(.*\n)*.*at terms.0.branch of .*terms.yaml, line 3"),
        ("- {branch: contrast, weight: [1.0]}", "terms.0.weight.* cannot be(.*\n)*.*line 3"),
        ("- {branch: contrast, weight: -2.0}", "cannot have the weight -2.0(.*\n)*.*at terms.0.weight .*line 3"),
        ("- {branch: contrast, options: {tua: 1.0}}", "no option 'tua'(.*\\n)*.*at terms.0.options.tua .*line 3"),
        ("- {branch: contrast, wieght: 2.0}", "no key 'wieght'(.*\n)*.*line 3(.*\n)*.*did you mean 'weight'"),
        ("- {weight: 2.0}", "'branch' is missing(.*\n)*.*line 3"),
    ],
)
def test_a_recipe_says_where_a_term_is_wrong(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "terms.yaml"
    path.write_text(f"method: feat\nterms:\n{line}\n", encoding="utf-8")

    with pytest.raises(RecipeError, match=message):
        recipes.load(path)


def test_a_recipe_with_terms_is_written_as_it_was_read() -> None:
    recipe = recipes.load("auglocal-infopro")

    assert recipe.terms == (Addition(OWN, (0.05, 0.5)), Addition("reconstruction", (5.0, 0.2)))
    assert recipes.parse(recipes.dump(recipe), "again") == recipe


def test_auglocal_with_a_reconstruction_keeps_its_auxiliary_nets() -> None:
    recipe = recipes.load("auglocal-infopro-resnet110-cifar10")
    base = plan("cifar/resnet110", recipe.method, **recipe.options)

    found = compose(base, recipe.terms)

    assert len(found.losses) == 50
    decoders = [block for block in heads(found) if block.name.startswith("reconstruction")]
    # C -> 12 with bias and BatchNorm, 12 -> 3 with bias, for 19 widths of 16, 18 of 32 and 12 of 64.
    assert sum(block.size for block in decoders) == 19 * 2091 + 18 * 3819 + 12 * 7275
    assert [b for b in heads(found) if b not in decoders] == heads(base)
    assert methods.get(recipe.method).name == "auglocal"
