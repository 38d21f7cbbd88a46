"""Dense blocks in parts are swept as their layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import localize
from localize.estimate import memory
from tests.golden import det
from tests.nets import ALL

X = det((6, 3, 8, 8), 3).float()


def converted(model: nn.Module, **options: Any) -> localize.LocalModel:
    return localize.transform(model, "dcl", example_input=X, micro_batch=3, **options)


def kept(local: localize.LocalModel) -> dict[str, str]:
    """Return what is kept, by the segment's end."""
    words = dict(local.plan.kept)
    ends = {loss.name: local.plan.segments.segments[loss.route.stop].ends_at for loss in local.plan.losses}
    return {ends[name]: word for name, word in words.items()}


class Layer(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, 8, 1)
        self.norm2, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.norm2(self.conv1(self.norm1(x).relu())).relu())


def nested(features: list[Tensor]) -> Tensor:
    """Concatenate all features so far with the new one, step by step."""
    made = features[0]
    for value in features[1:]:
        made = torch.cat((made, value), 1)
    return made


def listed(features: list[Tensor]) -> Tensor:
    return torch.cat(features, 1)


class Block(nn.Module):
    """A dense block of so many layers, and what a subclass does to its features."""

    join: Callable[[list[Tensor]], Tensor] = staticmethod(listed)

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.layers = nn.ModuleList(Layer(8 + 4 * k) for k in range(layers))
        self.fc = nn.Linear(8 + 4 * layers, 5)

    def features(self, x: Tensor) -> Tensor:
        found = [x]
        for layer in self.layers:
            found.append(layer(type(self).join(found)))
        return type(self).join(found)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(self.stem(x)).mean((2, 3)))


class Nested(Block):
    join = staticmethod(nested)


class WrittenOver(Block):
    """The first feature is written over once it has been read."""

    def features(self, x: Tensor) -> Tensor:
        first = self.layers[0](listed([x]))
        second = self.layers[1](listed([x, first]))
        first.mul_(2.0)
        return listed([x, first, second, self.layers[2](listed([x, first, second]))])


class Bypassed(Block):
    """What comes after the first norm is read beside what is kept."""

    def features(self, x: Tensor) -> Tensor:
        inside = self.layers[0].norm1(listed([x])).relu()
        first = self.layers[0].conv2(self.layers[0].norm2(self.layers[0].conv1(inside)).relu())
        second = self.layers[1](listed([x, first])) + inside[:, :4]
        return listed([x, first, second, self.layers[2](listed([x, first, second]))])


class SameName(Block):
    """A norm of the same last name reads something else."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.ModuleDict({"norm1": nn.BatchNorm2d(8)})

    def features(self, x: Tensor) -> Tensor:
        return super().features(self.before["norm1"](x).relu())


@pytest.mark.parametrize("net", [Block, Nested])
def test_a_dense_block_keeps_what_its_layers_read(net: Callable[[], nn.Module]) -> None:
    local = converted(net(), cut=localize.CutSpec(at=("stem",)))

    assert kept(local) == {"output": "norm1"}
    assert 'keep="norm1"' in local.source


@pytest.mark.parametrize("net", [WrittenOver, Bypassed, SameName])
def test_a_block_that_these_values_do_not_divide_keeps_nothing(net: Callable[[], nn.Module]) -> None:
    assert kept(converted(net(), cut=localize.CutSpec(at=("stem",)))) == {}


@pytest.mark.parametrize("name", sorted(set(ALL) - {"Dense", "Writes"}))
def test_other_nets_keep_nothing_unless_it_is_asked_for(name: str) -> None:
    assert kept(converted(ALL[name]())) == {}


def test_what_is_asked_for_wins() -> None:
    assert kept(converted(ALL["Dense"]())) == {"stage1": "0", "stage2": "0"}
    assert kept(converted(ALL["Dense"](), keep_at="none@stage1")) == {"stage2": "0"}
    assert kept(converted(ALL["Dense"](), keep_at="none@*")) == {}
    assert kept(converted(ALL["Dense"](), keep_at="none@*,layers.1.0@stage2")) == {"stage2": "layers.1.0"}
    assert kept(converted(ALL["Dense"](), micro_batch_at="0@stage1")) == {"stage2": "0"}


@pytest.mark.parametrize("net", [Block, Nested])
def test_kept_features_change_nothing_but_the_arithmetic(net: Callable[[], nn.Module]) -> None:
    def trained(**options: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        local = localize.transform(net().double(), "dcl", example_input=X.double(), **options).double()
        local.step(X.double(), torch.arange(6) % 5, torch.optim.SGD(local.param_groups(lr=0.1)))
        return local.state_dict()

    whole, chained = trained(), trained(micro_batch=4)

    for name, value in whole.items():
        torch.testing.assert_close(chained[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_the_work_of_a_dense_block_grows_with_its_length_and_not_with_the_square() -> None:
    def times(layers: int, **options: Any) -> float:
        """Return the multiply-adds of a step in parts, by those of the whole batch."""
        cut = localize.CutSpec(at=("stem",))
        whole = localize.transform(Block(layers), "dcl", example_input=X, cut=cut)
        return memory.predict(converted(Block(layers), cut=cut, **options), 6).macs / memory.predict(whole, 6).macs

    assert times(6) < 1.2 * times(3)
    assert times(6, keep_at="none@*") > 1.4 * times(3, keep_at="none@*")
