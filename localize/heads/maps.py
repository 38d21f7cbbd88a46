"""Read whatever crosses a cut as one map (N, C, H, W), for heads that are made of convolutions and pooling."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localize.ir import Features
from localize.ops import global_average, in_sequence


class FeatureMap(nn.Module):
    """Arrange the values that cross a cut as one map; it has no parameters.

    A map is taken as it is, its channels first; of more than two spatial dimensions, all but the last make the height.
    Tokens are put on their grid, without the prefix of tokens that are no places; where the model shows no grid they
    make a column. A flat vector is a map of 1x1. Several values are pooled to the smallest height and width among them,
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
    """Average over all places: (N, C, H, W) to (N, C, 1, 1); its gradient takes no memory of the size of the map."""

    def forward(self, x: Tensor) -> Tensor:
        return global_average(x)


class Chain(nn.Sequential):
    """Modules one behind the other; the first takes all tensors that cross the cut, others what the one before made."""

    def forward(self, *values: Tensor) -> Tensor:
        return in_sequence(*self)(*values)


def is_flat(features: Sequence[Features]) -> bool:
    """Tell whether nothing but flat vectors crosses the cut."""
    return all(layout.kind == "flat" for layout in features)


def _shape(layout: Features) -> tuple[int, int, int]:
    """Return (C, H, W) of the map that values of this layout make."""
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
