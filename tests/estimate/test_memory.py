"""What is predicted of a step is what is measured of it, and what is measured is what lives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import localize
from localize import zoo
from localize.errors import InputError
from localize.estimate.memory import Footprint, Meter, measure, predict, sgd
from tests.nets import ALL


def made(net: str, method: str, **options: Any) -> localize.LocalModel:
    torch.manual_seed(0)
    model = Dropping() if net == "Dropping" else ALL[net]()
    return localize.transform(model.train(), method, example_input=torch.empty(2, 3, 8, 8), **options)


def numbers(found: Footprint) -> tuple[int, int, int, int]:
    """Leave out the timeline: when a single number dies is no matter."""
    return found.resident, found.peak, found.saved, found.macs


def adam(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=0.1)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("backprop", {}),
        ("backprop", {"recompute": "all"}),
        ("auglocal", {"d": 2}),
        ("auglocal", {"d": 2, "recompute": "all"}),
        ("dcl", {}),
        ("predsim", {}),
        ("infopro", {}),
        ("accumulate", {"parts": 3}),
        ("accumulate", {"parts": 12}),
        ("dgl", {"recompute_at": "all@*,head@*1"}),
    ],
)
@pytest.mark.parametrize("net", ["ResNet", "ViT", "Writes"])
def test_what_is_predicted_is_what_a_step_needs(net: str, method: str, options: dict[str, Any]) -> None:
    optimizer = adam if net == "ViT" else sgd
    local = made(net, method, **options)
    predicted = predict(local, 12, optimizer=optimizer)
    found = measure(local, torch.randn(12, 3, 8, 8), torch.arange(12) % 5, optimizer(local.param_groups(lr=0.1)))

    assert numbers(predicted) == numbers(found)
    for one in (predicted, found):
        assert one.resident < one.peak == max(held for _, held in one.timeline)


@pytest.mark.parametrize(
    ("net", "method", "options"),
    [
        ("ResNet", "dcl", {"micro_batch": 2}),
        ("Dropping", "auglocal", {"d": 2, "micro_batch": 3}),
        ("ResNet", "backprop", {"micro_batch": 5, "recompute": "all"}),
        ("ResNet", "dcl", {"micro_batch": 4, "keep_at": "bn2@blocks.1,bn2@blocks.2"}),
        ("Dense", "dcl", {"micro_batch": 4, "keep_at": "0.0+1.0@*"}),
        ("ResNet", "dgl", {"micro_batch_at": "2@blocks.0,5@blocks.1", "recompute_at": "all@blocks.0,body@relu"}),
    ],
)
def test_exact_parts_need_what_is_predicted_of_few_of_them(net: str, method: str, options: dict[str, Any]) -> None:
    local = made(net, method, **options)
    predicted = predict(local, 34)
    found = measure(local, torch.randn(34, 3, 8, 8), torch.arange(34) % 5, sgd(local.param_groups(lr=0.1)))

    assert numbers(predicted) == numbers(found)
    assert len(predicted.timeline) < len(found.timeline)


class Dropping(ALL["ResNet"]):
    """Dropout before a strided block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].conv1 = nn.Sequential(nn.Dropout(0.2), self.blocks[1].conv1)


@pytest.mark.parametrize("method", ["backprop", "dcl"])
def test_a_single_image_is_followed_once(method: str) -> None:
    local = made("ViT", method)
    one, two = predict(local, 1), predict(local, 2)
    found = measure(local, torch.randn(1, 3, 8, 8), torch.zeros(1, dtype=torch.long), sgd(local.param_groups(lr=0.1)))

    assert numbers(one) == numbers(found)
    assert 2 * one.macs == two.macs


def test_a_single_image_that_batch_norm_cannot_take_is_refused_in_a_prediction_too() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 5))
    local = localize.transform(net, "backprop", example_input=torch.empty(2, 3, 8, 8))

    with pytest.raises(InputError, match="a batch of one image is too small for this step"):
        predict(local, 1)


@pytest.mark.parametrize("options", [{}, {"micro_batch": 4}])
def test_a_model_without_data_is_predicted_as_one_with(options: dict[str, Any]) -> None:
    with torch.device("meta"):
        empty = ALL["MLP"]()
        local = localize.transform(empty.train(), "dcl", example_input=torch.empty(2, 3, 8, 8), **options)

    assert numbers(predict(local, 16)) == numbers(predict(made("MLP", "dcl", **options), 16))
    assert all(parameter.is_meta for parameter in local.parameters())


def test_prediction_leaves_model_and_random_state_alone() -> None:
    local = made("ResNet", "dcl")
    before = {name: value.clone() for name, value in local.state_dict().items()}
    state = torch.get_rng_state()

    predict(local, 8)

    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in local.state_dict().items())
    assert all(parameter.grad is None for parameter in local.parameters())


def test_a_storage_counts_from_the_operation_that_makes_it_until_it_dies() -> None:
    with Meter() as meter:
        a = torch.zeros(1000)
        b = a.view(10, 100)
        assert meter.held == 4000
        a = a + 1.0
        assert meter.held == 8000
        del b
        assert meter.held == 4000
    assert (meter.peak, meter.flops) == (8000, 0)


def test_arithmetic_is_that_of_matrix_products_forward_and_backward() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 20, bias=False), nn.ReLU(), nn.Linear(20, 10, bias=False))
    local = localize.transform(model, "backprop", example_input=torch.empty(2, 3, 4, 4))

    # forward; gradients of both weights; gradient of what enters the second, none of the images
    assert predict(local, 7).macs == 7 * (48 * 20 + 20 * 10) * 2 + 7 * 20 * 10


def test_what_is_kept_for_a_backward_is_what_lives_when_it_begins() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 20, bias=False), nn.ReLU(), nn.Linear(20, 10, bias=False))
    local = localize.transform(model, "backprop", example_input=torch.empty(2, 3, 4, 4))

    # the hidden layer before ReLU dies with its name; behind it; scores and their logarithms; numbers of the loss
    kept = 7 * (20 + 10 + 10) * 4
    assert kept <= predict(local, 7).saved <= kept + 16


def test_recomputation_and_micro_batches_need_less() -> None:
    kept, again = (predict(made("ViT", "dcl", recompute=what), 256) for what in ("none", "all"))
    assert again.saved < 0.7 * kept.saved
    assert again.macs > kept.macs
    whole, parts = (predict(made("MLP", "dcl", micro_batch=size), 256) for size in (0, 32))
    assert parts.peak < whole.peak
    assert parts.macs == whole.macs
    whole, parts = (predict(made("ResNet", "dcl", micro_batch=size), 256) for size in (0, 32))
    assert parts.peak < 0.35 * whole.peak
    assert parts.macs > whole.macs


def test_autocast_halves_what_is_kept() -> None:
    with torch.device("meta"):
        model = zoo.create_model("cifar/vgg8b")
        local = localize.transform(model.train(), "dcl", example_input=torch.empty(2, 3, 32, 32))
    full, half = predict(local, 64), predict(local, 64, autocast=torch.bfloat16)

    assert half.saved < 0.75 * full.saved
