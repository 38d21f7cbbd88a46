"""What methods cost on one model, beside the rivals of local learning: backprop in less memory.

The rivals are backprop, backprop with activation checkpointing (the best of several schedules), backprop on parts of
the batch, and local losses that are summed and differentiated at once. Costs are those of the generated steps, see
:mod:`localize.estimate.memory`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from localize import build, methods
from localize.codegen.emit import emit
from localize.codegen.lower import lower, sums_losses
from localize.cutting import cuts
from localize.errors import LocalizeError
from localize.estimate import memory, resident
from localize.estimate.memory import PLAIN, Conditions
from localize.estimate.timing import now
from localize.ir import CutSpec, Plan
from localize.methods import ACCUMULATION, BACKPROP, CHECKPOINTING
from localize.recipes import Recipe
from localize.runtime.compiled import compile
from localize.runtime.devices import choose_device
from localize.runtime.model import LocalModel

GROUPS = (1, 2, 3, 4, 6, 8)
"""Numbers of local layers in a segment that checkpointing is tried with."""
WARM = 2
"""Steps that are run before steps are timed."""


@dataclass(frozen=True)
class Entry:
    """A line of a comparison: a name, and what is built under it. ``summed``: the losses have one backward."""

    name: str
    recipe: Recipe
    summed: bool = False


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
    """Why it needs more memory than methods whose losses are differentiated one by one."""


def compare(
    recipes: Mapping[str, Recipe],
    model: Recipe,
    batch_size: int,
    *,
    device: str | None = None,
    compiled: bool = False,
    under: Conditions = PLAIN,
    tell: Callable[[str], None] = lambda name: None,
) -> list[Row]:
    """Return what methods cost, backprop and its rivals first.

    Args:
        recipes: local methods by the names that rows get.
        model: a recipe that says which model; its method is not used.
        batch_size: N, the number of images.
        device: where steps are run on random images, and timed; None: nothing is run.
        compiled: the steps that are timed are compiled (:func:`localize.compile`).
        under: optimizer and autocast of all steps.
        tell: is called with every name behind its row, or schedule of checkpointing.

    Raises:
        LocalizeError: the model cannot be made.
    """
    best, checkpoint = checkpointing(model, batch_size, tell, under)
    base, parts = (Entry(method, _plain(model, method)) for method in (BACKPROP, ACCUMULATION))
    entries = [base, best, parts]
    rows = [_told(cost(base, batch_size, under), tell), checkpoint, _told(cost(parts, batch_size, under), tell)]
    summed = False
    for name, recipe in recipes.items():
        entry = Entry(name, recipe)
        entries.append(entry)
        rows.append(_told(cost(entry, batch_size, under), tell))
        if not summed and not rows[-1].refused and sums_losses(built(entry, data=False).plan):
            summed = True
            entries.append(Entry(f"{name}, losses summed", recipe, summed=True))
            rows.append(_told(cost(entries[-1], batch_size, under), tell))
    if device is None:
        return rows
    taken = [entry for entry, row in zip(entries, rows, strict=True) if not row.refused]
    times = measured(taken, batch_size, device=device, compiled=compiled, under=under)
    held: dict[str, int | None] = {}
    if choose_device(device).type == "cpu" and not compiled:
        for entry in (entry for entry in taken if not entry.summed):
            held[entry.name] = resident.measured(entry.recipe, batch_size, opt=under.opt, autocast=under.autocast)
            tell(f"{entry.name}, resident")
    return [replace(row, seconds=times.get(row.method), resident_bytes=held.get(row.method)) for row in rows]


def _told(row: Row, tell: Callable[[str], None]) -> Row:
    tell(row.method)
    return row


def cost(entry: Entry, batch_size: int, under: Conditions = PLAIN) -> Row:
    """Predict what an entry costs, without data and without running anything."""
    try:
        local = built(entry, data=False)
        found = memory.predict(local, batch_size, optimizer=under.optimizer, autocast=under.autocast)
    except LocalizeError as error:
        return Row(entry.name, refused=error.problem)
    except RuntimeError as error:  # an operation whose result has another shape for other values
        told = str(error).partition("\n")[0]
        return Row(entry.name, refused=f"its step cannot be followed without values: {told}")
    parameters = sum(parameter.numel() for parameter in local.parameters())
    remark = _remark(local.plan, summed=entry.summed)
    return Row(entry.name, parameters, found.macs, found.saved, found.peak, remark=remark)


def _remark(plan: Plan, *, summed: bool) -> str:
    """Return what a step of a plan keeps that one of backprop does not."""
    sizes = {own: sum(b.size for b in plan.blocks if (b.role == "segment") is own) for own in (True, False)}
    if sizes[False] > sizes[True]:
        return f"its heads have {sizes[False] / sizes[True]:.1f} times the model's parameters"
    if plan.input is not None and plan.input.streams > 1:
        return f"{plan.input.streams} images enter for each of the batch"
    if plan.waits or summed:
        return "all segments are run before the first backward"
    if any(loss.route.stop - loss.route.start > 0 for loss in plan.losses):
        return "losses run several segments"
    return "heads"


def footprints(
    recipe: Recipe, batch_size: int, *, tell: Callable[[str], None] = lambda name: None
) -> dict[str, memory.Footprint]:
    """Return what a step of backprop, of its best checkpointing, and of a recipe need, by name.

    Raises:
        LocalizeError: the model cannot be made, or the method does not take it.
    """
    best, checkpoint = checkpointing(recipe, batch_size, tell)
    entries = [Entry(BACKPROP, _plain(recipe, BACKPROP)), *([] if checkpoint.refused else [best])]
    entries.append(Entry(recipe.method, recipe))
    return {entry.name: memory.predict(built(entry, data=False), batch_size) for entry in entries}


def checkpointing(
    model: Recipe, batch_size: int, tell: Callable[[str], None], under: Conditions = PLAIN
) -> tuple[Entry, Row]:
    """Return the schedule of activation checkpointing that needs the least memory of those tried, and its costs."""
    tried = schedules(model) or [Entry(CHECKPOINTING, _plain(model, CHECKPOINTING))]
    row = least([_told(cost(entry, batch_size, under), tell) for entry in tried])
    return next(entry for entry in tried if entry.name == row.method), row


def schedules(model: Recipe) -> list[Entry]:
    """Return schedules of activation checkpointing of a model, by the number of local layers in a segment."""
    trunk = built(Entry(BACKPROP, _plain(model, BACKPROP)), data=False).plan.segments.trunk
    layers = len(cuts.local_layers(trunk, methods.get(CHECKPOINTING)().grain))
    counts = sorted({count for size in GROUPS if (count := -(-layers // size)) > 1}, reverse=True)
    return [Entry(f"{CHECKPOINTING} -K {k}", replace(_plain(model, CHECKPOINTING), cut=CutSpec(k))) for k in counts]


def least(rows: Sequence[Row]) -> Row:
    """Return the row that needs the least memory; of several, the one that computes least."""
    found = [row for row in rows if row.peak_bytes is not None]
    return min(found or rows, key=lambda row: (row.peak_bytes or 0, row.macs or 0))


def measured(
    entries: Sequence[Entry],
    batch_size: int,
    *,
    device: str,
    compiled: bool = False,
    under: Conditions = PLAIN,
    steps: int = 5,
) -> dict[str, float]:
    """Return the median time of a step of every method in seconds, by its name, on random images.

    The steps of all methods are interleaved, so that what slows the machine slows all of them.

    Raises:
        MissingError: there is no such device here.
    """
    where = choose_device(device)
    made = []
    for entry in entries:
        local = built(entry, data=True).to(where).train()
        local = compile(local) if compiled else local
        x, y = build.random_batch(local, batch_size)
        made.append((entry.name, local, x.to(where), y.to(where), under.optimizer(local.param_groups(lr=0.01))))
    times: dict[str, list[float]] = {entry.name: [] for entry in entries}
    for number in range(WARM + steps):
        for name, local, x, y, optimizer in made:
            start = now(where)
            with under.around(where.type):
                local.step(x, y, optimizer)
            if number >= WARM:
                times[name].append(now(where) - start)
    return {name: statistics.median(found) for name, found in times.items()}


def verdict(rows: Sequence[Row]) -> list[str]:
    """Say in words what is better than what: the local methods, beside backprop and checkpointing.

    Args:
        rows: as :func:`compare` returns them.
    """
    found = {row.method: row for row in rows if not row.refused}
    base = found.get(BACKPROP)
    checkpoint = next((row for name, row in found.items() if name.startswith(CHECKPOINTING)), None)
    local = [row for name, row in found.items() if row not in (base, checkpoint) and name != ACCUMULATION]
    if base is None or checkpoint is None or not local:
        return []
    share, times = checkpoint.peak_bytes / base.peak_bytes, checkpoint.macs / base.macs
    told = [
        f"activation checkpointing ({checkpoint.method}) needs {share:.1%} of backprop's memory for {times:.2f} times "
        "its arithmetic, and learns what backprop learns."
    ]
    worse = [row.method for row in local if row.peak_bytes >= checkpoint.peak_bytes]
    better = [row.method for row in local if row.peak_bytes < checkpoint.peak_bytes]
    if worse:
        told.append(f"where memory is the only concern, it is the better choice than {', '.join(worse)}.")
    if better:
        told.append(f"less memory than it: {', '.join(better)}.")
    for row in local:
        if row.peak_bytes > base.peak_bytes:
            told.append(f"{row.method} needs more memory than backprop: {row.remark}.")
    cheap = [row.method for row in local if row.method in better and row.macs < base.macs]
    if cheap:
        told.append(f"less memory than it, and less arithmetic than backprop: {', '.join(cheap)}.")
    return told


def built(entry: Entry, *, data: bool) -> LocalModel:
    """Return the local model of an entry, with or without data.

    Raises:
        LocalizeError: the method does not take the model.
    """
    local = build.build(entry.recipe, data=data)
    if not entry.summed:
        return local
    program = lower(local.plan, summed=True)
    return LocalModel(local.trunk, local.heads, local.plan, program, emit(program))


def _plain(recipe: Recipe, method: str) -> Recipe:
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
