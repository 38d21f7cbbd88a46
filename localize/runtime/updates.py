"""An optimizer as the generated text sees it: as a whole, and by loss."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from localize.torch_names import divide_all


class Updates:
    """An optimizer as the generated text sees it: as a whole, and by loss.

    ``updates.step()`` and ``updates.zero_grad()`` are the optimizer's own. ``updates[k]`` is limited to what loss k
    reaches. A parameter that several losses update has one state for each (as if each loss had its own optimizer) if
    ``per_loss``; these states live in the optimizer's own ``state``, under :func:`own_state_key`.

    Of ``batches`` that make one update, ``batch`` is the one at hand: gradients are kept until the last, and their mean
    is what the optimizer sees.

    With a ``scaler``, ``updates.scale(loss)`` is the loss times its scale, and each of the updates goes through it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, reach: list[list[nn.Parameter]], *, per_loss: bool) -> None:
        self.optimizer, self.reach = optimizer, reach
        counts: dict[int, int] = {}
        for parameters in reach:
            for parameter in parameters:
                counts[id(parameter)] = counts.get(id(parameter), 0) + 1
        self.shared = {key for key, count in counts.items() if count > 1} if per_loss else set()
        group_of = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self.grouped = [
            [[p for p in parameters if group_of.get(id(p)) == i] for i in range(len(optimizer.param_groups))]
            for parameters in reach
        ]
        """What each loss reaches, by parameter group."""
        self.reached = [_Reached(optimizer, [{"params": parameters}]) for parameters in reach]
        self.batch, self.batches = 0, 1
        self.scaler: torch.amp.GradScaler | None = None
        self.kept: dict[int, list[Tensor | None]] = {}
        """By the number of the loss, the sums of its gradients over the batches before this one."""

    @property
    def is_last(self) -> bool:
        """Whether the batch at hand is the last of those that make one update."""
        return self.batch + 1 == self.batches

    def scale(self, loss: Tensor) -> Tensor:
        """Return a loss times the scale of the scaler; the loss itself where there is none."""
        return loss if self.scaler is None else self.scaler.scale(loss)

    def step(self) -> None:
        """Update every parameter, in the last of the batches."""
        if self.is_last:
            if self.batches > 1:
                average([p.grad for group in self.optimizer.param_groups for p in group["params"]], self.batches)
            self.apply(self.optimizer)

    def apply(self, optimizer: Any) -> None:
        """Step the optimizer, or what a scaler takes for one; with a scaler, if unscaled gradients are finite."""
        if self.scaler is None:
            optimizer.step()
        else:
            self.scaler.unscale_(optimizer)  # here, since an optimizer that can do it itself does it behind its hooks
            self.scaler.step(optimizer)

    def zero_grad(self) -> None:
        """Drop every gradient, in the first of the batches."""
        if self.batch == 0:
            self.kept.clear()
            self.optimizer.zero_grad(set_to_none=True)

    def __getitem__(self, loss: int) -> _Part:
        return _Part(self, loss)


@dataclass(frozen=True)
class _Reached:
    """What one loss reaches, as a gradient scaler takes an optimizer; it tells them apart by ``id()``."""

    optimizer: torch.optim.Optimizer
    param_groups: list[dict[str, list[nn.Parameter]]]

    def step(self) -> None:
        """Step the optimizer, which sees no more than this now."""
        self.optimizer.step()


@dataclass(frozen=True)
class _Part:
    """The part of an optimizer that holds what one loss reaches."""

    whole: Updates
    loss: int

    def step(self) -> None:
        """Update what the loss reaches, in the last of the batches."""
        if self.whole.batches == 1 or self._gathered():
            with self._only_reached(), self._own_state():
                self.whole.apply(self.whole.reached[self.loss])

    def zero_grad(self) -> None:
        """Drop the gradients of what the loss reaches."""
        for parameter in self.whole.reach[self.loss]:
            parameter.grad = None

    def _gathered(self) -> bool:
        """Add the gradients of this batch to those kept; in the last batch, leave their mean and return True.

        They are kept by loss: those of another loss to the same parameter are not mixed in.
        """
        whole, parameters = self.whole, self.whole.reach[self.loss]
        before = whole.kept.pop(self.loss, [None] * len(parameters))
        for parameter, sum_before in zip(parameters, before, strict=True):
            if sum_before is not None:
                parameter.grad = sum_before if parameter.grad is None else parameter.grad.add_(sum_before)
        gradients = [parameter.grad for parameter in parameters]
        if not whole.is_last:
            whole.kept[self.loss] = gradients
            return False
        average(gradients, whole.batches)
        return True

    @contextmanager
    def _only_reached(self) -> Iterator[None]:
        """Let the optimizer see only the parameters that the loss reaches."""
        optimizer = self.whole.optimizer
        groups, contents = optimizer.param_groups, [group["params"] for group in optimizer.param_groups]
        for group, reached in itertools.zip_longest(groups, self.whole.grouped[self.loss], fillvalue=()):
            group["params"] = list(reached)
        optimizer.param_groups = [group for group in groups if group["params"]]
        try:
            yield
        finally:
            optimizer.param_groups = groups
            for group, parameters in zip(groups, contents, strict=True):
                group["params"] = parameters

    @contextmanager
    def _own_state(self) -> Iterator[None]:
        """Give parameters that several losses update the state that belongs to this loss."""
        state = self.whole.optimizer.state
        shared = [(i, p) for i, p in enumerate(self.whole.reach[self.loss]) if id(p) in self.whole.shared]
        for i, parameter in shared:
            state[parameter] = state.pop(own_state_key(self.loss, i), {})
        try:
            yield
        finally:
            for i, parameter in shared:
                state[own_state_key(self.loss, i)] = state.pop(parameter)


def average(gradients: list[Tensor | None], batches: int) -> None:
    """Divide summed gradients by the number of batches, in place."""
    found = [gradient for gradient in gradients if gradient is not None]
    if found:
        divide_all(found, batches)


def own_state_key(loss: int, i: int) -> str:
    """Return where an optimizer keeps the state that belongs to loss number ``loss`` and its i-th parameter alone.

    Parameters are counted in the order of :meth:`LocalModel.reached`.
    """
    return f"loss_{loss}/{i}"
