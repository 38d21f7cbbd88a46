"""Deep supervision: a head after every segment, and no cut.

C.-Y. Lee, S. Xie, P. Gallagher, Z. Zhang, Z. Tu. Deeply-supervised nets. AISTATS 2015.

The rival that has the heads of local learning and none of its isolation: the cross-entropies of all heads and of the
output are one loss, whose gradient reaches every parameter before it. What it gains over a local method with the same
heads is what the cuts cost.

    L = L_out + w sum_l L_l          (eq. 3 of the paper, with cross-entropy and one weight for all)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import ClassVar

from localize.heads import blocks
from localize.heads.classifiers import CLASSIFIERS, Classifiers
from localize.ir import LabelKind, LocalLoss, Plan, Route, Segments
from localize.methods.base import ANY_LABELS, Local, needs_two, option


@dataclass(frozen=True)
class DeepSupervision(Local):
    """Heads after every segment, trained together with the output by one loss."""

    name: ClassVar[str] = "deep-supervision"
    reference: ClassVar[str] = "C.-Y. Lee, S. Xie, P. Gallagher, Z. Zhang, Z. Tu. Deeply-supervised nets. AISTATS 2015."
    labels: ClassVar[tuple[LabelKind, ...]] = ANY_LABELS
    deviations: ClassVar[tuple[str, ...]] = (
        "Heads and output are trained by cross-entropy; the paper has squared hinge losses of SVMs.",
        "All heads keep their weight during training; the paper lets it vanish, and drops a head whose loss is small.",
    )

    head: str = option("linear", "layers of the heads", choices=CLASSIFIERS)
    weight: float = option(1.0, "weight of the heads' losses; the output's is 1", low=1e-6)

    def plan(self, segments: Segments) -> Plan:
        """Put one loss on the outputs of all segments.

        Raises:
            MethodError: there is only one segment, so that there is no place for a head.
        """
        needs_two(self, segments)
        last = len(segments) - 1
        classifiers = Classifiers(self.head, segments.trunk)
        made = [classifiers.behind(segment, f"head_{segment.index}") for segment in segments.segments[:-1]]
        terms = [replace(branch.weighted(self.weight).term, at=k) for k, branch in enumerate(made)]
        heads = [block for branch in made for block in branch.blocks]
        trunk = tuple(blocks.of_segments(segments))
        return Plan(
            method=self.name,
            options=asdict(self),
            segments=segments,
            blocks=(*trunk, *heads),
            losses=(
                LocalLoss(
                    "loss_0",
                    Route(0, last),
                    (*terms, *blocks.output_loss(segments).terms),
                    tuple(block.name for block in (*trunk, *heads)),
                ),
            ),
            update="end",
            reference=self.reference,
            deviations=self.deviations,
        )
