"""The line, and the expression in it, that a forward is refused for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import localize
from localize.errors import TraceError


class Deciding(nn.Module):
    """Decides on values, behind a part of the condition that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU())

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None and (x > 0).all():
            x = x * 2
        return self.body(x).mean((2, 3))


def test_the_part_of_a_condition_that_reads_values_is_quoted() -> None:
    with pytest.raises(TraceError, match=r"in the expression: \(x > 0\)\.all\(\)"):
        localize.transform(Deciding(), example_input=torch.randn(2, 3, 8, 8))
