"""The common interface of analysis results; and results by depth, for several runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from localize.analysis.seeds import mean


class Found(Protocol):
    """The results of an analysis, for files and terminals."""

    def csv(self) -> Iterable[Sequence[Any]]:
        """Yield the lines of a CSV file with all numbers; the names of the columns come first."""
        ...

    def plain(self) -> dict[str, Any]:
        """Return the results as plain values for JSON; unknown values are None."""
        ...

    def table(self) -> list[list[str]]:
        """Return the lines of a table for a terminal; the names of the columns come first."""
        ...

    def notes(self) -> list[str]:
        """Return sentences to print after the table."""
        ...


@dataclass(frozen=True)
class Layer:
    """Results for one layer of a run."""

    name: str
    """The layer at which its segment ends."""
    depth: float
    """Share of the segments up to its end (0..1); 0 is the image."""
    values: Mapping[str, float]
    """Values by quantity."""


@dataclass(frozen=True)
class Depths:
    """Quantities by depth, for several runs."""

    title: str
    quantities: Mapping[str, str]
    """Name of each quantity on an axis."""
    by: Mapping[str, tuple[Layer, ...]]
    """Layers of every run, starting with the images."""
    groups: Mapping[str, tuple[str, ...]]
    """Runs of one recipe with several seeds, by the name of the group; see :func:`localize.analysis.seeds.grouped`."""
    drawn: tuple[str, ...] = ()
    """Quantities in the picture; empty for all."""
    baseline: str = ""
    """Name of the group with which others are compared, drawn in grey."""
    said: tuple[str, ...] = ()

    def averaged(self, quantity: str) -> dict[str, list[tuple[str, float, float, float, float]]]:
        """Return tuples for layers by group: name, depth, mean over the seeds, lowest and highest value."""
        found = {}
        for group, members in self.groups.items():
            layers = zip(*(self.by[member] for member in members), strict=True)
            found[group] = [
                (same[0].name, same[0].depth, mean(values), min(values), max(values))
                for same in layers
                if (values := [one.values[quantity] for one in same if quantity in one.values])
            ]
        return found

    def csv(self) -> Iterator[list[Any]]:
        """Yield one line for each layer of each run."""
        yield ["run", "group", "layer", "depth", *self.quantities]
        for group, members in self.groups.items():
            for run in members:
                for layer in self.by[run]:
                    yield [run, group, layer.name, layer.depth, *(layer.values.get(q) for q in self.quantities)]

    def plain(self) -> dict[str, Any]:
        """Return the layers of each run, and which runs differ only in the seed."""
        layers = {
            run: [{"layer": one.name, "depth": one.depth, **one.values} for one in found]
            for run, found in self.by.items()
        }
        return {"layers": layers, "groups": self.groups}

    def table(self) -> list[list[str]]:
        """Return one line for each layer of each group; runs of one recipe are averaged."""
        several = len(self.groups) > 1
        lines = [[*(["run"] if several else []), "after", *self.quantities.values()]]
        columns = [self.averaged(quantity) for quantity in self.quantities]
        for group in self.groups:
            known = [{name: value for name, _, value, _, _ in column[group]} for column in columns]
            for layer in self.by[self.groups[group][0]]:
                cells = [f"{one[layer.name]:.3f}" if layer.name in one else "" for one in known]
                lines.append([*([group] if several else []), layer.name, *cells])
        return lines

    def notes(self) -> list[str]:
        """Return the sentences that go with the numbers."""
        return list(self.said)
