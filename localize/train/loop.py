"""Train a model with a local-learning method: a run from its configuration to its folder.

The plain loop around ``local.step`` that a user would write is :func:`localize.train.passes.train_epoch`. A checkpoint
is written after every epoch, and in between on request. :func:`resume` continues from it, on a CPU bit for bit.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from localize import build, recipes
from localize.compiler import freeze, transform
from localize.errors import MethodError, OptionError
from localize.recipes import Recipe
from localize.recipes.settings import TrainConfig
from localize.runtime import compiled
from localize.runtime.devices import choose_device
from localize.runtime.model import LocalModel
from localize.text import counted, visible
from localize.train import callbacks, checkpoints, data, runs, signals, stages, trackers
from localize.train.callbacks import Callback, Step
from localize.train.data.fingerprint import Listing
from localize.train.feeding import fed_lines, feed
from localize.train.metrics import write_segments
from localize.train.optimizers import create_optimizer, set_learning_rate
from localize.train.parallel import Scaler, Team, joined, own_device, synchronize_norms
from localize.train.passes import Outcome, check_weights, evaluate, train_epoch
from localize.train.progress import standing, watching
from localize.train.schedules import check as check_schedule
from localize.train.schedules import learning_rate
from localize.train.state import (
    Position,
    Tally,
    optimizer_values,
    set_random_states,
)
from localize.zoo import input_shape_of, resolve
from localize.zoo.weights import load_file

AVERAGE, WEIGHTS = "average", "weights"
"""Names of the average of the weights over the steps, and of the trained weights themselves."""


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, the metrics of each epoch as in ``metrics.jsonl``, and the model that it exports.

    In a pipeline, each process has only its part of the model with data.
    """

    output: Path
    metrics: tuple[Mapping[str, Any], ...]
    local: LocalModel


@dataclass(frozen=True)
class Training:
    """The objects of a run. They are made from the recipe alone, both when a run starts and when it resumes."""

    config: TrainConfig
    recipe: Recipe
    device: torch.device
    splits: data.DataSplits
    team: Team
    """The processes that train, each on its part of every batch; the first one prints and writes files."""
    batches: data.Batches
    tests: data.Batches
    local: LocalModel
    optimizer: Optimizer
    scaler: Scaler | None
    """Scales the losses in float16; None otherwise."""
    averaged: ModelEmaV3 | None
    callback: Callback
    """The user's callback."""
    begun: Sequence[str]
    """Lines about the initial weights, if they are not random, and about the normalisation of images."""

    @cached_property
    def written(self) -> str:
        """The recipe as YAML."""
        return recipes.dump(self.recipe)

    @cached_property
    def code(self) -> str:
        """A digest of the statements of the generated text and of the printed modules that they call."""
        modules = re.sub(r" at 0x[0-9a-f]+", "", repr(self.local.trunk) + repr(self.local.heads))
        return hashlib.sha256((statements_of(self.local.source) + modules).encode()).hexdigest()

    def without(self, frozen: Sequence[str]) -> LocalModel:
        """Return a local model with the same modules that trains all blocks except the named ones."""
        local = freeze(self.local, *frozen)
        return compiled.compile(local) if self.config.compile else local

    @property
    def models(self) -> Mapping[str, LocalModel]:
        """The models that are tested; one of them is exported."""
        if self.averaged is None:
            return {WEIGHTS: self.local}
        return {AVERAGE: self.averaged.module, WEIGHTS: self.local}


