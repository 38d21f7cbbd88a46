"""Alternatives to local learning for training with less memory, each in its best form; and the costs of a step.

The rivals have one loss at the output:

- backprop;
- activation checkpointing (the best of several schedules), also with the optimizer in the backward: every parameter is
  updated as soon as it has its gradient, which is then dropped;
- the model's own option (``memory_efficient`` of DenseNets, which recomputes concatenations);
- accumulation over parts of the batch. With BatchNorm a part has at least :data:`IMAGES` images, and its statistics
  differ; without BatchNorm it is exact, and leanest with one image at a time;
- accumulation with checkpointing, ``combined``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from localize import build, methods
from localize.codegen.emit import emit
from localize.codegen.lower import lower
from localize.compiler import convert
from localize.cutting import cuts
from localize.errors import LocalizeError
from localize.estimate import memory
from localize.estimate.memory import PLAIN, Conditions, Footprint
from localize.estimate.processes import each
from localize.estimate.repeats import Known
from localize.ir import CutSpec, Plan, Trunk
from localize.methods import ACCUMULATION, BACKPROP, CHECKPOINTING
from localize.passes.schedule import batch_norms
from localize.recipes import Recipe
from localize.runtime.model import LocalModel

GROUPS = (1, 2, 3, 4, 6, 8)
"""Numbers of local layers per segment that are tried for checkpointing."""
TRIED = 3
"""Number of these schedules that are followed: the best ones by a rough sum of bytes."""
IMAGES = 16
"""Fewest images in a part of the batch if the model has BatchNorm."""
PARTS = 64
"""Largest number of parts for accumulation."""


@dataclass(frozen=True)
class Entry:
    """A line of a comparison: a name, and the step to build.

    ``summed``: the losses have one backward. ``fused``: the optimizer steps during the backward. ``efficient``: the
    model itself runs, with its own memory saving on. ``combined``: it saves memory in two ways at once.
    """

    name: str
    recipe: Recipe
    summed: bool = False
    fused: bool = False
    efficient: bool = False
    combined: bool = False

    @property
    def is_recipe(self) -> bool:
        """Whether the recipe alone describes it."""
        return not (self.summed or self.fused or self.efficient)


@dataclass(frozen=True)
class Row:
    """The costs of one method; if it does not support the model, ``refused`` says why and the costs are None."""

    method: str
    parameters: int | None = None
    """Number of elements of all parameters, of the model, heads and shared blocks."""
    macs: int | None = None
    """Multiply-adds of matrix products and convolutions in one step on the batch, forward and backward."""
    saved_bytes: int | None = None
    """Most bytes that are kept for a backward, see :class:`localize.estimate.memory.Footprint`."""
    peak_bytes: int | None = None
    """Most bytes of live tensors at one time: parameters, gradients, optimizer's state, batch, activations."""
    seconds: float | None = None
    """Median time of a step in seconds, if it was measured."""
    resident_bytes: int | None = None
    """Peak resident bytes in a process of its own, if they were measured: on a CPU under Linux."""
    refused: str = ""
    remark: str = ""
    """The largest component of its peak."""
    predicted_seconds: float | None = None
    """Predicted seconds of a step, see :mod:`localize.estimate.speed`: for ratios, not for absolute times."""
    local: bool = False
    """Whether it trains with local losses."""
    keeps_gradients: bool = False
    """Whether the gradients equal those of backprop on the whole batch."""
    changes_statistics: bool = False
    """Whether BatchNorm normalises with fewer images than the whole batch."""
    combined: bool = False
    """Whether it saves memory in two ways at once; most rivals use one."""


def plain(recipe: Recipe, method: str) -> Recipe:
    """Return a recipe for the same model with another method, without options of the old one."""
    return Recipe(
        method,
        model=recipe.model,
        num_classes=recipe.num_classes,
        input_shape=recipe.input_shape,
        model_options=recipe.model_options,
        freeze=recipe.freeze,
        leaf=recipe.leaf,
        output=recipe.output,
        shared=recipe.shared,
    )


def recorded(model: Recipe) -> Trunk:
    """Return the recorded model of a recipe, without data."""
    return built(Entry(BACKPROP, plain(model, BACKPROP)), data=False).plan.segments.trunk


def built(entry: Entry, *, data: bool, trunk: Trunk | None = None) -> LocalModel:
    """Return the local model of an entry, with or without data, from an already recorded model if one is given.

    Raises:
        LocalizeError: the method does not support the model.
    """
    local = build.build(entry.recipe, data=data) if trunk is None else convert(trunk, entry.recipe, audited=False)
    if not entry.summed:
        return local
    program = lower(local.plan, summed=True)
    return LocalModel(local.trunk, local.heads, local.plan, program, emit(program))


