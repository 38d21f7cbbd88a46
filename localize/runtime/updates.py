"""The optimizers of a step as the generated text sees them: as one, as a whole and by loss."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from localize.torch_names import divide_all


class Updates:
    """The optimizers of a step as the generated text sees them: as one, as a whole and by loss.

    ``updates.step()`` and ``updates.zero_grad()`` are those of every optimizer. ``updates[k]`` is limited to what loss
    k reaches. A parameter that is ``shared`` by several losses has one state for each (as if each loss had its own
    optimizer); these states live in the optimizer's own ``state``, under :func:`own_state_key`.

    Of ``batches`` that make one update, ``batch`` is the one at hand: gradients are kept until the last, and their mean
    is what the optimizers see.

    With a ``scaler``, ``updates.scale(loss)`` is the loss times its scale, and each of the updates goes through it.

    Args:
        optimizers: no two of them hold the same parameter.
        reach: by the name of every loss, in the order of the plan, the parameters that it trains by their names.
        shared: names of the parameters that have one state for each loss.
    """

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        reach: Mapping[str, Mapping[str, nn.Parameter]],
        *,
        shared: Collection[str] = (),
    ) -> None:
        self.optimizers = tuple(optimizers)
        self.parts = tuple(
            tuple(
                part
                for optimizer in self.optimizers
                if (part := _Reached.of(optimizer, name, parameters, shared)).parameters or len(self.optimizers) == 1
            )
            for name, parameters in reach.items()
        )
        """What each loss reaches, by optimizer."""
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
                average([p.grad for one in self.optimizers for p in _held(one)], self.batches)
            for optimizer in self.optimizers:
                self.apply(optimizer)

    def apply(self, optimizer: torch.optim.Optimizer | _Reached) -> None:
        """Step an optimizer, or a part of it; with a scaler, if its unscaled gradients are finite."""
        if self.scaler is None:
            optimizer.step()
        elif len(self.optimizers) == 1 or any(p.grad is not None for p in _held(optimizer)):
            held = cast(torch.optim.Optimizer, optimizer)  # a scaler asks for param_groups and step, which _Reached has
            self.scaler.unscale_(held)  # here, since an optimizer that can do it itself does it after its hooks
            self.scaler.step(held)

    def zero_grad(self) -> None:
        """Drop every gradient, in the first of the batches."""
        if self.batch == 0:
            self.kept.clear()
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)

    def __getitem__(self, loss: int) -> _Part:
        return _Part(self, loss)


@dataclass(frozen=True)
class _Reached:
    """What one loss reaches of what one optimizer holds, as a gradient scaler takes an optimizer.

    The scaler tells them apart by ``id()``.
    """

    optimizer: torch.optim.Optimizer
    parameters: tuple[nn.Parameter, ...]
    grouped: tuple[tuple[nn.Parameter, ...], ...]
    """The same by parameter group, in the order of the optimizer's groups."""
    own: tuple[tuple[str, nn.Parameter], ...]
    """Parameters whose state belongs to this loss alone, with the key that it is kept by."""
    param_groups: list[dict[str, list[nn.Parameter]]]

    @classmethod
    def of(
        cls, optimizer: torch.optim.Optimizer, loss: str, reach: Mapping[str, nn.Parameter], shared: Collection[str]
    ) -> _Reached:
        """Sort the parameters ``reach`` of a loss by the groups of an optimizer."""
        group_of = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        held = {name: p for name, p in reach.items() if id(p) in group_of}
        parameters = tuple(held.values())
        grouped = tuple(
            tuple(p for p in parameters if group_of[id(p)] == i) for i in range(len(optimizer.param_groups))
        )
        own = tuple((own_state_key(loss, name), p) for name, p in held.items() if name in shared)
        return cls(optimizer, parameters, grouped, own, [{"params": list(parameters)}])

    def step(self) -> None:
        """Step the optimizer, which sees no more than this now."""
        self.optimizer.step()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let the optimizer see only these parameters, with the state that belongs to this loss."""
        with self._only(), self._own_state():
            yield

    @contextmanager
    def _only(self) -> Iterator[None]:
        groups, contents = self.optimizer.param_groups, [group["params"] for group in self.optimizer.param_groups]
        for group, reached in itertools.zip_longest(groups, self.grouped[: len(groups)]):
            group["params"] = list(reached or ())
        self.optimizer.param_groups = [group for group in groups if group["params"]]
        try:
            yield
        finally:
            self.optimizer.param_groups = groups
            for group, parameters in zip(groups, contents, strict=True):
                group["params"] = parameters

    @contextmanager
    def _own_state(self) -> Iterator[None]:
        state: dict[Any, Any] = self.optimizer.state  # PyTorch declares tensors as keys, and takes names as well
        for key, parameter in self.own:
            state[parameter] = state.pop(key, {})
        try:
            yield
        finally:
            for key, parameter in self.own:
                state[key] = state.pop(parameter)


@dataclass(frozen=True)
class _Part:
    """The part of all optimizers that holds what one loss reaches."""

    whole: Updates
    loss: int

    def step(self) -> None:
        """Update what the loss reaches, in the last of the batches."""
        if self.whole.batches == 1 or self._gathered():
            for part in self.whole.parts[self.loss]:
                with part.alone():
                    self.whole.apply(part)

    def zero_grad(self) -> None:
        """Drop the gradients of what the loss reaches."""
        for parameter in self._parameters():
            parameter.grad = None

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for part in self.whole.parts[self.loss] for parameter in part.parameters]

    def _gathered(self) -> bool:
        """Add the gradients of this batch to those kept; in the last batch, leave their mean and return True.

        They are kept by loss: those of another loss to the same parameter are not mixed in.
        """
        whole, parameters = self.whole, self._parameters()
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


def _held(optimizer: torch.optim.Optimizer | _Reached) -> Iterator[nn.Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def average(gradients: list[Tensor | None], batches: int) -> None:
    """Divide summed gradients by the number of batches, in place."""
    found = [gradient for gradient in gradients if gradient is not None]
    if found:
        divide_all(found, batches)


def own_state_key(loss: str, parameter: str) -> str:
    """Return where an optimizer keeps the state of a parameter that belongs to one loss alone, by their names."""
    return f"{loss}/{parameter}"
