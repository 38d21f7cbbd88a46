"""Resume a run from its last checkpoint: what may have changed since, and what may not."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from localize import build, recipes
from localize.errors import MissingError, OptionError, RecipeError
from localize.recipes import Recipe
from localize.recipes.settings import TrainConfig
from localize.runtime.devices import choose_device
from localize.text import visible
from localize.train import checkpoints, data, runs
from localize.train.data import fingerprint
from localize.train.data.fingerprint import Listing
from localize.train.loop import Run, Training, carry_out, fresh, headline, merge, prepare, run
from localize.train.metrics import write_segments
from localize.train.parallel import joined, leads, own_device
from localize.train.schedules import learning_rate
from localize.train.state import Position, Tally, load_optimizer_values, position_from


def resume(
    folder: str | Path,
    *,
    epochs: int | None = None,
    data_dir: str | None = None,
    timeout: float | None = None,
    stages: tuple[int, ...] | None = None,
    accept_data: bool = False,
    trust_code: bool = False,
    progress: bool | None = None,
    callback: Any = None,
) -> Run:
    """Resume a run from its last checkpoint; without one, start from the beginning. See :func:`run`.

    All settings come from the recipe in the folder. On a CPU with the same number of threads, the final weights and
    metrics (except ``images_per_second``) equal those of an uninterrupted run, bit for bit. For a finished run, the end
    is repeated from its last checkpoint.

    Args:
        folder: the run folder.
        epochs: new total number of epochs, at least as many as are done. The learning rate of the remaining epochs is
            that of a run with this number from the start.
        data_dir: where the data are now.
        timeout: see :class:`TrainConfig`; default: as before.
        stages: see :class:`TrainConfig`; default: as before, or balanced for another number of processes.
        accept_data: continue even if the data have changed. An interrupted epoch is then trained again from its first
            batch.
        trust_code: run the code file that the recipe names, see :mod:`localize.recipes.trust`.
        progress: show a progress bar on stderr; default: if stderr is a terminal.
        callback: an object like :class:`localize.train.Callback`, instead of the one that the recipe names.

    Returns:
        The folder, the metrics and the trained model.

    Raises:
        MissingError: the folder is not that of a run, another process is training into it, no checkpoint is intact, the
            checkpoints belong to another model, or the data have changed.
        RecipeError: the recipe has changed since the checkpoint.
        OptionError: the run has done more epochs, or ends with ``max_steps``.
        UntrustedCodeError: see :func:`localize.train.runs.recipe_of`.
    """
    folder = Path(folder)
    written = runs.recipe_of(folder, trust_code=trust_code)
    with runs.locked(folder) if leads() else nullcontext():
        asked = changed(written, epochs=epochs, data_dir=data_dir, timeout=timeout, stages=stages)
        return go_on(folder, asked, written, progress, accept_data=accept_data, callback=callback)


def begin_or_go_on(config: TrainConfig, *, force: bool = False, trust_code: bool = False) -> Run:
    """Start the run that ``config`` describes, or resume it if its folder contains a run with the same settings.

    This lets ``--max-restarts`` or a scheduler repeat the same command line. A different ``epochs``, ``data_dir``,
    ``timeout`` or ``stages`` is taken over.

    Args:
        config: the settings, including the folder.
        force: replace a run with other settings.
        trust_code: see :func:`resume`.

    Returns:
        The folder, the metrics and the trained model.

    Raises:
        OptionError: see :func:`changed`; or it names no folder; or the run has done more epochs.
        RecipeError: the folder contains a run with other settings.
        LocalizeError: see :func:`run` and :func:`resume`.
    """
    if config.output is None:
        raise OptionError("--resume-if-there needs a folder.", help="--output DIR", option="output")
    folder = Path(config.output)
    team = joined(own_device(choose_device(config.device)))
    if not any(team.gathered((folder / recipes.FILE_NAME).is_file())):
        return run(config, force=force)
    with team.agreeing():
        asked, written = merge(fresh(config)), runs.recipe_of(folder, trust_code=trust_code)
        asked = dataclasses.replace(
            asked,
            input_shape=asked.input_shape or written.input_shape,
            preprocessing=written.preprocessing,
            dataset=written.dataset,
            num_classes=written.num_classes,
        )
        there = merge(runs.config_of(written))  # with the defaults of settings that are newer than the run
        other = recipes.dump(_compared(asked)) != recipes.dump(_compared(there))
        if other and not force:
            refuse_other_recipe(folder / recipes.FILE_NAME, there, asked)
        epochs, before = asked.train["epochs"], there.train["epochs"]
        longer = None if other or epochs == before else epochs
        going = changed(written, epochs=longer, data_dir=asked.train.get("data_dir"), timeout=config.timeout,
                        stages=config.stages)  # fmt: skip
    if other:
        return run(config, force=True)
    with runs.locked(folder) if leads() else nullcontext():
        return go_on(folder, going, written, None)


def changed(
    written: Recipe,
    *,
    epochs: int | None = None,
    data_dir: str | None = None,
    timeout: float | None = None,
    stages: tuple[int, ...] | None = None,
) -> Recipe:
    """Return the recipe of a run with the settings that may change when it resumes.

    Raises:
        OptionError: the run ends with ``max_steps``; or stages were given and it is not a pipeline.
    """
    if stages is not None and written.train.get("parallel") != "pipe":
        raise OptionError(
            "--stages is only for pipelines.", facts="this run is not a pipeline.",
            help="leave out --stages", option="stages",
        )  # fmt: skip
    if epochs is not None and written.train.get("max_steps") is not None:
        raise OptionError(
            f"--epochs cannot be {epochs}: this run ends after {written.train['max_steps']} steps.",
            facts=f"max_steps is {written.train['max_steps']}.",
            help="localize train --recipe DIR --output NEW, for a run of another length",
        )
    given = {"epochs": epochs, "data_dir": data_dir, "timeout": timeout, "stages": stages}
    kept = dict(written.train)
    if stages is None and len(kept.get("stages") or ()) != int(os.environ.get("WORLD_SIZE", "1")):
        kept.pop("stages", None)
    return dataclasses.replace(
        written, train={**kept, **{key: value for key, value in given.items() if value is not None}}
    )


def go_on(
    folder: Path,
    asked: Recipe,
    written: Recipe,
    progress: bool | None,
    *,
    accept_data: bool = False,
    callback: Any = None,
) -> Run:
    """Resume the run in a folder; see :func:`resume`.

    Args:
        folder: the run folder.
        asked: its recipe, with the changes.
        written: its recipe as it is in the folder.
        progress: see :func:`resume`.
        accept_data: see :func:`resume`.
        callback: see :func:`resume`.
    """
    if asked.train.get("parallel") == "pipe":
        from localize.train import piped

        return piped.go_on(folder, asked, written, progress, accept_data=accept_data)
    if leads():
        runs.clean(folder)
    any_checkpoint = bool(checkpoints.files(folder))
    listing = runs.listing_of(folder)
    if not any_checkpoint and written.dataset is None:
        raise MissingError(
            f"no run has been started in {folder}.",
            facts=f"its {recipes.FILE_NAME} leaves settings open, and there is no checkpoint.",
            help=f"localize train --recipe {folder}",
        )
    changes: list[str] = []
    training = prepare(
        runs.config_of(asked),
        weights=not any_checkpoint,
        listing=listing,
        check=lambda splits: changes.extend(changes_of(folder, written, splits, listing, accept=accept_data)),
        progress=progress,
        callback=callback,
    )
    with training.team.agreeing():
        found = checkpoints.take_last(
            folder,
            lambda path, values: take_up(training, path, values),
            limit=largest_checkpoint(training),
            tell=_pass_over if leads() else lambda line: None,
        )
    taken = Taken(Position(training.batches.generator.get_state())) if found is None else found[1]
    position = taken.position
    done = f"{position.steps} steps done, {position.tally.batches} batches into epoch {position.epoch}"
    if position.epoch - (position.tally.batches == 0) > training.config.epochs:
        raise OptionError(
            f"--epochs cannot be {training.config.epochs}: the run in {folder} has done {position.epoch - 1}.",
            help=f"--epochs {position.epoch} or more",
        )
    if changes and position.tally.batches:
        done += ", which is trained again from its first batch"
        position.tally, position.random = Tally(), None
    if not training.team.writes:
        return carry_out(training, folder, position, list(map(json.loads, taken.metrics.splitlines())), progress)
    if training.recipe != written:
        runs.write_recipe(folder, training.recipe, training.splits.listing)
    print(visible(headline(training)), flush=True)
    if found is None:
        print(f"{folder} has no checkpoint yet: starting from the beginning", flush=True)
    else:
        print(f"resuming from {found[0]}: {done}", flush=True)
    for line in taken.notes:
        print(line, file=sys.stderr, flush=True)
    metrics = runs.keep_metrics(folder, taken.metrics)
    write_segments(folder)
    return carry_out(training, folder, position, metrics, progress)


def _pass_over(line: str) -> None:
    print(f"skipped: {visible(line)}", file=sys.stderr, flush=True)


def changes_of(
    folder: Path, written: Recipe, splits: data.DataSplits, listing: Listing | None, *, accept: bool
) -> Iterator[str]:
    """Yield the differences between the data and those of the run; unless accepted, raise an error about them."""
    if written.dataset is None:
        return
    compared = written.dataset, splits.record, (listing, splits.listing)
    if not accept or len(splits.classes) != len(written.dataset.classes):
        command = f"localize train --resume {folder} --accept-data"
        fingerprint.refuse_changed(*compared, parts=("train", "test"), accept=command)
    yield from fingerprint.differences(*compared, parts=("train", "test"))


def largest_checkpoint(training: Training) -> int:
    """Return the largest size in bytes that a checkpoint of a run can have, with room for any optimizer."""
    parameters = dict(training.local.named_parameters())
    state = sum(value.nbytes for value in training.local.state_dict().values() if isinstance(value, Tensor))
    reached = sum(parameters[name].nbytes for names in training.local.reached() for name in names)
    return 8 * (state + reached) + 2**26 + 2**12 * training.config.epochs * len(training.local.plan.losses)


@dataclass(frozen=True)
class Taken:
    """What was restored: the position of the run, the lines of ``metrics.jsonl``, and notes on what has changed."""

    position: Position
    metrics: str = ""
    notes: tuple[str, ...] = ()


def take_up(training: Training, path: Path, values: Mapping[str, Any]) -> Taken:
    """Restore everything from a checkpoint.

    Args:
        training: the objects as at the start of a run, which are changed.
        path: the checkpoint, for messages.
        values: as :func:`snapshot` returns them.

    Raises:
        RecipeError: the checkpoint belongs to another recipe.
        MissingError: it belongs to another model or another training step.
    """
    there = merge(runs.config_of(recipes.parse(values["recipe"], str(path))))
    refuse_other_recipe(path, there, training.recipe)
    again = f"start again: localize train --recipe {path.parents[1]} --output NEW"
    if values["code"] != training.code:
        raise MissingError(
            f"{path} belongs to another training step.",
            facts=f"the modules and the statements that {recipes.FILE_NAME} now gives differ from those of the "
            "checkpoint: the model's code, or localize, has changed.",
            help=f"restore that code; or {again}",
        )
    try:
        training.local.load_state_dict(values["model"], strict=True)
        if training.averaged is not None:
            training.averaged.module.load_state_dict(values["averaged"], strict=True)
    except RuntimeError as error:
        raise MissingError(
            f"{path} does not contain the weights of {training.recipe.model}.",
            facts=str(error).splitlines()[:4],
            help=f"restore that model; or {again}",
        ) from error
    runs.refuse_nan(path, training.local.state_dict())
    load_optimizer_values(training.local, training.optimizer, values["optimizer"])
    if training.scaler is not None:
        training.scaler.load_state_dict(values["scaler"])
    positions, team = values["positions"], training.team
    if len(positions) != team.size:
        raise MissingError(
            f"{path} was written by {len(positions)} processes, but now there are {team.size}.",
            facts="every process takes its part of each batch, and has its own random numbers.",
            help=f"torchrun --nproc-per-node {len(positions)} -m localize train --resume {path.parents[1]}; or {again}",
        )
    position = position_from(positions[team.rank], training.device)
    return Taken(position, values["metrics"], tuple(differences(training, there, values, position)))


def refuse_other_recipe(path: Path, there: Recipe, here: Recipe) -> None:
    """Refuse a checkpoint of another recipe, except for the settings that :func:`changed` may change.

    Raises:
        RecipeError: the recipes differ; the message shows both sides.
    """
    before, now = (recipes.dump(_compared(one)) for one in (there, here))
    folder = path.parent if path.name == recipes.FILE_NAME else path.parents[1]
    if before != now:
        was, now_is = ([line for line in one.splitlines() if line not in other.splitlines()]
                       for one, other in ((before, now), (now, before)))  # fmt: skip
        raise RecipeError(
            f"the recipe has changed since {path}.",
            facts=[*(f"was: {line.strip()}" for line in was), *(f"is:  {line.strip()}" for line in now_is)],
            help=f"restore it, or start again: localize train --recipe {folder} --output NEW",
        )


def _compared(recipe: Recipe) -> Recipe:
    """Return a recipe with only those settings that must not change when a run resumes."""
    free = ("epochs", "data_dir", "timeout", "stages")
    train = {name: value for name, value in recipe.train.items() if name not in free}
    return dataclasses.replace(recipe, dataset=None, train=train)


def differences(training: Training, there: Recipe, values: Mapping[str, Any], position: Position) -> Iterator[str]:
    """Yield lines about changes that may affect numbers: epochs, threads, versions of libraries."""
    before = runs.config_of(there)
    config, next_epoch = training.config, position.epoch
    if before.epochs != config.epochs:
        rates = [learning_rate(one, min(next_epoch, one.epochs)) for one in (before, config)]
        yield (
            f"extended from {before.epochs} to {config.epochs} epochs: from epoch {next_epoch} on, sched "
            f"{config.sched!r} follows {config.epochs} epochs; its learning rate is {rates[1]:.3g} there, while that "
            f"of {before.epochs} epochs ends at {learning_rate(before, before.epochs):.3g}"
        )
    if training.device.type == "cpu" and values["threads"] != torch.get_num_threads():
        yield f"with {torch.get_num_threads()} threads now and {values['threads']} before: sums may round differently"
    for name, version in build.versions().items():
        if values["versions"].get(name) != version:
            yield f"with {name} {version} now and {values['versions'].get(name)} before: numbers may differ"
