"""Convert the values at a cut to one map (N, C, H, W), for heads made of convolutions and pooling."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localize.ir import Features
from localize.ops import global_average, in_sequence


class FeatureMap(nn.Module):
    """Arrange the values at a cut as one map; it has no parameters.

    A map is used as it is, with channels first; with more than two spatial dimensions, all except the last form the
    height. Tokens are put on their grid, without prefix tokens, which have no position; if the grid is unknown, they
    form a column. A flat vector is a map of 1x1. Several values are pooled to the smallest height and width among them,
    and concatenated along the channels.

    Args:
        features: layout of every tensor that crosses the cut.

    Shape:
        one tensor for every entry of ``features``; returns (N, C, H, W), where ``shape`` is (C, H, W).
    """

    def __init__(self, features: Sequence[Features]) -> None:
        super().__init__()
        self.features = tuple(features)
        shapes = [_shape(layout) for layout in features]
        self.size = (min(h for _, h, _ in shapes), min(w for _, _, w in shapes))
        self.shape = (sum(c for c, _, _ in shapes), *self.size)

    def forward(self, *values: Tensor) -> Tensor:
        maps = [self._pooled(_map(value, layout)) for value, layout in zip(values, self.features, strict=True)]
        return maps[0] if len(maps) == 1 else torch.cat(maps, 1)

    def _pooled(self, value: Tensor) -> Tensor:
        return value if value.shape[2:] == self.size else F.adaptive_avg_pool2d(value, self.size)

    def extra_repr(self) -> str:
        """Show the shapes."""
        return f"{', '.join(f'{f.kind} {f.shape}' for f in self.features)} -> {self.shape}"


class GlobalAverage(nn.Module):
    """Average over all positions: (N, C, H, W) to (N, C, 1, 1); its gradient does not allocate a whole map."""

    def forward(self, x: Tensor) -> Tensor:
        return global_average(x)


class Chain(nn.Sequential):
    """Modules in sequence; the first takes all tensors at the cut, each other one the output of the previous one.

    Shape:
        one tensor (N, ...) for every value at the cut; returns the output of the last module.
    """

    def forward(self, *values: Tensor) -> Tensor:
        return in_sequence(*self)(*values)


def is_flat(features: Sequence[Features]) -> bool:
    """Return whether all values at the cut are flat vectors."""
    return all(layout.kind == "flat" for layout in features)


def _shape(layout: Features) -> tuple[int, int, int]:
    """Return the shape (C, H, W) of the map for values of this layout."""
    if layout.kind == "flat":
        return layout.width, 1, 1
    *leading, width = layout.space
    return layout.width, math.prod(leading), width


def _map(value: Tensor, layout: Features) -> Tensor:
    """Arrange one tensor as (N, C, H, W)."""
    if layout.kind == "flat":
        return value[:, :, None, None]
    value = value if layout.channels == 1 else value.movedim(-1, 1)
    if layout.kind == "tokens":
        return value[:, :, layout.prefix :].unflatten(2, _shape(layout)[1:])
    return value if value.dim() == 4 else value.flatten(2, -2)
