"""The time of a step, from its distinct segments; that times are right is shown by a benchmark, not by a test."""

from __future__ import annotations

import copy

import pytest
import torch

import localize
from localize.estimate import planner, timing
from localize.recipes import Recipe
from tests.methods.test_common import transformed
from tests.nets import ALL, Block
from tests.runtime.test_compiled import Layered


def layered() -> localize.LocalModel:
    model = Layered(*(Block(4, 4) for _ in range(4)))
    return localize.transform(model, "dcl", example_input=torch.empty(2, 3, 8, 8)).train()


def test_equal_segments_are_timed_once_and_for_all_plans_of_a_model() -> None:
    local, known = layered(), {}

    first = timing.predict(local, 6, known)
    again = timing.predict(layered(), 6, known)

    signatures = [call.signature for call, _ in first.calls]
    assert len(signatures) == len(local.plan.segments)
    assert first.timed == len(set(signatures)) == len(known) < len(signatures)
    assert again.timed == 0
    assert again.seconds == first.seconds == pytest.approx(sum(known[one] for one in signatures))


def test_another_batch_size_is_another_segment() -> None:
    known: dict[str, float] = {}
    one, other = timing.predict(layered(), 6, known), timing.predict(layered(), 4, known)

    assert one.timed == other.timed > 0


@pytest.mark.parametrize(("method", "net"), [("auglocal", "ResNet"), ("dfa", "ViT"), ("backprop", "MLP")])
def test_an_update_at_the_end_counts_unless_the_call_holds_it(method: str, net: str) -> None:
    local = transformed(method, net)
    before = copy.deepcopy(dict(local.named_parameters()))

    found = timing.predict(local, 6, {})

    assert (found.update > 0) == all(call.function != "train_step" for call, _ in found.calls)
    assert all(torch.equal(before[name], parameter) for name, parameter in local.named_parameters())
    assert all(parameter.grad is None for parameter in local.parameters())


def test_micro_batches_are_calls_of_their_own() -> None:
    local = localize.transform(ALL["MLP"](), "dcl", example_input=torch.empty(2, 3, 8, 8), micro_batch=4).train()

    found = timing.predict(local, 10, {})

    assert len(found.calls) == 3 * len(local.plan.segments)  # 4, 4 and 2 images
    assert found.update > 0


def test_a_step_in_exact_parts_is_timed_whole() -> None:
    local = localize.transform(ALL["ResNet"](), "dcl", example_input=torch.empty(2, 3, 8, 8), micro_batch=4).train()

    found = timing.predict(local, 10, {})

    assert [call.function for call, _ in found.calls] == ["train_step"]
    assert found.seconds > 0


def test_a_plan_by_time_takes_the_quickest_of_those_that_were_timed() -> None:
    choice = planner.plan(Recipe("dcl", model="cifar/fc_cifar10"), 2**30, 4, device="cpu")
    timed = [way for way in choice.ways if way.seconds is not None]

    assert choice.ways[0] in timed
    assert choice.ways[0].seconds == min(way.seconds for way in timed)
    assert choice.backprop.seconds
    assert choice.time(choice.ways[0]) == choice.ways[0].seconds / choice.backprop.seconds
