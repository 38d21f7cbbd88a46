"""How fast runs converge: training loss and accuracy over epochs, seeds of one recipe together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from localize.analysis.seeds import grouped, mean
from localize.errors import OptionError
from localize.train.loaded import LoadedRun
from localize.train.metrics import EpochMetrics

QUANTITIES = {"train_loss": "training loss of the output layer", "test_accuracy": "test accuracy"}


@dataclass(frozen=True)
class Convergence:
    """Metrics of the model's own output in each epoch of runs."""

    by: Mapping[str, tuple[EpochMetrics, ...]]
    """Epochs of each run."""
    groups: Mapping[str, tuple[str, ...]]
    """Runs of one recipe with several seeds, by the name of the group."""

    def averaged(self, quantity: str) -> dict[str, list[tuple[int, float, float, float]]]:
        """Return tuples by group: epoch, mean over the seeds that have this epoch, lowest and highest value."""
        found = {}
        for group, members in self.groups.items():
            values: dict[int, list[float]] = {}
            for member in members:
                for epoch in self.by[member]:
                    values.setdefault(epoch.epoch, []).append(getattr(epoch, quantity))
            found[group] = [(epoch, mean(v), min(v), max(v)) for epoch, v in sorted(values.items())]
        return found

    @property
    def common(self) -> float:
        """The highest test accuracy (0..1) that every group reaches."""
        return min(max(value for _, value, *_ in line) for line in self.averaged("test_accuracy").values())

    @property
    def reached(self) -> dict[str, int]:
        """The first epoch in which each group's mean test accuracy is at least :attr:`common`."""
        goal = self.common
        lines = self.averaged("test_accuracy")
        return {group: next(epoch for epoch, value, *_ in line if value >= goal) for group, line in lines.items()}

    def csv(self) -> Iterator[list[Any]]:
        """Yield one line for each epoch of each run."""
        yield ["run", "group", "epoch", "train_loss", "train_accuracy", "test_accuracy", "seconds"]
        for group, members in self.groups.items():
            for run in members:
                for one in self.by[run]:
                    told = (one.train_loss, one.train_accuracy, one.test_accuracy, one.seconds)
                    yield [run, group, one.epoch, *told]

    def plain(self) -> dict[str, Any]:
        """Return epochs by run, and the epoch in which each group reached the common accuracy."""
        header, *lines = self.csv()
        epochs: dict[str, list[dict[str, Any]]] = {run: [] for run in self.by}
        for run, _, *values in lines:
            epochs[run].append(dict(zip(header[2:], values, strict=True)))
        return {"epochs": epochs, "groups": self.groups, "common": self.common, "reached": self.reached}

    def table(self) -> list[list[str]]:
        """Return one line for each group."""
        goal = f"epochs to {100 * self.common:.2f} %"
        lines = [["run", "epochs", "training loss", "test accuracy", "best", goal]]
        losses, reached = self.averaged("train_loss"), self.reached
        for group, line in self.averaged("test_accuracy").items():
            best = max(value for _, value, *_ in line)
            last = f"{100 * line[-1][1]:.2f} %"
            lines.append(
                [group, str(len(line)), f"{losses[group][-1][1]:.4g}", last, f"{100 * best:.2f} %", str(reached[group])]
            )
        return lines

    def notes(self) -> list[str]:
        """Return no notes; the table is complete."""
        return []


def convergence(runs: Mapping[str, LoadedRun]) -> Convergence:
    """Return the convergence of runs.

    Args:
        runs: runs from :func:`localize.load`, by name.

    Returns:
        Losses and accuracies (0..1) by epoch.

    Raises:
        OptionError: a run has no finished epoch.
    """
    for name, run in runs.items():
        if not run.metrics:
            raise OptionError(f"{name} has no finished epoch.", help="localize train --resume, or another run")
    return Convergence(
        {name: run.metrics for name, run in runs.items()}, grouped({n: r.recipe for n, r in runs.items()})
    )
