"""Which images lie close together in the features after each segment: t-SNE.

Backpropagation-free contrastive forward learning using label embeddings (CFL). 2023 (figures 6 to 9).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from localize.analysis.embeddings import plane
from localize.analysis.probes import vectors
from localize.heads.maps import FeatureMap
from localize.train.loaded import LoadedRun

MOST = 500
"""Default number of test images."""


@dataclass(frozen=True)
class Neighbours:
    """Test images as points in a plane, by layer."""

    classes: tuple[str, ...]
    images: tuple[int, ...]
    """Their numbers among the test images."""
    labels: tuple[int, ...]
    """Their class ids."""
    places: Mapping[str, Tensor]
    """Points by layer, float64 (N, 2)."""

    def csv(self) -> Iterator[list[Any]]:
        """Yield one line for each image and layer."""
        yield ["layer", "image", "class", "x", "y"]
        for layer, places in self.places.items():
            for image, label, place in zip(self.images, self.labels, places.tolist(), strict=True):
                yield [layer, image, self.classes[label], *(round(value, 4) for value in place)]

    def plain(self) -> dict[str, Any]:
        """Return points by layer."""
        places = {layer: found.tolist() for layer, found in self.places.items()}
        return {"classes": self.classes, "images": self.images, "labels": self.labels, "places": places}

    def table(self) -> list[list[str]]:
        """Return, by layer, the share of images whose nearest point is an image of their class."""
        return [["after", "nearest is of the same class"], *([n, f"{100 * s:.1f} %"] for n, s in self.same().items())]

    def notes(self) -> list[str]:
        """Return the number of images."""
        return [f"{len(self.images)} test images"]

    def same(self) -> dict[str, float]:
        """Return the share of images (0..1) whose nearest point in the plane is of their class, by layer."""
        labels = torch.tensor(self.labels)
        found = {}
        for layer, places in self.places.items():
            distances = torch.cdist(places, places).fill_diagonal_(float("inf"))
            found[layer] = float((labels[distances.argmin(1)] == labels).double().mean())
        return found


def chosen(run: LoadedRun, most: int) -> list[int]:
    """Return the numbers of at most this many test images, evenly spaced."""
    count = len(run.test.test)
    return [index * count // min(most, count) for index in range(min(most, count))]


@torch.no_grad()
def neighbours(run: LoadedRun, layer: str | None = None, *, images: int = MOST) -> Neighbours:
    """Map test images to a plane for each layer, so that images with similar features lie close together.

    Args:
        run: a run from :func:`localize.load`.
        layer: the end of a segment; default: the ends of all segments except the last.
        images: largest number of images, evenly spaced; their features are in memory at the same time.

    Returns:
        Points (N, 2) by layer.

    Raises:
        MissingError: the test images are missing or have changed.
    """
    places = chosen(run, images)
    segments = [one for one in run.layered.plan.segments.segments[:-1] if layer in (None, one.ends_at)]
    x, y = run.test.test[places]
    device = next(run.model.parameters()).device
    maps = [FeatureMap(segment.features) for segment in run.layered.plan.segments.segments[:-1]]
    found = [
        torch.cat(parts)
        for parts in zip(*(vectors(run.layered, maps, p.to(device)) for p in x.split(100)), strict=True)
    ]
    planes = {segment.ends_at: plane(found[segment.index + 1].cpu()) for segment in segments}
    return Neighbours(run.classes, tuple(places), tuple(y.tolist()), planes)
