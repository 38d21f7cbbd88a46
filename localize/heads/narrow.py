"""Heads that do not outgrow the net: a narrow entry in front of what the paper puts behind a segment.

Heads of the papers are as wide as the features, and work at their resolution; they were made for nets of 16 to 64
channels on images of 32x32. On a net for ImageNet they hold more parameters than it, and need more memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn

from localize.heads import blocks
from localize.heads.branch import Branch
from localize.heads.maps import Chain, FeatureMap
from localize.ir import Features, Segment

MEANING = "most channels that a head reads and has, on a map pooled to at most 14x14; 0: as wide as the features"
"""What the option of methods says."""
SIDE = 14
"""Most rows and columns of the map that a narrowed head reads: those of an image of 224x224, in sixteenths."""


class Narrowed(Chain):
    """Features as a map of few channels: average pooling, a 1x1 convolution without bias, BatchNorm and ReLU.

    What is small enough stays as it is: maps of at most ``side`` rows and columns are not pooled, features of at most
    ``width`` channels are not projected.

    Args:
        features: layout of every tensor that crosses the cut.
        width: most channels, W.
        side: most rows and columns; 0 pools nothing.

    Shape:
        one tensor for every entry of ``features``; returns (N, min(C, W), h, w).
    """

    def __init__(self, features: Sequence[Features], width: int, *, side: int = SIDE) -> None:
        maps = FeatureMap(features)
        channels, *size = maps.shape
        pooled = tuple(min(one, side or one) for one in size)
        layers: list[nn.Module] = [maps]
        if pooled != tuple(size):
            layers.append(nn.AdaptiveAvgPool2d(pooled))
        if channels > width:
            layers += [nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        super().__init__(*layers)
        self.leaves = Features("map", (min(channels, width), *pooled), 1)
        """Layout of what it returns."""


def narrowed(segment: Segment, width: int, build: Callable[[Segment], Branch], *, side: int = SIDE) -> Branch:
    """Return the branch that ``build`` makes behind a segment, or behind a :class:`Narrowed` entry of ``width``.

    Args:
        segment: what is trained.
        width: most channels of what the head reads; 0 is the features as they are.
        build: makes a branch for a segment; its own block is the first.
        side: most rows and columns; 0 pools nothing.
    """
    if not width:
        return build(segment)
    entry = Narrowed(segment.features, width, side=side)
    branch = build(replace(segment, features=(entry.leaves,)))
    head, *others = branch.blocks
    assert head.module is not None, "a head is a module"
    chain = Chain(entry.to("meta"), head.module)
    shapes = [features.shape for features in segment.features]
    return replace(branch, blocks=(blocks.of_module(head.name, chain, *shapes, facts=head.facts), *others))


def told(width: int, *, decodes: bool = False, copies: bool = False) -> tuple[str, ...]:
    """Say how heads differ from those of the paper where their width is limited.

    Args:
        width: most channels; 0 is no limit, and no difference.
        decodes: there are decoders of images, which read maps that are not pooled.
        copies: there are copies of layers of the trunk, which keep their widths.
    """
    if not width:
        return ()
    besides = "; decoders read maps that are not pooled" if decodes else ""
    besides += "; copies of later blocks stay as wide as these" if copies else ""
    return (
        f"Heads read at most {width} channels of a map that is pooled to at most {SIDE}x{SIDE} (head_width={width})"
        f"{besides}. The paper's are as wide as the features, and read them at their resolution (head_width=0).",
    )
