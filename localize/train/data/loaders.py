"""Data sets fitted to a model, and batches of them on a device.

Images in memory are kept at the model's size, uint8 where they were, and a batch of them is taken, moved, augmented and
normalised as one tensor. Images in files are decoded when they are asked for, by worker processes if there are any.

All that is random in a pass over the training images is drawn, in the process that trains, from one generator: from
its state follow the order of the images and their augmentation, whatever the device and the number of workers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler, TensorDataset
from torchvision.datasets.folder import default_loader
from torchvision.transforms import v2

from localize.errors import OptionError, UnknownNameError, did_you_mean
from localize.train.data import sources
from localize.train.data.sources import ClassFolders, Files, Pixels
from localize.train.data.transforms import (
    AUGMENTATIONS,
    Augmentation,
    augment,
    evaluation_transform,
    normalise,
    training_transform,
)
from localize.train.parallel import ALONE, Team

MEASURED = 1_000
"""Of images in files, as many are looked at, evenly spaced, to measure mean and standard deviation."""


@dataclass(frozen=True)
class Fit:
    """How images become input of a model: its shape (C, H, W), the augmentation, and mean and std by channel."""

    shape: tuple[int, int, int]
    augmentation: Augmentation
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def finish(self, images: Tensor) -> Tensor:
        """Normalise images (N, C', H, W); grey ones fill every channel of the model."""
        return normalise(images, self.mean, self.std).expand(-1, self.shape[0], -1, -1).contiguous()


class MemoryImages(Dataset[tuple[Tensor, Tensor]]):
    """Images in memory; indexed by a number, a slice or a list, they are as a model sees them in a test."""

    def __init__(self, images: Tensor, labels: Tensor, fit: Fit) -> None:
        self.images, self.labels, self.fit = images, labels, fit

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int | slice | Sequence[int]) -> tuple[Tensor, Tensor]:
        if isinstance(index, int):
            return self.fit.finish(self.images[index, None])[0], self.labels[index]
        return self.fit.finish(self.images[index]), self.labels[index]


class FileImages(Dataset[tuple[Tensor, Tensor]]):
    """Images in files; indexed by a number, a slice or a list, they are as a model sees them in a test."""

    def __init__(self, files: Files, fit: Fit) -> None:
        self.files, self.fit = files, fit

    def __len__(self) -> int:
        return len(self.files.labels)

    def __getitem__(self, index: int | slice | Sequence[int]) -> tuple[Tensor, Tensor]:
        if isinstance(index, int):
            images, labels = self[[index]]
            return images[0], labels[0]
        decoded = _Decoded(self.files, evaluation_transform(self.fit.augmentation, self.fit.shape[1:]))
        chosen = range(len(self))[index] if isinstance(index, slice) else index
        images, labels = zip(*(decoded[(one, 0)] for one in chosen), strict=True)
        return self.fit.finish(torch.stack(images)), torch.tensor(labels)


Images = MemoryImages | FileImages
Order = BatchSampler | Sequence[Sequence[int]]
"""Batches of indices."""


