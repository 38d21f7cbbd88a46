"""Choose how to train within a memory budget: cuts, a schedule for each segment, moments; local, or a rival.

For each method some sets of cuts are tried, each with the quickest schedule of every segment that fits
(:mod:`localize.estimate.segments`). The result is then predicted again as a whole, from the step that would run
(:mod:`localize.estimate.memory`), so nothing that is said to fit exceeds the budget. For given cuts, no schedule among
those tried is quicker. For a net with few local layers, all choices of cuts are tried; for a deeper net only some, so
others may be quicker. Among all methods, those that have no chance beside the rivals are not scheduled.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from localize import build, methods
from localize.cutting import cuts
from localize.errors import Advice, LocalizeError, MethodError
from localize.estimate import rivals, timing
from localize.estimate.memory import PLAIN, Conditions, Footprint
from localize.estimate.processes import each
from localize.estimate.repeats import Known
from localize.estimate.rivals import HEADS, Entry, Row
from localize.estimate.segments import Kinds
from localize.ir import CutSpec, Trunk
from localize.options import of as options_of
from localize.recipes import Recipe
from localize.runtime.collector import rare_collections
from localize.runtime.devices import choose_device
from localize.runtime.model import LocalModel
from localize.text import counted

CLOSE, MOST = 1.3, 4
"""Ways are timed if their predicted time is at most CLOSE times the quickest; at most MOST ways are timed."""


FEW_LAYERS = 5
"""Largest number of local layers for which every choice of cuts between them is tried."""
HOPELESS = 3
"""Fewer segments are not tried if their step without a schedule needs more than this multiple of the budget."""
SLOW = 3
"""Among all methods, no schedule is sought for a step that it would make this many times slower than the quickest."""
TELLING = 0.01
"""Share of a peak above which separate states for each loss make another setting of the moments worth trying."""


class BudgetError(MethodError):
    """Nothing that was tried fits the memory or time budget."""

    exit_code = 1


@dataclass(frozen=True)
class Share:
    """A budget as a share (0.3 is 30 %) of the peak memory of backprop on the same batch, in float32."""

    of: float


@dataclass(frozen=True)
class Way:
    """One way to train, with the costs of a step."""

    name: str
    method: str
    recipe: Recipe | None
    """The recipe; None if no recipe can express this way."""
    peak_bytes: int
    macs: int
    """Multiply-adds of one step on the batch, forward and backward."""
    predicted: float
    """Predicted seconds on a device, for ratios."""
    local: bool = False
    keeps_gradients: bool = False
    changes_statistics: bool = False
    combined: bool = False
    seconds: float | None = None
    """Measured seconds of one step, from its distinct segments; None if they were not timed."""
    remark: str = ""
    """The largest component of its peak."""
    moments: int = 0
    """Bytes of optimizer states that each loss keeps separately."""
    sought: bool = True
    """A schedule was sought for it."""


@dataclass(frozen=True)
class Choice:
    """All ways that were found, best first, and the budgets."""

    ways: tuple[Way, ...]
    backprop: Way
    """Backprop in float32."""
    budget: int
    """Bytes."""
    time_budget: float | None
    """Longest time of a step, as a multiple of backprop's."""
    refused: tuple[tuple[str, str], ...] = ()
    """Methods that do not support the model, with the reason."""

    def share(self, way: Way) -> float:
        """Return the peak of a way as a share of backprop's."""
        return way.peak_bytes / self.backprop.peak_bytes

    def arithmetic(self, way: Way) -> float:
        """Return its multiply-adds as a multiple of backprop's."""
        return way.macs / self.backprop.macs

    def time(self, way: Way) -> float:
        """Return its time as a multiple of backprop's: measured if both were, otherwise predicted."""
        if way.seconds is not None and self.backprop.seconds is not None:
            return way.seconds / self.backprop.seconds
        return way.predicted / self.backprop.predicted

    def fits(self, way: Way) -> bool:
        """Return whether a way is within the budgets."""
        return way.peak_bytes <= self.budget and (self.time_budget is None or self.time(way) <= self.time_budget)

    @property
    def fitting(self) -> tuple[Way, ...]:
        """The ways within the budgets, quickest first."""
        return tuple(way for way in self.ways if self.fits(way))

    @property
    def leanest(self) -> Way:
        """The way that needs the least memory."""
        return min(self.ways, key=lambda way: way.peak_bytes)


