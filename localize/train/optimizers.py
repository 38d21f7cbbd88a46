"""The optimizer of a run, made by timm, and what happens to gradients before it steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import timm.optim
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from localize import outside
from localize.errors import OptionError, UnknownNameError, did_you_mean
from localize.recipes.settings import TrainConfig
from localize.runtime.model import LocalModel
from localize.train.parallel import ALONE, Team


def create_optimizer(local: LocalModel, config: TrainConfig, team: Team = ALONE) -> Optimizer:
    """Make the optimizer ``config.opt``, a name in timm or ``FILE.py:NAME``; ``team`` averages its gradients.

    Raises:
        UnknownNameError: there is no optimizer of that name.
        CodeError: the user's code cannot be imported.
        OptionError: it cannot be made with these settings, or needs more than a plain training step.
    """
    known = [str(name) for name in timm.optim.list_optimizers()]
    if outside.is_spelled(config.opt):
        return _finished(_own(config, local.param_groups()), config, team)
    if config.opt not in known:
        raise UnknownNameError(
            f"there is no optimizer {config.opt!r}.",
            facts=f"timm has {len(known)}: {', '.join(known[:8])}, ...",
            help=did_you_mean(config.opt, known) or "--opt sgd, or --opt FILE.py:NAME, torch.optim:Adadelta",
        )
    groups = local.param_groups(lr=config.lr, weight_decay=config.weight_decay)
    try:
        optimizer = timm.optim.create_optimizer_v2(
            groups, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay, momentum=config.momentum
        )
    except (AssertionError, ImportError, TypeError, ValueError, RuntimeError) as error:
        raise OptionError(
            f"optimizer {config.opt!r} cannot be made here.", facts=str(error), help="--opt sgd"
        ) from error
    return _finished(optimizer, config, team)


def _own(config: TrainConfig, groups: list[dict[str, Any]]) -> Optimizer:
    """Make an optimizer with the user's class or function, called with the groups and those settings that it takes.

    Raises:
        UnknownNameError: there is no such class or function.
        CodeError: it cannot be imported.
        OptionError: it does not return an optimizer, or raises an exception.
    """
    make = outside.load(config.opt, like="OPTIMIZER", fits=callable)
    try:
        parameters = inspect.signature(make).parameters
        given = {name: getattr(config, name) for name in ("lr", "weight_decay", "momentum") if name in parameters}
        optimizer = make(groups, **given)
    except (AssertionError, TypeError, ValueError, RuntimeError) as error:
        raise OptionError(
            f"optimizer {config.opt!r} cannot be made here.",
            facts=outside.told(error),
            help="def opt(params, lr, weight_decay): return torch.optim.Adam(params, lr=lr, betas=(0.9, 0.95))",
        ) from error
    if not isinstance(optimizer, Optimizer):
        raise OptionError(
            f"{config.opt!r} returns {type(optimizer).__name__}, not a torch.optim.Optimizer.",
            help="def opt(params, lr, weight_decay): return torch.optim.Adam(params, lr=lr, betas=(0.9, 0.95))",
        )
    for group in optimizer.param_groups:
        group["lr_scale"] = group["lr"] / config.lr  # timm's name: the schedule multiplies each group's initial rate
    return optimizer


def _finished(optimizer: Optimizer, config: TrainConfig, team: Team) -> Optimizer:
    """Make an optimizer average gradients over processes, and clip them, before it steps.

    Raises:
        OptionError: it needs more than a plain training step.
    """
    if getattr(optimizer, "is_second_order", False):
        raise OptionError(
            f"optimizer {config.opt!r} needs second derivatives.",
            facts="local.step computes first derivatives only.",
            help="--opt sgd",
        )
    if not config.scales:  # otherwise the scaler averages, before it checks for finite gradients
        team.average_gradients(optimizer)
    if config.clip_grad is not None:
        optimizer.register_step_pre_hook(clipping(config.clip_grad))
    return optimizer


def clipping(norm: float) -> Callable[..., None]:
    """Return a hook that scales the gradients of a step down to ``norm``, their joint norm, before the step."""

    def clip(optimizer: Optimizer, *given: Any) -> None:
        clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], norm)

    return clip


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group: ``lr`` times the group's ``lr_scale``, if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
