"""Folders of small images in many formats, and files that are damaged in many ways, for tests of the trainer."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("ant", "bee", "cow")
SIDE = 12


def scene(label: int, number: int) -> np.ndarray:
    """Return grey values 0..1 (SIDE, SIDE): a bright band whose place is the class, on noise that differs by number."""
    noise = np.random.RandomState(100 * label + number)
    pixels = noise.uniform(0.0, 0.5, (SIDE, SIDE))
    pixels[:, 4 * label : 4 * label + 4] += 0.4
    return pixels


def eight(pixels: np.ndarray) -> np.ndarray:
    return (pixels * 255).round().astype(np.uint8)


def colours(pixels: np.ndarray) -> np.ndarray:
    return np.stack([eight(pixels), eight(0.8 * pixels), eight(0.6 * pixels)], -1)


def rotated(pixels: np.ndarray, path: Path) -> None:
    """Write an image that lies on its side, with the orientation that puts it upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(colours(pixels)).copy()).save(path, exif=exif, quality=95)


def animated(pixels: np.ndarray, path: Path) -> None:
    frames = [Image.fromarray(eight(one)).convert("P") for one in (pixels, 1 - pixels)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=50)


def transparent(pixels: np.ndarray, path: Path) -> None:
    Image.fromarray(np.concatenate([colours(pixels), eight(np.ones((SIDE, SIDE, 1)))], -1)).save(path)


FORMATS: Mapping[str, tuple[str, Callable[[np.ndarray, Path], None]]] = {
    "RGB": ("png", lambda pixels, path: Image.fromarray(colours(pixels)).save(path)),
    "grey": ("png", lambda pixels, path: Image.fromarray(eight(pixels)).save(path)),
    "palette": ("png", lambda pixels, path: Image.fromarray(colours(pixels)).quantize(64).save(path)),
    "RGBA": ("png", transparent),
    "CMYK": ("jpg", lambda pixels, path: Image.fromarray(colours(pixels)).convert("CMYK").save(path, quality=95)),
    "16-bit PNG": ("png", lambda pixels, path: Image.fromarray((pixels * 65535).astype(np.uint16)).save(path)),
    "12-bit values": ("png", lambda pixels, path: Image.fromarray((pixels * 4095).astype(np.uint16)).save(path)),
    "16-bit TIFF": ("tif", lambda pixels, path: Image.fromarray((pixels * 65535).astype(np.uint16)).save(path)),
    "rotated": ("jpg", rotated),
    "WebP": ("webp", lambda pixels, path: Image.fromarray(colours(pixels)).save(path, lossless=True)),
    "animated": ("gif", animated),
    "one bit": ("png", lambda pixels, path: Image.fromarray(eight(pixels)).convert("1").save(path)),
    "PGM of 16 bits": ("pgm", lambda pixels, path: Image.fromarray((pixels * 65535).astype(np.uint16)).save(path)),
}
"""Ending of the name of a file, and what writes grey values 0..1 to it."""


def write(folder: Path, kind: str = "RGB", train: int = 30, test: int = 10) -> Path:
    """Write a data folder of one format: ``train`` and ``test`` images of each class."""
    ending, save = FORMATS[kind]
    for part, first, count in (("train", 0, train), ("val", train, test)):
        for label, name in enumerate(CLASSES):
            (folder / part / name).mkdir(parents=True)
            for number in range(first, first + count):
                save(scene(label, number), folder / part / name / f"{number}.{ending}")
    return folder


# ------------------------------------------------------------------------------------------------------------- damaged


def png(path: Path) -> bytes:
    Image.fromarray(colours(scene(0, 0))).save(path)
    return path.read_bytes()


def truncated(path: Path) -> None:
    content = png(path)
    path.write_bytes(content[: len(content) // 2])


def flipped(path: Path) -> None:
    content = bytearray(png(path))
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def huge(path: Path) -> None:
    """Write a PNG of a few bytes that says that it has 400 million pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    )


def text(path: Path) -> None:
    path.write_text("not an image")


def apple_double(path: Path) -> None:
    path.with_name(f"._{path.name}").write_bytes(b"\0\x05\x16\x07\0\x02\0\0Mac OS X")


def dangling(path: Path) -> None:
    path.symlink_to("nowhere.png")


def pipe(path: Path) -> None:
    os.mkfifo(path)


def floats(path: Path) -> None:
    Image.fromarray(scene(0, 0).astype(np.float32)).save(path, format="TIFF")


def integers(path: Path) -> None:
    Image.fromarray((scene(0, 0) * 2**30).astype(np.int32)).save(path, format="TIFF")


DAMAGED: Mapping[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncated, "it is damaged"),
    "flipped": (flipped, "it is damaged|its header cannot be read"),
    "empty": (lambda path: path.write_bytes(b""), "it is empty"),
    "text": (text, "it is not an image"),
    "apple double": (apple_double, "it holds macOS metadata of a file"),
    "dangling link": (dangling, "it is a link to nowhere.png, which does not exist"),
    "huge": (huge, "more than 89,478,485"),
    "pipe": (pipe, "it is a named pipe, not a file"),
    "floats": (floats, "it contains floats"),
    "32-bit integers": (integers, "it contains 32-bit or signed integers"),
}
"""What writes a damaged file to a path, and what is said about it."""
