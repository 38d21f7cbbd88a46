"""Predict what each loss of a step costs, without data and without running anything: time, and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from localize.estimate.memory import empty_batch, make_states, meter_of, sgd, without_values
from localize.pipeline.units import Unit
from localize.runtime.model import LocalModel
from localize.torch_names import fake_mode

OPERATIONS_A_BYTE = 8
"""Floating-point operations in the time in which a byte is moved: between those of a core and those of a GPU."""


@dataclass(frozen=True)
class Cost:
    """What a unit costs."""

    time: float
    """In operations; the bytes that are moved count for as many as could be done meanwhile."""
    before: int
    """Bytes that live when it begins, in a step of one process."""
    peak: int
    """Most bytes that live inside of it at one time, in a step of one process."""


def needed(spent: Sequence[Cost]) -> int:
    """Return the most bytes that consecutive units need, beside what lives when the first one begins.

    These are gradients, activations, and what a unit leaves for the next; weights and optimizer states live before.
    """
    return max(one.peak for one in spent) - spent[0].before


def with_momentum(local: LocalModel) -> Optimizer:
    """Return SGD with momentum for a local model."""
    return sgd(local.param_groups(lr=0.1))


def costs(
    local: LocalModel,
    found: Sequence[Unit],
    batch_size: int,
    *,
    optimizer: Callable[[LocalModel], Optimizer] = with_momentum,
) -> tuple[Cost, ...]:
    """Return the cost of each unit on a batch, with an optimizer that has made its state before.

    Where a step cannot be followed without values, time is that of the multiply-adds of the unit's blocks.
    """
    times: dict[str, float] = {}
    lives: dict[str, tuple[int, int]] = {}

    def around(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*values: Any) -> Any:
            before = meter.flops + OPERATIONS_A_BYTE * meter.moved
            meter.peak = held = meter.held
            result = function(*values)
            times[name] = times.get(name, 0.0) + meter.flops + OPERATIONS_A_BYTE * meter.moved - before
            first, most = lives.get(name, (held, 0))
            lives[name] = first, max(most, meter.peak)
            return result

        return call

    try:
        with fake_mode():
            fake = without_values(local).with_functions(around)
            x, y = empty_batch(local.plan.segments.trunk, batch_size)
            made = optimizer(fake)
            make_states(fake, made)
            meter = meter_of(fake.trunk, fake.heads, x, y, [made])
            with meter:
                fake.step(x, y, made)
    except RuntimeError:  # what it does depends on values
        return tuple(_by_blocks(local, unit) for unit in found)
    return tuple(Cost(times[unit.function], *lives[unit.function]) for unit in found)


def _by_blocks(local: LocalModel, unit: Unit) -> Cost:
    plan = local.plan
    loss = plan.losses[unit.loss]
    names = {*(f"segment_{k}" for k in range(loss.route.start, loss.route.stop + 1)), *loss.reach}
    return Cost(1.0 + sum(plan.block(name).macs for name in names), 0, 0)
