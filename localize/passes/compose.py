"""Compose a method with branches of others: add terms to its local losses, and change the weights of its own.

A pass from a plan to a plan, between a method's design and its lowering::

    L_i  ->  w_i L_i + sum_b v_i^b L_i^b

Weights run linearly from the first local loss to the last one, as InfoPro's do. Losses on the model's own output stay
as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from localize.errors import MethodError, OptionError, UnknownNameError, did_you_mean
from localize.heads import branches
from localize.heads.branch import Branch
from localize.ir import Block, LocalLoss, Plan, Route, Term
from localize.text import counted

OWN = "own"
"""The name under which the method's own terms are weighted."""


@dataclass(frozen=True)
class Addition:
    """What to add to every local loss: a branch by its name (or the method's ``own`` terms), its weight, its options.

    Two weights are those of the first and of the last local loss; between them, weights run linearly. Where a weight is
    0, the term and its head are left out.
    """

    branch: str
    weight: float | tuple[float, float] = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def at(self, share: float) -> float:
        """Return the weight at a place between the first local loss (0) and the last (1)."""
        first, last = self.weight if isinstance(self.weight, tuple) else (self.weight, self.weight)
        return (1 - share) * first + share * last


def check(additions: Sequence[Addition]) -> None:
    """Refuse what cannot be added to any plan.

    Raises:
        UnknownNameError: there is no such branch.
        OptionError: a branch twice, a weight below 0 or not finite, no weight above 0, an option that a branch lacks.
    """
    for number, addition in enumerate(additions):
        if addition.branch in [other.branch for other in additions[:number]]:
            raise OptionError(
                f"branch {addition.branch!r} is given twice.",
                help="add up the weights in one of them",
                option="branch",
            )
        _check_name(addition)
        ends = (addition.at(0), addition.at(1))
        if not all(math.isfinite(weight) and weight >= 0 for weight in ends):
            raise OptionError(
                f"branch {addition.branch!r} cannot have the weight {addition.weight!r}.",
                facts="a weight is a number from 0 on, or two: at the first and at the last local loss.",
                option="weight",
            )
        if not any(ends) and addition.branch != OWN:
            raise OptionError(
                f"branch {addition.branch!r} has the weight 0 everywhere.", help="leave it out", option="weight"
            )


def _check_name(addition: Addition) -> None:
    if addition.branch != OWN:
        known = (OWN, *branches.BRANCHES)
        if addition.branch not in known:
            raise UnknownNameError(
                f"there is no branch {addition.branch!r}.",
                facts=f"branches are {', '.join(known)}.",
                help=did_you_mean(addition.branch, known),
            )
        try:
            branches.check(addition.branch, addition.options)
        except OptionError as error:
            named = f"options.{error.option}"
            raise OptionError(error.problem, facts=error.facts, help=error.help, option=named) from error
    elif addition.options:
        raise OptionError(
            f"the method's own terms have no option {next(iter(addition.options))!r} here.",
            help="set it among the method's options",
            option="options",
        )


def compose(plan: Plan, additions: Sequence[Addition]) -> Plan:
    """Return a plan whose local losses have these terms as well.

    A branch is attached after the last segment of a loss. If a loss trains heads only, and no segment, so does what is
    added to it. If the input has several streams, branches read the first.

    Raises:
        MethodError: no loss is local, nothing is left of a loss, or a branch cannot be attached after a segment.
        LocalizeError: see :func:`check`.
    """
    if not additions:
        return plan
    check(additions)
    local = {loss.name for loss in plan.losses} - {loss.name for loss in plan.outputs}
    if not local:
        raise MethodError(
            f"{plan.method} has no local loss that a branch could be added to.",
            facts=f"it has {counted(len(plan.losses), 'loss', 'losses')}, on the model's own output.",
            help="a method with local losses; localize recipes ls",
        )
    attached = _Attached(plan, additions)
    losses = tuple(attached.to(loss) if loss.name in local else loss for loss in plan.losses)
    before, after = ({name for loss in some for name in _named(loss.terms)} for some in (plan.losses, losses))
    kept = [block for block in plan.blocks if block.name not in before - after]
    held = {block.name for block in kept}
    new = [block for block in attached.blocks.values() if block.name not in held]
    copies = tuple(copy for copy in plan.copies if copy.block not in before - after)
    return replace(plan, blocks=(*kept, *new), losses=losses, copies=copies)


