"""Data sets from outside the package: a function of the user's returns them, as images in memory.

The function is named by ``FILE.py:NAME``, ``module:NAME`` or an entry point of the group ``localize.datasets``. It is
called without arguments, or with the data folder (a ``pathlib.Path``) if one was given and it takes an argument. It
returns two parts, one to train on and one to test on. A part is

- a pair (images, class ids): tensors or arrays, images (N, C, H, W), bytes or floats 0..1; or
- a map-style ``torch.utils.data.Dataset`` of (image, class id), each image a PIL image, or a tensor (C, H, W).

The attribute ``classes`` of the function, or of the training part, has the names of the classes. Images are read once,
into memory, and all have one size. A data set that does not fit into memory belongs in a folder with class folders.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from localize import outside
from localize.errors import LocalizeError, MissingError, OptionError

GROUP = "localize.datasets"
"""Group of the entry points with which an installed package offers data sets."""
_NOT_ITEMS = (Mapping, np.ndarray, Tensor)
"""Types that have a length and can be indexed, but are not map-style data sets."""


def find(name: str, packaged: Any) -> Callable[..., Any] | None:
    """Return the function with a name; None if the name is not that of a function.

    Raises:
        UnknownNameError: the file, the module, or the name in it does not exist.
        CodeError: it cannot be imported.
        OptionError: it names something that cannot be called.
    """
    if outside.is_spelled(name):
        found = outside.load(name, like="DATASET", fits=callable)
    else:
        offer = outside.offered(GROUP, name, packaged)
        if offer is None:
            return None
        found = offer.load()
    if not callable(found):
        raise OptionError(
            f"data set {name!r} is of type {type(found).__name__}, not a function that returns images.",
            help="def data(): return (images, labels), (test_images, test_labels)",
        )
    return found


@functools.lru_cache(maxsize=2)
def read(
    name: str, function: Callable[..., Any], data_dir: str | None
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[str, ...]]:
    """Call the function of a data set; return images and class ids of its two parts, and the names of the classes.

    Raises:
        OptionError: a folder was given but the function takes none, or the function does not return a data set.
        MissingError: the function raised an exception.
    """
    takes = bool(inspect.signature(function).parameters)
    if data_dir is not None and not takes:
        raise OptionError(
            f"data set {name!r} takes no folder, but {data_dir} was given.",
            help="leave out --data-dir, or define it as def data(folder): ...",
        )
    try:
        parts = function(Path(data_dir).expanduser()) if data_dir is not None else function()
    except LocalizeError:
        raise
    except Exception as error:
        raise MissingError(
            f"data set {name!r} cannot be read.",
            facts=outside.told(error),
            help="call the function by itself in python, to see the whole error",
        ) from error
    if not isinstance(parts, tuple | list) or len(parts) != 2:
        many = f"{len(parts)} parts" if isinstance(parts, tuple | list) else type(parts).__name__
        raise OptionError(
            f"data set {name!r} returns {many}, not two parts.",
            facts="the parts are the training images and the test images.",
            help="def data(): return Mine(train=True), Mine(train=False); docs/data.md",
        )
    train, test = parts
    trained, tested = _part(name, "training", train), _part(name, "test", test)
    names = tuple(map(str, getattr(function, "classes", None) or getattr(train, "classes", None) or ()))
    count = 1 + max(int(labels.max()) for _, labels in (trained, tested))
    if names and len(names) < count:
        raise OptionError(
            f"data set {name!r} has names for {len(names)} classes, but also class id {count - 1}.",
            help="give a name for every class id from 0",
        )
    return trained, tested, names or tuple(map(str, range(count)))


def _part(name: str, which: str, part: Any) -> tuple[Tensor, Tensor]:
    """Return images (N, C, H, W) and class ids (N,) of one part."""
    pair = isinstance(part, tuple | list) and len(part) == 2 and hasattr(part[0], "shape")
    if pair and (hasattr(part[1], "shape") or isinstance(part[1], tuple | list)):
        images, labels = (torch.as_tensor(np.asarray(one)) for one in part)
    elif (
        hasattr(part, "__getitem__")
        and hasattr(part, "__len__")
        and not isinstance(part, Mapping | np.ndarray | Tensor)
    ):
        images, labels = _stacked(name, which, part)
    else:
        raise OptionError(
            f"the {which} part of data set {name!r} is of type {type(part).__name__}.",
            facts="it must be a pair (images, class ids), or a torch.utils.data.Dataset of such pairs.",
            help="docs/data.md",
        )
    _check(name, which, images, labels)
    return images, labels.long()


def _stacked(name: str, which: str, part: Any) -> tuple[Tensor, Tensor]:
    """Read every item of a map-style data set."""
    images, labels = [], []
    for index in range(len(part)):
        try:
            image, label = part[index]
            images.append(_tensor(image))
            labels.append(operator.index(label.item() if hasattr(label, "item") else label))
        except Exception as error:
            raise MissingError(
                f"item {index} of the {which} part of data set {name!r} cannot be used.",
                facts=outside.told(error),
                help="each item must be a pair: an image, and its class id, which is a whole number",
            ) from error
        if images[-1].shape != images[0].shape:
            raise OptionError(
                f"images of data set {name!r} differ in size: the {which} part starts with {_size(images[0])}, but "
                f"image {index} is {_size(images[-1])}.",
                help="resize them in the data set; or store them as files in class folders: --data DIR",
            )
    if not images:
        raise OptionError(
            f"the {which} part of data set {name!r} is empty.", help="return images to train and to test on"
        )
    return torch.stack(images), torch.tensor(labels)


def _tensor(image: Any) -> Tensor:
    if isinstance(image, Image.Image):
        return F.pil_to_tensor(image if image.mode in ("L", "RGB") else image.convert("RGB"))
    if isinstance(image, np.ndarray):  # as PIL and OpenCV have them: (H, W) or (H, W, C)
        image = image[:, :, None] if image.ndim == 2 else image
        return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    return torch.as_tensor(image)


def _size(image: Tensor) -> str:
    return "x".join(map(str, image.shape))


def _check(name: str, which: str, images: Tensor, labels: Tensor) -> None:
    """Refuse anything that is not images with class ids."""
    problem = ""
    if images.dim() != 4:
        problem = f"images are {tuple(images.shape)}, not (N, C, H, W)"
    elif images.shape[-1] in (1, 3) and images.shape[1] not in (1, 3) and images.shape[2] not in (1, 3):
        problem = f"images are {tuple(images.shape)}, with channels last, not (N, C, H, W)"
    elif labels.dim() != 1 or len(labels) != len(images):
        problem = f"there are {len(images)} images, but class ids of shape {tuple(labels.shape)}"
    elif not len(images):
        problem = "it is empty"
    elif labels.is_floating_point() or labels.dtype == torch.bool:
        problem = f"class ids are {str(labels.dtype).removeprefix('torch.')}, not whole numbers"
    elif int(labels.min()) < 0:
        problem = f"a class id is {int(labels.min())}, but class ids start at 0"
    elif images.dtype != torch.uint8 and not images.is_floating_point():
        problem = f"images are {str(images.dtype).removeprefix('torch.')}, neither bytes (uint8) nor floats"
    elif images.is_floating_point() and not (float(images.min()) >= 0 and float(images.max()) <= 1):  # nor is NaN
        problem = f"pixels range from {float(images.min()):.4g} to {float(images.max()):.4g}, but floats must be 0..1"
    if problem:
        raise OptionError(
            f"the {which} part of data set {name!r} cannot be used.",
            facts=f"{problem}.",
            help="see docs/data.md; to normalise, use --pixel-mean and --pixel-std (default: measured)",
        )
