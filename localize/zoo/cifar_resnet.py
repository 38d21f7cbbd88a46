"""Residual networks for 32x32 images, the trunks of most local-learning papers.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2, https://arxiv.org/abs/1512.03385:
a 3x3 stem, three stages of n blocks with 16, 32 and 64 channels, 6n + 2 weighted layers.

Two choices follow the local-learning papers and not He et al.:

- where stride or width changes, the shortcut is a 1x1 convolution and BatchNorm (option B), not zero padding (option
  A). It is what gives resnet32 its 466,906 and resnet110 its 1,730,714 parameters in AugLocal (Ma et al., ICLR 2024,
  https://arxiv.org/abs/2402.17318);
- convolutions are drawn from a normal distribution with variance 2 / (kernel height * kernel width * out channels).
"""

from __future__ import annotations

from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut around them.

    Args:
        in_channels: channels of the input.
        out_channels: channels of both convolutions.
        stride: stride of the first convolution and of the shortcut.

    The shortcut is the identity where neither stride nor width changes, else a 1x1 convolution and BatchNorm.
    Convolutions are registered in the order in which the papers count them: conv1, conv2, shortcut.

    Shapes: ``(N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride))``.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return self.relu(out)


class CifarResNet(nn.Module):
    """A residual network of ``6 * blocks_per_stage + 2`` weighted layers.

    Args:
        blocks_per_stage: blocks in each of the three stages; 5 makes ResNet-32.
        num_classes: width of the logits.
        input_shape: ``(C, H, W)``; only C shapes the network, which ends in global average pooling.
        width: channels of the stem and of the first stage; stages two and three have twice and four times as many.

    Shapes: ``(N, C, H, W) -> (N, num_classes)``.
    """

    def __init__(
        self,
        blocks_per_stage: int,
        num_classes: int = 10,
        *,
        input_shape: tuple[int, int, int] = (3, 32, 32),
        width: int = 16,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(input_shape[0], width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(width, width, blocks_per_stage, stride=1)
        self.layer2 = _stage(width, 2 * width, blocks_per_stage, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks_per_stage, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))


def _stage(in_channels: int, out_channels: int, blocks: int, *, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels) for _ in range(blocks - 1)))


def resnet20(num_classes: int = 10, *, input_shape: tuple[int, int, int] = (3, 32, 32)) -> CifarResNet:
    """Build ResNet-20: 9 blocks. ``(N, 3, 32, 32) -> (N, num_classes)``."""
    return CifarResNet(3, num_classes, input_shape=input_shape)


def resnet32(num_classes: int = 10, *, input_shape: tuple[int, int, int] = (3, 32, 32)) -> CifarResNet:
    """Build ResNet-32: 15 blocks, 466,906 parameters for 10 classes. ``(N, 3, 32, 32) -> (N, num_classes)``."""
    return CifarResNet(5, num_classes, input_shape=input_shape)


def resnet32_w(num_classes: int = 10, *, input_shape: tuple[int, int, int] = (3, 32, 32)) -> CifarResNet:
    """Build ResNet-32-W, ResNet-32 with four times the channels. ``(N, 3, 32, 32) -> (N, num_classes)``.

    Source: Choi et al., "Dictionary Contrastive Learning for Efficient Local Supervision without Auxiliary Networks",
    ICLR 2024, appendix J.2.3.
    """
    return CifarResNet(5, num_classes, input_shape=input_shape, width=64)


def resnet44(num_classes: int = 10, *, input_shape: tuple[int, int, int] = (3, 32, 32)) -> CifarResNet:
    """Build ResNet-44: 21 blocks. ``(N, 3, 32, 32) -> (N, num_classes)``."""
    return CifarResNet(7, num_classes, input_shape=input_shape)


def resnet56(num_classes: int = 10, *, input_shape: tuple[int, int, int] = (3, 32, 32)) -> CifarResNet:
    """Build ResNet-56: 27 blocks. ``(N, 3, 32, 32) -> (N, num_classes)``."""
    return CifarResNet(9, num_classes, input_shape=input_shape)


def resnet110(num_classes: int = 10, *, input_shape: tuple[int, int, int] = (3, 32, 32)) -> CifarResNet:
    """Build ResNet-110: 54 blocks, 1,730,714 parameters for 10 classes. ``(N, 3, 32, 32) -> (N, num_classes)``."""
    return CifarResNet(18, num_classes, input_shape=input_shape)


def resnet1202(num_classes: int = 10, *, input_shape: tuple[int, int, int] = (3, 32, 32)) -> CifarResNet:
    """Build ResNet-1202: 600 blocks. ``(N, 3, 32, 32) -> (N, num_classes)``."""
    return CifarResNet(200, num_classes, input_shape=input_shape)
