"""Copies of a model: those without data, to run it at no cost, and one of a module with data."""

from __future__ import annotations

import copy
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from localize.errors import ModelError
from localize.torch_names import FakeTensors, own_buffers, own_forward_hooks, own_parameters


def meta_twin(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` without data: same classes and names, parameters and buffers on the meta device.

    Raises:
        ModelError: the model cannot be deep-copied.
    """
    return deep_copy(model, lambda tensor: torch.empty_like(tensor, device="meta"))


def fake_copy(module: nn.Module) -> nn.Module:
    """Return a copy of ``module`` on the CPU whose tensors have no values; to be called under a ``FakeTensorMode``.

    Raises:
        ModelError: the module cannot be deep-copied.
    """
    return deep_copy(module, FakeTensors().like)


def real_copy(module: nn.Module) -> nn.Module:
    """Return a copy of ``module`` on the CPU; what has no data is zero.

    Raises:
        ModelError: the module cannot be deep-copied.
    """
    return deep_copy(module, lambda t: torch.zeros_like(t, device="cpu") if t.is_meta else t.detach().cpu().clone())


def deep_copy(model: nn.Module, make: Callable[[Tensor], Tensor]) -> nn.Module:
    """Return a deep copy of ``model`` in which ``make`` has made every tensor; parameters stay parameters.

    Raises:
        ModelError: the model cannot be deep-copied.
    """
    memo: dict[int, Any] = dict(_empty_dicts(model))
    for tensor in _tensors_of(model):
        made = make(tensor)
        if isinstance(tensor, nn.Parameter) and not isinstance(made, nn.Parameter):
            made = nn.Parameter(made, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = made
    try:
        copied = copy.deepcopy(model, memo)
        _rebind_hooks(copied, memo)
        return copied
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} cannot be copied: {error}", help="check that copy.deepcopy(model) works"
        ) from error


def _empty_dicts(model: nn.Module) -> Iterator[tuple[int, dict]]:
    """Yield copies of the empty dicts of all modules: a dozen each, for hooks, on which ``deepcopy`` is slow."""
    for module in model.modules():
        for value in vars(module).values():
            if type(value) in (dict, OrderedDict) and not value:
                yield id(value), type(value)()


def _rebind_hooks(copied: nn.Module, memo: dict[int, Any]) -> None:
    """Let hooks that are functions inside others write to the copy: what they hold of the model becomes the copy's."""
    for module in copied.modules():
        for hooks in own_forward_hooks(module):
            for key, hook in hooks.items():
                if isinstance(hook, types.FunctionType) and hook.__closure__:
                    hooks[key] = _rebound(hook, memo)


def _rebound(function: types.FunctionType, memo: dict[int, Any]) -> types.FunctionType:
    cells = tuple(types.CellType(memo.get(id(c.cell_contents), c.cell_contents)) for c in function.__closure__ or ())
    code, defaults = function.__code__, function.__defaults__
    rebound = types.FunctionType(code, function.__globals__, function.__name__, defaults, cells)
    rebound.__kwdefaults__ = function.__kwdefaults__
    return rebound


def _tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Yield parameters, buffers, and tensors kept as plain attributes (also in lists and dicts)."""
    for module in model.modules():
        yield from (p for p in own_parameters(module).values() if p is not None)
        yield from (b for b in own_buffers(module).values() if b is not None)
        for value in vars(module).values():
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, list | tuple):
                yield from (item for item in value if isinstance(item, Tensor))
            elif isinstance(value, dict):
                yield from (item for item in value.values() if isinstance(item, Tensor))
