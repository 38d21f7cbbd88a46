"""Cascaded forward: the layers stay as they were drawn, and a linear predictor of the label is trained after each.

G. Zhao, T. Wang, Y. Li, Y. Jin, C. Lang, H. Ling. The cascaded forward algorithm for neural network training. 2023,
https://arxiv.org/abs/2303.09728. Reference code: Graph-ZKY/CaFo.

    s_k = W_k vec(h_k)                                            class scores after segment k, h_k random features
    L_k = cross-entropy, squared error or sparsemax loss of s_k   trains W_k, and nothing else
    argmax_z sum_k softmax(s_k)_z                                 prediction, which is what is reported as accuracy
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar

import torch

from localize.heads import blocks
from localize.heads.predictor import FlatPredictor
from localize.ir import Block, Grain, LabelKind, LocalLoss, Plan, Route, Segment, Segments, Term
from localize.methods.base import ANY_LABELS, CLASS_IDS, IDS_OR_SOFT, LayerByLayer, needs_two, option

_LOSSES = {
    "cross_entropy": blocks.CROSS_ENTROPY,
    "squared_error": "localize.losses.squared_error",
    "sparsemax": "localize.losses.sparsemax",
}


@dataclass(frozen=True)
class CascadedForward(LayerByLayer):
    """Frozen layers, each with a linear predictor of its own."""

    name: ClassVar[str] = "cafo"
    reference: ClassVar[str] = (
        "G. Zhao, T. Wang, Y. Li, Y. Jin, C. Lang, H. Ling. The cascaded forward algorithm for neural network "
        "training. 2023. arXiv 2303.09728. Code: Graph-ZKY/CaFo."
    )
    deviations: ClassVar[tuple[str, ...]] = (
        "All predictors are trained in one step. The paper trains each to the end before the next; they share nothing, "
        "so that their gradients are equal.",
        "The model's own classifier is trained too, by the cross-entropy on the frozen features before it, so that an "
        "exported model is a classifier; it has no part in the prediction. The paper's blocks have none.",
        "A local layer ends after the BatchNorm that follows its activation and pooling, as the blocks of the code do "
        "(conv-ReLU-pool-BN).",
        "Predictors are trained by gradient descent; the paper solves the squared error in closed form.",
        "Predictors are drawn as torch draws linear layers; in the code they start from ones.",
        "BatchNorms of frozen layers normalise by the batch in training and move their statistics; no parameter of a "
        "frozen layer moves.",
        "Of the paper's two ways to make the layers, random ones are kept; training them by direct feedback alignment "
        "first is another method here.",
    )

    loss: str = option("cross_entropy", "the loss of every predictor", choices=tuple(_LOSSES))

    @property
    def labels(self) -> tuple[LabelKind, ...]:
        """What the loss of the predictors takes."""
        return {"cross_entropy": ANY_LABELS, "squared_error": IDS_OR_SOFT}.get(self.loss, CLASS_IDS)

    @property
    def grain(self) -> Grain:
        """The paper's blocks: all that has weights, with the pooling and the BatchNorm after it."""
        return Grain(stem="merged", classifier="own", hidden_linear="own", pool="same", norm="same")

    def plan(self, segments: Segments) -> Plan:
        """Give every segment but the last a predictor, and freeze the segment.

        Raises:
            MethodError: there is no cut.
        """
        needs_two(self, segments)
        local = segments.segments[:-1]
        predictors = [self._predictor(segment, segments.trunk.num_classes) for segment in local]
        losses = [
            LocalLoss(f"loss_{k}", Route(k, k), (Term(_LOSSES[self.loss], head.name, detached=True),), (head.name,))
            for k, head in enumerate(predictors)
        ]
        return Plan(
            method=self.name,
            options=asdict(self),
            segments=segments,
            blocks=(*blocks.of_segments(segments), *predictors),
            losses=(*losses, blocks.output_loss(segments)),
            update="end",
            frozen=tuple(segment.name for segment in local),
            answer="softmax_sum",
            reference=self.reference,
            deviations=self.deviations,
        )

    @staticmethod
    def _predictor(segment: Segment, classes: int) -> Block:
        with torch.device("meta"):
            module = FlatPredictor(segment.features, classes)
        return blocks.of_module(f"predictor_{segment.index}", module, *(f.shape for f in segment.features))
