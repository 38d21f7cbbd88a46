"""Small networks, one for every thing that a compiler of training steps can get wrong."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """A residual block; its ReLU is in place, and called twice."""

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        project = stride > 1 or channels != out
        self.shortcut = nn.Conv2d(channels, out, 1, stride, bias=False) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(h)) + self.shortcut(x))


class ResNet(nn.Module):
    """A stem and three residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.blocks = nn.Sequential(Block(4, 4), Block(4, 8, 2), Block(8, 8))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.relu(self.bn(self.conv(x)))).mean((2, 3)))


class Dense(nn.Module):
    """DenseNet's growing list of features, in-place ReLU behind a norm, and transitions."""

    class Stage(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(inplace=True), nn.Conv2d(c, 4, 3, 1, 1, bias=False))
                for c in (channels, channels + 4)
            )

        def forward(self, x: Tensor) -> Tensor:
            features = [x]
            for layer in self.layers:
                features.append(layer(torch.cat(features, 1)))
            return torch.cat(features, 1)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 5, 1, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.stage1 = self.Stage(8)
        self.transition = nn.Sequential(
            nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.Conv2d(16, 8, 1, bias=False), nn.AvgPool2d(2)
        )
        self.stage2 = self.Stage(8)
        self.norm = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stage2(self.transition(self.stage1(self.stem(x))))
        return self.fc(F.relu(self.norm(h), inplace=True).mean((2, 3)))


class TwoStreams(nn.Module):
    """Two streams that meet only at the end: every cut goes through two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.ModuleList([nn.Conv2d(3 if i == 0 else 4, 4, 3, 1, 1) for i in range(4)])
        self.coarse = nn.ModuleList([nn.Conv2d(3 if i == 0 else 6, 6, 3, 2 if i == 0 else 1, 1) for i in range(4)])
        self.fc = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x, x
        for fine, coarse in zip(self.fine, self.coarse, strict=True):
            a, b = fine(a).relu(), coarse(b).relu()
        return self.fc(torch.cat([a.mean((2, 3)), b.mean((2, 3))], 1))


class Attention(nn.Module):
    """Self-attention written with reshapes that mention the batch size, and a dropout that depends on the mode."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        h = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0.0)
        return F.dropout(self.out(h.transpose(1, 2).reshape(n, t, c)), 0.1, self.training)


class ViT(nn.Module):
    """Patches, a class token, three blocks of attention and MLP."""

    class Block(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
            self.attention = Attention(dim)
            self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * dim, dim))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attention(self.norm1(x))
            return x + self.mlp(self.norm2(x))

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 5, 8))
        self.blocks = nn.ModuleList([self.Block(8) for _ in range(3)])
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(h.shape[0], -1, -1), h], 1) + self.positions
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h)[:, 0])


class MLP(nn.Module):
    """Linear layers on the flattened image."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU()
        )
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(x))


class Writes(nn.Module):
    """Writes into slices, and overwrites the output of a layer in place behind a place where it could be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3 if i == 0 else 4, 4, 3, 1, 1) for i in range(4)])
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        for i, conv in enumerate(self.convs):
            x = conv(x)
            x[:, i] = 0.5 * x[:, i]
            x.add_(0.1).relu_()
        return self.fc(x.mean((2, 3)))


class Recurrent(nn.Module):
    """A recurrent module that returns a tuple, and a random factor that is made without a device."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 6, 3, 1, 1)
        self.rnn = nn.GRU(6, 8, batch_first=True)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(x).relu()
        h = h + self.conv2(h).relu() * (torch.rand(x.shape[0], 1, 1, 1) > 0.3).float()
        return self.fc(self.rnn(h.flatten(2).transpose(1, 2))[0][:, -1].relu())


class TwoInputs(nn.Module):
    """Convolutions on an image; a vector of facts and a mask of them, which a later layer reads, come with it."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3 if i == 0 else 4, 4, 3, 1, 1) for i in range(3)])
        self.facts, self.hidden, self.fc = nn.Linear(6, 4), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, image: Tensor, facts: Tensor, known: Tensor, *, scale: float = 1.0) -> Tensor:
        known = known > 0
        for conv in self.convs:
            image = conv(image).relu()
        told = self.facts(facts.masked_fill(~known, 0.0)).relu()
        return self.fc(self.hidden(torch.cat([image.mean((2, 3)), told], 1)).relu()) * scale


class Scored(NamedTuple):
    """What :class:`Auxiliary` returns in train mode."""

    logits: Tensor
    aux_logits2: Tensor
    aux_logits1: Tensor


class Auxiliary(nn.Module):
    """A convolutional net with two auxiliary classifiers, in train mode; all three draw random numbers."""

    class Classifier(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(channels, 4, 1, bias=False), nn.BatchNorm2d(4)
            self.drop, self.fc = nn.Dropout(0.5), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.drop(F.relu(self.bn(self.conv(x)), inplace=True).mean((2, 3))))

    def __init__(self) -> None:
        super().__init__()
        channels = (3, 6, 6, 8, 8)
        self.convs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True))
            for a, b in itertools.pairwise(channels)
        )
        self.aux1, self.aux2 = self.Classifier(6), self.Classifier(8)
        self.drop, self.fc = nn.Dropout(0.2), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor | Scored:
        x = self.convs[1](self.convs[0](x))
        first = self.aux1(x) if self.training else None
        x = self.convs[2](x)
        second = self.aux2(x) if self.training else None
        logits = self.fc(self.drop(self.convs[3](x).mean((2, 3))))
        return Scored(logits, second, first) if self.training else logits


ALL = {net.__name__: net for net in (ResNet, Dense, TwoStreams, ViT, MLP, Writes)}
"""Every network here; they take images (N, 3, 8, 8) and tell five classes."""
