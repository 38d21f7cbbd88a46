"""Several recipes, several seeds each: the runs behind a table of a paper, one folder each, that can be resumed.

A finished run, one that has written its weights, is not repeated; one that was interrupted goes on from its last
checkpoint. ``cost.json`` says what a run has cost so far, but for what was killed::

    {"seconds": 3600.0, "machine": "NVIDIA H200"}
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import torch
from pydantic.dataclasses import dataclass as pydantic_dataclass

from localize import recipes
from localize.errors import MissingError, OptionError
from localize.files import replacing
from localize.recipes import Expected, Recipe
from localize.recipes.settings import TrainConfig
from localize.runtime.devices import choose_device
from localize.train import checkpoints, loop, metrics, resuming, runs
from localize.train.passes import DivergedError

PAPER = "test_accuracy"
"""The metric of a published number that the accuracy of a run is put beside."""
ELSEWHERE = ("output", "device", "workers", "data_dir", "download", "log_tensorboard", "log_wandb")
"""Settings that do not decide what a run learns."""


@dataclass(frozen=True)
class Trial:
    """One run of a sweep: a recipe by its name, with a seed, in a folder."""

    recipe: str
    config: TrainConfig

    @property
    def folder(self) -> Path:
        """Where the run is."""
        return Path(self.config.output)


@dataclass(frozen=True)
class Row:
    """What the runs of one recipe have given. ``paper`` is the published accuracy, None where there is none."""

    recipe: str
    method: str
    model: str
    data: str
    accuracies: Mapping[int, float]
    """Test accuracy (0..1) after the last epoch, by seed; runs that have diverged are not in it."""
    mean: float | None
    std: float | None
    """Of the sample (n - 1); None for fewer than two runs."""
    paper: float | None
    source: str
    hours: float
    """Of all runs of this recipe together, as far as they have told."""
    machines: tuple[str, ...]
    diverged: Mapping[int, str]
    """What was wrong, by seed."""
    folders: tuple[str, ...]


def plan(sources: Sequence[str], seeds: int, output: str | Path, **settings: Any) -> list[Trial]:
    """Return the runs of a sweep: every recipe with seeds 0, 1, ..., the first seed of all recipes first.

    Args:
        sources: packaged recipes by name, or files; each names its model.
        seeds: number of seeds.
        output: folder; a run is in ``NAME-seedS`` below it, where NAME is that of the recipe, or of its file.
        settings: training settings that come before those of the recipes; None leaves the recipe's.

    Raises:
        OptionError: no recipe, one that names no model, or two of the same name.
        LocalizeError: a recipe cannot be read, or its data set is unknown.
        MissingError: a folder holds a run of something else.
    """
    named: dict[str, tuple[str, Recipe]] = {}
    for source in sources:
        recipe = recipes.load(source)
        name = re.sub(r"[^A-Za-z0-9_.]+", "-", Path(source).name.removesuffix(".yaml")).strip("-.")
        if name in named:
            raise OptionError(
                f"two recipes are called {name!r}.", facts=f"{named[name][0]} and {source}", help="rename one of them"
            )
        if recipe.model is None:
            raise OptionError(
                f"recipe {source!r} names no model.",
                help="a recipe with a model: localize recipes ls; or a file of your own",
            )
        named[name] = (source, recipe)
    if not named:
        raise OptionError("no recipe was given.", help="localize compare --train RECIPE RECIPE; localize recipes ls")
    given = {key: value for key, value in settings.items() if value is not None}
    trials = []
    for seed in range(seeds):
        for name, (_, recipe) in named.items():
            own = {**recipe.train, **given, "seed": seed, "output": str(Path(output) / f"{name}-seed{seed}")}
            trials.append(Trial(name, TrainConfig(recipe.model, recipe=recipe, input_shape=recipe.input_shape, **own)))
    for trial in trials:
        _check(trial)
    return trials


def sweep(trials: Sequence[Trial]) -> list[Row]:
    """Run what has not finished; return a row for every recipe. What runs print goes to stderr.

    Raises:
        LocalizeError: a run cannot be carried out; see :func:`localize.train.run`. One that diverges is in its row.
    """
    diverged: dict[Path, str] = {}
    for number, trial in enumerate(trials, 1):
        if finished(trial.folder):
            continue
        with contextlib.redirect_stdout(sys.stderr):
            print(f"run {number} of {len(trials)}: {trial.folder}", flush=True)
            try:
                _run(trial)
            except DivergedError as error:
                diverged[trial.folder] = error.problem
                print(f"error: {error}", flush=True)
    return list(_rows(trials, diverged))


def finished(folder: Path) -> bool:
    """Decide whether a folder holds a run that has come to its end."""
    return (folder / runs.BACKBONE).is_file()


def machine(device: str) -> str:
    """Return the name of a GPU, or the number of cores that torch computes with."""
    where = choose_device(device)
    if where.type == "cuda":
        return torch.cuda.get_device_name(where)
    return f"{torch.get_num_threads()} of {os.cpu_count()} cores"


def _run(trial: Trial) -> None:
    """Begin a run, or go on with it; behind it, or where it is interrupted, write what it has cost."""
    folder, started = trial.folder, time.perf_counter()
    begun = bool(checkpoints.files(folder))
    before = _cost(folder).seconds if begun else 0.0

    def tell() -> None:
        cost = {"seconds": round(before + time.perf_counter() - started, 1), "machine": machine(trial.config.device)}
        with runs.writing(folder, runs.COST), replacing(folder / runs.COST) as path:
            path.write_text(json.dumps(cost) + "\n", encoding="utf-8")

    try:
        if begun:
            resuming.resume(folder)
        else:
            loop.run(trial.config, force=(folder / recipes.FILE_NAME).is_file())
    except KeyboardInterrupt:
        tell()
        raise
    tell()


def _check(trial: Trial) -> None:
    """Refuse what cannot be trained, and a folder in which another recipe, or other settings, were run."""
    asked = loop.merge(loop.fresh(trial.config))
    path = trial.folder / recipes.FILE_NAME
    if not path.is_file():
        runs.named(str(trial.folder))
        return
    there, here = _compared(recipes.load(path)), _compared(asked)
    differ = [key for key in here if key in there and here[key] != there[key]]
    if differ:
        raise MissingError(
            f"{trial.folder} holds a run of something else.",
            facts=[f"{key} is {there[key]!r} there, and {here[key]!r} is asked for." for key in differ[:3]],
            help="another --output",
        )


def _compared(recipe: Recipe) -> dict[str, Any]:
    """Return all that decides what a run learns, by name; what a later version has added is at its default."""
    fields = {item.name: getattr(recipe, item.name) for item in dataclasses.fields(recipe)}
    told = {key: fields[key] for key in ("model", "method", "model_options", "options", "cut", "terms", "schedule")}
    if recipe.input_shape is not None:
        told["input_shape"] = recipe.input_shape
    training = TrainConfig(recipe.model, **recipe.train).training()
    return told | {key: value for key, value in training.items() if key not in ELSEWHERE}


def _rows(trials: Sequence[Trial], diverged: Mapping[Path, str]) -> Iterator[Row]:
    for name in dict.fromkeys(trial.recipe for trial in trials):
        mine = [trial for trial in trials if trial.recipe == name]
        done = [trial for trial in mine if trial.folder not in diverged]
        accuracies = {trial.config.seed: _accuracy(trial.folder) for trial in done}
        costs = [_cost(trial.folder) for trial in done]
        recipe: Recipe = mine[0].config.recipe
        paper = next((one for one in recipe.expected if one.metric == PAPER), Expected(PAPER, 0.0, ""))
        yield Row(
            recipe=name,
            method=recipe.method,
            model=mine[0].config.model,
            data=mine[0].config.data,
            accuracies=accuracies,
            mean=statistics.mean(accuracies.values()) if accuracies else None,
            std=statistics.stdev(accuracies.values()) if len(accuracies) > 1 else None,
            paper=paper.value if paper.source else None,
            source=paper.source,
            hours=sum(cost.seconds for cost in costs) / 3600,
            machines=tuple(dict.fromkeys(cost.machine for cost in costs if cost.machine)),
            diverged={trial.config.seed: diverged[trial.folder] for trial in mine if trial.folder in diverged},
            folders=tuple(str(trial.folder) for trial in mine),
        )


def _accuracy(folder: Path) -> float:
    """Return the test accuracy (0..1) in the last line of a run's metrics."""
    epochs = metrics.read(folder)
    if not epochs:
        raise MissingError(
            f"{folder} has no {runs.METRICS}.",
            facts="its run has finished, and this file says how.",
            help=f"put it back, or remove {folder} to train it again",
        )
    return epochs[-1].test_accuracy


@pydantic_dataclass(frozen=True, config=pydantic.ConfigDict(strict=True, allow_inf_nan=False))
class _Cost:
    seconds: float = 0.0
    machine: str = ""


def _cost(folder: Path) -> _Cost:
    """Return what a run has cost; nothing, where it has not told.

    Raises:
        MissingError: what is there is not what :func:`_run` writes.
    """
    path = folder / runs.COST
    if not path.is_file():
        return _Cost()
    try:
        return pydantic.TypeAdapter(_Cost).validate_json(path.read_bytes())
    except pydantic.ValidationError as error:
        raise MissingError(
            f"{path} does not say what a run has cost.",
            facts=error.errors()[0]["msg"],
            help="remove it: the hours are then not counted",
        ) from error
