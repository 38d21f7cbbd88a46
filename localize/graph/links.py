"""Follow the layout of values through reshapes, permutations, slices and concatenations."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx

from localize.ir import facts, shape_of


@dataclass(frozen=True)
class Reading:
    """One token is taken (``class``), or tokens ``start`` to ``stop`` are averaged (``mean``)."""

    token: Literal["class", "mean"]
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


def image_shape(node: Any) -> tuple[int, ...] | None:
    """Return the shape of a value without the batch dimension; None for what has no batch dimension, or no shape."""
    return facts(node).shape if isinstance(node, fx.Node) and facts(node).batched else None


CONCATENATIONS = ("cat", "concat", "concatenate")
"""Names of the functions that concatenate tensors."""


def operation_name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target))


def links_of(node: fx.Node) -> Iterator[_Link]:
    """Yield how the places of what a node reads are found again in what it makes."""
    shape = image_shape(node)
    if shape is None:
        return
    name, sources = operation_name(node), [s for s in node.all_input_nodes if image_shape(s) is not None]
    if node.op == "call_module":
        name = ""
    if name in CONCATENATIONS:
        yield from _concatenated(node)
    elif name in ("getitem", "narrow"):
        yield from _taken(node)
    elif name in _PERMUTATIONS:
        order = _permutation(node)
        for axis, source_axis in enumerate(order or ()):
            yield _Link(sources[0], source_axis, axis, 0, 0, shape[axis])
    elif name in _RESHAPES and sources:
        before = shape_of(sources[0])
        for source_axis, axis in _same_axes(before, shape):
            yield _Link(sources[0], source_axis, axis, 0, 0, shape[axis])
    else:
        for source in sources:
            before = shape_of(source)
            same = range(len(shape)) if len(before) == len(shape) else ()
            for axis in same:
                if before[axis] == shape[axis]:
                    yield _Link(source, axis, axis, 0, 0, shape[axis])


_PERMUTATIONS = {"transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis"}


_RESHAPES = {"reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze", "reshape_as", "view_as", "_unsafe_view"}


def _argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _concatenated(node: fx.Node) -> Iterator[_Link]:
    tensors: Any = node.args[0]
    shape = shape_of(node)
    dim = _argument(node, 1, "dim", 0) % (len(shape) + 1) - 1
    place = 0
    for source in tensors:
        before = image_shape(source)
        if facts(source).shape == (0,):  # an empty list of features, to which others are added
            continue
        if before is not None:
            for axis in range(len(shape)):
                yield _Link(source, axis, axis, place if axis == dim else 0, 0, before[axis])
        place += shape_of(source)[dim + 1] if before is None else before[dim]


def _taken(node: fx.Node) -> Iterator[_Link]:
    """Yield the links of a subscript: of a tensor, or of what was split."""
    source: Any = node.args[0]
    index = _index(node)
    before = image_shape(source)
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
    if operation_name(node) != "narrow":
        return node.args[1]
    dim, start, length = (_argument(node, i, name) for i, name in ((1, "dim"), (2, "start"), (3, "length")))
    dim %= len(shape_of(node.all_input_nodes[0])) + 1
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
    shape = shape_of(node)
    name = operation_name(source) if source.op != "call_module" else ""
    if name not in ("split", "tensor_split", "chunk", "split_with_sizes"):
        for origin in source.all_input_nodes:
            before = image_shape(origin)
            if before is None or len(before) != len(shape):
                continue
            for axis in range(len(shape)):
                if before[axis] == shape[axis]:
                    yield _Link(origin, axis, axis, 0, 0, shape[axis])
        return
    whole: Any = source.args[0]
    before = image_shape(whole)
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
    if image_shape(source) is None:
        return None
    rank, name = len(shape_of(source)) + 1, operation_name(node)
    order = list(range(rank))
    if name in ("transpose", "swapaxes", "swapdims"):
        first, second = (a % rank for a in (_argument(node, 1, "dim0"), _argument(node, 2, "dim1")))
        order[first], order[second] = order[second], order[first]
    elif name == "permute":
        dims: Any = node.args[1:] or (node.kwargs["dims"],)
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


def merged_places(node: fx.Node) -> Iterator[tuple[fx.Node, tuple[int, ...], int]]:
    """Yield the dimensions of a value that a reshape puts into one, and which one that is."""
    shape = image_shape(node)
    source = node.all_input_nodes[0] if node.all_input_nodes else None
    before = image_shape(source)
    if (
        shape is None
        or source is None
        or before is None
        or node.op == "call_module"
        or operation_name(node) not in _RESHAPES
    ):
        return
    for axis, size in enumerate(shape):
        outer = math.prod(shape[:axis])
        for first in range(len(before)):
            for last in range(first + 2, len(before) + 1):
                inside = before[first:last]
                if math.prod(before[:first]) == outer and math.prod(inside) == size and min(inside) > 1:
                    yield source, tuple(range(first, last)), axis


def reduced_tokens(node: fx.Node) -> Iterator[tuple[fx.Node, int, Reading]]:
    """Yield the dimensions that a node reduces to one place, and how."""
    shape = image_shape(node)
    if shape is None:
        return
    name = operation_name(node) if node.op != "call_module" else ""
    for source in node.all_input_nodes:
        before = image_shape(source)
        if before is None or len(before) < 2:
            continue
        if name in ("getitem", "narrow") and source is node.args[0]:
            items = [item for item in _full_index(_index(node), len(before))[1:] if item is not None]
            for axis, item in enumerate(items):
                if isinstance(item, int):
                    place = item % before[axis]
                    yield source, axis, Reading("class", place, place + 1)
        elif name == "select":
            axis, place = _argument(node, 1, "dim") - 1, _argument(node, 2, "index")
            yield source, axis, Reading("class", place % before[axis], place % before[axis] + 1)
        elif name in _RESHAPES | _PERMUTATIONS:
            kept = {a for a, _ in _same_axes(before, shape)}
            for axis in range(len(before)):
                if axis not in kept and before[axis] == 1 and len(shape) < len(before):
                    yield source, axis, Reading("class", 0, 1)
        else:
            for axis in range(len(before)):
                gone = len(shape) == 1 and len(before) == 2 and before[1 - axis] == shape[0]
                if (gone or (len(shape) == len(before) and shape[axis] == 1)) and before[axis] > 1:
                    yield source, axis, Reading("mean", 0, before[axis])
