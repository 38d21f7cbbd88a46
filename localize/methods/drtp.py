"""Direct random target projection: every layer is handed a fixed random image of the one-hot label as its gradient.

C. Frenkel, M. Lefebvre, D. Bol. Learning without feedback: fixed random learning signals allow for feedforward training
of deep neural networks. Frontiers in Neuroscience 15, 2021. Reference code: ChFrenkel/DirectRandomTargetProjection.

    dL/dh_k = B_k^T y*                                            at every layer but the last, y* the one-hot label
    L_k     = sum_n <h_kn, B_k^T y*_n>                            the loss with this gradient
    L_K     = cross-entropy of the output                         last segment, a mean over the batch
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from localize.heads.feedback import REDUCTIONS, projected
from localize.ir import LabelKind, Plan, Segments
from localize.methods.base import ANY_LABELS, LayerByLayer, isolated, option


@dataclass(frozen=True)
class DirectRandomTargetProjection(LayerByLayer):
    """Local losses that point the activities of a layer against a fixed random vector of their class."""

    name: ClassVar[str] = "drtp"
    reference: ClassVar[str] = (
        "C. Frenkel, M. Lefebvre, D. Bol. Learning without feedback: fixed random learning signals allow for "
        "feedforward training of deep neural networks. Frontiers in Neuroscience 15, 2021. "
        "Code: ChFrenkel/DirectRandomTargetProjection."
    )
    labels: ClassVar[tuple[LabelKind, ...]] = ANY_LABELS
    deviations: ClassVar[tuple[str, ...]] = (
        "The random vector of the label is the gradient at the activities, as in the code: activities move against it. "
        "Its distribution is symmetric, so that the sign is no choice.",
        "It is not divided by the batch size, as in the code (labels.mm(B)), while the output's loss is a mean: an "
        "optimizer without normalisation moves hidden layers N times as far as the output (reduction=mean divides). "
        "Batches that are accumulated, and those of several processes, are averaged.",
        "The output has softmax and cross-entropy; the paper's has sigmoids and a binary cross-entropy.",
        "The model keeps its activations. The paper's hidden layers have tanh, which bounds the activities; with ReLU "
        "nothing does, and they grow as long as they are trained.",
        "The vector is handed to what leaves a segment: after normalisation, dropout and pooling where these are in "
        "it (after the activation of each layer in the paper). A segment of several weighted layers is trained by "
        "backpropagation inside.",
        "Parameters move once, after all layers; in the paper during the forward. The updates are equal.",
    )

    scale: float = option(
        math.sqrt(6),
        "entries of B are drawn from U(-scale / sqrt(D), scale / sqrt(D)), D the number of activities; sqrt(6) is He's "
        "initialisation, as in the code",
        low=1e-6,
    )
    reduction: str = option(
        "sum",
        "what is handed to a layer: the vector of each image as it is, as in the code of DRTP (sum), or divided by the "
        "batch size, as the output's mean loss divides its own (mean)",
        choices=tuple(REDUCTIONS),
    )

    def plan(self, segments: Segments) -> Plan:
        """Hand every segment but the last the projected label.

        Raises:
            MethodError: there is no cut.
        """
        classes = segments.trunk.num_classes
        return isolated(
            self,
            segments,
            lambda segment: [
                projected(segment, classes, of="labels", scale=float(self.scale), reduction=self.reduction)
            ],
        )
