"""Several recipes, several seeds each: the runs behind a table of a paper, one folder each, that can be resumed.

A finished run, one that has written its weights, is not repeated; one that was interrupted goes on from its last
checkpoint. ``cost.json`` says what a run has cost so far, but for what was killed::

    {"seconds": 3600.0, "machine": "1 of 2 cores", "cores": 1}

Every finished run is a line of a book, :mod:`localize.train.ledger`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shlex
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

from localize import build, recipes
from localize.errors import MissingError, OptionError
from localize.files import replacing
from localize.recipes import Expected, Recipe
from localize.recipes.settings import TrainConfig
from localize.runtime.devices import choose_device
from localize.train import checkpoints, ledger, loop, metrics, resuming, runs
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
    command: str = ""
    """What was typed, as far as it decides what the run learns."""

    @property
    def folder(self) -> Path:
        """Where the run is."""
        assert self.config.output is not None, "trials name their folders"
        return Path(self.config.output)


@dataclass(frozen=True)
class Row:
    """What the runs of one recipe have given: after the last epoch, and in the epoch of the highest test accuracy.

    ``paper`` is the published accuracy, None where there is none, and ``epoch`` which of the two it is.
    """

    recipe: str
    method: str
    model: str
    data: str
    accuracies: Mapping[int, float]
    """Test accuracy (0..1) after the last epoch, by seed; runs that have diverged are not in it."""
    mean: float | None
    std: float | None
    """Of the sample (n - 1); None for fewer than two runs."""
    depths: Mapping[str, float]
    """Test accuracy after the last epoch by local loss, the first segment's first: the mean over the seeds."""
    best: Mapping[int, float]
    """The highest test accuracy of any epoch, by seed."""
    best_mean: float | None
    best_std: float | None
    paper: float | None
    epoch: str
    """``best``, ``last``, or ``unstated``; empty where there is no published number."""
    source: str
    hours: float
    """Of all runs of this recipe together, as far as they have told; of those done elsewhere, hours times cores."""
    machines: tuple[str, ...]
    diverged: Mapping[int, str]
    """What was wrong, by seed."""
    folders: tuple[str, ...]


def plan(
    sources: Sequence[str] | Mapping[str, Recipe],
    seeds: int,
    output: str | Path,
    *,
    words: Sequence[str] = (),
    **settings: Any,
) -> list[Trial]:
    """Return the runs of a sweep: every recipe with seeds 0, 1, ..., the first seed of all recipes first.

    Args:
        sources: packaged recipes by name, or files; or recipes by what ``--methods`` calls them. Each names its model.
        seeds: number of seeds.
        output: folder; a run is in ``NAME-seedS`` below it, where NAME is that of the recipe, or of its file.
        words: what was typed about recipes that have no file, such as their cuts; a part of their command.
        settings: training settings that come before those of the recipes; None leaves the recipe's.

    Raises:
        OptionError: no recipe, one that names no model, or two of the same name.
        LocalizeError: a recipe cannot be read, or its data set is unknown.
        MissingError: a folder holds a run of something else.
    """
    named: dict[str, tuple[str, Recipe]] = {}
    for source in sources:
        recipe = sources[source] if isinstance(sources, Mapping) else recipes.load(source)
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
    methods = isinstance(sources, Mapping)
    trials = []
    for seed in range(seeds):
        for name, (_, recipe) in named.items():
            own = {**recipe.train, **given, "seed": seed, "output": str(Path(output) / f"{name}-seed{seed}")}
            model = str(recipe.model)  # which it names, as was checked above
            config = TrainConfig(model, recipe=recipe, input_shape=recipe.input_shape, **own)
            typed = [model, "--methods", named[name][0], *words] if methods else [named[name][0]]
            trials.append(Trial(name, config, _command(typed, seeds, given)))
    for trial in trials:
        _check(trial)
    return trials


def _command(source: Sequence[str], seeds: int, settings: Mapping[str, Any]) -> str:
    """Return the command that makes the runs of a recipe; where the data lie and what computes is left out."""
    flags = [(f"--{name.replace('_', '-')}", value) for name, value in settings.items() if name not in ELSEWHERE]
    typed = [word for flag, value in flags for word in ([flag] if value is True else [flag, str(value)])]
    return shlex.join(["localize", "compare", "--train", *source, "--seeds", str(seeds), *typed])


def sweep(trials: Sequence[Trial], book: str | Path | None = None) -> list[Row]:
    """Run what has not finished; return a row for every recipe. What runs print goes to stderr.

    Args:
        trials: from :func:`plan`.
        book: file that gets a line for every finished run that it does not hold, see :mod:`localize.train.ledger`. A
            run that it holds and that has no folder here was done elsewhere, and is not repeated.

    Raises:
        LocalizeError: a run cannot be carried out; see :func:`localize.train.run`. One that diverges is in its row.
    """
    diverged: dict[Path, str] = {}
    elsewhere = _done_elsewhere(trials, book)
    for number, trial in enumerate(trials, 1):
        if finished(trial.folder):
            _enter(trial, book)
            continue
        if trial.folder in elsewhere:
            print(f"run {number} of {len(trials)}: {book} has it", file=sys.stderr, flush=True)
            continue
        with contextlib.redirect_stdout(sys.stderr):
            print(f"run {number} of {len(trials)}: {trial.folder}", flush=True)
            try:
                _run(trial)
            except DivergedError as error:
                diverged[trial.folder] = error.problem
                print(f"error: {error}", flush=True)
                continue
        _enter(trial, book)
    return list(_rows(trials, diverged, elsewhere))


