"""Nets in the style of CIFAR repositories and tutorials."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.corpus.entry import CLASSES, Entry


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut, activations as functions."""

    def __init__(self, inner: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or inner != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(inner, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class PreActBlock(nn.Module):
    """Normalisation and activation before each convolution; the activation may write in place."""

    def __init__(self, inner: int, planes: int, stride: int = 1, *, inplace: bool = False) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inner), nn.BatchNorm2d(planes)
        self.conv1 = nn.Conv2d(inner, planes, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.relu = nn.ReLU(inplace=inplace)
        if stride != 1 or inner != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(inner, planes, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(self.relu(self.bn2(out)))
        out += shortcut
        return out


class OpeningBlock(nn.Module):
    """A residual block that opens with its activation."""

    def __init__(self, planes: int, *, inplace: bool) -> None:
        super().__init__()
        self.act1, self.act2 = nn.ReLU(inplace=inplace), nn.ReLU(inplace=inplace)
        self.conv1, self.conv2 = nn.Conv2d(planes, planes, 3, padding=1), nn.Conv2d(planes, planes, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(planes), nn.BatchNorm2d(planes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(self.act1(x)))
        return x + self.bn2(self.conv2(self.act2(out)))


class ResNet(nn.Module):
    """Stem, blocks, average pooling, linear."""

    def __init__(self, block: type[nn.Module], widths: tuple[int, ...] = (8, 8, 16, 16)) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        pairs = zip((widths[0], *widths), widths, strict=False)
        self.layers = nn.Sequential(*(block(i, o, 2 if o > i else 1) for i, o in pairs))
        self.linear = nn.Linear(widths[-1], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(F.relu(self.bn1(self.conv1(x))))
        out = F.avg_pool2d(out, out.size(3))
        return self.linear(out.view(out.size(0), -1))


class Opened(nn.Module):
    """Six residual blocks that open with an activation."""

    def __init__(self, *, inplace: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(*(OpeningBlock(8, inplace=inplace) for _ in range(6)))
        self.head = nn.Sequential(
            nn.ReLU(inplace=inplace), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


class VGG(nn.Module):
    """A list of widths, with M for pooling."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for item in (8, "M", 8, 16, "M", 16, "M", 16):
            if item == "M":
                layers.append(nn.MaxPool2d(2, 2))
            else:
                layers += [nn.Conv2d(width, item, 3, padding=1), nn.BatchNorm2d(item), nn.ReLU(inplace=True)]
                width = item
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(16 * 2 * 2, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out = self.features(x)
        return self.classifier(out.view(out.size(0), -1))


class Tutorial(nn.Module):
    """Four convolutions, each with an activation and some with pooling, in either order."""

    def __init__(self, *, pool_first: bool) -> None:
        super().__init__()
        widths = (3, 8, 8, 16, 16)
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1) for i, o in zip(widths, widths[1:], strict=False))
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(16, CLASSES)
        self.pool_first = pool_first

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = F.relu(self.pool(conv(x))) if self.pool_first else self.pool(F.relu(conv(x)))
        return self.fc(torch.flatten(x, 1))


class DenseLayer(nn.Module):
    """Concatenates what it makes with what it reads."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(width), nn.Conv2d(width, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(F.relu(self.bn(x))), x], 1)


class DenseNet(nn.Module):
    """Three dense blocks with transitions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        width = 8
        for _ in range(3):
            blocks += [DenseLayer(width, 4), DenseLayer(width + 4, 4)]
            blocks += [nn.BatchNorm2d(width + 8), nn.ReLU(), nn.Conv2d(width + 8, 8, 1, bias=False), nn.AvgPool2d(2)]
            width = 8
        self.blocks = nn.Sequential(*blocks)
        self.bn, self.linear = nn.BatchNorm2d(8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn(self.blocks(self.stem(x))))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))


class SEBlock(nn.Module):
    """A residual block whose channels are gated by what they hold on average."""

    def __init__(self, inner: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(inner, planes, 3, stride, 1, bias=False), nn.BatchNorm2d(planes), nn.ReLU(inplace=True)
        )
        self.fc1, self.fc2 = nn.Conv2d(planes, planes // 4, 1), nn.Conv2d(planes // 4, planes, 1)
        self.shortcut = nn.Conv2d(inner, planes, 1, stride) if stride != 1 or inner != planes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.block(x)
        w = F.avg_pool2d(out, out.size(2))
        w = torch.sigmoid(self.fc2(F.relu(self.fc1(w))))
        return F.relu(out * w + self.shortcut(x))


class WideBlock(nn.Module):
    """A pre-activation block with dropout inside, as in wide residual nets."""

    def __init__(self, inner: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inner), nn.BatchNorm2d(planes)
        self.conv1, self.conv2 = nn.Conv2d(inner, planes, 3, padding=1), nn.Conv2d(planes, planes, 3, stride, 1)
        self.dropout = nn.Dropout(p=0.1)
        self.equal = inner == planes
        self.shortcut = None if self.equal else nn.Conv2d(inner, planes, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.dropout(self.conv1(F.relu(self.bn1(x))))
        out = self.conv2(F.relu(self.bn2(out)))
        return torch.add(x if self.equal else self.shortcut(x), out)


class InvertedBlock(nn.Module):
    """Expand, depthwise, project, as MobileNetV2."""

    def __init__(self, inner: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        hidden = inner * 4
        self.use_res_connect = stride == 1 and inner == planes
        self.conv = nn.Sequential(
            *(nn.Conv2d(inner, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            *(nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)),
            *(nn.Conv2d(hidden, planes, 1, bias=False), nn.BatchNorm2d(planes)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


class ShuffleBlock(nn.Module):
    """Splits the channels, changes one half, and shuffles both."""

    def __init__(self, inner: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        half = planes // 2
        self.stride = stride
        self.branch = nn.Sequential(
            *(nn.Conv2d(inner if stride > 1 else half, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(True)),
            *(nn.Conv2d(half, half, 3, stride, 1, groups=half, bias=False), nn.BatchNorm2d(half)),
            *(nn.Conv2d(half, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(True)),
        )
        if stride > 1:
            self.down = nn.Sequential(nn.Conv2d(inner, half, 3, stride, 1, bias=False), nn.BatchNorm2d(half))

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            left, right = self.down(x), self.branch(x)
        else:
            left, right = x.chunk(2, dim=1)
            right = self.branch(right)
        out = torch.cat((left, right), 1)
        n, c, h, w = out.size()
        return out.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


class Tree(nn.Module):
    """Two convolutions whose results are aggregated with their input, as deep layer aggregation does."""

    def __init__(self, inner: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.left, self.right = BasicBlock(inner, planes, stride), BasicBlock(planes, planes)
        self.root = nn.Sequential(nn.Conv2d(2 * planes, planes, 1, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        one = self.left(x)
        two = self.right(one)
        return F.relu(self.root(torch.cat([one, two], 1)))


class Maxout(nn.Module):
    """Convolutions with twice the channels, of which the larger half is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(i, 16, 3, 2, 1) for i in (3, 8, 8, 8))
        self.fc = nn.Linear(8, CLASSES)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                n = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                module.weight.data.normal_(0, math.sqrt(2.0 / n))

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            one, two = conv(x).chunk(2, 1)
            x = torch.max(one, two)
        return self.fc(x.mean(dim=[2, 3]))


CIFAR = (
    Entry("resnet", partial(ResNet, BasicBlock)),
    Entry("preact_resnet", partial(ResNet, PreActBlock)),
    Entry("preact_resnet_in_place", partial(ResNet, partial(PreActBlock, inplace=True))),
    Entry("opened_by_activation", partial(Opened, inplace=False), layers=6),
    Entry("opened_by_activation_in_place", partial(Opened, inplace=True), layers=6),
    Entry("vgg", VGG),
    Entry("tutorial_pool_after", partial(Tutorial, pool_first=False)),
    Entry("tutorial_pool_first", partial(Tutorial, pool_first=True)),
    Entry("densenet", DenseNet),
    Entry("senet", partial(ResNet, SEBlock)),
    Entry("wide_resnet", partial(ResNet, WideBlock), draws=True),
    Entry("mobilenet", partial(ResNet, InvertedBlock)),
    Entry("shufflenet", partial(ResNet, ShuffleBlock)),
    Entry("dla", partial(ResNet, Tree)),
    Entry("maxout", Maxout),
)
