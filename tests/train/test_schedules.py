"""Learning rates of the papers' code, against values that were measured by running it."""

from __future__ import annotations

import math

import pytest
import torch

import localize
from localize.train import TrainConfig, optimizers
from localize.train.schedules import learning_rate, multistep


def rates(numbers: range | list[int], **settings: object) -> dict[int, float]:
    config = TrainConfig("cifar/resnet20", **settings)  # type: ignore[arg-type]
    return {epoch: learning_rate(config, epoch) for epoch in numbers}


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        (
            400,
            {
                1: 0.01,
                2: 0.08899506529926643,
                5: 0.3258766457985157,
                10: 0.7198902401439261,
                11: 0.7985081505971765,
                100: 0.682842712474619,
                200: 0.4,
                399: 1.2336942084134606e-05,
                400: 0.0,
            },
        ),
        (160, {1: 0.01, 10: 0.714082700945163, 11: 0.790706352528349, 80: 0.4, 160: 0.0}),
    ],
)
def test_full_cosine_is_that_of_the_cifar_code(epochs: int, expected: dict[int, float]) -> None:
    """Measured by running adjust_learning_rate of InfoPro (a38362a), which AugLocal and MLAAN share."""
    found = rates(list(expected), sched="full-cosine", epochs=epochs, lr=0.8, warmup_epochs=10)
    assert found == pytest.approx(expected, rel=1e-9, abs=0)


def test_full_cosine_without_warm_up_and_from_another_rate() -> None:
    plain = rates([1, 2, 4], sched="full-cosine", epochs=4, lr=0.8)
    assert plain == pytest.approx({1: 0.4 * (1 + math.sqrt(0.5)), 2: 0.4, 4: 0.0})
    warm = rates([1, 2, 3], sched="full-cosine", epochs=4, lr=0.8, warmup_epochs=2, warmup_lr=0.2)
    assert warm == pytest.approx({1: 0.2, 2: (0.4 + 0.2) / 2, 3: 0.4 * (1 - math.sqrt(0.5))})


def test_steps_are_those_of_local_loss() -> None:
    """Measured by running anokland/local-loss at 7b3b40b; gamma is its 0.25."""
    expected = {
        1: 0.0005, 200: 0.0005, 201: 0.000125, 300: 0.000125,
        301: 3.125e-05, 351: 7.8125e-06, 376: 1.953125e-06, 400: 1.953125e-06,
    }  # fmt: skip
    milestones = [200, 300, 350, 375]
    found = rates(list(expected), sched="multistep", milestones=milestones, gamma=0.25, lr=5e-4, epochs=400)
    assert found == pytest.approx(expected, rel=1e-9, abs=0)


@pytest.mark.parametrize("gamma", [0.5, 0.25])
def test_steps_are_those_of_torch(gamma: float) -> None:
    """DCL's code steps torch's MultiStepLR at the end of each epoch."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 5], gamma)
    found = rates(range(1, 9), sched="multistep", milestones=(2, 5), gamma=gamma, lr=0.1, epochs=8)
    for epoch in range(1, 9):
        assert found[epoch] == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12), epoch
        optimizer.step()
        scheduler.step()


def test_every_fifteen_epochs_as_in_dgl() -> None:
    for epoch in range(1, 51):
        assert multistep(epoch, (15, 30, 45), 0.2, 0.1) == pytest.approx(0.1 * 0.2 ** ((epoch - 1) // 15), rel=1e-12)


@pytest.mark.parametrize("sched", ["cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("start", [None, 0.002])
def test_cosine_and_warm_up_are_timms(sched: str, warmup: int, start: float | None) -> None:
    timm_scheduler = pytest.importorskip("timm.scheduler")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    scheduler, _ = timm_scheduler.create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=9, warmup_epochs=warmup, warmup_lr=1e-5 if start is None else start
    )
    found = rates(range(1, 10), sched=sched, epochs=9, lr=0.1, warmup_epochs=warmup, warmup_lr=start)
    for epoch in range(1, 10):
        scheduler.step(epoch - 1)
        expected = optimizer.param_groups[0]["lr"] if sched == "cosine" or epoch <= warmup else 0.1
        assert found[epoch] == pytest.approx(expected, rel=1e-12), epoch


def test_a_warm_up_to_steps() -> None:
    found = rates([1, 2, 3, 4], sched="multistep", milestones=(3,), lr=0.1, epochs=4, warmup_epochs=2, warmup_lr=0.02)
    assert found == pytest.approx({1: 0.02, 2: 0.06, 3: 0.1, 4: 0.01})


@pytest.fixture(scope="module")
def local() -> localize.LocalModel:
    model = localize.zoo.create_model("cifar/fc_mnist", input_shape=(1, 8, 8))
    return localize.transform(model, "dcl", example_input=torch.zeros(2, 1, 8, 8))


@pytest.mark.parametrize(("opt", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_adam_and_adamw_have_the_papers_betas_and_decay_every_parameter(
    local: localize.LocalModel, opt: str, kind: type[torch.optim.Optimizer]
) -> None:
    config = TrainConfig("cifar/fc_mnist", opt=opt, lr=5e-4, weight_decay=0.01)
    optimizer = optimizers.create_optimizer(local, config)
    assert type(optimizer) is kind
    assert sum(len(group["params"]) for group in optimizer.param_groups) == sum(
        len(group["params"]) for group in local.param_groups()
    )
    for group in optimizer.param_groups:
        settings = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay", "amsgrad")}
        assert settings == {"lr": 5e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "amsgrad": False}


@pytest.mark.parametrize(("opt", "nesterov"), [("sgd", True), ("momentum", False)])
def test_sgd_is_with_nesterov_momentum_and_momentum_without(
    local: localize.LocalModel, opt: str, nesterov: bool
) -> None:
    optimizer = optimizers.create_optimizer(local, TrainConfig("cifar/fc_mnist", opt=opt, weight_decay=5e-4))
    assert type(optimizer) is torch.optim.SGD
    for group in optimizer.param_groups:
        assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, nesterov, 5e-4)
