"""Data sets fitted to a model, and batches of them on a device.

Images in memory are stored at the model's size, as uint8 if they were uint8. A batch of them is selected, moved,
augmented and normalised as one tensor. Images in files are decoded when they are needed, in worker processes if there
are any. Without workers, decoded images are cached, up to ``KEPT`` bytes, so a small data set is decoded only once.

All random numbers of a pass over the training images come from one generator in the training process. Its state
determines the order of the images, their augmentation and how they are mixed, on any device and with any number of
workers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler, TensorDataset
from torch.utils.data import default_collate as collate
from torchvision.transforms import v2

from localize.errors import MissingError, OptionError
from localize.recipes.preprocessing import DataRecord, PartRecord, Preprocessing
from localize.train.data import fingerprint, inspection, sources
from localize.train.data.decoding import DamagedImageError, decode, to_tensor
from localize.train.data.fingerprint import Listing
from localize.train.data.folders import Files
from localize.train.data.inspection import Inspection
from localize.train.data.mixing import Mixing
from localize.train.data.sources import ClassFolders, Pixels
from localize.train.data.transforms import (
    AUGMENTATIONS,
    Augmentation,
    augment,
    evaluation_transform,
    named,
    normalise,
    seeded,
    tested,
    training_transform,
)
from localize.train.parallel import ALONE, Team

HASHED = 2**26
"""Total size in bytes up to which a run records the contents of image files by default: 64 MiB."""
KEPT = 2**29
"""Bytes of decoded training images, and again of decoded test images, that are cached: 512 MiB each."""
MEASURED = 1_000
"""Number of image files, evenly spaced, used to measure mean and standard deviation."""


@dataclass(frozen=True)
class Fit:
    """How images become the input of a model, and how they are augmented in training."""

    preprocessing: Preprocessing
    augmentation: Augmentation

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the input."""
        return self.preprocessing.input_size[1:]

    def finish(self, images: Tensor) -> Tensor:
        """Normalise images (N, C', H, W); a grey image is repeated in every channel of the model."""
        mean, std = self.preprocessing.mean, self.preprocessing.std
        channels = self.preprocessing.input_size[0]
        if images.shape[1] == channels:
            return normalise(images, mean, std)
        if len(set(mean)) == len(set(std)) == 1:
            return normalise(images, mean[:1], std[:1]).expand(-1, channels, -1, -1).contiguous()
        return normalise(images.expand(-1, channels, -1, -1), mean, std)


class MemoryImages(Dataset[tuple[Tensor, Tensor]]):
    """Images in memory. Indexing with a number, a slice or a list returns them as a model sees them in a test."""

    def __init__(self, images: Tensor, labels: Tensor, fit: Fit) -> None:
        self.images, self.labels, self.fit = images, labels, fit

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int | slice | Sequence[int]) -> tuple[Tensor, Tensor]:
        if isinstance(index, int):
            return self.fit.finish(self.images[index, None])[0], self.labels[index]
        return self.fit.finish(self.images[index]), self.labels[index]


class FileImages(Dataset[tuple[Tensor, Tensor]]):
    """Images in files. Indexing with a number, a slice or a list returns them as a model sees them in a test."""

    def __init__(self, files: Files, fit: Fit) -> None:
        self.files, self.fit, self.kept = files, fit, _Kept(KEPT)

    def __len__(self) -> int:
        return len(self.files.labels)

    def __getitem__(self, index: int | slice | Sequence[int]) -> tuple[Tensor, Tensor]:
        if isinstance(index, int):
            images, labels = self[[index]]
            return images[0], labels[0]
        decoded = _Decoded(self.files, self.fit.preprocessing, evaluation_transform(self.fit.preprocessing))
        chosen = range(len(self))[index] if isinstance(index, slice) else index
        samples = [decoded.at(one, 0) for one in chosen]
        pixels = torch.stack([image for image, _ in samples])
        return self.fit.finish(pixels), torch.tensor([label for _, label in samples])


Images = MemoryImages | FileImages
Order = BatchSampler | Sequence[Sequence[int]]
"""Batches of indices."""


