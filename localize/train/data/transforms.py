"""How images are prepared for the model: size, augmentation, normalisation.

Images in memory are augmented a batch at a time, each with its own crop and flip; images in files one at a time, with
the transforms of torchvision. Both use the same distributions: a crop anywhere in the padded image, and a flip with
probability 1/2.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms import v2

from localize import outside
from localize.errors import OptionError, UnknownNameError, did_you_mean
from localize.recipes.preprocessing import Preprocessing
from localize.train.data.decoding import to_tensor

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Augmentation:
    """How training images are augmented.

    ``padding`` adds pixels on each side, zeros (black) or with ``reflect`` the image mirrored at its border; a crop of
    the image's own size is taken. ``flip`` mirrors left and right. ``resized_crop`` takes 8 to 100 % of the image's
    area, with aspect ratios of 3:4 to 4:3, as for ImageNet; tests then use the centre, 7/8 of the shorter side, instead
    of the whole image.
    """

    padding: int = 0
    reflect: bool = False
    flip: bool = False
    resized_crop: bool = False
    policy: str | None = None
    """``auto_augment`` of timm's ``create_transform``; empty for none; None if timm's transforms are not used."""
    own: Callable[[Tensor], Tensor] | None = None
    """The user's own transform of an image (C, H, W), bytes or floats 0..1, before it is resized for the model."""


TIMM = "timm"
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
        TIMM: Augmentation(flip=True, resized_crop=True, policy=""),
    }
)
"""Augmentations by the value of the training setting ``augment``."""


def named(value: str) -> Augmentation:
    """Return the augmentation of a value of the training setting ``augment``.

    Args:
        value: a key of ``AUGMENTATIONS``; ``timm:POLICY`` with an ``auto_augment`` of timm, such as
            ``timm:rand-m7-inc1``; or ``FILE.py:NAME``, ``module:NAME``: a transform, or a class of transforms
            that takes no arguments.

    Raises:
        UnknownNameError: it is none of these, or the file, module or name does not exist.
        CodeError: the user's code cannot be imported.
        OptionError: timm has no such policy, or the named object cannot be called.
    """
    if value in AUGMENTATIONS:
        return AUGMENTATIONS[value]
    library, _, policy = value.partition(":")
    if library == TIMM:
        try:
            create_transform(32, is_training=True, auto_augment=policy)
        except (AssertionError, ValueError, KeyError) as error:
            raise OptionError(
                f"timm has no augmentation {policy!r}.",
                facts=outside.told(error),
                help="--augment timm:rand-m7-inc1, timm:augmix-m5-w4-d2, timm:3a",
            ) from error
        return replace(AUGMENTATIONS[TIMM], policy=policy)
    if not outside.is_spelled(value):
        raise UnknownNameError(
            f"there is no augmentation {value!r}.",
            facts=f"augmentations are {', '.join(AUGMENTATIONS)}.",
            help=did_you_mean(value, AUGMENTATIONS) or "--augment none",
        )
    found = outside.load(value, like="TRANSFORM", fits=callable)
    try:
        found = found() if isinstance(found, type) else found
    except TypeError as error:
        raise OptionError(
            f"augmentation {value!r} cannot be made without arguments.",
            facts=outside.told(error),
            help=f"write mine = {value.rpartition(':')[2]}(...) in that file, and give :mine here",
        ) from error
    if not callable(found):
        raise OptionError(
            f"augmentation {value!r} is of type {type(found).__name__}, not a transform of an image.",
            help="a function of a tensor (C, H, W), or torchvision.transforms.v2.Compose([...])",
        )
    return Augmentation(own=found)


def augment(images: Tensor, how: Augmentation, generator: torch.Generator) -> Tensor:
    """Crop and flip each image of a batch (N, C, H, W) on any device; random numbers are drawn on the CPU."""
    assert not how.resized_crop
    if how.own is not None:
        seeds = torch.randint(2**63 - 1, (len(images),), generator=generator).tolist()
        made = []
        own = _Drawing(partial(_transformed, how.own))
        for image, seed in zip(images.cpu(), seeds, strict=True):
            with seeded(seed):
                made.append(_sized(own(image), images.shape[2:]))
        return torch.stack(made).to(images.device)
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


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator while the body runs."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@dataclass(frozen=True)
class _Drawing:
    """A foreign transform, which may also draw from the global generators of numpy and Python.

    These are seeded from torch's generator, and restored afterwards. It can be sent to loading processes.
    """

    transform: Callable[[Any], Any]

    def __call__(self, image: Any) -> Any:
        before, numpy_before = random.getstate(), np.random.get_state()
        seed = int(torch.randint(2**32, ()))
        random.seed(seed)
        np.random.seed(seed)
        try:
            return self.transform(image)
        finally:
            random.setstate(before)
            np.random.set_state(numpy_before)


