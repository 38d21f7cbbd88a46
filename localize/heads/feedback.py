"""Fixed random feedback, which trains a layer instead of the gradient.

Sources: T. P. Lillicrap, D. Cownden, D. B. Tweed, C. J. Akerman, "Random synaptic feedback weights support error
backpropagation for deep learning", Nature Communications 7, 2016; A. Nøkland, "Direct feedback alignment provides
learning in deep neural networks", NeurIPS 2016; C. Frenkel, M. Lefebvre, D. Bol, "Learning without feedback: fixed
random learning signals allow for feedforward training of deep neural networks", Frontiers in Neuroscience 15, 2021.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from localize.errors import MethodError
from localize.heads import blocks
from localize.heads.branch import Branch
from localize.ir import Features, Segment, Target, Term

REDUCTIONS = {"sum": "localize.losses.summed_alignment", "mean": "localize.losses.alignment"}
"""Losses by reduction: the gradients of a batch are used as they are, or divided by the batch size."""

# ------------------------------------------------------------------------------------------- from the output to a layer


class RandomProjection(nn.Module):
    """A fixed random matrix B (Z, D) from classes to the D activities of a layer, from U(-s / sqrt(D), s / sqrt(D)).

    Args:
        classes: Z.
        shape: shape of the activities of one image.
        scale: s.
    """

    def __init__(self, classes: int, shape: tuple[int, ...], scale: float) -> None:
        super().__init__()
        self.shape, self.scale = shape, scale
        self.weight = nn.Parameter(torch.empty(classes, math.prod(shape)), requires_grad=False)

    def reset_parameters(self) -> None:
        """Draw a new B."""
        bound = self.scale / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)

    def extra_repr(self) -> str:
        """Show sizes and scale."""
        return f"{self.weight.shape[0]} classes -> {self.shape}, scale={self.scale:.3g}"


class LabelProjection(RandomProjection):
    """B^T y for one-hot labels y: the row of B for each label (Frenkel et al. 2021). Labels (N, Z) are y themselves.

    Shape:
        class ids (N,), or labels (N, Z); returns (N, *shape).
    """

    takes_labels = ("ids", "soft", "multi")

    def forward(self, labels: Tensor) -> Tensor:
        rows = labels.to(self.weight.dtype) @ self.weight if labels.is_floating_point() else self.weight[labels]
        return rows.unflatten(1, self.shape)


class ErrorProjection(RandomProjection):
    """B^T e for the output's error e (Nøkland 2016).

    Shape:
        e (N, Z); returns (N, *shape).
    """

    def forward(self, error: Tensor) -> Tensor:
        return (error @ self.weight).unflatten(1, self.shape)


class Joined(nn.Module):
    """All values at a cut, flattened and concatenated.

    Shape:
        tensors (N, ...); returns (N, D).
    """

    def forward(self, *values: Tensor) -> Tensor:
        return torch.cat([value.flatten(1) for value in values], 1)


def projected(
    segment: Segment, classes: int, *, of: Literal["labels", "error"], scale: float, reduction: str
) -> Branch:
    """Return the term <h, B^T t> for a segment's output h (N, ...), whose gradient at h is B^T t.

    Args:
        segment: the segment to train.
        classes: Z.
        of: ``labels`` (t is the one-hot label) or ``error`` (t is the error of the output).
        scale: scale of the entries of B, see :class:`RandomProjection`.
        reduction: ``sum``, or ``mean`` to divide the gradient by the batch size.
    """
    k, several = segment.index, len(segment.features) > 1
    kind = LabelProjection if of == "labels" else ErrorProjection
    with torch.device("meta"):
        module = kind(classes, _shape(segment.features), scale)
    target = blocks.of_module(f"feedback_{k}", module, role="shared", facts={"shape": list(module.weight.shape)})
    joined = (blocks.of_module(f"joined_{k}", Joined(), *(f.shape for f in segment.features)),) if several else ()
    head = joined[0].name if joined else None
    term = Term(REDUCTIONS[reduction], head, scores=False, target=Target(of, target.name))
    return Branch(term, (*joined, target))


def _shape(features: Sequence[Features]) -> tuple[int, ...]:
    """Return the shape of the activities: that of the features, or the total length of several."""
    return features[0].shape if len(features) == 1 else (sum(math.prod(f.shape) for f in features),)


# ------------------------------------------------------------------------------------------------ from layer to layer


class _Through(torch.autograd.Function):
    """Return ``y``; in the backward, ``y`` gets its gradient, and ``x`` gets ``back`` of that gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, feedback: Tensor, back: Any) -> Tensor:
        ctx.save_for_backward(feedback)
        ctx.shape, ctx.back, ctx.dtype = x.shape, back, x.dtype
        ctx.mark_dirty(y)  # so that the result is not a view, which later operations could not overwrite
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (feedback,) = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return gradient, None, None, None
        returned = ctx.back(gradient.to(feedback.dtype), feedback, ctx.shape)
        return gradient, returned.to(ctx.dtype), None, None


