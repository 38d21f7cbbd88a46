"""What a user would pick instead of local learning to train in less memory, each in its best form; and what costs are.

The rivals are those of one loss at the output:

- backprop;
- activation checkpointing (the best of several schedules), also with the optimizer in the backward: every parameter is
  updated as soon as it has its gradient, which is dropped then;
- what the model itself offers (``memory_efficient`` of DenseNets, which computes concatenations again);
- accumulation over parts of the batch. With BatchNorm a part has at least :data:`IMAGES` images, and changes its
  statistics; without, it is exact, and as lean with one image at a time as it can be;
- accumulation with checkpointing, ``combined``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from localize import build, methods
from localize.codegen.emit import emit
from localize.codegen.lower import lower
from localize.compiler import convert
from localize.cutting import cuts
from localize.errors import LocalizeError
from localize.estimate import memory
from localize.estimate.memory import PLAIN, Conditions, Footprint
from localize.estimate.repeats import Known
from localize.ir import CutSpec, Plan, Trunk
from localize.methods import ACCUMULATION, BACKPROP, CHECKPOINTING
from localize.passes.schedule import batch_norms
from localize.recipes import Recipe
from localize.runtime.model import LocalModel

GROUPS = (1, 2, 3, 4, 6, 8)
"""Numbers of local layers in a segment that checkpointing is tried with."""
TRIED = 3
"""How many of these schedules are followed: those that a rough sum of bytes puts first."""
IMAGES = 16
"""Fewest images that BatchNorm normalises by in a part of the batch."""
PARTS = 64
"""Most parts that accumulation takes."""


@dataclass(frozen=True)
class Entry:
    """A line of a comparison: a name, and what is built under it.

    ``summed``: the losses have one backward. ``fused``: the optimizer steps in the backward. ``efficient``: the model
    itself runs, with what it offers to save memory switched on. ``combined``: two ways to save memory at once.
    """

    name: str
    recipe: Recipe
    summed: bool = False
    fused: bool = False
    efficient: bool = False
    combined: bool = False

    @property
    def is_recipe(self) -> bool:
        """Whether the recipe alone says all."""
        return not (self.summed or self.fused or self.efficient)


@dataclass(frozen=True)
class Row:
    """The costs of one method; where it does not take the model, ``refused`` says why and the others are None."""

    method: str
    parameters: int | None = None
    """Elements of the model's parameters, and of those of heads and shared blocks."""
    macs: int | None = None
    """Multiply-adds of matrix products and convolutions in one step on the batch, forward and backward."""
    saved_bytes: int | None = None
    """Most bytes that are kept for a backward, see :class:`localize.estimate.memory.Footprint`."""
    peak_bytes: int | None = None
    """Most bytes of tensors that live at one time: parameters, gradients, optimizer's state, batch, activations."""
    seconds: float | None = None
    """Median time of a step, where it was measured."""
    resident_bytes: int | None = None
    """Most bytes resident in a process of its own, where it was measured: on a CPU, by Linux."""
    refused: str = ""
    remark: str = ""
    """What most of its peak is."""
    predicted_seconds: float | None = None
    """Time of a step by the model of a device, see :mod:`localize.estimate.speed`: for ratios, not for clocks."""
    local: bool = False
    """It trains by local losses."""
    keeps_gradients: bool = False
    """The gradients are those of backprop on the whole batch."""
    changes_statistics: bool = False
    """BatchNorm normalises by other images than the whole batch."""
    combined: bool = False
    """It saves memory in two ways at once, of which a rival's name usually stands for one."""


def plain(recipe: Recipe, method: str) -> Recipe:
    """Return a recipe for the same model without what belongs to a method."""
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
    """Return the recorded model that a recipe names, without data."""
    return built(Entry(BACKPROP, plain(model, BACKPROP)), data=False).plan.segments.trunk


