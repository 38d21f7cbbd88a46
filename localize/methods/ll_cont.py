"""LL-cont and LL-contrec: local contrastive learning with auxiliary layers, the baselines of the DCL paper.

S. Choi, M. Jeon, Y. Hwang, J. Oh, S. Lim, J. Lee, M. Kang. Dictionary contrastive learning for efficient local
supervision without auxiliary networks. ICLR 2024, eq. 1, Table 3, Table 4, Table V, app. J.2.4. Auxiliary layers of
A. Nøkland, L. H. Eidnes. Training neural networks with local error signals. ICML 2019. The code is not released.

    a       = W pool(h_l) / |W pool(h_l)|,  pool(h_l) of at most A values, W of size 128 x A
    L_cont  = SupCon(a)                                                        (LL-cont)
    L       = alpha beta L_cont + alpha (1 - beta) L_rec,  beta = l / (L - 1)  (LL-contrec)

L_rec is the binary cross-entropy of the image, reconstructed from h_l by two convolutions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from localize.heads import branches
from localize.heads.branch import Branch
from localize.heads.decoder import require_images
from localize.heads.maps import is_flat
from localize.ir import Grain, LabelKind, Plan, Segment, Segments
from localize.methods.base import CLASS_IDS, Local, isolated, option

_REFERENCE = (
    "S. Choi, M. Jeon, Y. Hwang, J. Oh, S. Lim, J. Lee, M. Kang. Dictionary contrastive learning for efficient local "
    "supervision without auxiliary networks. ICLR 2024. Pooling: anokland/local-loss at 7b3b40b."
)
_DEVIATIONS = (
    "The loss is averaged over each sample's partners and then over samples, as the authors' code does (form=supcon); "
    "eq. 1 averages over pairs, which is the same where classes are equally frequent (form=pairs).",
    "The vectors are scaled to length 1, as in the authors' code; eq. 1 does not say so.",
    "A hidden linear layer of F features has an auxiliary layer F -> 128; the paper's counts take A -> 128 for it as "
    "well (1,835,904 instead of 1,704,832 parameters on VGG8B and 32x32 images).",
    "The paper's text pools to 1024 values on all data sets, its counts and its A say 2048 from 32x32 images on.",
)


@dataclass(frozen=True)
class LLCont(Local):
    """A contrastive loss on projected features, after every layer."""

    name: ClassVar[str] = "ll-cont"
    reference: ClassVar[str] = _REFERENCE
    labels: ClassVar[tuple[LabelKind, ...]] = CLASS_IDS
    deviations: ClassVar[tuple[str, ...]] = (
        *_DEVIATIONS,
        "aux=mean is what the counts of Table V say (73,600 on ResNet-32); the text says three convolutions and two "
        "linear layers.",
    )

    aux: str = option(
        "pooled",
        "what the projection reads: the map pooled to at most dim_in values, or the mean of the local vectors (mean, "
        "as in Table V; the stem is then part of the first layer)",
        choices=("pooled", "mean"),
    )
    dim_in: int = option(0, "A; 0: 1024 for images up to 28x28, 2048 for others", low=0)
    feature_dim: int = option(128, "length of the projected vectors", low=1)
    tau: float = option(0.07, "temperature of the contrastive loss", low=1e-6)
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

    @property
    def grain(self) -> Grain:
        """Layers of the local-loss papers, pooling in the next; in Table V the blocks, the stem in the first."""
        return Grain(stem="merged" if self.aux == "mean" else "own", classifier="own", hidden_linear="own", pool="next")

    def plan(self, segments: Segments) -> Plan:
        """Give every segment but the last a projection.

        Raises:
            MethodError: there is no cut.
        """
        return isolated(self, segments, lambda segment: [self._contrast(segment, segments)], update=self.update)

    def _contrast(self, segment: Segment, segments: Segments) -> Branch:
        trunk = segments.trunk
        return branches.contrast(
            segment,
            trunk,
            f"head_{segment.index}",
            head="linear" if self.aux == "mean" else "pooled",
            size=self.feature_dim,
            tau=self.tau,
            form=self.form,
            limit=self.dim_in or (1024 if max(trunk.input_shape[1:], default=0) <= 28 else 2048),
        )


@dataclass(frozen=True)
class LLContRec(LLCont):
    """A contrastive loss on projected features, and a reconstruction of the image, after every layer."""

    name: ClassVar[str] = "ll-contrec"
    deviations: ClassVar[tuple[str, ...]] = (
        *_DEVIATIONS,
        "alpha is not given in the paper; its default here is 1.",
        "The decoder has a BatchNorm and a ReLU between its convolutions, as InfoPro's has, which the paper follows.",
        "Flat features have no reconstruction, as the paper's counts say, and are trained by alpha beta L_cont alone.",
        "Where beta is 1, the reconstruction has weight 0 and is left out together with its decoder.",
    )

    alpha: float = option(1.0, "what both losses are multiplied by", low=1e-6)
    mean: str = option("", "mean that the images were normalised with: one number for each channel, with commas")
    std: str = option("", "standard deviation that the images were normalised with")

    def plan(self, segments: Segments) -> Plan:
        """Give every segment but the last a projection, and a decoder where its features have places.

        Raises:
            MethodError: there is no cut, or no features with places at all, or the model takes no images.
            OptionError: mean and std cannot be read.
        """
        local = segments.segments[:-1]
        if local and all(is_flat(segment.features) for segment in local):
            require_images("LL-contrec", local[0], segments.trunk)
        return isolated(self, segments, lambda segment: self._supervise(segment, segments), update=self.update)

    def _supervise(self, segment: Segment, segments: Segments) -> list[Branch]:
        beta = (segment.index + 1) / (len(segments) - 1)
        found = [self._contrast(segment, segments).weighted(self.alpha * beta)]
        if beta < 1 and not is_flat(segment.features):
            name = f"decoder_{segment.index}"
            made = branches.reconstruction(segment, segments.trunk, name, mean=self.mean, std=self.std)
            found.insert(0, made.weighted(self.alpha * (1 - beta)))
        return found
