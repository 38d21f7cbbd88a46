"""What a training step leaves, beside losses: buffers, random state, batch, and the state of the process."""

from __future__ import annotations

import copy
import random
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as _modules

RELATIVE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}
"""Relative difference allowed between two computations of the same value, which may sum in different orders.

About the square root of the rounding of the type, and in float64 well below what any edit changes."""


def tolerance(dtype: torch.dtype) -> float:
    """Return the relative difference allowed between two values of a type."""
    return RELATIVE.get(dtype, 1e-3)


_CONTAINERS = frozenset({dict, OrderedDict, list, set})
_UNCHANGING = frozenset({
    bool, int, float, str, bytes, type(None), torch.dtype, torch.device, FunctionType, BuiltinFunctionType
})  # fmt: skip


@dataclass(frozen=True)
class Left:
    """The state after a step."""

    buffers: dict[str, Tensor]
    """Tensors of the modules that are not parameters, registered or not, and parameters that the forward writes."""
    generator: Tensor
    batch: tuple[Tensor, ...]
    modes: dict[str, bool]
    process: dict[str, Any]


def left_by(local: nn.Module, batch: Sequence[Tensor], device: torch.device, written: Collection[str]) -> Left:
    """Return what a step has left: copies.

    Args:
        local: the local model.
        batch: what it was given.
        device: where it is.
        written: names of parameters that the forward of the model writes itself: they are treated as buffers.
    """
    generator = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    modes = {name: module.training for name, module in local.named_modules()}
    tensors = {name: value.detach().clone() for name, value in _tensors(local)}
    tensors |= {name: value.detach().clone() for name, value in local.named_parameters() if name in written}
    return Left(tensors, generator, tuple(value.detach().clone() for value in batch), modes, process(local))


def process(local: nn.Module) -> dict[str, Any]:
    """Return the state of the process that a step must leave alone, by what it is called."""
    kinds = [kind for kind in ("cpu", "cuda") if torch.amp.is_autocast_available(kind)]
    return {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds],
        "the cache of autocast": torch.is_autocast_cache_enabled(),
        "default type": torch.get_default_dtype(),
        "default device": str(torch.get_default_device()),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "precision of products": torch.get_float32_matmul_precision(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "Python's generator": hash(random.getstate()),
        "hooks of all modules": [len(hooks) for name, hooks in sorted(vars(_modules).items()) if _is_hooks(name)],
        "hooks of modules": sum(len(hooks) for module in local.modules() for hooks in _hooks_of(module)),
    }


def _is_hooks(name: str) -> bool:
    return name.startswith("_global_") and name.endswith("_hooks")


def _hooks_of(module: nn.Module) -> Iterator[dict[int, Any]]:
    yield from (value for name, value in vars(module).items() if name.endswith("_hooks") and isinstance(value, dict))


def changed(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    """Yield what of the process a step has changed."""
    for name, value in before.items():
        if after[name] != value:
            yield f"{name}: was {value}, is {after[name]}" if not name.endswith("generator") else f"{name} has moved"


def differing(found: Left, wanted: Left, allowed: float) -> Iterator[str]:
    """Yield what two steps left differently."""
    for name, value in wanted.buffers.items():
        other = found.buffers.get(name)
        if other is None or other.shape != value.shape:
            yield f"{name} is {'missing' if other is None else tuple(other.shape)}"
        elif not _close(other, value, allowed):
            yield f"{name} is not what the declared losses leave"
    yield from (f"{name} is new" for name in found.buffers.keys() - wanted.buffers.keys())
    if not torch.equal(found.generator, wanted.generator):
        yield "the random generator is not where the declared losses leave it"
    yield from (f"{name} is in another mode" for name, mode in wanted.modes.items() if found.modes.get(name) != mode)


def _close(found: Tensor, wanted: Tensor, allowed: float) -> bool:
    if not wanted.is_floating_point():
        return torch.equal(found.to(wanted.dtype), wanted)
    found, wanted = torch.nan_to_num(found.double()), torch.nan_to_num(wanted.double())
    return float((found - wanted).norm()) <= allowed * max(float(wanted.norm()), allowed)


def _tensors(local: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of modules that are not parameters, also those that are plain attributes."""
    for path, module in local.named_modules():
        prefix = f"{path}." if path else ""
        for name, value in (*module._buffers.items(), *vars(module).items()):
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and value.is_leaf:
                yield f"{prefix}{name}", value


def _copy_attributes(module: nn.Module, memo: dict[int, Any]) -> None:
    """Copy the attributes of a module to its copy in ``memo``, but for what nothing changes.

    A deep copy of some thousand modules takes longer than to run them: most of it goes into empty tables of hooks and,
    of a graph module, into its graph, which nothing changes.
    """
    attributes = vars(memo[id(module)])
    for name, value in vars(module).items():
        kind = type(value)
        if kind in _UNCHANGING or name == "_graph":
            attributes[name] = value
        elif kind in _CONTAINERS and not value:
            attributes[name] = kind()
        elif kind is dict or kind is OrderedDict:
            attributes[name] = kind((key, _copied_value(one, memo)) for key, one in value.items())
        else:
            attributes[name] = _copied_value(value, memo)


def _copied_value(value: Any, memo: dict[int, Any]) -> Any:
    """Return a deep copy of a value of a module."""
    if type(value) in _UNCHANGING:
        return value
    known = memo.get(id(value))
    if known is not None:
        return known
    if type(value) is not nn.Parameter or value.grad is not None:
        return copy.deepcopy(value, memo)
    made = memo[id(value)] = nn.Parameter(value.detach().clone(), value.requires_grad)
    return made


def _copies_as_its_attributes(kind: type) -> bool:
    """Tell whether modules of a class are copied by copying their attributes: it says nothing else of copying."""
    if issubclass(kind, fx.GraphModule):
        return True
    own = ("__deepcopy__", "__copy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__slots__")
    others = [base for base in kind.__mro__ if not base.__module__.startswith(("torch.nn.modules.", "builtins"))]
    return not any(name in vars(base) for base in others for name in own)


def copied(local: Any) -> Any:
    """Return a deep copy. Tensors with a history that hang on modules, such as masked weights, are copied without."""
    memo: dict[int, Any] = {}
    modules = list(local.modules())
    sharing: Counter[int] = Counter()
    buffers: list[Tensor] = []
    for module in modules:
        buffers += [value for value in module._buffers.values() if type(value) is Tensor and value.is_leaf]
        for value in vars(module).values():
            if isinstance(value, Tensor):
                sharing[value.untyped_storage().data_ptr()] += 1
                if not value.is_leaf:
                    memo[id(value)] = value.detach().clone()
    buffers = list({id(value): value for value in buffers}.values())
    sharing.update(value.untyped_storage().data_ptr() for value in buffers)
    for value in buffers:  # a deep copy would keep that two of them share memory
        if sharing[value.untyped_storage().data_ptr()] == 1 and value.grad is None and not vars(value):
            memo[id(value)] = value.detach().clone().requires_grad_(value.requires_grad)
    plain = [module for module in modules if _copies_as_its_attributes(type(module))]
    memo.update((id(module), object.__new__(type(module))) for module in plain)  # all, since hooks refer to each other
    for module in plain:
        _copy_attributes(module, memo)
    found = copy.deepcopy(local, memo)
    for module in found.modules():
        if isinstance(module, torch.jit.ScriptModule):  # whose parameters torch copies with a history
            for parameter in module.parameters(recurse=False):
                trained = parameter.requires_grad
                parameter.detach_().requires_grad_(trained)
    return found
