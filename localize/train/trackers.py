"""TensorBoard and Weights & Biases are told what ``metrics.jsonl`` says: every line of it, and each once.

A run that goes on drops lines that are behind its checkpoint. TensorBoard's file is therefore made anew from the lines
that are left (the times in it are then those of that moment). Weights & Biases forgets nothing, and is told the lines
that it does not have. Offline it cannot know which: there every start leaves the whole of the run, and the last one is
what ``wandb sync`` is to be given.

Whether a run is tracked changes no number, and yet stands in its recipe, as its device does: a run that goes on has no
other place to read it from.
"""

from __future__ import annotations

import importlib
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from localize.errors import MissingError
from localize.files import replacing
from localize.recipes.settings import TrainConfig
from localize.train import runs

TENSORBOARD = "the file of TensorBoard"
Track = Callable[[Mapping[str, Any]], None]
"""Takes a line of ``metrics.jsonl``."""


def check(config: TrainConfig) -> None:
    """Import what ``config`` asks for.

    Raises:
        MissingError: it is not installed.
    """
    for asked, package in ((config.log_tensorboard, "tensorboard"), (config.log_wandb, "wandb")):
        if asked:
            try:
                importlib.import_module(package)
            except ImportError as error:
                raise MissingError(
                    f"--log-{package} needs the package {package}, which cannot be imported.",
                    facts=str(error),
                    help=f'pip install "torch-localize[{package}]"',
                ) from error


@contextmanager
def tracking(folder: Path, config: TrainConfig, recipe: str, metrics: Sequence[Mapping[str, Any]]) -> Iterator[Track]:
    """Tell the trackers that ``config`` asks for what a run has shown before; yield what tells them of another epoch.

    Args:
        folder: of the run.
        config: of the run.
        recipe: of the run, as YAML.
        metrics: the lines of ``metrics.jsonl`` so far.

    Raises:
        MissingError: Weights & Biases does not take the run; or a file cannot be written.
    """
    with ExitStack() as stack:
        tracks = []
        if config.log_tensorboard:
            tracks.append(stack.enter_context(_tensorboard(folder)))
        if config.log_wandb:
            tracks.append(stack.enter_context(_wandb(folder, recipe)))

        def track(line: Mapping[str, Any]) -> None:
            for one in tracks:
                one(line)

        for line in metrics:
            track(line)
        yield track


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of an epoch by name; those of a local loss as ``train_loss/NAME``, beside the model's own."""
    found = {name: value for name, value in line.items() if name not in ("step", "segments")}
    for loss in line["segments"]:
        of_loss = {key: loss[key] for key in ("train_loss", "train_accuracy", "test_accuracy")}
        found |= {f"{key}/{loss['name']}": value for key, value in of_loss.items() if value is not None}
    return found


@contextmanager
def _tensorboard(folder: Path) -> Iterator[Track]:
    """Make TensorBoard's file anew, in the folder of the run."""
    from torch.utils.tensorboard import SummaryWriter

    with runs.writing(folder, TENSORBOARD):
        for stale in folder.glob(runs.EVENTS):
            stale.unlink()
        # A TensorBoard that is open has read the file that was there: step 0 tells it to forget that.
        writer = SummaryWriter(str(folder), purge_step=0)
    with writer:

        def track(line: Mapping[str, Any]) -> None:
            with runs.writing(folder, TENSORBOARD):
                for name, value in numbers(line).items():
                    writer.add_scalar(name, value, line["step"])
                writer.flush()

        yield track


@contextmanager
def _wandb(folder: Path, recipe: str) -> Iterator[Track]:
    """Begin a run of Weights & Biases, or go on with it."""
    import wandb

    path = folder / runs.WANDB_ID
    if not path.is_file():
        with runs.writing(folder, path.name), replacing(path) as temporary:
            temporary.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    try:
        run = wandb.init(
            dir=str(folder),
            id=path.read_text(encoding="utf-8").strip(),
            name=folder.resolve().name,
            config=yaml.safe_load(recipe),
            resume="allow",
            reinit="create_new",
        )
    except wandb.errors.Error as error:
        raise MissingError(
            "Weights & Biases does not take the run.",
            facts=str(error),
            help=f"wandb login, or WANDB_MODE=offline; then localize train --resume {folder}",
        ) from error

    def track(line: Mapping[str, Any]) -> None:
        if line["step"] >= run.starting_step:
            run.log(numbers(line), step=line["step"], commit=True)

    try:
        yield track
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()
