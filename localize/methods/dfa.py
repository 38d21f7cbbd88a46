"""Direct feedback alignment: the error of the output reaches every layer through a fixed random matrix of its own.

A. Nøkland. Direct feedback alignment provides learning in deep neural networks. NeurIPS 2016,
https://arxiv.org/abs/1609.01596.

    e       = softmax(logits) - y*                                error of the output, y* the one-hot label (eq. 5)
    dL/dh_k = B_k^T e                                             in place of the gradient, at every layer (sec. 2)
    L_k     = sum_n <h_kn, B_k^T e_n>                             the loss with this gradient; e has no history
    L_K     = cross-entropy of the output                         last segment, a mean over the batch

The paper publishes no code. What becomes of the batch follows that of C. Frenkel, M. Lefebvre, D. Bol (Frontiers in
Neuroscience 15, 2021; ChFrenkel/DirectRandomTargetProjection), which trains by DFA too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from localize.heads.feedback import REDUCTIONS, projected
from localize.ir import LabelKind, Plan, Segments
from localize.methods.base import IDS_OR_SOFT, LayerByLayer, isolated, option


@dataclass(frozen=True)
class DirectFeedbackAlignment(LayerByLayer):
    """Every segment is handed the error of the output through a fixed random matrix."""

    name: ClassVar[str] = "dfa"
    reference: ClassVar[str] = (
        "A. Nøkland. Direct feedback alignment provides learning in deep neural networks. NeurIPS 2016. "
        "arXiv 1609.01596."
    )
    labels: ClassVar[tuple[LabelKind, ...]] = IDS_OR_SOFT
    deviations: ClassVar[tuple[str, ...]] = (
        "The model keeps its initial weights; the paper starts tanh networks from zero.",
        "The error is handed to what leaves a segment: after normalisation, dropout and pooling where these are in "
        "it. A segment of several weighted layers is trained by backpropagation inside (cuts by node make more "
        "segments).",
        "The range of the paper's feedback matrices was not verified; it is an option here.",
        "The projected error is not divided by the batch size, as in the code of Frenkel et al. 2021 "
        "((y - labels).mm(B)), while the output's loss is a mean: an optimizer without normalisation moves hidden "
        "layers N times as far as the output (reduction=mean divides). Batches that are accumulated, and those of "
        "several processes, are averaged.",
        "The losses of the layers are not objectives: their gradients are the rule, their values mean nothing.",
    )

    scale: float = option(
        1.0,
        "entries of B are drawn from U(-scale / sqrt(D), scale / sqrt(D)), D the number of activities",
        low=1e-6,
    )
    reduction: str = option(
        "sum",
        "what is handed to a layer: the vector of each image as it is, as in the code of DRTP (sum), or divided by the "
        "batch size, as the output's mean loss divides its own (mean)",
        choices=tuple(REDUCTIONS),
    )

    def plan(self, segments: Segments) -> Plan:
        """Hand every segment but the last the projected error of the output.

        Raises:
            MethodError: there is no cut.
        """
        classes = segments.trunk.num_classes
        return isolated(
            self,
            segments,
            lambda segment: [
                projected(segment, classes, of="error", scale=float(self.scale), reduction=self.reduction)
            ],
        )