@rare_collections()
def plan(
    recipe: Recipe,
    budget: int | Share,
    batch_size: int,
    *,
    every: bool = False,
    time_budget: float | None = None,
    device: str | None = None,
    under: Conditions = PLAIN,
    processes: int = 1,
    tell: Callable[[str], None] = lambda text: None,
) -> Choice:
    """Return ways to train a model: first those that fit a budget, quickest first; then the others, leanest first.

    Args:
        recipe: model and method; new cuts and a new schedule are chosen.
        budget: largest number of live bytes in a step, or its share of what backprop needs in float32.
        batch_size: N, the number of images.
        every: try all local methods with their default options and all rivals, instead of the recipe's method.
        time_budget: longest time of a step, as a multiple of backprop's.
        device: where the distinct segments of the quickest fitting ways are timed; None: nothing is run.
        under: optimizer and autocast of all steps, and the speed for which seconds are predicted.
        processes: how many follow steps at a time, with ``every``; see :func:`localize.estimate.processes.each`.
        tell: called with the name of each attempt.

    Returns:
        The ways, with bytes, multiply-adds and seconds.

    Raises:
        MethodError: the method does not train this model.
        MissingError: there is no such device here.
        LocalizeError: the model cannot be made or traced.
    """
    plain = rivals.plain(recipe, methods.BACKPROP)
    trunk = rivals.recorded(plain)
    tell(methods.BACKPROP)
    alone = recipe.method == methods.ACCUMULATION and not recipe.options  # its number of parts is no schedule
    rows = rivals.rivals(plain, batch_size, tell, under, trunk=trunk, processes=processes) if every or alone else []
    if rows and under.autocast is None:
        base = _way(*rows[0])
    else:
        entry, in_float32 = Entry(methods.BACKPROP, plain), replace(under, autocast=None)
        (row,) = each(
            lambda entry: rivals.cost(entry, batch_size, in_float32, trunk=trunk), [entry], processes if every else 1
        )
        base = _way(entry, row)
    budget = int(budget.of * base.peak_bytes) if isinstance(budget, Share) else budget
    others = [_way(entry, row) for entry, row in rows if not row.refused]
    others += _fewer_parts(others, trunk, plain, base, budget, batch_size, under, processes)
    refused: tuple[tuple[str, str], ...] = ()
    if every:
        local, refused = _of_all_methods(trunk, recipe, budget, batch_size, under, tell, others, processes)
        found = [*others, *local]
    elif alone:
        found = [way for way in others if way.method == recipe.method]
        if not found:
            raise MethodError(
                f"{recipe.method} does not work with --batch-size {batch_size}.",
                facts=f"it takes two parts or more, and with BatchNorm a part has at least {rivals.IMAGES} images.",
                help="a larger --batch-size",
            )
    else:
        found = ways(trunk, recipe, budget, batch_size, under, {}, tell)
    choice = Choice(tuple(found), base, budget, time_budget, refused)
    choice = replace(choice, ways=_sorted(choice))
    return choice if device is None else _timed(choice, batch_size, device, tell, under)


def _sorted(choice: Choice) -> tuple[Way, ...]:
    def place(way: Way) -> tuple[bool, float]:
        return (False, choice.time(way)) if choice.fits(way) else (True, way.peak_bytes)

    return tuple(sorted(choice.ways, key=place))


# ------------------------------------------------------------------------------------------------- local methods


