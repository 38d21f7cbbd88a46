"""The auxiliary nets of decoupled greedy learning: small convolutional or fully connected classifiers.

Source: E. Belilovsky, M. Eickenberg, E. Oyallon, "Decoupled greedy learning of CNNs", ICML 2020, sec. 4.1 (CNN-aux,
MLP-aux, MLP-SR-aux); sizes as in the reference code (eugenium/DGL at 4cc7c17).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from localize.errors import OptionError, did_you_mean
from localize.heads import blocks
from localize.heads.branch import Branch
from localize.heads.maps import Chain, FeatureMap
from localize.ir import Features, Segment, Term, Trunk

KINDS = ("mlp-sr", "mlp", "cnn")
"""The auxiliary nets of the paper: MLP-SR-aux, MLP-aux, CNN-aux."""


def auxiliary(
    segment: Segment,
    trunk: Trunk,
    name: str,
    *,
    kind: str = "mlp-sr",
    n_conv: int = 3,
    n_hidden: int = 3,
    bias: bool = True,
) -> Branch:
    """Classify with a small net and a cross-entropy.

    Args:
        segment: the segment to train.
        trunk: its model.
        name: name of the head.
        kind: ``mlp-sr``, ``mlp`` (see :class:`SpatialMLP`) or ``cnn`` (see :class:`SmallCNN`).
        n_conv: number of 1x1 convolutions of ``mlp-sr``.
        n_hidden: number of hidden linear layers of ``mlp-sr`` and ``mlp``.
        bias: whether the hidden linear layers have a bias.

    Returns:
        The head, which returns class scores (N, Z), and its loss.

    Raises:
        OptionError: there is no such kind.
    """
    if kind not in KINDS:
        raise OptionError(
            f"kind cannot be {kind!r}.",
            facts=f"its values are {', '.join(KINDS)}.",
            help=did_you_mean(kind, KINDS),
            option="kind",
        )
    classes = trunk.num_classes
    net: nn.Module
    if kind == "cnn":
        net = SmallCNN(segment.features, classes)
    else:
        convolutions = n_conv if kind == "mlp-sr" else 0
        net = SpatialMLP(segment.features, classes, n_conv=convolutions, n_hidden=n_hidden, bias=bias)
    head = blocks.of_module(name, net.to("meta"), *(f.shape for f in segment.features))
    return Branch(Term(blocks.CROSS_ENTROPY, head.name), (head,))


class SpatialMLP(Chain):
    """MLP-SR-aux (sec. 4.1): spatial reduction, then 1x1 convolutions, then a fully connected net.

    With s the height (and likewise the width) of the map, and C its channels: adaptive average pooling to ceil(s / 4);
    ``n_conv`` times a 1x1 convolution C -> C without bias, BatchNorm and ReLU; adaptive average pooling to 2x2;
    ``n_hidden`` times a linear layer 4C -> 4C, BatchNorm and ReLU; a linear layer to the classes. Without 1x1
    convolutions it is MLP-aux, and the map is pooled to 2x2 directly.

    An axis of length 1 keeps its length, so for a flat vector of F features the linear layers are F -> F.

    Args:
        features: layout of every tensor that crosses the cut.
        classes: number of classes.
        n_conv: number of 1x1 convolutions.
        n_hidden: number of hidden linear layers.
        bias: whether the hidden linear layers have a bias; the last linear layer always has one.

    Shape:
        one tensor for every entry of ``features``; returns (N, classes).
    """

    def __init__(self, features: Sequence[Features], classes: int, *, n_conv: int, n_hidden: int, bias: bool) -> None:
        maps = FeatureMap(features)
        channels, height, width = maps.shape
        end = _ends_at(height, width)
        flat = channels * end[0] * end[1]
        super().__init__(
            maps,
            *([nn.AdaptiveAvgPool2d((-(-height // 4), -(-width // 4)))] if n_conv else []),
            *(layer for _ in range(n_conv) for layer in _convolution(channels, 1)),
            nn.AdaptiveAvgPool2d(end),
            nn.Flatten(),
            *(layer for _ in range(n_hidden) for layer in _linear(flat, bias=bias)),
            nn.Linear(flat, classes),
        )


class SmallCNN(Chain):
    """CNN-aux (sec. 4.1): two 3x3 convolutions, then a linear layer.

    The convolutions C -> C have BatchNorm and ReLU; the map is then pooled to 2x2 and normalised with BatchNorm.

    Args:
        features: layout of every tensor that crosses the cut.
        classes: number of classes.

    Shape:
        one tensor for every entry of ``features``; returns (N, classes).
    """

    def __init__(self, features: Sequence[Features], classes: int) -> None:
        maps = FeatureMap(features)
        channels, height, width = maps.shape
        end = _ends_at(height, width)
        super().__init__(
            maps,
            *_convolution(channels, 3),
            *_convolution(channels, 3),
            nn.AdaptiveAvgPool2d(end),
            nn.BatchNorm2d(channels),
            nn.Flatten(),
            nn.Linear(channels * end[0] * end[1], classes),
        )


def _ends_at(height: int, width: int) -> tuple[int, int]:
    """Return the size of the map that is flattened: 2x2, except that no axis is enlarged."""
    return min(height, 2), min(width, 2)


def _convolution(channels: int, kernel: int) -> Iterator[nn.Module]:
    yield nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=False)
    yield nn.BatchNorm2d(channels)
    yield nn.ReLU()


def _linear(width: int, *, bias: bool) -> Iterator[nn.Module]:
    yield nn.Linear(width, width, bias=bias)
    yield nn.BatchNorm1d(width)
    yield nn.ReLU()
