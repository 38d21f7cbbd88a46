"""Local error signals: every layer predicts the label, and makes images of one class similar.

A. Nøkland, L. H. Eidnes. Training neural networks with local error signals. ICML 2019.
https://arxiv.org/abs/1901.06656. Reference code: anokland/local-loss at 7b3b40b.

    L_pred    = cross-entropy(W_p pool(h_l), y)                        sec. 2.3, with pool to at most D_in values
    L_sim     = 1/N^2 |S(W_s h_l) - S(Y)|_F^2                          eq. 1, W_s a 3x3 convolution or a linear map
    L_predsim = (1 - beta) L_pred + beta L_sim,  h_l = f_l(sg[h_(l-1)])

The gradient reaches f_l, W_p and W_s, nothing else. The output layer alone is trained by the cross-entropy of its
output.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

from localize.errors import Advice, OptionError
from localize.heads import blocks, narrow, similarity
from localize.heads.branch import Branch
from localize.ir import Grain, LabelKind, Plan, Segment, Segments
from localize.methods.base import ANY_LABELS, Local, isolated, option


@dataclass(frozen=True)
class PredSim(Local):
    """Local prediction and similarity matching."""

    name: ClassVar[str] = "predsim"
    reference: ClassVar[str] = (
        "A. Nøkland, L. H. Eidnes. Training neural networks with local error signals. ICML 2019. "
        "Code: anokland/local-loss at 7b3b40b."
    )
    labels: ClassVar[tuple[LabelKind, ...]] = ANY_LABELS
    deviations: ClassVar[tuple[str, ...]] = (
        "Activations are those of the model. The published runs with a similarity loss have LeakyReLU of slope 0.01 "
        "(cifar/vgg8b takes activation=leaky), those with prediction only ReLU.",
        "The output layer keeps the weights of the model; the code starts it at zero, as it does the prediction heads.",
        "The convolution of the similarity loss is drawn from N(0, 2 / (9 C)), as those of all heads are; the code "
        "leaves it as torch draws it.",
        "A dropout that directly follows a layer belongs to it, and the local loss sees its output; the code takes the "
        "features before dropout. A pooling goes to the next layer, as in the code.",
        "A layer is updated as soon as its backward has run, as the code does (update=immediate); no two layers share "
        "a parameter, so update=end gives the same weights.",
        "Features that are equal in every entry get no gradient from the similarity loss; in the code it is not a "
        "number.",
        "Batches are drawn from all classes; the code draws 20 of 100 for half of the training on CIFAR-100.",
        "The code cannot run its prediction loss after a convolution of stride 2 in a ResNet (it pools by the size of "
        "the input); here the size of the features counts.",
    )

    terms: str = option(
        "predsim",
        "what trains a layer: prediction of the label (pred), similarity (sim), or both (predsim)",
        choices=("predsim", "pred", "sim"),
    )
    beta: float = option(0.99, "weight of the similarity loss in predsim; the prediction loss has 1 - beta", low=0)
    dim_in: int = option(
        0,
        "features are pooled to at most so many values before the label is predicted; 0: 4 head_width, or 4096 for "
        "100 classes and more, 1024 for images up to 28x28, 2048 for others",
        low=0,
    )
    zero_init: bool = option(True, "whether the weights that predict the label start at zero")
    output_weight: float = option(
        0.0,
        "weight of the loss of the output; 0: 1 - beta in predsim, and 1 in pred and sim, as the code has it",
        low=0,
    )
    classifier: Literal["merged", "own"] = option(
        "own",
        "the output layer is trained alone by the loss of the output (own, the paper) or with the block before it "
        "(merged, the code of AugLocal)",
        choices=("own", "merged"),
    )
    head_width: int = option(0, narrow.MEANING, low=0)
    update: str = option(
        "immediate",
        "parameters move after each layer's backward (immediate) or once after all",
        choices=("immediate", "end"),
    )

    @property
    def grain(self) -> Grain:
        """The paper's layers: every convolution and every hidden linear layer, with pooling left to the next."""
        return Grain(stem="own", classifier=self.classifier, hidden_linear="own", pool="next")

    def plan(self, segments: Segments) -> Plan:
        """Give every segment but the last its similarity head, its prediction head, or both.

        Raises:
            MethodError: there is no cut.
            OptionError: beta is not between 0 and 1.
        """
        trunk, shares = segments.trunk, self._shares()

        def supervise(segment: Segment) -> list[Branch]:
            k = segment.index
            limit = self.dim_in or 4 * self.head_width
            branches = {
                "sim": lambda read: similarity.similarity(read, trunk, f"similarity_{k}"),
                "pred": lambda read: similarity.prediction(
                    read, trunk, f"head_{k}", dim_in=limit, zero_init=self.zero_init
                ),
            }
            made = {term: narrow.narrowed(segment, self.head_width, branches[term]) for term in shares}
            return [branch.weighted(shares[term]) for term, branch in made.items()]

        output = blocks.output_loss(segments, weight=self.output_weight or shares.get("pred", 1.0))
        told = (*self.deviations, *narrow.told(self.head_width))
        return isolated(self, segments, supervise, output=output, update=self.update, deviations=told)

    def _shares(self) -> dict[str, float]:
        """Return the weight of every term of a layer's loss."""
        if self.terms != "predsim":
            return {self.terms: 1.0}
        if not 0 < self.beta < 1:
            raise OptionError(
                f"beta={self.beta:g} leaves one of the two losses out.",
                help=Advice("terms='pred', or terms='sim'"),
                option="beta",
            )
        return {"sim": self.beta, "pred": float(1 - Fraction(str(self.beta)))}
