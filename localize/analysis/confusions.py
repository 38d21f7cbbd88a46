"""Which classes are taken for which, by the model and at every depth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from sklearn.metrics import confusion_matrix
from torch import Tensor

from localize import inference
from localize.analysis.batches import batches
from localize.train.loaded import LoadedRun

OUTPUT = "answer"
"""What the model answers with is called so; see :func:`localize.inference.answer`."""


@dataclass(frozen=True)
class Confusion:
    """How often images of one class are taken for another."""

    classes: tuple[str, ...]
    """In the order of rows and columns."""
    by: Mapping[str, Tensor]
    """int64 (Z, Z) by the name of what predicts: row i counts the images of class i, column j what is predicted.
    ``answer`` is the model's own answer; the others are the local losses with class scores, from the first on."""

    @property
    def accuracy(self) -> dict[str, float]:
        """The share of right predictions (0..1), by the name of what predicts."""
        return {name: int(counts.diagonal().sum()) / int(counts.sum()) for name, counts in self.by.items()}

    @property
    def by_class(self) -> dict[str, list[float]]:
        """The share of the images of each class that are predicted right; NaN for a class without images."""
        return {name: (counts.diagonal().double() / counts.sum(1)).tolist() for name, counts in self.by.items()}


@torch.no_grad()
def confusion(run: LoadedRun, *, batch_size: int | None = None, progress: bool | None = None) -> Confusion:
    """Count on the test images of a run what is predicted for which class, as ``localize eval`` predicts.

    Args:
        run: from :func:`localize.load`.
        batch_size: images at a time; default is the run's own.
        progress: show a bar on stderr; default: if stderr is a terminal.

    Raises:
        MissingError: the test images are not there, or have changed.
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
