"""Give heads real parameters; each element is either drawn or taken from the trunk (scales, masks)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from localize.graph.twin import deep_copy
from localize.torch_names import CONVOLUTIONS, own_parameters

STD = 0.02
"""Standard deviation of matrices that no module initialises itself."""


def materialize(module: nn.Module, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return a copy of a module whose parameters on the meta device become real; real parameters keep their values.

    Convolutions are drawn from N(0, 2 / (kh kw C_out)), as in the reference code of AugLocal for trunk and heads.
    Everything else is drawn by its own ``reset_parameters``. Parameters that this does not set (modules without the
    method, a gain or a mask that a derived class adds) take the values in ``constants`` (see
    :func:`localize.heads.recreate.fresh`); matrices are drawn from N(0, 0.02^2). Buffers and attributes that have
    values keep them.
    """

    def made(tensor: Tensor) -> Tensor:
        if not (isinstance(tensor, nn.Parameter) and tensor.is_meta):
            return _placed(tensor, device, dtype)
        empty = torch.empty_like(tensor, device=device, dtype=dtype if tensor.is_floating_point() else tensor.dtype)
        return (
            empty.detach().fill_(torch.nan) if empty.is_floating_point() else empty
        )  # marks parameters that nothing sets

    real = deep_copy(module, made)
    drawn = {name for name, part in module.named_modules() if not _has_values(part)}
    real.eval()  # so that parametrizations of weights not drawn yet do not change statistics
    convolutions = [part for part in real.modules() if isinstance(part, CONVOLUTIONS)]
    inside = {inner for convolution in convolutions for inner in convolution.modules()}
    for name, part in real.named_modules():
        if name in drawn:
            _draw(part, of_convolution=part in inside)
    return real.train(module.training)


class Undrawn(TorchFunctionMode):
    """Tensors are not filled with random numbers: for heads of a model without data, whose values nothing reads."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "").endswith(("uniform_", "normal_")):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _has_values(part: nn.Module) -> bool:
    """Return whether a module has parameters, and all of them already have values."""
    parameters = list(part.parameters())
    return bool(parameters) and not any(one.is_meta for one in parameters)


def _placed(value: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    value = torch.zeros_like(value, device=device) if value.is_meta else value.to(device)
    return value.to(dtype) if value.is_floating_point() else value


def _draw(part: nn.Module, *, of_convolution: bool) -> None:
    constants = part.__dict__.pop("constants", {})
    reset = getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)
    if reset is not None and not any(p.default is p.empty for p in inspect.signature(reset).parameters.values()):
        reset()
    if isinstance(part, CONVOLUTIONS) and "weight" in own_parameters(part):
        nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
    with torch.no_grad():
        for name, parameter in own_parameters(part).items():
            if parameter is not None and _is_unset(parameter):
                _set(parameter, name, constants, of_convolution=of_convolution)


def _is_unset(parameter: Tensor) -> bool:
    return not parameter.is_floating_point() or (not parameter.is_meta and bool(parameter.isnan().any()))


def _set(parameter: Tensor, name: str, constants: Mapping[str, Tensor], *, of_convolution: bool) -> None:
    """Set a parameter that its module does not initialise: to the trunk's values, or to random ones."""
    known = constants.get(name)
    if known is not None and known.shape == parameter.shape:
        parameter.copy_(known)
    elif known is not None and known.numel() > 0 and bool((known == known.flatten()[0]).all()):
        parameter.fill_(known.flatten()[0])  # equal for all channels, whose number differs here
    elif not parameter.is_floating_point():
        parameter.zero_()
    elif of_convolution and parameter.dim() > 2:
        nn.init.kaiming_normal_(parameter, mode="fan_out", nonlinearity="relu")
    else:
        nn.init.trunc_normal_(parameter, std=STD)
