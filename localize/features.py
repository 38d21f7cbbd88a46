"""Infer how the values of a tensor are laid out: which dimension holds the channels, which tokens are read.

What is shown by the graph counts, and nothing else: the modules that take a value show its channels; the reshape that
made tokens of a map shows their grid, and which tokens are no places of it; where a token is taken out, or tokens are
averaged, the model shows how it reads them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from torch import fx, nn

from localize.errors import OptionError, did_you_mean
from localize.ir import Cut, Features, Stated, Trunk


def add_features(graph: fx.Graph, twin: nn.Module, input_shape: tuple[int, ...]) -> None:
    """Write to every value that has a batch dimension how its values are laid out: ``meta["features"]``.

    Args:
        graph: a recorded forward.
        twin: the model that it belongs to.
        input_shape: shape of one image, without the batch dimension.
    """
    layouts = _Layouts(graph, twin, input_shape)
    for node in layouts.nodes:
        if _shape(node):
            node.meta["features"] = layouts.of(node)
        elif _is_folded(node):
            node.meta["features"] = Features("map", (node.meta["fold"], *node.meta["shape"][1:]), 3)


def _is_folded(node: fx.Node) -> bool:
    """Tell whether a value is tokens of parts of the images, (k N, T, C), k parts of an image behind each other.

    The order of dimension 0 is that of the reshape that folded it; it is not followed everywhere.
    """
    if node.meta.get("fold", 0) < 2 or len(node.meta["shape"]) != 3:
        return False
    front, seen = [node], {node}
    while front:
        current = front.pop()
        name = getattr(current.target, "__name__", current.target)
        sources = [source for source in current.all_input_nodes if source.meta.get("fold")]
        if name in ("reshape", "view", "flatten"):
            if sources[0].meta["batched"]:
                return True
        elif name == "transpose":
            if 0 in current.args[1:]:
                continue
        elif current.op != "call_module" and name not in ("add", "iadd", "add_"):
            continue
        front += [source for source in sources if source not in seen and not source.meta["batched"]]
        seen.update(sources)
    return False


def state(trunk: Trunk, stated: Mapping[str, Stated | Sequence[Stated]], cuts: Iterable[Cut]) -> Trunk:
    """Return the trunk with layouts as they are stated, instead of as they were inferred.

    Args:
        trunk: the recorded model.
        stated: by the name of a cut, or a shell pattern of names: one statement for all values that cross, or one for
            each. A pattern leaves out the values that its statement does not fit.
        cuts: every cut of the trunk that can be named.

    Raises:
        OptionError: no such cut, or a statement that does not fit what crosses it.
    """
    known = {cut.name: cut for cut in cuts}
    values: dict[str, Features] = {}
    for pattern, statement in stated.items():
        names = [name for name in known if fnmatchcase(name, pattern)] if pattern not in known else [pattern]
        found: dict[str, Features] = {}
        for name in names:
            found |= _stated(known[name], statement, strict=name == pattern)
        if not found:
            raise OptionError(
                f"features of {pattern!r} are stated, and {trunk.name} has no {'such ' if names else ''}cut"
                f"{' whose values they fit' if names else ' of this name'}.",
                facts=f"cuts: {', '.join(known)}",
                help=did_you_mean(pattern, known) or "localize inspect MODEL",
            )
        values |= found
    graph, copies = fx.Graph(), {}
    result = graph.graph_copy(trunk.graph, copies)
    graph.output(result).meta = dict(next(reversed(trunk.graph.nodes)).meta)
    for node, copied in copies.items():
        copied.meta = dict(node.meta)
        if node.name in values:
            copied.meta["features"] = values[node.name]
    return replace(trunk, graph=graph)


def _stated(cut: Cut, statement: Stated | Sequence[Stated], *, strict: bool) -> dict[str, Features]:
    """Return the layouts of the values that cross a cut; unless ``strict``, without those that do not fit."""
    each = [statement] * len(cut.features) if isinstance(statement, Stated) else list(statement)
    if len(each) != len(cut.features):
        raise OptionError(
            f"features of {cut.name!r} are stated for {len(each)} values, and {len(cut.features)} cross there.",
            facts=f"shapes: {', '.join(str(f.shape) for f in cut.features)}",
            help="one statement for all, or one for each",
        )
    found = {}
    for value, inferred, one in zip(cut.values, cut.features, each, strict=False):
        problem, layout = _restated(inferred, one)
        if problem and strict:
            raise OptionError(
                f"features of {cut.name!r} cannot be as stated: {problem}.",
                facts=f"without the batch its shape is {inferred.shape}; inferred: {describe(inferred)}.",
                help="localize inspect MODEL shows what is inferred",
            )
        if not problem:
            found[value] = layout
    return found


def _restated(inferred: Features, stated: Stated) -> tuple[str, Features]:
    """Return what is wrong with a statement (nothing, if it fits), and the layout that it makes."""
    given = {key: value for key, value in asdict(stated).items() if value is not None}
    layout = replace(inferred, **given)
    rank = len(inferred.shape)
    if layout.kind != inferred.kind:
        return f"a value of {rank} dimensions is {inferred.kind}", inferred
    if layout.channels not in (1, rank):
        return f"channels lie in dimension 1 or {rank}", inferred
    if layout.kind != "tokens":
        wrong = next((key for key in ("token", "prefix", "grid") if key in given), None)
        return (f"{wrong} is said of tokens", inferred) if wrong else ("", layout)
    count = layout.shape[2 - layout.channels]
    if not 0 <= layout.prefix < count:
        return f"a prefix of {layout.prefix} leaves none of {count} tokens", inferred
    if math.prod(layout.grid or (count - layout.prefix,)) != count - layout.prefix:
        if "grid" in given:
            return f"behind the prefix {count - layout.prefix} tokens are left", inferred
        layout = replace(layout, grid=())
    return "", layout


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
        shape = tuple(node.meta["shape"])
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
        count = node.meta["shape"][axis]
        grid = self._grids.get((node, axis))
        if grid is not None and grid.stop != count:
            grid = None
        token, prefix = self._reading(node, axis)
        if grid is not None and not prefix:
            prefix = grid.start
        elif token == "class" and grid is None:
            prefix = min(1, count - 1)
        shown = grid.shape if grid is not None and grid.start == prefix else ()
        return Features("tokens", tuple(node.meta["shape"]), 2 - axis, token, prefix, shown)

    # -- channels

    @cached_property
    def _hops(self) -> dict[tuple[fx.Node, int], int]:
        """How far dimensions are from an operation that takes or makes them as channels; what makes them counts first.

        Dimensions are followed through whatever keeps them, in both directions.
        """
        joined: dict[tuple[fx.Node, int], list[tuple[fx.Node, int]]] = {}
        hops: dict[tuple[fx.Node, int], int] = {}
        for node in self.nodes:
            for link in _links(node):
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
        """For dimensions that hold the places of a grid one behind the other: where the grid starts, and its shape."""
        found: dict[tuple[fx.Node, int], _Grid] = {}
        for node in self.nodes:
            for source, axes, axis in _merged(node):
                grid = tuple(source.meta["shape"][a] for a in axes)
                known = [a for a in range(len(source.meta["shape"])) if (source, a) in self._hops]
                channels = min(known, key=lambda a: self._hops[source, a], default=None)
                if channels not in axes and self._is_image(grid):
                    found.setdefault((node, axis), _Grid(0, grid))
            for link in _links(node):
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
    def _readings(self) -> dict[tuple[fx.Node, int], dict[_Reading, int]]:
        """How dimensions are reduced to one place later on, each with the number of the last node that does so.

        Places are counted in that dimension.
        """
        found: dict[tuple[fx.Node, int], dict[_Reading, int]] = {}
        for node in reversed(self.nodes):
            for source, axis, reading in _reduced(node):
                found.setdefault((source, axis), {}).setdefault(reading, self.order[node])
            for link in _links(node):
                for reading, last in found.get((node, link.axis), {}).items():
                    start = max(reading.start - link.shift, link.start)
                    stop = min(reading.stop - link.shift, link.stop)
                    if start < stop:
                        known = found.setdefault((link.source, link.source_axis), {})
                        moved = _Reading(reading.token, start, stop)
                        known[moved] = max(last, known.get(moved, last))
        return found

    def _reading(self, node: fx.Node, axis: int) -> tuple[str, int]:
        """Return how the model reads tokens in the end: the first one (``class``), or the mean behind a prefix."""
        known = self._readings.get((node, axis), {})
        useful = {r: last for r, last in known.items() if r.token == "mean" or r.start == 0}
        if not useful:
            return "mean", 0
        reading = max(useful, key=useful.__getitem__)
        return (reading.token, reading.start) if reading.token == "mean" else ("class", 0)


@dataclass(frozen=True)
class _Grid:
    """Places of a grid, one behind the other from ``start`` on."""

    start: int
    shape: tuple[int, ...]

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.shape)


@dataclass(frozen=True)
class _Reading:
    """One token is taken (``class``), or tokens ``start`` to ``stop`` are averaged (``mean``)."""

    token: str
    start: int
    stop: int


@dataclass(frozen=True)
class _Link:
    """Place i of a dimension of ``source``, start <= i < stop, is place i + shift of a dimension of what is made of it.

    Dimensions are counted without the batch.
    """

    source: fx.Node
    source_axis: int
    axis: int
    shift: int
    start: int
    stop: int


def _channels(node: fx.Node, twin: nn.Module) -> Iterator[tuple[fx.Node, int, bool]]:
    """Yield the dimensions that an operation takes for channels: of what it reads, and of what it makes."""
    module = twin.get_submodule(node.target) if node.op == "call_module" else None
    name = _name(node) if module is None else ""
    for value in (*node.all_input_nodes[:1], node):
        shape = _shape(value)
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
    nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm,
    nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd,
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


def _shape(node: Any) -> tuple[int, ...] | None:
    """Return the shape of a value without the batch dimension; None for what has no batch dimension, or no shape."""
    return node.meta["shape"] if isinstance(node, fx.Node) and node.meta.get("batched") else None


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target))


def _links(node: fx.Node) -> Iterator[_Link]:
    """Yield how the places of what a node reads are found again in what it makes."""
    shape = _shape(node)
    if shape is None:
        return
    name, sources = _name(node), [s for s in node.all_input_nodes if _shape(s) is not None]
    if node.op == "call_module":
        name = ""
    if name in ("cat", "concat", "concatenate"):
        yield from _concatenated(node)
    elif name in ("getitem", "narrow"):
        yield from _taken(node)
    elif name in _PERMUTATIONS:
        order = _permutation(node)
        for axis, source_axis in enumerate(order or ()):
            yield _Link(sources[0], source_axis, axis, 0, 0, shape[axis])
    elif name in _RESHAPES and sources:
        before = _shape(sources[0])
        for source_axis, axis in _same_axes(before, shape):
            yield _Link(sources[0], source_axis, axis, 0, 0, shape[axis])
    else:
        for source in sources:
            before = _shape(source)
            same = range(len(shape)) if len(before) == len(shape) else ()
            for axis in same:
                if before[axis] == shape[axis]:
                    yield _Link(source, axis, axis, 0, 0, shape[axis])


_PERMUTATIONS = {"transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis"}
_RESHAPES = {"reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze", "reshape_as", "view_as", "_unsafe_view"}


def _argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _concatenated(node: fx.Node) -> Iterator[_Link]:
    tensors, shape = node.args[0], _shape(node)
    dim = _argument(node, 1, "dim", 0) % (len(shape) + 1) - 1
    place = 0
    for source in tensors:
        before = _shape(source)
        size = (source.meta["shape"] if before is None else before)[dim if before is not None else dim + 1]
        for axis in range(len(shape)) if before is not None else ():
            yield _Link(source, axis, axis, place if axis == dim else 0, 0, before[axis])
        place += size


def _taken(node: fx.Node) -> Iterator[_Link]:
    """Yield the links of a subscript: of a tensor, or of what was split."""
    source, index = node.args[0], _index(node)
    before = _shape(source)
    if before is None:
        yield from _part(node, source, index)
        return
    axis = source_axis = 0
    for item in _full_index(index, len(before))[1:]:
        if item is None:
            axis += 1
            continue
        if isinstance(item, slice) and item.step in (None, 1):
            start, stop, _ = _bounds(item, before[source_axis])
            yield _Link(source, source_axis, axis, -start, start, stop)
        elif not isinstance(item, int | slice):
            return  # picked by a tensor: its place is not known
        axis += isinstance(item, slice)
        source_axis += 1


def _index(node: fx.Node) -> Any:
    """Return what stands in the brackets of a subscript, or would stand there instead of ``narrow``."""
    if _name(node) != "narrow":
        return node.args[1]
    dim, start, length = (_argument(node, i, name) for i, name in ((1, "dim"), (2, "start"), (3, "length")))
    dim %= len(_shape(node.args[0])) + 1
    return (*[slice(None)] * dim, slice(start, start + length))


def _bounds(item: slice, size: int) -> tuple[int, int, int]:
    """Return start, stop and step; a bound that is computed while the model runs is none."""
    known = [part if isinstance(part, int) else None for part in (item.start, item.stop, item.step)]
    return slice(*known).indices(size)


def _full_index(index: Any, rank: int) -> list[Any]:
    """Return one entry for the batch and for every dimension (and None for new ones)."""
    items = list(index) if isinstance(index, tuple) else [index]
    given = sum(item is not None and item is not Ellipsis for item in items)
    missing = [slice(None)] * (rank + 1 - given)
    at = next((i for i, item in enumerate(items) if item is Ellipsis), None)
    return [*items, *missing] if at is None else [*items[:at], *missing, *items[at + 1 :]]


def _part(node: fx.Node, source: Any, index: Any) -> Iterator[_Link]:
    """Yield the links of one of several values that an operation returns."""
    if not isinstance(source, fx.Node) or not isinstance(index, int):
        return
    shape = _shape(node)
    name = _name(source) if source.op != "call_module" else ""
    if name not in ("split", "tensor_split", "chunk", "split_with_sizes"):
        for origin in source.all_input_nodes:
            before = _shape(origin)
            for axis in range(len(shape)) if before is not None and len(before) == len(shape) else ():
                if before[axis] == shape[axis]:
                    yield _Link(origin, axis, axis, 0, 0, shape[axis])
        return
    whole = source.args[0]
    before = _shape(whole)
    if before is None:
        return
    dim = _argument(source, 2, "dim", 0) % (len(before) + 1) - 1
    start = _split_start(source, name, index, before[dim]) if dim >= 0 else None
    for axis in range(len(shape)):
        if axis == dim and start is not None:
            yield _Link(whole, axis, axis, -start, start, start + shape[axis])
        elif axis != dim:
            yield _Link(whole, axis, axis, 0, 0, shape[axis])


def _split_start(source: fx.Node, name: str, index: int, size: int) -> int | None:
    """Return the first place of part ``index`` of a dimension that was split."""
    names = {"split": "split_size_or_sections", "split_with_sizes": "split_sizes", "chunk": "chunks"}
    how = _argument(source, 1, names.get(name, "indices_or_sections"))
    how = source.kwargs.get("indices", source.kwargs.get("sections", how)) if name == "tensor_split" else how
    if isinstance(how, int):
        if name == "tensor_split":
            return index * (size // how) + min(index, size % how)
        return index * (-(-size // how) if name == "chunk" else how)
    if not isinstance(how, list | tuple) or not all(isinstance(n, int) for n in how):
        return None
    return [0, *how][index] if name == "tensor_split" else sum(how[:index])


def _permutation(node: fx.Node) -> list[int] | None:
    """Return for every dimension of what a permutation makes, where it comes from; None if the batch moves."""
    source = node.all_input_nodes[0]
    if _shape(source) is None:
        return None
    rank, name = len(_shape(source)) + 1, _name(node)
    order = list(range(rank))
    if name in ("transpose", "swapaxes", "swapdims"):
        first, second = (a % rank for a in (_argument(node, 1, "dim0"), _argument(node, 2, "dim1")))
        order[first], order[second] = order[second], order[first]
    elif name == "permute":
        dims = node.args[1:] or (node.kwargs["dims"],)
        order = [d % rank for d in (dims[0] if isinstance(dims[0], list | tuple) else dims)]
    else:
        moved, to = _argument(node, 1, "source"), _argument(node, 2, "destination")
        pairs = [(moved, to)] if isinstance(moved, int) else list(zip(moved, to, strict=True))
        placed = {t % rank: m % rank for m, t in pairs}
        rest = iter(axis for axis in order if axis not in placed.values())
        order = [placed[axis] if axis in placed else next(rest) for axis in range(rank)]
    return [axis - 1 for axis in order[1:]] if order[0] == 0 else None


def _same_axes(before: tuple[int, ...], after: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield the dimensions that a reshape leaves as they are."""
    ends = {(math.prod(before[:i]), n): i for i, n in enumerate(before)}
    for axis, n in enumerate(after):
        if (math.prod(after[:axis]), n) in ends:
            yield ends[math.prod(after[:axis]), n], axis


