"""Costs of methods on one model, compared with the rivals of local learning: backprop with less memory.

Costs are those of the generated steps, see :mod:`localize.estimate.memory`. The rivals are in
:mod:`localize.estimate.rivals`; local losses that are summed and differentiated together are another one.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from localize import build
from localize.codegen.lower import sums_losses
from localize.estimate import memory, resident
from localize.estimate.memory import PLAIN, Conditions
from localize.estimate.processes import each
from localize.estimate.repeats import Known
from localize.estimate.rivals import Entry, Row, best_rival, built, checkpointing, cost, least, plain, rivals
from localize.estimate.timing import now
from localize.methods import BACKPROP
from localize.recipes import Recipe
from localize.runtime.collector import rare_collections
from localize.runtime.compiled import compile
from localize.runtime.devices import choose_device

WARM = 2
"""Number of steps to run before steps are timed."""


Cost = TypeVar("Cost", int, float)
"""Bytes, multiply-adds or seconds."""


@rare_collections()
def compare(
    recipes: Mapping[str, Recipe],
    model: Recipe,
    batch_size: int,
    *,
    device: str | None = None,
    compiled: bool = False,
    under: Conditions = PLAIN,
    processes: int = 1,
    tell: Callable[[str], None] = lambda name: None,
) -> list[Row]:
    """Return the costs of methods, with backprop and its rivals first.

    Args:
        recipes: local methods by the names of their rows.
        model: a recipe that names the model; its method is not used.
        batch_size: N, the number of images.
        device: where steps are run and timed on random images; None: nothing is run.
        compiled: compile the steps that are timed (:func:`localize.compile`).
        under: optimizer and autocast of all steps.
        processes: how many follow steps at a time, see :func:`localize.estimate.processes.each`.
        tell: called with each name after its row, or its schedule of checkpointing, is known.

    Returns:
        A row for each method, with bytes, multiply-adds and seconds.

    Raises:
        LocalizeError: the model cannot be made.
    """
    known: Known = {}
    found = rivals(model, batch_size, tell, under, known, processes=processes)
    asked = [Entry(name, recipe) for name, recipe in recipes.items()]
    summed = False
    for entry, row in zip(asked, each(lambda e: cost(e, batch_size, under, known), asked, processes), strict=True):
        found.append((entry, row))
        tell(entry.name)
        if not summed and not row.refused and sums_losses(built(entry, data=False).plan):
            summed = True
            other = replace(entry, name=f"{entry.name}, losses summed", summed=True)
            found.append((other, cost(other, batch_size, under)))
            tell(other.name)
    entries, rows = map(list, zip(*found, strict=True))
    if device is None:
        return rows
    runs = [e for e, row in zip(entries, rows, strict=True) if not row.refused and not (e.fused or e.efficient)]
    times = measured(runs, batch_size, device=device, compiled=compiled, under=under)
    held: dict[str, int | None] = {}
    if choose_device(device).type == "cpu" and not compiled:
        for entry in (entry for entry in runs if not entry.summed):
            held[entry.name] = resident.measured(entry.recipe, batch_size, opt=under.opt, autocast=under.autocast)
            tell(f"{entry.name}, resident")
    return [replace(row, seconds=times.get(row.method), resident_bytes=held.get(row.method)) for row in rows]


def footprints(
    recipe: Recipe, batch_size: int, *, tell: Callable[[str], None] = lambda name: None
) -> dict[str, memory.Footprint]:
    """Return the memory and arithmetic of a step of backprop, of its best checkpointing, and of a recipe, by name.

    Raises:
        LocalizeError: the model cannot be made, or the method does not support it.
    """
    best, checkpoint = checkpointing(recipe, batch_size, tell)
    entries = [Entry(BACKPROP, plain(recipe, BACKPROP)), *([] if checkpoint.refused else [best])]
    entries.append(Entry(recipe.method, recipe))
    return {entry.name: memory.predict(built(entry, data=False), batch_size) for entry in entries}


def measured(
    entries: Sequence[Entry],
    batch_size: int,
    *,
    device: str,
    compiled: bool = False,
    under: Conditions = PLAIN,
    steps: int = 5,
) -> dict[str, float]:
    """Return the median time in seconds of a step of each method on random images, by name.

    The steps of all methods are interleaved, so that other work on the machine slows all of them alike.

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


def known(cost: Cost | None) -> Cost:
    """Return a cost that is not None, because its row is not refused."""
    assert cost is not None, "only refused rows lack costs"
    return cost


def verdict(rows: Sequence[Row]) -> list[str]:
    """Return sentences that compare the local methods with their rivals.

    Args:
        rows: as :func:`compare` returns them.
    """
    found = [row for row in rows if not row.refused and row.peak_bytes is not None]
    base = next((row for row in found if row.method == BACKPROP), None)
    local = [row for row in found if row.local]
    single, both = best_rival(found, combined=False), best_rival(found, combined=True)
    if base is None or single is None or both is None or not local or len(found) - len(local) < 2:
        return []

    def about(row: Row) -> str:
        time = "" if row.predicted_seconds is None else f", {_times(row, base):.2f} times its time"
        return f"{row.method} ({known(row.peak_bytes) / known(base.peak_bytes):.1%} of backprop's memory{time})"

    keep = [row.method for row in found if row.keeps_gradients and row is not base]
    told = [f"same gradients as backprop: {', '.join(keep) or 'none except backprop'}."]
    if others := [row.method for row in found if row.changes_statistics]:
        told.append(f"other BatchNorm statistics, and so other gradients: {', '.join(others)}.")
    told.append(f"leanest with one way to save memory: {about(single)}.")
    if both is not single:
        told.append(f"leanest with two ways: {about(both)}.")
    told.append(f"leanest local method: {about(least(local))}.")
    better = [row for row in local if known(row.peak_bytes) < known(single.peak_bytes)]
    worse = [row for row in local if row not in better]
    if better:
        told.append(f"less memory than {single.method}: {', '.join(row.method for row in better)}.")
    else:
        told.append("if memory is the only concern, local learning is the wrong tool for this net and batch.")
    told += [f"{row.method} needs more than {single.method}: {row.remark}." for row in worse]
    if quick := [row.method for row in better if row.predicted_seconds and _times(row, base) < 1]:
        told.append(f"less memory than backprop, in no more predicted time: {', '.join(quick)}.")
    return told


def _times(row: Row, base: Row) -> float:
    """Return the predicted time of a row as a multiple of another's."""
    return (row.predicted_seconds or 0.0) / (base.predicted_seconds or 1.0)