def built(entry: Entry, *, data: bool, trunk: Trunk | None = None) -> LocalModel:
    """Return the local model of an entry, with or without data; of a recorded model, where there is one already.

    Raises:
        LocalizeError: the method does not take the model.
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
    """Predict what an entry costs, without data and without running anything.

    Args:
        entry: what is built.
        batch_size: N, the number of images.
        under: optimizer, autocast, and model of a device.
        known: see :func:`localize.estimate.memory.predict`.
        trunk: its model, where it is recorded already.
    """
    try:
        local = built(entry, data=False, trunk=trunk)
        return row_of(entry, local, footprint(entry, local, batch_size, under, known))
    except LocalizeError as error:
        return Row(entry.name, refused=error.problem)
    except RuntimeError as error:  # an operation whose result has another shape for other values
        told = str(error).partition("\n")[0]
        return Row(entry.name, refused=f"its step cannot be followed without values: {told}")


def footprint(
    entry: Entry, local: LocalModel, batch_size: int, under: Conditions, known: Known | None = None
) -> Footprint:
    """Return what a step of an entry needs."""
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
    """Return the row of an entry whose step has been followed."""
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
    """Say what the largest component of a peak is, and its share."""
    of = dict.fromkeys(KINDS, 0) | dict(found.components)
    values = "what one segment computes"
    if plan.waits or summed:
        values = "what all segments compute before the first backward"
    elif any(loss.route.stop > loss.route.start for loss in plan.losses) and len(plan.segments) > 1:
        values = "what the segments compute that a loss runs through"
    if plan.input is not None and plan.input.streams > 1:
        values += f" on {plan.input.streams} images for each of the batch"
    sizes = {
        "heads: their parameters, states and values": of["head parameters"] + of["head states"] + of["heads"],
        "moments: a state of the optimizer for each loss": of["moments"],
        "the optimizer's states of the model": of["states"],
        "the model's own parameters": of["parameters"],
        "the batch": of["batch"],
        "what the step before returned": of["result"],
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


# ------------------------------------------------------------------------------------------------- the rivals


def rivals(
    model: Recipe,
    batch_size: int,
    tell: Callable[[str], None],
    under: Conditions = PLAIN,
    known: Known | None = None,
) -> Iterator[tuple[Entry, Row]]:
    """Yield backprop and what saves memory and keeps its loss, each in its leanest form.

    Args:
        model: a recipe that says which model.
        batch_size: N, the number of images.
        tell: is called with the name of every row behind it.
        under: optimizer, autocast, and model of a device.
        known: see :func:`localize.estimate.memory.predict`.

    Raises:
        LocalizeError: the model cannot be made.
    """
    base = Entry(BACKPROP, plain(model, BACKPROP))
    trunk = recorded(model)
    norms = any(batch_norms(built(base, data=False, trunk=trunk).plan))

    def followed(entry: Entry) -> tuple[Entry, Row]:
        row = cost(entry, batch_size, under, known, trunk)
        tell(entry.name)
        return entry, row

    yield followed(base)
    best, checkpoint = checkpointing(model, batch_size, tell, under, trunk)
    yield best, checkpoint
    if not checkpoint.refused:
        yield followed(replace(best, name=f"{best.name}, optimizer in the backward", fused=True))
    if memory.saves_memory(trunk.model):
        yield followed(Entry("memory_efficient", base.recipe, efficient=True))
    parts = most_parts(batch_size, norms=norms)
    yield followed(accumulation(model, parts))
    if not checkpoint.refused:
        yield followed(combination(best, batch_size, parts, norms=norms))


def most_parts(batch_size: int, *, norms: bool) -> int:
    """Return how many parts of the batch accumulation takes at most: one image each; with BatchNorm, :data:`IMAGES`."""
    return max(2, min(PARTS, batch_size // IMAGES if norms else batch_size))


def accumulation(model: Recipe, parts: int) -> Entry:
    """Return accumulation over so many parts."""
    recipe = replace(plain(model, ACCUMULATION), options={"parts": parts})
    return Entry(f"{ACCUMULATION}, {parts} parts", recipe)


def combination(best: Entry, batch_size: int, parts: int, *, norms: bool) -> Entry:
    """Return a schedule of checkpointing over parts of the batch."""
    schedule = {"micro_batch": -(-batch_size // parts), **({"ghost_norm": True} if norms else {})}
    return Entry(f"{best.name}, {parts} parts", replace(best.recipe, schedule=schedule), combined=True)


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
    rows = []
    for entry in tried:
        rows.append(cost(entry, batch_size, under, trunk=trunk))
        tell(entry.name)
    row = least(rows)
    return next(entry for entry in tried if entry.name == row.method), row


def schedules(model: Recipe, trunk: Trunk) -> list[Entry]:
    """Return schedules of activation checkpointing of a model, by the number of local layers in a segment.

    First stands the one for which what is kept at the cuts, and the bytes that the largest segment computes, are least.
    """
    grain = methods.get(CHECKPOINTING)().grain
    layers = len(cuts.local_layers(trunk, grain))
    counts = {count for size in GROUPS if (count := -(-layers // size)) > 1}
    entries = [Entry(f"{CHECKPOINTING} -K {k}", replace(plain(model, CHECKPOINTING), cut=CutSpec(k))) for k in counts]
    roughly = {entry.name: _rough(trunk, entry.recipe.cut or CutSpec(), grain) for entry in entries}
    return sorted(entries, key=lambda entry: (roughly[entry.name], entry.name))


def _rough(trunk: Trunk, spec: CutSpec, grain: object) -> float:
    """Return about how many bytes of one image live at most, if segments keep what enters and one is computed again."""
    found = cuts.place(trunk, spec, grain=grain).cuts  # type: ignore[arg-type]
    every = cuts.candidates(trunk)
    ends = [0, *(cut.bytes_before for cut in found), max((cut.bytes_before for cut in every), default=0)]
    kept = sum(4 * math.prod(feature.shape) for cut in found for feature in cut.features)
    return kept + max(b - a for a, b in zip(ends, ends[1:], strict=False))


def least(rows: Sequence[Row]) -> Row:
    """Return the row that needs the least memory; of several, the one that computes least."""
    found = [row for row in rows if row.peak_bytes is not None]
    return min(found or rows, key=lambda row: (row.peak_bytes or 0, row.macs or 0))


def best_rival(rows: Iterable[Row], *, combined: bool) -> Row | None:
    """Return the leanest way that has one loss at the output; with or without those that combine two."""
    found = [row for row in rows if not row.local and not row.refused and (combined or not row.combined)]
    return least(found) if found else None
