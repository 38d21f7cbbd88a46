"""Several recipes with several seeds each, as for a table of a paper: one folder for each run, and all can be resumed.

A finished run, which has written its weights, is not repeated; an interrupted run resumes from its last checkpoint.
``cost.json`` records the cost of a run so far, without the time of killed processes::

    {"seconds": 3600.0, "machine": "1 of 2 cores", "cores": 1}

Every finished run is a line of a ledger, :mod:`localize.train.ledger`.
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
"""The metric of published numbers with which the accuracy of a run is compared."""
ELSEWHERE = ("output", "device", "workers", "data_dir", "download", "log_tensorboard", "log_wandb")
"""Settings that do not decide what a run learns."""


@dataclass(frozen=True)
class Trial:
    """One run of a sweep: a named recipe, with a seed and a folder."""

    recipe: str
    config: TrainConfig
    command: str = ""
    """The command, as far as it decides what the run learns."""

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        assert self.config.output is not None, "trials name their folders"
        return Path(self.config.output)


@dataclass(frozen=True)
class Row:
    """Results of the runs of one recipe, after the last epoch and in the epoch with the highest test accuracy.

    ``paper`` is the published accuracy, None if there is none; ``epoch`` says which of the two it is.
    """

    recipe: str
    method: str
    model: str
    data: str
    accuracies: Mapping[int, float]
    """Test accuracy (0..1) after the last epoch, by seed, without runs that diverged."""
    mean: float | None
    std: float | None
    """Sample standard deviation (n - 1); None for fewer than two runs."""
    depths: Mapping[str, float]
    """Test accuracy after the last epoch of each local loss, from the first segment on; mean over the seeds."""
    best: Mapping[int, float]
    """The highest test accuracy of any epoch, by seed."""
    best_mean: float | None
    best_std: float | None
    paper: float | None
    epoch: str
    """``best``, ``last``, or ``unstated``; empty if there is no published number."""
    source: str
    hours: float
    """Hours of all runs of this recipe, as far as recorded; for runs done elsewhere, hours times cores."""
    machines: tuple[str, ...]
    diverged: Mapping[int, str]
    """Errors of diverged runs, by seed."""
    folders: tuple[str, ...]


def plan(
    sources: Sequence[str] | Mapping[str, Recipe],
    seeds: int,
    output: str | Path,
    *,
    words: Sequence[str] = (),
    **settings: Any,
) -> list[Trial]:
    """Return the runs of a sweep: every recipe with seeds 0, 1, ...; the first seed of all recipes comes first.

    Args:
        sources: names or files of recipes; or recipes by their names in ``--methods``. Each names its model.
        seeds: number of seeds.
        output: folder; each run is in ``NAME-seedS`` below it, where NAME is that of the recipe or its file.
        words: typed flags of recipes that have no file, such as cuts; they become part of the command.
        settings: training settings that override those of the recipes; None keeps the recipe's.

    Returns:
        The runs, in the order in which they will be trained.

    Raises:
        OptionError: there is no recipe, one that names no model, or two with the same name.
        LocalizeError: a recipe cannot be read, or its data set is unknown.
        MissingError: a folder contains a run with other settings.
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
                help="use a recipe with a model: localize recipes ls; or a file of your own",
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
            model = str(recipe.model)  # checked above
            config = TrainConfig(model, recipe=recipe, input_shape=recipe.input_shape, **own)
            typed = [model, "--methods", named[name][0], *words] if methods else [named[name][0]]
            trials.append(Trial(name, config, _command(typed, seeds, given)))
    for trial in trials:
        _check(trial)
    return trials


def _command(source: Sequence[str], seeds: int, settings: Mapping[str, Any]) -> str:
    """Return the command for the runs of a recipe, without the data folder and the device."""
    flags = [(f"--{name.replace('_', '-')}", value) for name, value in settings.items() if name not in ELSEWHERE]
    typed = [word for flag, value in flags for word in ([flag] if value is True else [flag, str(value)])]
    return shlex.join(["localize", "compare", "--train", *source, "--seeds", str(seeds), *typed])


