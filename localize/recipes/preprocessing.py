"""What feeds a model: how an image becomes its input, and which data it was trained and tested on.

Both are written into the recipe of a run when it starts, and into the exported model when it ends. Nothing measures
them again. The words of :class:`Preprocessing` are those of timm's ``pretrained_cfg``.
"""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from pydantic.dataclasses import dataclass

_CONFIG = pydantic.ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")
_Positive = Annotated[float, pydantic.Field(gt=0)]


@dataclass(frozen=True, config=_CONFIG)
class Preprocessing:
    """How an image becomes the input of a model in a test."""

    input_size: tuple[int, int, int]
    """Channels, height and width of the input."""
    mean: tuple[float, ...]
    """Mean of the pixels (0..1) of each channel, which is subtracted."""
    std: tuple[_Positive, ...]
    """Standard deviation of the pixels of each channel, which the difference is divided by."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    """How pixels are resampled."""
    crop_pct: Annotated[float, pydantic.Field(gt=0, le=1)] = 1.0
    """Share of the resized image, by edge, that the crop at its centre keeps."""
    crop_mode: Literal["squash", "center"] = "squash"
    """``squash`` resizes both edges, whatever the aspect ratio; ``center`` resizes the shorter edge."""
    bits: Literal[8, 16] = 8
    """Bits of a pixel value; in both cases the largest value is 1."""

    @property
    def mode(self) -> Literal["L", "RGB"]:
        """The mode of Pillow that images are converted to."""
        return "L" if self.input_size[0] == 1 else "RGB"


@dataclass(frozen=True, config=_CONFIG)
class PartRecord:
    """The training images, or the test images, of a run."""

    images: int
    per_class: tuple[int, ...]
    """Number of images of each class, in the order of the class ids."""
    sha256: str
    """Digest of the names and sizes of the files, or of the pixels and labels of images in memory."""
    bytes: int | None = None
    """Size of all files; None for images in memory."""
    folder: str | None = None
    """Folder of the files, relative to the data folder; None for images in memory."""


@dataclass(frozen=True, config=_CONFIG)
class DataRecord:
    """The data that a run was started on: its name, class names in the order of the class ids, and fingerprints."""

    name: str
    classes: tuple[str, ...]
    test: PartRecord
    train: PartRecord | None = None
    """None where only test images are at hand."""
    hashed: bool = False
    """The digests cover the contents of the files too."""
