"""Copies that an audit runs on: equal, apart from what they copy, and as each module says that it is copied."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from localize.auditor.state import copied
from localize.runtime.model import LocalModel
from tests.auditor.audit_nets import TinyResNet, make


class Odd(nn.Module):
    """Tied weights, tensors that are plain attributes, a list of them, a hook, and a computed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.one.weight
        self.normed = parametrizations.weight_norm(nn.Linear(4, 4))
        self.pruned = prune.random_unstructured(nn.Linear(4, 4), "weight", 0.5)
        self.register_buffer("seen", torch.zeros(1), persistent=False)
        self.scale, self.several, self.again = torch.ones(4), [torch.ones(2)], self.one
        self.register_buffer("wide", torch.zeros(4))
        self.register_buffer("part", self.wide[1:])
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
        self.register_forward_hook(lambda module, given, made: made * 2)
        self.pruned.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        self.kept = made.detach()

    def forward(self, x: Tensor) -> Tensor:
        return self.pruned(self.normed(self.other(self.one(x)))) * self.scale + self.several[0].sum() * self.frozen


class OwnCopy(nn.Linear):
    """A module that says itself how it is copied."""

    count = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnCopy:
        made = OwnCopy(4, 4)
        made.load_state_dict(self.state_dict())
        made.count = self.count + 1
        return made


@pytest.mark.parametrize("kind", [Odd, lambda: nn.Sequential(OwnCopy(4, 4), nn.Linear(4, 4))])
def test_a_copy_is_a_deep_copy(kind: Any) -> None:
    module, x = kind(), torch.randn(3, 4)

    mine = copied(module)

    assert torch.equal(mine(x), module(x))
    assert [name for name, _ in mine.named_parameters()] == [name for name, _ in module.named_parameters()]
    assert [p.requires_grad for p in mine.parameters()] == [p.requires_grad for p in module.parameters()]
    assert [type(m) for m in mine.modules()] == [type(m) for m in module.modules()]
    assert all(m.count == 1 for m in mine.modules() if isinstance(m, OwnCopy))


def test_a_copy_shares_nothing_that_is_written_to() -> None:
    module = Odd()
    before = {name: value.clone() for name, value in module.state_dict().items()}

    mine = copied(module)
    with torch.no_grad():
        for value in (*mine.parameters(), *mine.buffers(), mine.scale, mine.several[0]):
            value.fill_(5)
    mine.one.register_forward_hook(print)
    mine.new = 1

    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert module.scale.eq(1).all() and module.several[0].eq(1).all() and module.seen.eq(0).all()
    assert not module.one._forward_hooks and not hasattr(module, "new")
    assert mine.one.weight is mine.other.weight and mine.again is mine.one
    assert mine.part.untyped_storage().data_ptr() == mine.wide.untyped_storage().data_ptr()


def test_a_hook_of_a_copy_belongs_to_the_copy() -> None:
    module = Odd()

    mine = copied(module)
    mine(torch.ones(1, 4))

    assert hasattr(mine, "kept") and not hasattr(module, "kept")


def test_a_copy_of_a_local_model_trains_as_it_does() -> None:
    local: LocalModel = make("auglocal", TinyResNet(dropout=0.0))
    pair = [copied(local), copy.deepcopy(local)]

    for one in pair:
        one.step(torch.ones(4, 3, 8, 8), torch.arange(4), torch.optim.SGD(one.param_groups(lr=0.1), lr=0.1))

    for mine, theirs in zip(pair[0].state_dict().values(), pair[1].state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)
