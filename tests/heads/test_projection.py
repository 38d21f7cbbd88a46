"""Projections read features of every layout, and come out at length 1 where they are contrasted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localize.errors import OptionError
from localize.heads import branches
from localize.heads.projection import (
    CONFIGURATIONS,
    ConvolutionalProjection,
    LinearProjection,
    MeanVector,
    PooledProjection,
    counted,
    widest_map,
)
from localize.ir import Features
from tests.plans import plan, trunk

NCHW, NHWC = Features("map", (4, 6, 5), 1), Features("map", (6, 5, 4), 3)
TOKENS, CLASS = Features("tokens", (10, 4), 2, "mean", 1, (3, 3)), Features("tokens", (10, 4), 2, "class", 1)
FLAT = Features("flat", (12,), 1)


def values(*features: Features) -> list[Tensor]:
    return [torch.randn(3, *f.shape) for f in features]


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        (NCHW, lambda x: x.mean((2, 3))),
        (NHWC, lambda x: x.mean((1, 2))),
        (TOKENS, lambda x: x[:, 1:].mean(1)),
        (CLASS, lambda x: x[:, 0]),
        (FLAT, lambda x: x),
    ],
    ids=["map", "nhwc", "tokens", "class", "flat"],
)
def test_the_mean_vector_is_what_the_model_itself_would_read(features: Features, expected: object) -> None:
    (x,) = values(features)

    torch.testing.assert_close(MeanVector([features], unit=False)(x), expected(x))
    torch.testing.assert_close(MeanVector([features])(x), F.normalize(expected(x), dim=1))


def test_a_flat_vector_can_be_cut_into_segments_first() -> None:
    (x,) = values(FLAT)

    vector = MeanVector([FLAT], k=3, unit=False)

    torch.testing.assert_close(vector(x), (x[:, :4] + x[:, 4:8] + x[:, 8:]) / 3)
    assert vector.width == 4


def test_vectors_of_several_values_are_put_behind_each_other() -> None:
    x, y = values(NCHW, FLAT)

    torch.testing.assert_close(MeanVector([NCHW, FLAT], unit=False)(x, y), torch.cat([x.mean((2, 3)), y], 1))


PROJECTIONS = {
    "linear": lambda features, unit: LinearProjection(features, 7, unit=unit),
    "pooled": lambda features, unit: PooledProjection(features, 7, limit=16, unit=unit),
    "1c2f": lambda features, unit: ConvolutionalProjection(features, 7, widest=8, unit=unit),
}


@pytest.mark.parametrize("features", [[NCHW], [NHWC], [TOKENS], [CLASS], [FLAT], [NCHW, NHWC]], ids=str)
@pytest.mark.parametrize("kind", PROJECTIONS)
def test_projections_take_every_layout(kind: str, features: list[Features]) -> None:
    unit, plain = (PROJECTIONS[kind](features, unit)(*values(*features)) for unit in (True, False))

    assert unit.shape == plain.shape == (3, 7)
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(3))
    assert not torch.allclose(plain.norm(dim=1), torch.ones(3))


def test_pooling_leaves_no_more_values_than_asked_for() -> None:
    linear = next(m for m in PooledProjection([NCHW], 7, limit=16, unit=True).modules() if isinstance(m, nn.Linear))

    assert linear.in_features <= 16


def test_a_head_keeps_its_width_behind_the_widest_map() -> None:
    def first(widest: int) -> nn.Conv2d:
        head = ConvolutionalProjection([NCHW], 7, widest=widest, unit=False)
        return next(m for m in head.modules() if isinstance(m, nn.Conv2d))

    assert (first(8).out_channels, first(8).stride) == (8, (2, 2))
    assert (first(4).out_channels, first(4).stride) == (4, (1, 1))


@pytest.mark.parametrize(("net", "width"), [("cifar/resnet20", 64), ("cifar/vit", 512), ("cifar/vgg19", 512)])
def test_the_widest_map_of_a_trunk(net: str, width: int) -> None:
    assert widest_map(trunk(net)) == width


def test_names_of_heads_are_numbers_of_layers() -> None:
    assert [counted(name) for name in CONFIGURATIONS] == [(0, 1), (0, 2), (1, 1), (1, 2), (1, 3), (2, 2)]
    with pytest.raises(OptionError, match="'1c0f' is not a head"):
        counted("1c0f")


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("contrast", {"head": "3c"}, "'head' of branch 'contrast' cannot be '3c'"),
        ("contrast", {"form": "supkon"}, "'form' of branch 'contrast' cannot be 'supkon'.*\n.*\n.*mean 'supcon'"),
        ("reconstruction", {"decoder": "deeper"}, "'decoder' .* cannot be 'deeper'.*\n.*\n.*did you mean 'deep'"),
        ("contrast", {"tau": 0.0}, "'tau' of branch 'contrast' cannot be 0.0.*\n.*the lowest value is 1e-06"),
        ("feature", {"tau": float("nan")}, "'tau' of branch 'feature' cannot be nan.*\n.*has to be finite"),
        ("contrast", {"size": 0}, "'size' of branch 'contrast' cannot be 0.*\n.*the lowest value is 1"),
    ],
)
def test_a_branch_cannot_have_such_an_option(kind: str, options: dict, message: str) -> None:
    segment = plan("cifar/resnet20", "feat").segments.segments[0]

    with pytest.raises(OptionError, match=message):
        branches.build(kind, segment, trunk("cifar/resnet20"), "head", options)


def test_a_flat_vector_is_cut_into_equal_segments_only() -> None:
    made = plan("cifar/fc_mnist", "feat", (1, 28, 28))

    with pytest.raises(OptionError, match="1024 features of .* cannot be cut into k=3 equal parts"):
        branches.feature(made.segments.segments[0], made.segments.trunk, "mean", k=3)
