"""What a run has written into ``metrics.jsonl``, read back; and the same by segment as a table, ``segments.csv``.

The table is always made of the whole of ``metrics.jsonl``, so that the two cannot say different things.
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
    """A local loss in one epoch; an accuracy (0..1) is None where the loss makes no class scores.

    What it has trained by is None in an epoch that leaves the loss out, since what it trains is frozen.
    """

    name: str
    route: tuple[int, int]
    """The first and the last segment that its gradient runs through."""
    train_loss: float | None = None
    train_accuracy: float | None = None
    test_accuracy: float | None = None


@dataclass(frozen=True, config=_CONFIG)
class EpochMetrics:
    """A line of ``metrics.jsonl``: what is said of the model's own output, and of every local loss."""

    epoch: int
    step: int
    train_loss: float
    train_accuracy: float
    test_accuracy: float
    lr: float
    images_per_second: float
    segments: tuple[LossMetrics, ...]
    images: int | None = None
    """Images that the epoch was trained on, in each process; earlier versions have not written it."""

    @property
    def seconds(self) -> float | None:
        """Seconds of loading, training and checkpoints, without tests; None where the line does not say."""
        if self.images is None or self.images_per_second <= 0:
            return None
        return self.images / self.images_per_second


_ADAPTER = pydantic.TypeAdapter(EpochMetrics)


def read(folder: Path) -> tuple[EpochMetrics, ...]:
    """Return the epochs that a run has written so far; none where it has not come to the end of one.

    Raises:
        MissingError: a line is not one that the trainer writes.
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
                f"line {number} of {path} does not hold the metrics of an epoch.",
                facts=f"{where}: {first['msg']}" if where else first["msg"],
                help="localize train writes them; take that line out",
            ) from error
    return tuple(epochs)


def segments_csv(epochs: Sequence[EpochMetrics]) -> str:
    """Return one line for every epoch and local loss, as CSV; an accuracy that is not known is left empty."""
    rows = (
        (epoch.epoch, loss.name, *loss.route, loss.train_loss, loss.train_accuracy, loss.test_accuracy)
        for epoch in epochs
        for loss in epoch.segments
    )
    return csv_table([COLUMNS, *rows])


def write_segments(folder: Path) -> None:
    """Write ``segments.csv`` anew from ``metrics.jsonl``, in one step: there is the old table or the new one.

    Raises:
        MissingError: it cannot be written.
    """
    with writing(folder, SEGMENTS), replacing(folder / SEGMENTS) as path:
        path.write_text(segments_csv(read(folder)), encoding="utf-8", newline="\n")
