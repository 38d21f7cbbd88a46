"""Labels and batches that a step cannot take are refused in words, before anything has changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import localize
from localize.errors import InputError, OptionError
from localize.runtime.model import LocalModel


def net(*, norm: bool = False) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for width in (12, 8):
        layers += [nn.LazyLinear(width), *([nn.BatchNorm1d(width)] if norm else []), nn.ReLU()]
    model = nn.Sequential(*layers, nn.LazyLinear(3))
    model(torch.zeros(2, 1, 3, 3))
    return model


def local_of(model: nn.Module, method: str = "dgl", **options: Any) -> tuple[LocalModel, torch.optim.Optimizer]:
    local = localize.transform(model, method, example_input=torch.randn(4, 1, 3, 3), **options)
    return local, torch.optim.SGD(local.param_groups(lr=0.1), lr=0.1)


def check_refused(local: LocalModel, optimizer: torch.optim.Optimizer, x: Tensor, y: Any, message: str) -> None:
    before = copy.deepcopy(local.state_dict())
    with pytest.raises(InputError, match=message):
        local.step(x, y, optimizer)
    for name, value in local.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (
            torch.tensor([0, 1, 2, 0], dtype=torch.int32),
            r"labels are torch.int32 of shape \(4,\).\n.*int64.*\n.*y.long",
        ),
        (torch.tensor([True, False, True, True]), r"labels are torch.bool of shape \(4,\)"),
        (torch.rand(4), "labels are torch.float32"),
        (torch.zeros(4, 1, dtype=torch.int64), r"labels are of shape \(4, 1\).\n.*\n  help: y.squeeze\(1\)"),
        (torch.zeros(4, 3, dtype=torch.int64), r"labels are torch.int64 of shape \(4, 3\).\n.*\n  help: y.float\(\)"),
        (torch.zeros(4, 3, dtype=torch.bool), r"labels are torch.bool of shape \(4, 3\).\n.*\n  help: y.float\(\)"),
        (torch.zeros(4, 5, dtype=torch.int64), r"labels are of shape \(4, 5\).\n.*\n  help: y.argmax\(1\)"),
        (torch.zeros((), dtype=torch.int64), r"labels are of shape \(\)"),
        (torch.zeros(3, dtype=torch.int64), "4 images and 3 labels"),
        ([0, 1, 2, 0], "labels are list"),
        (torch.tensor([0, 1, 2, 3]), "label 3 is not a class id.*\n  its 3 classes have ids 0 to 2.*from 0 to 3"),
        (torch.tensor([1, 2, 3, 1]), "label 3 is not a class id.*\n.*\n  help: y - 1"),
        (torch.tensor([0, -1, 2, 1]), r"label -1 is not a class id.*\n.*\n  help: ids from 0 to 2"),
        (torch.tensor([0, -1, -1, -1]), r"label -1 is not a class id.*\n.*\n  help: ids from 0 to 2"),
        (torch.full((4,), -100), "every label of the batch is -100, which no loss counts"),
    ],
)
def test_labels_that_are_not_class_ids_are_refused_before_anything_moves(y: Any, message: str) -> None:
    local, optimizer = local_of(net(norm=True))
    check_refused(local, optimizer, torch.randn(4, 1, 3, 3), y, message)


def test_labels_of_pixels_are_checked_too() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1))
    local, optimizer = local_of(model, "backprop")
    x = torch.randn(2, 1, 3, 3)
    check_refused(local, optimizer, x, torch.full((2, 3, 3), 255), "every label of the batch is 255")
    check_refused(local, optimizer, x, torch.full((2, 3, 3), 7), "label 7 is not a class id")
    check_refused(local, optimizer, x, torch.zeros(2, 3, 2, dtype=torch.int64), "class ids \\(N, 3, 3\\) are needed")


@pytest.mark.parametrize("method", ["backprop", "dgl", "dcl"])
def test_one_image_is_refused_where_a_norm_of_the_model_cannot_take_it(method: str) -> None:
    local, optimizer = local_of(net(norm=True), method)
    told = "a batch of one image is too small.*\n  a BatchNorm.*\n  help: batches of 2 images or more; .*drop_last"
    check_refused(local, optimizer, torch.randn(1, 1, 3, 3), torch.tensor([1]), told)


def test_one_image_is_refused_where_a_norm_of_a_head_cannot_take_it() -> None:
    local, optimizer = local_of(net(), "dgl")
    assert not [one for one in local.trunk.modules() if isinstance(one, nn.BatchNorm1d)]
    check_refused(local, optimizer, torch.randn(1, 1, 3, 3), torch.tensor([1]), "a batch of one image is too small")


def test_one_image_is_taken_where_nothing_normalises_over_the_batch() -> None:
    local, optimizer = local_of(net(), "backprop")
    before = local.state_dict()["trunk.1.weight"].clone()
    local.step(torch.randn(1, 1, 3, 3), torch.tensor([1]), optimizer)
    assert not torch.equal(local.state_dict()["trunk.1.weight"], before)


def test_a_training_step_in_eval_mode_takes_one_image() -> None:
    local, optimizer = local_of(net(norm=True), "backprop")
    local.eval()
    local.step(torch.randn(1, 1, 3, 3), torch.tensor([1]), optimizer)


@pytest.mark.parametrize("order", [[(1, 3)], [(0, 3), (2, 3)], [(0, 2), (1, 3)], [(0, 2), (1, 2), (1, 2)]])
def test_batches_of_an_update_come_one_after_the_other(order: list[tuple[int, int]]) -> None:
    local, optimizer = local_of(net())
    x, y = torch.randn(2, 1, 3, 3), torch.tensor([0, 1])
    for batch in order[:-1]:
        local.step(x, y, optimizer, batch=batch)
    with pytest.raises(OptionError, match="does not follow batch .*\n  help: batch=\\(0, ".replace("\n", "\n.*\n")):
        local.step(x, y, optimizer, batch=order[-1])
    local.step(x, y, optimizer, batch=(0, 2))  # a new update may begin at any time
    local.step(x, y, optimizer, batch=(1, 2))


ROWS = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.2, 0.3, 0.5], [0.0, 0.0, 1.0]])


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (ROWS[:3], r"labels are of shape \(3, 3\).\n.*soft labels are of shape \(4, 3\)"),
        (ROWS[:, :2], r"labels are of shape \(4, 2\)"),
        (2 * ROWS - 0.5, "labels of the batch go from -0.5 to 1.5"),
        (ROWS * float("nan"), "labels of the batch go from nan to nan"),
        (ROWS.clone().fill_(1.0), "soft labels of image 0 sum to 3.\n.*\n.*loss=.bce"),
        (0.5 * ROWS, "soft labels of image 0 sum to 0.5"),
    ],
)
def test_soft_labels_that_are_no_shares_of_the_classes_are_refused(y: Tensor, message: str) -> None:
    local, optimizer = local_of(net(norm=True))
    check_refused(local, optimizer, torch.randn(4, 1, 3, 3), y, message)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_soft_labels_of_any_floating_type_are_taken(dtype: torch.dtype) -> None:
    local, optimizer = local_of(net(), "dcl")
    local.step(torch.randn(4, 1, 3, 3), ROWS.to(dtype), optimizer)


def test_targets_of_several_classes_are_taken_by_bce_alone() -> None:
    local, optimizer = local_of(net(), loss="bce")
    several = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.3, 0.9]])
    local.step(torch.randn(4, 1, 3, 3), several, optimizer)
    check_refused(local, optimizer, torch.randn(4, 1, 3, 3), 2 * several, "labels of the batch go from 0 to 2")


def test_what_is_taken_is_said_of_labels_that_are_neither() -> None:
    local, optimizer = local_of(net())
    message = r"labels are torch.int64 of shape \(4, 3\).\n.*class ids, int64, of shape \(4,\), or soft labels"
    check_refused(local, optimizer, torch.randn(4, 1, 3, 3), torch.zeros(4, 3, dtype=torch.int64), message)


@pytest.mark.parametrize("method", ["predsim", "ll-bpf", "drtp", "dfa", "feat", "cfl", "accumulate"])
def test_an_image_without_a_class_is_refused_where_something_counts_every_image(method: str) -> None:
    local, optimizer = local_of(net(norm=method in ("feat", "cfl")), method)
    message = rf"label of image 2 is -100, and this step of {method} needs the class of every image.\n  \S.*\n.*x\[y"
    check_refused(local, optimizer, torch.randn(4, 1, 3, 3), torch.tensor([0, 1, -100, 2]), message)


def test_an_image_without_a_class_is_refused_on_micro_batches() -> None:
    local, optimizer = local_of(net(), "dcl", micro_batch=2)
    y = torch.tensor([0, 1, -100, 2])
    check_refused(local, optimizer, torch.randn(4, 1, 3, 3), y, "weighed by their numbers of images")


@pytest.mark.parametrize("loss", ["cross-entropy", "focal", "bce"])
def test_an_image_without_a_class_is_left_out_where_all_losses_leave_it_out(loss: str) -> None:
    x, y = torch.randn(4, 1, 3, 3), torch.tensor([0, 1, -100, 2])
    torch.manual_seed(0)
    local, optimizer = local_of(net(), "dcl", loss=loss)
    twin = copy.deepcopy(local)
    local.step(x, y, optimizer)
    twin.step(x[y >= 0], y[y >= 0], torch.optim.SGD(twin.param_groups(lr=0.1), lr=0.1))
    for mine, other in zip(local.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("loss", ["cross-entropy", "focal"])
def test_a_batch_whose_classes_all_weigh_nothing_is_refused(loss: str) -> None:
    local, optimizer = local_of(net(), loss={"name": loss, "weights": [0.0, 1.0, 1.0]})
    y = torch.tensor([0, 0, -100, 0])
    check_refused(local, optimizer, torch.randn(4, 1, 3, 3), y, "every class of the batch has weight 0")
    local.step(torch.randn(4, 1, 3, 3), torch.tensor([0, 0, -100, 1]), optimizer)


def test_targets_of_bce_are_spoken_of_as_such() -> None:
    local, optimizer = local_of(net(), loss="bce")
    x = torch.randn(4, 1, 3, 3)
    check_refused(local, optimizer, x, torch.ones(4, 3) * 2, r"from 2 to 2.\n  targets say.*\n.*sigmoid\(\)")
    check_refused(local, optimizer, x, torch.ones(4, 3).bool(), r"multi-label targets, floating.*\n  help: y.float\(\)")
