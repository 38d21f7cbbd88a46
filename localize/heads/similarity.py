"""Heads of local error signals: label prediction and similarity matching, and both without backprop.

Source: A. Nøkland, L. H. Eidnes, "Training neural networks with local error signals", ICML 2019, with the sizes of the
reference code (anokland/local-loss at 7b3b40b). The losses are in :mod:`localize.losses`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn

from localize.heads import blocks
from localize.heads.branch import Branch
from localize.heads.feedback import FeedbackLinear, LabelProjection
from localize.heads.maps import FeatureMap, is_flat
from localize.ir import Block, Features, Segment, Target, Term, Trunk

SIMILARITY = "localize.losses.similarity_matching"
SIGNS = "localize.losses.sign_cross_entropy"

# ----------------------------------------------------------------------------------------------------------- branches


def prediction(segment: Segment, trunk: Trunk, name: str, *, dim_in: int = 0, zero_init: bool = True) -> Branch:
    """Pool the features and predict the label with one linear layer and a cross-entropy (L_pred).

    Args:
        segment: the segment to train.
        trunk: its model.
        name: name of the head.
        dim_in: features are pooled to at most this number of values; 0 means :func:`decoder_width` of the trunk.
        zero_init: whether the linear layer's weight starts at zero.
    """
    width = dim_in or decoder_width(trunk)
    module = Prediction(segment.features, width, trunk.num_classes, zero_init=zero_init).to("meta")
    head = _head(name, module, segment, module.pooled)
    return Branch(Term(blocks.CROSS_ENTROPY, head.name), (head,))


def similarity(segment: Segment, trunk: Trunk, name: str) -> Branch:
    """Make the images of a batch as similar to each other as their labels are (L_sim).

    Args:
        segment: the segment to train.
        trunk: its model.
        name: name of the head; its target is a block called ``one_hot``, which all such branches share.
    """
    head = blocks.of_module(name, Mixed(segment.features).to("meta"), *(f.shape for f in segment.features))
    target = blocks.of_module("one_hot", OneHot(trunk.num_classes), role="shared")
    term = Term(SIMILARITY, head.name, scores=False, target=Target("labels", target.name))
    return Branch(term, (head, target))


def sign_prediction(segment: Segment, trunk: Trunk, name: str, *, dim_in: int = 0, size: int = 128) -> Branch:
    """Pool the features and predict the signs of random projections of the label, with fixed feedback.

    Args:
        segment: the segment to train.
        trunk: its model.
        name: name of the head.
        dim_in: as in :func:`prediction`.
        size: number of projections.
    """
    module = SignPrediction(segment.features, dim_in or decoder_width(trunk), size).to("meta")
    head = replace(_head(name, module, segment, module.pooled), feedback=True)
    target = _projected_labels(segment, trunk, size)
    term = Term(SIGNS, head.name, scores=False, target=Target("labels", target.name))
    return Branch(term, (head, target))


def projected_similarity(segment: Segment, trunk: Trunk, name: str, *, dim_in: int = 0, size: int = 128) -> Branch:
    """Make the pooled features of images as similar to each other as random projections of their labels are.

    Args:
        segment: the segment to train.
        trunk: its model.
        name: name of the head, which has no parameters.
        dim_in: as in :func:`prediction`.
        size: number of projections, shared with :func:`sign_prediction` on the same segment.
    """
    module = Pooled(segment.features, dim_in or decoder_width(trunk))
    head = _head(name, module, segment, module)
    target = _projected_labels(segment, trunk, size)
    term = Term(SIMILARITY, head.name, scores=False, target=Target("labels", target.name))
    return Branch(term, (head, target))


def decoder_width(trunk: Trunk) -> int:
    """Return the number of values to which features are pooled: 4096 for 100 classes, 1024 for 28x28 images, else 2048.

    The source lists it by data set; more classes are treated like 100, smaller images like 28x28.
    """
    if trunk.num_classes >= 100:
        return 4096
    return 1024 if len(trunk.input_shape) == 3 and max(trunk.input_shape[1:]) <= 28 else 2048


def _head(name: str, module: nn.Module, segment: Segment, pooled: Pooled) -> Block:
    facts = {"kernel": list(pooled.kernel), "padding": list(pooled.padding), "values": pooled.width}
    return blocks.of_module(name, module, *(f.shape for f in segment.features), facts=facts)


def _projected_labels(segment: Segment, trunk: Trunk, size: int) -> Block:
    """Return the fixed projection of labels, with entries U(-1, 1) / sqrt(Z) as in a new linear layer."""
    classes = trunk.num_classes
    module = LabelProjection(classes, (size,), scale=(size / classes) ** 0.5).to("meta")
    return blocks.of_module(f"targets_{segment.index}", module, role="shared", facts={"shape": [classes, size]})


# ------------------------------------------------------------------------------------------------------------ modules


class Pooled(nn.Module):
    """Average pooling of a map to at most ``limit`` values; a flat vector does not change.

    Kernel and stride are equal. The height and the width of the kernel are doubled in turn, as long as there are more
    values than ``limit``. The last window of an axis may extend beyond the map; the zeros beyond the map are divided
    between its two sides.

    Args:
        features: layout of every tensor that crosses the cut.
        limit: largest number of values.

    Shape:
        one tensor for every entry of ``features``; returns (N, C, h, w), with ``width`` values per image, or (N, F).
    """

    def __init__(self, features: Sequence[Features], limit: int) -> None:
        super().__init__()
        self.maps = FeatureMap(features)
        channels, height, width = self.maps.shape
        self.flat = is_flat(features)
        self.kernel, self.padding = (1, 1), (0, 0)
        left = (height, width)
        if not self.flat:
            self.kernel, self.padding, left = pooling(channels, height, width, limit)
        self.width = channels * left[0] * left[1]

    def forward(self, *values: Tensor) -> Tensor:
        value = self.maps(*values)
        if self.flat:
            return value.flatten(1)
        return value if self.kernel == (1, 1) else F.avg_pool2d(value, self.kernel, self.kernel, self.padding)

    def extra_repr(self) -> str:
        """Show the window."""
        return f"kernel={self.kernel}, padding={self.padding}, {self.width} values"


def pooling(channels: int, height: int, width: int, limit: int) -> tuple[tuple[int, int], ...]:
    """Return kernel, padding and resulting size, each (vertical, horizontal), of the pooling of a map.

    Args:
        channels: C.
        height: H.
        width: W.
        limit: largest number of remaining values, unless C alone exceeds it.
    """
    kernel = [1, 1]
    sizes = (height, width)

    def left(axis: int) -> int:
        return -(-sizes[axis] // kernel[axis])

    while channels * left(0) * left(1) > limit and any(k < n for k, n in zip(kernel, sizes, strict=True)):
        for axis in (0, 1):
            if channels * left(0) * left(1) > limit and kernel[axis] < sizes[axis]:
                kernel[axis] *= 2
    padding = tuple(kernel[a] * (left(a) - sizes[a] // kernel[a]) // 2 for a in (0, 1))
    return (kernel[0], kernel[1]), (padding[0], padding[1]), (left(0), left(1))


class Prediction(nn.Module):
    """Class scores of pooled features from one linear layer.

    Args:
        features: layout of every tensor that crosses the cut.
        limit: largest number of pooled values, see :class:`Pooled`.
        classes: number of classes.
        zero_init: start the weight at zero, and the bias as in torch.

    Shape:
        one tensor for every entry of ``features``; returns (N, classes).
    """

    def __init__(self, features: Sequence[Features], limit: int, classes: int, *, zero_init: bool) -> None:
        super().__init__()
        self.pooled = Pooled(features, limit)
        self.linear = (_ZeroLinear if zero_init else nn.Linear)(self.pooled.width, classes)

    def forward(self, *values: Tensor) -> Tensor:
        return self.linear(self.pooled(*values).flatten(1))


class _ZeroLinear(nn.Linear):
    """A linear layer whose weight starts at zero."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.weight)