@dataclass(frozen=True)
class TestSplit:
    """The test images of a data set, ready for a model: (images, class ids) for an index or a list of them.

    Images are float32 (C, H, W), normalised.
    """

    __test__ = False  # not a test, despite its name

    name: str
    test: Images
    classes: tuple[str, ...]
    """Names of the classes, in the order of the class ids."""
    preprocessing: Preprocessing
    record: DataRecord
    """Fingerprint of the data."""
    listing: Listing
    """Names and sizes of the files."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel, which is subtracted from the pixels (0..1)."""
        return self.preprocessing.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel, by which the difference is divided."""
        return self.preprocessing.std


@dataclass(frozen=True)
class DataSplits(TestSplit):
    """A data set, ready for a model: its test images, and ``train`` in the same form."""

    train: Images
    inspection: Inspection | None
    """Results of checking the files, if they were checked."""


def load(
    name: str,
    input_shape: tuple[int, ...],
    *,
    data_dir: str | None = None,
    download: bool = False,
    augment: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    preprocessing: Preprocessing | None = None,
    split: float | None = None,
    seed: int = 0,
    listing: Listing | None = None,
    skip_damaged: bool = False,
    hashed: bool | None = None,
    progress: bool | None = False,
) -> DataSplits:
    """Read a data set and fit it to a model's input.

    Args:
        name: a key of ``DATASETS``.
        input_shape: one image of the model, (C, H, W); grey images are repeated over the C channels of a batch.
        data_dir: folder of the data set; bundled data sets refuse it.
        download: download missing files.
        augment: a key of ``AUGMENTATIONS``, for :func:`training_batches`; default: that of the data set, or none.
        mean: mean of the pixels, 0..1: one number, or one for each channel of the images or of the model. Default:
            measured on the training images before they are resized; for images in files, measured on ``MEASURED`` of
            them as a test sees them.
        std: standard deviation of the pixels, in the same form.
        preprocessing: that of a run. Nothing is measured then, and files are not checked.
        split: share of each class to test on, for a folder without test images.
        seed: seed of that split.
        listing: the files of a run; its split is kept, and the files that it left out are left out again.
        skip_damaged: leave out files that cannot be used, instead of refusing them.
        hashed: include the contents of the files in the fingerprint; default: if they total at most ``HASHED`` bytes.
        progress: show a progress bar on stderr while files are checked; None: if stderr is a terminal.

    Returns:
        The training images and the test images: float32 (C, H, W), normalised, each with a class id.

    Raises:
        UnknownNameError: there is no such data set, or no such augmentation.
        OptionError: the model's input is not an image, the channels differ, or these options exclude each other.
        MissingError: the images, or the package that contains them, are missing or cannot be used.
    """
    source = sources.get(name)
    shape = _checked_shape(name, input_shape)
    if augment is None:
        augment = source.augment if isinstance(source, ClassFolders) else "none"
    how = named(augment)
    known = frozenset(listing.test) if listing is not None and split is not None else None
    train, test = sources.read(name, data_dir, download=download, split=split, seed=seed, known=known)
    _check_channels(name, train, shape)
    found, left_out = None, {}
    if hashed is None:
        paths = [path for part in (train, test) if isinstance(part, Files) for path in part.paths]
        hashed = fingerprint.total_size(paths) <= HASHED
    if isinstance(train, Files) and isinstance(test, Files):
        if preprocessing is None:
            found = inspection.inspect({"train": train, "test": test}, progress=progress)
            if not skip_damaged:
                inspection.refuse_damaged(found)
            gone = found.damaged
        else:
            gone = _left_out(listing, train, test)
        left_out = {n: fingerprint.entry(p, hashed=hashed) for part in (train, test) for n, p in
                    zip(part.names, part.paths, strict=True) if p in gone}  # fmt: skip
        train, test = (inspection.without(part, gone) for part in (train, test))
    if preprocessing is None:
        sixteen = found is not None and found.sixteen > 0
        preprocessing = _measured(name, train, how, shape, mean, std, 16 if sixteen else 8)
    classes = _class_names(train, source.num_classes)
    record, listed = _recorded(name, classes, train, test, data_dir, left_out, hashed=hashed)
    fit = Fit(preprocessing, how)
    made = [FileImages(part, fit) if isinstance(part, Files) else _in_memory(name, part, fit) for part in (train, test)]
    return DataSplits(name, made[1], classes, preprocessing, record, listed, made[0], found)


def load_test(
    name: str,
    preprocessing: Preprocessing,
    *,
    data_dir: str | None = None,
    download: bool = False,
    split: float | None = None,
    seed: int = 0,
    listing: Listing | None = None,
    hashed: bool = False,
) -> TestSplit:
    """Read the test images of a data set, as a run feeds them to its model. Training images are not needed.

    The arguments are those of :func:`load`.

    Raises:
        LocalizeError: see :func:`load`.
    """
    shape = _checked_shape(name, preprocessing.input_size)
    known = frozenset(listing.test) if listing is not None and split is not None else None
    test = sources.read_test(name, data_dir, download=download, split=split, seed=seed, known=known)
    _check_channels(name, test, shape)
    if isinstance(test, Files):
        test = inspection.without(test, _left_out(listing, test))
    classes = _class_names(test, sources.get(name).num_classes)
    record, listed = _recorded(name, classes, None, test, data_dir, {}, hashed=hashed)
    fit = Fit(preprocessing, AUGMENTATIONS["none"])
    made = FileImages(test, fit) if isinstance(test, Files) else _in_memory(name, test, fit)
    return TestSplit(name, made, classes, preprocessing, record, listed)


def _left_out(listing: Listing | None, *parts: Files) -> dict[str, str]:
    """Return the paths that a run left out, with the reason."""
    names = () if listing is None else listing.left_out
    return {
        path: "the run left it out"
        for part in parts
        for name, path in zip(part.names, part.paths, strict=True)
        if name in names
    }


def _recorded(
    name: str,
    classes: tuple[str, ...],
    train: Pixels | Files | None,
    test: Pixels | Files,
    data_dir: str | None,
    left_out: fingerprint.Entries,
    *,
    hashed: bool,
) -> tuple[DataRecord, Listing]:
    """Return the fingerprint of the data, and the files."""
    records: list[PartRecord | None] = []
    entries: list[fingerprint.Entries] = []
    for part in (train, test):
        entries.append(fingerprint.entries(part, hashed=hashed) if isinstance(part, Files) else {})
        if isinstance(part, Files):
            records.append(fingerprint.of_files(part, entries[-1]))
        else:
            pixels = None if part is None else fingerprint.of_pixels(part.images, part.labels, len(classes))
            records.append(pixels)
    assert records[1] is not None
    folder = "" if data_dir is None else str(Path(data_dir).expanduser().absolute())
    record = DataRecord(name, classes, records[1], records[0], hashed)
    return record, Listing(folder, entries[0], entries[1], left_out)


def _class_names(part: Pixels | Files, count: int | None) -> tuple[str, ...]:
    """Return the names of the classes; their ids if the data set has no names."""
    if isinstance(part, Files) or (part.classes and count in (None, len(part.classes))):
        return part.classes
    assert count is not None, "only class folders do not fix it"
    return tuple(map(str, range(count)))


def _checked_shape(name: str, input_shape: Sequence[int]) -> tuple[int, int, int]:
    if len(input_shape) != 3:
        raise OptionError(
            f"data set {name!r} contains images, but this model takes input of shape {tuple(input_shape)}.",
            facts="an image is (channels, height, width).",
        )
    channels, height, width = input_shape
    return channels, height, width


def _check_channels(name: str, part: Pixels | Files, shape: tuple[int, int, int]) -> None:
    """Refuse images that do not have the channels of the model."""
    if isinstance(part, Files):
        if shape[0] not in (1, 3):
            raise OptionError(
                f"data set {name!r} contains image files, but this model takes {shape[0]} channels.",
                facts="files are decoded to 3 channels (RGB) or to 1 (grey).",
                help=f"--input-shape 3,{shape[1]},{shape[2]}",
            )
        return
    channels = part.images.shape[1]
    if channels not in (1, shape[0]):
        raise OptionError(
            f"data set {name!r} has {channels} channels, but this model takes {shape[0]}.",
            help=f"a model of {channels} channels: --input-shape {channels},{shape[1]},{shape[2]}",
        )


def _in_memory(name: str, pixels: Pixels, fit: Fit) -> MemoryImages:
    if fit.augmentation.resized_crop:
        raise OptionError(
            f"augment {'imagenet' if fit.augmentation.policy is None else 'timm'!r} is for images in files, but data "
            f"set {name!r} is in memory.",
            help="--augment crop4-flip",
        )
    images = pixels.images if pixels.images.dtype == torch.uint8 else pixels.images.to(torch.float32)
    if images.is_floating_point() and not images.isfinite().all():
        bad = int((~images.flatten(1).isfinite().all(1)).nonzero()[0])
        raise MissingError(
            f"image {bad} of data set {name!r} contains NaN or infinite values.", help="repair or remove that image"
        )
    return MemoryImages(v2.functional.resize(images, list(fit.size), antialias=True), pixels.labels, fit)


def _measured(
    name: str,
    part: Pixels | Files,
    how: Augmentation,
    shape: tuple[int, int, int],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    bits: Literal[8, 16],
) -> Preprocessing:
    """Return how images become the input of a model; mean and std are measured if they are not given.

    Raises:
        OptionError: they were given for another number of channels, or a channel is constant.
    """
    channels = (
        1 if isinstance(part, Files) and shape[0] == 1 else 3 if isinstance(part, Files) else part.images.shape[1]
    )
    for key, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) not in (1, channels, shape[0]):
            raise OptionError(
                f"pixel_{key} has {len(values)} numbers, but data set {name!r} has {channels} channels.",
                help=f"--pixel-{key} with one number, or one for each channel",
            )
    neutral = Preprocessing(shape, (0.0,) * shape[0], (1.0,) * shape[0], **tested(how), bits=bits)
    if mean is None or std is None:
        measured = _measure(part, neutral)
        if std is None:
            _refuse_constant(name, *measured)
        mean, std = mean or measured[0], std or measured[1]
    means, stds = (tuple(map(float, values)) * (shape[0] if len(values) == 1 else 1) for values in (mean, std))
    return replace(neutral, mean=means, std=stds)


def _refuse_constant(name: str, means: Sequence[float], stds: Sequence[float]) -> None:
    constant = [channel for channel, value in enumerate(stds) if value < 1e-6]
    if constant:
        written = ",".join("1" if i in constant else f"{value:.4f}" for i, value in enumerate(stds))
        raise OptionError(
            f"channel {constant[0]} of the training images of {name!r} is constant.",
            facts=f"every pixel examined is {means[constant[0]]:.4f} there, so the standard deviation is 0.",
            help=f"--pixel-mean {','.join(f'{value:.4f}' for value in means)} --pixel-std {written}",
        )


def _measure(part: Pixels | Files, like: Preprocessing) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation of the pixels, 0..1, for each channel."""
    if isinstance(part, Files):
        count = len(part.labels)
        chosen = torch.linspace(0, count - 1, min(count, MEASURED)).long().unique().tolist()
        decoded = _Decoded(part, like, evaluation_transform(like))
        images = torch.stack([decoded.at(index, 0)[0] for index in chosen])
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
    """Batches of (images, class ids) on a device; each iteration is one pass over the data set.

    With ``mixing`` they are (mixed images, soft labels).

    The random numbers of a pass come from ``generator``. If its state from before a pass is restored, the pass can be
    repeated.
    """

    loader: DataLoader[Any]
    finish: Callable[[Tensor], Tensor]
    generator: torch.Generator
    device: torch.device
    team: Team = ALONE
    """The processes; each takes its part of every batch."""
    mixing: Mixing | None = None
    rank: int = 0
    """Rank of the process that mixes."""

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        mix = None if self.mixing is None else self.mixing.begun(self.generator, self.rank)
        for batch in self.loader:
            if isinstance(batch, DamagedImageError):
                raise batch
            images, labels = (one.to(self.device, non_blocking=True) for one in batch)
            images, labels = self.team.part(self.finish(images)), self.team.part(labels)
            yield (images, labels) if mix is None else mix(images, labels)