def sweep(trials: Sequence[Trial], book: str | Path | None = None) -> list[Row]:
    """Run the trials that have not finished, and return a row for every recipe. Output of the runs goes to stderr.

    Args:
        trials: the runs, from :func:`plan`.
        book: ledger to which each finished run is added, see :mod:`localize.train.ledger`. A run that it already
            contains but that has no folder here was done elsewhere, and is not repeated.

    Returns:
        A row for each recipe.

    Raises:
        LocalizeError: a run cannot be carried out; see :func:`localize.train.run`. A run that diverges is reported in
            its row.
    """
    diverged: dict[Path, str] = {}
    elsewhere = _done_elsewhere(trials, book)
    for number, trial in enumerate(trials, 1):
        if finished(trial.folder):
            _enter(trial, book)
            continue
        if trial.folder in elsewhere:
            print(f"run {number} of {len(trials)}: already in {book}", file=sys.stderr, flush=True)
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
    """Return the lines of a ledger for those runs of a sweep that have no folder here, by the missing folder."""
    lines = {} if book is None else {line.key: line for line in ledger.read(Path(book))}
    keys = {
        trial.folder: (trial.recipe, digest(loop.merge(loop.fresh(trial.config))), trial.config.seed)
        for trial in (trials if lines else ())
        if not trial.folder.exists()
    }
    return {folder: lines[key] for folder, key in keys.items() if key in lines}


def _enter(trial: Trial, book: str | Path | None) -> None:
    """Add a finished run to the ledger."""
    if book is not None:
        ledger.append(Path(book), [line(trial)])


def line(trial: Trial) -> ledger.Line:
    """Return a line of the ledger for the folder of a finished run.

    Raises:
        MissingError: its files are not as :func:`localize.train.run` and this module write them.
    """
    epochs, cost, recipe = _epochs(trial.folder), _cost(trial.folder), recipes.load(trial.folder / recipes.FILE_NAME)
    best = max(epochs, key=lambda epoch: epoch.test_accuracy)
    data = recipe.dataset
    assert data is not None and data.train is not None, "a run records its training data"
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
    """Return the hash of a complete recipe, over everything that decides what it learns, except the seed.

    Training settings at their defaults, options of the method that are off, the plain loss, an empty list of frozen
    parameters, and what steps return are left out, so the hash stays the same when a later version adds settings.
    """
    told = _compared(recipe)
    told["options"] = {key: value for key, value in told["options"].items() if value or isinstance(value, float)}
    told["schedule"] = {key: value for key, value in told["schedule"].items() if key != "scores"}
    defaults = {**TrainConfig(str(recipe.model)).training(), "loss": {}, "freeze": ()}
    return ledger.digest({key: value for key, value in told.items() if key not in defaults or value != defaults[key]})


def finished(folder: Path) -> bool:
    """Return whether a folder contains a finished run."""
    return (folder / runs.BACKBONE).is_file()


def machine(device: str) -> str:
    """Return the name of the GPU, or the number of cores that torch uses."""
    where = choose_device(device)
    if where.type == "cuda":
        return torch.cuda.get_device_name(where)
    return f"{torch.get_num_threads()} of {os.cpu_count()} cores"


def _run(trial: Trial) -> None:
    """Start or resume a run; at its end, or when it is interrupted, write its cost."""
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
    """Refuse a trial that cannot be trained, or whose folder contains a run with another recipe or settings."""
    asked = loop.merge(loop.fresh(trial.config))
    path = trial.folder / recipes.FILE_NAME
    if not path.is_file():
        runs.named(str(trial.folder))
        return
    there, here = _compared(recipes.load(path)), _compared(asked)
    differ = [key for key in here if key in there and here[key] != there[key]]
    if differ:
        raise MissingError(
            f"{trial.folder} contains a run with other settings.",
            facts=[f"{key} is {there[key]!r} there, but {here[key]!r} is asked for." for key in differ[:3]],
            help="use another --output",
        )


def _compared(recipe: Recipe) -> dict[str, Any]:
    """Return everything that decides what a run learns, by name; settings of later versions have their defaults."""
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
    """Return the mean test accuracy of each local loss that has one, over epochs of several runs of one recipe."""
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
            facts="the run has finished, and this file should contain its metrics.",
            help=f"restore it, or remove {folder} to train it again",
        )
    return epochs


@pydantic_dataclass(frozen=True, config=pydantic.ConfigDict(strict=True, allow_inf_nan=False))
class _Cost:
    seconds: float = 0.0
    machine: str = ""
    cores: int = 1


def _cost(folder: Path) -> _Cost:
    """Return the cost of a run; zero if it was not recorded.

    Raises:
        MissingError: the file is not as :func:`_run` writes it.
    """
    path = folder / runs.COST
    if not path.is_file():
        return _Cost()
    try:
        return pydantic.TypeAdapter(_Cost).validate_json(path.read_bytes())
    except pydantic.ValidationError as error:
        raise MissingError(
            f"{path} does not contain the cost of a run.",
            facts=error.errors()[0]["msg"],
            help="remove it; the hours are then not counted",
        ) from error
