"""Gradient accumulation: backpropagation on parts of the batch, one after the other.

Y. Huang, Y. Cheng, A. Bapna et al. GPipe: efficient training of giant neural networks using pipeline parallelism.
NeurIPS 2019 (sec. 2.3: a mini-batch is divided into M micro-batches whose gradients are accumulated and applied once).

The rival of local learning where memory is the only concern and the batch can be divided: only one part's activations
are held at a time. The loss of a part is its mean times the part's share of the batch, so that the gradients add up to
those of the whole batch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import ClassVar

from localize.heads import blocks
from localize.ir import LabelKind, Plan, Segments
from localize.methods.base import ANY_LABELS, Uncut, option


@dataclass(frozen=True)
class Accumulate(Uncut):
    """Backpropagation on parts of the batch; the gradients add up, and one update follows."""

    name: ClassVar[str] = "accumulate"
    reference: ClassVar[str] = (
        "Y. Huang, Y. Cheng, A. Bapna, O. Firat, M. X. Chen, D. Chen, H. Lee, J. Ngiam, Q. V. Le, Y. Wu, Z. Chen. "
        "GPipe: efficient training of giant neural networks using pipeline parallelism. NeurIPS 2019."
    )
    labels: ClassVar[tuple[LabelKind, ...]] = ANY_LABELS
    deviations: ClassVar[tuple[str, ...]] = (
        "BatchNorm normalises each part by its own statistics, and its running statistics move once for every part: "
        "with BatchNorm the gradients are not those of the whole batch. The paper's micro-batches do the same, and "
        "keep moving averages of the whole mini-batch for evaluation.",
        "Parts are run one after the other on one device; the paper pipelines them.",
    )

    parts: int = option(4, "number of parts that the batch is taken in", low=2)

    def plan(self, segments: Segments) -> Plan:
        """Put the cross-entropy of each part of the batch on the model's own output."""
        whole = blocks.output_loss(segments, start=0)
        return Plan(
            method=self.name,
            options=asdict(self),
            segments=segments,
            blocks=tuple(blocks.of_segments(segments)),
            losses=tuple(replace(whole, name=f"loss_{i}", part=(i, self.parts)) for i in range(self.parts)),
            update="end",
            reference=self.reference,
            deviations=self.deviations,
        )