def training_batches(
    dataset: Images,
    batch_size: int,
    *,
    generator: torch.Generator,
    workers: int = 0,
    device: torch.device | str = "cpu",
    team: Team = ALONE,
    mixing: Mixing | None = None,
    read: bool = True,
) -> Batches:
    """Return full batches of augmented images, in a new order on every pass, drawn from ``generator``.

    The images that do not fill the last batch are left out of that pass.

    Args:
        dataset: the ``train`` of :func:`load`.
        batch_size: number of images in a batch of each process.
        generator: a generator of the CPU; the only source of random numbers.
        workers: number of processes that decode files; 0 decodes in this process. The batches are the same.
        device: device of the batches.
        team: processes that draw the same numbers; together they see the batches that one process would see with a
            batch as large as theirs together.
        mixing: how each process mixes its part of every batch; None does not mix.
        read: False leaves images in files unread, if they are not mixed: labels come with empty images.

    Returns:
        Batches of images (N, C, H, W), float32, and class ids (N,), or with ``mixing`` soft labels (N, Z).

    Raises:
        OptionError: there are fewer images than in one batch, or an odd number is to be mixed.
    """
    if mixing is not None and batch_size % 2:
        raise OptionError(
            f"batch_size cannot be {batch_size} if images are mixed.",
            facts="mixup and CutMix mix the images of a batch in pairs.",
            help=f"--batch-size {batch_size + 1}",
            option="batch_size",
        )
    together = batch_size * team.size
    if together > len(dataset):
        raise OptionError(
            f"batch_size cannot be {batch_size}.",
            facts=f"there are {len(dataset):,} training images{f' for {team.size} processes' * (team.size > 1)}.",
            help=f"--batch-size {min(64, len(dataset) // team.size)}",
        )
    order = BatchSampler(RandomSampler(range(len(dataset)), generator=generator), together, drop_last=True)
    fit = dataset.fit
    if isinstance(dataset, FileImages) and not read and mixing is None:
        loader = _file_loader(_Labels(dataset.files), _Seeded(order, generator, team), 0, device)
        return Batches(loader, _unchanged, generator, torch.device(device))
    if isinstance(dataset, FileImages):
        transform = training_transform(fit.augmentation, fit.preprocessing)
        decoded = _Decoded(dataset.files, fit.preprocessing, transform, None if workers else dataset.kept)
        loader = _file_loader(decoded, _Seeded(order, generator, team), workers, device)
        return Batches(loader, fit.finish, generator, torch.device(device), mixing=mixing, rank=team.rank)
    loader = _memory_loader(dataset, order, generator, device)
    # Every process augments the whole batch, so that all draw the same numbers, and then takes its part.
    finish = partial(_augmented, fit=fit, generator=generator)
    return Batches(loader, finish, generator, torch.device(device), team, mixing, team.rank)


