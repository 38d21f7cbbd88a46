"""Choose cuts and recomputation for a budget of memory.

Tried are numbers of segments, balanced by the bytes that they compute, each with ways of recomputation. What each needs
is predicted from its own training step (:mod:`localize.estimate.memory`), and not modelled apart. Of those that fit the
budget, the one with the least arithmetic is taken; or, of those that have little more, the one whose distinct segments,
timed, make the quickest step (:mod:`localize.estimate.timing`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from localize import build, methods
from localize.compiler import convert
from localize.cutting import cuts
from localize.errors import Advice, CutError, MethodError
from localize.estimate import memory, timing
from localize.estimate.memory import PLAIN, Conditions
from localize.ir import CutSpec, Trunk
from localize.recipes import Recipe
from localize.runtime.devices import choose_device

RECOMPUTED = ("none", "body", "all")
CLOSE, MOST = 1.3, 4
"""How much more arithmetic than the least a plan that is timed may have, and how many are timed."""


class BudgetError(MethodError):
    """Nothing that was tried fits the budget."""


@dataclass(frozen=True)
class Candidate:
    """One way to train, and what a step needs."""

    recipe: Recipe
    segments: int
    recompute: str
    peak_bytes: int
    macs: int
    """Multiply-adds of one step on the batch, forward and backward."""
    seconds: float | None = None
    """Of one step, predicted from its distinct segments, where they were timed."""


@dataclass(frozen=True)
class Share:
    """A budget that is a share (0.3 is 30 %) of the peak of backprop on the same batch."""

    of: float


@dataclass(frozen=True)
class Choice:
    """What was chosen for a budget, among what, and what backprop needs."""

    chosen: Candidate
    tried: tuple[Candidate, ...]
    backprop: Candidate
    budget: int
    """Bytes."""

    @property
    def frontier(self) -> tuple[Candidate, ...]:
        """The candidates that none beats in both memory and arithmetic, from the least arithmetic on."""
        return tuple(_frontier(self.tried))


def plan(
    recipe: Recipe,
    budget: int | Share,
    batch_size: int,
    *,
    device: str | None = None,
    under: Conditions = PLAIN,
    tell: Callable[[str], None] = lambda text: None,
) -> Choice:
    """Choose the way to train that fits a budget with the least arithmetic, or in the least time.

    Args:
        recipe: model and method; its cuts, and what it computes again, are chosen anew.
        budget: bytes of live tensors that a step may need at most, or their share of what backprop needs.
        batch_size: N, the number of images.
        device: where segments are timed; None: nothing is run.
        under: optimizer and autocast of all steps. Segments are timed without autocast.
        tell: is called with a description of every candidate before it is tried.

    Raises:
        BudgetError: none fits; the message says which needs least, and what helps.
        MethodError: the method does not train this model in any of them.
        MissingError: there is no such device here.
        LocalizeError: the model cannot be made or traced.
    """
    plain = replace(recipe, method=methods.BACKPROP, options={}, terms=(), cut=None, schedule={})
    trunk = build.build(plain, data=False).plan.segments.trunk
    tell(methods.BACKPROP)
    base = _tried(trunk, plain, batch_size, under)
    budget = int(budget.of * base.peak_bytes) if isinstance(budget, Share) else budget
    found: list[Candidate] = []
    for count in counts(trunk, recipe):
        for recompute in RECOMPUTED:
            tell(f"{count} segments, recompute {recompute}")
            schedule = {**recipe.schedule, "recompute": recompute}
            asked = replace(recipe, cut=CutSpec(count, by="memory"), schedule=schedule)
            try:
                found.append(_tried(trunk, asked, batch_size, under))
            except (CutError, MethodError) as error:  # some methods do not take so few segments
                refused = error
                break
            if found[-1].peak_bytes <= budget:
                break  # to compute more again needs less memory, of which there is enough, and more arithmetic
    if not found:
        raise refused
    fitting = [candidate for candidate in found if candidate.peak_bytes <= budget]
    if not fitting:
        least = min(found, key=lambda candidate: candidate.peak_bytes)
        raise BudgetError(
            f"no way to train {trunk.name} by {recipe.method} on {batch_size} images fits {told(budget)}.",
            facts=(
                f"the leanest of {len(found)} that were tried needs {told(least.peak_bytes)}: {described(least)}.",
                f"backprop needs {told(base.peak_bytes)}; that is {least.peak_bytes / base.peak_bytes:.1%} of it.",
            ),
            help=Advice(
                "a smaller batch, a larger budget, or another method",
                "a smaller --batch-size, a larger --memory-budget, or another method",
            ),
        )
    fitting.sort(key=lambda candidate: (candidate.macs, candidate.peak_bytes))
    if device is None:
        return Choice(fitting[0], tuple(found), base, budget)
    close = [candidate for candidate in fitting if candidate.macs <= CLOSE * fitting[0].macs][:MOST]
    timed = dict(zip(map(id, close), _timed(close, batch_size, device, tell, under), strict=True))
    chosen = min(timed.values(), key=lambda candidate: candidate.seconds or 0.0)
    return Choice(chosen, tuple(timed.get(id(candidate), candidate) for candidate in found), base, budget)


def counts(trunk: Trunk, recipe: Recipe) -> list[int]:
    """Return the numbers of segments that are tried: from one on about half as many again each time, up to all."""
    method = methods.create(recipe.method, **recipe.options)
    most = len(cuts.place(trunk, CutSpec(), grain=method.grain, together=method.together).cuts) + 1
    found, size = {most}, 1.0
    while size < most:
        found.add(round(size))
        size *= 1.5
    return sorted(found)


def _timed(
    candidates: Sequence[Candidate], batch_size: int, device: str, tell: Callable[[str], None], under: Conditions
) -> Iterator[Candidate]:
    """Yield the candidates with the seconds of a step; equal segments of several are timed once."""
    where = choose_device(device)
    known: dict[str, float] = {}
    for candidate in candidates:
        tell(f"time of {described(candidate)}")
        local = build.build(candidate.recipe).to(where).train()
        yield replace(candidate, seconds=timing.predict(local, batch_size, known, optimizer=under.optimizer).seconds)


def _tried(trunk: Trunk, recipe: Recipe, batch_size: int, under: Conditions) -> Candidate:
    local = convert(trunk, recipe)
    found = memory.predict(local, batch_size, optimizer=under.optimizer, autocast=under.autocast)
    recompute = str(recipe.schedule.get("recompute", "none"))
    return Candidate(recipe, len(local.plan.segments), recompute, found.peak, found.macs)


def _frontier(found: Sequence[Candidate]) -> Iterator[Candidate]:
    least = float("inf")
    for candidate in sorted(found, key=lambda candidate: (candidate.macs, candidate.peak_bytes)):
        if candidate.peak_bytes < least:
            least = candidate.peak_bytes
            yield candidate


def described(candidate: Candidate) -> str:
    """Say how a candidate trains."""
    again = {"none": "nothing is", "head": "heads are", "body": "segments are", "all": "segments and heads are"}
    count = candidate.segments
    return f"{count} segment{'' if count == 1 else 's'}, {again[candidate.recompute]} computed again"


def told(size: int) -> str:
    """Write a number of bytes as people do."""
    if size >= 2**30:
        return f"{size / 2**30:.2f} GiB"
    if size >= 0.05 * 2**20:
        return f"{size / 2**20:.1f} MiB"
    return f"{size / 2**10:.1f} KiB" if size >= 2**10 else f"{size} bytes"
