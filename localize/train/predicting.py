"""Predict the classes of image files with the model of a run: files, folders and patterns."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from localize import inference
from localize.errors import MissingError, OptionError
from localize.runtime.devices import choose_device
from localize.text import csv_table
from localize.train import runs
from localize.train.data.decoding import DamagedImageError, decode, to_tensor
from localize.train.data.folders import EXTENSIONS, images_below, shown
from localize.train.data.loaders import Fit
from localize.train.data.transforms import AUGMENTATIONS, evaluation_transform


@dataclass(frozen=True)
class Prediction:
    """The prediction for an image file, or why the file cannot be used."""

    file: str
    classes: tuple[str, ...] = ()
    """Names of the most likely classes, the most likely first."""
    scores: tuple[float, ...] = ()
    """Their probabilities (0..1): the softmax of the class scores over all classes."""
    problem: str = ""
    """Why the file cannot be used; empty if it can."""


def predict(
    run: str | Path,
    paths: Sequence[str],
    *,
    top: int = 5,
    at: str | None = None,
    batch_size: int = 64,
    device: str = "auto",
    trust_code: bool = False,
) -> Iterator[Prediction]:
    """Yield a prediction for every image file, in order; files that cannot be used have a ``problem``.

    Args:
        run: folder of a finished run, which determines the preprocessing.
        paths: files; folders, with their image files at any depth; and patterns such as ``*.png``.
        top: number of classes for each image.
        at: predict with this layer, see :func:`localize.inference.depth`; default: as the model predicts.
        batch_size: images at a time.
        device: see :func:`localize.runtime.devices.choose_device`.
        trust_code: run the code file that the run names, see :mod:`localize.recipes.trust`.

    Raises:
        MissingError: a path matches nothing, or the run cannot be read.
        OptionError: ``top`` or ``batch_size`` is below 1.
        UnknownNameError: there is no such layer.
    """
    for name, value in (("top", top), ("batch_size", batch_size)):
        if value < 1:
            raise OptionError(f"{name} cannot be {value}.", facts="it must be at least 1.")
    where = choose_device(device)
    files = list(dict.fromkeys(file for path in paths for file in image_files(path)))
    local, recipe = runs.load(Path(run), heads=at is not None, trust_code=trust_code)
    recipe = runs.fed(Path(run), recipe)
    layer = None if at is None else inference.depth(local, at).name
    assert recipe.preprocessing is not None and recipe.dataset is not None
    how, names = recipe.preprocessing, recipe.dataset.classes
    transform, fit = evaluation_transform(how), Fit(how, AUGMENTATIONS["none"])
    local = local.to(where)
    for start in range(0, len(files), batch_size):
        problems, images = {}, {}
        for file in files[start : start + batch_size]:
            try:
                images[file] = to_tensor(transform(decode(file, how.mode)), how)
            except DamagedImageError as error:
                problems[file] = error.reason
        found = {}
        if images:
            x = fit.finish(torch.stack(list(images.values()))).to(where)
            scores = inference.answer(local, x) if layer is None else inference.scores(local, x)[layer]
            best = scores.softmax(1).topk(min(top, scores.shape[1]), 1)
            for file, ids, shares in zip(images, best.indices.tolist(), best.values.tolist(), strict=True):
                found[file] = Prediction(file, tuple(names[one] for one in ids), tuple(shares))
        for file in files[start : start + batch_size]:
            yield found[file] if file in found else Prediction(file, problem=problems[file])


def to_csv(found: Sequence[Prediction]) -> str:
    """Return predictions as CSV: file, class, score (0..1), with a line for each image and class."""
    pairs = ((one.file, *pair) for one in found for pair in zip(one.classes, one.scores, strict=True))
    return csv_table([("file", "class", "score"), *pairs])


def image_files(path: str) -> Iterator[str]:
    """Yield the files of a path: the file itself, the image files of a folder, or the matches of a pattern.

    Raises:
        MissingError: there are none.
    """
    if os.path.lexists(path) and not os.path.isdir(path):
        yield path
        return
    found = images_below(Path(path)) if os.path.isdir(path) else sorted(glob.glob(path, recursive=True))
    files = [one for one in found if not os.path.isdir(one)]
    if not files:
        what = "no image files in it" if os.path.isdir(path) else "no such file, and it matches none as a pattern"
        raise MissingError(
            f"{shown(path)} matches no image.",
            facts=(f"there is {what}.", f"names of image files in folders end in {', '.join(EXTENSIONS)}."),
            help="localize predict RUN FILE, FOLDER or 'PATTERN*.png'",
        )
    yield from files
