"""What becomes of images: each of a batch its own crop and flip, as torchvision would make it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision import transforms as torchvision_transforms
from torchvision.transforms import v2

from localize.recipes import settings
from localize.recipes.preprocessing import Preprocessing
from localize.train.data import decoding, transforms
from localize.train.data.transforms import AUGMENTATIONS, Augmentation

IN_MEMORY = [name for name, how in AUGMENTATIONS.items() if not how.resized_crop]


def numbers(count: int, channels: int = 2, height: int = 11, width: int = 11) -> torch.Tensor:
    """Return images without two pixels of one value."""
    size = channels * height * width
    return torch.arange(size, dtype=torch.uint8).view(1, channels, height, width).expand(count, -1, -1, -1).clone()


def variants(image: torch.Tensor, how: Augmentation) -> list[bytes]:
    """Return what torchvision can make of an image (C, H, W), each as often as it is likely."""
    height, width = image.shape[1:]
    padded = v2.functional.pad(
        image.float(), [how.padding] * 4, padding_mode="reflect" if how.reflect else "constant"
    ).to(torch.uint8)
    places = range(2 * how.padding + 1)
    crops = [v2.functional.crop(padded, top, left, height, width) for top in places for left in places]
    flips = [v2.functional.horizontal_flip(crop) for crop in crops] if how.flip else []
    return [crop.numpy().tobytes() for crop in (*crops, *flips)]


def test_the_settings_name_all_of_them() -> None:
    assert set(settings.AUGMENTATIONS) == set(AUGMENTATIONS)


@pytest.mark.parametrize("name", IN_MEMORY)
def test_every_crop_and_flip_of_torchvision_is_drawn_equally_often(name: str) -> None:
    how = AUGMENTATIONS[name]
    allowed = variants(numbers(1)[0], how)
    assert len(set(allowed)) == len(allowed)
    count = 40 * len(allowed)
    found = Counter(
        image.numpy().tobytes() for image in transforms.augment(numbers(count), how, torch.Generator().manual_seed(0))
    )
    assert set(found) == set(allowed)
    # 40 of each are expected, with a standard deviation of 6.3.
    assert max(found.values()) <= 40 + 5 * 6.3 and (len(allowed) == 1 or min(found.values()) >= 40 - 5 * 6.3)


def test_floats_are_cropped_like_bytes() -> None:
    how, images = AUGMENTATIONS["crop2-flip"], numbers(20)
    bytes_, floats = (
        transforms.augment(given, how, torch.Generator().manual_seed(1)) for given in (images, images.float())
    )
    assert torch.equal(bytes_.float(), floats)


def preprocessing(height: int, width: int, **words: Any) -> Preprocessing:
    return Preprocessing((3, height, width), (0.1, 0.2, 0.3), (0.5, 0.25, 2.0), **words)


def test_bytes_are_normalised_as_by_torchvision() -> None:
    image, like = numbers(1, 3, 6, 7), preprocessing(6, 7)
    usual = torchvision_transforms.Compose(
        [torchvision_transforms.ToTensor(), torchvision_transforms.Normalize(like.mean, like.std)]
    )
    normalised = transforms.normalise(image, like.mean, like.std)[0]
    assert torch.equal(normalised, usual(image[0].permute(1, 2, 0).numpy()))


@pytest.mark.parametrize("mode", ["squash", "center"])
@pytest.mark.parametrize("size", [(32, 32), (18, 30)])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_a_test_image_is_bit_for_bit_what_timm_makes_of_it(
    mode: str, size: tuple[int, int], interpolation: str
) -> None:
    like = preprocessing(*size, crop_mode=mode, crop_pct=0.875, interpolation=interpolation)
    pixels = np.random.RandomState(0).randint(256, size=(41, 57, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    words = {name: getattr(like, name) for name in ("mean", "std", "interpolation", "crop_pct", "crop_mode")}
    expected = create_transform(like.input_size, **words)(image)
    ours = decoding.to_tensor(transforms.evaluation_transform(like)(image), like)
    assert torch.equal(transforms.normalise(ours[None], like.mean, like.std)[0], expected)


def test_normalising_leaves_floats_as_they_are() -> None:
    floats = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    before = floats.clone()
    transforms.normalise(floats, (0.5,), (0.5,))
    assert torch.equal(floats, before)


def test_images_in_files_are_cropped_by_the_same_rules() -> None:
    how, image = AUGMENTATIONS["crop2-flip"], numbers(1, 3, 6, 7)[0]
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    like = preprocessing(6, 7)
    transform = transforms.training_transform(how, like)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        found = {decoding.to_tensor(transform(picture), like).numpy().tobytes() for _ in range(600)}
    assert found == set(variants(image, how))


def test_tests_after_training_as_for_imagenet_look_at_the_centre() -> None:
    picture = np.zeros((512, 1024, 3), np.uint8)
    picture[:, 288:736] = 200  # the middle 448 columns: 224 of the 512 that remain when the height becomes 256
    like = preprocessing(224, 224, **transforms.tested(AUGMENTATIONS["imagenet"]))
    seen = decoding.to_tensor(transforms.evaluation_transform(like)(Image.fromarray(picture)), like)
    assert seen.shape == (3, 224, 224)
    assert (seen[:, :, 2:-2] == 200).all()
    like = preprocessing(224, 224, **transforms.tested(AUGMENTATIONS["none"]))
    whole = decoding.to_tensor(transforms.evaluation_transform(like)(Image.fromarray(picture)), like)
    assert (whole[:, :, 0] == 0).all()
