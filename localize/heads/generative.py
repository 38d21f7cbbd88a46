"""The generative circuit of predictive forward-forward: a layer predicts the activity of the layer below.

Source: A. Ororbia, A. Mali, "The predictive forward-forward algorithm", arXiv 2301.01452, 2023, with the formulas of
the code (ago109/predictive-forward-forward).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Generative(nn.Module):
    """Predict the inputs of a layer from its outputs h: g(normalise(relu(h + noise)) G).

    Activities are scaled to length 1 first. g is a ReLU for predicted activities, and the identity for the image. G has
    no bias.

    Args:
        width: number of activities of the layer.
        below: number of predicted values.
        image: whether the predicted values are the image.
        noise: standard deviation of the noise that is added to the activities in training.

    Shape:
        (N, width); returns (N, below).
    """

    def __init__(self, width: int, below: int, *, image: bool, noise: float) -> None:
        super().__init__()
        self.image, self.noise = image, noise
        self.map = nn.Linear(width, below, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        if self.noise and self.training:
            h = h + self.noise * torch.randn_like(h)
        prediction = self.map(F.normalize(h.relu(), dim=1))
        return prediction if self.image else prediction.relu()

    def extra_repr(self) -> str:
        """Show what is predicted."""
        return f"{'image' if self.image else 'activities'}, noise={self.noise:g}"
