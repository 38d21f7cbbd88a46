"""Inputs of the forward-forward methods: every image with its own label, with a wrong label, and with none.

Sources: G. Hinton, "The forward-forward algorithm: some preliminary investigations", 2022, sec. 3.3 (labels in the
first pixels); H.-C. Lee, J. Song, "SymBa: symmetric backpropagation-free contrastive learning with forward-forward
algorithm for optimizing convergence", arXiv 2303.08418, 2023 (intrinsic class pattern).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localize.errors import MethodError
from localize.heads import blocks
from localize.ir import Block, Input, LocalLoss, Plan, Route, Segments, Term

STREAMS = Input("streams", streams=3)
"""Positive, negative and neutral images, concatenated along the batch."""
NEUTRAL = 2
"""Number of the stream with the unchanged images."""


class Streams(nn.Module):
    """Three batches of equal size: positive, negative, neutral. A derived class defines how an image shows a label.

    Positive images show their own label. Negative images show one of the other labels, drawn uniformly in every step.
    Neutral images are unchanged.

    Args:
        classes: Z, at least 2.

    Shape:
        images (N, ...) and class ids (N,); returns (3N, ...).
    """

    reads_of_labels = "which class an image shows, and draws another"

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        shift = torch.randint(1, self.classes, labels.shape, device=labels.device)
        wrong = (labels + shift) % self.classes
        return torch.cat([self.overlay(images, labels), self.overlay(images, wrong), images])

    def overlay(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the images (N, ...) with these labels (N,) shown."""
        raise NotImplementedError


class PixelStreams(Streams):
    """The label is written into the first Z pixels of the image, in the order of rows, in every channel.

    Pixel z gets the brightest value of the image if z is the label, and its darkest value otherwise. For images in
    [0, 1] that use the whole range these are Hinton's 1 and 0.

    Args:
        classes: Z, at least 2.
        scaled: divide every image that shows a label by the root mean square of its values, unless it is black.

    Shape:
        images (N, C, H, W) or (N, F), and class ids (N,); returns (3N, C, H, W) or (3N, F).
    """

    def __init__(self, classes: int, *, scaled: bool = False) -> None:
        super().__init__(classes)
        self.scaled = scaled

    def overlay(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the images (N, C, H, W) or (N, F) with these labels (N,) shown."""
        pixels = images.flatten(2) if images.dim() > 2 else images.unsqueeze(1)
        low, high = pixels.amin((1, 2), keepdim=True), pixels.amax((1, 2), keepdim=True)
        marks = F.one_hot(labels, self.classes).to(images.dtype).unsqueeze(1)
        written = (low + (high - low) * marks).expand(-1, pixels.shape[1], -1)
        shown = torch.cat([written, pixels[:, :, self.classes :]], 2)
        if self.scaled:
            wide = shown.to(torch.promote_types(shown.dtype, torch.float32))  # squares of halves would overflow
            shown = (wide / wide.square().mean((1, 2), keepdim=True).sqrt().clamp(min=1e-8)).to(shown.dtype)
        return shown.view_as(images)

    def extra_repr(self) -> str:
        """Show where the label is."""
        return f"label in the first {self.classes} pixels{', root mean square 1' if self.scaled else ''}"


class PatternStreams(Streams):
    """A fixed random pattern of the label's class, as large as the image, is added to the image.

    Args:
        classes: Z, at least 2.
        input_shape: shape of one image.
        strength: standard deviation of the patterns, which are drawn from a normal distribution.

    Shape:
        images (N, ...) and class ids (N,); returns (3N, ...).
    """

    def __init__(self, classes: int, input_shape: tuple[int, ...], *, strength: float) -> None:
        super().__init__(classes)
        self.strength = strength
        self.patterns = nn.Parameter(torch.empty(classes, *input_shape), requires_grad=False)

    def reset_parameters(self) -> None:
        """Draw new patterns."""
        nn.init.normal_(self.patterns, std=self.strength)

    def overlay(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the images (N, ...) with these labels (N,) shown."""
        return images + self.patterns[labels]

    def extra_repr(self) -> str:
        """Show how strong the patterns are."""
        return f"patterns {tuple(self.patterns.shape)}, strength={self.strength:g}"


def pixel_streams(segments: Segments, *, scaled: bool = False) -> Block:
    """Return the input block that writes labels into pixels, and with ``scaled`` scales such images.

    Raises:
        MethodError: there is only one class, or there are fewer pixels than classes.
    """
    trunk = segments.trunk
    _needs_two_classes(segments)
    shape = trunk.input_shape
    pixels = math.prod(shape[1:]) if len(shape) > 1 else shape[0]
    if pixels < trunk.num_classes:
        raise MethodError(
            f"{trunk.name} has {trunk.num_classes} classes, but its images have only {pixels} pixels.",
            facts="the label is written into the first pixels, one for each class.",
            help="use larger images",
        )
    facts = {"label": f"in the first {trunk.num_classes} pixels"}
    return _block(PixelStreams(trunk.num_classes, scaled=scaled), facts | ({"root_mean_square": "1"} if scaled else {}))


def pattern_streams(segments: Segments, *, strength: float) -> Block:
    """Return the input block that adds the pattern of a class.

    Raises:
        MethodError: there is only one class.
    """
    trunk = segments.trunk
    _needs_two_classes(segments)
    module = PatternStreams(trunk.num_classes, trunk.input_shape, strength=strength)
    return _block(module.to("meta"), {"label": "as a fixed random pattern, added"})


def _block(module: nn.Module, facts: dict[str, str]) -> Block:
    return blocks.of_module(STREAMS.block, module, role="shared", facts=facts)


def _needs_two_classes(segments: Segments) -> None:
    if segments.trunk.num_classes < 2:
        raise MethodError(
            f"{segments.trunk.name} has only one class: no label is wrong.", help="use a model of several classes"
        )


def neutral_output(segments: Segments) -> LocalLoss:
    """Return the cross-entropy on the model's own output for the neutral images; it trains the last segment only.

    This is the softmax layer that Hinton trains on the hidden activities of a neutral image (2022, sec. 3.3).
    """
    last = len(segments) - 1
    term = Term(blocks.CROSS_ENTROPY, stream=NEUTRAL)
    return LocalLoss(f"loss_{last}", Route(last, last), (term,), (segments.segments[last].name,))


def with_streams(plan: Plan, streams: Block) -> Plan:
    """Return the plan with a block that makes three streams from the images as the input of its first segment."""
    return replace(plan, blocks=(*plan.blocks, streams), input=STREAMS)
