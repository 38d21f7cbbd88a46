"""Predict the seconds of a training step from those of its distinct segments, each timed once.

Segments that compute the same (with equal recorded graphs, see :mod:`localize.runtime.capture`) take the same time, so
only one of them is run. Times for one plan are reused for the next, so many plans of a model take little more work than
one.
"""

from __future__ import annotations

import hashlib
import inspect
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from localize.estimate.memory import MakeOptimizer, empty_batch, sgd, without_values
from localize.runtime.capture import State, capture, forms
from localize.runtime.model import LocalModel
from localize.runtime.updates import Updates
from localize.torch_names import fake_mode

WARM, STEPS = 1, 3
"""How many times a segment is run before it is timed, and while it is timed."""


@dataclass(frozen=True)
class Call:
    """One call of a training function of the text: what it computes, and its arguments."""

    function: str
    signature: str
    """Equal for calls that compute the same."""
    forms: tuple[Any, ...]
    """Forms of the arguments after model and heads, see :func:`localize.runtime.capture.forms`."""


@dataclass(frozen=True)
class Prediction:
    """The seconds of one training step, and their components."""

    seconds: float
    calls: tuple[tuple[Call, float], ...]
    """All calls with their seconds."""
    update: float
    """Seconds of the optimizer outside these calls."""
    timed: int
    """Number of calls that were run for this prediction."""


def predict(
    local: LocalModel, batch_size: int, known: dict[str, float], *, optimizer: MakeOptimizer = sgd
) -> Prediction:
    """Return the predicted seconds of a step of ``local`` on its device, without running the whole step.

    Args:
        local: the local model, with data, in train mode. Its weights are not changed; its running statistics are.
        batch_size: N, the number of images.
        known: seconds by signature of calls already timed on this machine; new times are added.
        optimizer: makes the optimizer from parameter groups; default: SGD with momentum.

    Returns:
        The seconds of the step, and of its calls.

    Raises:
        RuntimeError: see :func:`record`.
    """
    calls = record(local, batch_size)
    updates = local.updates(optimizer(local.param_groups(lr=0.0)))
    before = len(known)
    for call in calls:
        if call.signature not in known:
            known[call.signature] = _timed(local, call, updates)
    found = tuple((call, known[call.signature]) for call in calls)
    inside = calls[0].function == "train_step" or (local.plan.update == "immediate" and not local.plan.micro_batch)
    update = 0.0 if inside else _update(local, updates)
    return Prediction(sum(seconds for _, seconds in found) + update, found, update, len(known) - before)


def record(local: LocalModel, batch_size: int) -> list[Call]:
    """Return the calls of training functions in one step, in order. Nothing is run.

    Raises:
        RuntimeError: the step depends on values of tensors, or is not a fixed graph of operations.
    """
    found: list[Call] = []
    with fake_mode() as mode:
        fake = without_values(local)
        state = State(fake.trunk, fake.heads, mode=mode)

        def recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def call(trunk: nn.Module, heads: nn.Module, *values: Any) -> Any:
                signature = capture(function, (trunk, heads), values, state).signature
                found.append(Call(name, signature, forms(values)))
                return function(trunk, heads, *values)

            return call

        def whole(function: Callable[..., Any]) -> Callable[..., Any]:  # sweeps are not a fixed graph
            def call(trunk: nn.Module, heads: nn.Module, *values: Any) -> Any:
                signature = hashlib.sha256(f"{local.source} {forms(values)}".encode()).hexdigest()
                found.append(Call("train_step", signature, forms(values)))
                return function(trunk, heads, *values)

            return call

        x, y = empty_batch(local.plan.segments.trunk, batch_size)
        if local.plan.exact:
            functions = fake.functions_of_text
            functions["train_step"] = whole(functions["train_step"])
        else:
            fake = fake.with_functions(recorded)
        fake.step(x, y, sgd(fake.param_groups(lr=0.0)))
    return found


def _timed(local: LocalModel, call: Call, updates: Updates) -> float:
    """Return the median seconds of a call on random values."""
    function = local.functions_of_text[call.function]
    device = next(local.parameters()).device
    values = [_value(form, local.plan.segments.trunk.num_classes, device) for form in call.forms]
    takes = len(inspect.signature(function).parameters) - 2
    values += [updates] * (takes - len(values))

    def run() -> None:
        function(local.trunk, local.heads, *values)

    return _median(run, lambda: local.zero_grad(set_to_none=True), device)


def _update(local: LocalModel, updates: Updates) -> float:
    """Return the median seconds in which the optimizer updates everything and drops the gradients."""

    def run() -> None:
        updates.step()
        updates.zero_grad()

    def fill() -> None:
        for parameter in {id(p): p for loss in updates.parts for part in loss for p in part.parameters}.values():
            parameter.grad = torch.zeros_like(parameter)

    fill()
    seconds = _median(run, fill, next(local.parameters()).device)
    updates.zero_grad()
    return seconds


def _median(run: Callable[[], None], between: Callable[[], None], device: torch.device) -> float:
    found = []
    for number in range(WARM + STEPS):
        started = now(device)
        run()
        if number >= WARM:
            found.append(now(device) - started)
        between()
    return statistics.median(found)


def now(device: torch.device) -> float:
    """Return the time in seconds, after a device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _value(form: Any, classes: int, device: torch.device) -> Any:
    """Make an argument with the recorded form."""
    if not isinstance(form, tuple):
        return form
    shape, strides, dtype, _ = form
    made = torch.empty_strided(shape, strides, dtype=dtype, device=device)
    return made.normal_() if dtype.is_floating_point else made.random_(classes)
