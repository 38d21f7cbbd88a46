"""Folders of images with a folder for each class: the files, their layout, and how they are split.

This module opens no image. A line reports each file that is skipped; a file that would be counted twice is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from localize.errors import MissingError, OptionError

EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".avif", ".jp2",
)  # fmt: skip
"""Endings of the names of image files."""


@dataclass(frozen=True)
class Files:
    """Images in files, each with a class id, sorted by class and then by name."""

    root: Path
    """The data folder."""
    folder: str
    """Folder of the class folders, relative to ``root``."""
    classes: tuple[str, ...]
    """Names of the class folders, sorted: the position of each is its class id."""
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    passed_over: tuple[str, ...] = ()
    """Lines about skipped files and folders, and about links that were followed."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the files relative to ``root``, with slashes."""
        return tuple(Path(os.path.relpath(path, self.root)).as_posix() for path in self.paths)

    @property
    def per_class(self) -> tuple[int, ...]:
        """Number of images of each class."""
        counts = np.bincount(np.asarray(self.labels, dtype=np.int64), minlength=len(self.classes))
        return tuple(counts.tolist())

    def chosen(self, indices: Sequence[int]) -> Files:
        """Return some of the files, in their order here."""
        kept = sorted(indices)
        paths, labels = tuple(self.paths[i] for i in kept), tuple(self.labels[i] for i in kept)
        return Files(self.root, self.folder, self.classes, paths, labels, self.passed_over)


@dataclass(frozen=True)
class Layout:
    """Where the training images and the test images are; ``test`` is None if they still have to be split."""

    root: Path
    train: Path | None
    test: Path | None
    named: tuple[str, ...] = field(default=())
    """Names that a folder of test images may have."""


def shown(path: str | Path) -> str:
    """Return a path for a message; a relative one together with the current directory."""
    return str(path) if os.path.isabs(path) else f"{path} (in {os.getcwd()})"


def layout(root: Path, tests: Sequence[str]) -> Layout:
    """Return the layout of a data folder.

    It has ``train`` and one of ``tests`` side by side; or only ``train``; or only test images; or just class folders,
    which are training images that have to be split, or test images.
    """
    test = next((root / name for name in tests if (root / name).is_dir()), None)
    if (root / "train").is_dir():
        return Layout(root, root / "train", test, tuple(tests))
    if test is not None:
        return Layout(root, None, test, tuple(tests))
    return Layout(root, root, None, tuple(tests))


def class_folders(part: Path) -> tuple[list[str], list[str]]:
    """Return the names of the class folders in ``part``, sorted, and those of hidden folders, which are skipped.

    Raises:
        MissingError: a name is not UTF-8.
    """
    if not part.is_dir():
        return [], []
    with os.scandir(part) as entries:
        found = sorted(entry.name for entry in entries if entry.is_dir())
    for name in found:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise MissingError(
                f"the name of a class folder in {shown(part)} is not UTF-8.",
                facts=f"it is {os.fsencode(name)!r}.",
                help="rename it: class names are stored as text",
            ) from error
    return [name for name in found if not name.startswith(".")], [name for name in found if name.startswith(".")]


def list_files(root: Path, part: Path, layout_told: str) -> Files:
    """List the images in the class folders of ``part``.

    Args:
        root: the data folder; ``part`` is this folder or inside it.
        part: folder with the class folders.
        layout_told: description of the layout for messages.

    Raises:
        MissingError: there are no class folders, a class has no images, or a link leads to a folder that contains it.
    """
    classes, hidden = class_folders(part)
    if not classes:
        raise MissingError(
            f"there are no class folders in {shown(part)}.",
            facts=(
                f"there is no {shown(part)}." if not part.is_dir() else f"{shown(part)} has no folders.",
                f"in the data folder: {layout_told}.",
            ),
            help="--data-dir DIR, with the folder that contains them",
        )
    paths: list[str] = []
    labels: list[int] = []
    lines = [f"{part / name} is hidden" for name in hidden]
    for label, name in enumerate(classes):
        found = sorted(_walk(part / name, (os.path.realpath(part),), lines))
        images = [os.path.join(*one) for one in found if one[1].lower().endswith(EXTENSIONS)]
        others = [os.path.join(*one) for one in found if not one[1].lower().endswith(EXTENSIONS)]
        if others:
            more = f" and {len(others) - 1:,} more" if len(others) > 1 else ""
            lines.append(f"{others[0]}{more}: not the name of an image file")
        if not images:
            raise MissingError(
                f"class {name!r} in {shown(part)} has no images.",
                facts=f"names of image files end in {', '.join(EXTENSIONS)}.",
                help=f"put images in {part / name}, or remove that folder",
            )
        paths += images
        labels += [label] * len(images)
    relative = Path(os.path.relpath(part, root)).as_posix()
    return Files(root, relative, tuple(classes), tuple(paths), tuple(labels), tuple(lines))


def images_below(folder: Path) -> list[str]:
    """Return the image files in a folder, at any depth, sorted; hidden folders are skipped.

    Raises:
        MissingError: a link leads to a folder that contains it.
    """
    found = sorted(_walk(folder, (), []))
    return [os.path.join(*one) for one in found if one[1].lower().endswith(EXTENSIONS)]


def _walk(folder: Path, above: tuple[str, ...], lines: list[str]) -> Iterator[tuple[str, str]]:
    """Yield (folder, name) of every file below a folder; links are followed, except in circles."""
    real = os.path.realpath(folder)
    if any(one == real or one.startswith(os.path.join(real, "")) for one in above):
        raise MissingError(
            f"{shown(folder)} is a link to a folder that contains it.",
            facts=f"it leads to {real}; its images would be counted repeatedly, under the wrong class.",
            help=f"rm {folder}",
        )
    if folder.is_symlink():
        lines.append(f"{folder} is a link to {real}, which was followed")
    with os.scandir(folder) as found:
        entries = list(found)
    for entry in entries:
        if not entry.is_dir():
            yield str(folder), entry.name
        elif entry.name.startswith("."):
            lines.append(f"{entry.path} is hidden")
        else:
            yield from _walk(Path(entry.path), (*above, real), lines)


def split(files: Files, share: float, seed: int, known: frozenset[str] | None = None) -> tuple[Files, Files]:
    """Split images into training and test images, class by class.

    Args:
        files: all images.
        share: share of each class to test on, 0 < share < 1; at least one image, and at most all but one.
        seed: selects the test images; numpy guarantees the stream of ``RandomState``.
        known: names of the test files of an earlier split, which is kept; new files are for training.

    Returns:
        The training images and the test images.

    Raises:
        OptionError: a class has only one image.
    """
    names, labels = files.names, np.asarray(files.labels)
    if known is not None:
        test = [i for i, name in enumerate(names) if name in known]
    else:
        random = np.random.RandomState(seed % 2**32)
        test = []
        for label, name in enumerate(files.classes):
            own = np.flatnonzero(labels == label)
            if len(own) < 2:
                raise OptionError(
                    f"class {name!r} has only one image, which cannot be split.",
                    help=f"put more images in {files.root / files.folder / name}, or remove that folder",
                )
            count = min(max(round(share * len(own)), 1), len(own) - 1)
            test += random.permutation(own)[:count].tolist()
    chosen = set(test)
    return files.chosen([i for i in range(len(names)) if i not in chosen]), files.chosen(test)
