"""Compare applied gradients with finite differences of the losses, in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from localize.audit.reference import Evaluation, Reference
from localize.ir import Block, Plan

STEPS = (1e-6, 1e-7, 1e-5)
"""Step sizes, tried in turn, each with a new direction.

In float64 a central difference with step 1e-6 has a rounding error of about 1e-16 / 1e-6 = 1e-10 of the loss and a
truncation error of 1e-12 of its third derivative. ReLU and max pooling have kinks: a unit that crosses one within the
step changes the difference by a share of its own gradient. At 1e-6 fewer than one in 1e5 units cross, so that a retry
with another direction and step misses them; a wrong gradient is wrong along each direction.
"""
CLOSE = 1e-4
"""Relative difference allowed: kinks and rounding stay two orders below it, a factor or sign error does not."""
TINY = 1e-9
"""Difference, relative to the loss, that is rounding: for blocks whose gradient vanishes."""


@dataclass
class _Point:
    """A loss at fixed entering values, as a function of the parameters of one block."""

    plan: Plan
    reference: Reference
    evaluation: Evaluation
    block: Block
    y: Tensor
    fixed: dict[str, Tensor]

    def value(self) -> float:
        """Return the loss; only the heads run where the segments cannot have changed."""
        here = self.evaluation
        with torch.no_grad():
            features: Sequence[Tensor] = here.features
            if self.block.role == "segment":
                here.before.restore()
                features = self.reference.segments(here.loss, here.entering)
            here.between.restore()
            return float(self.reference.terms(here.loss, features, self.y, self.fixed)[0])


def numeric(
    plan: Plan, reference: Reference, evaluations: Sequence[Evaluation], applied: Sequence[dict[str, Tensor]], run: Any
) -> tuple[list[str], str]:
    """Compare, for each loss and each block it declares, the central difference with the applied gradient.

    Args:
        plan: what is declared.
        reference: evaluates the losses; its parameters are moved, and put back.
        evaluations: the losses at the same point.
        applied: what the backward of each loss added to the gradients.
        run: the execution; says whether it is in float64.

    Returns:
        What is wrong, and the evidence if nothing is.
    """
    lines: list[str] = []
    worst, count, absent = 0.0, 0, 0
    if not run.double:
        return lines, "not measured: the model does not run in float64"
    everything = {name for name, p in run.local.named_parameters() if p.requires_grad}
    for evaluation, gradient in zip(evaluations, applied, strict=False):
        loss = evaluation.loss
        outside = everything - plan.reach(loss)
        absent += len(outside)
        lines += [f"{loss.name} applies a gradient to {name}" for name in sorted(outside & set(gradient))]
        for block in (plan.block(name) for name in loss.reach):
            if not block.parameters:
                continue
            missing = [name for name in block.parameters if name not in gradient]
            if missing:
                lines.append(f"{loss.name} applies no gradient to {missing[0]} ({len(missing)} of {block.name})")
                continue
            point = _Point(plan, reference, evaluation, block, run.y, _fixed(reference, loss_blocks(evaluation)))
            error, told = _best(point, gradient)
            count += 1
            worst = max(worst, error)
            if error > CLOSE:
                lines.append(f"{loss.name} along {block.name}: {told}")
    evidence = (
        f"{count} pairs of loss and block, largest relative difference {worst:.1e} (float64); "
        f"{absent} pairs of loss and parameter outside, without gradient"
    )
    return lines, evidence


def loss_blocks(evaluation: Evaluation) -> set[str]:
    """Return the shared blocks that a loss reads."""
    return {use.block for term in evaluation.loss.terms for use in term.uses}


def _fixed(reference: Reference, blocks: set[str]) -> dict[str, Tensor]:
    with torch.no_grad():
        return {name: reference.heads.get_submodule(name)().clone() for name in sorted(blocks)}


def _best(point: _Point, gradient: dict[str, Tensor]) -> tuple[float, str]:
    """Return the smallest relative difference over the retries, and what was compared."""
    best, told = float("inf"), ""
    for attempt, step in enumerate(STEPS):
        difference, slope = _compare(point, gradient, step, seed=attempt)
        scale = max(abs(slope), abs(difference))
        rounding = TINY * max(1.0, abs(float(point.evaluation.value)))
        error = abs(difference - slope) / scale if scale > rounding else 0.0
        if not error >= best:
            best, told = error, f"the central difference is {difference:.6g}, the applied gradient gives {slope:.6g}"
        if best <= CLOSE:
            break
    return best, told


def _compare(point: _Point, gradient: dict[str, Tensor], step: float, seed: int) -> tuple[float, float]:
    """Return the central difference along a direction, and the applied gradient along it.

    Half of the direction is random, half is the applied gradient itself, so that the slope is not small by chance.
    """
    parameters = {name: _parameter(point.reference, name) for name in point.block.parameters}
    generator = torch.Generator().manual_seed(seed)
    noise = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device) for n, p in parameters.items()}
    own = {name: gradient[name] for name in parameters}
    direction = {n: noise[n] / _norm(noise) + own[n] / (_norm(own) or 1.0) for n in parameters}
    slope = sum(float((direction[name] * own[name]).sum()) for name in parameters)
    with _moved(parameters, direction, step):
        up = point.value()
    with _moved(parameters, direction, -step):
        down = point.value()
    return (up - down) / (2 * step), slope


def _norm(tensors: dict[str, Tensor]) -> float:
    return sum(float(t.square().sum()) for t in tensors.values()) ** 0.5


@contextmanager
def _moved(parameters: dict[str, Tensor], direction: dict[str, Tensor], step: float) -> Iterator[None]:
    """Move parameters by ``step`` along ``direction``, and put them back."""
    saved = {name: p.detach().clone() for name, p in parameters.items()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.add_(direction[name], alpha=step)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(saved[name])


def _parameter(reference: Reference, name: str) -> Tensor:
    root, _, path = name.partition(".")
    return (reference.trunk if root == "trunk" else reference.heads).get_parameter(path)