def _of_all_methods(
    trunk: Trunk,
    recipe: Recipe,
    budget: int,
    batch_size: int,
    under: Conditions,
    tell: Callable[[str], None],
    beside: Sequence[Way],
    processes: int,
) -> tuple[list[Way], tuple[tuple[str, str], ...]]:
    """Return the ways of all local methods with their default options, and the methods that have none, with the reason.

    All get a rough answer beside the rivals; then the best one is planned in full.
    """
    known: Known = {}

    def roughly(name: str) -> tuple[list[Way], str]:
        """Return the ways of a method, or why there are none."""
        try:
            return ways(trunk, _of_method(recipe, name), budget, batch_size, under, known, beside=beside), ""
        except LocalizeError as error:
            return [], error.problem

    names = sorted((name for name in methods.names() if name not in methods.RIVALS), key=_is_quick)
    found: list[Way] = []
    refused: list[tuple[str, str]] = []
    for name, (some, why) in zip(names, each(roughly, names, processes), strict=True):
        found += some
        refused += [(name, why)] if why else []
        tell(name)
    fitting = [way for way in found if way.peak_bytes <= budget]
    if found:
        best = min(fitting or found, key=lambda way: way.predicted if fitting else way.peak_bytes)
        better = ways(trunk, _of_method(recipe, best.method), budget, batch_size, under, known, tell)
        found = [way for way in found if way.method != best.method] + better
    return found, tuple(refused)


def _is_quick(name: str) -> bool:
    """Tell whether a method is planned quickly, since its heads are small. The others are planned first."""
    return not _has_wide_heads(Recipe(name))


def _of_method(recipe: Recipe, name: str) -> Recipe:
    """Return a recipe for the same model by a method with its default options."""
    return replace(recipe, method=name, options={}, terms=(), notes="", paper="")


def ways(
    trunk: Trunk,
    recipe: Recipe,
    budget: int,
    batch_size: int,
    under: Conditions = PLAIN,
    known: Known | None = None,
    tell: Callable[[str], None] = lambda text: None,
    *,
    beside: Sequence[Way] = (),
) -> list[Way]:
    """Return, for every setting of a method's moments, the quickest way within a budget, or the leanest if none fits.


    Args:
        trunk: the recorded model.
        recipe: method and options; cuts and schedule are chosen.
        budget: number of bytes.
        batch_size: N, the number of images.
        under: see :func:`plan`.
        known: known costs, see :func:`localize.estimate.memory.predict`.
        tell: see :func:`plan`.
        beside: other ways, for a rough answer: only the cuts with the most segments are tried, and no inputs of norms
            are kept; a step has no schedule where none can fit or be leaner than these, or where one would make it
            :data:`SLOW` times slower than the quickest of these that fits.

    Raises:
        LocalizeError: the method does not train this model.
    """
    known = {} if known is None else known
    found: list[Way] = []
    for options in _moments(recipe):
        if found and found[0].peak_bytes <= budget and found[0].moments < TELLING * found[0].peak_bytes:
            break
        asked = replace(recipe, options=options)
        tried: list[Way] = []
        quickest, quickest_kinds = math.inf, None
        first = found[-1].recipe.cut if found and found[-1].recipe else None
        sets, refused = _kinds(trunk, asked, budget, batch_size, under, known, few=bool(beside), first=first)
        for kinds in sets:
            if kinds.whole.seconds >= quickest:
                continue
            tell(f"{_named(asked)}, {_cut_told(kinds.recipe.cut or CutSpec())}")
            try:
                sought = not _is_hopeless(kinds, budget, beside)
                way = _fitted(kinds, budget, quickest) if sought else replace(_as_it_is(kinds), sought=False)
            except LocalizeError as error:
                refused = error
                continue
            if way is not None:
                tried.append(way)
                if way.peak_bytes <= budget:
                    quickest, quickest_kinds = way.predicted, kinds
        if not tried:
            assert refused is not None
            raise refused
        if quickest_kinds is not None and not beside:
            kept = _fitted(quickest_kinds, budget, math.inf, keeping=True)
            tried += [kept] if kept is not None else []
        fitting = [way for way in tried if way.peak_bytes <= budget]
        best = min(fitting, key=lambda way: way.predicted) if fitting else min(tried, key=lambda way: way.peak_bytes)
        found.append(best)
    return found


