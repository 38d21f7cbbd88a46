"""The rivals of local learning: checkpointing, accumulation, and deep supervision are backpropagation with a change."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import localize
from localize import zoo
from localize.errors import CutError, MethodError
from localize.heads.classifiers import CLASSIFIERS
from localize.ir import CutSpec
from localize.runtime.model import LocalModel
from tests import nets
from tests.plans import heads, plan

X, Y = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 4, 0])


class Plain(nn.Module):
    """Three convolutions without BatchNorm or dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3 if i == 0 else 4, 4, 3, 1, 1) for i in range(3)])
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return self.fc(x.mean((2, 3)))


class Dropped(nn.Module):
    """Dropout and BatchNorm behind every convolution: a second run has to draw the same numbers, and count once."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(3 if i == 0 else 4, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3))
                for i in range(4)
            )
        )
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(x).mean((2, 3)))


def trained(model: nn.Module, x: Tensor, y: Tensor) -> nn.Module:
    """Take an ordinary step of PyTorch on a copy, and return it with its gradients."""
    model = copy.deepcopy(model).train()
    torch.manual_seed(3)
    F.cross_entropy(model(x), y).backward()
    return model


def stepped(model: nn.Module, method: str, x: Tensor, y: Tensor, **options: Any) -> LocalModel:
    """Take a step with learning rate 0 on a copy, and return it with its gradients."""
    local = localize.transform(copy.deepcopy(model), method, example_input=x, **options).train()
    torch.manual_seed(3)
    local.step(x, y, torch.optim.SGD(local.param_groups(lr=0.0), lr=0.0))
    return local


# ------------------------------------------------------------------------------------------------------ checkpointing


@pytest.mark.parametrize("cut", [None, CutSpec(segments=2), CutSpec(segments="max")], ids=["sqrt", "2", "max"])
@pytest.mark.parametrize("net", [*nets.ALL.values(), Dropped], ids=lambda net: net.__name__)
def test_checkpointing_is_backpropagation_bit_for_bit(net: type, cut: CutSpec | None) -> None:
    model = net()

    expected, found = trained(model, X, Y), stepped(model, "checkpoint", X, Y, cut=cut).trunk

    for (name, mine), theirs in zip(found.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad), name
    for (name, mine), theirs in zip(found.named_buffers(), expected.buffers(), strict=True):
        assert torch.equal(mine, theirs), name


def test_every_segment_but_the_last_runs_twice() -> None:
    local = localize.transform(Plain(), "checkpoint", example_input=X, cut=CutSpec(segments="max")).train()
    counts = [0, 0, 0]
    for i, layer in enumerate(local.trunk.layers):
        layer.register_forward_pre_hook(lambda *_, i=i: counts.__setitem__(i, counts[i] + 1))

    local.step(X, Y, torch.optim.SGD(local.param_groups(lr=0.0), lr=0.0))

    assert len(local.plan.segments) == 3
    assert counts == [2, 2, 1]


def test_checkpointing_cuts_into_as_many_segments_as_the_root_of_the_layers() -> None:
    local = localize.transform(
        zoo.create_model("cifar/resnet20"), "checkpoint", example_input=torch.empty(2, 3, 32, 32)
    )

    assert len(local.plan.segments.layout.layers) == 10
    assert len(local.plan.segments) == 3
    assert local.plan.recompute == ("segment_0", "segment_1")


def saved_bytes(local: LocalModel, x: Tensor, y: Tensor) -> int:
    """Return the most bytes that autograd holds at once while a step runs; each storage counts once."""
    held: dict[int, list[int]] = {}
    most = 0

    class Saved:
        def __init__(self, value: Tensor) -> None:
            nonlocal most
            self.value, self.key = value, value.untyped_storage().data_ptr()
            entry = held.setdefault(self.key, [0, value.untyped_storage().nbytes()])
            entry[0] += 1
            most = max(most, sum(size for _, size in held.values()))

        def __del__(self) -> None:
            held[self.key][0] -= 1
            if not held[self.key][0]:
                del held[self.key]

    optimizer = torch.optim.SGD(local.param_groups(lr=0.0), lr=0.0)
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.value):
        local.step(x, y, optimizer)
    return most


@pytest.mark.parametrize("method", ["checkpoint", "accumulate"])
def test_less_is_held_for_the_backward_than_by_backpropagation(method: str) -> None:
    model = zoo.create_model("cifar/resnet20")
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8)

    most = {}
    for name in ("backprop", method):
        local = localize.transform(copy.deepcopy(model), name, example_input=x).train()
        most[name] = saved_bytes(local, x, y)

    assert most[method] < 0.6 * most["backprop"]


def test_checkpointing_without_a_cut_is_refused() -> None:
    with pytest.raises(MethodError, match="checkpoint needs at least two segments"):
        localize.transform(Plain(), "checkpoint", example_input=X, cut=CutSpec(segments=1))


# ------------------------------------------------------------------------------------------------------- accumulation


@pytest.mark.parametrize("parts", [2, 4, 5])
@pytest.mark.parametrize("net", [Plain, nets.MLP, nets.Writes], ids=lambda net: net.__name__)
def test_gradients_of_the_parts_add_up_to_those_of_the_batch(net: type, parts: int) -> None:
    model = net().double()

    expected, found = trained(model, X.double(), Y), stepped(model, "accumulate", X.double(), Y, parts=parts)

    assert len(found.plan.losses) == parts
    for (name, mine), theirs in zip(found.trunk.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-14, msg=name)


def test_losses_of_the_parts_are_their_shares_of_the_loss_and_scores_are_those_of_the_batch() -> None:
    model = Plain().double()
    local = localize.transform(model, "accumulate", example_input=X.double()).train()

    result = local.step(X.double(), Y, torch.optim.SGD(local.param_groups(lr=0.0), lr=0.0))

    torch.testing.assert_close(sum(result.losses.values()), F.cross_entropy(model(X.double()), Y).detach())
    torch.testing.assert_close(result.logits, model(X.double()).detach())
    assert list(result.losses) == ["loss_0", "loss_1", "loss_2", "loss_3"]


def test_batch_statistics_are_those_of_the_parts() -> None:
    model = Dropped().double()
    for layer in model.layers:
        layer[3].p = 0.0

    whole, parts = trained(model, X.double(), Y), stepped(model, "accumulate", X.double(), Y, parts=2).trunk

    norms = [m.layers[0][1] for m in (whole, parts)]
    assert [norm.num_batches_tracked.item() for norm in norms] == [1, 2]
    assert not torch.allclose(norms[0].running_mean, norms[1].running_mean)
    assert not torch.allclose(whole.fc.weight.grad, parts.fc.weight.grad)


def test_accumulation_has_no_segments_to_choose() -> None:
    with pytest.raises(CutError):
        localize.transform(Plain(), "accumulate", example_input=X, cut=CutSpec(segments=2))


# --------------------------------------------------------------------------------------------------- deep supervision


def test_all_gradients_of_the_heads_reach_the_input() -> None:
    model = nets.ResNet().double()
    local = localize.transform(model, "deep-supervision", example_input=X.double(), weight=0.5).train()
    twin = copy.deepcopy(local)

    local.step(X.double(), Y, torch.optim.SGD(local.param_groups(lr=0.0), lr=0.0))

    trunk, values = twin.trunk, []
    h = trunk.relu(trunk.bn(trunk.conv(X.double())))
    values.append(h)
    for block in trunk.blocks:
        h = block(h)
        values.append(h)
    loss = F.cross_entropy(trunk.fc(h.mean((2, 3))), Y)
    for i, value in enumerate(values[:-1]):
        loss = loss + 0.5 * F.cross_entropy(twin.heads[f"head_{i}"](value), Y)
    loss.backward()
    for (name, mine), theirs in zip(local.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_every_kind_of_head_can_be_had_without_a_cut(kind: str) -> None:
    made = plan("cifar/resnet20", "deep-supervision", head=kind)

    (loss,) = made.losses
    assert len(heads(made)) == len(made.segments) - 1 == 9
    assert loss.reach == tuple(block.name for block in made.blocks)
    assert [(term.head, term.at) for term in loss.terms] == [*((f"head_{i}", i) for i in range(9)), (None, None)]


def test_deep_supervision_without_a_place_for_a_head_is_refused() -> None:
    with pytest.raises(MethodError, match="deep-supervision needs at least two segments"):
        localize.transform(Plain(), "deep-supervision", example_input=X, cut=CutSpec(segments=1))
