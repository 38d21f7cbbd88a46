"""InfoPro: every module keeps what is needed to reconstruct the image, and learns to tell the classes apart.

Y. Wang, Z. Ni, S. Song, L. Yang, G. Huang. Revisiting locally supervised learning: an alternative to end-to-end
training. ICLR 2021. Reference code: blackfeather-wang/InfoPro-Pytorch at a38362a.

    L     = lambda_1 L_rec + lambda_2 L_task                     (the bound that replaces eq. 2; sec. 4)
    L_rec  = binary cross-entropy of the image, decoded from h
    L_task = SupCon of a projection of h (contrast), or cross-entropy of a classifier (softmax)

lambda_1 runs linearly from ``ixx_1`` at the first module to ``ixx_2`` at the last but one, lambda_2 from ``ixy_1`` to
``ixy_2``. The last module is trained by the cross-entropy of the model's output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from localize.errors import Advice, OptionError
from localize.heads import branches, narrow
from localize.heads.branch import Branch
from localize.heads.decoder import require_images
from localize.heads.projection import CONFIGURATIONS, widest_map
from localize.ir import LabelKind, Plan, Segment, Segments, Trunk
from localize.methods.base import ANY_LABELS, CLASS_IDS, Local, isolated, option


@dataclass(frozen=True)
class InfoPro(Local):
    """A reconstruction of the image, and a contrastive or softmax loss, after every module."""

    name: ClassVar[str] = "infopro"
    reference: ClassVar[str] = (
        "Y. Wang, Z. Ni, S. Song, L. Yang, G. Huang. Revisiting locally supervised learning: an alternative to "
        "end-to-end training. ICLR 2021. Code: blackfeather-wang/InfoPro-Pytorch at a38362a."
    )
    deviations: ClassVar[tuple[str, ...]] = (
        "SupCon is averaged over each sample's partners and then over samples, as the code does.",
        "A loss with weight 0 is left out together with its head; the code computes both.",
        "The code has heads for widths 16, 32 and 64. Here a head's first convolution doubles the width and halves "
        "the map wherever the trunk itself gets wider.",
        "Without mean and std, the image to reconstruct is the batch scaled to its own range; the code undoes the "
        "normalisation of its data sets.",
    )

    loss: str = option(
        "contrast", "what makes features tell classes apart: SupCon or cross-entropy", choices=("contrast", "softmax")
    )
    ixx_1: float = option(5.0, "weight of the reconstruction at the first module", low=0)
    ixy_1: float = option(0.05, "weight of the contrastive or softmax loss at the first module", low=0)
    ixx_2: float = option(0.2, "weight of the reconstruction at the last module but one", low=0)
    ixy_2: float = option(0.5, "weight of the contrastive or softmax loss at the last module but one", low=0)
    head: str = option(
        "1c2f",
        "layers of the projection or classifier: convolutions and linear layers; deep is the one for ImageNet",
        choices=(*CONFIGURATIONS, "deep"),
    )
    decoder: str = option(
        "plain", "layers of the decoder: two convolutions, or four (deep, for ImageNet)", choices=("plain", "deep")
    )
    tau: float = option(0.07, "temperature of the contrastive loss", low=1e-6)
    feature_dim: int = option(128, "length of the projected vectors", low=1)
    mean: str = option("", "mean that the images were normalised with: one number for each channel, with commas")
    std: str = option("", "standard deviation that the images were normalised with")
    head_width: int = option(0, narrow.MEANING, low=0)
    update: str = option(
        "end",
        "parameters move once after all modules, as in the code, or after each module's backward, which gives the same "
        "weights and frees gradients earlier",
        choices=("end", "immediate"),
    )

    @property
    def labels(self) -> tuple[LabelKind, ...]:
        """SupCon asks which images are of one class."""
        return ANY_LABELS if self.loss == "softmax" else CLASS_IDS

    def plan(self, segments: Segments) -> Plan:
        """Give every segment but the last a decoder and a projection (or classifier).

        Raises:
            MethodError: there is no cut, or features have no places to reconstruct an image from.
            OptionError: both weights of a segment are 0, or mean and std cannot be read.
        """
        for segment in segments.segments[:-1]:
            require_images("InfoPro", segment, segments.trunk)
        widest = widest_map(segments.trunk)
        widest = min(widest, self.head_width or widest)
        return isolated(
            self,
            segments,
            lambda segment: self._supervise(segment, segments, widest),
            update=self.update,
            deviations=(*self.deviations, *narrow.told(self.head_width, decodes=True)),
        )

    def weights(self, index: int, local: int) -> tuple[float, float]:
        """Return the weights of reconstruction and task at a segment.

        Args:
            index: number of the segment, from 0.
            local: number of segments with a local loss, K - 1.
        """
        r = index / (local - 1) if local > 1 else 0.0
        return (1 - r) * self.ixx_1 + r * self.ixx_2, (1 - r) * self.ixy_1 + r * self.ixy_2

    def _supervise(self, segment: Segment, segments: Segments, widest: int) -> list[Branch]:
        rec, task = self.weights(segment.index, len(segments) - 1)
        if rec == task == 0:
            raise OptionError(
                f"InfoPro has nothing to train {segment.name} by: both weights are 0.",
                facts=f"ixx from {self.ixx_1:g} to {self.ixx_2:g}, ixy from {self.ixy_1:g} to {self.ixy_2:g}.",
                help=Advice("ixx_1=5, ixy_1=0.05", "--ixx-1 5 --ixy-1 0.05"),
                option="ixx_1",
            )
        found = []
        trunk = segments.trunk
        if rec:
            name, decoding = f"decoder_{segment.index}", {"decoder": self.decoder, "mean": self.mean, "std": self.std}
            made = narrow.narrowed(
                segment, self.head_width, lambda read: branches.reconstruction(read, trunk, name, **decoding), side=0
            )
            found.append(made.weighted(rec))
        if task:
            made = narrow.narrowed(segment, self.head_width, lambda read: self._task(read, trunk, widest))
            found.append(made.weighted(task))
        return found

    def _task(self, segment: Segment, trunk: Trunk, widest: int) -> Branch:
        """Return what makes features tell classes apart."""
        name = f"head_{segment.index}"
        choice: dict[str, Any] = {"head": self.head, "widest": widest}
        if self.loss == "contrast":
            return branches.contrast(segment, trunk, name, size=self.feature_dim, tau=self.tau, **choice)
        return branches.softmax(segment, trunk, name, **choice)
