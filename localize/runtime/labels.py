"""Check labels once, in words, before anything is computed: type, shape, range, and that some of them count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from localize.errors import InputError
from localize.ir import Plan

NO_CLASS, NO_PIXEL = -100, 255
"""Class ids that no loss counts: PyTorch's own, and that of pixels without a label."""


SUM_OFF = 1e-2
"""How far a row of soft labels may be from 1, which they sum to: what rounding in float16 leaves of 1,000 classes."""


def check_labels(y: Any, images: int, plan: Plan, *, values: bool) -> None:
    """Refuse labels that a step does not take for a batch.

    Args:
        y: the labels: class ids, or, where the plan takes them, soft labels or multi-label targets (N, Z).
        images: number of images of the batch.
        plan: what the step trains.
        values: look at the values too, which waits for the device.

    Raises:
        InputError: they are of another type or shape, out of range, or none of them counts.
    """
    trunk = plan.segments.trunk
    size = trunk.output_size
    if isinstance(y, Tensor) and y.is_floating_point() and y.dim() == 2 and not size:
        _check_soft(y, images, plan, values=values)
        return
    wanted = f"class ids, int64, of shape ({', '.join(map(str, (images, *size)))}{',' * (not size)})"
    if "soft" in plan.labels.kinds:
        kind = "multi-label targets" if "multi" in plan.labels.kinds else "soft labels"
        wanted += f", or {kind}, floating, of shape ({images}, {trunk.num_classes})"
    several = "soft" in plan.labels.kinds and isinstance(y, Tensor) and y.shape == (images, trunk.num_classes)
    if not isinstance(y, Tensor) or y.dtype != torch.int64 or several:
        told = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        integers = isinstance(y, Tensor) and not y.is_floating_point()
        help = "y.long()" if integers else "y = torch.tensor([...]), one id for each image"
        raise InputError(
            f"the labels are {told}.", facts=f"labels are {wanted}.", help="y.float()" if several else help
        )
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
        _check_counted(y, plan, NO_PIXEL if size else NO_CLASS)


def _check_soft(y: Tensor, images: int, plan: Plan, *, values: bool) -> None:
    """Refuse labels (N, Z) that are not shares of the classes; or, with a loss for several labels, not from 0 to 1."""
    classes = plan.segments.trunk.num_classes
    if "soft" not in plan.labels.kinds:
        raise InputError(
            f"the labels are {y.dtype} of shape {tuple(y.shape)}, and this step of {plan.method} needs class ids.",
            facts=[plan.labels.why or "its plan does not say that it takes others.", "y.argmax(1) are class ids."],
            help=f"methods that take soft labels: {', '.join(plan.labels.methods)}",
        )
    if tuple(y.shape) != (images, classes):
        raise InputError(
            f"the labels are of shape {tuple(y.shape)}.",
            facts=f"the batch has {images} images, and the model {classes} classes: soft labels are of shape "
            f"({images}, {classes}).",
        )
    if not values or not y.numel():
        return
    least, most = (float(one) for one in y.detach().float().aminmax())
    if not 0 <= least <= most <= 1 + SUM_OFF:  # comparisons with NaN are false
        multi = "multi" in plan.labels.kinds
        raise InputError(
            f"labels of the batch go from {least:g} to {most:g}.",
            facts="targets say for each class how true it is, from 0 to 1."
            if multi
            else "soft labels are shares of the classes, from 0 to 1.",
            help=f"scores.{'sigmoid()' if multi else 'softmax(1)'} are {'such targets' if multi else 'shares'}",
        )
    if "multi" in plan.labels.kinds:
        return
    sums = y.detach().float().sum(1)
    off = (sums - 1).abs() > SUM_OFF
    if off.any():
        row = int(off.nonzero()[0])
        raise InputError(
            f"the soft labels of image {row} sum to {float(sums[row]):g}.",
            facts="soft labels are shares of the classes, and sum to 1; several classes may be true at once with the "
            "loss bce.",
            help='y / y.sum(1, keepdim=True); or localize.transform(..., loss="bce")',
        )


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
        more = f"a model of {most + 1} classes, or other ids" if least >= 0 else f"ids from 0 to {classes - 1}"
        raise InputError(
            f"label {wrong} is not a class id of this model.",
            facts=f"its {classes} classes have ids 0 to {classes - 1}; labels of the batch go from {least} to {most}.",
            help="y - 1: class ids begin with 0" if from_one else more,
        )


def _check_counted(y: Tensor, plan: Plan, ignored: int) -> None:
    """Refuse -100 where some images would be counted without a class, and weights of classes that leave none over."""
    parts = plan.micro_batch or any(loss.part for loss in plan.losses)
    why = plan.labels.counted or ("parts of the batch are weighed by their numbers of images." if parts else "")
    left_out = y == ignored
    if why and not plan.segments.trunk.output_size and left_out.any():
        raise InputError(
            f"the label of image {int(left_out.nonzero()[0])} is {NO_CLASS}, and this step of {plan.method} needs the "
            "class of every image.",
            facts=why,
            help=f"x[y != {NO_CLASS}], y[y != {NO_CLASS}]",
        )
    weights = plan.loss.get("weights")
    if weights and plan.loss.get("name") != "bce" and not torch.tensor(weights, device=y.device)[y[~left_out]].any():
        raise InputError(
            "every class of the batch has weight 0.",
            facts="the loss is divided by the weights of the images' classes, and would be NaN.",
            help="larger batches, or a small weight in the place of 0",
        )
