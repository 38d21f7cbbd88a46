"""A plan that no step can be made of is refused with what it lacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import localize
from localize.errors import MethodError, OptionError
from localize.ir import Plan, Segments
from localize.methods import Local, MethodClassError, Term, headed, isolated
from localize.methods import base as methods_base
from localize.methods.dcl import DCL
from tests.outside.proto import Prototypes


@dataclass(frozen=True)
class Wrong(Prototypes):
    name: ClassVar[str] = "wrong"
    change: ClassVar[Callable[[Plan], Any]] = staticmethod(lambda plan: plan)

    def plan(self, segments: Segments) -> Plan:
        return type(self).change(super().plan(segments))


def convert(method: Any) -> localize.LocalModel:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    return localize.transform(net, method, example_input=torch.randn(2, 3, 2, 2))


def _renamed(plan: Plan) -> Plan:
    head = next(block for block in plan.blocks if block.role == "head")
    return replace(plan, blocks=(*plan.blocks, replace(head, name="head 9")))


def _reaching(name: str) -> Callable[[Plan], Plan]:
    return lambda plan: replace(plan, losses=(replace(plan.losses[0], reach=(name,)), *plan.losses[1:]))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda plan: None, "plan\\(\\) of wrong returns NoneType, not a Plan"),
        (lambda plan: plan.losses, "returns tuple, not a Plan"),
        (lambda plan: replace(plan, losses=plan.losses[1:]), "no loss runs segment_0"),
        (lambda plan: replace(plan, losses=()), "no loss runs segment_0, segment_1"),
        (lambda plan: replace(plan, losses=(*plan.losses, plan.losses[0])), "2 losses are called 'loss_0'"),
        (lambda plan: replace(plan, blocks=(*plan.blocks, plan.blocks[-1])), "2 blocks are called 'head_"),
        (
            lambda plan: replace(plan, losses=(replace(plan.losses[0], terms=()), *plan.losses[1:])),
            "loss_0 has no term",
        ),
        (_renamed, "'head 9' is a name in the generated text"),
        (_reaching("head_9"), "loss_0 names the block 'head_9', which the plan lacks"),
    ],
)
def test_what_is_no_plan_is_refused(change: Callable[[Plan], Any], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Wrong, "change", staticmethod(change))
    with pytest.raises(MethodError, match=told):
        convert(Wrong)


@pytest.mark.parametrize(
    ("supervise", "told"),
    [
        (lambda segment: None, "returns NoneType for segment 0, not a list of branches"),
        (lambda segment: [], r"returns \[\] for segment 0"),
        (lambda segment: headed(segment, "head_0", nn.Linear(6, 3), Term(F.cross_entropy)), "returns Branch for"),
        (lambda segment: [nn.Linear(6, 3)], "not a list of branches"),
        (lambda segment: [headed(segment, "head_0", lambda x: x, Term(F.cross_entropy))], "head_0 is function, not a"),
    ],
)
def test_what_are_no_branches_are_refused(supervise: Callable[..., Any], told: str) -> None:
    @dataclass(frozen=True)
    class Supervised(Local):
        name: ClassVar[str] = "supervised"

        def plan(self, segments: Segments) -> Plan:
            return isolated(self, segments, supervise)

    with pytest.raises(MethodError, match=told):
        convert(Supervised)


def test_an_option_of_a_subclass_that_is_not_a_dataclass_is_refused() -> None:
    class Mine(DCL):
        name = "mine"
        extra: float = 1.0

    class Plain(DCL):
        name: ClassVar[str] = "plain"

    with pytest.raises(MethodClassError, match=r"has 'extra', which is not an option(?s:.*)@dataclass"):
        methods_base.checked(Mine, "Mine")
    assert methods_base.checked(Plain, "Plain") is Plain


def test_an_object_that_its_options_do_not_make_is_refused() -> None:
    @dataclass(frozen=True)
    class Doubling(Prototypes):
        name: ClassVar[str] = "doubling"
        times: int = 1

        def __post_init__(self) -> None:
            object.__setattr__(self, "times", 2 * self.times)

    with pytest.raises(OptionError, match=r"option 'times' of method 'doubling' is 6, and .* that has 12"):
        convert(Doubling(times=3))
