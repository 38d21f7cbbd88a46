"""One pass over images: training with the generated step, or testing the predictions of the model and its losses.

Losses and predictions stay on the device during a pass. They are read at its end, and every ``READ_EVERY`` steps to
check that the losses are finite.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from localize import inference
from localize.errors import LocalizeError
from localize.ir import Plan
from localize.recipes.settings import TrainConfig
from localize.runtime.model import LocalModel, StepResult
from localize.torch_names import largest_of_all
from localize.train.parallel import ALONE, Team
from localize.train.state import Position, Tally

READ_EVERY = 50
LEAST_SCALE = 1e-4
"""Smallest scale of the losses: below it, gradients overflow at any scale. This is fairseq's limit."""


class DivergedError(LocalizeError, ArithmeticError):
    """A local loss became infinite or NaN, or its gradients did so at every scale of the loss."""

    exit_code = 1


@dataclass(frozen=True)
class Outcome:
    """The result of a pass over images: losses (means over batches) and accuracies (0..1) by the name of the loss."""

    losses: Mapping[str, float]
    accuracy: Mapping[str, float]
    final_accuracy: float
    images: int


def train_epoch(
    local: LocalModel,
    optimizer: Optimizer,
    batches: Iterable[Sequence[Tensor]],
    device: torch.device,
    config: TrainConfig,
    *,
    total: int,
    tally: Tally | None = None,
    done: int = 0,
    behind_step: Callable[[], None] = lambda: None,
    team: Team = ALONE,
    scaler: torch.amp.GradScaler | None = None,
) -> Outcome:
    """Take one optimizer step for each batch, or for every ``config.grad_accum_steps`` of them.

    Args:
        local: the local model, in either mode; it is left in train mode.
        optimizer: made from ``local.param_groups(...)``.
        batches: the remaining batches of the epoch: images (N, C, H, W) and labels, (N,) or (N, Z).
        device: the device of ``local``.
        config: only ``grad_accum_steps``, ``amp``, ``amp_dtype`` and ``channels_last`` are used here.
        total: number of batches of the whole epoch, at least one.
        tally: results of the epoch so far, which are updated.
        done: number of steps before the epoch, for the message if a loss is not finite.
        behind_step: called after each optimizer step, once ``tally`` includes it.
        team: the processes; the outcome is for all of them together.
        scaler: the gradient scaler for float16. A step whose update it skips still counts as a step.

    Returns:
        The losses and accuracies of the epoch.

    Raises:
        DivergedError: a loss became infinite or NaN (a smaller scale cannot help, since losses are checked before they
            are scaled), or the scale fell below ``LEAST_SCALE``. Both are checked every ``READ_EVERY`` steps.
    """
    local.train()
    tally = Tally() if tally is None else tally
    started = time.perf_counter() - tally.seconds
    several = config.grad_accum_steps
    dtype = torch.float16 if config.scales else torch.bfloat16
    rows: list[Tensor] = []
    for x, y in batches:
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        if config.channels_last and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        i = tally.batches % several
        size = min(several, total - tally.batches + i)
        with torch.autocast(device.type, dtype) if config.amp else nullcontext():
            result = local.step(x, y, optimizer, batch=(i, size), scaler=scaler)
        names = list(result.losses)
        rows.append(torch.stack([loss.float() for loss in result.losses.values()]))
        count_right(tally.right, result.classes, y, local.plan)
        if any(one is not None for one in result.returned.values()):  # a process of a pipeline may have none
            tally.final_right += is_right(_answered(local, result), y).sum()
        del result  # so that no scores are kept while the next batch makes its own
        tally.batches += 1
        tally.images += len(y)
        if i + 1 < size:
            continue
        tally.names = names
        tally.losses.append(rows[0] if size == 1 else torch.stack(rows).mean(0))
        rows.clear()
        tally.seconds = time.perf_counter() - started
        behind_step()
        if len(tally.losses) % READ_EVERY == 0:
            recent = torch.stack(tally.losses[-READ_EVERY:])
            check_finite(local, tally.names, recent, done + len(tally.losses) - READ_EVERY)
            check_scale(scaler, done + len(tally.losses))
    table = torch.stack(tally.losses)
    check_finite(local, tally.names, table, done)
    check_scale(scaler, done + len(tally.losses))
    tally.seconds = time.perf_counter() - started
    means = dict(zip(tally.names, (team.total(table.double().mean(0)) / team.size).tolist(), strict=True))
    shares = {loss.name: loss.part[1] if loss.part else 1 for loss in local.plan.losses}
    images = tally.images * team.size
    accuracies = {name: team.total(n).item() * shares[name] / images for name, n in tally.right.items()}
    final = team.total(torch.as_tensor(tally.final_right, device=device))
    return Outcome(means, accuracies, int(final) / images, images)


def _answered(local: LocalModel, result: StepResult) -> Tensor:
    """Return the classes (N,) that the model predicts in a training step."""
    if local.plan.answer == "output":
        return result.predicted
    last = {loss.name for loss in local.plan.outputs}
    found = [one for name, one in result.scores.items() if one is not None and name not in last]
    return inference.softmax_sum(found).argmax(1) if found else result.predicted


