"""The law that every method obeys on every network to which it applies."""

from __future__ import annotations

import copy
import functools
import itertools

import pytest
import torch

import localize
from localize import methods, recipes
from localize.errors import MethodError
from localize.runtime.model import LocalModel
from localize.testing import laws
from tests import daily, shipped
from tests.nets import ALL

NAMES = tuple(name for name in recipes.names() if shipped.recipe(name).model is None)
"""Every method, and every preset of one, that is not for a certain model."""
OPTIONS = {name: {"window": 2} for name in ("mlaan", "mlaan-dgl", "mlaan-infopro", "mlm")}
"""Options for nets of three segments, on which a window of three would be backpropagation."""
WHOLE = ("backprop", "accumulate", "fa")
"""Those that cut nothing."""
REFUSED = {
    "length of activities": (("ff", "symba"), ("TwoStreams", "MLP", "Writes")),
    "fully connected layers|length of activities": (("pff",), tuple(ALL)),
    "no block after segment . of TwoStreams can be copied": (
        ("mlaan", "mlaan-code", "mlaan-dgl", "mlaan-infopro", "lam"),
        ("TwoStreams",),
    ),
    "features with positions": (
        ("infopro", "infopro-softmax", "auglocal-infopro", "ll-contrec", "mlaan-infopro"),
        ("MLP",),
    ),
}
"""Why a method does not apply: what the refusal says, which methods, on which nets."""
PAIRS = [
    (name, net)
    for name, net in itertools.product(NAMES, ALL)
    if not any(name in names and net in nets for names, nets in REFUSED.values())
]
METHODS = [(name, net) for name, net in PAIRS if name in methods.names()]


def converted(name: str, net: str) -> LocalModel:
    options = OPTIONS.get(name, {})
    return localize.transform(ALL[net](), name, example_input=torch.empty(2, 3, 8, 8), **options).train()


@functools.cache
def converted_once(name: str, net: str) -> tuple[LocalModel, torch.Tensor]:
    """Return what :func:`converted` makes, and the random state after it."""
    torch.manual_seed(0)
    return converted(name, net), torch.get_rng_state()


def transformed(name: str, net: str) -> LocalModel:
    """Return a copy of what :func:`converted` makes; the copy costs a tenth of it."""
    local, state = converted_once(name, net)
    torch.set_rng_state(state)
    return copy.deepcopy(local)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 4, 0])


@pytest.mark.parametrize(("name", "net"), daily.in_turn(PAIRS, 4))
def test_it_passes_the_whole_audit(name: str, net: str) -> None:
    local = transformed(name, net)

    localize.audit(local, batch()).raise_if_failed()

    assert (len(local.plan.segments) == 1) == (name in WHOLE)


@pytest.mark.parametrize(
    ("name", "net", "told"),
    [(name, net, told) for told, (names, nets) in REFUSED.items() for name in names for net in nets],
)
def test_where_it_does_not_apply_the_refusal_says_why(name: str, net: str, told: str) -> None:
    with pytest.raises(MethodError, match=told):
        transformed(name, net)


@pytest.mark.parametrize(("method", "net"), METHODS)
def test_a_small_step_on_what_a_loss_reaches_lowers_it(method: str, net: str) -> None:
    laws.lowers_each_loss(transformed(method, net), batch())


@pytest.mark.parametrize(("method", "net"), daily.in_turn(METHODS, 4))
def test_steps_on_one_batch_lower_the_losses(method: str, net: str) -> None:
    # drtp sums over the batch, and nothing bounds a ReLU's activities
    laws.learns_a_batch(transformed(method, net), batch(), lr=0.02 / (6 if method == "drtp" else 1))


@pytest.mark.parametrize(("method", "net"), METHODS)
def test_the_trunk_s_state_loads_into_a_fresh_model(method: str, net: str) -> None:
    laws.gives_the_model_back(transformed(method, net), batch(), ALL[net]())


@pytest.mark.parametrize("method", [m for m, net in METHODS if net == "ResNet"])
def test_a_deep_copy_trains_as_the_original_does(method: str) -> None:
    laws.trains_as_its_copy(transformed(method, "ResNet"), batch())


@pytest.mark.parametrize("method", [m for m, net in METHODS if net == "ResNet"])
def test_it_names_its_paper_and_converts_to_the_same_step_twice(method: str) -> None:
    assert methods.get(method).reference

    def seeded() -> localize.LocalModel:
        torch.manual_seed(0)
        return converted(method, "ResNet")

    laws.converts_to_the_same_step(seeded, batch())