@dataclass(frozen=True)
class DataSplits:
    """A data set, ready for a model: ``train`` and ``test`` give (images, class ids) for an index or a list of them.

    Images are float32 (C, H, W), normalised with ``mean`` and ``std`` of each channel (or one for all).
    """

    name: str
    train: Images
    test: Images
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load(
    name: str,
    input_shape: tuple[int, ...],
    *,
    data_dir: str | None = None,
    download: bool = False,
    augment: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> DataSplits:
    """Read a data set and fit it to a model's input.

    Args:
        name: a key of ``DATASETS``.
        input_shape: one image of the model, (C, H, W); grey images are repeated over the C channels of a batch.
        data_dir: folder that holds the data set; the bundled ones refuse it.
        download: fetch what is not there.
        augment: a key of ``AUGMENTATIONS``, for :func:`training_batches`; default is none, or that of the data set.
        mean: of the pixels, 0..1, one number or one for each channel; default: measured on the training images, before
            they are resized, or on ``MEASURED`` of them as a test sees them, where they are in files.
        std: the same.

    Raises:
        UnknownNameError: there is no such data set, or no such augmentation.
        OptionError: the input is not an image, the images have other channels, or these options do not go together.
        MissingError: the images, or the package that carries them, are not there.
    """
    source = sources.get(name)
    if len(input_shape) != 3:
        raise OptionError(
            f"data set {name!r} holds images, and this model takes input of shape {input_shape}.",
            facts="an image is (channels, height, width).",
        )
    if augment is None:
        augment = source.augment if isinstance(source, ClassFolders) else "none"
    if augment not in AUGMENTATIONS:
        raise UnknownNameError(
            f"there is no augmentation {augment!r}.",
            facts=f"augmentations are {', '.join(AUGMENTATIONS)}.",
            help=did_you_mean(augment, AUGMENTATIONS) or "--augment none",
        )
    how = AUGMENTATIONS[augment]
    train, test = sources.read(name, data_dir, download=download)
    channels = 3 if isinstance(train, Files) else train.images.shape[1]
    if channels not in (1, input_shape[0]):
        raise OptionError(
            f"data set {name!r} has {channels} channels, and this model takes {input_shape[0]}.",
            help=f"--input-shape {channels},{input_shape[1]},{input_shape[2]}",
        )
    for key, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) not in (1, channels):
            raise OptionError(
                f"pixel_{key} has {len(values)} numbers, and data set {name!r} has {channels} channels.",
                help=f"--pixel-{key} with one number, or one for each channel",
            )
    if mean is None or std is None:
        measured = _measure(train, how, input_shape[1:])
        mean, std = mean or measured[0], std or measured[1]
    fit = Fit(input_shape, how, tuple(mean), tuple(std))
    made = [FileImages(part, fit) if isinstance(part, Files) else _in_memory(name, part, fit) for part in (train, test)]
    classes = sources.num_classes(name, data_dir)
    return DataSplits(name, made[0], made[1], classes, fit.mean, fit.std)


def _in_memory(name: str, pixels: Pixels, fit: Fit) -> MemoryImages:
    if fit.augmentation.resized_crop:
        raise OptionError(
            f"augment 'imagenet' is for images in files, and data set {name!r} is held in memory.",
            help="--augment crop4-flip",
        )
    images = pixels.images if pixels.images.dtype == torch.uint8 else pixels.images.to(torch.float32)
    return MemoryImages(v2.functional.resize(images, list(fit.shape[1:]), antialias=True), pixels.labels, fit)


