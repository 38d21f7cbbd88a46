"""Predict what each loss of a step costs, without data and without running anything: time, and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from localize.estimate.memory import Meter, empty_batch, sgd, without_values
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
    peak: int
    """Most bytes that live inside of it at one time, beside what lived before."""


def costs(local: LocalModel, found: Sequence[Unit], batch_size: int) -> tuple[Cost, ...]:
    """Return the cost of each unit on a batch.

    Where a step cannot be followed without values, time is that of the multiply-adds of the unit's blocks.
    """
    meter = Meter()
    times: dict[str, float] = {}
    peaks: dict[str, int] = {}

    def around(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*values: Any) -> Any:
            before = meter.flops + OPERATIONS_A_BYTE * meter.moved
            meter.peak = held = meter.held
            result = function(*values)
            times[name] = times.get(name, 0.0) + meter.flops + OPERATIONS_A_BYTE * meter.moved - before
            peaks[name] = max(peaks.get(name, 0), meter.peak - held)
            return result

        return call

    try:
        with fake_mode():
            fake = without_values(local).with_functions(around)
            x, y = empty_batch(local.plan.segments.trunk, batch_size)
            optimizer = sgd(fake.param_groups(lr=0.1))
            with meter:
                fake.step(x, y, optimizer)
    except RuntimeError:  # what it does depends on values
        return tuple(_by_blocks(local, unit) for unit in found)
    return tuple(Cost(times[unit.function], peaks[unit.function]) for unit in found)


def _by_blocks(local: LocalModel, unit: Unit) -> Cost:
    plan = local.plan
    loss = plan.losses[unit.loss]
    names = {*(f"segment_{k}" for k in range(loss.route.start, loss.route.stop + 1)), *loss.reach}
    return Cost(1.0 + sum(plan.block(name).macs for name in names), 0)
