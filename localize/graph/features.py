"""Infer how the values of a tensor are laid out: which dimension holds the channels, which tokens are read.

What is shown by the graph counts, and nothing else: the modules that take a value show its channels; the reshape that
made tokens of a map shows their grid, and which tokens are no places of it; where a token is taken out, or tokens are
averaged, the model shows how it reads them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import fx, nn

from localize.graph.links import Reading, image_shape, links_of, merged_places, operation_name, reduced_tokens
from localize.ir import Features, facts, path_of, set_facts, shape_of
from localize.torch_names import CONVOLUTIONS, POOLS, RUNNING_NORMS


def add_features(graph: fx.Graph, twin: nn.Module, input_shape: tuple[int, ...]) -> None:
    """Write to every value that has a batch dimension how its values are laid out: ``meta["features"]``.

    Args:
        graph: a recorded forward.
        twin: the model that it belongs to.
        input_shape: shape of one image, without the batch dimension.
    """
    layouts = _Layouts(graph, twin, input_shape)
    for node in layouts.nodes:
        if image_shape(node):
            set_facts(node, features=layouts.of(node))
        elif _is_folded(node):
            set_facts(node, features=Features("map", (facts(node).fold, *shape_of(node)[1:]), 3))


def _is_folded(node: fx.Node) -> bool:
    """Tell whether a value is tokens of parts of the images, (k N, T, C), k parts of an image one after another.

    The order of dimension 0 is that of the reshape that folded it; it is not followed everywhere.
    """
    if facts(node).fold < 2 or len(shape_of(node)) != 3:
        return False
    front, seen = [node], {node}
    while front:
        current = front.pop()
        name = getattr(current.target, "__name__", current.target)
        sources = [source for source in current.all_input_nodes if facts(source).fold]
        if name in ("reshape", "view", "flatten"):
            if facts(sources[0]).batched:
                return True
        elif name == "transpose":
            if 0 in current.args[1:]:
                continue
        elif current.op != "call_module" and name not in ("add", "iadd", "add_"):
            continue
        front += [source for source in sources if source not in seen and not facts(source).batched]
        seen.update(sources)
    return False


def describe(layout: Features) -> str:
    """Say how values are laid out, in the words of a recipe: ``tokens, channels 2, token mean, prefix 1``."""
    words = [layout.kind, f"channels {layout.channels}"]
    if layout.kind == "tokens":
        words += [f"token {layout.token}", f"prefix {layout.prefix}"]
        words += [f"grid {'x'.join(map(str, layout.grid))}"] if layout.grid else []
    return words[0] if layout.kind == "flat" else ", ".join(words)


class _Layouts:
    """The layouts of the values of one recorded graph."""

    def __init__(self, graph: fx.Graph, twin: nn.Module, input_shape: tuple[int, ...]) -> None:
        self.nodes = list(graph.nodes)
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self.twin = twin
        self.places = input_shape[1:]
        """Dimensions of the grid that tokens are taken from: height and width of images."""

    def of(self, node: fx.Node) -> Features:
        """Infer how the values of a tensor are laid out, from the operations that make and read it."""
        shape = shape_of(node)
        if len(shape) == 1:
            return Features("flat", shape, 1)
        shown = [axis for axis in (0, len(shape) - 1) if (node, axis) in self._hops]
        if len(shape) > 2:
            axis = min(shown, key=lambda axis: self._hops[node, axis], default=len(shape) - 1)
            return Features("map", shape, axis + 1)
        if not shown:
            shown = [1 - axis for axis in (0, 1) if (node, axis) in self._grids]
        channels = min(shown, key=lambda axis: self._hops.get((node, axis), 0), default=1)
        return self._tokens(node, 1 - channels)

    def _tokens(self, node: fx.Node, axis: int) -> Features:
        """Return the layout of tokens that lie along a dimension of a value."""
        count = shape_of(node)[axis]
        grid = self._grids.get((node, axis))
        if grid is not None and grid.stop != count:
            grid = None
        token, prefix = self._reading(node, axis)
        if grid is not None and not prefix:
            prefix = grid.start
        elif token == "class" and grid is None:
            prefix = min(1, count - 1)
        shown = grid.shape if grid is not None and grid.start == prefix else ()
        return Features("tokens", shape_of(node), 2 - axis, token, prefix, shown)

    # -- channels

    @cached_property
    def _hops(self) -> dict[tuple[fx.Node, int], int]:
        """How far dimensions are from an operation that takes or makes them as channels; what makes them counts first.

        Dimensions are followed through whatever keeps them, in both directions.
        """
        joined: dict[tuple[fx.Node, int], list[tuple[fx.Node, int]]] = {}
        hops: dict[tuple[fx.Node, int], int] = {}
        for node in self.nodes:
            for link in links_of(node):
                one, other = (node, link.axis), (link.source, link.source_axis)
                joined.setdefault(one, []).append(other)
                joined.setdefault(other, []).append(one)
            for value, axis, made in _channels(node, self.twin):
                hops[value, axis] = min(hops.get((value, axis), 1), 0 if made else 1)
        front = deque(sorted(hops, key=hops.__getitem__))
        while front:
            here = front.popleft()
            for there in joined.get(here, ()):
                if there not in hops:
                    hops[there] = hops[here] + 2
                    front.append(there)
        return hops

    # -- tokens

    @cached_property
    def _grids(self) -> dict[tuple[fx.Node, int], _Grid]:
        """For dimensions that hold the places of a grid one after the other: where the grid starts, and its shape."""
        found: dict[tuple[fx.Node, int], _Grid] = {}
        for node in self.nodes:
            for source, axes, axis in merged_places(node):
                places = tuple(shape_of(source)[a] for a in axes)
                known = [a for a in range(len(shape_of(source))) if (source, a) in self._hops]
                channels = min(known, key=lambda a: self._hops[source, a], default=None)
                if channels not in axes and self._is_image(places):
                    found.setdefault((node, axis), _Grid(0, places))
            for link in links_of(node):
                grid = found.get((link.source, link.source_axis))
                if grid is not None and link.start <= grid.start and grid.stop <= link.stop:
                    found.setdefault((node, link.axis), _Grid(grid.start + link.shift, grid.shape))
        return found

    def _is_image(self, grid: tuple[int, ...]) -> bool:
        """Tell whether a grid has the dimensions of the input, and its height the same share of the width."""
        if len(grid) != len(self.places):
            return False
        if len(grid) < 2:
            return True
        (h, w), (height, width) = grid[-2:], self.places[-2:]
        return abs(h * width / height - w) <= 1 and abs(w * height / width - h) <= 1

    @cached_property
    def _readings(self) -> dict[tuple[fx.Node, int], dict[Reading, int]]:
        """How dimensions are reduced to one place later on, each with the number of the last node that does so.

        Places are counted in that dimension.
        """
        found: dict[tuple[fx.Node, int], dict[Reading, int]] = {}
        for node in reversed(self.nodes):
            for source, axis, reading in reduced_tokens(node):
                found.setdefault((source, axis), {}).setdefault(reading, self.order[node])
            for link in links_of(node):
                for reading, last in found.get((node, link.axis), {}).items():
                    start = max(reading.start - link.shift, link.start)
                    stop = min(reading.stop - link.shift, link.stop)
                    if start < stop:
                        known = found.setdefault((link.source, link.source_axis), {})
                        moved = Reading(reading.token, start, stop)
                        known[moved] = max(last, known.get(moved, last))
        return found

    def _reading(self, node: fx.Node, axis: int) -> tuple[Literal["class", "mean"], int]:
        """Return how the model reads tokens in the end: the first one (``class``), or the mean after a prefix."""
        known = self._readings.get((node, axis), {})
        useful = {r: last for r, last in known.items() if r.token == "mean" or r.start == 0}
        if not useful:
            return "mean", 0
        reading = max(useful, key=useful.__getitem__)
        return (reading.token, reading.start) if reading.token == "mean" else ("class", 0)


@dataclass(frozen=True)
class _Grid:
    """Places of a grid, one after the other from ``start`` on."""

    start: int
    shape: tuple[int, ...]

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.shape)


def _channels(node: fx.Node, twin: nn.Module) -> Iterator[tuple[fx.Node, int, bool]]:
    """Yield the dimensions that an operation takes for channels: of what it reads, and of what it makes."""
    module = twin.get_submodule(path_of(node)) if node.op == "call_module" else None
    name = operation_name(node) if module is None else ""
    for value in (*node.all_input_nodes[:1], node):
        shape = image_shape(value)
        if shape is None or len(shape) < 2:
            continue
        if isinstance(module, nn.LayerNorm):
            side = _normalised(module, shape)
        elif isinstance(module, _FIRST_MODULES) or (module is None and name in _FIRST):
            side = 0
        elif isinstance(module, _LAST_MODULES) or (module is None and name in _LAST):
            side = len(shape) - 1
        else:
            return
        if side is not None:
            yield value, side, value is node


_FIRST_MODULES = (
    CONVOLUTIONS, RUNNING_NORMS, nn.GroupNorm,
    *POOLS,
)  # fmt: skip


_FIRST = {
    *(f"conv{n}d" for n in (1, 2, 3)), "batch_norm", "group_norm", "instance_norm", "interpolate",
    *(f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg") for n in (1, 2, 3)),
}  # fmt: skip


_LAST_MODULES = (nn.Linear, nn.MultiheadAttention, nn.RMSNorm)


_LAST = {"linear", "layer_norm", "rms_norm"}


def _normalised(norm: nn.LayerNorm, shape: tuple[int, ...]) -> int | None:
    """Return the dimension that a LayerNorm takes for channels: the last, or, in kinds for maps, the first."""
    if len(norm.normalized_shape) > 1:
        return None
    width, last = norm.normalized_shape[0], len(shape) - 1
    first = len(shape) == 3 and shape[0] == width and (shape[-1] != width or type(norm).__name__.endswith("2d"))
    return 0 if first else last
