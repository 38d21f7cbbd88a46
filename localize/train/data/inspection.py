"""Check every image before training: damaged files, odd ones, and images that are in both parts of the data.

Up to ``DECODED`` files are decoded as training would decode them. With more files only headers are read, unless a full
check was requested. Several threads read files, since Pillow decodes without holding Python's lock.
"""

from __future__ import annotations

import hashlib
import os
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from localize.errors import MissingError
from localize.train.data.decoding import DamagedImageError, decode, is_sixteen_bit, open_image, refused_mode
from localize.train.data.folders import Files
from localize.train.progress import watching

DECODED = 20_000
"""Largest number of files that are all decoded before a run."""
SHOWN = 5
"""Number of files of a kind that a message lists."""
_PAGES = ("GIF", "WEBP", "PNG", "TIFF", "AVIF")
"""Formats that contain several images on purpose; a JPEG of a phone (MPO) contains a second view of the same."""


@dataclass(frozen=True)
class Look:
    """Properties of one file."""

    problem: str = ""
    """Why it cannot be used; empty if it can."""
    mode: str = ""
    """Pillow's mode of the image."""
    size: tuple[int, int] = (0, 0)
    """Width and height as stored."""
    sixteen: bool = False
    several: bool = False
    """Whether it contains several images; the first is used."""
    turned: bool = False
    """Whether its EXIF data ask to rotate or mirror it."""


@dataclass(frozen=True)
class Inspection:
    """Properties of the files in a data folder."""

    parts: Mapping[str, Files]
    """``train`` and ``test``, or one of them."""
    damaged: Mapping[str, str]
    """Reasons why files cannot be used, by path."""
    modes: Mapping[str, int]
    """Number of files by Pillow's mode."""
    smallest: tuple[int, int]
    largest: tuple[int, int]
    """Width and height of the images with the fewest and the most pixels."""
    sixteen: int
    """Number of files with 16-bit grey values."""
    several: tuple[str, ...]
    """Animations and files with several pages."""
    turned: int
    """Number of files whose EXIF data rotate or mirror them."""
    duplicates: tuple[tuple[str, str], ...]
    """Pairs of a test file and a training file with the same content."""
    decoded: bool
    """Whether all files were decoded; otherwise only their headers were read."""

    @property
    def bits(self) -> int:
        """Bits per pixel value in training: 16 if any file has 16, else 8."""
        return 16 if self.sixteen else 8

    @property
    def ok(self) -> bool:
        """Whether no file is damaged and no image is in both parts."""
        return not self.damaged and not self.duplicates


def inspect(parts: Mapping[str, Files], *, everything: bool = False, progress: bool | None = None) -> Inspection:
    """Check the files of a data folder.

    Args:
        parts: ``train`` and ``test``, or one of them.
        everything: decode all files, even if there are many.
        progress: show a bar on stderr; default: if stderr is a terminal.
    """
    paths = [path for files in parts.values() for path in files.paths]
    whole = everything or len(paths) <= DECODED
    show = sys.stderr.isatty() if progress is None else progress
    looks: dict[str, Look] = {}
    # All threads share the warning filters, so they are set once around all threads.
    with warnings.catch_warnings(), watching("checking the images", len(paths), show) as advance:
        warnings.simplefilter("ignore")
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for path, look in zip(paths, pool.map(_decoded if whole else _header, paths), strict=True):
                looks[path] = look
                advance()
        used = {name: [path for path in files.paths if not looks[path].problem] for name, files in parts.items()}
        duplicates = tuple(_duplicates(used.get("train", ()), used.get("test", ())))
    good = {path: look for path, look in looks.items() if not look.problem}
    sizes = sorted((look.size for look in good.values()), key=lambda size: size[0] * size[1]) or [(0, 0)]
    return Inspection(
        parts=parts,
        damaged={path: look.problem for path, look in looks.items() if look.problem},
        modes=dict(Counter(look.mode for look in good.values()).most_common()),
        smallest=sizes[0],
        largest=sizes[-1],
        sixteen=sum(look.sixteen for look in good.values()),
        several=tuple(path for path, look in good.items() if look.several),
        turned=sum(look.turned for look in good.values()),
        duplicates=duplicates,
        decoded=whole,
    )


def lines(found: Inspection) -> Iterator[str]:
    """Yield the results as lines of text: counts, odd files, and damaged files."""
    for name, files in found.parts.items():
        counts = ", ".join(f"{one} {count:,}" for one, count in zip(files.classes, files.per_class, strict=True))
        yield f"{name}: {len(files.paths):,} images in {len(files.classes)} classes: {counts}"
    (width, height), (most_width, most_height) = found.smallest, found.largest
    modes = ", ".join(f"{mode} {count:,}" for mode, count in found.modes.items())
    yield f"modes: {modes or 'none'}; sizes: {width} x {height} to {most_width} x {most_height} pixels"
    yield from oddities(found)
    if found.damaged:
        yield f"cannot be used: {len(found.damaged):,}"
        yield from (f"  {path}: {reason}" for path, reason in found.damaged.items())