def _of_file(image: Image, own: Callable[[Tensor], Tensor], like: Preprocessing) -> Tensor:
    """Apply the user's transform to a decoded image, and resize the result for the model."""
    return _sized(_transformed(own, to_tensor(image, like)), like.input_size[1:])


def _transformed(own: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """Apply the user's transform to an image (C, H, W); the result must be such an image too.

    Raises:
        OptionError: it is not.
    """
    made = own(image.clone())
    if isinstance(made, Tensor) and made.dim() == 3 and len(made) == len(image) and made.dtype == image.dtype:
        return made
    shown = f"{tuple(made.shape)}, {made.dtype}" if isinstance(made, Tensor) else type(made).__name__
    raise OptionError(
        f"the transform of --augment turns an image {tuple(image.shape)}, {image.dtype}, into {shown}.",
        facts="it must keep channels and type; --pixel-mean and --pixel-std normalise the image afterwards.",
        help="use a transform of a tensor (C, H, W), without ToTensor and Normalize",
    )


def _sized(image: Tensor, size: Sequence[int]) -> Tensor:
    """Return an image (C, H', W') at height and width ``size``."""
    return image if list(image.shape[1:]) == list(size) else v2.functional.resize(image, list(size), antialias=True)


def _mirrored(places: Tensor, size: int) -> Tensor:
    """Return the source positions, in an image of this size, of pixels under reflect padding (borders not doubled)."""
    return (size - 1) - ((size - 1) - places.abs()).abs()


def _take(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Select pixels of images (N, C, H, W) at each image's own rows (N, h) and columns (N, w): (N, C, h, w)."""
    count, channels, _, width = images.shape
    places = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)
    taken = images.flatten(2).gather(2, places[:, None].expand(-1, channels, -1))
    return taken.unflatten(2, (rows.shape[1], columns.shape[1]))


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return ``(image - mean) / std`` by channel, float32, of images (N, C, H, W), uint8 or floats 0..1.

    Bytes are divided by 255, as in torchvision's ``ToTensor`` and in timm, rather than multiplied by 1 / 255.
    """
    if images.dtype == torch.uint8:
        return v2.functional.normalize(images.to(torch.float32).div_(255), list(mean), list(std), inplace=True)
    return v2.functional.normalize(images.to(torch.float32), list(mean), list(std))


def tested(how: Augmentation) -> dict[str, Any]:
    """Return how tests resize and crop after training with ``how``, as fields of :class:`Preprocessing`."""
    return {"crop_pct": 0.875, "crop_mode": "center"} if how.resized_crop else {}


def training_transform(how: Augmentation, like: Preprocessing) -> Callable[[Image], Image | Tensor]:
    """Return a transform that resizes and augments a decoded image for training, using global generators."""
    size = like.input_size[1:]
    if how.own is not None:
        return _Drawing(partial(_of_file, own=how.own, like=like))
    if how.policy is not None:
        transform = create_transform(
            like.input_size, is_training=True, use_prefetcher=True, auto_augment=how.policy or None,
            interpolation=like.interpolation, re_prob=0.0,
        )  # fmt: skip
        *steps, _to_array = transform.transforms
        return _Drawing(v2.Compose(steps))
    resampled = v2.InterpolationMode(like.interpolation)
    own: list[v2.Transform] = [(v2.RandomResizedCrop if how.resized_crop else v2.Resize)(size, interpolation=resampled)]
    if how.padding:
        own.append(v2.RandomCrop(size, padding=how.padding, padding_mode="reflect" if how.reflect else "constant"))
    if how.flip:
        own.append(v2.RandomHorizontalFlip())
    return v2.Compose(own)


def evaluation_transform(like: Preprocessing) -> Callable[[Image], Image]:
    """Return a transform that resizes and crops a decoded image for a test: timm's, without its last step."""
    transform = create_transform(
        like.input_size,
        normalize=False,
        interpolation=like.interpolation,
        crop_pct=like.crop_pct,
        crop_mode=like.crop_mode,
    )
    *steps, _to_tensor = transform.transforms
    return v2.Compose(steps)