def run(config: TrainConfig, *, force: bool = False, progress: bool | None = None, callback: Any = None) -> Run:
    """Train as ``config`` says. Print a line per epoch, and write configuration, metrics and weights to a folder.

    Each epoch has a line in ``metrics.jsonl``, with these values:

    - ``epoch`` (from 1), ``step`` (optimizer steps so far), ``images`` (on which each process trained in the epoch);
    - ``train_loss``: loss of the model's own output, mean over the epoch's steps;
    - ``train_accuracy``: 0..1, of the predictions in training steps, before each update; for soft labels see
      :func:`localize.train.passes.is_right`;
    - ``test_accuracy``: 0..1, of the model's own forward in eval mode after the epoch. With ``model_ema`` it is that of
      the model that would be exported, named in ``exported``; those of both models are ``test_accuracy_average`` and
      ``test_accuracy_weights``;
    - ``lr`` during the epoch, and in float16 ``loss_scale`` after it;
    - ``images_per_second`` of each process: loading, training and checkpoints, without evaluation;
    - ``segments``: for every local loss its ``name``, ``route`` (first and last segment), ``train_loss``,
      ``train_accuracy`` and ``test_accuracy`` (None if the loss makes no class scores; see also
      :func:`localize.train.passes.evaluate`). A loss that is frozen in an epoch has no ``train_loss``; that of the
      epoch is then that of the deepest loss that is trained.

    On SIGINT or SIGTERM, the current step is finished, a checkpoint is written, and KeyboardInterrupt is raised.

    Args:
        config: the settings.
        force: replace an earlier run in ``config.output``.
        progress: show a progress bar on stderr; default: if stderr is a terminal.
        callback: an object like :class:`localize.train.Callback`, instead of the one that ``config`` names.

    Returns:
        The folder, the metrics and the trained model.

    Raises:
        LocalizeError: the model, method, data, device or folder is not available. Nothing has been written then.
        MissingError: another process is training into the folder; see :func:`localize.train.runs.locked`.
        MissingError: a file cannot be written, for example on a full disk. The last checkpoint is kept.
        DivergedError: see :func:`localize.train.passes.train_epoch`. Nothing is exported; the metrics of earlier epochs
            and the last checkpoint are kept.
    """
    if config.parallel == "pipe":
        from localize.train import piped

        return piped.run(config, force=force, progress=progress, callback=callback)
    folder = None if config.output is None else runs.named(config.output, force=force)
    config = fresh(config)
    training = prepare(config, progress=progress, callback=callback)
    name = f"{config.model}-{training.recipe.method}-{config.data}-seed{config.seed}"
    folder = folder or runs.numbered(name)
    with runs.locked(folder) if training.team.writes else nullcontext():
        if training.team.writes:
            runs.named(str(folder), force=force)  # another process may have trained into it meanwhile
            runs.start(folder, training.recipe, training.splits.listing)
            print("\n".join(visible(line) for line in [headline(training), *training.begun]), flush=True)
        return carry_out(training, folder, Position(training.batches.generator.get_state()), [], progress)


