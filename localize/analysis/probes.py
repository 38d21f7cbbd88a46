"""How well the classes can be told apart by a linear classifier on the images, and on the features after each segment.

G. Alain, Y. Bengio. Understanding intermediate layers using linear classifier probes. 2016, arXiv:1610.01644.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from localize.analysis.batches import batches
from localize.errors import OptionError
from localize.heads.maps import FeatureMap
from localize.runtime.model import LocalModel
from localize.train.loaded import LoadedRun

IMAGES = "images"
"""What enters the first segment."""


@dataclass(frozen=True)
class Probe:
    """A linear classifier on the features after one segment, which enter the next one."""

    segment: int
    """-1 for the images, which enter the first."""
    ends_at: str
    width: int
    """Number of features: channels, averaged over places."""
    train_accuracy: float
    """On the images that it was fitted to (0..1)."""
    test_accuracy: float


@torch.no_grad()
def probe(
    run: LoadedRun, *, alpha: float = 1.0, batch_size: int = 256, progress: bool | None = None
) -> tuple[Probe, ...]:
    """Fit a linear classifier to what enters each segment, on the training images; test it on the test images.

    It is ridge regression to +1 for the class of an image and -1 for the others, as scikit-learn's ``RidgeClassifier``:
    with features X, centred, and targets Y, W = (X'X + alpha I)^-1 X'Y, and the class is the largest output. X'X and
    X'Y are added up over batches, so that memory does not grow with the data, and nothing is drawn.

    Args:
        run: from :func:`localize.load`. Training images are not augmented; the model is in eval mode. Where it was
            trained as one segment, the features are those after its local layers.
        alpha: weight of the squared norm of W, above 0.
        batch_size: images at a time.
        progress: show a bar on stderr; default: if stderr is a terminal.

    Returns:
        A probe for the images, and one for each segment but the last, whose output are class scores.

    Raises:
        OptionError: ``alpha`` is not above 0.
        InputError: the model computes other operations in eval mode than its segments hold.
        MissingError: the images are not there, or have changed.
    """
    if not alpha > 0:
        raise OptionError(f"alpha cannot be {alpha}.", facts="it must be above 0.", help="alpha=1.0")
    local = run.layered
    segments = local.plan.segments.segments[:-1]
    maps = [FeatureMap(segment.features) for segment in segments]
    count, channels = len(run.classes), run.preprocessing.input_size[0]
    widths = [channels, *(one.shape[0] for one in maps)]
    sums = [_Sums(width, count, next(local.parameters()).device) for width in widths]
    for x, y in batches(run, "probe: training images", batch_size, progress, part="train"):
        for values, total in zip(vectors(local, maps, x), sums, strict=True):
            total.add(values, y)
    fitted = [total.solve(alpha) for total in sums]
    right = torch.zeros(2, len(widths), dtype=torch.int64)
    images = [0, 0]
    parts: tuple[Literal["train", "test"], ...] = ("train", "test")
    for row, part in enumerate(parts):
        for x, y in batches(run, f"probe: {part} images again", batch_size, progress, part=part):
            images[row] += len(y)
            for column, values in enumerate(vectors(local, maps, x)):
                weights, bias = fitted[column]
                right[row, column] += ((values @ weights + bias).argmax(1) == y).sum().cpu()
    seen, tested = ([int(n) / total for n in counts] for counts, total in zip(right, images, strict=True))
    names = [(-1, IMAGES), *((segment.index, segment.ends_at) for segment in segments)]
    return tuple(Probe(*name, *rest) for name, *rest in zip(names, widths, seen, tested, strict=True))  # type: ignore[arg-type]  # mypy joins the types of a zip


def vectors(local: LocalModel, maps: Sequence[FeatureMap], x: Tensor) -> list[Tensor]:
    """Return the images (N, C, H, W) and what crosses each cut as float64 (N, width): channels, averaged."""
    found = [one(*values).flatten(2).double().mean(2) for one, values in zip(maps, local.features(x), strict=False)]
    return [x.flatten(2).double().mean(2), *found]


class _Sums:
    """What ridge regression needs to know of all images."""

    def __init__(self, width: int, classes: int, device: torch.device) -> None:
        zeros: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.count = 0
        self.x, self.y = torch.zeros(width, **zeros), torch.zeros(classes, **zeros)
        self.xx, self.xy = torch.zeros(width, width, **zeros), torch.zeros(width, classes, **zeros)

    def add(self, x: Tensor, labels: Tensor) -> None:
        """Add the vectors (N, width) and the class ids (N,) of a batch."""
        y = 2.0 * nn.functional.one_hot(labels, len(self.y)).double() - 1
        self.count += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx += x.T @ x
        self.xy += x.T @ y

    def solve(self, alpha: float) -> tuple[Tensor, Tensor]:
        """Return weights (width, classes) and bias (classes,)."""
        mean, target = self.x / self.count, self.y / self.count
        centred = self.xx - self.count * torch.outer(mean, mean)
        across = self.xy - self.count * torch.outer(mean, target)
        ridge = alpha * torch.eye(len(mean), dtype=torch.float64, device=mean.device)
        weights = torch.linalg.solve(centred + ridge, across)
        return weights, target - mean @ weights
