"""What a model's forward takes: one tensor, several by position, or several by keyword; and batches of the same form.

What is not a tensor (a flag, a number, None) is a constant of the recording: every forward is called with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from localize.errors import InputError, OptionError
from localize.ir import Argument
from localize.reserved import name_of_input

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]
"""A batch (N, ...), a tuple or list of what the forward takes by position, or a dict of what it takes by keyword."""


def arguments_of(model: nn.Module, example: Inputs) -> tuple[Argument, ...]:
    """Describe what the forward of ``model`` is called with, in order, by a batch of it.

    A single tensor is called ``x``, others as the forward calls them.

    Raises:
        OptionError: there is not a tensor, one without batch dimension, or tensors of several batch sizes.
    """
    if isinstance(example, Tensor):
        arguments: tuple[Argument, ...] = (_argument("x", None, example),)
    elif isinstance(example, Mapping):
        arguments = tuple(_argument(str(name), str(name), value) for name, value in example.items())
    elif isinstance(example, list | tuple):
        names = ["x"] if len(example) == 1 else _parameters(model, len(example))
        arguments = tuple(_argument(name, None, value) for name, value in zip(names, example, strict=True))
    else:
        raise OptionError(
            f"example_input cannot be {type(example).__name__}.",
            help="a batch (N, ...), a tuple of what the forward takes by position, or a dict of what it takes by name",
        )
    values = [(a.name, v) for a, v in zip(arguments, _values(example), strict=True) if isinstance(v, Tensor)]
    if not values:
        raise OptionError("example_input holds no tensor.", help="a batch of images, (N, C, H, W)")
    if wrong := _unequal(values):
        raise OptionError(
            wrong, facts="the first dimension of every tensor is the batch.", help="repeat it for each image"
        )
    return arguments


def _values(batch: Inputs) -> tuple[Any, ...]:
    if isinstance(batch, Tensor):
        return (batch,)
    return tuple(batch.values() if isinstance(batch, Mapping) else batch)


def _parameters(model: nn.Module, count: int) -> list[str]:
    """Return what the forward calls its first ``count`` arguments."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = next((p.name for p in parameters if p.kind == p.VAR_POSITIONAL), "input")
    return [names[i] if i < len(names) else f"{rest}_{i - len(names)}" for i in range(count)]


def _argument(name: str, key: str | None, value: Any) -> Argument:
    name = name_of_input(name)
    if isinstance(value, Tensor):
        return Argument(name, key, tuple(value.shape[1:]), value.dtype)
    if any(True for _ in _tensors_in(value)):
        raise OptionError(
            f"input {name!r} is a {type(value).__name__} of tensors.",
            help="a forward that takes each tensor by itself, and makes the list",
        )
    return Argument(name, key, None, None, value)


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in(item)


def _unequal(values: Sequence[tuple[str, Tensor]]) -> str:
    """Say which tensors have no batch dimension, or another batch size than the first; or nothing."""
    name, first = values[0]
    for other, value in values:
        if value.dim() == 0:
            return f"input {other!r} has no dimension."
        if len(value) != len(first):
            return f"input {other!r} has {len(value)} rows, and {name!r} has {len(first)}."
    return ""


def calling(arguments: Sequence[Argument], tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and the keyword arguments of a forward on these tensors."""
    left = iter(tensors)
    values = [(a.keyword, a.constant if a.shape is None else next(left)) for a in arguments]
    return tuple(v for key, v in values if key is None), {key: v for key, v in values if key is not None}


def tensors_of(arguments: Sequence[Argument], batch: Inputs) -> tuple[Tensor, ...]:
    """Return the tensors of a batch in the order of the arguments.

    Raises:
        InputError: the batch does not have the form, the shapes or the types that were recorded.
    """
    alone = len(arguments) == 1 and isinstance(batch, Tensor)
    found = [batch] if alone else _in_order(arguments, batch)
    tensors = []
    for argument, value in zip(arguments, found, strict=True):
        if argument.shape is None:
            _check_constant(argument, value)
        else:
            _check_tensor(argument, value, alone=len(arguments) == 1)
            tensors.append(value)
    names = [argument.name for argument in arguments if argument.shape is not None]
    if wrong := _unequal(list(zip(names, tensors, strict=True))):
        raise InputError(wrong, facts="the first dimension of every tensor is the batch.")
    return tuple(tensors)


def _in_order(arguments: Sequence[Argument], batch: Inputs) -> list[Any]:
    """Return the values of a batch of several inputs; a constant may be left out of a dict."""
    if any(argument.keyword is not None for argument in arguments):
        told = ", ".join(argument.keyword or "" for argument in arguments)
        if not isinstance(batch, Mapping):
            raise InputError(
                f"the batch is {_kind(batch)}.",
                facts=f"this training step takes a dict of {told}, as example_input was.",
            )
        constants = {argument.keyword: argument.constant for argument in arguments if argument.shape is None}
        given = constants | dict(batch)
        keys = [argument.keyword for argument in arguments]
        wrong = [f"has no {key!r}" for key in keys if key not in given] + [f"has {k!r}" for k in given if k not in keys]
        if wrong:
            raise InputError(f"the batch {wrong[0]}.", facts=f"this training step takes a dict of {told}.")
        return [given[key] for key in keys]
    told = ", ".join(argument.name for argument in arguments)
    if not isinstance(batch, list | tuple) or len(batch) != len(arguments):
        size = f" of {len(batch)}" if isinstance(batch, list | tuple) else ""
        form = "a tensor" if len(arguments) == 1 else f"a tuple of {len(arguments)}: {told}"
        raise InputError(f"the batch is {_kind(batch)}{size}.", facts=f"this training step takes {form}.")
    return list(batch)


def _kind(value: Any) -> str:
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def _check_constant(argument: Argument, value: Any) -> None:
    if value is not argument.constant and (isinstance(value, Tensor) or value != argument.constant):
        raise InputError(
            f"input {argument.name!r} is {_kind(value) if isinstance(value, Tensor) else repr(value)}.",
            facts=f"it is a constant of this training step: {argument.constant!r}.",
            help="transform the model again with example_input that holds it",
        )


def _check_tensor(argument: Argument, value: Any, *, alone: bool) -> None:
    what = "the batch has images" if alone else f"input {argument.name!r} of the batch is"
    if not isinstance(value, Tensor):
        raise InputError(f"{'the batch' if alone else f'input {argument.name!r}'} is {_kind(value)}, and no tensor.")
    if tuple(value.shape[1:]) != argument.shape or value.dim() == 0:
        raise InputError(
            f"{what} of shape {tuple(value.shape[1:])}.",
            facts=f"this training step was generated for {argument.shape}.",
            help="resize the images, or transform the model again with example_input of the new size",
        )
    assert argument.dtype is not None, "a tensor has a type"
    if _numbers(value.dtype) != _numbers(argument.dtype):
        raise InputError(
            f"{what} of type {value.dtype}.",
            facts=f"this training step was generated for {argument.dtype}.",
            help=f"{argument.name} = {argument.name}.to({argument.dtype})",
        )


def _numbers(dtype: torch.dtype) -> str:
    """Return what values of a type are."""
    if dtype is torch.bool:
        return "truth values"
    return "numbers" if dtype.is_floating_point else "complex numbers" if dtype.is_complex else "integers"