def statements_of(source: str) -> str:
    """Return a text without docstrings, comments and empty lines: they may change while a run goes on."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            first, last = node.body[0].lineno, node.body[0].end_lineno or node.body[0].lineno
            lines[first - 1 : last] = [""] * (last + 1 - first)
    return "\n".join(line for line in lines if line.strip() and not line.lstrip().startswith("#"))


def fresh(config: TrainConfig) -> TrainConfig:
    """Return the settings of a new run, whose recipe does not yet record preprocessing and data.

    If a folder was given as the name of the data set, it becomes the data folder.
    """
    recipe = dataclasses.replace(recipes.load(config.recipe), preprocessing=None, dataset=None)
    name, data_dir = data.place(config.data, config.data_dir)
    return dataclasses.replace(config, recipe=recipe, data=name, data_dir=data_dir)


def prepare(
    config: TrainConfig,
    *,
    weights: bool = True,
    listing: Listing | None = None,
    check: Callable[[data.DataSplits], None] = lambda splits: None,
    progress: bool | None = None,
    callback: Any = None,
) -> Training:
    """Make the model, its training step, the data and the optimizer as ``config`` says; nothing is written.

    Args:
        config: the settings. If its recipe records the preprocessing of images, that is used.
        weights: load the initial weights, if ``config`` names some.
        listing: the files of a run that is resumed.
        check: called with the data after they have been read; its exceptions are passed on.
        progress: show a progress bar on stderr while images are checked; default: if stderr is a terminal.
        callback: see :func:`run`.

    Raises:
        LocalizeError: one of them is not available.
    """
    trackers.check(config)
    check_schedule(config)
    device = own_device(choose_device(config.device))
    team = joined(device)
    with team.agreeing():
        called = callbacks.load(config.callback) if callback is None else callbacks.checked(callback)
        training = prepare_here(
            team, device, config, weights=weights, listing=listing, check=check, progress=progress, callback=called
        )
    refuse_unlike(training.recipe, training.code, team)
    for started in (training.local, *([] if training.averaged is None else [training.averaged.module])):
        team.same_start(started)
    return training


def prepare_here(
    team: Team,
    device: torch.device,
    config: TrainConfig,
    *,
    weights: bool,
    listing: Listing | None,
    check: Callable[[data.DataSplits], None],
    progress: bool | None,
    callback: Callback,
    empty: bool = False,
) -> Training:
    """Make the objects of one process of a team, without waiting for the others; see :func:`prepare`.

    ``empty`` leaves the model without data, for a process that will receive its part. It has no effect if modules have
    tensors that are neither parameters nor buffers, since these are not sent.
    """
    recipe = merge(config)
    if recipe.num_classes == 1:
        raise OptionError(
            f"data set {config.data!r} has only one class.", facts="any answer of a model would be right.",
            help="use a data set with at least two classes",
        )  # fmt: skip
    seed_everything(config.seed)
    source = resolve(config.model)
    model = build.create_model(recipe, data=not empty, weights=weights and not empty)
    begun = begin(model, recipe, config) if weights and not empty else []
    input_shape = input_shape_of(source, model, recipe.input_shape)
    recipe = dataclasses.replace(recipe, input_shape=input_shape)
    feeding = feed(recipe, config)
    splits = data.load(
        config.data,
        input_shape,
        data_dir=data.located(config.data_dir, listing),
        download=config.download,
        augment=config.augment,
        mean=feeding.mean,
        std=feeding.std,
        preprocessing=recipe.preprocessing,
        split=config.split,
        seed=config.seed,
        listing=listing,
        skip_damaged=config.skip_damaged,
        hashed=recipe.dataset.hashed if recipe.dataset else config.hash_files or None,
        progress=progress if team.writes else False,
    )
    check(splits)
    begun = [*begun, *fed_lines(splits, feeding)]
    recipe = dataclasses.replace(recipe, preprocessing=splits.preprocessing, dataset=splits.record)
    batches = data.training_batches(
        splits.train,
        config.batch_size,
        generator=torch.Generator().manual_seed(config.seed),
        workers=config.workers,
        device=device,
        team=team,
        mixing=data.Mixing(config.mixup, config.cutmix, splits.num_classes) if config.mixes else None,
    )
    tests = data.evaluation_batches(splits.test, config.batch_size, workers=config.workers, device=device, team=team)
    example = splits.train[[0, 1]][0]
    local = transform(model, recipe, example_input=example.to("meta") if empty else example, name=source.name)
    if empty and any(isinstance(one, Tensor) for module in local.modules() for one in vars(module).values()):
        return prepare_here(
            team, device, config, weights=weights, listing=listing, check=check, progress=progress, callback=callback
        )
    local = local if empty else local.to(device)
    stages.check(config, local.plan)
    build.check_classes(local, recipe)
    local.check_batches(config.grad_accum_steps)
    begun = [*begun, *supervision_lines(local, config, team)]
    if config.sync_bn:
        synchronize_norms(local, team, device, compiled=config.compile)
    if config.channels_last:
        local = local.to(memory_format=torch.channels_last)
    averaged = None
    if config.model_ema:
        averaged = ModelEmaV3(local, decay=config.model_ema_decay, use_warmup=config.model_ema_warmup)
        begun += average_lines(config, len(batches))
    if config.compile:
        local = compiled.compile(local)
    optimizer = create_optimizer(local, config, team)
    scaler = Scaler(device, team) if config.scales else None
    if team.rank:
        seed_everything(config.seed + team.rank)  # each process has its own dropout
    return Training(
        config, recipe, device, splits, team, batches, tests, local, optimizer, scaler, averaged, callback, begun
    )


def refuse_unlike(recipe: Recipe, code: str, team: Team) -> None:
    """Refuse to train in processes that have different settings, or would compute different results.

    The location of the data, and how they are read, may differ between machines.

    Raises:
        MissingError: the data, the recipe, a library or the training step of a process differs.
    """
    here = ("data_dir", "download", "device", "workers", "timeout")
    train = {name: value for name, value in recipe.train.items() if name not in here}
    team.refuse_unlike({
        "the versions": "\n".join(f"{name} {version}" for name, version in build.versions().items()),
        "the data": recipes.dump(Recipe(recipe.method, dataset=recipe.dataset)),
        "the recipe": recipes.dump(dataclasses.replace(recipe, dataset=None, train=train)),
        "the training step": code,
    })  # fmt: skip


def supervision_lines(local: LocalModel, config: TrainConfig, team: Team) -> list[str]:
    """Return lines about labels, and about the loss of class scores.

    Raises:
        MethodError: images are to be mixed, but a loss needs class ids.
    """
    plan = local.plan
    if config.mixes and "soft" not in plan.labels.kinds:
        raise MethodError(
            f"{plan.method} cannot be trained on mixed images.",
            facts=["their labels are soft: shares of two classes.", plan.labels.why],
            help=f"leave out --mixup and --cutmix; or use a method that takes soft labels: "
            f"{', '.join(plan.labels.methods)}",
        )
    if plan.loss.get("weights") and plan.loss["name"] != "bce" and config.grad_accum_steps * team.size > 1:
        return ["class weights: each process divides its batch loss by the sum of the weights of its own images"]
    return []


def average_lines(config: TrainConfig, batches: int) -> list[str]:
    """Return a warning if the average of the weights is still dominated by the initial weights."""
    steps = config.max_steps or config.epochs * -(-batches // config.grad_accum_steps)
    share = config.model_ema_decay**steps
    if config.model_ema_warmup or share <= 0.5:
        return []
    return [
        f"warning: after {steps:,} steps, {100 * share:.1f} % of the average are still the initial weights; use a "
        "lower --model-ema-decay, or leave out --no-model-ema-warmup"
    ]


def carry_out(
    training: Training, folder: Path, position: Position, metrics: list[dict[str, Any]], progress: bool | None
) -> Run:
    """Train from ``position`` to the end, with a checkpoint after every epoch; see :func:`run`."""
    config, writes = training.config, training.team.writes
    show = writes and (sys.stderr.isatty() if progress is None else progress)
    frozen: tuple[str, ...] = ()
    local = training.local
    tracking = trackers.tracking(folder, config, training.written, metrics) if writes else nullcontext()
    with signals.noticing() as came, tracking as track:
        while unfinished(config, position):
            if stages.frozen_in(config, training.local.plan, position.epoch) != frozen:
                frozen = stages.frozen_in(config, training.local.plan, position.epoch)
                local = training.without(frozen)
                if writes:
                    print(stages.told(config, training.local.plan, position.epoch), flush=True)
            trained = train_on(training, local, folder, position, metrics, came, show)
            now = snapshot(training, position, metrics)
            tested = {}
            for kind, model in training.models.items():
                training.team.same_buffers(model)
                tested[kind] = evaluate(model, _until(came, training.tests), training.device, training.team)
            if training.team.any(came(), training.device):
                stop(training, folder, position, now)
            exported = chosen(config, tested)
            if writes:
                lr = training.optimizer.param_groups[0]["lr"]
                scale = {} if training.scaler is None else {"loss_scale": training.scaler.get_scale()}
                speed = {"lr": lr, "images_per_second": round(position.tally.images / position.tally.seconds, 1)}
                about = {"epoch": position.epoch, "step": position.steps, "images": position.tally.images}
                both: dict[str, Any] = {} if len(tested) == 1 else {"exported": exported}
                both |= {f"test_accuracy_{name}": one.final_accuracy for name, one in tested.items() if both}
                summary = summarize(training.models[exported], trained, tested[exported])
                metrics.append(about | summary | both | speed | scale)
                runs.append_metrics(folder, metrics[-1])
                write_segments(folder)
                if track is not None:
                    track(metrics[-1])
                print(epoch_line(metrics[-1], config.epochs), flush=True)
                training.callback.after_epoch(metrics[-1], training.local)
            position.epoch, position.tally = position.epoch + 1, Tally()
            position.order = training.batches.generator.get_state()
            keep(training, folder, position, snapshot(training, position, metrics))
    if frozen:
        training.without(())
    result = training.models[metrics[-1].get("exported", WEIGHTS) if metrics else WEIGHTS]
    if writes:
        runs.finish(folder, result, training.recipe)
        if metrics:
            best = max(metrics, key=lambda line: line["test_accuracy"])
            last = f"last epoch {100 * metrics[-1]['test_accuracy']:.2f} %"
            print(f"test: {last}, best {100 * best['test_accuracy']:.2f} % (epoch {best['epoch']})", flush=True)
        print(f"weights: {folder / runs.BACKBONE}", flush=True)
        training.callback.after_run(folder, metrics, result)
    training.team.wait()
    return Run(folder, tuple(metrics), result)


def chosen(config: TrainConfig, tested: Mapping[str, Outcome]) -> str:
    """Return which of the tested models is exported: the configured one, or the one with the higher test accuracy."""
    if len(tested) > 1 and config.model_ema_export != "better":
        return config.model_ema_export
    return max(tested, key=lambda name: tested[name].final_accuracy)


def unfinished(config: TrainConfig, position: Position) -> bool:
    """Return whether an epoch, or part of one, is left to train."""
    return position.epoch <= config.epochs and (position.steps != config.max_steps or position.tally.batches > 0)


def train_on(
    training: Training,
    local: LocalModel,
    folder: Path,
    position: Position,
    metrics: Sequence[Mapping[str, Any]],
    came: Callable[[], bool],
    show: bool,
) -> Outcome:
    """Train ``local`` to the end of the epoch that ``position`` is in, and write checkpoints on the way.

    Raises:
        KeyboardInterrupt: ``came()`` was true after a step. A checkpoint has been written.
    """
    config, tally, first = training.config, position.tally, position.steps
    before = position.steps - len(tally.losses)
    set_learning_rate(training.optimizer, learning_rate(config, position.epoch))
    total = len(training.batches)
    if config.max_steps is not None:
        total = min(total, (config.max_steps - before) * config.grad_accum_steps)
    training.batches.generator.set_state(position.order)
    batches = iter(training.batches)
    if position.random is not None:
        # Batches that were already trained on are loaded and skipped, because loading may draw random numbers too.
        for _ in range(tally.batches):
            next(batches)
        set_random_states(position.random, training.device)
        position.random = None
    # A complete pass is run to its end: the sampler draws once more there, as it would in a plain loop.
    taken = batches if total == len(training.batches) else islice(batches, total - tally.batches)
    compiles = isinstance(local, compiled.CompiledModel) and not local.functions
    steps = -(-total // config.grad_accum_steps)
    with watching(f"epoch {position.epoch}/{config.epochs}", steps, show, len(tally.losses)) as advance:

        def behind_step() -> None:
            position.steps += 1
            advance(lambda: standing(tally, local.plan, training.device))
            if training.averaged is not None:
                training.averaged.update(local, step=position.steps if config.model_ema_warmup else None)
            if training.team.writes:
                losses = dict(zip(tally.names, tally.losses[-1], strict=True))
                training.callback.after_step(Step(local, training.optimizer, position.epoch, position.steps, losses))
            begun = position.steps == first + 1
            if begun:
                training.team.answer_within(config.timeout)
            if compiles and isinstance(local, compiled.CompiledModel) and begun and training.team.writes:
                print(compiled_line(local), flush=True)
            if training.team.any(came(), training.device):
                stop(training, folder, position, snapshot(training, position, metrics))
            due = config.checkpoint_every is not None and position.steps % config.checkpoint_every == 0
            if due and tally.batches < total:
                keep(training, folder, position, snapshot(training, position, metrics))

        return train_epoch(
            local, training.optimizer, taken, training.device, config,
            total=total, tally=tally, done=before, behind_step=behind_step, team=training.team,
            scaler=training.scaler,
        )  # fmt: skip


def snapshot(training: Training, position: Position, metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the values of a checkpoint: everything that the rest of the run depends on. Tensors are not copied.

    Args:
        training: the run.
        position: its position.
        metrics: the lines of the previous epochs.

    Raises:
        ModelError: see :func:`localize.train.runs.tensors_of`.
    """
    local = training.local
    return {
        "recipe": training.written,
        "code": training.code,
        "model": runs.tensors_of(local),
        "optimizer": optimizer_values(local, training.optimizer),
        "scaler": None if training.scaler is None else training.scaler.state_dict(),
        "threads": torch.get_num_threads(),
        "versions": build.versions(),
        "metrics": runs.lines_of(metrics),
        "averaged": None if training.averaged is None else runs.tensors_of(training.averaged.module),
        "positions": training.team.gathered(position.values(training.device)),
    }