def _augmented(images: Tensor, *, fit: Fit, generator: torch.Generator) -> Tensor:
    return fit.finish(augment(images, fit.augmentation, generator))


def evaluation_batches(
    dataset: Images,
    batch_size: int,
    *,
    workers: int = 0,
    device: torch.device | str = "cpu",
    team: Team = ALONE,
    read: bool = True,
) -> Batches:
    """Return batches of all images in order, as a test sees them; the last batch may be smaller.

    With ``read`` False images in files are not read, see :func:`training_batches`.

    The global random state is not changed. Each process of a ``team`` gets some of the batches.
    """
    order = [*BatchSampler(SequentialSampler(range(len(dataset))), batch_size, drop_last=False)][team.rank :: team.size]
    unused = torch.Generator()
    if isinstance(dataset, FileImages) and not read:
        loader = _file_loader(_Labels(dataset.files), _Seeded(order, unused), 0, device)
        return Batches(loader, _unchanged, unused, torch.device(device))
    if isinstance(dataset, FileImages):
        preprocessing = dataset.fit.preprocessing
        transform = evaluation_transform(preprocessing)
        decoded = _Decoded(dataset.files, preprocessing, transform, None if workers else dataset.kept)
        loader = _file_loader(decoded, _Seeded(order, unused), workers, device)
    else:
        loader = _memory_loader(dataset, order, unused, device)
    return Batches(loader, dataset.fit.finish, unused, torch.device(device))


