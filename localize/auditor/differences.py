"""Take finite differences of losses whose backward is not torch's own, in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from localize.auditor.reference import Evaluation, Reference
from localize.ir import Block, LocalLoss, Plan

STEPS = (1e-6, 1e-7, 1e-5)
"""How much the loss is moved, tried in turn, each with a new direction: steps are divided by slopes above 1.

In float64 a central difference that moves the loss by 1e-6 has a rounding error of about 1e-16 / 1e-6 = 1e-10, and a
truncation error of 1e-12 of the third derivative. A loss after the BatchNorm of two images is steep and bends within
1e-4, hence the division. ReLU and max pooling have kinks: a unit that crosses one within the step changes the
difference by a share of its own gradient. At 1e-6 fewer than one in 1e5 units cross, so that a retry with another
direction and step misses them; a wrong gradient is wrong along each direction.
"""
CLOSE = 1e-4
"""Relative difference allowed: kinks and rounding stay two orders below it, a factor or sign error does not."""
TINY = 1e-9
"""Difference, relative to the loss, that is rounding: for blocks whose gradient vanishes."""
COARSE_STEPS = (1e-6, 3e-6, 1e-5, 1e-4, 1e-3)
COARSE = 2e-2
"""The same for a loss that is computed in float32 in part, whatever the type of the parameters (linear attention casts
so): its rounding of 1e-7 has to stay small beside the step, which lets more units cross a kink."""
NOISE = 1e-12
"""Rounding of a loss in float64, relative to the loss, with a margin; one computed in float32 in part has 1e-7."""


@dataclass(frozen=True)
class _Comparison:
    """A central difference beside the slope that the applied gradient gives."""

    error: float
    allowed: float
    told: str


@dataclass
class _Point:
    """A loss at fixed entering values, as a function of the parameters of one block."""

    plan: Plan
    reference: Reference
    evaluation: Evaluation
    block: Block
    fixed: dict[str, Tensor]

    def value(self) -> float:
        """Return the loss; only the heads run where the segments cannot have changed."""
        here = self.evaluation
        with torch.no_grad(), _restored(self.reference):
            features = here.features
            if self.block.role in ("segment", "tied", "side"):
                here.before.restore()
                features = self.reference.segments(here.loss, here.entering)
            here.between.restore()
            return float(self.reference.terms(here, features, self.fixed)[0])


def numeric(run: Any, applied: Sequence[dict[str, Tensor]]) -> tuple[list[str], str]:
    """Say which losses apply a gradient where they should not, or none where they should; take differences.

    Gradients are compared elsewhere, with those of autograd. Central differences are a question to the model's own code
    where its backward is not torch's: a difference that is not the gradient is told, and fails nothing, since a
    stop-gradient (x + (x.round() - x).detach()) or a kink is what the user wrote.

    Args:
        run: the execution.
        applied: what the backward of each loss added to the gradients.

    Returns:
        What is wrong, and the evidence if nothing is.
    """
    plan: Plan = run.plan
    referred = run.referred
    doubtful = [one for one, own in zip(referred.evaluations, referred.own_backward, strict=True) if own]
    lines: list[str] = []
    found: list[tuple[str, _Comparison]] = []
    absent = 0
    idle: set[str] = set()
    everything = {name for name, p in run.local.named_parameters() if p.requires_grad}
    for loss, gradient in zip(plan.losses, applied, strict=False):
        declared = plan.reach(loss)
        absent += len(everything - declared)
        lines += [f"{loss.name} applies a gradient to {name}" for name in sorted(set(gradient) - declared)]
        for block in (plan.block(name) for name in loss.reach):
            missing = [name for name in block.parameters if name not in gradient]
            if missing:
                idle |= set(missing) & run.idle
                missing = [name for name in missing if name not in run.idle]
            if missing:
                lines.append(f"{loss.name} applies no gradient to {missing[0]} ({len(missing)} of {block.name})")
            elif any(one.loss is loss for one in doubtful) and run.double:
                found += _differences(run, next(one for one in doubtful if one.loss is loss), block, gradient)
    return lines, _told(found, absent) + (f"; {len(idle)} have none in plain backpropagation either" if idle else "")


def _differences(
    run: Any, evaluation: Evaluation, block: Block, gradient: dict[str, Tensor]
) -> list[tuple[str, _Comparison]]:
    """Take the difference of a loss along a block."""
    own = [name for name in block.parameters if name in gradient]
    if not own or has_replaced_backward(run.plan, evaluation.loss, block):
        return []
    reference = run.referred.reference
    point = _Point(run.plan, reference, evaluation, replace(block, parameters=tuple(own)), {})
    point.fixed = _fixed(reference, loss_blocks(evaluation))
    return [(f"{evaluation.loss.name} along {block.name}", _best(point, gradient))]


@contextmanager
def _restored(reference: Reference) -> Iterator[None]:
    """Put the buffers of the reference back: two evaluations start from the same state."""
    buffers = [*reference.trunk.buffers(), *reference.heads.buffers()]
    held = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, held, strict=True):
            buffer.copy_(value)


def has_replaced_backward(plan: Plan, loss: LocalLoss, block: Block) -> bool:
    """Tell whether the gradient of ``block`` passes a backward that is declared not to be that of its forward."""
    heads = {term.head for term in loss.terms if term.head is not None and plan.block(term.head).feedback}
    return block.role in ("segment", "tied") and bool(heads or plan.feedback)


def _told(found: Sequence[tuple[str, _Comparison]], absent: int) -> str:
    outside = f"{absent} pairs of loss and parameter outside, without gradient"
    if not found:
        return f"{outside}; every backward is torch's own"
    agree = [one for _, one in found if one.error <= one.allowed]
    told = f"{outside}; {len(agree)} of {len(found)} central differences after a backward of the model's own agree"
    apart = [f"{where}: {one.told}" for where, one in found if not one.error <= one.allowed]
    return f"{told}; a stop-gradient or a kink in the model's code: {'; '.join(apart[:3])}" if apart else told


def loss_blocks(evaluation: Evaluation) -> set[str]:
    """Return the shared blocks that a loss reads."""
    return {use.block for term in evaluation.loss.terms for use in term.uses}


def _fixed(reference: Reference, blocks: set[str]) -> dict[str, Tensor]:
    with torch.no_grad():
        return {name: reference.heads.get_submodule(name)().clone() for name in sorted(blocks)}


def _best(point: _Point, gradient: dict[str, Tensor]) -> _Comparison:
    """Return the comparison of the smallest error over the retries."""
    tried = []
    for attempt, step in enumerate(STEPS):
        tried.append(_comparison(point, gradient, step, attempt, CLOSE))
        if tried[-1].error <= CLOSE:
            return tried[-1]
    if _is_noisy(point, gradient):
        tried = [replace(comparison, allowed=COARSE) for comparison in tried]
        for attempt, step in enumerate(COARSE_STEPS):
            if min(comparison.error for comparison in tried) <= COARSE:
                break
            tried.append(_comparison(point, gradient, step, attempt, COARSE))
    return min(tried, key=lambda comparison: comparison.error)


def _comparison(point: _Point, gradient: dict[str, Tensor], step: float, seed: int, allowed: float) -> _Comparison:
    difference, slope = _compare(point, gradient, step, seed, scaled=allowed == CLOSE)
    scale = max(abs(slope), abs(difference))
    loss = max(1.0, abs(float(point.evaluation.value)))
    rounding = 8 * torch.finfo(torch.float64).eps * loss / step  # what a saturated loss is known to
    error = max(0.0, abs(difference - slope) - rounding) / scale if not scale <= TINY * loss else 0.0
    told = f"the central difference is {difference:.6g}, the applied gradient gives {slope:.6g}"
    return _Comparison(error if error == error else float("inf"), allowed, told)


def _is_noisy(point: _Point, gradient: dict[str, Tensor]) -> bool:
    """Tell whether the loss jumps where float64 would give a straight line: on a step that moves it by 1e-8."""
    worst = 0.0
    for seed in range(3):
        direction, slope = _direction(point, gradient, seed)
        step = 1e-8 / max(1.0, abs(slope))
        bend = _along(point, direction, step) + _along(point, direction, -step) - 2 * _along(point, direction, 0.0)
        worst = max(worst, abs(bend))
    return worst > NOISE * max(1.0, abs(float(point.evaluation.value)))


def _compare(
    point: _Point, gradient: dict[str, Tensor], step: float, seed: int, *, scaled: bool
) -> tuple[float, float]:
    """Return the central difference along a direction, and the applied gradient along it."""
    direction, slope = _direction(point, gradient, seed)
    step = step / max(1.0, abs(slope)) if scaled else step
    return (_along(point, direction, step) - _along(point, direction, -step)) / (2 * step), slope


def _direction(point: _Point, gradient: dict[str, Tensor], seed: int) -> tuple[dict[str, Tensor], float]:
    """Return a direction in the parameters of the block, and the applied gradient along it.

    Half of the direction is random, half is the applied gradient itself, so that the slope is not small by chance.
    """
    generator = torch.Generator().manual_seed(seed)
    own = {name: gradient[name] for name in point.block.parameters}
    noise = {n: torch.randn(g.shape, generator=generator, dtype=g.dtype).to(g.device) for n, g in own.items()}
    direction = {n: noise[n] / _norm(noise) + g / (_norm(own) or 1.0) for n, g in own.items()}
    return direction, sum(float((direction[name] * g).sum()) for name, g in own.items())


def _along(point: _Point, direction: dict[str, Tensor], step: float) -> float:
    """Return the loss where the parameters are moved by ``step``; they are put back."""
    parameters = {name: _parameter(point.reference, name) for name in direction}
    saved = {name: p.detach().clone() for name, p in parameters.items()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.add_(direction[name], alpha=step)
        try:
            return point.value()
        finally:
            for name, parameter in parameters.items():
                parameter.copy_(saved[name])


def _norm(tensors: dict[str, Tensor]) -> float:
    return sum(float(t.square().sum()) for t in tensors.values()) ** 0.5


def _parameter(reference: Reference, name: str) -> Tensor:
    root, _, path = name.partition(".")
    return (reference.trunk if root == "trunk" else reference.heads).get_parameter(path)