def keep(training: Training, folder: Path, position: Position, values: Mapping[str, Any]) -> Path:
    """Write a checkpoint of ``values``, unless losses or weights are not finite.

    Raises:
        DivergedError: they are not finite. The last checkpoint is kept.
        MissingError: it cannot be written. The last checkpoint is kept.
    """
    check_weights(training.local, position)
    if not training.team.writes:
        return folder
    return checkpoints.save(folder, position.steps, values)


def stop(training: Training, folder: Path, position: Position, values: Mapping[str, Any]) -> NoReturn:
    """Write a checkpoint of ``values``, print how to continue, and raise KeyboardInterrupt."""
    path = keep(training, folder, position, values)
    if training.team.writes:
        print(f"checkpoint: {path}\nto continue: localize train --resume {folder}", file=sys.stderr, flush=True)
    raise KeyboardInterrupt


def _until(came: Callable[[], bool], batches: Iterable[Sequence[Tensor]]) -> Iterator[Sequence[Tensor]]:
    for batch in batches:
        if came():
            return
        yield batch


def begin(model: nn.Module, recipe: Recipe, config: TrainConfig) -> list[str]:
    """Load the initial weights, if a file contains them; return lines that say what was loaded.

    Raises:
        MissingError: the file does not contain the weights of ``model``.
    """
    if config.pretrained:
        return [f"weights: as published for {recipe.model}"]
    if config.initial_checkpoint is None:
        return []
    assert recipe.num_classes is not None, "the recipe has taken over the classes of the data"
    loaded = load_file(model, config.initial_checkpoint, recipe.num_classes)
    return [f"weights: {config.initial_checkpoint}, {loaded}"]


