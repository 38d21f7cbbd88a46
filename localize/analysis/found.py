"""What an analysis returns, whichever it is; and what is found by depth, of several runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from localize.analysis.seeds import mean


class Found(Protocol):
    """The numbers of an analysis, as files and terminals take them."""

    def csv(self) -> Iterable[Sequence[Any]]:
        """Yield the lines of a CSV file, names of the columns first: all numbers."""
        ...

    def plain(self) -> dict[str, Any]:
        """Return what JSON can hold; None for what is not known."""
        ...

    def table(self) -> list[list[str]]:
        """Return what a terminal shows: lines of a table, names of the columns first."""
        ...

    def notes(self) -> list[str]:
        """Return sentences that follow the table."""
        ...


@dataclass(frozen=True)
class Layer:
    """What is known of one layer of a run."""

    name: str
    """Where its segment ends."""
    depth: float
    """Share of the segments up to its end (0..1); 0 is the image."""
    values: Mapping[str, float]
    """By quantity."""


@dataclass(frozen=True)
class Depths:
    """Quantities by depth, of several runs."""

    title: str
    quantities: Mapping[str, str]
    """What each quantity is called on an axis."""
    by: Mapping[str, tuple[Layer, ...]]
    """Layers of every run, from the images on."""
    groups: Mapping[str, tuple[str, ...]]
    """Runs of one recipe with several seeds, by the name of all; see :func:`localize.analysis.seeds.grouped`."""
    drawn: tuple[str, ...] = ()
    """Quantities in the picture; all where there are none."""
    baseline: str = ""
    """Name of the group that others are measured by, which is drawn in grey."""
    said: tuple[str, ...] = ()

    def averaged(self, quantity: str) -> dict[str, list[tuple[str, float, float, float, float]]]:
        """Return layers by group: name, depth, mean over the seeds, lowest and highest value."""
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
        """Return the layers of each run, and which runs differ in the seed alone."""
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
        """Return what is said beside the numbers."""
        return list(self.said)
