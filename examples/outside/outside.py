"""A method in a package of its own: every segment draws its features to a learnt vector for each class."""

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
    """Cosine similarity, times ``scale``, of features averaged over places to a vector for each class: (N, Z)."""

    def __init__(self, features: tuple[Features, ...], classes: int, scale: float) -> None:
        super().__init__()
        self.map, self.scale = FeatureMap(features), scale  # whatever crosses a cut, as (N, C, H, W)
        self.prototypes = nn.Parameter(nn.init.orthogonal_(torch.empty(classes, self.map.shape[0])))

    def forward(self, *values: Tensor) -> Tensor:
        pooled = self.map(*values).mean((2, 3))
        return self.scale * F.normalize(pooled) @ F.normalize(self.prototypes).t()


def margin(scores: Tensor, labels: Tensor) -> Tensor:
    """Hinge loss of class scores (N, Z), averaged over images: every wrong class at least 1 below the right one."""
    return F.multi_margin_loss(scores, labels)


@dataclass(frozen=True)
class Prototype(Local):
    """Features of every segment are drawn to a learnt vector for each class."""

    name: ClassVar[str] = "prototype"

    scale: float = option(10.0, "what similarities are multiplied by", low=0)

    def plan(self, segments: Segments) -> Plan:
        """Train every segment but the last by a hinge loss on similarities; the last has the model's own output."""

        def supervise(segment: Segment) -> list[Branch]:
            head = Similarities(segment.features, segments.trunk.num_classes, self.scale)
            return [headed(segment, f"head_{segment.index}", head, Term(margin))]

        return isolated(self, segments, supervise)
