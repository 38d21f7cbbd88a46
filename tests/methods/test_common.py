"""The law that every method obeys on every network to which it applies."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

import localize
from localize import methods
from localize.runtime import LocalModel
from tests.nets import ALL

EXPECTED_SEGMENTS = {"backprop": 1}
PAIRS = list(itertools.product(methods.names(), ALL))


def transformed(method: str, net: str) -> LocalModel:
    return localize.transform(ALL[net](), method, example_input=torch.empty(2, 3, 8, 8)).train()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 4, 0])


@pytest.mark.parametrize(("method", "net"), PAIRS)
def test_it_passes_the_whole_audit(method: str, net: str) -> None:
    local = transformed(method, net)

    localize.audit(local, batch()).raise_if_failed()

    assert len(local.plan.segments) == EXPECTED_SEGMENTS.get(method, len(local.plan.segments))
    assert method == "backprop" or len(local.plan.segments) >= 2


@pytest.mark.parametrize(("method", "net"), PAIRS)
def test_steps_on_one_batch_lower_every_local_loss(method: str, net: str) -> None:
    local = transformed(method, net)
    for dropout in (m for m in local.modules() if isinstance(m, nn.Dropout)):
        dropout.p = 0.0
    x, y = batch()
    optimizer = torch.optim.SGD(local.param_groups(lr=0.02), lr=0.02)

    first = local.step(x, y, optimizer)
    for _ in range(30):
        last = local.step(x, y, optimizer)

    risen = [name for name in first.losses if not last.losses[name] < first.losses[name]]
    assert not risen, f"{risen} rose: {first.losses} -> {last.losses}"


@pytest.mark.parametrize(("method", "net"), PAIRS)
def test_the_trunk_s_state_loads_into_a_fresh_model(method: str, net: str) -> None:
    local = transformed(method, net)
    x, y = batch()
    local.step(x, y, torch.optim.SGD(local.param_groups(lr=0.1), lr=0.1))

    fresh = ALL[net]()
    fresh.load_state_dict(local.export().state_dict(), strict=True)

    assert type(local.export()) is ALL[net]
    assert torch.equal(fresh.eval()(x), local.eval()(x))


@pytest.mark.parametrize("method", methods.names())
def test_a_deep_copy_trains_as_the_original_does(method: str) -> None:
    local = transformed(method, "ResNet")
    twin = copy.deepcopy(local)
    x, y = batch()

    for one in (local, twin):
        one.step(x, y, torch.optim.SGD(one.param_groups(lr=0.1), lr=0.1))

    for (name, mine), (_, theirs) in zip(local.state_dict().items(), twin.state_dict().items(), strict=True):
        assert torch.equal(mine, theirs), name
    assert not {p.data_ptr() for p in local.parameters()} & {p.data_ptr() for p in twin.parameters()}


@pytest.mark.parametrize("method", methods.names())
def test_it_names_its_paper_and_converts_to_the_same_text_twice(method: str) -> None:
    assert methods.get(method).reference
    assert transformed(method, "ResNet").source == transformed(method, "ResNet").source
