"""Layers are copied by heads however the model writes their operands."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import localize


class OverRows(nn.Module):
    """A block that is scaled by its mean over one dimension, which is given as a number."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return x * x.mean(3, keepdim=True)


def test_a_layer_that_takes_a_mean_over_one_dimension_is_copied_by_heads() -> None:
    blocks = [OverRows(4) for _ in range(3)]
    net = nn.Sequential(nn.Conv2d(3, 4, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))

    local = localize.transform(net, "auglocal", example_input=torch.empty(2, 3, 8, 8), d=2)

    assert len(local.heads) > 0
