"""Train a model by a local-learning method: the plain loop around ``local.step`` that a user would write.

Losses and predictions stay on the device while an epoch runs; they are read at its end, and every ``READ_EVERY`` steps
to see that the losses are finite.
"""

from __future__ import annotations

import dataclasses
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import timm.optim
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim import Optimizer

from localize import inference, recipes
from localize.compiler import transform
from localize.devices import choose_device
from localize.errors import LocalizeError, OptionError, UnknownNameError, did_you_mean
from localize.ir import Plan
from localize.recipes import Recipe
from localize.runtime import LocalModel
from localize.train import data, runs
from localize.train.config import TrainConfig
from localize.train.schedules import learning_rate
from localize.zoo import input_shape_of, resolve, weights

READ_EVERY = 50


class DivergedError(LocalizeError, ArithmeticError):
    """A local loss became infinite or not a number."""

    exit_code = 1


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, the metrics of each epoch as in ``metrics.jsonl``, and the trained model."""

    output: Path
    metrics: tuple[Mapping[str, Any], ...]
    local: LocalModel


def run(config: TrainConfig, *, force: bool = False, progress: bool | None = None) -> Run:
    """Train as ``config`` says; print one line per epoch; leave configuration, metrics and weights in a folder.

    An epoch's line in ``metrics.jsonl`` holds ``epoch`` (from 1), ``step`` (optimizer steps so far), ``train_loss``
    (of the model's own output, mean over the epoch's batches), ``train_accuracy`` (0..1, of predictions made while
    training, each before its update), ``test_accuracy`` (0..1, of the model's own forward in eval mode after the
    epoch), ``lr`` (during the epoch), ``images_per_second`` (loading and training, without evaluation), and
    ``segments``: for every local loss its ``name``, ``route`` (first and last segment), ``train_loss``,
    ``train_accuracy`` and ``test_accuracy`` (None where the loss makes no class scores, or see :func:`evaluate`).

    Args:
        config: what to do.
        force: replace an earlier run in ``config.output``.
        progress: show a bar on stderr; default: if stderr is a terminal.

    Raises:
        LocalizeError: the model, method, data, device or folder cannot be had; nothing has been written then.
        DivergedError: a loss became infinite or not a number. Nothing is exported; earlier epochs' metrics stay.
    """
    device = choose_device(config.device)
    folder = None if config.output is None else runs.named(config.output, force=force)
    recipe = merge(config)

    seed_everything(config.seed)
    source = resolve(config.model)
    model = recipes.create_model(recipe, pretrained=config.pretrained)
    begun = begin(model, recipe, config)
    recipe = dataclasses.replace(recipe, input_shape=input_shape_of(source, model, recipe.input_shape))
    splits = data.load(config.data, recipe.input_shape, data_dir=config.data_dir)
    batches = data.training_batches(
        splits.train,
        config.batch_size,
        generator=torch.Generator().manual_seed(config.seed),
        workers=config.workers,
        pin=device.type == "cuda",
    )
    local = transform(model, recipe, example_input=splits.train[[0, 1]][0], name=source.name).to(device)
    optimizer = create_optimizer(local, config)

    folder = folder or runs.numbered(f"{config.model}-{recipe.method}-{config.data}-seed{config.seed}")
    runs.start(folder, recipe)
    print("\n".join([headline(local, splits, device), *begun]), flush=True)

    show = sys.stderr.isatty() if progress is None else progress
    metrics: list[dict[str, Any]] = []
    done = 0
    for epoch in range(1, config.epochs + 1):
        set_learning_rate(optimizer, learning_rate(config, epoch))
        steps = len(batches) if config.max_steps is None else min(len(batches), config.max_steps - done)
        # A whole pass is run to its end: the sampler draws once more there, and a plain loop would have it do so.
        taken = batches if steps == len(batches) else islice(batches, steps)
        started = time.perf_counter()
        with watching(f"epoch {epoch}/{config.epochs}", steps, show) as advance:
            trained = train_epoch(local, optimizer, taken, device, done, advance)
        seconds = time.perf_counter() - started
        done += steps
        tested = evaluate(local, data.evaluation_batches(splits.test, config.batch_size), device)
        speed = {"lr": optimizer.param_groups[0]["lr"], "images_per_second": round(trained.images / seconds, 1)}
        metrics.append({"epoch": epoch, "step": done} | summarize(local, trained, tested) | speed)
        runs.append_metrics(folder, metrics[-1])
        print(epoch_line(metrics[-1], config.epochs), flush=True)
        if done == config.max_steps:
            break
    runs.finish(folder, local)
    print(f"weights: {folder / runs.BACKBONE}", flush=True)
    return Run(folder, tuple(metrics), local)


def begin(model: nn.Module, recipe: Recipe, config: TrainConfig) -> list[str]:
    """Load the weights that training begins with, if a file holds them; return lines that say what was loaded.

    Raises:
        MissingError: the file does not hold the weights of ``model``.
    """
    if config.pretrained:
        return [f"weights: as published for {recipe.model}"]
    if config.initial_checkpoint is None:
        return []
    loaded = weights.load_file(model, config.initial_checkpoint, recipe.num_classes)
    return [f"weights: {config.initial_checkpoint}, {loaded}"]


@dataclass(frozen=True)
class Outcome:
    """What a pass over images has shown: loss (mean over batches) and accuracy (0..1) by the name of the loss."""

    losses: Mapping[str, float]
    accuracy: Mapping[str, float]
    final_accuracy: float
    images: int


def train_epoch(
    local: LocalModel,
    optimizer: Optimizer,
    batches: Iterable[Sequence[Tensor]],
    device: torch.device,
    done: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> Outcome:
    """Take one optimizer step for each batch.

    Args:
        local: in either mode; it is left in train mode.
        optimizer: over ``local.param_groups(...)``.
        batches: (images, class ids) pairs, at least one.
        device: where ``local`` is.
        done: steps taken before, for the message if a loss is not finite.
        advance: called after each step.

    Raises:
        DivergedError: a loss became infinite or not a number. It is looked for every ``READ_EVERY`` steps.
    """
    local.train()
    losses: list[Tensor] = []
    right: dict[str, Tensor] = {}
    final_right, images = torch.zeros((), device=device), 0
    for x, y in batches:
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        result = local.step(x, y, optimizer)
        losses.append(torch.stack([loss.float() for loss in result.losses.values()]))
        count_right(right, result.scores, y, local.plan)
        final_right += (result.logits.argmax(1) == y).sum()
        images += len(y)
        advance()
        if len(losses) % READ_EVERY == 0:
            check_finite(local, torch.stack(losses[-READ_EVERY:]), done + len(losses) - READ_EVERY)
    table = torch.stack(losses)
    check_finite(local, table, done)
    means = dict(zip(result.losses, table.double().mean(0).tolist(), strict=True))
    shares = {loss.name: loss.part[1] if loss.part else 1 for loss in local.plan.losses}
    accuracies = {name: n.item() * shares[name] / images for name, n in right.items()}
    return Outcome(means, accuracies, final_right.item() / images, images)


@torch.no_grad()
def evaluate(local: LocalModel, batches: Iterable[Sequence[Tensor]], device: torch.device) -> Outcome:
    """Count right predictions in eval mode: of what the model answers, and of every loss that makes class scores.

    The answer is that of the model's own forward, where some loss trains it (see :func:`localize.inference.answer`).

    Where the model computes other operations in eval than in train mode, its segments (which hold those of train mode)
    say nothing about it: then only its own forward is looked at. The model is left in eval mode.
    """
    local.eval()
    by_segment = not local.plan.segments.trunk.eval_differs
    right: dict[str, Tensor] = {}
    final_right, images = torch.zeros((), device=device), 0
    for x, y in batches:
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        if by_segment:
            count_right(right, local.scores(x), y)
        final_right += (inference.answer(local, x).argmax(1) == y).sum()
        images += len(y)
    return Outcome({}, {name: n.item() / images for name, n in right.items()}, final_right.item() / images, images)


def count_right(
    right: dict[str, Tensor], scores: Mapping[str, Tensor | None], y: Tensor, plan: Plan | None = None
) -> None:
    """Add to ``right`` how many of the class scores (N, Z) are highest at the class ids ``y`` (N,).

    With a ``plan``, scores of a loss on a part of the batch are compared with that part of ``y``.
    """
    parts = {loss.name: loss.part for loss in plan.losses if loss.part} if plan else {}
    for name, values in scores.items():
        if values is not None:
            labels = torch.tensor_split(y, parts[name][1])[parts[name][0]] if name in parts else y
            right[name] = right.get(name, 0) + (values.argmax(1) == labels).sum()


def check_finite(local: LocalModel, losses: Tensor, done: int) -> None:
    """Refuse losses (steps, K), in the order of the plan, that are not all finite: name the first step and segment.

    Raises:
        DivergedError: a loss is infinite or not a number.
    """
    bad = ~losses.isfinite()
    if not bad.any():
        return
    row = int(bad.any(1).nonzero()[0])
    loss = local.plan.losses[int(bad[row].nonzero()[0])]
    segment = local.plan.segments.segments[loss.route.stop]
    raise DivergedError(
        f"the loss of {segment.name} became {losses[row][bad[row]][0].item()} in step {done + row + 1}.",
        facts=(
            f"it is {loss.name}; the segment ends at {segment.ends_at}.",
            f"losses that were not finite in this step: {int(bad[row].sum())} of {losses.shape[1]}.",
        ),
        help="a lower --lr, or --warmup-epochs",
    )


def summarize(local: LocalModel, trained: Outcome, tested: Outcome) -> dict[str, Any]:
    """Return an epoch's losses and accuracies as they are written to ``metrics.jsonl``."""
    segments = [
        {
            "name": loss.name,
            "route": [loss.route.start, loss.route.stop],
            "train_loss": trained.losses[loss.name],
            "train_accuracy": trained.accuracy.get(loss.name),
            "test_accuracy": tested.accuracy.get(loss.name),
        }
        for loss in local.plan.losses
    ]
    return {
        "train_loss": segments[-1]["train_loss"],
        "train_accuracy": trained.final_accuracy,
        "test_accuracy": tested.final_accuracy,
        "segments": segments,
    }


