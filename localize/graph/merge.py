"""Take differences between recordings, so that nothing is baked in: numbers that follow the batch size or the mode."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from localize.graph.record import Record, Ref

BATCHES = (3, 7, 5)
"""Batch sizes that are recorded, in this order: a number that grows from forward to forward fits no line through it."""


@dataclass(frozen=True)
class BatchLinear:
    """The integer ``scale * batch + offset``."""

    scale: int
    offset: int


@dataclass(frozen=True)
class ByMode:
    train: Any
    eval: Any


class Differs(Exception):
    """Two recordings do not have the same structure."""


def first_difference(left: Sequence[Record], right: Sequence[Record]) -> str:
    for a, b in zip(left, right, strict=False):
        if (a.kind, a.args, a.kwargs) != (b.kind, b.args, b.kwargs) or a.target != b.target:
            scope = a.scope[-1][0] if a.scope else ""
            return f"first difference: {a.target} in module {scope!r} with {_short(a.args)} and {_short(b.args)}"
    return "" if len(left) == len(right) else f"{len(left)} and {len(right)} operations"


def differing_scope(left: Sequence[Record], right: Sequence[Record]) -> str:
    """Return the outermost module in the model in which two recordings differ first; nothing if there is none."""
    for a, b in zip(left, right, strict=False):
        try:
            merge_records([[a], [b]], lambda values: values)
        except Differs:
            return a.scope[0][0] if a.scope else ""
    return ""


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 80 else text[:77] + "..."


def _merge(values: Sequence[Any], combine: Callable[[Sequence[Any]], Any]) -> Any:
    """Merge arguments of equal structure; ``combine`` decides about constants that differ."""
    first = values[0]
    if all(type(value) is type(first) for value in values):
        if isinstance(first, list | tuple):
            if len({len(value) for value in values}) > 1:
                raise Differs
            items = [_merge(column, combine) for column in zip(*values, strict=True)]
            return items if isinstance(first, list) else tuple(items)
        if isinstance(first, dict):
            if len({tuple(value) for value in values}) > 1:
                raise Differs
            return {key: _merge([value[key] for value in values], combine) for key in first}
        if isinstance(first, slice):
            parts = [(value.start, value.stop, value.step) for value in values]
            return slice(*_merge(parts, combine))
        if all(value == first for value in values):
            return first
        if isinstance(first, Ref):
            raise Differs
    return combine(values)


def by_batch(values: Sequence[Any]) -> Any:
    """Return the ``scale * batch + offset`` that gives ``values`` at the recorded batch sizes."""
    if not all(type(value) is int for value in values):
        raise Differs
    (n0, n1, n2), (v0, v1, v2) = BATCHES, values
    scale, rest = divmod(v1 - v0, n1 - n0)
    offset = v0 - scale * n0
    if rest or v2 != scale * n2 + offset:
        raise Differs
    return BatchLinear(scale, offset)


def merge_records(recordings: Sequence[Sequence[Record]], combine: Callable) -> list[Record]:
    if len({len(recording) for recording in recordings}) > 1:
        raise Differs
    merged = []
    for column in zip(*recordings, strict=True):
        first = column[0]
        if any((record.kind, record.target) != (first.kind, first.target) for record in column):
            raise Differs
        record = copy.copy(first)
        record.args = _merge([r.args for r in column], combine)
        record.kwargs = _merge([r.kwargs for r in column], combine)
        record.storage = column[0].storage
        merged.append(record)
    return merged


def can_merge(recordings: Sequence[Sequence[Record]]) -> bool:
    try:
        merge_records(recordings, by_batch)
    except Differs:
        return False
    return True


def same_records(ones: Iterable[Sequence[Record]], others: Iterable[Sequence[Record]]) -> bool:
    """Tell whether recordings are the same, pair by pair, up to the last of the shorter list."""
    return not any(first_difference(one, other) for one, other in zip(ones, others, strict=False))


def cost_of_one(first: int, last: int) -> int:
    """Return the number for a batch of one, from those for the first and the last of ``BATCHES``."""
    return first - (last - first) * (BATCHES[0] - 1) // (BATCHES[-1] - BATCHES[0])


def batch_fold(column: Sequence[Record]) -> int:
    """Return k where dimension 0 is k times the batch, and nothing else depends on it; 0 elsewhere."""
    shapes = [record.shape for record in column]
    if any(not shape for shape in shapes) or len({shape[1:] for shape in shapes if shape}) > 1:
        return 0
    folds = {divmod(shape[0], n) for shape, n in zip(shapes, BATCHES, strict=True) if shape}
    fold, rest = next(iter(folds))
    return fold if len(folds) == 1 and rest == 0 else 0
