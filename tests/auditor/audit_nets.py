"""Networks small enough that a hundred audits take seconds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from localize.compiler import transform
from localize.ir import CutSpec

VARIANTS: dict[str, dict[str, Any]] = {
    "backprop": {"recipe": "backprop"},
    "auglocal": {"recipe": "auglocal", "d": 2},
    "dcl": {"recipe": "dcl", "dictionary": "adaptive"},
    "dcl-end": {"recipe": "dcl", "dictionary": "adaptive", "update": "end"},
    "dcl-static": {"recipe": "dcl", "dictionary": "static"},
    "dcl-last": {"recipe": "dcl", "dictionary": "last"},
    "dcl-layerwise": {"recipe": "dcl", "dictionary": "layerwise"},
    "dcl-averaged": {"recipe": "dcl", "dictionary": "averaged"},
}

PROGRAMS: dict[str, dict[str, Any]] = {
    "backprop": VARIANTS["backprop"],
    "auglocal": VARIANTS["auglocal"],
    "dcl-averaged": VARIANTS["dcl-averaged"],
    "mlaan": {"recipe": "mlaan"},
    "ff": {"recipe": "ff"},
    "dfa": {"recipe": "dfa"},
    "accumulate": {"recipe": "accumulate"},
    "checkpoint": {"recipe": "checkpoint"},
}
"""Programs that hold every word of a plan between them."""


class Block(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, channels: int, out: int, stride: int = 1, *, inplace: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=inplace)
        self.down = nn.Conv2d(channels, out, 1, stride, bias=False) if channels != out else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(h)) + (x if self.down is None else self.down(x)))


class TinyResNet(nn.Module):
    """A stem, three residual blocks, and a classifier; no in-place operation unless asked for."""

    def __init__(self, *, inplace: bool = False, dropout: float = 0.3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=inplace)
        self.layers = nn.Sequential(
            Block(4, 4, inplace=inplace), Block(4, 6, 2, inplace=inplace), Block(6, 6, inplace=inplace)
        )
        self.drop = nn.Dropout(dropout)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layers(self.relu(self.bn(self.stem(x))))
        return self.fc(self.drop(h.mean((2, 3))))


class Overwriting(nn.Module):
    """Blocks that add to their input in place: what crosses a cut has to be copied."""

    class Unit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, 1, 1)
            self.gate = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x.add_(self.gate(x.mean((2, 3)))[:, :, None, None])
            return self.conv(x)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 1, 1)
        self.units = nn.Sequential(self.Unit(), self.Unit(), self.Unit())
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.units(self.stem(x)).mean((2, 3)))


def batch() -> tuple[Tensor, Tensor]:
    """Return four images and labels."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 8, 8, generator=generator), torch.randint(5, (4,), generator=generator)


def make(variant: str, model: nn.Module | None = None, cut: CutSpec | None = None) -> Any:
    """Transform a tiny net by one of :data:`VARIANTS`, always with the same weights."""
    options = dict((VARIANTS | PROGRAMS)[variant])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if model is None:
            model = TinyResNet()
            cut = cut or (CutSpec(at=("relu", "layers.0", "layers.1")) if variant.startswith("dcl") else None)
        recipe = options.pop("recipe")
        return transform(model.train(), recipe, example_input=batch()[0], cut=cut, **options)