def headline(local: LocalModel, splits: data.DataSplits, device: torch.device) -> str:
    """Return what is trained, in one line."""
    plan = local.plan
    return (
        f"{plan.segments.trunk.name} by {plan.method}: {len(plan.segments)} segments, {len(plan.losses)} losses; "
        f"{splits.name}: {len(splits.train):,} training and {len(splits.test):,} test images; {device}"
    )


def epoch_line(metrics: Mapping[str, Any], epochs: int) -> str:
    """Return an epoch's metrics in one line; the worst segment is that of the lowest test accuracy."""
    parts = [
        f"epoch {metrics['epoch']:>{len(str(epochs))}}/{epochs}",
        f"loss {metrics['train_loss']:.4f}",
        f"train {100 * metrics['train_accuracy']:.2f} %",
        f"test {100 * metrics['test_accuracy']:.2f} %",
    ]
    scored = [segment for segment in metrics["segments"] if segment["test_accuracy"] is not None]
    if len(scored) > 1:
        worst = min(scored, key=lambda segment: segment["test_accuracy"])
        parts.append(f"worst {worst['name']} {100 * worst['test_accuracy']:.2f} %")
    return "  ".join([*parts, f"lr {metrics['lr']:.3g}", f"{metrics['images_per_second']:.0f} images/s"])


