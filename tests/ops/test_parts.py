"""A batch in parts trains as the whole batch does, BatchNorm included."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localize.errors import MethodError
from localize.estimate.memory import Meter
from localize.ops import exact_parts, recompute, without_gradient
from localize.torch_names import norm_gradients
from tests import nets

X = torch.randn(7, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 3, 4, 0, 1])


class Series(nn.Module):
    """Three norms one after the other; the input is far from zero."""

    def __init__(self, **norm: Any) -> None:
        super().__init__()
        widths = [3, 4, 5, 4]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(widths, widths[1:], strict=False))
        self.norms = nn.ModuleList(nn.BatchNorm2d(b, **norm) for b in widths[1:])

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)), inplace=True)
        return x


class Branches(Series):
    """A norm beside two in series, one that reads only the input, one called twice, and a path without gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.short, self.twice, self.entry = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(3)
        self.project = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(self.entry(x)) + self.short(self.project(x))
        gate = self.twice(h).detach().sigmoid()
        return self.twice(h * gate) + h


class Dropped(Series):
    """Dropout of values and of channels between norms, and stochastic depth."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(self.norms[0](self.convs[0](x)), 0.3)
        h = F.dropout2d(self.norms[1](self.convs[1](h)), 0.4)
        h = self.norms[2](self.convs[2](h))
        return F.relu(h * h.new_empty(len(h), 1, 1, 1).bernoulli_(0.7))


class Frozen(Series):
    """One norm in eval mode, one whose parameters are not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.norms[1].requires_grad_(False)

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.norms[0].eval()
        return self


class Again(Dropped):
    """The whole is computed again in the backward."""

    def forward(self, x: Tensor) -> Tensor:
        return recompute(super().forward, x)


class Half(Series):
    """The first norm is not trained, and what comes before has no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        h = without_gradient(lambda x: self.norms[0](self.convs[0](x)), x)
        h = self.norms[1](self.convs[1](h)).relu()
        return self.norms[2](self.convs[2](h))


class Places(nn.Module):
    """Norms of one and of three spatial dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.three, self.flat = nn.BatchNorm1d(24), nn.BatchNorm3d(3), nn.BatchNorm1d(4)
        self.linear = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.three(x.unflatten(-1, (2, 4))).flatten(-2)
        h = self.one(h.flatten(1, 2)).mean(-1)
        return self.flat(self.linear(h))[:, :, None, None]


class Chosen(Series):
    """The second norm's input is made of numbers and places that the first norm decides."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norms[0](self.convs[0](x))
        factor = h.detach().abs().mean(3, keepdim=True).argmax(2, keepdim=True).double() + 1
        place = torch.zeros_like(h)
        place[:] = factor
        return self.norms[2](self.convs[2](self.norms[1](self.convs[1](place + x[:, :1])) + h[:, :1]))


CASES: dict[str, Callable[[], nn.Module]] = {
    "series": Series,
    "without weights": lambda: Series(affine=False),
    "cumulative": lambda: Series(momentum=None),
    "untracked": lambda: Series(track_running_stats=False),
    "branches": Branches,
    "dropped": Dropped,
    "frozen": Frozen,
    "again": Again,
    "half": Half,
    "places": Places,
    "chosen": Chosen,
    "resnet": lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nets.Block(4, 4), nets.Block(4, 4, 2), nets.Block(4, 4)),
}


class Head(nn.Module):
    """A head with a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(4), nn.Linear(4, 5)

    def forward(self, h: Tensor) -> Tensor:
        return self.linear(self.norm(h.mean((2, 3))))


def part(trunk: nn.Module, heads: nn.Module, x: Tensor, y: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor]:
    h = trunk(x)
    scores = heads(h)
    return h.detach(), share * F.cross_entropy(scores, y), scores.detach()


