"""Pictures of what layers see: saliency, that is where features look like a label, and feature maps.

S. Choi, M. Jeon, Y. Hwang, J. Oh, S. Lim, J. Lee, M. Kang. Dictionary contrastive learning for efficient local
supervision without auxiliary networks. ICLR 2024 (figures 5, VIII to X). Zhang et al., MLAAN, 2025 (figure 4).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from localize import inference
from localize.analysis.planes import chosen
from localize.errors import OptionError
from localize.heads.maps import FeatureMap
from localize.train.loaded import LoadedRun


def pixels(run: LoadedRun, x: Tensor) -> Tensor:
    """Undo the normalisation of images (N, C, H, W); the values are in [0, 1]."""
    mean, std = (torch.tensor(one).reshape(-1, 1, 1) for one in (run.preprocessing.mean, run.preprocessing.std))
    return (x.cpu() * std + mean).clamp(0, 1)


def _lines(maps: Tensor) -> Iterator[list[Any]]:
    """Yield row, column and value of a map (H, W)."""
    for i, row in enumerate(maps.tolist()):
        for j, value in enumerate(row):
            yield [i, j, round(value, 4)]


# ------------------------------------------------------------------------------------------------------------ saliency


@dataclass(frozen=True)
class Saliency:
    """Where in test images the features of each layer look like the labels that the model finds most likely."""

    classes: tuple[str, ...]
    images: tuple[int, ...]
    """Their numbers among the test images."""
    pixels: Tensor
    """(N, C, H, W), values in [0, 1]."""
    truth: tuple[int, ...]
    """Class ids."""
    answers: tuple[tuple[int, ...], ...]
    """The most likely labels of each image according to the model, the most likely first."""
    maps: Mapping[str, Tensor]
    """Maps by layer, (N, labels, h, w), each scaled to [0, 1] over its positions."""

    def csv(self) -> Iterator[list[Any]]:
        """Yield one line for each place of each map."""
        yield ["image", "class", "label", "layer", "row", "column", "saliency"]
        for layer, maps in self.maps.items():
            for n, image in enumerate(self.images):
                for label, one in zip(self.answers[n], maps[n], strict=True):
                    for line in _lines(one):
                        yield [image, self.classes[self.truth[n]], self.classes[label], layer, *line]

    def plain(self) -> dict[str, Any]:
        """Return labels and maps."""
        maps = {layer: one.tolist() for layer, one in self.maps.items()}
        return {
            "classes": self.classes, "images": self.images, "truth": self.truth, "answers": self.answers, "maps": maps
        }  # fmt: skip

    def table(self) -> list[list[str]]:
        """Return, for each image and layer, the share of positions above half of the largest saliency."""
        lines = [["image", "class", "label", *self.maps]]
        for n, image in enumerate(self.images):
            for k, label in enumerate(self.answers[n]):
                shares = [float((maps[n, k] > 0.5).double().mean()) for maps in self.maps.values()]
                names = (self.classes[self.truth[n]], self.classes[label])
                lines.append([str(image), *names, *(f"{100 * share:.0f} %" for share in shares)])
        return lines

    def notes(self) -> list[str]:
        """Return the meaning of the numbers in the table."""
        return ["share of the positions whose saliency is above half of the largest, by layer"]


def saliency(run: LoadedRun, *, images: int = 4, top: int = 2) -> Saliency:
    """Return, for some test images, where the features of each layer look like a label, <h^k, t_z>.

    Args:
        run: a run from :func:`localize.load`, whose local losses score feature maps against label embeddings.
        images: largest number of images, evenly spaced over the test images.
        top: number of labels for each image, the most likely ones.

    Returns:
        Maps (N, top, h, w) by layer.

    Raises:
        OptionError: its method has no label embeddings, or there are no feature maps.
        MissingError: the test images are missing or have changed.
    """
    local = run.local.eval()
    layers = inference.saliency_layers(local)
    if not layers:
        raise OptionError(
            f"{run.folder} has no feature maps that are compared with label embeddings.",
            facts="saliency is a picture of the positions of a feature map.",
            help="use a model with convolutions",
        )
    places = chosen(run, images)
    x, y = run.test.test[places]
    x = x.to(next(run.model.parameters()).device)
    answers = inference.answer(local, x).topk(min(top, len(run.classes)), 1).indices
    maps = {}
    for layer, which in layers.items():
        height, width = local.plan.segments.segments[layer.segment].features[which].space
        found = [inference.saliency(local, x, labels, at=layer.name, size=(height, width)) for labels in answers.T]
        maps[layer.ends_at] = torch.stack(found, 1).cpu()
    told = tuple(tuple(labels) for labels in answers.tolist())
    return Saliency(run.classes, tuple(places), pixels(run, x), tuple(y.tolist()), told, maps)


# ------------------------------------------------------------------------------------------------------------ features


@dataclass(frozen=True)
class LayerMaps:
    """Feature maps of one layer on one image."""

    layer: str
    mean: Tensor
    """(h, w): mean of the absolute values over all channels."""
    channels: tuple[int, ...]
    """The channels with the largest mean square on this image, in descending order."""
    maps: Tensor
    """(channels, h, w)."""


@dataclass(frozen=True)
class Features:
    """Feature maps of a test image in one or several runs."""

    image: int
    """Its number among the test images."""
    pixels: Mapping[str, Tensor]
    """(C, H, W), values in [0, 1], by run."""
    by: Mapping[str, tuple[LayerMaps, ...]]
    """Layers that have feature maps, by run."""
    names: Mapping[str, str]
    """Name of each run in a picture."""

    def csv(self) -> Iterator[list[Any]]:
        """Yield a line for each position of each map; channel ``mean`` is the mean of absolute values."""
        yield ["run", "layer", "channel", "row", "column", "value"]
        for run, layers in self.by.items():
            for one in layers:
                for name, values in [("mean", one.mean), *zip(one.channels, one.maps, strict=True)]:
                    for line in _lines(values):
                        yield [run, one.layer, name, *line]

    def plain(self) -> dict[str, Any]:
        """Return maps by run and layer."""
        layers = {
            run: [
                {"layer": one.layer, "mean": one.mean.tolist(), "channels": one.channels, "maps": one.maps.tolist()}
                for one in found
            ]
            for run, found in self.by.items()
        }
        return {"image": self.image, "layers": layers}

    def table(self) -> list[list[str]]:
        """Return the size of the maps, and the channels shown."""
        lines = [["run", "after", "size", "channels"]]
        for run, layers in self.by.items():
            for one in layers:
                size = "x".join(map(str, one.mean.shape))
                lines.append([self.names[run], one.layer, size, " ".join(map(str, one.channels))])
        return lines

    def notes(self) -> list[str]:
        """Return the number of the image."""
        return [f"test image {self.image}; channels with the largest mean square on it"]


@torch.no_grad()
def features(runs: Mapping[str, LoadedRun], *, image: int = 0, channels: int = 6) -> Features:
    """Return the feature maps of one test image after each segment of runs.

    Args:
        runs: runs from :func:`localize.load`, by name.
        image: number of the image among the test images.
        channels: number of channels for each layer, those with the largest mean square.

    Returns:
        Maps (channels, h, w) by run and layer.

    Raises:
        OptionError: no layer of a run has feature maps.
        MissingError: the test images are missing or have changed.
    """
    shown, by = {}, {}
    for name, run in runs.items():
        x, _ = run.test.test[[image]]
        shown[name] = pixels(run, x)[0]
        found = run.layered.features(x.to(next(run.model.parameters()).device))
        layers = []
        for segment, values in zip(run.layered.plan.segments.segments[:-1], found, strict=False):
            maps = FeatureMap(segment.features)(*values)[0].float().cpu()
            if maps.shape[1:] == (1, 1):
                continue
            best = maps.square().mean((1, 2)).topk(min(channels, len(maps))).indices.tolist()
            layers.append(LayerMaps(segment.ends_at, maps.abs().mean(0), tuple(best), maps[best]))
        if not layers:
            raise OptionError(
                f"no layer of {name} has feature maps.",
                facts="its features are vectors, which have no positions.",
                help="use a model with convolutions",
            )
        by[name] = tuple(layers)
    return Features(image, shown, by, {name: name for name in runs})
