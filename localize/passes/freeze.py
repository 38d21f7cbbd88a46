"""Freeze blocks of a plan: what they hold is not trained, and losses that would train nothing else are left out.

A pass from a plan to a plan. A frozen segment that a trained one reads from is run without gradient, on the whole
batch, also where others take it in parts; one that none reads from is not run. A frozen head, or a frozen segment in a
route that is trained, still passes its gradient on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from localize.errors import Advice, MethodError, OptionError, UnknownNameError, did_you_mean
from localize.ir import Copy, LocalLoss, Plan


def freeze(plan: Plan, names: Sequence[str]) -> Plan:
    """Return the plan in which the named blocks are not trained.

    A loss is left out if all segments of its route are frozen, or all blocks that it reaches. Heads that only such
    losses train are frozen with them, and copies in them are not pulled any more.

    Args:
        plan: what is trained by what.
        names: of blocks that are trained, such as ``segment_0`` or ``head_0``; ``*`` and ``?`` match anything.

    Raises:
        UnknownNameError: a name is not that of a block that is trained.
        OptionError: nothing would be left to train.
        MethodError: a loss starts after a segment that no loss before it would run, and a later one would; or a frozen
            segment would stand between segments that are trained in exact parts.
    """
    asked = set(named(plan, names))
    kept = tuple(loss for loss in plan.losses if _trains(loss, plan, asked))
    if not kept:
        raise OptionError(
            "nothing is left to train.",
            facts=f"frozen are {', '.join(names)}; trained were {', '.join(trained_blocks(plan))}.",
            help="freeze less",
        )
    trained = {name for loss in kept for name in loss.reach} - asked
    idle = {block.name for block in plan.blocks} - trained - set(plan.frozen)
    ran = {plan.segments.segments[k].name for loss in kept for k in _route(loss)}
    frozen = [s.name for s in plan.segments.segments if s.name not in ran or s.name in plan.frozen]
    differentiated = {term.head for loss in kept for term in loss.terms} | set(_differentiated(kept, plan, trained))
    made = replace(
        plan,
        blocks=tuple(replace(block, parameters=()) if block.name in idle else block for block in plan.blocks),
        losses=kept,
        part_sizes=tuple(plan.part_size(loss) for loss in kept) if plan.part_sizes else (),
        left_out=(*plan.left_out, *(loss for loss in plan.losses if loss not in kept)),
        frozen=tuple(frozen),
        recompute=tuple(name for name in plan.recompute if name in differentiated),
        copies=tuple(
            _pulled_if((copy.block if copy.of == "trunk" else copy.source) in trained, copy) for copy in plan.copies
        ),
    )
    _refuse_unentered(made)
    _refuse_between_parts(made)
    return made


def named(plan: Plan, names: Sequence[str]) -> Iterator[str]:
    """Yield the blocks of a plan that names or patterns match.

    Raises:
        UnknownNameError: one of them matches no block that is trained.
    """
    known = trained_blocks(plan)
    for name in names:
        found = [block for block in known if fnmatchcase(block, name)]
        if not found:
            raise UnknownNameError(
                f"no block {name!r} is trained.",
                facts=f"trained are {', '.join(known)}.",
                help=did_you_mean(name, known) or Advice("one of these names, or a pattern such as 'segment_*'"),
            )
        yield from found


def trained_blocks(plan: Plan) -> tuple[str, ...]:
    """Return the names of segments, and of all other blocks that some loss trains, in the order of the plan."""
    reached = {name for loss in plan.losses for name in loss.reach}
    own = (block for block in plan.blocks if block.role == "segment" or (block.name in reached and block.parameters))
    return tuple(block.name for block in own)


def _trains(loss: LocalLoss, plan: Plan, asked: Collection[str]) -> bool:
    """Tell whether a loss still trains something: a segment of its route is not frozen, nor is all that it reaches."""
    route = {plan.segments.segments[k].name for k in _route(loss)}
    return not route <= set(asked) and any(plan.block(name).parameters for name in loss.reach if name not in asked)


def _differentiated(losses: Sequence[LocalLoss], plan: Plan, trained: Collection[str]) -> Iterator[str]:
    """Yield the segments that a gradient passes through: those that are trained, and what a route runs after them."""
    for loss in losses:
        route = [plan.segments.segments[k].name for k in _route(loss)]
        first = next((i for i, name in enumerate(route) if name in trained), len(route))
        yield from route[first:]


def _refuse_unentered(plan: Plan) -> None:
    """Refuse losses that start after a segment that only later losses run."""
    for number, loss in enumerate(plan.losses):
        missing = [f"segment_{k}" for k in plan.run_before(number) if f"segment_{k}" not in plan.frozen]
        if missing:
            raise MethodError(
                f"{loss.name} of {plan.method} starts after {', '.join(missing)}, whose own loss would be left out.",
                facts="a later loss runs it with gradient.",
                help="freeze heads alone; or all segments that the later loss runs",
            )


def _refuse_between_parts(plan: Plan) -> None:
    """Refuse frozen segments between ones that are swept in parts: they take the batch whole, as their norms need."""
    for number, loss in enumerate(plan.losses):
        run = plan.run_before(number)
        if plan.exact and run and run[0] > 0:
            raise MethodError(
                f"segment_{run[0]} cannot be frozen between segments that are trained in parts.",
                facts=f"what segment_{run[0] - 1} passes on is a list of parts, and {loss.name} reads what follows.",
                help=Advice(f"micro_batch=0; or freeze segment_0 to segment_{run[0]}"),
            )


def _route(loss: LocalLoss) -> range:
    return range(loss.route.start, loss.route.stop + 1)


def _pulled_if(trained: bool, copy: Copy) -> Copy:
    return copy if trained else replace(copy, decay=None)
