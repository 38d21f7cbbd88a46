"""Declare what losses train beyond their own segments: parameters that several segments use.

A pass from a plan to a plan: no method has to know of tied parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from localize.ir import Block, LocalLoss, Plan


def declare_tied(plan: Plan) -> Plan:
    """Give the plan one block for every set of tied parameters, in the reach of each loss whose segments use them."""
    if not plan.segments.tied:
        return plan
    segments = [block for block in plan.blocks if block.role == "segment"]
    others = [block for block in plan.blocks if block.role != "segment"]
    blocks = [Block(tied.name, "tied", tied.parameters, tied.size) for tied in plan.segments.tied]
    used: dict[str, list[int]] = {}
    for number, tied in enumerate(plan.segments.tied):
        for index in tied.segments:
            used.setdefault(plan.segments.segments[index].name, []).append(number)
    return replace(
        plan,
        blocks=(*segments, *blocks, *others),
        losses=tuple(replace(loss, reach=(*loss.reach, *_used(loss, plan, used))) for loss in plan.losses),
    )


def _used(loss: LocalLoss, plan: Plan, used: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
    """Return the blocks of the tied parameters that the segments of a loss use; ``used`` has those of each segment."""
    numbers = {number for name in loss.reach for number in used.get(name, ())}
    return tuple(plan.segments.tied[number].name for number in sorted(numbers))
