"""Give heads real parameters: fresh and random, never copied from the trunk."""

from __future__ import annotations

import copy

import torch
from torch import nn


def materialize(module: nn.Module, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return a copy of a module on the meta device with real, freshly drawn parameters.

    Convolutions draw from N(0, 2 / (kh kw C_out)), as the reference code of AugLocal does for trunk and heads alike;
    everything else draws as its own ``reset_parameters`` does.
    """
    real = copy.deepcopy(module).to_empty(device=device)
    for part in real.modules():
        reset = getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)
        if reset is not None:
            reset()
        if isinstance(part, nn.modules.conv._ConvNd):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
    return real.to(dtype) if dtype.is_floating_point else real
