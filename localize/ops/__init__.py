"""Operations that generated text and heads call and that torch has no function for."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from localize.ops.parts import enlarged, in_parts
from localize.ops.recomputation import again
from localize.torch_names import lerp_all


def set_item(x: Tensor, index: Any, value: Any) -> Tensor:
    """Write ``x[index] = value`` in place and return ``x``.

    Args:
        x: a tensor (...).
        index: as in ``x[index]``.
        value: a number, or a tensor that can be broadcast to the shape of ``x[index]``.
    """
    x[index] = value
    return x


def by_mode(training: bool, train: Any, eval: Any) -> Any:
    """Return ``train`` in train mode and ``eval`` in eval mode.

    Args:
        training: ``module.training``.
        train: value in train mode.
        eval: value in eval mode.
    """
    return train if training else eval


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Return ``x`` (...); the gradient that flows back through it is multiplied by ``factor``."""
    return _ScaleGradient.apply(x, factor)


def output_error(scores: Tensor, labels: Tensor) -> Tensor:
    """Return softmax(scores) - one-hot(labels), (N, Z), without history: N times the gradient of the cross-entropy.

    Soft labels (N, Z) are taken as they are.

    Args:
        scores: (N, Z).
        labels: class ids (N,), or soft labels (N, Z).
    """
    scores = scores.detach()
    y = labels if labels.is_floating_point() else F.one_hot(labels, scores.shape[1])
    return scores.softmax(1) - y.to(scores.dtype)


def share(loss: Tensor, labels: Tensor, all_labels: Tensor) -> Tensor:
    """Return the mean over a part of the batch times the part's share: the parts add up to the mean over the batch.

    Args:
        loss: mean over the part, a scalar.
        labels: those of the part.
        all_labels: those of the batch.
    """
    return loss * (len(labels) / len(all_labels))


def micro_batches(
    function: Callable[..., Any], size: int, trunk: nn.Module, heads: nn.Module, *batch: Any
) -> Tensor | tuple[Tensor, ...]:
    """Call ``function(trunk, heads, *part, share)`` on parts of a batch, of ``size`` images or the rest.

    ``share`` is the part's share of the batch, which weights its loss. An optimizer after the tensors of the batch is
    passed on after the share. A batch of up to ``size`` images is taken whole.

    Args:
        function: returns one value or several: tensors with the batch first, or scalars.
        size: number of images in a part; 0 is the whole batch.
        trunk: the model.
        heads: its heads.
        batch: tensors with the batch first; an optimizer may follow them.

    Returns:
        What the calls return, put together: tensors one after another, scalars added.
    """
    tensors = [values for values in batch if isinstance(values, Tensor)]
    handed_on, count = batch[len(tensors) :], len(tensors[0])
    if not size or count <= size:
        return function(trunk, heads, *tensors, 1.0, *handed_on)
    whole: list[Tensor] = []
    for start in range(0, count, size):
        part = tuple(values[start : start + size] for values in tensors)
        made = function(trunk, heads, *part, len(part[0]) / count, *handed_on)
        results = made if isinstance(made, tuple) else (made,)
        if not whole:
            whole = [torch.zeros_like(r) if r.dim() == 0 else enlarged(r, count) for r in results]
        for gathered, result in zip(whole, results, strict=True):
            if result.dim() == 0:
                gathered += result
            else:
                gathered[start : start + size] = result
        del made, results
    return tuple(whole) if len(whole) > 1 else whole[0]


def exact_parts(
    function: Callable[..., Any], size: int, trunk: nn.Module, heads: nn.Module, *batch: Any, keep: str = ""
) -> Tensor | list[Tensor] | tuple[Any, ...]:
    """Differentiate the loss of a batch in parts of ``size`` images or the rest, as if it were taken whole.

    Args:
        function: called as ``function(trunk, heads, *part, share)``; ``share`` is the part's share of the batch. It
            returns what is passed on, detached, then the loss (a scalar, times the share), then detached scores.
        size: number of images in a part; 0 is the whole batch.
        trunk: the model.
        heads: its heads.
        batch: tensors, or lists of parts as this function returns them; labels are last. The parts of a list are
            dropped one by one, and the list is empty after the call. An optimizer after them scales the loss.
        keep: last names of norms of the trunk, with + between them, whose inputs are kept for the whole batch (of a
            concatenation, what it puts together): less arithmetic for more memory.

    Returns:
        What is passed on as lists of parts, then the loss, detached, then the scores of the whole batch. Gradients are
        added to those of the parameters; running statistics move once.

    Raises:
        MethodError: the function normalises by the batch, or draws, in a way that is not known; or what is kept does
            not divide it.
    """
    return in_parts(function, size, trunk, heads, batch, keep)


def average(x: Tensor, *dims: int, keepdim: bool = False) -> Tensor:
    """Return the mean over ``dims``. Its gradient is a view of few values; that of ``mean`` is as large as ``x``.

    Args:
        x: a tensor (...).
        dims: dimensions to average over.
        keepdim: keep them, with size 1.
    """
    if x.dtype is torch.float16:  # a sum may exceed its range
        return x.mean(dims, keepdim=keepdim)
    return x.sum(dims, keepdim=keepdim) / math.prod(x.shape[dim] for dim in dims)


def global_average(x: Tensor) -> Tensor:
    """Return the mean over all positions: (N, C, H, W) to (N, C, 1, 1), or any other number of spatial dimensions.

    Args:
        x: a map (N, C, ...).
    """
    if has_torch_function_unary(x):
        return handle_torch_function(global_average, (x,), x)
    return average(x, *range(2, x.dim()), keepdim=True)


@torch.no_grad()
def pull(copy: nn.Module, source: nn.Module, decay: float) -> None:
    """Move every parameter of ``copy`` towards that of ``source``: p <- decay * p + (1 - decay) * p_source.

    Args:
        copy: what is moved.
        source: where to: a module with the same parameters.
        decay: share of its old value that a parameter keeps, 0..1.
    """
    copies = list(copy.parameters())
    sources = [p.to(c) for c, p in zip(copies, source.parameters(), strict=True)]
    lerp_all(copies, sources, 1 - decay)


def without_gradient(function: Callable[..., Any], *values: Any) -> Any:
    """Return ``function(*values)``, keeping nothing for a backward.

    Args:
        function: what to call.
        values: its arguments.
    """
    with torch.no_grad():
        return function(*values)


def recompute(function: Callable[..., Any], *values: Any) -> Any:
    """Return ``function(*values)``, keeping only ``values`` for the backward, which runs the function again.

    A Sequential is computed again member by member, the last two as one, and keeps what passes between them too. See
    :func:`localize.ops.recomputation.again`.
    """
    if not isinstance(function, nn.Sequential):
        return again(function, *values)
    *members, last = function
    parts: list[Callable[..., Any]] = [*members[:-1], in_sequence(*members[-1:], last)]
    return in_sequence(*(partial(again, part) for part in parts))(*values)


def in_sequence(*functions: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function that calls these one after another; each takes all values that the one before returns.

    Args:
        functions: one or more.
    """

    def run(*values: Any) -> Any:
        result: Any = values
        for function in functions:
            result = function(*values)
            values = result if isinstance(result, tuple) else (result,)
        return result

    return run


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None
