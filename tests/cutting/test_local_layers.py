"""Local layers are counted by one rule, however a net is written."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import localize
from localize.errors import MethodError
from tests.corpus.cifar import BasicBlock, Opened, ResNet, Tutorial
from tests.corpus.torchs_own import AutocastBlock, Blocks, EncoderViT


def ends(model: nn.Module, method: str = "dcl", **options: object) -> list[str]:
    """Return the names of the ends of a net's local layers."""
    local = localize.transform(model.train(), method, example_input=torch.randn(2, 3, 16, 16), **options)
    return [layer.name for layer in local.plan.segments.layout.layers]


@pytest.mark.parametrize("held", ["sequential", "list", "encoder"])
@pytest.mark.parametrize("method", ["auglocal", "dcl", "dgl", "predsim", "infopro"])
def test_five_encoder_layers_of_torch_are_local_layers(held: str, method: str) -> None:
    assert len(ends(EncoderViT(held), method)) >= 4


def test_a_block_that_switches_autocast_is_a_local_layer() -> None:
    assert ends(Blocks(AutocastBlock))[:4] == [f"blocks.{i}" for i in range(4)]


@pytest.mark.parametrize("method", ["auglocal", "dcl"])
def test_an_activation_that_opens_a_block_in_place_moves_no_cut(method: str) -> None:
    written, plain = ends(Opened(inplace=True), method), ends(Opened(inplace=False), method)

    assert len(written) == len(plain) >= 6
    assert written[:5] == plain[:5] == [f"blocks.{i}" for i in range(5)]


@pytest.mark.parametrize("method", ["auglocal", "dcl", "dgl", "predsim"])
def test_pooling_before_the_activation_makes_as_many_layers_as_after_it(method: str) -> None:
    assert len(ends(Tutorial(pool_first=True), method)) == len(ends(Tutorial(pool_first=False), method))


@pytest.mark.parametrize("method", ["auglocal", "dcl"])
def test_blocks_that_are_called_whole_are_the_layers_that_they_are_otherwise(method: str) -> None:
    leaves = tuple(f"layers.{i}" for i in range(4))

    assert ends(ResNet(BasicBlock), method, leaf=leaves) == ends(ResNet(BasicBlock), method)


def one_layer() -> nn.Sequential:
    """Return a net of one convolution and a classifier."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def test_a_net_of_one_layer_is_told_of_cuts_between_operations() -> None:
    with pytest.raises(MethodError, match='(?s)it has 1 local layer.*segments=2, by="node"') as refused:
        ends(one_layer())

    assert "-K 2 --cut-by node" in refused.value.on_command_line
    assert len(ends(one_layer(), cut=localize.CutSpec(segments=2, by="node"))) == 1


def test_a_frozen_net_is_told_of_what_is_frozen() -> None:
    model = one_layer()
    model[0].requires_grad_(False)

    with pytest.raises(MethodError, match=r"(?s)224 of its 269 parameters are frozen.*requires_grad_\(True\)"):
        ends(model)


@pytest.mark.parametrize(
    ("options", "told", "not_told"),
    [({"d": 9}, "d=3 or less, or tail='isolated'", "cut"), ({"cut": 1, "tail": "isolated"}, "cut=4", "isolated")],
)
def test_help_says_nothing_that_was_asked_for(options: dict[str, object], told: str, not_told: str) -> None:
    with pytest.raises(MethodError, match="needs at least two segments") as refused:
        ends(Tutorial(pool_first=False), "auglocal", **options)

    assert told in refused.value.help and not_told not in refused.value.help