def _moments(recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Yield the options of a recipe with every setting of its moments, the recipe's own first."""
    yield dict(recipe.options)
    for option in options_of(methods.get(recipe.method)):
        if option.name == "moments" and "moments" not in recipe.options:
            yield from ({**recipe.options, "moments": c} for c in option.choices if c != option.default)


def specs(trunk: Trunk, recipe: Recipe, *, few: bool = False) -> list[CutSpec]:
    """Return the cuts to try.

    They are: one after every local layer; one at every node; and, for at most :data:`FEW_LAYERS` local layers, all
    choices of cuts between them; for more layers, a half, a quarter, ... of the segments, balanced by computed bytes.
    """
    method = methods.create(recipe.method, **recipe.options)
    places = cuts.place(trunk, CutSpec(), grain=method.grain, together=method.together).cuts
    found = [CutSpec("max")]
    if few:
        return found
    if places:
        found.append(CutSpec("max", by="node"))
    if len(places) < FEW_LAYERS:
        names = [cut.name for cut in places]
        chosen = (some for count in range(len(names) - 1, 0, -1) for some in itertools.combinations(names, count))
        return [*found, *(CutSpec(at=some) for some in chosen), CutSpec(1)]
    size = (len(places) + 1) // 2
    while size >= 1 and len(found) < 5:
        found.append(CutSpec(size, by="memory"))
        size //= 2
    return found


def _kinds(
    trunk: Trunk,
    recipe: Recipe,
    budget: int,
    batch_size: int,
    under: Conditions,
    known: Known,
    *,
    few: bool,
    first: CutSpec | None,
) -> tuple[list[Kinds], LocalizeError | None]:
    """Return the kinds of segments of each set of cuts that is worth trying, and why the last other set is not.

    The set ``first`` comes first, or otherwise the one with the most segments, which are the quickest to schedule; then
    those whose step without a schedule is quickest. Later ones can often be skipped.
    """
    found: list[Kinds] = []
    refused: LocalizeError | None = None
    for spec in specs(trunk, recipe, few=few):
        try:
            kinds = Kinds(trunk, replace(recipe, cut=spec), batch_size, under, known)
        except LocalizeError as error:  # some methods need more segments
            refused = error
            continue
        if spec.by == "memory" and kinds.whole.peak > HOPELESS * budget:
            break  # fewer segments need more memory
        found.append(kinds)
    most = found[0] if found else None

    def place(kinds: Kinds) -> tuple[bool, bool, float]:
        return kinds.recipe.cut != first, kinds is not most, kinds.whole.seconds

    return sorted(found, key=place), refused


def _fitted(kinds: Kinds, budget: int, quicker_than: float, *, keeping: bool = False) -> Way | None:
    """Return the quickest schedule of a recipe with given cuts within a budget, predicted as a whole; None if it cannot
    be quicker than a number of seconds."""
    recipe, within = kinds.recipe, budget - kinds.between
    for _ in range(3):
        chosen = kinds.choose(within, quicker_than, keeping=keeping)
        if chosen is None:
            return None
        best = chosen.recipe
        if best == recipe:
            return _as_it_is(kinds)
        local, found = kinds.predicted(best.schedule)
        if found.peak <= budget or chosen.peak > within:
            break
        within -= found.peak - budget
        kinds.between = budget - within
    if found.peak > budget and not keeping:  # the largest segments as lean as they can be, and more room beside them
        leanest = kinds.choose(2 * budget - found.peak, each=True)
        assert leanest is not None, "nothing has to be quicker"
        other, its = kinds.predicted(leanest.recipe.schedule)
        if its.peak < found.peak:
            best, local, found = leanest.recipe, other, its
    return _made(best, local, found)


def _is_hopeless(kinds: Kinds, budget: int, beside: Sequence[Way]) -> bool:
    """Tell whether no schedule of a step is worth seeking beside other ways."""
    if not beside:
        return False
    quickest = min((way.predicted for way in beside if way.peak_bytes <= budget), default=math.inf)
    return kinds.least > max(budget, min(way.peak_bytes for way in beside)) or kinds.roughly(budget) > SLOW * quickest


def _as_it_is(kinds: Kinds) -> Way:
    """Return the step of a recipe with given cuts, without a schedule."""
    return _made(kinds.recipe, kinds.local, kinds.whole)


def _made(recipe: Recipe, local: LocalModel, found: Footprint) -> Way:
    entry = Entry(f"{_named(recipe)}, {_told(recipe, len(local.plan.segments))}", recipe)
    way = _way(entry, rivals.row_of(entry, local, found))
    return replace(way, moments=found.components.get("moments", 0))


def _named(recipe: Recipe) -> str:
    options = ",".join(f"{name}={value}" for name, value in recipe.options.items())
    return f"{recipe.method} {options}".strip()


def _cut_told(spec: CutSpec) -> str:
    if spec.at:
        return f"cut after {', '.join(spec.at)}"
    count = "all" if spec.segments == "max" else str(spec.segments)
    return f"{count} segments" + (" by node" if spec.by == "node" else "")


def _told(recipe: Recipe, segments: int) -> str:
    """Return a description of the cuts and the schedule of a recipe."""
    parts = [counted(segments, "segment")]
    again, at = recipe.schedule.get("recompute", "none"), recipe.schedule.get("recompute_at")
    if again != "none" or at:
        parts.append("some recomputed" if at else "recomputed")
    if recipe.schedule.get("micro_batch") or recipe.schedule.get("micro_batch_at"):
        kept = " with kept values" if recipe.schedule.get("keep_at") else ""
        parts.append(("some in parts" if recipe.schedule.get("micro_batch_at") else "in parts") + kept)
    return ", ".join(parts)


# ------------------------------------------------------------------------------------------------- rivals


def _fewer_parts(
    found: Sequence[Way],
    trunk: Trunk,
    plain: Recipe,
    base: Way,
    budget: int,
    batch_size: int,
    under: Conditions,
    processes: int,
) -> list[Way]:
    """Return accumulation with as few parts as fit, if fewer do than were tried.

    It needs a constant plus a share of the batch, which tells roughly how many.
    """
    most = next((way for way in found if way.method == methods.ACCUMULATION), None)
    if most is None or most.recipe is None or not most.peak_bytes < budget < base.peak_bytes:
        return []
    followed = most.recipe.options["parts"]
    of_batch = (base.peak_bytes - most.peak_bytes) / (1 - 1 / followed)
    constant = base.peak_bytes - of_batch
    parts = max(2, -(-int(of_batch) // max(1, int(budget - constant))))
    if parts >= followed:
        return []
    entry = rivals.accumulation(plain, parts)
    (row,) = each(lambda entry: rivals.cost(entry, batch_size, under, trunk=trunk), [entry], processes)
    way = None if row.refused else _way(entry, row)
    return [way] if way is not None and way.peak_bytes <= budget else []


def _way(entry: Entry, row: Row) -> Way:
    assert row.peak_bytes is not None and row.macs is not None and row.predicted_seconds is not None
    return Way(
        entry.name, entry.recipe.method, entry.recipe if entry.is_recipe else None,
        row.peak_bytes, row.macs, row.predicted_seconds,
        local=row.local, keeps_gradients=row.keeps_gradients, changes_statistics=row.changes_statistics,
        combined=row.combined, remark=row.remark,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------- time


def _timed(choice: Choice, batch_size: int, device: str, tell: Callable[[str], None], under: Conditions) -> Choice:
    """Return the choice with measured seconds of backprop and of the quickest fitting ways, sorted by them."""
    where = choose_device(device)
    fitting = [way for way in choice.fitting if way.recipe is not None]
    close = [way for way in fitting if way.predicted <= CLOSE * fitting[0].predicted][:MOST]
    known: dict[str, float] = {}

    def timed(way: Way) -> Way:
        tell(f"time of {way.name}")
        assert way.recipe is not None
        local = build.build(way.recipe).to(where).train()
        return replace(way, seconds=timing.predict(local, batch_size, known, optimizer=under.optimizer).seconds)

    found = {way.name: timed(way) for way in close}
    done = replace(choice, ways=tuple(found.get(way.name, way) for way in choice.ways), backprop=timed(choice.backprop))
    return replace(done, ways=_sorted(done))


# ------------------------------------------------------------------------------------------------- words


def check(choice: Choice, batch_size: int, name: str) -> None:
    """Raise an error if nothing fits.

    Raises:
        BudgetError: nothing fits; the message says which way needs least memory, in bytes, and what to type.
    """
    if choice.fitting:
        return
    least, base = choice.leanest, choice.backprop
    budget = told(choice.budget) + ("" if choice.time_budget is None else f" and {choice.time_budget:g} times its time")
    facts = [
        f"{_leanest_of(choice)} needs {told(least.peak_bytes)} and "
        f"{choice.time(least):.2f} times backprop's time: {least.name}.",
        f"backprop needs {told(base.peak_bytes)}; the leanest way needs {choice.share(least):.1%} of that.",
    ]
    share = 100 * choice.share(least) * 1.01
    rest = "" if choice.time_budget is None else " without --time-budget"
    wide = least.recipe is not None and least.remark.startswith(HEADS) and _can_be_narrower(least.recipe)
    if wide:
        facts.append(f"most of that is {least.remark}; heads narrower than the paper's change the method.")
    raise BudgetError(
        f"no way to train {name} on {counted(batch_size, 'image')} fits {budget}.",
        facts=facts,
        help=Advice(
            "try a smaller batch, a larger budget, or another method" + (", or head_width=64" if wide else ""),
            f"--memory-budget {share:.3g}%{rest}"
            + (", or a smaller --batch-size" if batch_size > 1 else "")
            + (f", or --method {least.method} --head-width 64" if wide else ""),
        ),
    )


def _can_be_narrower(recipe: Recipe) -> bool:
    """Tell whether heads of 64 channels would have fewer parameters: copies of later layers keep their widths."""
    if not _has_wide_heads(recipe):
        return False
    narrow = replace(recipe, options={**recipe.options, "head_width": 64})
    return _head_parameters(narrow) < _head_parameters(recipe)


def _head_parameters(recipe: Recipe) -> int:
    return sum(parameter.numel() for parameter in build.build(recipe, data=False).heads.parameters())


def _has_wide_heads(recipe: Recipe) -> bool:
    """Tell whether a method's heads are those of its paper, and can be narrower."""
    takes = any(option.name == "head_width" for option in options_of(methods.get(recipe.method)))
    return takes and not recipe.options.get("head_width")


def _leanest_of(choice: Choice) -> str:
    return f"the leanest of the {len(choice.ways)} ways found" if len(choice.ways) > 1 else "the only way found"


def verdict(choice: Choice) -> Iterator[str]:
    """Yield sentences about the quickest way within the budget, the leanest, and whether local learning is wrong."""
    fitting = choice.fitting
    if fitting:
        yield f"quickest within the budget: {_of(choice, fitting[0])}."
    keep = [way for way in fitting if way.keeps_gradients]
    if keep and keep[0] is not fitting[0]:
        yield f"quickest with the same gradients as backprop: {_of(choice, keep[0])}."
    yield f"leanest of these ways: {_of(choice, choice.leanest)}."
    local = [way for way in choice.ways if way.local]
    others = [way for way in choice.ways if not way.local]
    if not local or not others:
        return
    single = min((way for way in others if not way.combined), key=lambda way: way.peak_bytes)
    best = min(local, key=lambda way: way.peak_bytes)
    if fitting and not fitting[0].local:
        yield f"local learning is the wrong tool within this budget: {fitting[0].name} is quicker."
    if not choice.fits(best) and best.peak_bytes >= min(way.peak_bytes for way in others):
        yield (
            f"local learning is the wrong tool if only memory counts: most of what {best.name} needs is {best.remark}."
        )
    for way in local:
        if way.peak_bytes >= single.peak_bytes and way is not best:
            yield f"{way.name} needs more than {single.name}: {way.remark}."
    left = [way.method for way in local if not way.sought]
    if left:
        yield (
            f"no schedule was sought for {', '.join(dict.fromkeys(left))}: none could fit, or it would take {SLOW} "
            f"times as long as the quickest rival. --method {left[0]} seeks one."
        )


def _of(choice: Choice, way: Way) -> str:
    return f"{way.name} ({choice.share(way):.1%} of backprop's memory, {choice.time(way):.2f} times its time)"


def told(size: int) -> str:
    """Return a number of bytes in a readable unit."""
    if size >= 2**30:
        return f"{size / 2**30:.2f} GiB"
    if size >= 2**20:
        return f"{size / 2**20:.1f} MiB"
    return f"{size / 2**10:.1f} KiB" if size >= 2**10 else f"{size} bytes"