def taken(
    net: Callable[[], nn.Module], size: int, *, steps: int = 2, dtype: Any = torch.float64, keep: str = ""
) -> dict[str, Tensor]:
    """Return what is returned, and all state after some steps of SGD with momentum, of batches in parts."""
    torch.manual_seed(0)
    trunk, heads = net().to(dtype).train(), Head().to(dtype).train()
    both = nn.ModuleList([trunk, heads])
    optimizer = torch.optim.SGD([p for p in both.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    torch.manual_seed(1)
    for step in range(steps):
        optimizer.zero_grad()
        passed, loss, scores = exact_parts(part, size, trunk, heads, X.to(dtype) + 3 * step, Y, keep=keep)
        optimizer.step()
    found = {"passed": torch.cat(passed), "loss": loss, "scores": scores, "draw": torch.rand(3)}
    found |= {f"grad of {name}": p.grad for name, p in both.named_parameters() if p.grad is not None}
    return found | both.state_dict()


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(
            value, other[name], rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("case", CASES)
def test_parts_of_any_size_leave_what_the_whole_batch_leaves(case: str, size: int) -> None:
    assert_same(taken(CASES[case], size), taken(CASES[case], 7))


class Layers(nn.Module):
    """Three dense layers: each reads all that comes before it, and adds two channels."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for width in (3, 5, 7):
            layer = nn.ModuleDict({"norm1": nn.BatchNorm2d(width), "norm2": nn.BatchNorm2d(5)})
            layer["conv1"], layer["conv2"] = nn.Conv2d(width, 5, 1), nn.Conv2d(5, 2, 3, padding=1)
            self.layers.append(layer)
        self.out, self.conv = nn.BatchNorm2d(9), nn.Conv2d(9, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        found = [x]
        for layer in self.layers:
            h = layer["conv1"](layer["norm1"](torch.cat(found, 1)).relu())
            found.append(layer["conv2"](layer["norm2"](h).relu_()))
        return self.conv(self.out(torch.cat(found, 1)).relu_())


class Before(Series):
    """The first layer is not trained: no gradient goes on to what is kept of it."""

    def __init__(self) -> None:
        super().__init__()
        self.convs[0].requires_grad_(False)
        self.norms[0].requires_grad_(False)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    ("net", "keep"),
    [
        (Series, "norms.0"),
        (Series, "norms.1+norms.2"),
        (Branches, "norms.1"),
        (Dropped, "norms.2"),
        (Again, "norms.1"),
        (Layers, "norm1"),
        (Layers, "norm1+norm2+out"),
        (Before, "norms.1"),
        (Before, "norms.1+norms.2"),
    ],
)
def test_kept_inputs_of_norms_change_nothing_but_the_arithmetic(net: Any, keep: str, size: int) -> None:
    assert_same(taken(net, size, keep=keep), taken(net, 7))


def test_sweeps_begin_at_what_is_kept_and_grow_with_the_longest_link() -> None:
    found = {}
    for keep in ("", "norm1+out"):
        torch.manual_seed(0)
        trunk, heads = Layers().double().train(), Head().double().train()
        with Meter() as meter:
            exact_parts(part, 4, trunk, heads, X, Y, keep=keep)
        found[keep] = meter.flops
    assert found["norm1+out"] < 0.6 * found[""]


def test_what_is_kept_has_to_divide_the_function() -> None:
    with pytest.raises(MethodError, match="cannot keep these inputs of norms: layers.0.norm2, layers.1.norm2"):
        taken(Layers, 3, keep="norm2")
    with pytest.raises(MethodError, match="cannot keep these inputs of norms: norms.1"):
        taken(Over, 3, keep="norms.1")


class Over(Series):
    """What a norm has read is written over."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.convs[1](self.norms[0](self.convs[0](x)).relu())
        made = self.norms[1](h.detach())
        h.mul_(2)
        return self.norms[2](self.convs[2](made + h))


def test_norms_that_wait_for_none_of_each_other_share_a_sweep() -> None:
    """The block's second norm and the one of its shortcut: stem, then bn1, then bn2 with the shortcut's."""
    seen: list[int] = []

    def counted(trunk: Any, heads: Any, x: Tensor, y: Tensor, share: float) -> tuple[Tensor, ...]:
        seen.append(len(x))
        return part(trunk, heads, x, y, share)

    torch.manual_seed(0)
    trunk, heads = Branches().double().train(), Head().double().train()

    exact_parts(counted, 4, trunk, heads, X, Y)

    # Forward: the first part once, then entry and short; norms 0, 1, 2; twice; twice again; the head's: 7 levels.
    # Backward: the head's, the second of twice, norm 2 with short, norms 1 and 0; the entry needs none.
    assert seen == [4, 3, *[4, 3] * 6, *[4, 3] * 6, 4, 3]


def test_a_boundary_is_taken_over_part_by_part_and_the_users_batch_is_left_alone() -> None:
    torch.manual_seed(0)
    trunk, heads = Series().double().train(), Head().double().train()
    held, x = X.clone(), list(X.split(4))
    fresh = copy.deepcopy((trunk, heads))

    passed, loss, scores = exact_parts(part, 3, trunk, heads, x, Y)

    assert [len(value) for value in passed] == [3, 3, 1]
    assert not x
    wanted = exact_parts(part, 3, *fresh, X, Y)
    assert torch.equal(X, held)
    torch.testing.assert_close((torch.cat(passed), loss, scores), (torch.cat(wanted[0]), *wanted[1:]))


def test_statistics_far_from_zero_are_those_of_the_whole_batch_in_float32() -> None:
    """Mean / std = 1000: sums of squares in float32 would be off by a third."""

    def run(trunk: nn.Module, heads: nn.Module, x: Tensor, y: Tensor, share: float) -> tuple[Tensor, Tensor]:
        h = trunk(x)
        return h.detach(), share * h.square().mean()

    found = {}
    x = (X[:, :1] + 1000).float()
    for size in (2, 7):
        norm = nn.BatchNorm2d(1).train()
        exact_parts(run, size, norm, norm, x, Y)
        found[size] = norm.running_var
    torch.testing.assert_close(found[2], found[7], rtol=1e-5, atol=0)


@pytest.mark.parametrize("weighted", [True, False])
def test_gradients_of_a_norm_are_those_of_autograd(weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, mean, var = X, X.mean((0, 2, 3)), X.var((0, 2, 3))
    weight, bias = torch.rand(3).double().requires_grad_(), torch.rand(3).double().requires_grad_()
    made = F.batch_norm(x, mean, var, weight, bias, False, 0.0, 1e-5)
    dy = torch.rand_like(made)
    if not weighted:
        monkeypatch.setattr(torch.ops, "aten", None)

    found = norm_gradients(dy, x, mean, var, 1e-5)

    torch.testing.assert_close(found, torch.autograd.grad(made, (weight, bias), dy))


def test_a_scale_of_losses_reaches_every_gradient() -> None:
    class Scaling:
        def scale(self, loss: Tensor) -> Tensor:
            return 1024 * loss

    found = []
    for behind in ((), (Scaling(),)):
        torch.manual_seed(0)
        trunk, heads = Series().double().train(), Head().double().train()
        exact_parts(part, 2, trunk, heads, X, Y, *behind)
        found.append([p.grad for p in (*trunk.parameters(), *heads.parameters())])
    for plain, scaled in zip(*found, strict=True):
        torch.testing.assert_close(1024 * plain, scaled)


def test_under_autocast_parts_are_as_near_to_float32_as_the_whole_batch() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        parts, whole = taken(Series, 2, steps=1, dtype=torch.float32), taken(Series, 7, steps=1, dtype=torch.float32)
    exact = taken(Series, 7, steps=1, dtype=torch.float32)

    for name in exact:
        off = (whole[name].float() - exact[name].float()).norm()
        assert (parts[name].float() - exact[name].float()).norm() <= 2 * off + 1e-2, name


class Noise(Series):
    """It draws in a way that no part of a batch can."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn_like(x))


class Mixed(Series):
    """One draw for the whole batch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * x.new_empty(1, 1, 1, 1).bernoulli_(0.5))


@pytest.mark.parametrize("net", [Noise, Mixed])
def test_other_draws_are_refused(net: Callable[[], nn.Module]) -> None:
    with pytest.raises(MethodError, match="draws random numbers, in a way that is not known"):
        taken(net, 2)
