"""Give heads real parameters: fresh and random, never copied from the trunk."""

from __future__ import annotations

import copy

import torch
from torch import nn

from localize.torch_names import CONVOLUTIONS, own_buffers, own_parameters


def materialize(module: nn.Module, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return a copy of a module whose parameters are on the meta device, with real, freshly drawn parameters.

    Convolutions draw from N(0, 2 / (kh kw C_out)), as the reference code of AugLocal does for trunk and heads alike;
    everything else draws as its own ``reset_parameters`` does. What has none draws matrices from N(0, 0.02^2) and takes
    the vectors in ``constants`` (see :func:`localize.heads.recreate.fresh`). Buffers with values keep them.
    """
    real = copy.deepcopy(module)
    for part in real.modules():
        for name, parameter in own_parameters(part).items():
            if parameter is not None:
                empty = torch.empty_like(parameter, device=device, dtype=dtype)
                own_parameters(part)[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for name, buffer in own_buffers(part).items():
            if buffer is not None:
                value = torch.zeros_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
                own_buffers(part)[name] = value.to(dtype) if value.is_floating_point() else value
    for part in real.modules():
        _draw(part)
    return real


def _draw(part: nn.Module) -> None:
    reset = getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)
    if reset is not None:
        reset()
    else:
        constants = part.__dict__.pop("constants", {})
        for name, parameter in own_parameters(part).items():
            if name in constants:
                parameter.data.copy_(constants[name])
            elif parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)
    if isinstance(part, CONVOLUTIONS):
        nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
