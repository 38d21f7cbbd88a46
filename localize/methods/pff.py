"""Predictive forward-forward: every layer is trained by its goodness, and learns to predict the activity below it.

A. Ororbia, A. Mali. The predictive forward-forward algorithm. 2023, https://arxiv.org/abs/2301.01452.

    L_r = mean of softplus(theta - G+) and softplus(G- - theta)   representation circuit: trains the layer (eq. 3)
    p   = g(normalise(relu(h_l + noise)) G_l)                     generative circuit: predicts h_{l-1}, h_0 the image
    L_g = mean |p - h_{l-1}|^2                                    trains G_l, and nothing else
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from localize.errors import MethodError
from localize.heads import blocks
from localize.heads.branch import Branch
from localize.heads.generative import Generative
from localize.heads.goodness import goodness_branch, require_normalised
from localize.heads.streams import neutral_output, pixel_streams, with_streams
from localize.ir import LabelKind, Plan, Segment, Segments, Target, Term
from localize.methods.base import CLASS_IDS, LayerByLayer, isolated, needs_two, option


@dataclass(frozen=True)
class PredictiveForwardForward(LayerByLayer):
    """Local losses on goodness, and a generative circuit beside the network."""

    name: ClassVar[str] = "pff"
    reference: ClassVar[str] = (
        "A. Ororbia, A. Mali. The predictive forward-forward algorithm. 2023. arXiv 2301.01452. "
        "Code: ago109/predictive-forward-forward."
    )
    labels: ClassVar[tuple[LabelKind, ...]] = CLASS_IDS
    deviations: ClassVar[tuple[str, ...]] = (
        "The network is run once, without settling: no recurrent feedback from the layer above and from the label, no "
        "lateral competition, no noise in the representation circuit. The model's forward is its own.",
        "The label is written into the image as in the forward-forward algorithm; the paper feeds it in at the top.",
        "The generative circuit has no latent variables above the last hidden layer: it reconstructs, and does not "
        "sample.",
        "The goodness is the mean of squares unless goodness=sum, and is raised for positive images as the paper's "
        "eq. 3 says; its code sums with theta = 3 and lowers the goodness of positive images.",
        "The image is predicted without the paper's clipping to [0, 1]: images may be normalised. Activities are "
        "predicted by a ReLU, also where those below can be negative.",
        "The generative circuit learns on neutral images as well as on positive and negative ones.",
        "Weights are drawn as torch draws them (orthogonal, and uniform in [0, 0.05] for the generative circuit, in "
        "the code), and updates are not clipped.",
        "A wrong label is drawn uniformly. The neutral image is the image as it is. The classifier reads the last "
        "layer.",
        "A segment of several weighted layers is trained by backpropagation inside.",
    )

    goodness: str = option("mean", "squares of activities are averaged, or summed", choices=("mean", "sum"))
    threshold: float = option(2.0, "theta, which positive goodness has to exceed and negative goodness to stay below")
    noise: float = option(
        0.025, "standard deviation of the noise on activities that the generative circuit reads in training", low=0
    )
    length: str = option(
        "any",
        "what every segment between the first and the last has to have: any normalisation, or one that removes the "
        "length of each image's activities on every path",
        choices=("any", "removed"),
    )

    def plan(self, segments: Segments) -> Plan:
        """Give every segment but the last its goodness and a prediction of what entered it.

        Raises:
            MethodError: there is no cut, features are no flat vectors, a segment has no normalisation, or labels do not
                fit into the images.
        """
        needs_two(self, segments)
        self._require_flat(segments)
        require_normalised(self.name, segments, strictly=self.length == "removed")
        plan = isolated(
            self, segments, lambda segment: self._branches(segment, segments), output=neutral_output(segments)
        )
        return with_streams(plan, pixel_streams(segments))

    def _require_flat(self, segments: Segments) -> None:
        for segment in segments.segments[:-1]:
            if len(segment.features) > 1 or segment.features[0].kind != "flat":
                raise MethodError(
                    f"{self.name} is defined for fully connected layers, and {segment.name} of {segments.trunk.name} "
                    f"(up to {segment.ends_at}) has features of shape "
                    f"{', '.join('x'.join(map(str, f.shape)) for f in segment.features)}.",
                    facts="its generative circuit maps one vector of activities to the one below.",
                    help="a fully connected model such as cifar/fc_mnist, or method ff",
                )

    def _branches(self, segment: Segment, segments: Segments) -> list[Branch]:
        goodness = goodness_branch(
            segment,
            segments.trunk,
            form=self.goodness,
            loss="localize.losses.forward_forward_mean",
            options=(("threshold", float(self.threshold)),),
        )
        return [goodness, self._generative(segment, segments)]

    def _generative(self, segment: Segment, segments: Segments) -> Branch:
        k, image = segment.index, segment.index == 0
        (width,) = segment.features[0].shape
        entering = segments.trunk.input_shape if image else segments.segments[k - 1].features[0].shape
        with torch.device("meta"):
            module = Generative(width, math.prod(entering), image=image, noise=float(self.noise))
        head = blocks.of_module(
            f"generative_{k}",
            module,
            (width,),
            facts={"predicts": "the image" if image else segments.segments[k - 1].name},
        )
        loss = "localize.losses.squared_prediction_error"
        return Branch(Term(loss, head.name, target=Target("input"), detached=True, scores=False), (head,))
