"""Send ``metrics.jsonl`` to TensorBoard and Weights & Biases: every line, exactly once.

A resumed run drops the lines after its checkpoint. TensorBoard's file is therefore rewritten from the remaining lines
(its times are then those of the rewrite). Weights & Biases keeps everything, and receives the lines that it lacks.
Offline it cannot know which; there every start writes the whole run, and the last one is the one for ``wandb sync``.

Tracking does not change any number. It is part of the recipe, like the device, because a resumed run has no other place
to read it from.
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
"""A function that takes a line of ``metrics.jsonl``."""


def check(config: TrainConfig) -> None:
    """Import the trackers that ``config`` asks for.

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
    """Send the lines so far to the configured trackers; yield a function that sends another line.

    Args:
        folder: the run folder.
        config: the settings of the run.
        recipe: the recipe of the run, as YAML.
        metrics: the lines of ``metrics.jsonl`` so far.

    Raises:
        MissingError: Weights & Biases does not accept the run, or a file cannot be written.
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
    """Return the numbers of an epoch by name; those of a local loss have names such as ``train_loss/NAME``."""
    found = {name: value for name, value in line.items() if name not in ("step", "segments")}
    for loss in line["segments"]:
        of_loss = {key: loss[key] for key in ("train_loss", "train_accuracy", "test_accuracy")}
        found |= {f"{key}/{loss['name']}": value for key, value in of_loss.items() if value is not None}
    return found


@contextmanager
def _tensorboard(folder: Path) -> Iterator[Track]:
    """Rewrite TensorBoard's file in the run folder."""
    from torch.utils.tensorboard import SummaryWriter

    with runs.writing(folder, TENSORBOARD):
        for stale in folder.glob(runs.EVENTS):
            stale.unlink()
        # An open TensorBoard has read the old file; step 0 makes it forget that.
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
    """Start or resume a run at Weights & Biases."""
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
            "Weights & Biases does not accept the run.",
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
