"""The weight of each class in a loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ClassWeights(nn.Module):
    """Fixed weights of the classes. They are not in the state dict, because the recipe contains them.

    Args:
        weights: one number for each of Z classes.

    Shape:
        no input; returns (Z,).
    """

    weight: Tensor

    def __init__(self, weights: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("weight", torch.tensor(weights, dtype=torch.float64), persistent=False)

    def forward(self) -> Tensor:
        return self.weight

    def extra_repr(self) -> str:
        """Show the number of classes."""
        return f"{len(self.weight)} classes"
