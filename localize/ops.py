"""Operations that generated text calls and that torch has no function for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


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


def output_error(scores: Tensor, labels: Tensor) -> Tensor:
    """Return softmax(scores) - one-hot(labels), (N, Z), without history: N times the gradient of the cross-entropy."""
    scores = scores.detach()
    return scores.softmax(1) - F.one_hot(labels, scores.shape[1]).to(scores.dtype)


def share(loss: Tensor, labels: Tensor, all_labels: Tensor) -> Tensor:
    """Return the mean over a part of the batch times the part's share: the parts add up to the mean over the batch."""
    return loss * (len(labels) / len(all_labels))


@torch.no_grad()
def pull(copy: nn.Module, source: nn.Module, decay: float) -> None:
    """Move every parameter of ``copy`` towards that of ``source``: p <- decay * p + (1 - decay) * p_source."""
    copies = list(copy.parameters())
    sources = [p.to(c) for c, p in zip(copies, source.parameters(), strict=True)]
    torch._foreach_lerp_(copies, sources, 1 - decay)


def recompute(function: Callable[..., Any], trunk: nn.Module, *values: Any) -> Any:
    """Return ``function(trunk, *values)``, keeping only ``values`` for the backward, which runs the function again.

    The second run draws the same random numbers, and leaves the running statistics of the BatchNorms of ``trunk`` and
    their counts alone.
    """
    return checkpoint(
        function, trunk, *values, use_reentrant=False, context_fn=lambda: (nullcontext(), _still_statistics(trunk))
    )


@contextmanager
def _still_statistics(module: nn.Module) -> Iterator[None]:
    """Keep BatchNorms from moving their running statistics; they normalise by the batch as before."""
    norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._NormBase)]
    saved = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms if norm.track_running_stats]
    for norm, _, tracked in saved:
        norm.momentum = 0.0
        norm._buffers["num_batches_tracked"] = None if tracked is None else tracked.clone()
    try:
        yield
    finally:
        for norm, momentum, tracked in saved:
            norm.momentum = momentum
            norm._buffers["num_batches_tracked"] = tracked


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None
