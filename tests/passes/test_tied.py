"""Parameters that are used on both sides of a cut: refused, or trained by every loss that is declared to train them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import localize
from localize.compiler import assemble
from localize.errors import AuditError, TiedWeightsError
from localize.passes.tied import declare_tied


class Positions(nn.Module):
    """Every layer adds what one convolution makes of its input, and scales by one parameter, as CoaT's do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))
        self.positions = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.first = nn.Parameter(torch.zeros(8, 1, 1))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x) + self.first)
        for layer in self.layers:
            x = torch.relu(layer(x + self.positions(x)) * self.scale)
        return self.fc((x + self.first).mean((2, 3)))


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 8, 8, generator=generator), torch.randint(0, 5, (4,), generator=generator)


def test_tied_parameters_are_refused_unless_the_recipe_shares_them(batch: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(TiedWeightsError, match=r"(?s)'first' .* is used on both sides of a cut.*shared=True"):
        localize.transform(Positions(), "dcl", example_input=batch[0])

    local = localize.transform(Positions(), {"method": "dcl", "shared": True}, example_input=batch[0])

    assert {tied.parameters: tied.segments for tied in local.plan.segments.tied} == {
        ("trunk.first",): (0, 4),
        ("trunk.positions.weight", "trunk.positions.bias", "trunk.scale"): (1, 2, 3, 4),
    }
    assert sum(b.size for b in local.plan.blocks if b.role in ("segment", "tied")) == sum(
        p.numel() for p in local.trunk.parameters()
    )


@pytest.mark.parametrize(("method", "options"), [("dcl", {}), ("auglocal", {"d": 2}), ("predsim", {}), ("dfa", {})])
def test_every_loss_trains_the_tied_parameters_of_its_segments(
    method: str, options: dict, batch: tuple[Tensor, Tensor]
) -> None:
    local = localize.transform(Positions(), method, example_input=batch[0], shared=True, **options)

    localize.audit(local, batch).raise_if_failed()


def test_the_gradient_of_a_tied_parameter_is_the_sum_over_the_losses(batch: tuple[Tensor, Tensor]) -> None:
    local = localize.transform(Positions(), "auglocal", example_input=batch[0], shared=True, d=2)
    entering = [(batch[0],), *local.features(batch[0])]
    alone = []
    for loss in local.plan.losses:
        if loss.route.start == 0:
            continue
        values = entering[loss.route.start][0].detach()
        for segment in local.plan.segments.segments[loss.route.start : loss.route.stop + 1]:
            values = local.functions_of_text[segment.name](local.trunk, values)
        head = loss.terms[0].head
        scores = local.heads[head](values) if head else values
        alone.append(torch.autograd.grad(nn.functional.cross_entropy(scores, batch[1]), local.trunk.scale)[0])
    before = local.trunk.scale.detach().clone()

    local.step(*batch, torch.optim.SGD(local.param_groups(lr=1.0), lr=1.0))

    assert len(alone) == 3
    assert torch.allclose(before - local.trunk.scale.detach(), sum(alone), atol=1e-6)


def test_an_undeclared_tied_parameter_is_a_leak(batch: tuple[Tensor, Tensor]) -> None:
    local = localize.transform(Positions(), "dcl", example_input=batch[0], shared=True)
    plan = local.plan
    losses = tuple(
        replace(loss, reach=tuple(name for name in loss.reach if not name.startswith("tied")))
        if loss.route.start == 2
        else loss
        for loss in plan.losses
    )

    with pytest.raises(AuditError, match=r"leak: loss_2 trains trunk.positions"):
        assemble(replace(plan, losses=losses))


def test_a_plan_without_tied_parameters_stays_as_it_is(batch: tuple[Tensor, Tensor]) -> None:
    plan = localize.transform(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), "backprop", example_input=batch[0]).plan

    assert declare_tied(plan) is plan