def cost(
    entry: Entry,
    batch_size: int,
    under: Conditions = PLAIN,
    known: Known | None = None,
    trunk: Trunk | None = None,
) -> Row:
    """Predict the costs of an entry, without data and without running anything.

    Args:
        entry: the step to build.
        batch_size: N, the number of images.
        under: optimizer, autocast, and speed of the device.
        known: see :func:`localize.estimate.memory.predict`.
        trunk: its model, if it is already recorded.

    Returns:
        The row, with bytes, multiply-adds and predicted seconds.
    """
    try:
        local = built(entry, data=False, trunk=trunk)
        return row_of(entry, local, footprint(entry, local, batch_size, under, known))
    except LocalizeError as error:
        return Row(entry.name, refused=error.problem)
    except RuntimeError as error:  # an operation whose output shape depends on values
        told = str(error).partition("\n")[0]
        return Row(entry.name, refused=f"its step cannot be followed without values: {told}")


def footprint(
    entry: Entry, local: LocalModel, batch_size: int, under: Conditions, known: Known | None = None
) -> Footprint:
    """Return the memory and arithmetic of a step of an entry."""
    if entry.efficient:
        return memory.predict_plain(
            local.plan.segments.trunk, batch_size, optimizer=under.optimizer, autocast=under.autocast, speed=under.speed
        )
    return predicted(local, batch_size, under, None if entry.summed else known, in_backward=entry.fused)


def predicted(
    local: LocalModel, batch_size: int, under: Conditions, known: Known | None = None, *, in_backward: bool = False
) -> Footprint:
    """Return :func:`localize.estimate.memory.predict` under the conditions of a comparison."""
    return memory.predict(
        local, batch_size, optimizer=under.optimizer, autocast=under.autocast, speed=under.speed, known=known,
        in_backward=in_backward,
    )  # fmt: skip


def row_of(entry: Entry, local: LocalModel, found: Footprint) -> Row:
    """Return the row of an entry from the costs of its step."""
    plan = local.plan
    is_local = entry.recipe.method not in methods.RIVALS
    in_parts = bool(plan.micro_batch and not plan.exact) or any(loss.part for loss in plan.losses)
    other = in_parts and any(batch_norms(plan))
    return Row(
        entry.name,
        sum(parameter.numel() for parameter in local.parameters()),
        found.macs,
        found.saved,
        found.peak,
        remark=reason(found, plan, summed=entry.summed),
        predicted_seconds=found.seconds,
        local=is_local,
        keeps_gradients=not is_local and not other,
        changes_statistics=other,
        combined=entry.combined,
    )


def reason(found: Footprint, plan: Plan, *, summed: bool = False) -> str:
    """Return the name and the share of the largest component of a peak."""
    of = dict.fromkeys(KINDS, 0) | dict(found.components)
    values = "values that one segment computes"
    if plan.waits or summed:
        values = "values that all segments compute before the first backward"
    elif any(loss.route.stop > loss.route.start for loss in plan.losses) and len(plan.segments) > 1:
        values = "values that the segments of a loss compute"
    if plan.input is not None and plan.input.streams > 1:
        values += f" on {plan.input.streams} images for each of the batch"
    sizes = {
        HEADS: of["head parameters"] + of["head states"] + of["heads"],
        "moments: separate optimizer states for each loss": of["moments"],
        "the optimizer's states for the model": of["states"],
        "the model's own parameters": of["parameters"],
        "the batch": of["batch"],
        "the result of the previous step": of["result"],
        values: of["segments"],
        "gradients, and values of the backward": of["backward"],
    }
    name = max(sizes, key=lambda name: sizes[name])
    return f"{name}, {sizes[name] / max(1, found.peak):.0%} of its peak"


KINDS = (
    "parameters", "states", "batch", "result", "head parameters", "head states", "moments", "segments", "heads",
    "backward",
)  # fmt: skip
"""Kinds of memory, see :class:`localize.estimate.memory.Footprint`."""
HEADS = "heads: their parameters, states and values"
"""What is said of them as a component of a peak."""


# ------------------------------------------------------------------------------------------------- the rivals


def rivals(
    model: Recipe,
    batch_size: int,
    tell: Callable[[str], None],
    under: Conditions = PLAIN,
    known: Known | None = None,
    trunk: Trunk | None = None,
    processes: int = 1,
) -> list[tuple[Entry, Row]]:
    """Return backprop, and the ways to save memory that keep its loss, each in its leanest form.

    Args:
        model: a recipe that names the model.
        batch_size: N, the number of images.
        tell: called with the name of each row after it is known.
        under: optimizer, autocast, and speed of the device.
        known: see :func:`localize.estimate.memory.predict`.
        trunk: its model, if it is already recorded.
        processes: how many follow steps at a time, see :func:`localize.estimate.processes.each`.

    Raises:
        LocalizeError: the model cannot be made.
    """
    base = Entry(BACKPROP, plain(model, BACKPROP))
    trunk = recorded(model) if trunk is None else trunk
    norms = any(batch_norms(built(base, data=False, trunk=trunk).plan))

    parts = most_parts(batch_size, norms=norms)
    tried = schedules(model, trunk)[:TRIED] or [Entry(CHECKPOINTING, plain(model, CHECKPOINTING))]

    rows: dict[str, Row] = {}

    def follow(entries: Sequence[Entry]) -> None:
        found = each(lambda entry: cost(entry, batch_size, under, known, trunk), entries, processes)
        for entry, row in zip(entries, found, strict=True):
            rows[entry.name] = row
            tell(entry.name)

    single = accumulation(model, max(parts, 2))
    follow([base, *tried, *([single] if parts > 1 else [])])
    best = _leanest(tried, rows)
    shown = [base, best]
    if not rows[best.name].refused:
        shown.append(replace(best, name=f"{best.name}, optimizer in the backward", fused=True))
    if memory.saves_memory(trunk.model):
        shown.append(Entry("memory_efficient", base.recipe, efficient=True))
    shown.append(single)
    if parts < 2:
        why = f"with BatchNorm a part has at least {IMAGES} images, and the batch has {batch_size}"
        rows[single.name] = Row(ACCUMULATION, refused=why if norms else "one image is not taken in parts")
    elif not rows[best.name].refused:
        shown.append(combination(best, batch_size, parts, norms=norms))
    follow([entry for entry in shown if entry.name not in rows])
    return [(entry, rows[entry.name]) for entry in shown]


