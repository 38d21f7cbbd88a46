"""Check labels once, in words, before anything is computed: type, shape, range, and that some of them count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from localize.errors import InputError
from localize.ir import Trunk

NO_CLASS, NO_PIXEL = -100, 255
"""Class ids that no loss counts: PyTorch's own, and that of pixels without a label."""


def check_labels(y: Any, images: int, trunk: Trunk, *, values: bool) -> None:
    """Refuse labels that are not the class ids of a batch.

    Args:
        y: the labels.
        images: number of images of the batch.
        trunk: what the model takes and answers.
        values: look at the values too, which waits for the device.

    Raises:
        InputError: they are of another type or shape, out of range, or none of them counts.
    """
    size = trunk.output_size
    wanted = f"class ids, int64, of shape ({', '.join(map(str, (images, *size)))}{',' * (not size)})"
    if not isinstance(y, Tensor) or y.dtype != torch.int64:
        told = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        integers = isinstance(y, Tensor) and not y.is_floating_point()
        help = "y.long()" if integers else "y = torch.tensor([...]), one id for each image"
        raise InputError(f"the labels are {told}.", facts=f"labels are {wanted}.", help=help)
    if y.dim() != 1 + len(size):
        help = "y.squeeze(1)" if y.dim() == 2 and y.shape[1] == 1 and not size else "y.argmax(1)" if not size else ""
        raise InputError(
            f"the labels are of shape {tuple(y.shape)}.", facts=f"labels are {wanted}.", help=help or "one id a pixel"
        )
    if len(y) != images:
        raise InputError(f"the batch has {images} images and {len(y)} labels.")
    if tuple(y.shape[1:]) != size:
        raise InputError(
            f"the batch has labels of shape {tuple(y.shape)}.",
            facts=f"the model classifies pixels: class ids (N, {', '.join(map(str, size))}) are needed.",
        )
    if values and y.numel():
        _check_values(y, trunk.num_classes, NO_PIXEL if size else NO_CLASS)


def _check_values(y: Tensor, classes: int, ignored: int) -> None:
    counted = y[y != ignored]
    if not len(counted):
        raise InputError(
            f"every label of the batch is {ignored}, which no loss counts.",
            facts="the mean over no labels is NaN.",
            help="leave out batches without labels",
        )
    least, most = (int(one) for one in counted.aminmax())
    if least < 0 or most >= classes:
        wrong = least if least < 0 else most
        from_one = least == 1 and most == classes
        raise InputError(
            f"label {wrong} is not a class id of this model.",
            facts=f"its {classes} classes have ids 0 to {classes - 1}; labels of the batch go from {least} to {most}.",
            help="y - 1: class ids begin with 0" if from_one else f"a model of {most + 1} classes, or other ids",
        )
