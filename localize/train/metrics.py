"""Read ``metrics.jsonl`` of a run, and write it by segment as a table, ``segments.csv``.

The table is always made from the whole of ``metrics.jsonl``, so the two cannot disagree.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pydantic
from pydantic.dataclasses import dataclass

from localize.errors import MissingError
from localize.files import replacing
from localize.text import csv_table
from localize.train.runs import METRICS, SEGMENTS, writing

COLUMNS = ("epoch", "name", "first", "last", "train_loss", "train_accuracy", "test_accuracy")

_CONFIG = pydantic.ConfigDict(strict=True, allow_inf_nan=False, extra="ignore")


@dataclass(frozen=True, config=_CONFIG)
class LossMetrics:
    """A local loss in one epoch; an accuracy (0..1) is None if the loss makes no class scores.

    Training loss and accuracy are None in an epoch in which its blocks are frozen.
    """

    name: str
    route: tuple[int, int]
    """Numbers of the first and the last segment that its gradient reaches."""
    train_loss: float | None = None
    train_accuracy: float | None = None
    test_accuracy: float | None = None


@dataclass(frozen=True, config=_CONFIG)
class EpochMetrics:
    """A line of ``metrics.jsonl``: metrics of the model's own output and of every local loss."""

    epoch: int
    step: int
    train_loss: float
    train_accuracy: float
    test_accuracy: float
    lr: float
    images_per_second: float
    segments: tuple[LossMetrics, ...]
    images: int | None = None
    """Number of images that each process trained on in the epoch; None in files of earlier versions."""

    @property
    def seconds(self) -> float | None:
        """Seconds for loading, training and checkpoints, without tests; None if the line does not say."""
        if self.images is None or self.images_per_second <= 0:
            return None
        return self.images / self.images_per_second


_ADAPTER = pydantic.TypeAdapter(EpochMetrics)


def read(folder: Path) -> tuple[EpochMetrics, ...]:
    """Return the epochs that a run has finished so far.

    Raises:
        MissingError: a line is not in the form that the trainer writes.
    """
    path = folder / METRICS
    if not path.is_file():
        return ()
    epochs = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            epochs.append(_ADAPTER.validate_json(line))
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise MissingError(
                f"line {number} of {path} does not contain the metrics of an epoch.",
                facts=f"{where}: {first['msg']}" if where else first["msg"],
                help="remove that line (localize train writes such lines)",
            ) from error
    return tuple(epochs)


def segments_csv(epochs: Sequence[EpochMetrics]) -> str:
    """Return CSV with a line for every epoch and local loss; unknown accuracies are empty."""
    rows = (
        (epoch.epoch, loss.name, *loss.route, loss.train_loss, loss.train_accuracy, loss.test_accuracy)
        for epoch in epochs
        for loss in epoch.segments
    )
    return csv_table([COLUMNS, *rows])


def write_segments(folder: Path) -> None:
    """Rewrite ``segments.csv`` from ``metrics.jsonl`` in one step: the file is always the old table or the new one.

    Raises:
        MissingError: it cannot be written.
    """
    with writing(folder, SEGMENTS), replacing(folder / SEGMENTS) as path:
        path.write_text(segments_csv(read(folder)), encoding="utf-8", newline="\n")
