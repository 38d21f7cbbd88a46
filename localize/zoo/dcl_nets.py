"""The fully connected and convolutional networks of the forward-learning comparisons.

Choi et al. (DCL), "Dictionary Contrastive Learning for Efficient Local Supervision without Auxiliary Networks",
ICLR 2024, Table VI; the same networks in its precursor, "Backpropagation-free Contrastive Forward Learning Using Label
Embeddings" (CFL), and, FC only, in Hinton, "The Forward-Forward Algorithm", 2022, https://arxiv.org/abs/2212.13345.

What the tables leave open was settled by the parameter counts of the authors' code (schoi828/DCL @ef169c8):

- LayerNorm opens the *next* layer (pre-norm), so features are read before it, and the first layer has none:
  1,867,786 / 18,923,530 / 19,200,100 parameters. CFL's 18.93M has one on the raw input as well (``input_norm``).
- DCL's convolutions have a bias, CFL's have none (``bias``).
- The authors' FC nets apply ReLU to the logits. Here they do not, unless ``relu_logits`` asks for it.

DCL reads fc features as K segments: K = 8 (fc_mnist), 48 (fc_cifar10), 12 (fc_cifar100).
"""

from __future__ import annotations

from collections import OrderedDict
from math import prod

from torch import Tensor, nn


class FCNet(nn.Module):
    """Two hidden fc layers of the same width, each one local layer, and a linear classifier.

    Args:
        width: units of both hidden layers.
        num_classes: width of the logits.
        input_shape: ``(C, H, W)``; images are flattened first.
        dropout: rate in [0, 1) after both hidden layers.
        input_norm: LayerNorm on the flattened image (CFL).
        relu_logits: ReLU on the logits (the authors' DCL code).

    ``layer1`` is flatten-(norm)-fc-relu-(dropout), ``layer2`` is norm-fc-relu-(dropout), then ``norm`` and ``fc``.

    Shapes: ``(N, C, H, W) -> (N, num_classes)``.
    """

    def __init__(
        self,
        width: int,
        num_classes: int = 10,
        *,
        input_shape: tuple[int, int, int],
        dropout: float = 0.0,
        input_norm: bool = False,
        relu_logits: bool = False,
    ) -> None:
        super().__init__()
        pixels = prod(input_shape)
        first: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        if input_norm:
            first["norm"] = nn.LayerNorm(pixels)
        self.layer1 = nn.Sequential(first | _fc_relu(pixels, width, dropout))
        second: OrderedDict[str, nn.Module] = OrderedDict(norm=nn.LayerNorm(width))
        self.layer2 = nn.Sequential(second | _fc_relu(width, width, dropout))
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, num_classes)
        self.relu_logits = nn.ReLU() if relu_logits else None

    def forward(self, x: Tensor) -> Tensor:
        logits = self.fc(self.norm(self.layer2(self.layer1(x))))
        return logits if self.relu_logits is None else self.relu_logits(logits)


class ConvNet(nn.Module):
    """3x3 convolutions with BatchNorm and ReLU, each one local layer, global average pooling, a linear classifier.

    Args:
        widths: channels of each layer; the first has stride 1, all others stride 2.
        num_classes: width of the logits.
        input_shape: ``(C, H, W)``; only C shapes the network.
        dropout: rate in [0, 1) after every layer, whole channels.
        bias: convolutions have a bias (DCL) or none (CFL).

    ``layers.0``, ``layers.1`` ... are conv-bn-relu-(dropout); then ``avgpool`` and ``fc``.

    Shapes: ``(N, C, H, W) -> (N, num_classes)``.
    """

    def __init__(
        self,
        widths: tuple[int, ...],
        num_classes: int = 10,
        *,
        input_shape: tuple[int, int, int] = (3, 32, 32),
        dropout: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = input_shape[0]
        for number, width in enumerate(widths):
            layer: OrderedDict[str, nn.Module] = OrderedDict(
                conv=nn.Conv2d(channels, width, 3, stride=1 if number == 0 else 2, padding=1, bias=bias),
                bn=nn.BatchNorm2d(width),
                relu=nn.ReLU(inplace=True),
            )
            if dropout > 0:
                layer["dropout"] = nn.Dropout2d(dropout)
            layers.append(nn.Sequential(layer))
            channels = width
        self.layers = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.avgpool(self.layers(x)).flatten(1))


def _fc_relu(inputs: int, outputs: int, dropout: float) -> OrderedDict[str, nn.Module]:
    layer: OrderedDict[str, nn.Module] = OrderedDict(fc=nn.Linear(inputs, outputs), relu=nn.ReLU(inplace=True))
    if dropout > 0:
        layer["dropout"] = nn.Dropout(dropout)
    return layer


def fc_mnist(
    num_classes: int = 10,
    *,
    input_shape: tuple[int, int, int] = (1, 28, 28),
    dropout: float = 0.0,
    input_norm: bool = False,
    relu_logits: bool = False,
) -> FCNet:
    """Build 784-1024-1024-10; 1,867,786 parameters. ``(N, 1, 28, 28) -> (N, num_classes)``. See :class:`FCNet`."""
    return FCNet(
        1024,
        num_classes,
        input_shape=input_shape,
        dropout=dropout,
        input_norm=input_norm,
        relu_logits=relu_logits,
    )


def fc_cifar10(
    num_classes: int = 10,
    *,
    input_shape: tuple[int, int, int] = (3, 32, 32),
    dropout: float = 0.0,
    input_norm: bool = False,
    relu_logits: bool = False,
) -> FCNet:
    """Build 3072-3072-3072-10; 18,923,530 parameters. ``(N, 3, 32, 32) -> (N, num_classes)``. See :class:`FCNet`."""
    return FCNet(
        3072,
        num_classes,
        input_shape=input_shape,
        dropout=dropout,
        input_norm=input_norm,
        relu_logits=relu_logits,
    )


def fc_cifar100(
    num_classes: int = 100,
    *,
    input_shape: tuple[int, int, int] = (3, 32, 32),
    dropout: float = 0.3,
    input_norm: bool = False,
    relu_logits: bool = False,
) -> FCNet:
    """Build 3072-3072-3072-100 with dropout 0.3, which Table VI counts as part of the network; 19,200,100 parameters.

    ``(N, 3, 32, 32) -> (N, num_classes)``. See :class:`FCNet`.
    """
    return FCNet(
        3072,
        num_classes,
        input_shape=input_shape,
        dropout=dropout,
        input_norm=input_norm,
        relu_logits=relu_logits,
    )


def conv256(
    num_classes: int = 10,
    *,
    input_shape: tuple[int, int, int] = (3, 32, 32),
    dropout: float = 0.0,
    bias: bool = True,
) -> ConvNet:
    """Build the Conv net 64-256; 152,714 parameters for 10 classes. ``(N, C, H, W) -> (N, num_classes)``.

    See :class:`ConvNet`.
    """
    return ConvNet((64, 256), num_classes, input_shape=input_shape, dropout=dropout, bias=bias)


def conv512(
    num_classes: int = 10,
    *,
    input_shape: tuple[int, int, int] = (3, 32, 32),
    dropout: float = 0.0,
    bias: bool = True,
) -> ConvNet:
    """Build the Conv net 64-256-512; 1,336,458 parameters for 10 classes. ``(N, C, H, W) -> (N, num_classes)``.

    See :class:`ConvNet`.
    """
    return ConvNet((64, 256, 512), num_classes, input_shape=input_shape, dropout=dropout, bias=bias)
