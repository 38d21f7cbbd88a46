"""L_feat: forward learning by a contrastive loss on the features themselves, without auxiliary layers.

S. Choi, M. Jeon, Y. Hwang, J. Oh, S. Lim, J. Lee, M. Kang. Dictionary contrastive learning for efficient local
supervision without auxiliary networks. ICLR 2024, eq. 1 with f_phi(h) = h, app. J.2.4. Reference code: schoi828/DCL at
ef169c8.

    a_n = h_n / |h_n|,  h_n the mean of the local vectors of image n (a flat vector as it is)
    L   = SupCon(a)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from localize.heads import branches
from localize.ir import LabelKind, Plan, Segments
from localize.methods.base import CLASS_IDS, LayerByLayer, isolated, option


@dataclass(frozen=True)
class Feat(LayerByLayer):
    """Features of one class are drawn together, at every layer."""

    name: ClassVar[str] = "feat"
    reference: ClassVar[str] = (
        "S. Choi, M. Jeon, Y. Hwang, J. Oh, S. Lim, J. Lee, M. Kang. Dictionary contrastive learning for "
        "efficient local supervision without auxiliary networks. ICLR 2024. Code: schoi828/DCL at ef169c8."
    )
    labels: ClassVar[tuple[LabelKind, ...]] = CLASS_IDS
    deviations: ClassVar[tuple[str, ...]] = (
        "The loss is averaged over each sample's partners and then over samples, as the code does (form=supcon); eq. 1 "
        "averages over pairs (form=pairs).",
        "Vectors are scaled to length 1, as the code does; eq. 1 does not mention it.",
    )

    tau: float = option(0.07, "temperature", low=1e-6)
    form: str = option(
        "supcon",
        "how the loss is averaged: over each sample's partners and then samples (supcon, the code), or pairs (eq. 1)",
        choices=("supcon", "pairs"),
    )
    update: str = option(
        "immediate",
        "parameters move after each layer's backward or once after all, which gives the same weights",
        choices=("immediate", "end"),
    )

    def plan(self, segments: Segments) -> Plan:
        """Put the contrastive loss on the features of every segment but the last.

        Raises:
            MethodError: there is no cut.
        """
        trunk = segments.trunk
        return isolated(
            self,
            segments,
            lambda segment: [branches.feature(segment, trunk, f"head_{segment.index}", tau=self.tau, form=self.form)],
            update=self.update,
        )
