"""The law for methods of one's own: an honest one obeys it, and each sabotaged version breaks it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import localize.testing
from localize.errors import AuditError, MethodError
from localize.methods import Branch, Plan, Segments, Term, headed, isolated
from localize.testing import NETS
from tests.outside.proto import Prototypes, Similarities

COUNTER: Iterator[int] = itertools.count()


def test_an_honest_method_obeys_the_law_on_every_network() -> None:
    state = torch.get_rng_state()

    assert localize.testing.check_method(Prototypes) == tuple(NETS)

    assert torch.equal(torch.get_rng_state(), state)


def test_a_packaged_method_is_checked_by_its_name_and_may_refuse_a_network() -> None:
    assert localize.testing.check_method("infopro", nets={name: NETS[name] for name in ("MLP", "Tokens")}) == (
        "Tokens",
    )
    with pytest.raises(MethodError, match="applies to none of MLP"):
        localize.testing.check_method("infopro", nets={"MLP": NETS["MLP"]})


class Cut(Similarities):
    """A head that lets no gradient through."""

    def forward(self, *values: Tensor) -> Tensor:
        return super().forward(*(value.detach() for value in values))


class Overwriting(Similarities):
    """A head that writes into the features."""

    def forward(self, *values: Tensor) -> Tensor:
        return super().forward(*(value.mul_(0.5) for value in values))


class Idle(Similarities):
    """A head with a parameter that nothing uses."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.idle = torch.nn.Parameter(torch.zeros(3))


def backwards(prediction: Tensor, target: Tensor) -> Tensor:
    """A loss of the wrong sign."""
    return -F.cross_entropy(prediction, target)


def still(prediction: Tensor, target: Tensor) -> Tensor:
    """A loss whose gradient is zero."""
    return F.cross_entropy(prediction.detach(), target) + 0 * prediction.sum()


def counting(prediction: Tensor, target: Tensor) -> Tensor:
    """A loss that remembers how often it was called."""
    return F.cross_entropy(prediction, target) * (1 + next(COUNTER))


@dataclass(frozen=True)
class Sabotaged(Prototypes):
    name: ClassVar[str] = "sabotaged"
    how: str = "cut"

    def plan(self, segments: Segments) -> Plan:
        head = {"cut": Cut, "overwrite": Overwriting, "idle": Idle}.get(self.how, Similarities)
        loss = {"count": counting, "sign": backwards, "still": still}.get(self.how, F.cross_entropy)
        if self.how == "raises":
            raise ZeroDivisionError("division by zero")
        number = next(COUNTER) if self.how == "text" else 0
        if self.how == "write":
            with torch.no_grad():
                next(segments.trunk.model.parameters()).add_(1.0)

        def supervise(segment: Any) -> list[Branch]:
            scale = self.scale + (next(COUNTER) if self.how == "scale" else 0)
            module = head(segment.features, segments.trunk.num_classes, scale)
            return (
                [] if self.how == "nothing" else [headed(segment, f"head_{number + segment.index}", module, Term(loss))]
            )

        plan = isolated(self, segments, supervise)
        if self.how == "reach":
            losses = [replace(loss, reach=loss.reach[:1]) for loss in plan.losses[:-1]]
            return replace(plan, losses=(*losses, plan.losses[-1]))
        if self.how == "fewer":
            return replace(plan, losses=plan.losses[1:])
        return None if self.how == "none" else plan  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("cut", "reach|gradient"),
        ("overwrite", "MLP: "),
        ("idle", "heads.head_0.idle"),
        ("count", "MLP: "),
        ("text", "give two texts"),
        ("write", "written into"),
        ("reach", "reach"),
        ("sign", "cross-entropy of the scores of loss_0 from"),
        ("still", "cross-entropy of the scores of loss_0 from"),
        ("scale", "from one seed train"),
        ("fewer", "MLP: it does not convert: .*no loss runs segment_0"),
        ("none", "MLP: it does not convert: .*returns NoneType, not a Plan"),
        ("nothing", "MLP: it does not convert: .*not a list of branches"),
        ("raises", "MLP: it does not convert: ZeroDivisionError: division by zero"),
    ],
)
def test_a_sabotaged_version_breaks_it(how: str, told: str) -> None:
    with pytest.raises(AuditError, match=told):
        localize.testing.check_method(Sabotaged(how=how), nets={"MLP": NETS["MLP"]})
