"""Forward-forward: every layer tells images with their own label from images with a wrong one, by its goodness.

G. Hinton. The forward-forward algorithm: some preliminary investigations. 2022, https://arxiv.org/abs/2212.13345.

    G = mean (or sum) of h_j^2                                    goodness of a layer's activities (sec. 2)
    p(positive) = sigmoid(G - theta)                              (eq. 1)
    L = mean of softplus(theta - G+) and softplus(G- - theta)     at every layer but the classifier, one mean over 2N
    argmax_z sum over layers but the first of G(image with z)     prediction by goodness (sec. 3.3)

The last segment is the softmax layer that Hinton trains on hidden activities of a neutral image (sec. 3.3): the model's
own forward then is a classifier.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from localize.heads.branch import Branch
from localize.heads.goodness import goodness_branch, require_normalised
from localize.heads.streams import neutral_output, pixel_streams, with_streams
from localize.ir import LabelKind, Plan, Segment, Segments
from localize.methods.base import CLASS_IDS, LayerByLayer, isolated, needs_two, option


@dataclass(frozen=True)
class ForwardForward(LayerByLayer):
    """Local losses on the goodness of positive and negative images."""

    name: ClassVar[str] = "ff"
    reference: ClassVar[str] = (
        "G. Hinton. The forward-forward algorithm: some preliminary investigations. 2022. arXiv 2212.13345."
    )
    labels: ClassVar[tuple[LabelKind, ...]] = CLASS_IDS
    deviations: ClassVar[tuple[str, ...]] = (
        "The goodness is the mean of squares unless goodness=sum: the paper's sum needs a threshold that grows with "
        "the width of the layer, and the paper gives none.",
        "A wrong label is drawn uniformly; the paper prefers labels that the network itself takes for likely.",
        "The neutral image is the image as it is, so that the model's own forward is a classifier; the paper writes "
        "0.1 into all label pixels. Neutral images run through every layer and enter the statistics of BatchNorms.",
        "The classifier reads the last layer; the paper's softmax reads all hidden layers but the first.",
        "The label is as bright as the brightest value of the image on its darkest, in every channel; the paper writes "
        "1 and 0 into MNIST.",
        "Images with a label enter the first layer with a root mean square of 1, as the paper's layers normalise all "
        "that enters them (images=raw leaves them as they are). The neutral ones enter as they are.",
        "The model's own normalisation takes the place of the paper's, which divides by the length and subtracts no "
        "mean: a net that computes x / (x.norm(2, 1, keepdim=True) + 1e-4) before each layer has the paper's. A "
        "BatchNorm scales all images alike and a shortcut goes around it: then the goodness of one layer is partly "
        "handed on to the next (plan.json says for every segment what is kept; length=removed refuses it).",
        "A segment of several weighted layers is trained by backpropagation inside; in the paper each is alone.",
        "The paper has no convolutional net with shared weights: there, labels in a few pixels reach only part of the "
        "map.",
    )

    goodness: str = option("mean", "squares of activities are averaged, or summed", choices=("mean", "sum"))
    threshold: float = option(2.0, "theta, which positive goodness has to exceed and negative goodness to stay below")
    images: str = option(
        "scaled",
        "how images with a label enter the first layer: scaled to a root mean square of 1, or as they are (raw)",
        choices=("scaled", "raw"),
    )
    length: str = option(
        "any",
        "what every segment between the first and the last has to have: any normalisation, or one that removes the "
        "length of each image's activities on every path",
        choices=("any", "removed"),
    )

    def plan(self, segments: Segments) -> Plan:
        """Train every segment but the last by its goodness, and the last on neutral images.

        Raises:
            MethodError: there is no cut, a segment has no normalisation, or labels do not fit into the images.
        """
        needs_two(self, segments)
        require_normalised(self.name, segments, strictly=self.length == "removed")
        plan = isolated(
            self, segments, lambda segment: [self._branch(segment, segments)], output=neutral_output(segments)
        )
        return with_streams(plan, pixel_streams(segments, scaled=self.images == "scaled"))

    def _branch(self, segment: Segment, segments: Segments) -> Branch:
        return goodness_branch(
            segment,
            segments.trunk,
            form=self.goodness,
            loss="localize.losses.forward_forward_mean",
            options=(("threshold", float(self.threshold)),),
        )
