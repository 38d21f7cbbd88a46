"""Comparisons that depend on sharing the optimizer's moments among losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from localize.estimate.compare import Entry, Row, built, cost
from localize.estimate.memory import PLAIN, Conditions
from localize.methods import BACKPROP, CHECKPOINTING
from localize.recipes import Recipe

SHARED = {"moments": "shared"}


def suggestions(
    rows: Sequence[Row],
    recipes: Mapping[str, Recipe],
    batch_size: int,
    under: Conditions = PLAIN,
    *,
    tell: Callable[[str], None] = lambda name: None,
) -> Iterator[str]:
    """Yield a sentence for every method that needs less memory than a rival only if its losses share moments.

    By default, a block that several losses train has a set of moments for each of them. With ``moments=shared`` it has
    only one. It then trains differently: the optimizer averages the gradients of all losses.

    Args:
        rows: as :func:`localize.estimate.compare.compare` returns them.
        recipes: the local methods, by the names of their rows.
        batch_size: N, the number of images.
        under: optimizer and autocast of all steps.
        tell: called with each name after its prediction.
    """
    found = {row.method: row for row in rows if row.peak_bytes is not None}
    rivals = [row for name, row in found.items() if name == BACKPROP or name.startswith(CHECKPOINTING)]
    rivals.sort(key=lambda row: row.peak_bytes or 0)
    for name, recipe in recipes.items():
        peak = found[name].peak_bytes if name in found else None
        above = [rival for rival in rivals if peak is not None and rival.peak_bytes is not None
                 and rival.peak_bytes <= peak]  # fmt: skip
        if not above or not _has_several(recipe):
            continue
        row = cost(Entry(name, replace(recipe, options={**recipe.options, **SHARED})), batch_size, under)
        tell(f"{name}, moments=shared")
        beaten = [rival for rival in above if row.peak_bytes is not None and row.peak_bytes < (rival.peak_bytes or 0)]
        if beaten and peak is not None and row.peak_bytes is not None:
            yield (
                f"{name} needs less memory than {beaten[0].method} only with moments=shared: "
                f"{row.peak_bytes / 2**20:,.1f} MiB instead of {peak / 2**20:,.1f}; its losses then share the moments "
                "of the optimizer, and train differently."
            )


def _has_several(recipe: Recipe) -> bool:
    """Return whether losses of a step have separate moments for a block that they share."""
    plan = built(Entry(recipe.method, recipe), data=False).plan
    trained = [name for loss in plan.losses for name in loss.reach]
    return "moments" in plan.options and plan.moments == "per-loss" and len(trained) > len(set(trained))
