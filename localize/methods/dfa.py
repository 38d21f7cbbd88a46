"""Direct feedback alignment: the error of the output reaches every layer through a fixed random matrix of its own.

A. Nøkland. Direct feedback alignment provides learning in deep neural networks. NeurIPS 2016,
https://arxiv.org/abs/1609.01596.

    e       = softmax(logits) - y*                                error of the output, y* the one-hot label (eq. 5)
    dL/dh_k = B_k^T e                                             in place of the gradient, at every layer (sec. 2)
    L_k     = 1/N sum_n <h_kn, B_k^T e_n>                         the loss with this gradient; e has no history
    L_K     = cross-entropy of the output                         last segment
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from localize.heads.feedback import projected
from localize.ir import Plan, Segments
from localize.methods.base import LayerByLayer, isolated, option


@dataclass(frozen=True)
class DirectFeedbackAlignment(LayerByLayer):
    """Every segment is handed the error of the output through a fixed random matrix."""

    name: ClassVar[str] = "dfa"
    reference: ClassVar[str] = (
        "A. Nøkland. Direct feedback alignment provides learning in deep neural networks. NeurIPS 2016. "
        "arXiv 1609.01596."
    )
    deviations: ClassVar[tuple[str, ...]] = (
        "The model keeps its initial weights; the paper starts tanh networks from zero.",
        "The error is handed to what leaves a segment: behind normalisation, dropout and pooling where these are in "
        "it. A segment of several weighted layers is trained by backpropagation inside (cuts by node make more "
        "segments).",
        "The range of the paper's feedback matrices was not verified; it is an option here.",
        "The losses of the layers are no objectives: their gradients are the rule, their values mean nothing.",
    )

    scale: float = option(
        1.0,
        "entries of B are drawn from U(-scale / sqrt(D), scale / sqrt(D)), D the number of activities",
        low=1e-6,
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
            lambda segment: [projected(segment, classes, of="error", scale=float(self.scale))],
        )
