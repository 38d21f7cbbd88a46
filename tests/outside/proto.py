"""A method outside of the package: a head with weights that it draws itself, a loss, and plain options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localize.methods import (
    Branch,
    FeatureMap,
    Features,
    Local,
    Plan,
    Segment,
    Segments,
    Term,
    headed,
    isolated,
    option,
)


class Similarities(nn.Module):
    """Cosine similarity of pooled features to a vector for each class."""

    def __init__(self, features: tuple[Features, ...], classes: int, scale: float) -> None:
        super().__init__()
        self.map, self.scale = FeatureMap(features), scale
        self.prototypes = nn.Parameter(nn.init.orthogonal_(torch.empty(classes, self.map.shape[0])))

    def forward(self, *values: Tensor) -> Tensor:
        pooled = self.map(*values).mean((2, 3))
        return self.scale * F.normalize(pooled) @ F.normalize(self.prototypes).t()


def margin(prediction: Tensor, target: Tensor) -> Tensor:
    return F.multi_margin_loss(prediction, target)


@dataclass(frozen=True)
class Prototypes(Local):
    name: ClassVar[str] = "prototypes"

    scale: float = option(10.0, "what similarities are multiplied by", low=0)
    d: int = 3
    deep: bool = True
    names: tuple[str, ...] = ("x",)

    def plan(self, segments: Segments) -> Plan:
        def supervise(segment: Segment) -> list[Branch]:
            head = Similarities(segment.features, segments.trunk.num_classes, self.scale)
            return [headed(segment, f"head_{segment.index}", head, Term(margin))]

        return isolated(self, segments, supervise)