class _Feedback(nn.Module):
    """A layer whose input receives its gradient through a fixed random matrix with the shape of the weight.

    The matrix has torch's default initialisation for this layer: U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)).
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.feedback = nn.Parameter(torch.empty(shape), requires_grad=False)

    def reset_parameters(self) -> None:
        """Draw a new matrix."""
        bound = 1 / math.sqrt(math.prod(self.feedback.shape[1:]))
        nn.init.uniform_(self.feedback, -bound, bound)

    def extra_repr(self) -> str:
        """Show the shape."""
        return f"{tuple(self.feedback.shape)}"


class FeedbackLinear(_Feedback):
    """``F.linear`` with dx = dy B instead of dy W (Lillicrap et al. 2016); dW and db are the true gradients.

    Shape:
        x (..., in), weight (out, in), bias (out,) or None; returns (..., out).
    """

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return _Through.apply(F.linear(x.detach(), weight, bias), x, self.feedback, _linear_back)


class FeedbackConv2d(_Feedback):
    """``F.conv2d`` with the input's gradient through B instead of W; weight and bias get their true gradients.

    Args:
        conv: the layer to replace; its stride, padding, dilation and groups are kept.

    Shape:
        x (N, C, H, W), weight (out, C / groups, kh, kw), bias (out,) or None; returns (N, out, H', W').
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(tuple(conv.weight.shape))
        self.geometry = (conv.stride, _padding(conv), conv.dilation, conv.groups)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return _Through.apply(F.conv2d(x.detach(), weight, bias, *self.geometry), x, self.feedback, self._back)

    def _back(self, gradient: Tensor, feedback: Tensor, shape: torch.Size) -> Tensor:
        return conv2d_input(shape, feedback, gradient, *self.geometry)


def _linear_back(gradient: Tensor, feedback: Tensor, shape: torch.Size) -> Tensor:
    return gradient @ feedback


def _padding(conv: nn.Conv2d) -> tuple[int, ...]:
    """Return the padding as numbers."""
    if not isinstance(conv.padding, str):
        return conv.padding
    if conv.padding == "valid":
        return (0, 0)
    if conv.padding == "same":
        return tuple(d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    raise ValueError(f"PyTorch has no padding {conv.padding!r}")


def feedback_module(module: nn.Module, path: str) -> nn.Module | None:
    """Return a layer with fixed random feedback that replaces ``module``; None if it is not linear or a convolution.

    Args:
        module: a module of the trunk.
        path: its name, for the message.

    Raises:
        MethodError: it is a convolution that pads with values other than zeros, or differently on the two sides.
    """
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        with torch.device("meta"):
            return FeedbackLinear(tuple(module.weight.shape))
    if not (isinstance(module, nn.Conv2d) and type(module).forward is nn.Conv2d.forward):
        return None
    odd = module.padding == "same" and any(
        d * (k - 1) % 2 for d, k in zip(module.dilation, module.kernel_size, strict=True)
    )
    if module.padding_mode != "zeros" or odd:
        kind = "by different numbers left and right" if odd else f"by {module.padding_mode!r}"
        raise MethodError(
            f"the convolution {path} pads {kind}.",
            facts="the feedback of a convolution needs zero padding, equal on both sides.",
            help="use a model whose convolutions pad with zeros",
        )
    with torch.device("meta"):
        return FeedbackConv2d(module)
