"""Declare what losses train beyond their own segments: parameters that several segments use.

A pass from a plan to a plan: no method has to know of tied parameters.
"""

from __future__ import annotations

from dataclasses import replace

from localize.ir import Block, LocalLoss, Plan


def declare_tied(plan: Plan) -> Plan:
    """Give the plan one block for every set of tied parameters, in the reach of each loss whose segments use them."""
    if not plan.segments.tied:
        return plan
    segments = [block for block in plan.blocks if block.role == "segment"]
    others = [block for block in plan.blocks if block.role != "segment"]
    blocks = [Block(tied.name, "tied", tied.parameters, tied.size) for tied in plan.segments.tied]
    return replace(
        plan,
        blocks=(*segments, *blocks, *others),
        losses=tuple(replace(loss, reach=(*loss.reach, *_used(loss, plan))) for loss in plan.losses),
    )


def _used(loss: LocalLoss, plan: Plan) -> tuple[str, ...]:
    """Return the blocks of the tied parameters that the segments of a loss use."""
    trained = {segment.index for segment in plan.segments.segments if segment.name in loss.reach}
    return tuple(tied.name for tied in plan.segments.tied if trained.intersection(tied.segments))
