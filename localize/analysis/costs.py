"""Accuracies of runs against the costs of a training step: peak memory, arithmetic, and measured time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from localize.analysis.seeds import grouped, mean
from localize.errors import OptionError
from localize.estimate import compare
from localize.estimate.compare import Entry
from localize.train.loaded import LoadedRun

COSTS = {"peak": "peak memory, MiB", "macs": "multiply-adds of a step, 10⁹", "seconds": "measured time of a step, ms"}
_UNITS = {"peak": 2**20, "macs": 10**9, "seconds": 1e-3}


@dataclass(frozen=True)
class Cost:
    """Accuracies of the runs of one recipe, and the costs of a step."""

    runs: tuple[str, ...]
    """Runs that differ only in the seed."""
    accuracies: tuple[float, ...]
    """Test accuracy (0..1) of each run in its last epoch."""
    peak: float | None = None
    """Peak bytes of live tensors in a step, predicted from its text."""
    macs: float | None = None
    """Multiply-adds of a step, forward and backward."""
    seconds: float | None = None
    """Median seconds of a step, measured on this machine."""
    refused: str = ""
    """Why the costs are unknown; empty if they are known."""

    @property
    def accuracy(self) -> float:
        """The mean of the accuracies."""
        return mean(self.accuracies)

    def told(self, cost: str) -> float | None:
        """Return a cost in its display unit: MiB, 10⁹ multiply-adds, or ms."""
        value = getattr(self, cost)
        return None if value is None else value / _UNITS[cost]


@dataclass(frozen=True)
class Costs:
    """Accuracy and cost of all runs."""

    by: Mapping[str, Cost]
    """Costs by the name of the recipe, see :func:`localize.analysis.seeds.grouped`."""
    batch_size: int
    """Number of images in the compared steps."""
    device: str
    """Device on which steps were timed."""

    def front(self, cost: str) -> list[str]:
        """Return the names on the Pareto front, cheapest first: no other is both at least as cheap and as accurate."""
        known = {name: (value, -one.accuracy) for name, one in self.by.items() if (value := one.told(cost)) is not None}
        return sorted(front(list(known.values()), list(known)), key=known.__getitem__)

    def csv(self) -> Iterator[list[Any]]:
        """Yield one line for each recipe."""
        names = ["lowest_accuracy", "highest_accuracy", "peak_bytes", "multiply_adds", "seconds"]
        yield ["recipe", "runs", "accuracy", *names, *(f"on_front_of_{cost}" for cost in COSTS), "refused"]
        fronts = {cost: self.front(cost) for cost in COSTS}
        for name, one in self.by.items():
            low, high = min(one.accuracies), max(one.accuracies)
            on = [int(name in fronts[cost]) for cost in COSTS]
            yield [name, len(one.runs), one.accuracy, low, high, one.peak, one.macs, one.seconds, *on, one.refused]

    def plain(self) -> dict[str, Any]:
        """Return all costs, and the fronts."""
        recipes = [
            {
                "recipe": name, "runs": one.runs, "accuracies": one.accuracies, "accuracy": one.accuracy,
                "peak_bytes": one.peak, "multiply_adds": one.macs, "seconds": one.seconds, "refused": one.refused,
            }
            for name, one in self.by.items()
        ]  # fmt: skip
        fronts = {cost: self.front(cost) for cost in COSTS}
        return {"batch_size": self.batch_size, "device": self.device, "recipes": recipes, "fronts": fronts}

    def table(self) -> list[list[str]]:
        """Return one line for each recipe; a star marks the front of each cost."""
        fronts = {cost: self.front(cost) for cost in COSTS}
        lines = [["recipe", "test accuracy", *COSTS.values()]]
        for name, one in self.by.items():
            cells = []
            for cost in COSTS:
                value = one.told(cost)
                cells.append("?" if value is None else f"{value:,.4g}{' *' if name in fronts[cost] else '  '}")
            lines.append([name, f"{100 * one.accuracy:.2f} %", *cells])
        return lines

    def notes(self) -> list[str]:
        """Return the meaning of the stars, and reasons for missing costs."""
        told = [f"steps of {self.batch_size} images; * on the Pareto front; time on {self.device}"]
        return [*told, *(f"{name}: {one.refused}" for name, one in self.by.items() if one.refused)]


def front(points: Sequence[tuple[float, ...]], names: Sequence[str]) -> list[str]:
    """Return the names of the points that no other point dominates, that is: as low in all values and lower in one."""
    return [
        name
        for name, point in zip(names, points, strict=True)
        if not any(other != point and all(a <= b for a, b in zip(other, point, strict=True)) for other in points)
    ]


def cost(runs: Mapping[str, LoadedRun], *, batch_size: int | None = None, timed: bool = True) -> Costs:
    """Compare the accuracies of runs with the costs of their steps, at the same number of images.

    Args:
        runs: runs from :func:`localize.load`, by name.
        batch_size: images in a step; default: that of the first run.
        timed: run a few interleaved steps of each run on random images, on the model's device; the median counts.

    Returns:
        Accuracies (0..1), bytes, multiply-adds and seconds of each recipe.

    Raises:
        OptionError: a run has no finished epoch.
    """
    first = next(iter(runs.values()))
    size = batch_size or int(first.recipe.train["batch_size"])
    device = str(next(first.model.parameters()).device)
    found, entries = {}, []
    for name, members in grouped({folder: run.recipe for folder, run in runs.items()}).items():
        for member in members:
            if not runs[member].metrics:
                raise OptionError(f"{member} has no finished epoch.", help="localize train --resume, or another run")
        accuracies = tuple(runs[member].metrics[-1].test_accuracy for member in members)
        entry = Entry(name, runs[members[0]].recipe)
        row = compare.cost(entry, size)
        found[name] = Cost(members, accuracies, row.peak_bytes, row.macs, refused=row.refused)
        entries += [] if row.refused else [entry]
    times: Mapping[str, float] = {}
    if timed and entries:
        times = compare.measured(entries, size, device=device)
    by = {
        name: Cost(one.runs, one.accuracies, one.peak, one.macs, times.get(name), one.refused)
        for name, one in found.items()
    }
    return Costs(by, size, device)
