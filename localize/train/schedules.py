"""Learning rates over the epochs, set once per epoch as in the papers' code, as a function of the epoch's number.

Epochs are counted from 1. ``lr`` is the learning rate after the warm-up. This module does not import torch.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING

from localize import outside
from localize.errors import OptionError

if TYPE_CHECKING:
    from localize.recipes.settings import TrainConfig

WARMUP_LR = 1e-5
"""Learning rate at the start of timm's warm-up."""
FULL_COSINE_WARMUP_LR = 0.01
"""Learning rate at the start of the warm-up in the CIFAR code."""


def cosine(epoch: int, epochs: int, lr: float) -> float:
    """Return 0.5 lr (1 + cos(pi (epoch - 1) / epochs)): ``lr`` in the first epoch, a little in the last.

    Source: timm, and the ImageNet scripts of InfoPro and AugLocal, which count epochs from 0.
    """
    return 0.5 * lr * (1 + math.cos(math.pi * (epoch - 1) / epochs))


def full_cosine(epoch: int, epochs: int, lr: float, *, warmup: int = 0, start: float = FULL_COSINE_WARMUP_LR) -> float:
    """Return c(e) = 0.5 lr (1 + cos(pi e / epochs)), which is 0 in the last epoch.

    In the first W = ``warmup`` epochs it is mixed with ``start``: c(e) (e - 1)/W + start (W + 1 - e)/W.

    Source: the CIFAR code of InfoPro (blackfeather-wang/InfoPro-Pytorch at a38362a), AugLocal (ChenxiangMA/AugLocal at
    98c90d6) and MLAAN (Wendy231015/MLAAN at 70effbe), where W is 10 and ``start`` 0.01.
    """
    value = 0.5 * lr * (1 + math.cos(math.pi * epoch / epochs))
    if epoch > warmup:
        return value
    return value * (epoch - 1) / warmup + start * (warmup + 1 - epoch) / warmup


def multistep(epoch: int, milestones: Sequence[int], gamma: float, lr: float) -> float:
    """Return lr gamma^m, where m is the number of milestones that are at most epoch - 1.

    Source: anokland/local-loss at 7b3b40b (gamma 0.25); DCL, schoi828/DCL at ef169c8 (gamma 0.5 or 0.25); DGL,
    eugenium/DGL at 4cc7c17 (milestones 15, 30, 45, ... and gamma 0.2).

    Args:
        epoch: from 1.
        milestones: numbers of the epochs after which the learning rate falls, ascending.
        gamma: the factor at each milestone.
        lr: learning rate in the first epoch.
    """
    return lr * gamma ** bisect_right(milestones, epoch - 1)


def learning_rate(config: TrainConfig, epoch: int) -> float:
    """Return the learning rate of an epoch (from 1). In a run with stages, each stage goes through the schedule.

    The warm-up is timm's, ``warmup_lr + (epoch - 1) (lr - warmup_lr) / warmup_epochs``, except in
    :func:`full_cosine`, which has its own.
    """
    lr, warmup, start, epochs = config.lr, config.warmup_epochs, config.warmup_lr, config.span
    epoch = (epoch - 1) % epochs + 1 if config.stage_epochs is not None else epoch
    if outside.is_spelled(config.sched):
        return own(config.sched, epoch, epochs, lr)
    if config.sched == "full-cosine":
        start = FULL_COSINE_WARMUP_LR if start is None else start
        return full_cosine(epoch, epochs, lr, warmup=warmup, start=start)
    if epoch <= warmup:
        start = WARMUP_LR if start is None else start
        return start + (epoch - 1) * (lr - start) / warmup
    if config.sched == "cosine":
        return cosine(epoch, epochs, lr)
    if config.sched == "multistep":
        return multistep(epoch, config.milestones or (), config.gamma, lr)
    if config.sched in ("tanh", "poly"):
        return of_timm(config.sched, epoch, epochs, lr)
    return lr


def check(config: TrainConfig) -> None:
    """Refuse a schedule of the user's that does not return a learning rate for some epoch.

    Raises:
        LocalizeError: see :func:`own`.
    """
    if outside.is_spelled(config.sched):
        for epoch in range(1, config.epochs + 1):
            learning_rate(config, epoch)


def of_timm(name: str, epoch: int, epochs: int, lr: float) -> float:
    """Return the learning rate of timm's scheduler of this name in an epoch (from 1); it falls to 0."""
    import torch
    from timm.scheduler import create_scheduler_v2

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler, _ = create_scheduler_v2(optimizer, sched=name, num_epochs=epochs, warmup_epochs=0)
    scheduler.step(epoch - 1)
    return optimizer.param_groups[0]["lr"]


def own(name: str, epoch: int, epochs: int, lr: float) -> float:
    """Return the learning rate from the user's function of (epoch from 1, number of epochs, lr).

    Raises:
        UnknownNameError: there is no such function.
        CodeError: it cannot be imported.
        OptionError: it returns something other than a number that is at least 0, or raises an exception.
    """
    function = outside.load(name, like="FUNCTION", fits=callable)
    try:
        value = function(epoch, epochs, lr)
        if isinstance(value, int | float) and math.isfinite(value) and value >= 0:
            return float(value)
        told = f"it returns {value!r} in epoch {epoch} of {epochs}."
    except (TypeError, ArithmeticError, ValueError) as error:
        told = f"in epoch {epoch} of {epochs}: {outside.told(error)}."
    raise OptionError(
        f"sched {name!r} does not return a learning rate.",
        facts=told,
        help="def sched(epoch, epochs, lr): return lr * 0.9 ** (epoch - 1)",
        option="sched",
    )
