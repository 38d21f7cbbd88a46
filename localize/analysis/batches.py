"""The images of a run, a batch at a time, with a progress bar."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from localize.train import data
from localize.train.loaded import LoadedRun
from localize.train.progress import watching


def batches(
    run: LoadedRun,
    what: str,
    batch_size: int | None = None,
    progress: bool | None = None,
    *,
    part: Literal["train", "test"] = "test",
    shuffled: torch.Generator | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images (N, C, H, W) and class ids (N,), on the model's device, in the order of the data set.

    Args:
        run: the run.
        what: label of the progress bar.
        batch_size: images at a time; default: the run's own.
        progress: show a progress bar on stderr; default: if stderr is a terminal.
        part: the test images, or the training images, which are not augmented.
        shuffled: generator for a random order; None keeps the order.
    """
    device = next(run.model.parameters()).device
    images = run.test.test if part == "test" else run.train
    size = batch_size or run.recipe.train["batch_size"]
    loader: Any = data.evaluation_batches(images, size, device=device)
    if shuffled is not None:
        order = torch.randperm(len(images), generator=shuffled).split(size)
        loader = _Drawn(images, [places.tolist() for places in order], device)
    with watching(what, len(loader), sys.stderr.isatty() if progress is None else progress) as advance:
        for x, y in loader:
            yield x, y
            advance()


@dataclass(frozen=True)
class _Drawn:
    """Batches in a given order."""

    images: data.Images
    order: list[list[int]]
    device: torch.device

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for places in self.order:
            x, y = self.images[places]
            yield x.to(self.device), y.to(self.device)
