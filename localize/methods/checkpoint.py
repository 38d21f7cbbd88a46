"""Activation checkpointing: backpropagation that keeps the values at the cuts and computes the rest again.

T. Chen, B. Xu, C. Zhang, C. Guestrin. Training deep nets with sublinear memory cost. arXiv:1604.06174, 2016.

The rival of local learning where memory is the only concern: one loss at the output reaches every parameter, each
segment but the last keeps nothing for the backward except what enters it, and is run a second time there. The gradients
are those of backpropagation, bit for bit. With sqrt(L) segments of L layers the kept values are O(sqrt(L)), for one
more forward (sec. 4.2 of the paper).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar

from localize.heads import blocks
from localize.ir import CutSpec, LabelKind, Plan, Segments
from localize.methods.base import ANY_LABELS, Local, needs_two


@dataclass(frozen=True)
class Checkpoint(Local):
    """Backpropagation that computes all segments but the last again in the backward."""

    name: ClassVar[str] = "checkpoint"
    reference: ClassVar[str] = (
        "T. Chen, B. Xu, C. Zhang, C. Guestrin. Training deep nets with sublinear memory cost. arXiv:1604.06174, 2016."
    )
    labels: ClassVar[tuple[LabelKind, ...]] = ANY_LABELS
    deviations: ClassVar[tuple[str, ...]] = (
        "Segments hold equally many local layers; the paper also plans them by the size of what they keep "
        "(the option cut chooses others).",
        "The second run of a segment draws the random numbers of the first, and leaves BatchNorm's running statistics "
        "alone.",
    )

    @property
    def cut(self) -> CutSpec:
        """As many segments as the square root of the number of local layers."""
        return CutSpec(segments="sqrt")

    def plan(self, segments: Segments) -> Plan:
        """Put the cross-entropy on the model's own output, and compute all segments but the last again.

        Raises:
            MethodError: there is no cut.
        """
        needs_two(self, segments)
        return Plan(
            method=self.name,
            options=asdict(self),
            segments=segments,
            blocks=tuple(blocks.of_segments(segments)),
            losses=(blocks.output_loss(segments, start=0),),
            update="end",
            recompute=tuple(segment.name for segment in segments.segments[:-1]),
            reference=self.reference,
            deviations=self.deviations,
        )
