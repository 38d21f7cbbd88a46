"""Which images lie together in the features after each segment: t-SNE.

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
"""Test images that are shown."""


@dataclass(frozen=True)
class Neighbours:
    """Test images as points in a plane, by layer."""

    classes: tuple[str, ...]
    images: tuple[int, ...]
    """Their places in the test images."""
    labels: tuple[int, ...]
    """Their class ids."""
    places: Mapping[str, Tensor]
    """float64 (N, 2) by layer."""

    def csv(self) -> Iterator[list[Any]]:
        """Yield one line for each image and layer."""
        yield ["layer", "image", "class", "x", "y"]
        for layer, places in self.places.items():
            for image, label, place in zip(self.images, self.labels, places.tolist(), strict=True):
                yield [layer, image, self.classes[label], *(round(value, 4) for value in place)]

    def plain(self) -> dict[str, Any]:
        """Return places by layer."""
        places = {layer: found.tolist() for layer, found in self.places.items()}
        return {"classes": self.classes, "images": self.images, "labels": self.labels, "places": places}

    def table(self) -> list[list[str]]:
        """Return, by layer, how many images have an image of their class as the nearest point."""
        return [["after", "nearest is of the same class"], *([n, f"{100 * s:.1f} %"] for n, s in self.same().items())]

    def notes(self) -> list[str]:
        """Return how many images there are."""
        return [f"{len(self.images)} test images"]

    def same(self) -> dict[str, float]:
        """Return the share of the images whose nearest point in the plane is of their class (0..1), by layer."""
        labels = torch.tensor(self.labels)
        found = {}
        for layer, places in self.places.items():
            distances = torch.cdist(places, places).fill_diagonal_(float("inf"))
            found[layer] = float((labels[distances.argmin(1)] == labels).double().mean())
        return found


def chosen(run: LoadedRun, most: int) -> list[int]:
    """Return the places of as many test images, evenly spaced, or of all where there are fewer."""
    count = len(run.test.test)
    return [index * count // min(most, count) for index in range(min(most, count))]


@torch.no_grad()
def neighbours(run: LoadedRun, layer: str | None = None, *, images: int = MOST) -> Neighbours:
    """Put test images into a plane so that those with similar features lie together, for each layer.

    Args:
        run: from :func:`localize.load`.
        layer: where a segment ends; default is the end of each segment but the last.
        images: as many at most, evenly spaced. They are held in memory together.

    Raises:
        MissingError: the test images are not there, or have changed.
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