class Mixed(nn.Module):
    """Features on which similarity is measured: a 3x3 convolution of maps, a linear map of flat vectors; no bias.

    Args:
        features: layout of every tensor that crosses the cut.

    Shape:
        one tensor for every entry of ``features``; returns (N, C, H, W), or (N, F).
    """

    def __init__(self, features: Sequence[Features]) -> None:
        super().__init__()
        self.maps = FeatureMap(features)
        self.flat = is_flat(features)
        channels = self.maps.shape[0]
        convolution = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.mix = nn.Linear(channels, channels, bias=False) if self.flat else convolution

    def forward(self, *values: Tensor) -> Tensor:
        value = self.maps(*values)
        return self.mix(value.flatten(1) if self.flat else value)


class SignPrediction(nn.Module):
    """Logits of pooled features from a linear layer that sends its error back through a fixed random matrix.

    Weight and bias start at zero. The feedback matrix has torch's default initialisation and never changes.

    Args:
        features: layout of every tensor that crosses the cut.
        limit: largest number of pooled values, see :class:`Pooled`.
        size: number of logits.

    Shape:
        one tensor for every entry of ``features``; returns (N, size).
    """

    def __init__(self, features: Sequence[Features], limit: int, size: int) -> None:
        super().__init__()
        self.pooled = Pooled(features, limit)
        self.linear = _FeedbackDecoder(self.pooled.width, size)

    def forward(self, *values: Tensor) -> Tensor:
        return self.linear(self.pooled(*values).flatten(1))


class _FeedbackDecoder(nn.Linear):
    """A linear layer that starts at zero, with fixed random feedback to its input."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.back = FeedbackLinear((outputs, inputs))

    def reset_parameters(self) -> None:
        """Set weight and bias to zero."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.back(x, self.weight, self.bias)


class OneHot(nn.Module):
    """One-hot vectors of class ids; labels that are already vectors do not change.

    Shape:
        class ids (N,), or labels (N, Z); returns (N, Z).
    """

    takes_labels = ("ids", "soft", "multi")

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, labels: Tensor) -> Tensor:
        return labels if labels.is_floating_point() else F.one_hot(labels, self.classes).float()

    def extra_repr(self) -> str:
        """Show the number of classes."""
        return f"classes={self.classes}"
