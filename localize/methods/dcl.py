"""Dictionary contrastive learning: every segment is trained to agree with the embedding of its label.

S. Choi, M. Jeon, Y. Hwang, J. Oh, S. Lim, J. Lee, M. Kang. Dictionary contrastive learning for efficient local
supervision without auxiliary networks. ICLR 2024. Reference code: schoi828/DCL at ef169c8.

    s_nz = 1/K sum_k <h_n^k, t'_z>        scores of image n against class z, t' pooled to the width of h
    L    = cross-entropy(s, y)            at every layer (eq. 2)
    argmax_z s_nz                         layer-wise prediction, without the classifier (eq. 3)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

from localize.errors import Advice, OptionError
from localize.heads import blocks
from localize.heads.dictionary import Dictionary, DictionaryScores, embedding_width, segments_of_vectors, vector_width
from localize.ir import Block, Copy, LabelKind, LocalLoss, Plan, Route, Segment, Segments, Term, Use
from localize.methods.base import ANY_LABELS, LayerByLayer, needs_two, option

_DELAYED = "delayed_dictionary"
_DICTIONARIES = ("adaptive", "static", "last", "layerwise", "averaged")


_WHY = {
    "adaptive": "every layer trains it: the gradients of the layers before the last one would be late as well.",
    "averaged": "every layer trains it: the gradients of the layers before the last one would be late as well.",
    "static": "nothing trains it, so that all layers have it already.",
    "layerwise": "every layer has its own, which is never late.",
}
_DEVIATION = (
    "delay=1: layers before the last intermediate one read the dictionary as it was a batch earlier than in DCL-O; "
    "parameters move once, after all backwards, which changes nothing else where each is trained by one loss."
)


@dataclass(frozen=True)
class DCL(LayerByLayer):
    """Local losses against a dictionary of label embeddings that all layers share."""

    name: ClassVar[str] = "dcl"
    reference: ClassVar[str] = (
        "S. Choi, M. Jeon, Y. Hwang, J. Oh, S. Lim, J. Lee, M. Kang. Dictionary contrastive learning for "
        "efficient local supervision without auxiliary networks. ICLR 2024. Code: schoi828/DCL at ef169c8."
    )
    labels: ClassVar[tuple[LabelKind, ...]] = ANY_LABELS
    deviations: ClassVar[tuple[str, ...]] = (
        "Embeddings are pooled by adaptive_avg_pool1d, as the code does; the paper's formula differs where C_l does "
        "not divide C_D.",
        "The last layer has no ReLU on its logits; the code's FC nets have one (the zoo's relu_logits restores it).",
        "ResNets have one local layer per block with the stem in the first (15 for ResNet-32), as the paper's counts "
        "say; its appendix says 16.",
        "Layer-wise dictionaries have the width of their layer, as the paper's counts say; its text says C_D.",
    )

    dictionary: str = option(
        "adaptive",
        "who trains the dictionary: every layer (adaptive), none (static), only the last intermediate layer (last), "
        "every layer its own (layerwise), or every layer by the mean of their gradients (averaged)",
        choices=_DICTIONARIES,
    )
    start: str = option(
        "normal", "what the embeddings start as: normal or orthogonal rows (Fig. 4)", choices=("normal", "orthogonal")
    )
    norm: float = option(0.0, "length of every embedding at the start (Fig. 4 scales static ones); 0: as drawn", low=0)
    match: str = option("dot", "how features meet embeddings", choices=("dot", "cosine"))
    reduce: str = option("pool", "how embeddings get the features' width", choices=("pool", "projection"))
    k: int = option(
        0,
        "number of segments of a flat feature vector; 0: as many as make them as wide as the widest feature map, "
        "and 1 in a net without feature maps",
        low=0,
    )
    tau: float = option(0.07, "temperature of the cosine form", low=1e-6)
    update: Literal["end", "immediate"] = option(
        "immediate",
        "parameters move after each layer's backward (immediate: the dictionary moves once per layer and batch) or "
        "once after all, as they always do with dictionary=averaged and with delay=1",
        choices=("immediate", "end"),
    )
    moments: Literal["per-loss", "shared"] = option(
        "per-loss",
        "optimizer state of the dictionary: one set for every layer, as if each had its own optimizer, or one for all",
        choices=("per-loss", "shared"),
    )
    delay: int = option(
        0,
        "with dictionary=last, number of batches by which layers before the last intermediate one read the dictionary "
        "later than in DCL-O: 1 lets a pipeline train them in other processes",
        low=0,
    )

    def plan(self, segments: Segments) -> Plan:
        """Give every segment but the last the scores against the dictionary.

        Raises:
            MethodError: there is no cut.
            OptionError: a flat feature vector cannot be cut into ``k`` segments; or the dictionary cannot be delayed.
        """
        needs_two(self, segments)
        if self.delay > 1:
            raise OptionError(
                f"the dictionary is one batch late at most, and delay is {self.delay}.",
                help=Advice("delay=1", "--delay 1"),
                option="delay",
            )
        if self.delay and self.dictionary != "last":
            raise OptionError(
                f"delay=1 is for dictionary=last, and dictionary is {self.dictionary}.",
                facts=_WHY[self.dictionary],
                help=Advice("dictionary='last', or delay=0", "--dictionary last, or leave out --delay"),
                option="delay",
            )
        local = segments.segments[:-1]
        ks = [segments_of_vectors(segment, local, self.k) for segment in local]
        widths = [max(embedding_width(f, k) for f in s.features) for s, k in zip(local, ks, strict=True)]
        if self.dictionary == "layerwise":
            own = [self._dictionary(f"dictionary_{s.index}", w, segments) for s, w in zip(local, widths, strict=True)]
            dictionaries = own
        else:
            own = [self._dictionary("dictionary", max(widths), segments)]
            dictionaries = own * len(local)
        copies: tuple[Copy, ...] = ()
        if self.delay and len(local) > 1:
            own.append(self._dictionary(_DELAYED, max(widths), segments, trained=False))
            dictionaries = [*[own[1]] * (len(local) - 1), own[0]]
            copies = (Copy(_DELAYED, "", own[0].name, 0.0, of="heads"),)
        heads = [self._head(s, d, k) for s, d, k in zip(local, dictionaries, ks, strict=True)]
        losses = [
            self._loss(s, head, d, layers=len(local)) for s, head, d in zip(local, heads, dictionaries, strict=True)
        ]
        return Plan(
            method=self.name,
            options=asdict(self),
            segments=segments,
            blocks=(*blocks.of_segments(segments), *heads, *own),
            losses=(*losses, blocks.output_loss(segments)),
            update="end" if self.dictionary == "averaged" or copies else self.update,
            moments=self.moments,
            copies=copies,
            pull="before" if copies else "after",
            reference=self.reference,
            deviations=(*self.deviations, *([_DEVIATION] if copies else [])),
        )

    def _dictionary(self, name: str, width: int, segments: Segments, *, trained: bool = True) -> Block:
        trained = trained and self.dictionary != "static"
        module = Dictionary(segments.trunk.num_classes, width, trained=trained, start=self.start, norm=self.norm)
        module = module.to("meta")
        return blocks.of_module(name, module, role="shared", facts={"shape": list(module.weight.shape)})

    def _head(self, segment: Segment, dictionary: Block, k: int) -> Block:
        module = DictionaryScores(
            segment.features,
            vector_width(dictionary),
            k=k,
            projection=self.reduce == "projection",
            cosine=self.match == "cosine",
            tau=self.tau,
        ).to("meta")
        return blocks.of_module(f"head_{segment.index}", module, facts={"k": k})

    def _loss(self, segment: Segment, head: Block, dictionary: Block, *, layers: int) -> LocalLoss:
        k = segment.index
        detached = self.dictionary == "last" and k < layers - 1
        trains = self.dictionary != "static" and not detached
        detached = detached and dictionary.name != _DELAYED
        use = Use(dictionary.name, detached, scale=1 / layers if self.dictionary == "averaged" else 1.0)
        reach = (segment.name, head.name, *((dictionary.name,) if trains else ()))
        return LocalLoss(f"loss_{k}", Route(k, k), (Term(blocks.CROSS_ENTROPY, head.name, (use,)),), reach)
