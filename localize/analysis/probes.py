"""How well a linear classifier distinguishes the classes, on the images and on the features after each segment.

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
"""Name of the input of the first segment."""


@dataclass(frozen=True)
class Probe:
    """A linear classifier on the features after one segment."""

    segment: int
    """Index of the segment; -1 for the images."""
    ends_at: str
    width: int
    """Number of features: channels, averaged over positions."""
    train_accuracy: float
    """Accuracy (0..1) on the images to which it was fitted."""
    test_accuracy: float


@torch.no_grad()
def probe(
    run: LoadedRun, *, alpha: float = 1.0, batch_size: int = 256, progress: bool | None = None
) -> tuple[Probe, ...]:
    """Fit a linear classifier to the input of each segment on the training images, and test it on the test images.

    It is ridge regression to +1 for the class of an image and -1 for the others, as in scikit-learn's
    ``RidgeClassifier``: with centred features X and targets Y, W = (X'X + alpha I)^-1 X'Y, and the largest output is
    the class. X'X and X'Y are added up over batches, so memory does not grow with the data. Nothing is random.

    Args:
        run: a run from :func:`localize.load`. Training images are not augmented; the model is in eval mode. If it was
            trained as one segment, the features are those after its local layers.
        alpha: weight of the squared norm of W, above 0.
        batch_size: images at a time.
        progress: show a progress bar on stderr; default: if stderr is a terminal.

    Returns:
        A probe for the images, and one for each segment except the last, whose outputs are class scores.

    Raises:
        OptionError: ``alpha`` is not above 0.
        InputError: in eval mode the model computes operations that its segments do not contain.
        MissingError: the images are missing or have changed.
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
    """Return the images (N, C, H, W) and the values at each cut as averaged channels, float64 (N, width)."""
    found = [one(*values).flatten(2).double().mean(2) for one, values in zip(maps, local.features(x), strict=False)]
    return [x.flatten(2).double().mean(2), *found]


class _Sums:
    """The sums over all images that ridge regression needs."""

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
