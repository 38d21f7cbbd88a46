"""Calls from a run to the user's own code: after every step, after every epoch, and at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from localize import outside
from localize.errors import OptionError
from localize.runtime.model import LocalModel

MOMENTS = ("after_step", "after_epoch", "after_run")


@dataclass(frozen=True)
class Step:
    """The state of a run after an optimizer step. ``local`` and ``optimizer`` are the trained objects, not copies."""

    local: LocalModel
    optimizer: Optimizer
    epoch: int
    """From 1."""
    step: int
    """Optimizer steps so far."""
    losses: Mapping[str, Tensor]
    """Losses by name: scalar tensors (), on the device, averaged over the batches of the step."""


class Callback:
    """A base class whose methods do nothing; override what you need. Only the first of several processes calls it.

    ::

        class Norms(localize.train.Callback):
            def after_epoch(self, metrics, local):
                print(metrics["epoch"], sum(p.norm() ** 2 for p in local.parameters()) ** 0.5)

        localize train resnet20 --method dcl --callback norms.py:Norms
    """

    def after_step(self, step: Step) -> None:
        """Called after each step of the optimizer.

        Args:
            step: the state of the run, see :class:`Step`.
        """

    def after_epoch(self, metrics: Mapping[str, Any], local: LocalModel) -> None:
        """Called after an epoch has been tested and its metrics written.

        Args:
            metrics: the epoch's line of metrics.jsonl.
            local: the model in training.
        """

    def after_run(self, folder: Path, metrics: Sequence[Mapping[str, Any]], local: LocalModel) -> None:
        """Called after the weights have been exported.

        Args:
            folder: the run folder.
            metrics: the lines of all epochs.
            local: the exported model.
        """


def load(name: str | None) -> Any:
    """Return the callback named by ``FILE.py:NAME`` or ``module:NAME``: an object, or a class without arguments.

    Raises:
        UnknownNameError: there is no such file, module or name.
        CodeError: it cannot be imported.
        OptionError: it is not a callback.
    """
    if name is None:
        return Callback()
    if not outside.is_spelled(name):
        raise OptionError(
            f"callback cannot be {name!r}.",
            facts="it must be a class of your own: FILE.py:NAME or module:NAME.",
            help="class Mine(localize.train.Callback) in a file, then --callback FILE.py:Mine",
            option="callback",
        )
    found = outside.load(name, like="CALLBACK", fits=callable)
    try:
        found = found() if isinstance(found, type) else found
    except TypeError as error:
        raise OptionError(
            f"callback {name!r} cannot be made without arguments.", facts=outside.told(error),
            help="create an object in that file, and give its name here", option="callback",
        ) from error  # fmt: skip
    return checked(found, name)


def checked(callback: Any, name: str = "") -> Any:
    """Return an object that has at least one of the three methods, with the missing ones added.

    Raises:
        OptionError: it has none of them.
    """
    if callback is None or isinstance(callback, Callback):
        return callback or Callback()
    if not any(callable(getattr(callback, moment, None)) for moment in MOMENTS):
        raise OptionError(
            f"callback {name or type(callback).__name__!r} has no {', no '.join(MOMENTS)}.",
            help="class Mine(localize.train.Callback), with one of them",
            option="callback",
        )
    return _Completed(callback)


class _Completed(Callback):
    """A callback without the base class, with the missing methods added."""

    def __init__(self, own: Any) -> None:
        for moment in MOMENTS:
            if callable(getattr(own, moment, None)):
                setattr(self, moment, getattr(own, moment))
