"""VGG networks of the local-learning papers: VGG8B and the CIFAR VGG19.

VGG8B: Nøkland & Eidnes, "Training Neural Networks with Local Error Signals", ICML 2019,
https://arxiv.org/abs/1901.06656; also Choi et al. (DCL), ICLR 2024, Tables VIII and IX.

VGG19: Simonyan & Zisserman, "Very Deep Convolutional Networks", ICLR 2015, https://arxiv.org/abs/1409.1556, with
BatchNorm and one linear classifier; Ma et al. (AugLocal), ICLR 2024, Table 2.

DCL's tables differ from the networks that their numbers are of in two places, where this file follows the networks: for
images above 64 pixels the first convolution is 7x7 with stride 2 (else the 4,608 inputs of DCL's STL-10 fc layer cannot
come out), and the hidden fc layer has an activation after its BatchNorm.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

from torch import Tensor, nn

from localize.errors import OptionError

VGG19_STAGES = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))  # (channels, convolutions), a max-pool after each


class VGG8B(nn.Module):
    """Six convolutional layers and one hidden fc layer, each one local layer, and a linear classifier.

    Args:
        num_classes: width of the logits.
        input_shape: ``(C, H, W)``, at least 16x16. Above 64 pixels the first convolution is 7x7 with stride 2.
        dropout: rate in [0, 1) after every local layer; whole channels after convolutions.
        activation: ``"relu"``, or ``"leaky"`` (slope 0.01), which Nøkland & Eidnes use with their similarity loss.

    A layer is conv-BatchNorm-activation-(max-pool)-(dropout), named ``layer1`` ... ``layer6``; ``layer7`` is
    flatten-fc-BatchNorm-activation-(dropout). Features before pooling are at ``layer2.act`` and so on.

    Nøkland & Eidnes zero-initialise the classifier; here it has PyTorch's default initialisation, as in DCL.

    Shapes: ``(N, C, H, W) -> (N, num_classes)``.

    Raises:
        OptionError: the image is below 16x16, or the activation is not known.
    """

    def __init__(
        self,
        num_classes: int = 10,
        *,
        input_shape: tuple[int, int, int] = (3, 32, 32),
        dropout: float = 0.0,
        activation: Literal["relu", "leaky"] = "relu",
    ) -> None:
        super().__init__()
        channels, height, width = input_shape
        if min(height, width) < 16:
            raise OptionError(
                f"vgg8b cannot take {height}x{width} images.",
                facts="its four max-pools halve the image four times",
                help="give images of 16x16 pixels or more",
            )
        large = max(height, width) > 64
        self.layer1 = _conv_layer(channels, 128, dropout, activation, large=large)
        self.layer2 = _conv_layer(128, 256, dropout, activation, pool=True)
        self.layer3 = _conv_layer(256, 256, dropout, activation)
        self.layer4 = _conv_layer(256, 512, dropout, activation, pool=True)
        self.layer5 = _conv_layer(512, 512, dropout, activation, pool=True)
        self.layer6 = _conv_layer(512, 512, dropout, activation, pool=True)
        if large:
            height, width = -(-height // 2), -(-width // 2)
        hidden: OrderedDict[str, nn.Module] = OrderedDict(
            flatten=nn.Flatten(),
            fc=nn.Linear(512 * (height // 16) * (width // 16), 1024),
            bn=nn.BatchNorm1d(1024),
            act=_activation(activation),
        )
        if dropout > 0:
            hidden["dropout"] = nn.Dropout(dropout)
        self.layer7 = nn.Sequential(hidden)
        self.fc = nn.Linear(1024, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(x)))
        x = self.layer6(self.layer5(self.layer4(x)))
        return self.fc(self.layer7(x))


class VGG19(nn.Module):
    """Sixteen 3x3 convolutions with BatchNorm and ReLU, and one linear classifier.

    Args:
        num_classes: width of the logits.
        input_shape: ``(C, H, W)``, at least 32x32.

    ``features.layer1`` ... ``features.layer16`` are the local layers (conv, bn, relu); the max-pools ``features.pool1``
    ... ``features.pool5`` stand between them, so that a cut after a layer leaves its pool to the next segment, as
    AugLocal does. Convolutions have a bias and are initialised as in :mod:`localize.zoo.cifar_resnet`.

    Shapes: ``(N, C, H, W) -> (N, num_classes)``.

    Raises:
        OptionError: the image is below 32x32.
    """

    def __init__(self, num_classes: int = 10, *, input_shape: tuple[int, int, int] = (3, 32, 32)) -> None:
        super().__init__()
        channels, height, width = input_shape
        if min(height, width) < 32:
            raise OptionError(
                f"vgg19 cannot take {height}x{width} images.",
                facts="its five max-pools halve the image five times",
                help="give images of 32x32 pixels or more",
            )
        features: OrderedDict[str, nn.Module] = OrderedDict()
        number = 0
        for stage, (out_channels, convolutions) in enumerate(VGG19_STAGES, start=1):
            for _ in range(convolutions):
                number += 1
                conv = nn.Conv2d(channels, out_channels, 3, padding=1)
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
                features[f"layer{number}"] = nn.Sequential(
                    OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_channels), relu=nn.ReLU(inplace=True))
                )
                channels = out_channels
            features[f"pool{stage}"] = nn.MaxPool2d(2)
            height, width = height // 2, width // 2
        self.features = nn.Sequential(features)
        self.classifier = nn.Linear(channels * height * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


def _conv_layer(
    inputs: int, outputs: int, dropout: float, activation: str, *, pool: bool = False, large: bool = False
) -> nn.Sequential:
    size, stride = (7, 2) if large else (3, 1)
    layer: OrderedDict[str, nn.Module] = OrderedDict(
        conv=nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2),
        bn=nn.BatchNorm2d(outputs),
        act=_activation(activation),
    )
    if pool:
        layer["pool"] = nn.MaxPool2d(2)
    if dropout > 0:
        layer["dropout"] = nn.Dropout2d(dropout)
    return nn.Sequential(layer)


def _activation(name: str) -> nn.Module:
    if name == "relu":
        return nn.ReLU(inplace=True)
    if name == "leaky":
        return nn.LeakyReLU(0.01, inplace=True)
    raise OptionError(f"vgg8b has no activation {name!r}.", facts="activations: relu, leaky", help="activation=relu")


def vgg8b(
    num_classes: int = 10,
    *,
    input_shape: tuple[int, int, int] = (3, 32, 32),
    dropout: float = 0.0,
    activation: Literal["relu", "leaky"] = "relu",
) -> VGG8B:
    """Build VGG8B; 8,903,434 parameters for 10 classes. ``(N, C, H, W) -> (N, num_classes)``. See :class:`VGG8B`."""
    return VGG8B(num_classes, input_shape=input_shape, dropout=dropout, activation=activation)


def vgg19(num_classes: int = 10, *, input_shape: tuple[int, int, int] = (3, 32, 32)) -> VGG19:
    """Build the CIFAR VGG19; 20,040,522 parameters. ``(N, C, H, W) -> (N, num_classes)``. See :class:`VGG19`."""
    return VGG19(num_classes, input_shape=input_shape)