def _memory_loader(
    dataset: MemoryImages, order: Order, generator: torch.Generator, device: torch.device | str
) -> DataLoader[Any]:
    # With a sampler of index lists and no batch size, the data set is indexed once per batch, not once per image.
    raw = TensorDataset(dataset.images, dataset.labels)
    return DataLoader(raw, sampler=order, batch_size=None, generator=generator, pin_memory=_pinned(device))


def _unchanged(images: Tensor) -> Tensor:
    return images


class _Labels(Dataset[tuple[Tensor, int]]):
    """The class ids of images in files, which are not read."""

    def __init__(self, files: Files) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files.labels)

    def __getitem__(self, index_and_seed: tuple[int, int]) -> tuple[Tensor, int]:
        return torch.empty(0), self.files.labels[index_and_seed[0]]


def _file_loader(
    decoded: _Decoded | _Labels, order: _Seeded, workers: int, device: torch.device | str
) -> DataLoader[Any]:
    # The loader itself draws one number, which nothing uses; it must not come from the generator of the order.
    return DataLoader(
        decoded,
        batch_sampler=order,
        generator=torch.Generator(),
        num_workers=workers,
        collate_fn=_collated,
        persistent_workers=workers > 0,
        pin_memory=_pinned(device),
    )


def _pinned(device: torch.device | str) -> bool:
    return torch.device(device).type == "cuda"