def compiled_line(local: compiled.CompiledModel) -> str:
    """Return a line about how the segments of a model were compiled."""
    functions = len(local.functions)
    line = f"compiled: {local.graphs} graphs for {functions} functions in {local.compile_seconds:.1f} s"
    plain = [f"{one.name} ({one.reason})" for one in local.functions if one.reason]
    return line + (f"; not compiled: {', '.join(plain)}" if plain else "")


def summarize(local: LocalModel, trained: Outcome, tested: Outcome) -> dict[str, Any]:
    """Return an epoch's losses and accuracies in the form of ``metrics.jsonl``."""
    segments = [
        {
            "name": loss.name,
            "route": [loss.route.start, loss.route.stop],
            "train_loss": trained.losses.get(loss.name),
            "train_accuracy": trained.accuracy.get(loss.name),
            "test_accuracy": tested.accuracy.get(loss.name),
        }
        for loss in local.plan.losses
    ]
    own = [trained.losses[loss.name] for loss in local.plan.losses if loss.part and loss.name in trained.losses]
    return {
        "train_loss": sum(own) or next(one["train_loss"] for one in segments[::-1] if one["train_loss"] is not None),
        "train_accuracy": trained.final_accuracy,
        "test_accuracy": tested.final_accuracy,
        "segments": segments,
    }


