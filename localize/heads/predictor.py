"""A linear predictor of the label on flattened features.

Source: G. Zhao, T. Wang, Y. Li, Y. Jin, C. Lang, H. Ling, "The cascaded forward algorithm for neural network training",
arXiv 2303.09728, 2023.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from localize.ir import Features


class FlatPredictor(nn.Module):
    """Class scores s = W vec(h), without bias.

    Args:
        features: layout of every tensor that crosses the cut; the flattened tensors are concatenated.
        classes: Z.

    Shape:
        one tensor (N, ...) for every entry of ``features``; returns (N, Z).
    """

    def __init__(self, features: Sequence[Features], classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(sum(math.prod(f.shape) for f in features), classes, bias=False)

    def forward(self, *values: Tensor) -> Tensor:
        return self.linear(torch.cat([value.flatten(1) for value in values], 1))