_Sample = tuple[Tensor, int]


class _Kept:
    """Cache of decoded images by number, as long as they total at most ``limit`` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self.images: dict[int, Image.Image] = {}

    def decode(self, index: int, path: str, mode: str) -> Image.Image:
        """Return a decoded image, which the caller must not change.

        Raises:
            DamagedImageError: it cannot be decoded.
        """
        if index in self.images:
            return self.images[index]
        image = decode(path, mode)
        size = image.width * image.height * (1 if image.mode == "L" else 4)  # Pillow pads three channels to four
        if self.bytes + size <= self.limit:
            self.images[index] = image
            self.bytes += size
        return image


class _Decoded(Dataset[_Sample | DamagedImageError]):
    """Images in files (C, H, W), and class ids; an index comes with the seed of the image's random transform.

    If a file cannot be decoded, the error is returned, because a loading process cannot raise it unchanged.
    """

    def __init__(
        self, files: Files, like: Preprocessing, transform: Callable[[Any], Any], kept: _Kept | None = None
    ) -> None:
        self.files, self.like, self.transform, self.kept = files, like, transform, kept or _Kept(0)

    def __len__(self) -> int:
        return len(self.files.labels)

    def __getitem__(self, index_and_seed: tuple[int, int]) -> _Sample | DamagedImageError:
        try:
            return self.at(*index_and_seed)
        except DamagedImageError as error:
            return error

    def at(self, index: int, seed: int) -> _Sample:
        """Return an image with its class id.

        Raises:
            DamagedImageError: it cannot be decoded.
        """
        image = self.kept.decode(index, self.files.paths[index], self.like.mode)
        with seeded(seed):
            return to_tensor(self.transform(image), self.like), self.files.labels[index]


def _collated(samples: list[_Sample | DamagedImageError]) -> Any:
    """Return samples as a batch, or the first error among them."""
    return next((one for one in samples if isinstance(one, DamagedImageError)), None) or collate(samples)


class _Seeded:
    """A process's part of each batch of indices, as pairs (index, seed) with seeds drawn from ``generator``."""

    def __init__(self, order: Order, generator: torch.Generator, team: Team = ALONE) -> None:
        self.order, self.generator, self.team = order, generator, team

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for indices in self.order:
            seeds = torch.randint(2**63 - 1, (len(indices),), generator=self.generator)
            yield self.team.part(list(zip(indices, seeds.tolist(), strict=True)))
