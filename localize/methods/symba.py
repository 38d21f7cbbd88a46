"""SymBa: forward-forward with one loss on the gap between positive and negative goodness, and a pattern of the class.

H.-C. Lee, J. Song. SymBa: symmetric backpropagation-free contrastive learning with forward-forward algorithm for
optimizing convergence. 2023, https://arxiv.org/abs/2303.08418.

    G = mean (or sum) of h_j^2                                    goodness of a layer's activities
    L = mean log(1 + exp(-alpha (G+ - G-)))                       at every layer but the classifier
    image with label z = image + pattern_z                        intrinsic class pattern, fixed and random
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from localize.heads.branch import Branch
from localize.heads.goodness import goodness_branch, require_normalised
from localize.heads.streams import neutral_output, pattern_streams, pixel_streams, with_streams
from localize.ir import LabelKind, Plan, Segment, Segments
from localize.methods.base import CLASS_IDS, LayerByLayer, isolated, needs_two, option


@dataclass(frozen=True)
class SymBa(LayerByLayer):
    """Local losses on the difference of the goodness of positive and negative images."""

    name: ClassVar[str] = "symba"
    reference: ClassVar[str] = (
        "H.-C. Lee, J. Song. SymBa: symmetric backpropagation-free contrastive learning with forward-forward algorithm "
        "for optimizing convergence. 2023. arXiv 2303.08418."
    )
    labels: ClassVar[tuple[LabelKind, ...]] = CLASS_IDS
    deviations: ClassVar[tuple[str, ...]] = (
        "The goodness is the mean of squares unless goodness=sum, so that alpha does not depend on the width of the "
        "layer.",
        "The pattern of a class is drawn from a normal distribution and added to the image. How the paper draws it was "
        "not verified. The preprint of CFL (2023) describes it as a separate channel of the image; the parameter "
        "counts that Choi et al. (2024) print for it leave no room for a wider input.",
        "A wrong label is drawn uniformly, again in every step.",
        "The last segment is trained by the cross-entropy on images without a pattern, so that the model's own forward "
        "is a classifier. These images run through every layer and enter the statistics of BatchNorms.",
        "The model's own normalisation removes the length of activities between layers. A BatchNorm scales all images "
        "alike and a shortcut goes around it: then the goodness of one layer is partly handed on to the next "
        "(plan.json says for every segment what is kept; length=removed refuses it).",
        "A segment of several weighted layers is trained by backpropagation inside.",
    )

    alpha: float = option(4.0, "scale of the difference of goodness", low=1e-6)
    goodness: str = option("mean", "squares of activities are averaged, or summed", choices=("mean", "sum"))
    label: str = option(
        "pattern",
        "how a label is shown: by its class's pattern, or in the first pixels as in the forward-forward algorithm",
        choices=("pattern", "pixels"),
    )
    strength: float = option(
        1.0, "standard deviation of the patterns, in units of the images as they are passed", low=0
    )
    length: str = option(
        "any",
        "what every segment between the first and the last has to have: any normalisation, or one that removes the "
        "length of each image's activities on every path",
        choices=("any", "removed"),
    )

    def plan(self, segments: Segments) -> Plan:
        """Train every segment but the last by the gap of its goodness, and the last on neutral images.

        Raises:
            MethodError: there is no cut, a segment has no normalisation, or labels do not fit into the images.
        """
        needs_two(self, segments)
        require_normalised(self.name, segments, strictly=self.length == "removed")
        streams = (
            pixel_streams(segments) if self.label == "pixels" else pattern_streams(segments, strength=self.strength)
        )
        plan = isolated(
            self, segments, lambda segment: [self._branch(segment, segments)], output=neutral_output(segments)
        )
        return with_streams(plan, streams)

    def _branch(self, segment: Segment, segments: Segments) -> Branch:
        return goodness_branch(
            segment,
            segments.trunk,
            form=self.goodness,
            loss="localize.losses.goodness_gap",
            options=(("alpha", float(self.alpha)),),
        )
