"""Classifiers on the output of a segment, by the name of their layers: all auxiliary heads that predict the label."""

from __future__ import annotations

from localize.heads import branches
from localize.heads.branch import Branch
from localize.heads.narrow import narrowed
from localize.heads.projection import CONFIGURATIONS, widest_map
from localize.ir import Segment, Trunk

SPATIAL_MLP = "mlp-sr"
CLASSIFIERS = (*branches.PROJECTIONS, SPATIAL_MLP)
"""Names of classifiers: pooling and linear layers, convolutions and linear layers, or an MLP on a reduced map."""


class Classifiers:
    """Make classifiers of one kind for the segments of one trunk.

    Args:
        kind: one of ``CLASSIFIERS``.
        trunk: the recorded model.
        width: largest number of channels that they read, see :func:`localize.heads.narrow.narrowed`; 0: no limit.
    """

    def __init__(self, kind: str, trunk: Trunk, width: int = 0) -> None:
        self.kind, self.trunk, self.width = kind, trunk, width
        widest = widest_map(trunk) if kind in CONFIGURATIONS else 0
        self.widest = min(widest, width or widest)

    def behind(self, segment: Segment, name: str) -> Branch:
        """Return a branch with a classifier called ``name`` on the output of a segment, and its cross-entropy."""
        return narrowed(segment, self.width, lambda read: self._on(read, name))

    def _on(self, segment: Segment, name: str) -> Branch:
        if self.kind == SPATIAL_MLP:
            return branches.mlp(segment, self.trunk, name)
        return branches.softmax(segment, self.trunk, name, head=self.kind, widest=self.widest)
