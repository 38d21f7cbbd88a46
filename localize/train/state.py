"""Convert the state of a run, beyond its recipe, to plain values and tensors and back."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from localize.errors import MissingError, OptionError
from localize.runtime.model import LocalModel
from localize.runtime.updates import own_state_key


@dataclass
class Tally:
    """Results of an epoch so far, updated with every batch."""

    names: list[str] = field(default_factory=list)
    """Names of the losses, in the order of the values."""
    losses: list[Tensor] = field(default_factory=list)
    """The losses (K,) of every optimizer step: means over its batches."""
    right: dict[str, Tensor] = field(default_factory=dict)
    """Number of right predictions by the name of the loss."""
    final_right: Tensor | int = 0
    """Number of right predictions of the model's own output."""
    batches: int = 0
    images: int = 0
    seconds: float = 0.0

    def values(self) -> dict[str, Any]:
        """Return it as plain values and tensors."""
        losses = torch.stack(self.losses) if self.losses else torch.zeros(0, 0)
        return {**vars(self), "names": list(self.names), "losses": losses, "right": dict(self.right)}


@dataclass
class Position:
    """The position of a run."""

    order: Tensor
    """State of the generator of the data order when the epoch began."""
    epoch: int = 1
    """The current or next epoch, from 1."""
    steps: int = 0
    """Optimizer steps in all epochs so far."""
    tally: Tally = field(default_factory=Tally)
    random: Mapping[str, Any] | None = None
    """Random states to restore, after the batches that the epoch has used are skipped."""

    def values(self, device: torch.device) -> dict[str, Any]:
        """Return it as plain values and tensors, with the current random states."""
        return {
            "order": self.order,
            "epoch": self.epoch,
            "steps": self.steps,
            "tally": self.tally.values(),
            "random": random_states(device),
        }


def position_from(values: Mapping[str, Any], device: torch.device) -> Position:
    """Return the position from the values of :meth:`Position.values`."""
    saved = values["tally"]
    right = {name: count.to(device) for name, count in saved["right"].items()}
    final = saved["final_right"]
    final = final.to(device) if isinstance(final, Tensor) else final
    tally = Tally(**{**saved, "losses": list(saved["losses"].to(device)), "right": right, "final_right": final})
    return Position(values["order"], values["epoch"], values["steps"], tally, values["random"])


def random_states(device: torch.device) -> dict[str, Any]:
    """Return the states of all random generators: of Python, numpy, torch, and of the accelerator if it is used."""
    legacy: Any = np.random.get_state()  # a tuple, which numpy declares for legacy=True only in part
    kind, keys, *rest = legacy
    return {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_states(saved: Mapping[str, Any], device: torch.device) -> None:
    """Restore the states that :func:`random_states` returned."""
    version, numbers, gauss = saved["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = saved["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(saved["torch"])
    if device.type == "cuda" and saved["device"] is not None:
        torch.cuda.set_rng_state(saved["device"], device)


def optimizer_values(local: LocalModel, optimizer: Optimizer) -> dict[str, Any]:
    """Return the groups and states of an optimizer, by the names of the parameters.

    Returns:
        ``groups``: settings of each group, with the names of its parameters under ``params``. ``states``: states by the
        name of the parameter. ``own``: states by the name of the loss and of the parameter, for parameters that have
        one state for each loss (see :class:`localize.runtime.updates.Updates`).

    Raises:
        OptionError: the optimizer keeps a state that belongs to no parameter.
    """
    name_of = {id(parameter): name for name, parameter in local.named_parameters()}
    groups = [{**group, "params": [name_of[id(p)] for p in group["params"]]} for group in optimizer.param_groups]
    own: dict[str, dict[str, Any]] = {}
    left: dict[Any, Any] = dict(optimizer.state)  # by parameters, and by the names of own states
    for loss, names in zip(local.plan.losses, local.reached(), strict=True):
        keys = {name: own_state_key(loss.name, name) for name in names}
        found = {name: left.pop(key) for name, key in keys.items() if key in left}
        if found:
            own[loss.name] = found
    unknown = [key for key in left if id(key) not in name_of]
    if unknown:
        raise OptionError(
            f"the state of {type(optimizer).__name__} cannot be stored by the names of parameters.",
            facts=f"it has a state for {str(unknown[0])[:60]!r}, which is not a parameter.",
            help="--opt sgd",
        )
    return {"groups": groups, "states": {name_of[id(p)]: value for p, value in left.items()}, "own": own}


def load_optimizer_values(local: LocalModel, optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Restore the groups and states of an optimizer that :func:`optimizer_values` returned.

    Raises:
        MissingError: they belong to other parameters.
    """
    parameters = dict(local.named_parameters())
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    names = [[name_of[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    if names != [group["params"] for group in saved["groups"]]:
        raise MissingError("the checkpoint's optimizer has other parameters.", help="localize train, for a new run")
    number = {name: i for i, name in enumerate(name for group in names for name in group)}
    groups = [{**group, "params": [number[name] for name in group["params"]]} for group in saved["groups"]]

    def load(states: Mapping[str, Any]) -> None:
        # torch's own loading knows which values belong on the device of their parameter.
        optimizer.load_state_dict({"state": {number[n]: s for n, s in states.items()}, "param_groups": groups})

    own: dict[str, Any] = {}
    for loss, names_of_loss in zip(local.plan.losses, local.reached(), strict=True):
        states = saved["own"].get(loss.name, {})
        if states:
            load(states)
            for name in names_of_loss:
                if name in states:
                    own[own_state_key(loss.name, name)] = optimizer.state.pop(parameters[name])
    load(saved["states"])
    state: dict[Any, Any] = optimizer.state
    state.update(own)