def headline(training: Training) -> str:
    """Return a line that describes the run."""
    plan, splits = training.local.plan, training.splits
    size = training.team.size
    where = f"{size} processes on {training.device.type}" if size > 1 else str(training.device)
    step = f"{counted(len(plan.segments), 'segment')}, {counted(len(plan.losses), 'loss', 'losses')}"
    return (
        f"{plan.segments.trunk.name} by {plan.method}: {step}; "
        f"{splits.name}: {len(splits.train):,} training and {len(splits.test):,} test images; {where}"
    )


def epoch_line(metrics: Mapping[str, Any], epochs: int) -> str:
    """Return an epoch's metrics in one line; the worst segment is the one with the lowest test accuracy."""
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
    parts.append(f"lr {metrics['lr']:.3g}")
    if "loss_scale" in metrics:
        parts.append(f"scale {metrics['loss_scale']:g}")
    return "  ".join([*parts, f"{metrics['images_per_second']:.0f} images/s"])


def merge(config: TrainConfig) -> Recipe:
    """Return all settings of a run as one recipe, with the method's defaults and the number of classes of the data.

    Options, cut and input shape of ``config`` override those of its recipe. The run folder is left out: the same recipe
    makes the same run anywhere.

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
        num_classes=recipe.num_classes if recipe.dataset else data.num_classes(config.data, config.data_dir),
        input_shape=config.input_shape or recipe.input_shape,
        options={**recipe.options, **config.options},
        cut=config.cut or recipe.cut,
        schedule={"scores": "argmax", **recipe.schedule, **({"loss_scaling": True} if config.scales else {})},
        train=settings,
    )
    return recipes.resolve(merged)


def seed_everything(seed: int) -> None:
    """Seed the random generators of Python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