def to_dict(found: Inspection) -> dict[str, Any]:
    """Return the results as plain values, for JSON."""
    return {
        "parts": {
            name: {
                "folder": str(files.root / files.folder),
                "classes": dict(zip(files.classes, files.per_class, strict=True)),
            }
            for name, files in found.parts.items()
        },
        "damaged": dict(found.damaged),
        "modes": dict(found.modes),
        "smallest": list(found.smallest),
        "largest": list(found.largest),
        "sixteen_bit": found.sixteen,
        "several_images": list(found.several),
        "turned": found.turned,
        "duplicates": [list(pair) for pair in found.duplicates],
        "passed_over": [line for files in found.parts.values() for line in files.passed_over],
        "ok": found.ok,
    }


def oddities(found: Inspection) -> Iterator[str]:
    """Yield lines about files that are used but may be unintended."""
    if found.sixteen:
        yield f"16-bit grey values: {found.sixteen:,} files; all images are used with 16 bits, and 65535 is white"
    if found.several:
        yield f"several images in one file; only the first is used: {_some(found.several)}"
    if found.turned:
        yield f"rotated or mirrored as their EXIF data say: {found.turned:,} files"
    if found.duplicates:
        yield f"in both parts: {_some([f'{test} = {train}' for test, train in found.duplicates])}"
    passed = [line for files in found.parts.values() for line in files.passed_over]
    yield from (f"skipped or followed: {line}" for line in dict.fromkeys(passed))
    if not found.decoded:
        yield "only headers were read; localize data check DIR decodes every file"


def refuse_damaged(found: Inspection) -> None:
    """Refuse data if some files cannot be used.

    Raises:
        MissingError: some cannot; the message lists them.
    """
    if not found.damaged:
        return
    named = [f"{path}: {reason}" for path, reason in list(found.damaged.items())[: 2 * SHOWN]]
    rest = len(found.damaged) - len(named)
    root = next(iter(found.parts.values())).root
    raise MissingError(
        f"{len(found.damaged):,} image files cannot be used." if len(found.damaged) > 1
        else "an image file cannot be used.",
        facts=[*named, *([f"and {rest:,} more."] if rest else [])],
        help=f"repair or remove them (localize data check {root} lists all); or --skip-damaged, to leave them out",
    )  # fmt: skip


def without(files: Files, damaged: Mapping[str, str]) -> Files:
    """Return the files that can be used.

    Raises:
        MissingError: a class has none.
    """
    kept = files.chosen([i for i, path in enumerate(files.paths) if path not in damaged])
    empty = [name for name, count in zip(kept.classes, kept.per_class, strict=True) if count == 0]
    if empty:
        raise MissingError(
            f"no image of class {empty[0]!r} in {files.root / files.folder} can be used.",
            facts=[f"{path}: {reason}" for path, reason in list(damaged.items())[:SHOWN]],
            help="repair them, or remove the folder of this class",
        )
    return kept


def _decoded(path: str) -> Look:
    try:
        decode(path, "RGB")
    except DamagedImageError as error:
        return Look(problem=error.reason)
    return _header(path)


def _header(path: str) -> Look:
    try:
        with open_image(path) as image:
            if reason := refused_mode(image):
                return Look(problem=reason)
            several = image.format in _PAGES and getattr(image, "is_animated", False)
            turned = image.getexif().get(_ORIENTATION, 1) != 1
            return Look("", image.mode, image.size, is_sixteen_bit(image), several, turned)
    except DamagedImageError as error:
        return Look(problem=error.reason)
    except Exception as error:  # the metadata of a damaged file may raise anything
        return Look(problem=f"its header cannot be read: {error}")


_ORIENTATION = 0x0112


def _duplicates(train: Sequence[str], test: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield pairs of a test file and a training file with the same content. Only files of the same size are read."""
    sizes: dict[int, list[str]] = defaultdict(list)
    for path in train:
        sizes[os.path.getsize(path)].append(path)
    digests: Callable[[str], bytes] = _memory(_digest)
    for path in test:
        same = sizes.get(os.path.getsize(path), [])
        twin = next((one for one in same if digests(one) == digests(path)), None)
        if twin is not None:
            yield path, twin


def _memory(function: Callable[[str], bytes]) -> Callable[[str], bytes]:
    known: dict[str, bytes] = {}

    def remembered(path: str) -> bytes:
        if path not in known:
            known[path] = function(path)
        return known[path]

    return remembered


def _digest(path: str) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _some(items: Sequence[str]) -> str:
    rest = f", and {len(items) - SHOWN:,} more" if len(items) > SHOWN else ""
    return f"{len(items):,} ({', '.join(items[:SHOWN])}{rest})"
