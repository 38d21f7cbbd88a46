"""Count multiply-adds of functions and modules, on the meta device.

``macs`` counts one multiply-add for every product in a convolution or linear layer, bias not counted, for one image;
attention's query-key and attention-value products are not counted. ``fvcore_flops`` is the count of fvcore 0.1.5 that
the AugLocal paper prints: ``macs``, plus 2 for every element that passes a BatchNorm, plus 1 for every input element of
an adaptive average pooling.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from localize.graph.shapes import Shapes
from localize.ops import global_average


@dataclass
class Counter(TorchFunctionMode):
    """Count what is executed in the context."""

    macs: int = 0
    fvcore_flops: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count(func, args, kwargs or {}, result)
        return result

    def count(self, func: Callable, args: tuple, kwargs: dict, result: Any) -> None:
        """Add the cost of one call of a torch function."""
        if func in _CONVOLUTIONS:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            self._add(result.numel() * weight[0].numel())
        elif func in _TRANSPOSED:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            self._add(args[0].numel() * weight[0].numel())
        elif func is F.linear:
            self._add(result.numel() * args[0].shape[-1])
        elif func is F.multi_head_attention_forward:
            self._add(4 * args[0].numel() * args[0].shape[-1])
        elif func is F.batch_norm:
            self.fvcore_flops += 2 * args[0].numel()
        elif func in _ADAPTIVE:
            self.fvcore_flops += args[0].numel()

    def _add(self, macs: int) -> None:
        self.macs += macs
        self.fvcore_flops += macs


_CONVOLUTIONS = {torch.conv1d, torch.conv2d, torch.conv3d}
_TRANSPOSED = {torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d}
_ADAPTIVE = {F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, global_average}


def of_module(module: nn.Module, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Counter:
    """Count one forward of ``module`` for inputs of these shapes, given without the batch."""
    counter = Counter()
    output_of(module, *shapes, dtype=dtype, counter=counter)
    return counter


def output_of(
    module: nn.Module,
    *shapes: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    counter: Counter | None = None,
) -> Any:
    """Return what ``module`` makes, in eval mode and without data, of inputs of these shapes, given without the batch.

    A module on the meta device and of this type is run as it is, any other on a copy. ``counter`` counts what is
    executed.
    """
    inputs = [torch.empty((1, *shape), dtype=dtype, device="meta") for shape in shapes]
    held = (*module.parameters(), *module.buffers())
    fits = all(tensor.is_meta and (tensor.dtype == dtype or not tensor.is_floating_point()) for tensor in held)
    twin = module if fits else copy.deepcopy(module).to("meta", dtype)
    modes = {part: part.training for part in twin.modules()}
    try:
        with torch.device("meta"), Shapes(), counter or nullcontext():
            return twin.eval()(*inputs)
    finally:
        for part, training in modes.items():
            part.training = training
