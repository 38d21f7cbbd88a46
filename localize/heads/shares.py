"""The target of class scores of a whole image with labelled pixels: the share of every class."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ClassShares(nn.Module):
    """The share of every class among the labelled pixels of an image; all zeros if none is labelled.

    Args:
        classes: Z.
        ignore: class id of pixels without a label.

    Shape:
        class ids (N, H, W), or with any number of positions; returns (N, Z), with rows that sum to 1 or 0.
    """

    def __init__(self, classes: int, ignore: int) -> None:
        super().__init__()
        self.classes, self.ignore = classes, ignore

    def forward(self, labels: Tensor) -> Tensor:
        labels = labels.flatten(1)
        labelled = labels != self.ignore
        ones = F.one_hot(labels.where(labelled, 0), self.classes) * labelled[:, :, None]
        return ones.sum(1).float() / labelled.sum(1, keepdim=True).clamp(min=1)

    def extra_repr(self) -> str:
        """Show the number of classes, and what is ignored."""
        return f"classes={self.classes}, ignore={self.ignore}"
