"""Operations that generated text calls and that torch has no function for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def set_item(x: Tensor, index: Any, value: Any) -> Tensor:
    """Write ``x[index] = value`` in place and return ``x``."""
    x[index] = value
    return x


def by_mode(training: bool, train: Any, eval: Any) -> Any:
    """Return ``train`` in train mode and ``eval`` in eval mode."""
    return train if training else eval


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Return ``x``; the gradient that flows back through it is multiplied by ``factor``."""
    return _ScaleGradient.apply(x, factor)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None