def merge(config: TrainConfig) -> Recipe:
    """Return all that a run is asked to do as one recipe, with the method's defaults, and classes as in the data set.

    Options, cut and input shape of ``config`` come before those of its recipe. The run folder is left out: the same
    recipe makes the same run anywhere.

    Raises:
        LocalizeError: there is no such recipe, option or data set.
    """
    recipe = recipes.load(config.recipe)
    settings = {name: value for name, value in config.training().items() if value is not None and name != "output"}
    model = resolve(config.model).name
    same = recipe.model is not None and model == resolve(recipe.model).name
    merged = dataclasses.replace(
        recipe,
        model=model,
        model_options=recipe.model_options if same else {},
        num_classes=data.get(config.data).num_classes,
        input_shape=config.input_shape or recipe.input_shape,
        options={**recipe.options, **config.options},
        cut=config.cut or recipe.cut,
        train=settings,
    )
    return recipes.resolve(merged)


def seed_everything(seed: int) -> None:
    """Seed the random generators of Python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def create_optimizer(local: LocalModel, config: TrainConfig) -> Optimizer:
    """Make the optimizer that timm knows by the name ``config.opt``.

    Raises:
        UnknownNameError: timm knows none of that name.
        OptionError: it cannot be made here, or needs more than a plain training step.
    """
    known = timm.optim.list_optimizers()
    if config.opt not in known:
        raise UnknownNameError(
            f"there is no optimizer {config.opt!r}.",
            facts=f"timm has {len(known)}: {', '.join(known[:8])}, ...",
            help=did_you_mean(config.opt, known) or "--opt sgd",
        )
    groups = local.param_groups(lr=config.lr, weight_decay=config.weight_decay)
    try:
        optimizer = timm.optim.create_optimizer_v2(
            groups, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay, momentum=config.momentum
        )
    except (AssertionError, ImportError, TypeError, ValueError, RuntimeError) as error:
        raise OptionError(
            f"optimizer {config.opt!r} cannot be made here.", facts=str(error), help="--opt sgd"
        ) from error
    if getattr(optimizer, "is_second_order", False):
        raise OptionError(
            f"optimizer {config.opt!r} needs second derivatives.",
            facts="local.step computes first derivatives only.",
            help="--opt sgd",
        )
    return optimizer


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


@contextmanager
def watching(label: str, steps: int, show: bool) -> Iterator[Callable[[], None]]:
    """Show a progress bar on stderr while the body runs, and take it away afterwards; yield what advances it."""
    if not show:
        yield lambda: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # stdout is left alone: epoch lines may go to a file while the bar is on the terminal.
    with Progress(
        *columns, console=Console(stderr=True, force_terminal=True), transient=True, redirect_stdout=False
    ) as bar:
        task = bar.add_task(label, total=steps)
        yield lambda: bar.advance(task)