def _done_elsewhere(trials: Sequence[Trial], book: str | Path | None) -> dict[Path, ledger.Line]:
    """Return the lines of a book that are runs of a sweep, by the folders that these would have and do not have."""
    lines = {} if book is None else {line.key: line for line in ledger.read(Path(book))}
    keys = {
        trial.folder: (trial.recipe, digest(loop.merge(loop.fresh(trial.config))), trial.config.seed)
        for trial in (trials if lines else ())
        if not trial.folder.exists()
    }
    return {folder: lines[key] for folder, key in keys.items() if key in lines}


def _enter(trial: Trial, book: str | Path | None) -> None:
    """Write a finished run into the book."""
    if book is not None:
        ledger.append(Path(book), [line(trial)])


def line(trial: Trial) -> ledger.Line:
    """Return what the folder of a finished run says, as a line of the book.

    Raises:
        MissingError: it does not say what :func:`localize.train.run` and this module write.
    """
    epochs, cost, recipe = _epochs(trial.folder), _cost(trial.folder), recipes.load(trial.folder / recipes.FILE_NAME)
    best = max(epochs, key=lambda epoch: epoch.test_accuracy)
    data = recipe.dataset
    assert data is not None and data.train is not None, "a run writes what it was trained on"
    return ledger.Line(
        recipe=trial.recipe,
        hash=digest(recipe),
        method=recipe.method,
        model=str(recipe.model),
        data=trial.config.data,
        images=(data.train.images, data.test.images),
        seed=trial.config.seed,
        epochs=epochs[-1].epoch,
        last=epochs[-1].test_accuracy,
        best=best.test_accuracy,
        best_epoch=best.epoch,
        core_hours=round(cost.seconds * cost.cores / 3600, 3),
        machine=cost.machine,
        versions=build.versions(),
        command=trial.command,
    )


def digest(recipe: Recipe) -> str:
    """Return the hash of a recipe whose options are written out: of all that decides what it learns, but the seed.

    Training settings at their defaults, the plain loss, parameters to freeze where there are none, and what steps
    return are left out, so that a later version with more of them has the same hash.
    """
    told = _compared(recipe)
    told["schedule"] = {key: value for key, value in told["schedule"].items() if key != "scores"}
    defaults = {**TrainConfig(str(recipe.model)).training(), "loss": {}, "freeze": ()}
    return ledger.digest({key: value for key, value in told.items() if key not in defaults or value != defaults[key]})


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
        cost = {
            "seconds": round(before + time.perf_counter() - started, 1),
            "machine": machine(trial.config.device),
            "cores": torch.get_num_threads() if choose_device(trial.config.device).type == "cpu" else 1,
        }
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
    decided = ("model", "method", "model_options", "options", "cut", "freeze", "terms", "loss", "schedule")
    told = {key: fields[key] for key in decided}
    if recipe.input_shape is not None:
        told["input_shape"] = recipe.input_shape
    training = TrainConfig(str(recipe.model), **recipe.train).training()
    return told | {key: value for key, value in training.items() if key not in ELSEWHERE}


def _rows(
    trials: Sequence[Trial], diverged: Mapping[Path, str], elsewhere: Mapping[Path, ledger.Line]
) -> Iterator[Row]:
    for name in dict.fromkeys(trial.recipe for trial in trials):
        mine = [trial for trial in trials if trial.recipe == name]
        done = [trial for trial in mine if trial.folder not in diverged and trial.folder not in elsewhere]
        lines = [elsewhere[trial.folder] for trial in mine if trial.folder in elsewhere]
        found = {trial.config.seed: _epochs(trial.folder) for trial in done}
        accuracies = {seed: epochs[-1].test_accuracy for seed, epochs in found.items()}
        accuracies |= {line.seed: line.last for line in lines}
        best = {seed: max(one.test_accuracy for one in epochs) for seed, epochs in found.items()}
        best |= {line.seed: line.best for line in lines}
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
            depths=_by_depth([epochs[-1] for epochs in found.values()]),
            best=best,
            best_mean=statistics.mean(best.values()) if best else None,
            best_std=statistics.stdev(best.values()) if len(best) > 1 else None,
            paper=paper.value if paper.source else None,
            epoch=paper.epoch if paper.source else "",
            source=paper.source,
            hours=sum(cost.seconds for cost in costs) / 3600 + sum(line.core_hours for line in lines),
            machines=tuple(dict.fromkeys([c.machine for c in costs if c.machine] + [line.machine for line in lines])),
            diverged={trial.config.seed: diverged[trial.folder] for trial in mine if trial.folder in diverged},
            folders=tuple(str(trial.folder) for trial in mine if trial.folder not in elsewhere),
        )


def _by_depth(epochs: Sequence[metrics.EpochMetrics]) -> dict[str, float]:
    """Return the mean test accuracy of every local loss that has one, over epochs of several runs of one recipe."""
    by_name: dict[str, list[float]] = {}
    for epoch in epochs:
        for loss in epoch.segments:
            if loss.test_accuracy is not None:
                by_name.setdefault(loss.name, []).append(loss.test_accuracy)
    return {name: statistics.mean(values) for name, values in by_name.items()}


def _epochs(folder: Path) -> tuple[metrics.EpochMetrics, ...]:
    """Return the epochs of a finished run, at least one."""
    epochs = metrics.read(folder)
    if not epochs:
        raise MissingError(
            f"{folder} has no {runs.METRICS}.",
            facts="its run has finished, and this file says how.",
            help=f"put it back, or remove {folder} to train it again",
        )
    return epochs


@pydantic_dataclass(frozen=True, config=pydantic.ConfigDict(strict=True, allow_inf_nan=False))
class _Cost:
    seconds: float = 0.0
    machine: str = ""
    cores: int = 1


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