def _merged(node: fx.Node) -> Iterator[tuple[fx.Node, tuple[int, ...], int]]:
    """Yield the dimensions of a value that a reshape puts into one, and which one that is."""
    shape = _shape(node)
    source = node.all_input_nodes[0] if node.all_input_nodes else None
    before = _shape(source)
    if shape is None or before is None or node.op == "call_module" or _name(node) not in _RESHAPES:
        return
    for axis, size in enumerate(shape):
        outer = math.prod(shape[:axis])
        for first in range(len(before)):
            for last in range(first + 2, len(before) + 1):
                inside = before[first:last]
                if math.prod(before[:first]) == outer and math.prod(inside) == size and min(inside) > 1:
                    yield source, tuple(range(first, last)), axis


def _reduced(node: fx.Node) -> Iterator[tuple[fx.Node, int, _Reading]]:
    """Yield the dimensions that a node reduces to one place, and how."""
    shape = _shape(node)
    if shape is None:
        return
    name = _name(node) if node.op != "call_module" else ""
    for source in node.all_input_nodes:
        before = _shape(source)
        if before is None or len(before) < 2:
            continue
        if name in ("getitem", "narrow") and source is node.args[0]:
            items = [item for item in _full_index(_index(node), len(before))[1:] if item is not None]
            for axis, item in enumerate(items):
                if isinstance(item, int):
                    place = item % before[axis]
                    yield source, axis, _Reading("class", place, place + 1)
        elif name == "select":
            axis, place = _argument(node, 1, "dim") - 1, _argument(node, 2, "index")
            yield source, axis, _Reading("class", place % before[axis], place % before[axis] + 1)
        elif name in _RESHAPES | _PERMUTATIONS:
            kept = {a for a, _ in _same_axes(before, shape)}
            for axis in range(len(before)):
                if axis not in kept and before[axis] == 1 and len(shape) < len(before):
                    yield source, axis, _Reading("class", 0, 1)
        else:
            for axis in range(len(before)):
                gone = len(shape) == 1 and len(before) == 2 and before[1 - axis] == shape[0]
                if (gone or (len(shape) == len(before) and shape[axis] == 1)) and before[axis] > 1:
                    yield source, axis, _Reading("mean", 0, before[axis])
