"""End-to-end backpropagation: one segment, one loss. The control that every other method is compared with.

A model trained by this recipe is bit for bit the model that an ordinary PyTorch loop trains.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar

from localize.heads import blocks
from localize.ir import LabelKind, Plan, Segments
from localize.methods.base import ANY_LABELS, Uncut


@dataclass(frozen=True)
class Backprop(Uncut):
    """One loss at the output, whose gradient reaches every parameter."""

    name: ClassVar[str] = "backprop"
    reference: ClassVar[str] = (
        "D. E. Rumelhart, G. E. Hinton, R. J. Williams. Learning representations by back-propagating errors. "
        "Nature 323, 1986."
    )
    labels: ClassVar[tuple[LabelKind, ...]] = ANY_LABELS
    deviations: ClassVar[tuple[str, ...]] = ()

    def plan(self, segments: Segments) -> Plan:
        """Put the cross-entropy on the model's own output."""
        return Plan(
            method=self.name,
            options=asdict(self),
            segments=segments,
            blocks=tuple(blocks.of_segments(segments)),
            losses=(blocks.output_loss(segments),),
            update="end",
            reference=self.reference,
            deviations=self.deviations,
        )
