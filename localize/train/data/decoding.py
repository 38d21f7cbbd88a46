"""Decode image files: what people have in their folders, as 8-bit RGB or grey images, or as 16-bit grey ones.

Values are scaled by the mode of the file, never by its content. A file that cannot be decoded is named with the reason.

- The orientation in the EXIF data is applied.
- Palettes, CMYK and other colour models become RGB; transparency is dropped. A model of one channel gets luminance.
- 16-bit grey values (PNG, TIFF, PGM) are divided by 65535. Pillow itself decodes 16-bit colour to 8 bits.
- Of an animation or a file with several pages, the first image is used.
- 32-bit integers and floats (TIFF) are refused: nothing says which value is white.
"""

from __future__ import annotations

import os
import stat
import struct
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from localize.errors import LocalizeError
from localize.recipes.preprocessing import Preprocessing

MAX_PIXELS = 1024**3 // 4 // 3
"""Pixels of the largest image that is decoded: 89 million, from which Pillow warns of decompression bombs."""
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISCHR, "a device"),
)


class DamagedImageError(LocalizeError, ValueError):
    """An image file cannot be decoded."""

    exit_code = 4

    @property
    def reason(self) -> str:
        """Why, as the end of a sentence."""
        return self.facts[0].removesuffix(".") if self.facts else self.problem


def damaged(path: str | Path, reason: str) -> DamagedImageError:
    """Return the error about a file that cannot be decoded, for this reason."""
    return DamagedImageError(
        f"{path} cannot be used as an image.",
        facts=f"{reason}.",
        help="repair or remove it; localize data check DIR names every such file; --skip-damaged leaves them out",
    )


def open_image(path: str | Path) -> Image.Image:
    """Open an image file and read its header.

    Raises:
        DamagedImageError: it is not a regular file, not an image, or has more than ``MAX_PIXELS`` pixels.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        dangling = os.path.islink(path)
        reason = (
            f"it is a link to {os.readlink(path)}, which is not there"
            if dangling
            else (error.strerror or str(error)).lower()
        )
        raise damaged(path, reason) from error
    kind = next((name for check, name in _KINDS if check(status.st_mode)), None)
    if kind is not None:
        raise damaged(path, f"it is {kind}, not a file")
    if status.st_size == 0:
        raise damaged(path, "it is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(path)
    except UnidentifiedImageError as error:
        raise damaged(path, _told(path)) from error
    except Image.DecompressionBombError as error:
        raise damaged(path, f"it has more than the {MAX_PIXELS:,} pixels that are decoded") from error
    except _UNREADABLE as error:
        raise damaged(path, f"its header cannot be read: {_first_line(error)}") from error
    if image.width * image.height > MAX_PIXELS:
        pixels = f"{image.width:,} x {image.height:,} pixels"
        image.close()
        raise damaged(path, f"it has {pixels}, more than the {MAX_PIXELS:,} that are decoded")
    return image


def decode(path: str | Path, mode: str) -> Image.Image:
    """Decode an image file.

    Args:
        path: of the file.
        mode: ``RGB`` or ``L``.

    Returns:
        An image of this mode, 8 bits; or one of mode ``F``, values 0..1, where the file has 16-bit grey values.

    Raises:
        DamagedImageError: it cannot be decoded.
    """
    with open_image(path) as image:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image.load()
                return converted(path, image, mode)
        except DamagedImageError:
            raise
        except _UNREADABLE as error:
            raise damaged(path, f"it is damaged: {_first_line(error)}") from error


def to_tensor(image: Image.Image | Tensor, like: Preprocessing) -> Tensor:
    """Return a decoded image as a tensor (C, H, W): uint8, or float32 (0..1) where ``like`` has 16 bits."""
    if isinstance(image, Tensor):
        return image
    pixels = F.pil_to_tensor(image)
    if like.bits == 8:
        pixels = pixels if pixels.dtype == torch.uint8 else pixels.mul(255).round_().clamp_(0, 255).to(torch.uint8)
    elif pixels.dtype == torch.uint8:
        pixels = pixels.to(torch.float32).div_(255)
    channels = 1 if like.mode == "L" else 3
    return pixels.expand(channels, -1, -1)


def is_sixteen_bit(image: Image.Image) -> bool:
    """Whether an opened image holds 16-bit grey values."""
    return image.mode in SIXTEEN_BITS or (image.mode == "I" and image.format in ("PNG", "PPM"))


def refused_mode(image: Image.Image) -> str | None:
    """Return why the values of an opened image cannot be scaled; None where they can."""
    if is_sixteen_bit(image):
        return None
    if image.mode == "F":
        return "it holds floats, and nothing says which value is white: save it with 8 or 16 bits"
    if image.mode.startswith("I"):
        return "it holds 32-bit or signed integers, and nothing says which value is white: save it with 8 or 16 bits"
    return None


def converted(path: str | Path, image: Image.Image, mode: str) -> Image.Image:
    """Return an opened image in this mode, upright; see :func:`decode`. ``path`` is what messages call it.

    Raises:
        DamagedImageError: nothing says how its values are scaled.
    """
    if reason := refused_mode(image):
        raise damaged(path, reason)
    upright = ImageOps.exif_transpose(image) or image
    if is_sixteen_bit(image):
        return Image.fromarray(np.asarray(upright).astype(np.float32) / 65535)
    if "transparency" in upright.info or upright.mode == "PA":
        upright = upright.convert("RGBA")
    return upright.convert(mode)


_UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    AttributeError,
    ArithmeticError,
    MemoryError,
    AssertionError,
    NotImplementedError,
    RuntimeError,
    struct.error,
)
"""What Pillow's readers raise on files that are damaged; SyntaxError is its own word for a wrong file format."""


def _told(path: str | Path) -> str:
    if os.path.basename(path).startswith("._"):
        return "it holds what macOS keeps beside a file, and no image"
    return "it is not an image"


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].strip().removesuffix(".") or type(error).__name__
