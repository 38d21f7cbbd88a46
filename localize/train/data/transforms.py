"""What becomes of images before the model sees them: size, augmentation, normalisation.

Images in memory are augmented a batch at a time, each by a crop and a flip of its own; images in files one at a time,
by the transforms of torchvision. Both draw what is random in the same way: a crop anywhere in the padded image, a flip
in half of the cases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms import v2

from localize.recipes.preprocessing import Preprocessing

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Augmentation:
    """What training images go through.

    ``padding`` pixels on each side, of zeros (black) or ``reflect`` for the image mirrored at its border, followed by a
    crop of the image's own size; ``flip`` from left to right. ``resized_crop`` takes 8 to 100 % of the image's area, at
    3:4 to 4:3, as for ImageNet; then tests look at the centre, 7/8 of the shorter side, instead of the whole image.
    """

    padding: int = 0
    reflect: bool = False
    flip: bool = False
    resized_crop: bool = False


AUGMENTATIONS: Mapping[str, Augmentation] = MappingProxyType(
    {
        "none": Augmentation(),
        "flip": Augmentation(flip=True),
        "crop2": Augmentation(padding=2),
        "crop2-flip": Augmentation(padding=2, flip=True),
        "crop4": Augmentation(padding=4),
        "crop4-flip": Augmentation(padding=4, flip=True),
        "crop4-reflect-flip": Augmentation(padding=4, reflect=True, flip=True),
        "imagenet": Augmentation(flip=True, resized_crop=True),
    }
)
"""By the value of the training setting ``augment``."""


def augment(images: Tensor, how: Augmentation, generator: torch.Generator) -> Tensor:
    """Crop and flip each image of a batch (N, C, H, W) on any device; what is random is drawn on the CPU."""
    assert not how.resized_crop
    if not (how.padding or how.flip):
        return images
    count, _, height, width = images.shape
    top, left = torch.randint(2 * how.padding + 1, (2, count, 1), generator=generator)
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    if how.flip:
        flipped = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(flipped, columns.flip(1), columns)
    if how.reflect:
        rows, columns = _mirrored(rows - how.padding, height), _mirrored(columns - how.padding, width)
    else:
        images = F.pad(images, (how.padding,) * 4)
    return _take(images, rows.to(images.device), columns.to(images.device))


def _mirrored(places: Tensor, size: int) -> Tensor:
    """Return where in an image of this size lies what a reflecting padding has at these places; borders stand once."""
    return (size - 1) - ((size - 1) - places.abs()).abs()


def _take(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return of each image (N, C, H, W) the pixels at its own rows (N, h) and columns (N, w): (N, C, h, w)."""
    count, channels, _, width = images.shape
    places = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)
    taken = images.flatten(2).gather(2, places[:, None].expand(-1, channels, -1))
    return taken.unflatten(2, (rows.shape[1], columns.shape[1]))


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return images (N, C, H, W), uint8 or floats 0..1, as float32 of ``(image - mean) / std``, by channel.

    Bytes are divided by 255, as torchvision's ``ToTensor`` and timm do, and not multiplied by 1 / 255.
    """
    if images.dtype == torch.uint8:
        return v2.functional.normalize(images.to(torch.float32).div_(255), list(mean), list(std), inplace=True)
    return v2.functional.normalize(images.to(torch.float32), list(mean), list(std))


def tested(how: Augmentation) -> dict[str, Any]:
    """Return how a test after training with ``how`` resizes and crops, in the words of :class:`Preprocessing`."""
    return {"crop_pct": 0.875, "crop_mode": "center"} if how.resized_crop else {}


def training_transform(how: Augmentation, like: Preprocessing) -> Callable[[Image], Image]:
    """Return what resizes and augments a decoded image for training; it draws from torch's global generator."""
    size = like.input_size[1:]
    resampled = v2.InterpolationMode(like.interpolation)
    steps: list[v2.Transform] = [
        (v2.RandomResizedCrop if how.resized_crop else v2.Resize)(size, interpolation=resampled)
    ]
    if how.padding:
        steps.append(v2.RandomCrop(size, padding=how.padding, padding_mode="reflect" if how.reflect else "constant"))
    if how.flip:
        steps.append(v2.RandomHorizontalFlip())
    return v2.Compose(steps)


def evaluation_transform(like: Preprocessing) -> Callable[[Image], Image]:
    """Return what resizes and crops a decoded image for a test: timm's own transform, without its last step."""
    transform = create_transform(
        like.input_size,
        normalize=False,
        interpolation=like.interpolation,
        crop_pct=like.crop_pct,
        crop_mode=like.crop_mode,
    )
    *steps, _to_tensor = transform.transforms
    return v2.Compose(steps)