def most_parts(batch_size: int, *, norms: bool) -> int:
    """Return the most parts for accumulation: with one image each or, with BatchNorm, :data:`IMAGES` images."""
    return min(PARTS, batch_size // IMAGES if norms else batch_size)


def accumulation(model: Recipe, parts: int) -> Entry:
    """Return accumulation over this number of parts."""
    recipe = replace(plain(model, ACCUMULATION), options={"parts": parts})
    return Entry(f"{ACCUMULATION}, {parts} parts", recipe)


def combination(best: Entry, batch_size: int, parts: int, *, norms: bool) -> Entry:
    """Return a schedule of checkpointing over parts of the batch."""
    images = -(-batch_size // parts)
    schedule = {"micro_batch": images, **({"ghost_norm": True} if norms else {})}
    name = f"{best.name}, {-(-batch_size // images)} parts"
    return Entry(name, replace(best.recipe, schedule=schedule), combined=True)


def checkpointing(
    model: Recipe,
    batch_size: int,
    tell: Callable[[str], None],
    under: Conditions = PLAIN,
    trunk: Trunk | None = None,
) -> tuple[Entry, Row]:
    """Return the schedule of activation checkpointing that needs the least memory of those tried, and its costs."""
    trunk = recorded(model) if trunk is None else trunk
    tried = schedules(model, trunk)[:TRIED] or [Entry(CHECKPOINTING, plain(model, CHECKPOINTING))]
    rows: dict[str, Row] = {}
    for entry in tried:
        rows[entry.name] = cost(entry, batch_size, under, trunk=trunk)
        tell(entry.name)
    best = _leanest(tried, rows)
    return best, rows[best.name]


def _leanest(entries: Sequence[Entry], rows: Mapping[str, Row]) -> Entry:
    row = least([rows[entry.name] for entry in entries])
    return next(entry for entry in entries if entry.name == row.method)


def schedules(model: Recipe, trunk: Trunk) -> list[Entry]:
    """Return schedules of activation checkpointing of a model, with different numbers of local layers per segment.

    The first has the smallest sum of the bytes kept at cuts and the bytes computed in its largest segment.
    """
    grain = methods.get(CHECKPOINTING)().grain
    layers = len(cuts.local_layers(trunk, grain))
    counts = {count for size in GROUPS if (count := -(-layers // size)) > 1}
    entries = [Entry(f"{CHECKPOINTING} -K {k}", replace(plain(model, CHECKPOINTING), cut=CutSpec(k))) for k in counts]
    roughly = {entry.name: _rough(trunk, entry.recipe.cut or CutSpec(), grain) for entry in entries}
    return sorted(entries, key=lambda entry: (roughly[entry.name], entry.name))


def _rough(trunk: Trunk, spec: CutSpec, grain: object) -> float:
    """Return a rough peak in bytes for one image, if segments keep their inputs and one of them is recomputed."""
    found = cuts.place(trunk, spec, grain=grain).cuts  # type: ignore[arg-type]
    every = cuts.candidates(trunk)
    ends = [0, *(cut.bytes_before for cut in found), max((cut.bytes_before for cut in every), default=0)]
    kept = sum(4 * math.prod(feature.shape) for cut in found for feature in cut.features)
    return kept + max(b - a for a, b in zip(ends, ends[1:], strict=False))


def least(rows: Sequence[Row]) -> Row:
    """Return the row that needs the least memory; among equals, the one with the least arithmetic."""
    found = [row for row in rows if row.peak_bytes is not None]
    return min(found or rows, key=lambda row: (row.peak_bytes or 0, row.macs or 0))


def best_rival(rows: Iterable[Row], *, combined: bool) -> Row | None:
    """Return the leanest row with one loss at the output; with ``combined``, also among those that combine two ways."""
    found = [row for row in rows if not row.local and not row.refused and (combined or not row.combined)]
    return least(found) if found else None
