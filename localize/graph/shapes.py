"""Run operations on tensors without data, and remember what shapes they return.

On the meta device torch finds the shapes of most operations in Python, by taking them apart: a BatchNorm takes
milliseconds, an LSTM a third of a second. What an operation of torch returns there depends on shapes, strides, types
and constants alone, so that it is found once for each of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from localize.torch_names import TorchDispatchMode, storage_of

MOST_KNOWN = 100_000
"""Results that are remembered, each about a kilobyte. Then all are forgotten."""


@dataclass(frozen=True)
class _Result:
    """What an operation returns: new tensors of these sizes, strides and types; none where it is its first argument."""

    made: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]
    several: bool = False


_KNOWN: dict[tuple[Any, ...], _Result] = {}


class Shapes(TorchDispatchMode):
    """In this context, what has been called before on meta tensors of the same shapes takes microseconds.

    ``random`` becomes true when an operation draws from torch's random state.
    """

    def __init__(self) -> None:
        super().__init__()
        self.random = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.random = True
        try:
            key = (func, _key(args), _key(tuple(kwargs.items()))) if func.namespace == "aten" else None
        except _Unknown:
            key = None
        result = None if key is None else _KNOWN.get(key)
        if result is not None:
            return _repeat(result, args)
        if key is None:
            return func(*args, **kwargs)
        given = list(tensors_in((args, kwargs)))
        layout = [(tensor.shape, tensor.stride()) for tensor in given]
        returned = func(*args, **kwargs)
        if layout == [(tensor.shape, tensor.stride()) for tensor in given]:
            _remember(key, returned, args, {storage_of(tensor) for tensor in given})
        return returned


class _Unknown(Exception):
    """A value on which a result may depend in other ways than by its shape, or by being equal."""


_CONSTANTS = (bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format)


def _key(value: Any) -> Any:
    """Return what the shape of a result can depend on; constants with their type, since ``1 == True == 1.0``."""
    if isinstance(value, Tensor):
        if value.device.type != "meta":
            raise _Unknown
        return (value.shape, value.stride(), value.dtype)
    if isinstance(value, list | tuple):
        return tuple([_key(item) for item in value])
    if value is None or isinstance(value, _CONSTANTS):
        return (type(value), value)
    raise _Unknown


def _remember(key: tuple[Any, ...], returned: Any, args: tuple, storages: set[int]) -> None:
    """Remember new tensors, and a first argument that is returned; not views, nor what lies on another device."""
    if args and returned is args[0]:
        result = _Result(())
    else:
        several = isinstance(returned, tuple)
        made = returned if several else (returned,)
        if not made or not all(_is_new(value, storages) for value in made):
            return
        result = _Result(tuple((tuple(v.shape), v.stride(), v.dtype) for v in made), several)
    if len(_KNOWN) >= MOST_KNOWN:
        _KNOWN.clear()
    _KNOWN[key] = result


def _is_new(value: Any, storages: set[int]) -> bool:
    return (
        isinstance(value, Tensor)
        and value.device.type == "meta"
        and bool(value.storage_offset() == 0)
        and storage_of(value) not in storages
    )


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a value: itself, or those in its items."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(tuple(value.values()))


_empty: Callable[..., Tensor] = torch.ops.aten.empty_strided.default


def _repeat(result: _Result, args: tuple) -> Any:
    if not result.made:
        return args[0]
    made = tuple([_empty(size, stride, dtype=dtype, device="meta") for size, stride, dtype in result.made])
    return made if result.several else made[0]