@torch.no_grad()
def evaluate(
    local: LocalModel, batches: Iterable[Sequence[Tensor]], device: torch.device, team: Team = ALONE
) -> Outcome:
    """Count right predictions in eval mode, of the model and of every loss that makes class scores.

    The model's prediction is that of its own forward, if some loss trains it (see :func:`localize.inference.answer`).
    If the model computes other operations in eval mode than in train mode, only its own forward is tested, because its
    segments contain the operations of train mode. The model is left in eval mode.

    Args:
        local: the local model.
        batches: images (N, C, H, W) and labels, (N,) or (N, Z).
        device: the device of ``local``.
        team: the processes, each with batches of its own; the outcome is for all of them together.

    Returns:
        The accuracies, 0..1; there are no losses.
    """
    local.eval()
    by_segment = not local.plan.segments.trunk.eval_differs
    right: dict[str, Tensor] = {}
    final_right, images = torch.zeros((), device=device), 0
    for x, y in batches:
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        if by_segment:
            count_right(right, {name: scores.argmax(1) for name, scores in local.scores(x).items()}, y)
        final_right += is_right(inference.answer(local, x).argmax(1), y).sum()
        images += len(y)
    counts = team.gathered(({name: int(n) for name, n in right.items()}, int(final_right), images))
    images = sum(seen for _, _, seen in counts)
    names = dict.fromkeys(name for found, _, _ in counts for name in found)
    shown = max(images, 1)  # there are none if the pass was stopped at once
    accuracy = {name: sum(found.get(name, 0) for found, _, _ in counts) / shown for name in names}
    return Outcome({}, accuracy, sum(final for _, final, _ in counts) / shown, images)


def count_right(
    right: dict[str, Tensor], classes: Mapping[str, Tensor | None], y: Tensor, plan: Plan | None = None
) -> None:
    """Add to ``right`` how many of the classes (N,) match the labels ``y``, see :func:`is_right`.

    With a ``plan``, the classes of a loss on a part of the batch are compared with that part of ``y``.
    """
    parts = {loss.name: loss.part for loss in plan.losses if loss.part} if plan else {}
    for name, values in classes.items():
        if values is not None:
            labels = torch.tensor_split(y, parts[name][1])[parts[name][0]] if name in parts else y
            right[name] = right.get(name, 0) + is_right(values, labels).sum()


def is_right(predicted: Tensor, y: Tensor) -> Tensor:
    """Return for each image whether its predicted class is right, (N,).

    Args:
        predicted: classes (N,).
        y: class ids (N,); or labels (N, Z). A class is then right if its label is positive and no other is higher: the
            class with the larger share of a mixed image, or any of several true classes.
    """
    if not y.is_floating_point():
        return predicted == y
    highest = y.amax(1)
    return (y.gather(1, predicted[:, None])[:, 0] == highest) & (highest > 0)


def check_finite(local: LocalModel, names: Sequence[str], losses: Tensor, done: int) -> None:
    """Raise an error if any of the losses (steps, K), in the order of ``names``, is not finite.

    Raises:
        DivergedError: a loss is infinite or NaN; the message names the first step and segment.
    """
    bad = ~losses.isfinite()
    if not bad.any():
        return
    row = int(bad.any(1).nonzero()[0])
    name = names[int(bad[row].nonzero()[0])]
    loss = next(loss for loss in local.plan.losses if loss.name == name)
    segment = local.plan.segments.segments[loss.route.stop]
    raise DivergedError(
        f"the loss of {segment.name} became {losses[row][bad[row]][0].item()} in step {done + row + 1}.",
        facts=(
            f"it is {loss.name}; the segment ends at {segment.ends_at}.",
            f"losses that were not finite in this step: {int(bad[row].sum())} of {losses.shape[1]}.",
        ),
        help="a lower --lr, --clip-grad 1, or --warmup-epochs",
    )


def check_scale(scaler: torch.amp.GradScaler | None, steps: int) -> None:
    """Raise an error if the scale of the losses has become too small.

    Raises:
        DivergedError: it is below ``LEAST_SCALE``.
    """
    scale = 1.0 if scaler is None else scaler.get_scale()
    if scale < LEAST_SCALE:
        raise DivergedError(
            f"the scale of the losses fell to {scale:.1g} by step {steps}.",
            facts="it is halved whenever a gradient is infinite or NaN, and some are at every scale.",
            help="use --amp-dtype bfloat16, or a lower --lr",
        )


def check_weights(local: LocalModel, position: Position) -> None:
    """Raise an error if losses or weights are not all finite.

    Raises:
        DivergedError: a loss of this epoch, or a weight, is infinite or NaN.
    """
    tally = position.tally
    if tally.losses:
        check_finite(local, tally.names, torch.stack(tally.losses), position.steps - len(tally.losses))
    trained = {name for names in local.reached() for name in names}
    parameters = {name: p.detach() for name, p in local.named_parameters() if name in trained}
    norms = largest_of_all(list(parameters.values()))
    bad = [name for name, norm in zip(parameters, torch.stack(norms).isfinite().tolist(), strict=True) if not norm]
    if bad:
        loss = next(one for one, names in zip(local.plan.losses, local.reached(), strict=True) if bad[0] in names)
        raise DivergedError(
            f"the weights {bad[0]} became infinite or not a number by step {position.steps}.",
            facts=(f"{loss.name} trains them.", f"such weights: {len(bad)} of {len(parameters)}."),
            help="a lower --lr, --clip-grad 1, or --warmup-epochs",
        )
