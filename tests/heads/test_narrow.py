"""Heads of limited width: what they are made of, that they say so, and what they leave of the paper's heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import localize
from localize import build
from localize.estimate import memory
from localize.heads.narrow import SIDE, Narrowed
from localize.ir import Features
from localize.recipes import Recipe
from tests.nets import ALL

X, Y = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 5
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("auglocal", {"d": 3, "tail": "isolated"}),
    ("auglocal", {"construction": "conv3x3"}),
    ("dgl", {}),
    ("predsim", {}),
    ("infopro", {"loss": "softmax"}),
    ("mlaan", {"window": 2, "base": "dgl", "lam": "none"}),
    ("mlaan", {"window": 2, "base": "infopro", "lam": "none"}),
]
WIDTH = 3


def made(net: str, method: str, **options: Any) -> localize.LocalModel:
    torch.manual_seed(0)
    return localize.transform(ALL[net]().train(), method, example_input=X, **options).train()


@pytest.mark.parametrize(
    ("shape", "width", "leaves"),
    [
        ((64, 56, 56), 16, (16, 14, 14)),
        ((16, 56, 20), 16, (16, 14, 14)),
        ((64, 7, 9), 16, (16, 7, 9)),
        ((8, 14, 3), 16, (8, 14, 3)),
    ],
)
def test_an_entry_pools_and_projects_only_what_is_too_large(shape: Any, width: int, leaves: Any) -> None:
    entry = Narrowed([Features("map", shape, 1)], width)

    assert entry.leaves.shape == entry(torch.rand(2, *shape)).shape[1:] == leaves
    assert any(isinstance(part, nn.Conv2d) for part in entry) == (shape[0] > width)
    assert any(isinstance(part, nn.AdaptiveAvgPool2d) for part in entry) == (max(shape[1:]) > SIDE)


def test_tokens_and_vectors_are_read_as_maps() -> None:
    tokens = Narrowed([Features("tokens", (65, 12), 2, prefix=1, grid=(8, 8))], 5)
    vector = Narrowed([Features("flat", (12,), 1)], 5)

    assert tokens(torch.rand(2, 65, 12)).shape == (2, *tokens.leaves.shape) == (2, 5, 8, 8)
    assert vector(torch.rand(2, 12)).shape == (2, 5, 1, 1)


NARROWED = [
    *(("ResNet", *one) for one in METHODS),
    *(("ViT", *one) for one in METHODS if one[0] != "mlaan" and "construction" not in one[1]),
]


@pytest.mark.parametrize(("net", "method", "options"), NARROWED)
def test_no_convolution_of_a_head_is_wider_and_the_plan_says_so(net: str, method: str, options: dict[str, Any]) -> None:
    local = made(net, method, head_width=WIDTH, **options)

    heads = [block for block in local.plan.blocks if block.name.startswith(("head", "cascade", "similarity"))]
    convolutions = [
        part
        for block in heads
        if not block.name.endswith("decoder")
        for part in local.heads[block.name].modules()
        if isinstance(part, nn.Conv2d)
    ]
    assert convolutions
    assert max(conv.out_channels for conv in convolutions) <= WIDTH
    assert len([line for line in local.plan.deviations if f"head_width={WIDTH}" in line]) == 1
    assert f"head_width={WIDTH}" in local.source


@pytest.mark.parametrize(("net", "method", "options"), [("ResNet", *METHODS[0]), ("ViT", *METHODS[4])])
def test_a_step_with_narrow_heads_is_audited_clean(net: str, method: str, options: dict[str, Any]) -> None:
    localize.audit(made(net, method, head_width=WIDTH, **options), (X, Y)).raise_if_failed()


def test_the_heads_of_the_paper_say_nothing_of_it() -> None:
    assert not any("head_width" in line for line in made("ResNet", "dgl").plan.deviations)


def test_re_created_layers_shrink_in_proportion() -> None:
    recipe = Recipe("auglocal", model="tv/resnet50", num_classes=10, input_shape=(3, 64, 64), options={"d": 3})
    wide, narrow = (
        build.build(Recipe(**{**vars(recipe), "options": {"d": 3, "head_width": width}}), data=False)
        for width in (0, 64)
    )

    assert sum(p.numel() for p in wide.heads.parameters()) > 60_000_000
    assert sum(p.numel() for p in narrow.heads.parameters()) < 2_500_000
    (block,) = [part for name, part in narrow.heads.head_0.named_modules() if name == "1.1"]
    widths = [part.out_channels for part in block.modules() if isinstance(part, nn.Conv2d)]
    assert widths == [16, 16, 64, 64]  # a bottleneck of 2048 channels is 512, 512, 2048, and projects its shortcut


@pytest.mark.zoo
@pytest.mark.zoo
@pytest.mark.parametrize(("model", "batch"), [("tv/mobilenet_v2", 32), ("timm/convnext_atto", 32)])
def test_a_step_with_narrow_heads_needs_less_than_backprop(model: str, batch: int) -> None:
    peaks = [
        memory.predict(build.build(Recipe(method, model=model, options=options), data=False), batch).peak
        for method, options in (("backprop", {}), ("auglocal", {"head_width": 64}), ("auglocal", {}))
    ]

    assert peaks[1] < 0.7 * peaks[0]
    assert peaks[1] < peaks[2]
