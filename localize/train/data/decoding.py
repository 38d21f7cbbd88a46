"""Decode image files of all usual kinds to 8-bit RGB or grey images, or to 16-bit grey ones.

Values are scaled by the mode of the file, never by its content. If a file cannot be decoded, the error gives its name
and the reason.

- The orientation in the EXIF data is applied.
- Palettes, CMYK and other colour models become RGB; transparency is dropped. A model of one channel gets luminance.
- 16-bit grey values (PNG, TIFF, PGM) are divided by 65535. Pillow itself decodes 16-bit colour to 8 bits.
- The first image of an animation or of a file with several pages is used.
- 32-bit integers and floats (TIFF) are refused, because the file does not say which value is white.
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
"""Pixels of the largest image that is decoded: 89 million, where Pillow starts to warn about decompression bombs."""
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
        """The reason, as the end of a sentence."""
        return self.facts[0].removesuffix(".") if self.facts else self.problem


def damaged(path: str | Path, reason: str) -> DamagedImageError:
    """Return the error for a file that cannot be decoded for this reason."""
    return DamagedImageError(
        f"{path} cannot be used as an image.",
        facts=f"{reason}.",
        help="repair or remove it; localize data check DIR lists all such files; --skip-damaged leaves them out",
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
            f"it is a link to {os.readlink(path)}, which does not exist"
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
        raise damaged(path, f"it has more than {MAX_PIXELS:,} pixels, the limit") from error
    except _UNREADABLE as error:
        raise damaged(path, f"its header cannot be read: {_first_line(error)}") from error
    if image.width * image.height > MAX_PIXELS:
        pixels = f"{image.width:,} x {image.height:,} pixels"
        image.close()
        raise damaged(path, f"it has {pixels}, more than the limit of {MAX_PIXELS:,}")
    return image


def decode(path: str | Path, mode: str) -> Image.Image:
    """Decode an image file.

    Args:
        path: the file.
        mode: ``RGB`` or ``L``.

    Returns:
        An image of this mode with 8 bits; or, if the file has 16-bit grey values, one of mode ``F`` with values 0..1.

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
    """Return a decoded image as a tensor (C, H, W): uint8, or float32 (0..1) if ``like`` has 16 bits."""
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
    """Return whether an opened image has 16-bit grey values."""
    return image.mode in SIXTEEN_BITS or (image.mode == "I" and image.format in ("PNG", "PPM"))


def refused_mode(image: Image.Image) -> str | None:
    """Return why the values of an opened image cannot be scaled; None if they can."""
    if is_sixteen_bit(image):
        return None
    if image.mode == "F":
        return "it contains floats, and does not say which value is white: save it with 8 or 16 bits"
    if image.mode.startswith("I"):
        return "it contains 32-bit or signed integers, and does not say which is white: save it with 8 or 16 bits"
    return None


def converted(path: str | Path, image: Image.Image, mode: str) -> Image.Image:
    """Return an opened image in this mode, upright; see :func:`decode`. ``path`` is its name in messages.

    Raises:
        DamagedImageError: the scale of its values is unknown.
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
"""Exceptions of Pillow's readers for damaged files; SyntaxError means a wrong file format."""


def _told(path: str | Path) -> str:
    if os.path.basename(path).startswith("._"):
        return "it holds macOS metadata of a file, not an image"
    return "it is not an image"


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].strip().removesuffix(".") or type(error).__name__
