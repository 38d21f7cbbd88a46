"""Heads that do not outgrow the net: a narrow entry before the head of the paper.

Heads of the papers are as wide as the features, and work at their resolution. They were designed for nets of 16 to 64
channels on images of 32x32. On a net for ImageNet they have more parameters than the net, and need more memory.
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
"""Help of the methods' option."""
SIDE = 14
"""Largest height and width of the map that a narrowed head reads: 1/16 of an image of 224x224."""


class Narrowed(Chain):
    """Features as a map with few channels: average pooling, a 1x1 convolution without bias, BatchNorm and ReLU.

    Maps of at most ``side`` rows and columns are not pooled, and features of at most ``width`` channels are not
    projected.

    Args:
        features: layout of every tensor that crosses the cut.
        width: largest number of channels, W.
        side: largest number of rows and columns; 0: no pooling.

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
        """Layout of its output."""


def narrowed(segment: Segment, width: int, build: Callable[[Segment], Branch], *, side: int = SIDE) -> Branch:
    """Return the branch that ``build`` makes for a segment, with a :class:`Narrowed` entry of ``width`` before it.

    Args:
        segment: the segment to train.
        width: largest number of channels that the head reads; 0: no entry.
        build: makes a branch for a segment; its first block is its own.
        side: largest number of rows and columns; 0: no pooling.
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
    """Return how heads of limited width differ from those of the paper.

    Args:
        width: largest number of channels; 0: no limit, and no difference.
        decodes: whether there are decoders of images, which read maps that are not pooled.
        copies: whether there are copies of layers of the trunk, which keep their widths.
    """
    if not width:
        return ()
    besides = "; decoders read maps that are not pooled" if decodes else ""
    besides += "; copies of later blocks stay as wide as these" if copies else ""
    return (
        f"Heads read at most {width} channels of a map that is pooled to at most {SIDE}x{SIDE} (head_width={width})"
        f"{besides}. The paper's are as wide as the features, and read them at their resolution (head_width=0).",
    )
