"""Features of every layout are read as one map."""

from __future__ import annotations

import pytest
import torch

from localize.heads.maps import FeatureMap, is_flat
from localize.ir import Features

NCHW, NHWC = Features("map", (3, 4, 5), 1), Features("map", (4, 5, 3), 3)
FLAT = Features("flat", (6,), 1)


@pytest.mark.parametrize(
    ("features", "shape"),
    [
        (NCHW, (3, 4, 5)),
        (NHWC, (3, 4, 5)),
        (FLAT, (6, 1, 1)),
        (Features("map", (3, 2, 4, 5), 1), (3, 8, 5)),
        (Features("map", (2, 4, 5, 3), 4), (3, 8, 5)),
        (Features("tokens", (9, 7), 2, grid=(3, 3)), (7, 3, 3)),
        (Features("tokens", (7, 9), 1, grid=(3, 3)), (7, 3, 3)),
        (Features("tokens", (8, 7), 2, grid=(2, 4)), (7, 2, 4)),
        (Features("tokens", (24, 7), 2, grid=(3, 2, 4)), (7, 6, 4)),
        (Features("tokens", (10, 7), 2, "class", 1, (3, 3)), (7, 3, 3)),
        (Features("tokens", (1, 7), 2, "class"), (7, 1, 1)),
        (Features("tokens", (11, 7), 2, "mean", 2, (3, 3)), (7, 3, 3)),
        (Features("tokens", (9, 7), 2), (7, 9, 1)),
        (Features("tokens", (12, 7), 2, "class", 1), (7, 11, 1)),
    ],
    ids=str,
)
def test_every_layout_makes_a_map_of_the_shape_it_says(features: Features, shape: tuple[int, ...]) -> None:
    maps = FeatureMap([features])

    assert maps.shape == shape
    assert maps(torch.randn(2, *features.shape)).shape == (2, *shape)
    assert not list(maps.parameters())


def test_values_keep_their_place() -> None:
    x = torch.randn(2, 3, 4, 5)
    tokens = torch.randn(2, 10, 7)

    assert torch.equal(FeatureMap([NCHW])(x), x)
    assert torch.equal(FeatureMap([NHWC])(x.movedim(1, 3)), x)
    grid = FeatureMap([Features("tokens", (10, 7), 2, "class", 1, (3, 3))])(tokens)
    assert torch.equal(grid[1, :, 2, 1], tokens[1, 1 + 3 * 2 + 1])
    first = FeatureMap([Features("tokens", (7, 10), 1, "class", 1, (3, 3))])(tokens.transpose(1, 2))
    assert torch.equal(first, grid)
    volume = torch.randn(2, 3, 2, 4, 5)
    merged = FeatureMap([Features("map", (3, 2, 4, 5), 1)])(volume)
    assert torch.equal(merged[1, :, 4 + 3, 2], volume[1, :, 1, 3, 2])
    last = FeatureMap([Features("map", (2, 4, 5, 3), 4)])(volume.movedim(1, 4))
    assert torch.equal(last, merged)


def test_several_values_are_pooled_to_the_smallest_and_concatenated() -> None:
    fine, coarse = torch.randn(2, 4, 6, 6), torch.randn(2, 2, 3, 2)
    maps = FeatureMap([Features("map", (4, 6, 6), 1), Features("map", (2, 3, 2), 1)])

    found = maps(fine, coarse)

    assert maps.shape == (6, 3, 2)
    assert torch.allclose(found[:, :4], fine.unflatten(2, (3, 2)).unflatten(4, (2, 3)).mean((3, 5)))
    assert torch.equal(found[:, 4:], coarse)


def test_only_flat_vectors_are_flat() -> None:
    assert is_flat([FLAT, FLAT])
    assert not is_flat([FLAT, NCHW])
    assert not is_flat([Features("tokens", (9, 7), 2)])