class _Attached:
    """The branches that are attached to the losses of one plan; losses of the same route share theirs."""

    def __init__(self, plan: Plan, additions: Sequence[Addition]) -> None:
        self.plan, self.additions = plan, additions
        self.blocks: dict[str, Block] = {}
        self.own = {block.name: block for block in plan.blocks}
        stops = sorted({loss.route.stop for loss in plan.losses} - {loss.route.stop for loss in plan.outputs})
        self.numbers = {stop: number for number, stop in enumerate(stops)}
        self._branches: dict[tuple[str, Route], Branch] = {}

    def to(self, loss: LocalLoss) -> LocalLoss:
        """Return the loss with its own terms weighted, after those that are added."""
        share = self.numbers[loss.route.stop] / max(1, len(self.numbers) - 1)
        own, added, heads = list(loss.terms), [], []
        for addition in self.additions:
            weight = addition.at(share)
            if addition.branch == OWN:
                own = [replace(term, weight=weight * term.weight) for term in own] if weight else []
            elif weight:
                branch = self._branch(addition, loss)
                trained = [block.name for block in branch.blocks if block.parameters]
                added.append(self._term(branch.weighted(weight).term, loss, trained))
                heads += trained
        if not own and not added:
            raise MethodError(f"nothing is left of {loss.name}: all of its weights are 0.")
        dropped = set(_named(loss.terms)) - set(_named(own))
        reach = dict.fromkeys((*(name for name in loss.reach if name not in dropped), *heads))
        return replace(loss, terms=(*added, *own), reach=tuple(reach))

    def _term(self, term: Term, loss: LocalLoss, trained: Sequence[str]) -> Term:
        """Detach the term where its loss trains no segment, and let it read the first of several streams."""
        segments = self.plan.segments.segments[loss.route.start : loss.route.stop + 1]
        detached = not any(segment.name in loss.reach for segment in segments)
        if detached and not trained:
            raise MethodError(
                f"{loss.name} trains no segment, and {term.head} has no parameters: there is nothing to train.",
                help="a branch with a head of its own",
            )
        streams = self.plan.input.streams if self.plan.input is not None else 1
        return replace(term, detached=detached, stream=0 if streams > 1 else None)

    def _branch(self, addition: Addition, loss: LocalLoss) -> Branch:
        key = (addition.branch, loss.route)
        if key not in self._branches:
            start, stop = loss.route.start, loss.route.stop
            name = f"{addition.branch}_{stop}" if start == stop else f"{addition.branch}_{start}_{stop}"
            segments = self.plan.segments
            made = branches.build(addition.branch, segments.segments[stop], segments.trunk, name, addition.options)
            for block in made.blocks:
                self._add(block)
            self._branches[key] = made
        return self._branches[key]

    def _add(self, block: Block) -> None:
        """Take a block, unless the plan has it already."""
        same = self.blocks.get(block.name) or self.own.get(block.name)
        if same is not None and (same.parameters or str(same.module) != str(block.module)):
            raise MethodError(
                f"{self.plan.method} already has another block called {block.name!r}.",
                facts=[f"the method's: {same.module}", f"the branch's: {block.module}"],
                help="give both the same options",
            )
        self.blocks.setdefault(block.name, block)


def _named(terms: Iterable[Term]) -> Iterator[str]:
    """Yield the names of the blocks that terms read."""
    for term in terms:
        names = (term.head, *(use.block for use in term.uses), term.target.block, term.weights)
        yield from (name for name in names if name is not None)
