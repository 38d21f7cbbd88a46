"""Following each distinct function once finds what following all of them finds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import localize
from localize.estimate import memory
from localize.torch_names import fake_mode
from tests.nets import ALL, Block
from tests.runtime.test_compiled import Layered


def all_followed(local: localize.LocalModel, count: int) -> memory.Footprint:
    with fake_mode():
        fake = memory.without_values(local)
        x, y = memory.empty_batch(local.plan.segments.trunk, count)
        return memory.measure(fake, x, y, memory.sgd(fake.param_groups(lr=0.1)))


class Forgetful(dict):
    """Costs that are looked up in vain, so that every call is followed."""

    def __contains__(self, key: object) -> bool:
        return False


def layered(method: str, **options: Any) -> localize.LocalModel:
    model = Layered(*(Block(4, 4) for _ in range(4)))
    return localize.transform(model, method, example_input=torch.empty(2, 3, 8, 8), **options).train()


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dcl", {}),
        ("dcl", {"dictionary": "averaged"}),
        ("auglocal", {"d": 2}),
        ("dcl", {"micro_batch": 2}),
        ("dcl", {"recompute": "all"}),
        ("accumulate", {"parts": 4}),
        ("infopro", {}),
    ],
)
def test_it_finds_the_same(method: str, options: dict[str, Any]) -> None:
    local = layered(method, **options)

    found, whole = memory.predict(local, 8), all_followed(local, 8)

    for name in ("resident", "peak", "saved", "macs", "moved"):
        assert getattr(found, name) == getattr(whole, name), name
    assert found.seconds == pytest.approx(whole.seconds)
    if method != "auglocal":  # whose heads differ
        assert len({called.key for called in found.calls}) < len(found.calls), "something was stood in for"
    assert sum(found.components.values()) == found.peak
    assert found.components == memory.predict(local, 8, known=Forgetful()).components


def test_weights_of_losses_do_not_tell_segments_apart() -> None:
    known: dict[Any, Any] = {}

    found = memory.predict(layered("infopro"), 8, known=known)

    assert len(known) < len(found.calls)


@pytest.mark.parametrize(
    ("method", "opt"),
    [("dcl", "adamw"), ("dcl", "sgd"), ("auglocal", "lamb"), ("accumulate", "adafactor"), ("mlaan", "rmsprop")],
)
def test_states_are_those_of_a_first_step(method: str, opt: str) -> None:
    local = layered(method)
    optimizer = memory.named(opt)(local.param_groups(lr=0.1))
    local.step(torch.randn(8, 3, 8, 8), torch.zeros(8, dtype=torch.long), optimizer)
    with fake_mode():
        fake = memory.without_values(local)
        predicted = memory.named(opt)(fake.param_groups(lr=0.1))
        memory.make_states(fake, predicted)

    assert states_of(fake, predicted) == states_of(local, optimizer)


def states_of(local: localize.LocalModel, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    names: dict[Any, str] = {p: name for name, p in local.named_parameters()}
    return {
        names.get(key, key): {n: tuple(v.shape) if isinstance(v, torch.Tensor) else v for n, v in state.items()}
        for key, state in optimizer.state.items()
    }


def test_what_is_known_serves_the_next_plan() -> None:
    known: dict[Any, Any] = {}
    first = memory.predict(layered("dcl"), 8, known=known)
    count = len(known)
    second = memory.predict(layered("dcl", moments="shared"), 8, known=known)

    assert len(known) == count > 0
    assert second.peak < first.peak == memory.predict(layered("dcl"), 8).peak


def test_segments_of_other_forms_or_texts_are_told_apart() -> None:
    class Two(nn.Module):
        def __init__(self, act: nn.Module, width: int) -> None:
            super().__init__()
            self.one, self.act = nn.Sequential(nn.Linear(48, 16), nn.ReLU()), act
            self.two, self.last = nn.Linear(16, width), nn.Linear(width, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.act(self.two(self.one(x.flatten(1)))))

    known: dict[Any, Any] = {}
    sizes = []
    for act, width in ((nn.ReLU(), 16), (nn.GELU(), 16), (nn.ReLU(), 24), (nn.ReLU(), 16)):
        local = localize.transform(Two(act, width), "backprop", example_input=torch.empty(2, 3, 4, 4))
        found = memory.predict(local, 8, known=known)
        assert found.peak == all_followed(local, 8).peak
        sizes.append(len(known))
    assert sizes == [1, 2, 3, 3]


def test_an_optimizer_in_the_backward_needs_less_and_the_same_arithmetic() -> None:
    model = nn.Sequential(nn.Flatten(), *(nn.Linear(192, 192) for _ in range(6)), nn.Linear(192, 5))
    local = localize.transform(model, "backprop", example_input=torch.empty(2, 3, 8, 8))

    plain, fused = (memory.predict(local, 2, in_backward=one) for one in (False, True))

    assert fused.macs == plain.macs and fused.resident == plain.resident
    assert plain.peak - fused.peak > 4 * 192 * 192 * 4, "all gradients but one or two are gone"


def test_a_model_that_saves_memory_by_itself_is_followed_as_it_is() -> None:
    from torchvision.models.densenet import DenseNet

    model = DenseNet(growth_rate=8, block_config=(4, 4), num_init_features=8, num_classes=5)
    local = localize.transform(model.train(), "backprop", example_input=torch.empty(2, 3, 64, 64))
    trunk = local.plan.segments.trunk

    found = memory.predict_plain(trunk, 8)

    assert memory.saves_memory(trunk.model) and not memory.saves_memory(ALL["MLP"]())
    plain = memory.predict(local, 8)
    assert found.peak < plain.peak and found.moved > plain.moved
    assert not any(getattr(part, "memory_efficient", False) for part in model.modules()), "the model is left alone"