def _measure(
    part: Pixels | Files, how: Augmentation, size: tuple[int, ...]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of the pixels, 0..1, by channel."""
    if isinstance(part, Files):
        count = len(part.labels)
        chosen = torch.linspace(0, count - 1, min(count, MEASURED)).long().unique().tolist()
        decoded = _Decoded(part, evaluation_transform(how, size))
        images = torch.stack([decoded[(index, 0)][0] for index in chosen])
    else:
        images = part.images
    found = []
    for channel in range(images.shape[1]):
        values = images[:, channel]
        if values.dtype == torch.uint8:
            counts = torch.bincount(values.flatten(), minlength=256).double()
            grey = torch.arange(256, dtype=torch.float64) / 255
            mean = float((counts * grey).sum() / counts.sum())
            found.append((mean, math.sqrt((counts * (grey - mean) ** 2).sum() / counts.sum())))
        else:
            found.append((float(values.mean()), float(values.std(correction=0))))
    means, stds = zip(*found, strict=True)
    return means, stds


@dataclass(frozen=True)
class Batches:
    """Batches of (images, class ids) on a device, one pass over the data set for each iteration.

    ``generator`` is where the random numbers of a pass come from: with the state that it had before a pass, the pass
    can be had again.
    """

    loader: DataLoader[Any]
    finish: Callable[[Tensor], Tensor]
    generator: torch.Generator
    device: torch.device
    team: Team = ALONE
    """Each process of it takes its part of every batch."""

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.loader:
            images, labels = (one.to(self.device, non_blocking=True) for one in (images, labels))
            yield self.team.part(self.finish(images)), self.team.part(labels)


def training_batches(
    dataset: Images,
    batch_size: int,
    *,
    generator: torch.Generator,
    workers: int = 0,
    device: torch.device | str = "cpu",
    team: Team = ALONE,
) -> Batches:
    """Return whole batches, augmented, in a new order on every pass, drawn from ``generator``.

    The images that do not fill the last batch are left out of that pass.

    Args:
        dataset: the ``train`` of :func:`load`.
        batch_size: images in a batch of each process.
        generator: of the CPU; the only source of what is random.
        workers: processes that decode files; 0 decodes in this one. What they give is the same.
        device: where the batches are wanted.
        team: processes that draw the same numbers; together they see the batches of one process that takes as many
            images.

    Raises:
        OptionError: there are fewer images than one batch holds.
    """
    together = batch_size * team.size
    if together > len(dataset):
        raise OptionError(
            f"batch_size cannot be {batch_size}.",
            facts=f"there are {len(dataset):,} training images{f' for {team.size} processes' * (team.size > 1)}.",
            help=f"--batch-size {min(64, len(dataset) // team.size)}",
        )
    order = BatchSampler(RandomSampler(range(len(dataset)), generator=generator), together, drop_last=True)
    fit = dataset.fit
    if isinstance(dataset, FileImages):
        decoded = _Decoded(dataset.files, training_transform(fit.augmentation, fit.shape[1:]))
        loader = _file_loader(decoded, _Seeded(order, generator, team), workers, device)
        return Batches(loader, fit.finish, generator, torch.device(device))
    loader = _memory_loader(dataset, order, generator, device)
    # Every process augments all of a batch, so that all draw the same numbers, and takes its part behind it.
    finish = partial(_augmented, fit=fit, generator=generator)
    return Batches(loader, finish, generator, torch.device(device), team)


def _augmented(images: Tensor, *, fit: Fit, generator: torch.Generator) -> Tensor:
    return fit.finish(augment(images, fit.augmentation, generator))


def evaluation_batches(
    dataset: Images, batch_size: int, *, workers: int = 0, device: torch.device | str = "cpu", team: Team = ALONE
) -> Batches:
    """Return all images in order, as a test sees them; the last batch may be smaller.

    The global random state is left alone. Every process of a ``team`` gets some of the batches that one would get.
    """
    order = [*BatchSampler(SequentialSampler(range(len(dataset))), batch_size, drop_last=False)][team.rank :: team.size]
    unused = torch.Generator()
    if isinstance(dataset, FileImages):
        decoded = _Decoded(dataset.files, evaluation_transform(dataset.fit.augmentation, dataset.fit.shape[1:]))
        loader = _file_loader(decoded, _Seeded(order, unused), workers, device)
    else:
        loader = _memory_loader(dataset, order, unused, device)
    return Batches(loader, dataset.fit.finish, unused, torch.device(device))


def _memory_loader(
    dataset: MemoryImages, order: Order, generator: torch.Generator, device: torch.device | str
) -> DataLoader[Any]:
    # A sampler of index lists and no batch size: the data set is indexed once per batch, not once per image.
    raw = TensorDataset(dataset.images, dataset.labels)
    return DataLoader(raw, sampler=order, batch_size=None, generator=generator, pin_memory=_pinned(device))


def _file_loader(decoded: _Decoded, order: _Seeded, workers: int, device: torch.device | str) -> DataLoader[Any]:
    # The loader draws one number itself, which nothing uses: not from the generator of the order.
    return DataLoader(
        decoded,
        batch_sampler=order,
        generator=torch.Generator(),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=_pinned(device),
    )


def _pinned(device: torch.device | str) -> bool:
    return torch.device(device).type == "cuda"


class _Decoded(Dataset[tuple[Tensor, int]]):
    """Images in files, uint8 (C, H, W), and class ids; an index goes with the seed of what is random in the image."""

    def __init__(self, files: Files, transform: Callable[[Any], Tensor]) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files.labels)

    def __getitem__(self, index_and_seed: tuple[int, int]) -> tuple[Tensor, int]:
        index, seed = index_and_seed
        image = default_loader(self.files.paths[index])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.transform(image), self.files.labels[index]


class _Seeded:
    """Batches of indices as batches of (index, seed), the seeds drawn from ``generator``; of each, a process's part."""

    def __init__(self, order: Order, generator: torch.Generator, team: Team = ALONE) -> None:
        self.order, self.generator, self.team = order, generator, team

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for indices in self.order:
            seeds = torch.randint(2**63 - 1, (len(indices),), generator=self.generator)
            yield self.team.part(list(zip(indices, seeds.tolist(), strict=True)))
