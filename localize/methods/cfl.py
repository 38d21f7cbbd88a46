"""CFL: every layer is trained to agree with noisy embeddings of the labels, and to draw features of a class together.

Backpropagation-free contrastive forward learning using label embeddings (CFL). 2023, anonymous preprint; the precursor
of DCL (S. Choi et al., ICLR 2024).

    h_n     = mean of the local vectors of image n at layer l;  t_z = the embedding of class z, pooled to the width of h
    t + eps = noisy embeddings, eps fresh in every forward, from N(0, 1 / C_l^2)         (eqs. 2, 5)
    L_batch = h against the noisy embeddings of the labels of the batch                  (eq. 4)
    L_dict  = cross-entropy of <h_n, t_z + eps_z>                                        (eq. 6)
    L_feat  = contrastive loss of h / |h|                                                (eq. 9)
    total-B = L_batch + L_feat,  total-D = L_dict + L_feat                               (eq. 10)
    argmax_z <h_n, t_z>                                      layer-wise prediction, without noise (eq. 1)

The dictionary is trained by the last layer before the classifier only (eq. 3). Table 3 has it fixed
(``dictionary=static``), and compared by the cosine, sharpened by tau = 0.07 (``match=cosine``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from localize.errors import Advice, OptionError
from localize.heads import blocks, branches
from localize.heads.branch import Branch
from localize.heads.dictionary import (
    BatchScores,
    Dictionary,
    DictionaryScores,
    embedding_width,
    segments_of_vectors,
    vector_width,
)
from localize.ir import Block, LabelKind, Plan, Segment, Segments, Term, Use
from localize.methods.base import ANY_LABELS, CLASS_IDS, LayerByLayer, isolated, option

_TERMS = {"D": ("dict", "feat"), "B": ("batch", "feat"), "dict": ("dict",), "batch": ("batch",), "feat": ("feat",)}
_BATCH = {"supcon": "localize.losses.batch_contrastive", "eq4": "localize.losses.batch_ratio"}
_FEATURE = {"supcon": "supcon", "eq9": "ratio"}


@dataclass(frozen=True)
class CFL(LayerByLayer):
    """Noisy label embeddings, and a contrastive loss on features, at every layer."""

    name: ClassVar[str] = "cfl"
    reference: ClassVar[str] = (
        "Backpropagation-free contrastive forward learning using label embeddings. 2023, anonymous preprint; precursor "
        "of S. Choi et al., ICLR 2024."
    )
    deviations: ClassVar[tuple[str, ...]] = (
        "L_batch has the form of the authors' code, where a softmax over all other samples of the batch is averaged "
        "over those of the same class (batch_form=supcon). Eq. 4 has other classes only in its denominator and is "
        "unbounded below (batch_form=eq4).",
        "L_feat is SupCon, as in the authors' code (feature_form=supcon); eq. 9 takes the logarithm of a mean in which "
        "the sample's product with itself dominates (feature_form=eq9).",
        "Embeddings are pooled by adaptive_avg_pool1d, as in the authors' code; the paper's formula differs where C_l "
        "does not divide C_D.",
        "The noise has the standard deviation 1/C_l, as in the authors' code.",
        "With match=cosine the dictionary is scaled to length 1 before it is pooled, and noise is added afterwards, as "
        "in the authors' code for DCL; the paper gives the temperature only.",
    )

    total: str = option(
        "D",
        "the losses of a layer: D is L_dict + L_feat, B is L_batch + L_feat; dict, batch and feat are single losses",
        choices=tuple(_TERMS),
    )
    batch_form: str = option("supcon", "the form of L_batch", choices=tuple(_BATCH))
    feature_form: str = option("supcon", "the form of L_feat", choices=tuple(_FEATURE))
    dictionary: str = option(
        "last",
        "who trains the dictionary: the last layer before the classifier, or none (static, the fixed D^Z of Table 3)",
        choices=("last", "static"),
    )
    match: str = option("dot", "how features meet embeddings (cosine: Table 3)", choices=("dot", "cosine"))
    noise: bool = option(True, "whether embeddings get noise in training")
    classifier: bool = option(
        True,
        "whether a classifier is trained after the last layer; otherwise (without f^L) embeddings predict",
    )
    k: int = option(
        0,
        "number of segments of a flat feature vector (8, 24 and 12 in the paper's nets); 0: as many as make them as "
        "wide as the widest feature map, and 1 in a net without feature maps",
        low=0,
    )
    tau: float = option(0.07, "temperature of L_feat, and of the cosine form", low=1e-6)
    update: str = option(
        "immediate", "parameters move after each layer's backward or once after all", choices=("immediate", "end")
    )

    @property
    def labels(self) -> tuple[LabelKind, ...]:
        """L_batch and L_feat ask which images are of one class; L_dict is a cross-entropy."""
        return ANY_LABELS if self.total == "dict" else CLASS_IDS

    def plan(self, segments: Segments) -> Plan:
        """Give every segment but the last its products with embeddings, and its mean features.

        Raises:
            MethodError: there is no cut.
            OptionError: a flat feature vector cannot be cut into ``k`` segments, or nothing is left that predicts.
        """
        if self.total == "feat" and not self.classifier:
            raise OptionError(
                "without a classifier and without embeddings, nothing predicts the class.",
                help=Advice("total='D' or 'B', or classifier=True", "--total D or B, or --classifier true"),
                option="classifier",
            )
        local = segments.segments[:-1]
        ks = {segment.index: segments_of_vectors(segment, local, self.k) for segment in local}
        widths = [embedding_width(f, ks[s.index]) for s in local for f in s.features]
        trained = self.dictionary != "static"
        module = Dictionary(segments.trunk.num_classes, max(widths, default=1), trained=trained).to("meta")
        dictionary = blocks.of_module("dictionary", module, role="shared", facts={"shape": list(module.weight.shape)})
        made = isolated(
            self,
            segments,
            lambda segment: self._supervise(segment, segments, dictionary, ks[segment.index]),
            update=self.update,
        )
        if self.classifier:
            return made
        return replace(made, losses=made.losses[:-1], frozen=(segments.segments[-1].name,))

    def _supervise(self, segment: Segment, segments: Segments, dictionary: Block, k: int) -> Sequence[Branch]:
        i, features = segment.index, segment.features
        use = Use(dictionary.name, detached=i < len(segments) - 2)
        shared = () if use.detached else (dictionary,)
        how: dict[str, Any] = {"k": k, "cosine": self.match == "cosine", "tau": float(self.tau)}
        width = vector_width(dictionary)

        def head(name: str, module: nn.Module) -> Block:
            return blocks.of_module(f"{name}_{i}", module.to("meta"), facts={"k": k})

        def batch() -> list[Branch]:
            products = head("products", BatchScores(features, noise=self.noise, **how))
            scores = head("head", DictionaryScores(features, width, **how))
            read = Term(blocks.CROSS_ENTROPY, scores.name, (Use(dictionary.name, True),), weight=0.0, detached=True)
            loss = Term(_BATCH[self.batch_form], products.name, (use,), scores=False, labels=True)
            return [Branch(loss, (products, *shared)), Branch(read, (scores,))]

        def dict_() -> list[Branch]:
            scores = head("head", DictionaryScores(features, width, noise=self.noise, **how))
            return [Branch(Term(blocks.CROSS_ENTROPY, scores.name, (use,)), (scores, *shared))]

        def feat() -> list[Branch]:
            form = _FEATURE[self.feature_form]
            return [branches.feature(segment, segments.trunk, f"mean_{i}", tau=self.tau, form=form, k=k)]

        builders = {"batch": batch, "dict": dict_, "feat": feat}
        return [branch for term in _TERMS[self.total] for branch in builders[term]()]
