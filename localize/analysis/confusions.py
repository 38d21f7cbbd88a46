"""Which classes the model and its local losses confuse, at every depth."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.metrics import confusion_matrix
from torch import Tensor

from localize import inference
from localize.analysis.batches import batches
from localize.train.loaded import LoadedRun

OUTPUT = "answer"
"""Name of the model's own prediction; see :func:`localize.inference.answer`."""


@dataclass(frozen=True)
class Confusion:
    """How often images of one class are predicted as another."""

    classes: tuple[str, ...]
    """Names of the classes, in the order of rows and columns."""
    by: Mapping[str, Tensor]
    """int64 (Z, Z) by predictor: the number of images of class i (row) that are predicted as class j (column).
    ``answer`` is the model's own prediction; the others are the local losses with class scores, from the first on."""

    @property
    def accuracy(self) -> dict[str, float]:
        """The share of right predictions (0..1), by predictor."""
        return {name: int(counts.diagonal().sum()) / int(counts.sum()) for name, counts in self.by.items()}

    @property
    def by_class(self) -> dict[str, list[float]]:
        """The share of right predictions (0..1) for each class, by predictor; NaN for a class without images."""
        return {name: (counts.diagonal().double() / counts.sum(1)).tolist() for name, counts in self.by.items()}

    @property
    def shares(self) -> dict[str, Tensor]:
        """Float64 (Z, Z) by predictor: the share of the images of class i that are predicted as class j."""
        return {name: counts.double() / counts.sum(1, keepdim=True).clamp(min=1) for name, counts in self.by.items()}

    def csv(self) -> Iterator[list[Any]]:
        """Yield a line for each predictor and each pair of classes that occurs."""
        yield ["predicted_by", "class", "predicted", "images"]
        for name, counts in self.by.items():
            for i, j in counts.nonzero().tolist():
                yield [name, self.classes[i], self.classes[j], int(counts[i, j])]

    def plain(self) -> dict[str, Any]:
        """Return accuracies and counts."""
        counts = {name: one.tolist() for name, one in self.by.items()}
        return {"classes": self.classes, "accuracy": self.accuracy, "confusion": counts}

    def table(self) -> list[list[str]]:
        """Return the accuracy by class and predictor."""
        by_class = self.by_class
        lines = [["class", *self.by]]
        for number, name in enumerate(self.classes):
            shares = [by_class[one][number] for one in self.by]
            lines.append([name, *("-" if math.isnan(share) else f"{100 * share:.1f} %" for share in shares)])
        lines.append(["all", *(f"{100 * value:.1f} %" for value in self.accuracy.values())])
        return lines

    def notes(self) -> list[str]:
        """Return the five pairs of classes that the model confuses most."""
        counts = self.by[OUTPUT].clone()
        counts.fill_diagonal_(0)
        pairs = [divmod(place, len(self.classes)) for place in counts.flatten().argsort(descending=True)[:5].tolist()]
        return [
            f"{self.classes[i]} predicted as {self.classes[j]}: {int(counts[i, j])} images"
            for i, j in pairs
            if counts[i, j]
        ]


@torch.no_grad()
def confusion(run: LoadedRun, *, batch_size: int | None = None, progress: bool | None = None) -> Confusion:
    """Count the predictions for each class on the test images of a run, predicting as ``localize eval`` does.

    Args:
        run: a run from :func:`localize.load`.
        batch_size: images at a time; default: the run's own.
        progress: show a progress bar on stderr; default: if stderr is a terminal.

    Returns:
        The counts, (Z, Z) for each predictor.

    Raises:
        MissingError: the test images are missing or have changed.
    """
    local, count = run.local.eval(), len(run.classes)
    layered = not local.plan.segments.trunk.eval_differs
    found: dict[str, Tensor] = {}
    for x, y in batches(run, "confusion", batch_size, progress):
        predicted = {OUTPUT: inference.answer(local, x)} | (local.scores(x) if layered else {})
        for name, scores in predicted.items():
            made = confusion_matrix(y.tolist(), scores.argmax(1).tolist(), labels=range(count))
            found[name] = found.get(name, 0) + torch.from_numpy(made)
    return Confusion(run.classes, found)
