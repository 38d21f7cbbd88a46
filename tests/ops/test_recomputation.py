"""What is computed again gives the gradients, statistics and random numbers of what is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from localize.estimate.memory import Meter
from localize.ops.recomputation import again


def block(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(0.3)]
    return nn.Sequential(*layers, nn.Conv2d(8, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))


def trained(call: Callable[..., Any], around: Any = None) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Return gradients, buffers, and a draw from the random state behind two forwards and backwards."""
    module = block()
    x = torch.randn(5, 4, 6, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
    torch.manual_seed(2)
    for _ in range(2):
        if around is None:
            call(module, x).square().sum().backward()
        else:
            with around:
                y = call(module, x)
            y.float().square().sum().backward()
    return [x.grad, *(p.grad for p in module.parameters())], list(module.buffers()), torch.rand(2)


@pytest.mark.parametrize("around", [None, torch.autocast("cpu", torch.bfloat16)], ids=["plain", "autocast"])
def test_everything_is_as_without(around: Any) -> None:
    expected, found = trained(lambda module, x: module(x), around), trained(again, around)

    for mine, theirs in zip((*found[0], *found[1], found[2]), (*expected[0], *expected[1], expected[2]), strict=True):
        assert torch.equal(mine, theirs)


def test_only_what_enters_and_what_returns_is_kept() -> None:
    module, x = block(), torch.randn(5, 4, 6, 6)
    with Meter() as meter:
        meter.add(x)
        y = again(module, x)
        held = meter.held - x.nbytes - y.nbytes
    norms = 2 * (8 + 4) * 4  # what is moved of running statistics lives before
    assert held <= norms + 64  # the random state apart


def test_what_returns_is_not_computed_again() -> None:
    class Last(torch.autograd.Function):
        runs = 0

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            Last.runs += 1
            y = x.exp()
            ctx.save_for_backward(y)
            return y

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * ctx.saved_tensors[0]

    x = torch.randn(3, requires_grad=True)
    again(Last.apply, x).sum().backward()

    assert Last.runs == 1
    assert torch.equal(x.grad, x.detach().exp())


def test_an_output_that_was_overwritten_since_it_was_saved_is_computed_again() -> None:
    def function(x: Tensor) -> Tensor:
        y = x.exp()  # saves its result
        with torch.no_grad():
            y.detach().add_(1.0)  # and its storage is returned with other content
        return y

    x = torch.zeros(3, requires_grad=True)
    result = again(function, x)

    assert torch.equal(result, torch.full((3,), 2.0))


def test_several_values_enter_and_return() -> None:
    linear = nn.Linear(3, 3)

    def function(a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return linear(a).sigmoid() * scale, (a * b).tanh()

    values = [torch.randn(2, 3, requires_grad=True) for _ in range(2)]
    gradients = []
    for call in (lambda *v: function(*v), lambda *v: again(function, *v)):
        y, z = call(*values, 2.0)
        gradients.append(torch.autograd.grad((y * z).sum(), [*values, *linear.parameters()]))

    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_part_inside_a_part_is_computed_again_too() -> None:
    def gradients(call: Callable[..., Tensor]) -> list[Tensor]:
        inner, outer = block(1), block(2)
        torch.manual_seed(3)
        call(lambda x: outer(call(inner, x)), torch.ones(2, 4, 5, 5)).square().sum().backward()
        return [p.grad for module in (inner, outer) for p in module.parameters()]

    expected, found = gradients(lambda function, x: function(x)), gradients(again)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_a_function_that_does_other_things_the_second_time_is_refused() -> None:
    calls = []

    def function(x: Tensor) -> Tensor:
        calls.append(1)
        return x.exp().exp().sum() if len(calls) == 1 else x.sum()

    x = torch.zeros(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="were not computed the second time"):
        again(function, x).backward()
