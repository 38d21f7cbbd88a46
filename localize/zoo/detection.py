"""The backbone of a detection model as a classifier, so that it can be trained by local losses.

A detection model computes its losses from boxes, inside of its forward. What sees whole images, and is pretrained on
their classes, is its backbone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class DetectionBackbone(nn.Module):
    """The backbone of a torchvision detection model, global average pooling of its last map, and a linear classifier.

    What is taken is ``detector.backbone.body``, without the feature pyramid, where there is one, else
    ``detector.backbone``. Its keys are those of the detection model: ``detector.load_state_dict(model.state_dict(),
    strict=False)`` takes the trained weights over.

    Args:
        detector: the detection model.
        num_classes: width of the logits.

    Shapes: ``(N, 3, H, W) -> (N, num_classes)``.
    """

    def __init__(self, detector: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.backbone: Any = detector.backbone
        if hasattr(detector.backbone, "body"):
            self.backbone = nn.Module()
            self.backbone.body = detector.backbone.body
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(self._width(), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(_last(self._maps()(x))).flatten(1))

    def _maps(self) -> nn.Module:
        maps: nn.Module = getattr(self.backbone, "body", self.backbone)
        return maps

    def _width(self) -> int:
        """Return the number of channels of the last map."""
        twin = copy.deepcopy(self._maps()).to("meta").eval()
        return _last(twin(torch.empty(1, 3, 320, 320, device="meta"))).shape[1]


def _last(maps: Mapping[str, Tensor]) -> Tensor:
    return list(maps.values())[-1]
