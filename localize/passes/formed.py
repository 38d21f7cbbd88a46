"""Refuse what a method returns where no step can be made of it: a check between a method and the passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from localize.errors import PlanError
from localize.ir import Plan
from localize.methods import Method


def checked(plan: Any, method: Method) -> Plan:
    """Return the plan of a method as it is.

    Raises:
        PlanError: it is not a plan; a segment is in the route of no loss, or a loss has no term; two blocks or two
            losses have one name; a name is not an identifier; or a loss names a block that does not exist.
    """
    if not isinstance(plan, Plan):
        raise PlanError(
            f"plan() of {method.name} returns {type(plan).__name__}, not a Plan.",
            help="return localize.methods.isolated(self, segments, supervise)",
        )
    problem = next(_problems(plan), "")
    if problem:
        raise PlanError(f"the plan of {method.name} cannot be made into a step.", facts=problem, help=_HELP)
    return plan


_HELP = "localize.methods.isolated(self, segments, supervise) makes a plan with a loss after every segment"


def _problems(plan: Plan) -> Iterator[str]:
    blocks = [block.name for block in plan.blocks]
    losses = [loss.name for loss in plan.losses]
    for name in (*blocks, *losses):
        if not (isinstance(name, str) and name.isidentifier()):
            yield f"{name!r} is a name in the generated text, and not an identifier of Python."
    for kind, names in (("blocks", blocks), ("losses", losses)):
        yield from (f"{count} {kind} are called {name!r}." for name, count in Counter(names).items() if count > 1)
    for loss in plan.losses:
        if not loss.terms:
            yield f"{loss.name} has no term."
        named = (*loss.reach, *(term.head for term in loss.terms if term.head is not None))
        yield from (
            f"{loss.name} names the block {name!r}, which the plan lacks." for name in named if name not in blocks
        )
    ran = {k for loss in plan.losses for k in range(loss.route.start, loss.route.stop + 1)}
    idle = [s.name for k, s in enumerate(plan.segments.segments) if k not in ran and s.name not in plan.frozen]
    if idle:
        yield f"no loss runs {', '.join(idle)}."
