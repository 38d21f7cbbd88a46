"""Losses of a step are scaled by one gradient scaler, and each update is unscaled, checked and left out by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler

import localize
from localize.auditor import measured
from localize.errors import OptionError
from localize.runtime.model import LocalModel
from localize.train.optimizers import clipping
from tests.nets import ALL

X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 3, 4, 0])
AT_ONCE = ("dcl", "MLP", {})
AT_END = ("auglocal", "MLP", {"d": 2, "head_norm": False})


def made(method: str, net: str, **options: Any) -> LocalModel:
    torch.manual_seed(1)
    return localize.transform(ALL[net](), method, example_input=X, **options).train()


def adam(local: LocalModel) -> torch.optim.Optimizer:
    """Return an optimizer that clips gradients, and could unscale them itself behind that."""
    optimizer = torch.optim.Adam(local.param_groups(), lr=0.01, fused=True)
    optimizer.register_step_pre_hook(clipping(0.05))
    return optimizer


def trained(local: LocalModel, scaler: GradScaler | None, parts: int = 1) -> list[Tensor]:
    """Return losses and state behind three steps."""
    torch.manual_seed(2)
    optimizer, losses = adam(local), []
    for _ in range(3):
        for i in range(parts):
            losses += local.step(X, Y, optimizer, batch=(i, parts), scaler=scaler).losses.values()
    return [*losses, *local.state_dict().values()]


@pytest.mark.parametrize(
    ("method", "net", "options", "parts"),
    [
        (*AT_ONCE, 2),
        (*AT_END, 2),
        ("dcl", "MLP", {"micro_batch": 4, "recompute": "all"}, 1),
        ("mlaan", "MLP", {"window": 2}, 1),
        ("fa", "MLP", {}, 1),
        ("dfa", "MLP", {}, 1),
    ],
)
def test_a_scale_that_is_a_power_of_two_changes_no_bit(
    method: str, net: str, options: dict[str, Any], parts: int
) -> None:
    plain = trained(made(method, net, **options), None, parts)
    scaler = GradScaler("cpu", growth_interval=1)
    scaled = trained(made(method, net, **options, loss_scaling=True), scaler, parts)

    assert all(torch.equal(a, b) for a, b in zip(scaled, plain, strict=True))
    assert scaler.get_scale() == 2.0**19, "updated once for every update"


def test_without_a_scaler_a_text_that_scales_trains_like_one_that_does_not() -> None:
    plain = trained(made(*AT_ONCE[:2]), None)
    for scaler in (GradScaler("cpu", enabled=False), None):
        found = trained(made(*AT_ONCE[:2], loss_scaling=True), scaler)
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def moved_by_an_overflow(local: LocalModel, block: str, act: Callable[[LocalModel, GradScaler], None]) -> set[str]:
    """Let the gradient of a block's first parameter be infinite; return the blocks that a step moves all the same."""
    scaler = GradScaler("cpu")
    local.get_parameter(local.plan.block(block).parameters[0]).register_hook(lambda gradient: gradient / 0)
    before = {name: p.detach().clone() for name, p in local.named_parameters()}
    act(local, scaler)
    assert scaler.get_scale() == 2.0**15, "halved once"
    moved = {name for name, p in local.named_parameters() if not torch.equal(p, before[name])}
    return {one.name for one in local.plan.blocks if moved.intersection(one.parameters)}


def test_an_overflow_leaves_out_the_update_of_one_loss_where_segments_are_updated_at_once() -> None:
    local = made(*AT_ONCE[:2], loss_scaling=True)
    optimizer = torch.optim.Adam(local.param_groups(lr=0.01), fused=True)

    moved = moved_by_an_overflow(
        local, "segment_1", lambda local, scaler: local.step(X, Y, optimizer, scaler=scaler) and None
    )

    assert moved == {block.name for block in local.plan.blocks if block.parameters} - {"segment_1"}
    assert optimizer.state["loss_0/heads.dictionary.weight"], "the dictionary's state of a loss that is updated"
    assert not optimizer.state["loss_1/heads.dictionary.weight"]
    assert all(p.grad is None for p in local.parameters())


def test_an_overflow_leaves_out_the_one_update_at_the_end() -> None:
    def accumulated(local: LocalModel, scaler: GradScaler) -> None:
        optimizer = torch.optim.Adam(local.param_groups(lr=0.01), fused=True)
        for i in range(2):
            assert scaler.get_scale() == 2.0**16, "the scale changes between updates only"
            local.step(X, Y, optimizer, batch=(i, 2), scaler=scaler)

    local = made(*AT_END[:2], **AT_END[2], loss_scaling=True)
    assert moved_by_an_overflow(local, "segment_1", accumulated) == set()


class Tiny(nn.Module):
    """Class scores whose gradients are below what float16 can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(192, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x.flatten(1)).relu() * 1e-8)


def test_gradients_that_float16_would_lose_arrive() -> None:
    moved = []
    for scaler in (GradScaler("cpu"), None):
        torch.manual_seed(0)
        local = localize.transform(Tiny(), "backprop", example_input=X, loss_scaling=True)
        before = local.trunk.first.weight.detach().clone()
        with torch.autocast("cpu", torch.float16):
            local.step(X, Y, torch.optim.SGD(local.param_groups(), lr=1e6), scaler=scaler)
        moved.append(not torch.equal(before, local.trunk.first.weight))

    assert moved == [True, False]


@pytest.mark.parametrize(("method", "net", "options"), [AT_ONCE, AT_END])
def test_a_step_trains_in_float16(method: str, net: str, options: dict[str, Any]) -> None:
    local, scaler = made(method, net, **options, loss_scaling=True), GradScaler("cpu")
    optimizer = torch.optim.Adam(local.param_groups(), lr=0.01)
    totals = []
    for _ in range(5):
        with torch.autocast("cpu", torch.float16):
            result = local.step(X, Y, optimizer, scaler=scaler)
        totals.append(sum(map(float, result.losses.values())))

    assert totals[-1] < 0.9 * totals[0]


def test_a_text_that_scales_nothing_refuses_a_scaler_that_is_enabled() -> None:
    local = made(*AT_ONCE[:2])
    optimizer = torch.optim.SGD(local.param_groups(), lr=0.1)

    local.step(X, Y, optimizer, scaler=GradScaler("cpu", enabled=False))
    with pytest.raises(OptionError, match=r"does not scale its losses.*\n.*\n  help: .*loss_scaling=True"):
        local.step(X, Y, optimizer, scaler=GradScaler("cpu"))


def test_the_audit_finds_a_loss_that_is_not_scaled_as_declared() -> None:
    plain, scaled = made(*AT_ONCE[:2]), made(*AT_ONCE[:2], loss_scaling=True)
    localize.audit(scaled, (X, Y)).raise_if_failed()

    for local, old, new, told in (
        (plain, "loss_1.backward()", "optimizer.scale(loss_1).backward()", "the loss is scaled, against the decl"),
        (scaled, "optimizer.scale(loss_1)", "loss_1", "the loss is not scaled, against the declaration"),
    ):
        edited = local.with_source(local.source.replace(old, new))
        failed = [check for check in localize.audit(edited).checks if not check.ok]
        assert [check.id for check in failed] == ["static.plan", "static.backward"]
        assert told in failed[1].evidence

    found = {check.id: check for check in measured.checks(edited, (X,), Y, numeric=False)}
    assert "update 1 is given a gradient" in found["measured.gradients"].evidence
