"""Local error signals without backpropagation inside a layer's loss: random feedback, and random targets.

A. Nøkland, L. H. Eidnes. Training neural networks with local error signals. ICML 2019, sec. 2.4.
https://arxiv.org/abs/1901.06656. Reference code: anokland/local-loss at 7b3b40b (its option --bio).

    t_n    = P y_n                                                   a fixed random projection of the label
    L_pred = binary cross-entropy(W_p pool(h_l) + b, 1[t > 0])       dL/dpool(h_l) through a fixed random B, not W_p
    L_sim  = 1/N^2 |S(pool(h_l)) - S(t)|_F^2                         no weights between h_l and the loss
    L      = (1 - beta) L_pred + beta L_sim

No weight of a head is needed to compute the gradient of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from localize.errors import Advice, OptionError
from localize.heads import blocks, similarity
from localize.heads.branch import Branch
from localize.ir import Grain, LabelKind, Plan, Segment, Segments
from localize.methods.base import ANY_LABELS, Local, isolated, option


@dataclass(frozen=True)
class LocalLossWithoutBackprop(Local):
    """Local prediction of random projections of the label through fixed feedback, and similarity matching."""

    name: ClassVar[str] = "ll-bpf"
    reference: ClassVar[str] = (
        "A. Nøkland, L. H. Eidnes. Training neural networks with local error signals. ICML 2019. "
        "Code: anokland/local-loss at 7b3b40b."
    )
    labels: ClassVar[tuple[LabelKind, ...]] = ANY_LABELS
    deviations: ClassVar[tuple[str, ...]] = (
        "beta weighs the similarity loss and is 0.01, as in the published command; the losses with backpropagation "
        "have 0.99 there.",
        "The 3x3 convolution that the code builds for the similarity loss, and does not call here, is left out.",
        "The output layer is trained by the cross-entropy of its output, weight 1 - beta, and keeps the weights of the "
        "model; the code starts it at zero.",
        "Within a layer (convolution, BatchNorm, activation) the gradient is the ordinary one, as in the code; in a "
        "layer that is a residual block it passes several convolutions.",
        "A dropout that directly follows a layer belongs to it, and the local loss sees its output; the code takes the "
        "features before dropout.",
        "Local layers have no class scores: they predict random projections of the label.",
    )

    beta: float = option(0.01, "weight of the similarity loss; the prediction loss has 1 - beta", low=0)
    projections: int = option(128, "number of random projections of the label", low=1)
    dim_in: int = option(
        4096,
        "features are pooled to at most so many values: 4096 is the code's default, which the published command leaves "
        "as it is; 0: as the commands of LL-pred set it (1024 for images up to 28x28, 2048 for others of fewer than "
        "100 classes)",
        low=0,
    )
    update: str = option(
        "immediate",
        "parameters move after each layer's backward (immediate) or once after all",
        choices=("immediate", "end"),
    )

    @property
    def grain(self) -> Grain:
        """The paper's layers: every convolution and every hidden linear layer, with pooling left to the next."""
        return Grain(stem="own", classifier="own", hidden_linear="own", pool="next")

    def plan(self, segments: Segments) -> Plan:
        """Give every segment but the last its random targets and the heads that are compared with them.

        Raises:
            MethodError: there is no cut.
            OptionError: beta is not between 0 and 1.
        """
        if not 0 < self.beta < 1:
            raise OptionError(
                f"beta={self.beta:g} leaves one of the two losses out.", help=Advice("beta=0.01"), option="beta"
            )
        trunk, sizes = segments.trunk, {"dim_in": self.dim_in, "size": self.projections}
        rest = float(1 - Fraction(str(self.beta)))

        def supervise(segment: Segment) -> list[Branch]:
            k = segment.index
            similar = similarity.projected_similarity(segment, trunk, f"pooled_{k}", **sizes)
            signs = similarity.sign_prediction(segment, trunk, f"head_{k}", **sizes)
            return [similar.weighted(self.beta), signs.weighted(rest)]

        return isolated(self, segments, supervise, output=blocks.output_loss(segments, weight=rest), update=self.update)
