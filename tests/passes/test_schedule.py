"""A schedule changes what a step costs, and not what it learns."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import localize
from localize import methods
from localize.errors import MethodError, OptionError, RecipeError
from localize.ops import micro_batches
from localize.passes import schedule
from tests import daily
from tests.golden import det
from tests.nets import ALL

X, Y = det((6, 3, 8, 8), 3), torch.tensor([0, 1, 2, 3, 4, 0])
OPTIONS = {"auglocal": {"d": 2}}


def trained(net: str, method: str, steps: int = 3, **options: Any) -> tuple[localize.LocalModel, Tensor]:
    """Return a model behind some steps of SGD with momentum, and a draw from the random state that they leave."""
    torch.manual_seed(1)
    model = ALL[net]().double().train()
    local = localize.transform(model, method, example_input=X, **options)
    torch.manual_seed(2)
    for module in local.heads.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(local.param_groups(lr=0.1), lr=0.1, momentum=0.9)
    for _ in range(steps):
        local.step(X, Y, optimizer)
    return local, torch.rand(3)


def differences(one: localize.LocalModel, other: localize.LocalModel, tolerance: float = 0.0) -> list[str]:
    pairs = zip(one.state_dict().items(), other.state_dict().values(), strict=True)
    return [name for (name, a), b in pairs if not torch.allclose(a, b, rtol=tolerance, atol=tolerance)]


# ----------------------------------------------------------------------------------------------------------- recompute


@functools.cache
def trained_as_usual(net: str, method: str) -> tuple[localize.LocalModel, Tensor]:
    """Return what :func:`trained` makes without recomputing; several tests compare with it."""
    return trained(net, method, **OPTIONS.get(method, {}))


@pytest.mark.parametrize("what", ["head", "body", "all"])
@pytest.mark.parametrize("method", daily.in_turn(["backprop", "auglocal", "dcl", "predsim", "infopro", "dgl"], 3))
@pytest.mark.parametrize("net", ["ResNet", "TwoStreams", "ViT"])
def test_recomputing_leaves_the_same_weights_statistics_and_random_state(net: str, method: str, what: str) -> None:
    kept, drawn = trained_as_usual(net, method)
    again, drawn_again = trained(net, method, recompute=what, **OPTIONS.get(method, {}))

    assert not differences(kept, again)
    assert torch.equal(drawn, drawn_again)
    assert ("recompute(" in again.source) == (what != "head" or method != "backprop")


# ---------------------------------------------------------------------------------------------------------- micro-batch


@pytest.mark.parametrize("recompute", ["none", "all"])
@pytest.mark.parametrize(
    ("net", "method"),
    [("TwoStreams", "backprop"), ("TwoStreams", "auglocal"), ("MLP", "dcl"), ("MLP", "deep-supervision")],
)
def test_micro_batches_give_the_weights_of_whole_batches(net: str, method: str, recompute: str) -> None:
    options = {"d": 2, "head_norm": False} if method == "auglocal" else {}
    whole, _ = trained(net, method, **options)
    parts, _ = trained(net, method, micro_batch=4, recompute=recompute, **options)

    assert "micro_batches(step_0, 4," in parts.source
    assert not differences(whole, parts, 1e-9)


def test_what_a_step_returns_is_that_of_the_whole_batch() -> None:
    results = []
    for options in ({}, {"micro_batch": 4}):
        local, _ = trained("MLP", "dcl", steps=0, **options)
        results.append(local.step(X, Y, torch.optim.SGD(local.param_groups(lr=0.1), lr=0.1)))
    whole, parts = results

    assert parts.logits.shape == (6, 5)
    for name in whole.losses:
        torch.testing.assert_close(parts.losses[name], whole.losses[name])
    torch.testing.assert_close(parts.scores["loss_0"], whole.scores["loss_0"])


def test_a_batch_that_fits_is_taken_as_it_is() -> None:
    whole, _ = trained("MLP", "dcl")
    fits, _ = trained("MLP", "dcl", micro_batch=6)

    assert not differences(whole, fits)


def test_parts_are_put_together_in_their_memory_format() -> None:
    images = torch.randn(5, 3, 4, 4).to(memory_format=torch.channels_last)
    seen: list[tuple[int, float]] = []

    def function(trunk: Any, heads: Any, x: Tensor, y: Tensor, share: float) -> tuple[Tensor, Tensor]:
        seen.append((len(x), share))
        return 2 * x, share * y.double().mean()

    made, mean = micro_batches(function, 2, None, None, images, torch.arange(5))  # type: ignore[arg-type]

    assert seen == [(2, 0.4), (2, 0.4), (1, 0.2)]
    assert torch.equal(made, 2 * images)
    assert made.is_contiguous(memory_format=torch.channels_last)
    assert mean.item() == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("net", "method", "reason"),
    [
        ("ResNet", "backprop", "7 BatchNorms would normalise micro-batches of 2 images"),
        ("MLP", "predsim", "similarity_matching is not known as a mean over images"),
        ("MLP", "dfa", "wait for the whole forward"),
        ("MLP", "accumulate", "takes the batch in parts already"),
    ],
)
def test_what_needs_the_whole_batch_is_refused(net: str, method: str, reason: str) -> None:
    with pytest.raises(MethodError, match=reason):
        localize.transform(ALL[net](), method, example_input=X.float(), micro_batch=2)


def test_the_audit_finds_losses_of_parts_that_do_not_add_up() -> None:
    local, _ = trained("MLP", "dcl", micro_batch=2)
    wrong = local.with_source(
        local.source.replace("share * F.cross_entropy(scores_0, y)", "F.cross_entropy(scores_0, y)")
    )

    report = localize.audit(wrong, (X, Y))

    failed = {check.id for check in report.checks if not check.ok}
    assert {"static.terms", "measured.run"} <= failed or "static.terms" in failed
    assert localize.audit(local, (X, Y)).ok


def test_ghost_norm_is_a_stated_deviation() -> None:
    local, _ = trained("ResNet", "dcl", micro_batch=2, ghost_norm=True)

    assert "ghost batch normalisation" in local.plan.deviations[-1]
    localize.audit(local, (X, Y)).raise_if_failed()


# -------------------------------------------------------------------------------------------------------------- options


def test_options_of_a_schedule_are_those_of_no_method() -> None:
    taken = {name for method in methods.names() for name in methods.get(method).__dataclass_fields__}
    assert not taken.intersection(schedule.names())


def test_a_recipe_may_state_a_schedule_and_what_is_typed_wins() -> None:
    recipe = {"method": "dcl", "schedule": {"recompute": "body"}}
    model = ALL["MLP"]()

    stated = localize.transform(model, recipe, example_input=X.float())
    typed = localize.transform(copy.deepcopy(model), recipe, example_input=X.float(), recompute="none")

    assert stated.plan.recompute and not typed.plan.recompute


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recompute": "heads"}, "cannot be 'heads'"),
        ({"micro_batch": -1}, "the lowest value is 0"),
        ({"micro_batch": 2.5}, "takes whole numbers"),
    ],
)
def test_wrong_values_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        localize.transform(ALL["MLP"](), "dcl", example_input=X.float(), **options)
    with pytest.raises(RecipeError, match=message):
        localize.recipes.load({"method": "dcl", "schedule": options})


def test_an_unknown_key_of_a_schedule_is_refused_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'micro_batch'"):
        localize.recipes.load({"method": "dcl", "schedule": {"microbatch": 2}})
