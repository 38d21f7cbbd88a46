"""Make the blocks and losses that several methods use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from localize.graph import cost
from localize.ir import Block, LocalLoss, Role, Route, Segments, Term, facts

CROSS_ENTROPY = "torch.nn.functional.cross_entropy"


def of_segments(segments: Segments) -> Iterator[Block]:
    """Yield one block for every segment, with its cost.

    Args:
        segments: the cut trunk.
    """
    for segment in segments.segments:
        nodes = [node for node in segment.graph.nodes if node.op not in ("placeholder", "output")]
        yield Block(
            segment.name,
            "segment",
            segment.parameters,
            segment.size,
            macs=sum(facts(node).macs for node in nodes),
            fvcore_flops=sum(facts(node).fvcore_flops for node in nodes),
        )


def of_module(
    name: str,
    module: nn.Module,
    *input_shapes: tuple[int, ...],
    role: Role = "head",
    facts: Mapping[str, Any] | None = None,
) -> Block:
    """Make a block of a head or a shared module.

    Args:
        name: its name in the text and in reports.
        module: a module on the meta device; it gets real weights when the local model is made.
        input_shapes: shapes of its inputs, without the batch, from which its cost is counted; none if it has no input.
        role: head or shared.
        facts: details for readers of the plan.

    Returns:
        The block, with its cost.
    """
    count = cost.of_module(module, *input_shapes) if input_shapes else cost.Counter()
    return Block(
        name,
        role,
        tuple(f"heads.{name}.{key}" for key, p in module.named_parameters() if p.requires_grad),
        sum(p.numel() for p in module.parameters()),
        count.macs,
        count.fvcore_flops,
        module,
        facts or {},
    )


def output_loss(segments: Segments, *, start: int | None = None, weight: float = 1.0) -> LocalLoss:
    """Return the cross-entropy on the model's own output.

    Args:
        segments: the cut trunk.
        start: first segment that it trains; default: it trains only the last segment.
        weight: weight of the loss.

    Returns:
        The loss of class scores (N, Z).
    """
    last = len(segments) - 1
    start = last if start is None else start
    reach = tuple(segment.name for segment in segments.segments[start:])
    return LocalLoss(f"loss_{last}", Route(start, last), (Term(CROSS_ENTROPY, weight=weight),), reach)
