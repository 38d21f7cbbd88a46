"""Projections of features to one short vector per image, for contrastive losses and for class scores.

Sources: Y. Wang, Z. Ni, S. Song, L. Yang, G. Huang, "Revisiting locally supervised learning: an alternative to
end-to-end training", ICLR 2021 (InfoPro), with the head sizes of its code (blackfeather-wang/InfoPro-Pytorch at
a38362a); S. Choi et al., "Dictionary contrastive learning for efficient local supervision without auxiliary networks",
ICLR 2024, app. J.2.4 (LL-cont, and the linear heads of Table V).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localize.cutting import cuts
from localize.errors import OptionError
from localize.heads.dictionary import embedding_width, local_vectors
from localize.heads.maps import Chain, FeatureMap, GlobalAverage
from localize.heads.similarity import Pooled
from localize.ir import Features, Grain, Trunk
from localize.ops import average

CONFIGURATIONS = ("0c1f", "0c2f", "1c1f", "1c2f", "1c3f", "2c2f")
"""Heads of InfoPro, named by their numbers of convolutions and linear layers."""


class Unit(nn.Module):
    """Scale every vector (N, D) to length 1."""

    def forward(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=1)


class MeanVector(nn.Module):
    """One vector per image: its averaged local vectors (or its class token); those of several tensors are concatenated.

    Args:
        features: layout of every tensor that crosses the cut.
        k: number of contiguous parts into which a flat feature vector is cut before averaging.
        unit: scale the vector to length 1.

    Shape:
        (N, C, H, W), (N, T, C) or (N, F); returns (N, sum of the widths).

    Source: DCL, app. J.2.4 (h := 1/K sum_k h^k); CFL, sec. 3.2.2.
    """

    def __init__(self, features: Sequence[Features], *, k: int = 1, unit: bool = True) -> None:
        super().__init__()
        self.features, self.k, self.unit = tuple(features), k, unit
        self.width = sum(embedding_width(f, k) for f in features)

    def forward(self, *values: Tensor) -> Tensor:
        means = [average(local_vectors(v, f, self.k), 2) for v, f in zip(values, self.features, strict=True)]
        vectors = means[0] if len(means) == 1 else torch.cat(means, 1)
        return F.normalize(vectors, dim=1) if self.unit else vectors

    def extra_repr(self) -> str:
        """Show what is read from the features."""
        return ", ".join(f"{f.kind} {f.shape}" for f in self.features) + (f", k={self.k}" if self.k > 1 else "")


class LinearProjection(Chain):
    """The average of local vectors, then one linear layer: the contrast head of DCL's Table V.

    Args:
        features: layout of every tensor that crosses the cut.
        out: D, length of the vectors, or number of classes.
        unit: scale the vectors to length 1 (for contrastive losses).

    Shape:
        as :class:`MeanVector`; returns (N, D).
    """

    def __init__(self, features: Sequence[Features], out: int, *, unit: bool) -> None:
        mean = MeanVector(features, unit=False)
        super().__init__(mean, nn.Linear(mean.width, out), *([Unit()] if unit else []))


class PooledProjection(Chain):
    """The map pooled to at most ``limit`` values, then one linear layer: the contrast head of LL-cont.

    Flat features are not pooled.

    Args:
        features: layout of every tensor that crosses the cut.
        out: D, length of the vectors, or number of classes.
        limit: A, the largest number of inputs of the linear layer.
        unit: scale the vectors to length 1 (for contrastive losses).

    Shape:
        (N, C, H, W), (N, T, C) or (N, F); returns (N, D).

    Source: DCL, app. J.2.4; pooling of A. Nøkland, L. H. Eidnes, "Training neural networks with local error signals",
    ICML 2019.
    """

    def __init__(self, features: Sequence[Features], out: int, *, limit: int, unit: bool) -> None:
        pooled = Pooled(features, limit)
        super().__init__(pooled, nn.Flatten(), nn.Linear(pooled.width, out), *([Unit()] if unit else []))


class ConvolutionalProjection(Chain):
    """InfoPro's head: 3x3 convolutions, global average pooling, and linear layers.

    The first convolution doubles the width and halves the map, if the trunk later gets wider than the features; all
    others keep both. Between two linear layers there are 128 features and a ReLU.

    Args:
        features: layout of every tensor that crosses the cut.
        out: length of the vectors, or number of classes.
        configuration: number of convolutions and of linear layers, one of ``CONFIGURATIONS``.
        widest: width of the widest feature map of the trunk.
        unit: scale the vectors to length 1 (for contrastive losses).

    Shape:
        (N, C, H, W) or (N, T, C); returns (N, out).
    """

    HIDDEN = 128

    def __init__(
        self,
        features: Sequence[Features],
        out: int,
        *,
        configuration: str = "1c2f",
        widest: int,
        unit: bool,
    ) -> None:
        convolutions, linear = counted(configuration)
        image = FeatureMap(features)
        width = image.shape[0]
        layers: list[nn.Module] = [image]
        for number in range(convolutions):
            grows = number == 0 and width < widest
            layers += _convolution(width, 2 * width if grows else width, stride=2 if grows else 1)
            width = 2 * width if grows else width
        layers += [GlobalAverage(), nn.Flatten()]
        for number in range(linear - 1):
            layers += [nn.Linear(self.HIDDEN if number else width, self.HIDDEN), nn.ReLU()]
        layers.append(nn.Linear(self.HIDDEN if linear > 1 else width, out))
        super().__init__(*layers, *([Unit()] if unit else []))


class DeepProjection(Chain):
    """InfoPro's head on ImageNet: convolutions of widths 128, 256, 512 and 2048, pooling, one linear layer.

    The first and the last convolution are 1x1, those between are 3x3 with stride 2; none has a bias, each has BatchNorm
    and ReLU.

    Shape:
        (N, C, H, W) or (N, T, C); returns (N, out).
    """

    WIDTHS = (128, 256, 512, 2048)

    def __init__(self, features: Sequence[Features], out: int, *, unit: bool) -> None:
        image = FeatureMap(features)
        layers: list[nn.Module] = [image]
        width = image.shape[0]
        for number, wider in enumerate(self.WIDTHS):
            between = 0 < number < len(self.WIDTHS) - 1
            layers += _convolution(width, wider, size=3 if between else 1, stride=2 if between else 1)
            width = wider
        layers += [GlobalAverage(), nn.Flatten(), nn.Linear(width, out)]
        super().__init__(*layers, *([Unit()] if unit else []))


def counted(configuration: str) -> tuple[int, int]:
    """Return the numbers of convolutions and linear layers of a name such as ``1c2f``.

    Raises:
        OptionError: it is not such a name.
    """
    match = re.fullmatch(r"(\d)c([1-9])f", configuration)
    if match is None:
        raise OptionError(
            f"{configuration!r} is not a head.",
            facts=f"heads are {', '.join(CONFIGURATIONS)}: convolutions and linear layers.",
        )
    return int(match[1]), int(match[2])


def widest_map(trunk: Trunk) -> int:
    """Return the number of channels of the widest feature map (or token) between the local layers of a trunk."""
    ends = [layer.end.features for layer in cuts.local_layers(trunk, Grain()) if layer.end is not None]
    return max((f.width for features in ends for f in features if f.kind != "flat"), default=0)


def _convolution(inputs: int, outputs: int, *, size: int = 3, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
