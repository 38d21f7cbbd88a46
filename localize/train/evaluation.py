"""Evaluate the model of a run on test images, in all the ways that the papers use."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from localize import inference
from localize.errors import MissingError, OptionError
from localize.recipes import Recipe
from localize.runtime.devices import choose_device
from localize.runtime.model import LocalModel
from localize.train import data, runs
from localize.train.data import fingerprint
from localize.train.progress import watching

ALL = "all"
"""Value of ``at`` that means every layer."""


@dataclass(frozen=True)
class Questions:
    """Evaluations besides the model's own accuracy; see :mod:`localize.inference` for each.

    ``at`` is a layer's name, or ``all``; ``weighted`` the p of the weighted sum, ``form`` its form; ``groups`` the
    super-class of each class, for ``superlabels``.
    """

    at: str | None = None
    weighted: float | None = None
    form: str = "l**p"
    without_classifier: bool = False
    superlabels: str | None = None
    groups: inference.Groups = ()
    goodness: bool = False
    skip_first: bool = True

    @property
    def any(self) -> bool:
        """Whether any evaluation needs the heads."""
        return self != Questions(form=self.form, groups=self.groups, skip_first=self.skip_first)


@dataclass(frozen=True)
class Evaluation:
    """A run loaded for evaluation, with its test images."""

    local: LocalModel
    recipe: Recipe
    splits: data.TestSplit
    device: torch.device
    batch_size: int


def open_run(
    folder: str | Path,
    *,
    heads: bool = True,
    data_name: str | None = None,
    data_dir: str | None = None,
    download: bool = False,
    batch_size: int | None = None,
    device: str = "auto",
    accept_data: bool = False,
    trust_code: bool = False,
) -> Evaluation:
    """Load a run and the test images of its data set, preprocessed as in the run. Nothing is measured.

    Args:
        folder: the folder of a finished run.
        heads: whether its heads are needed, see :func:`localize.train.runs.load`.
        data_name: another data set with the same classes, or a folder of images; default: the run's own.
        data_dir: folder of the data set, if it is not bundled.
        download: download missing files.
        batch_size: images at a time; default: the run's own.
        device: see :func:`localize.runtime.devices.choose_device`.
        accept_data: test even if images have changed since the run was started, or classes have other names.
        trust_code: run the code file that the run names, see :mod:`localize.recipes.trust`.

    Raises:
        LocalizeError: the run, the data set or the device is not available, or they do not match.
    """
    where = choose_device(device)
    if batch_size is not None and batch_size < 1:
        raise OptionError(f"batch_size cannot be {batch_size}.", facts="it must be at least 1.", help="--batch-size 64")
    run = Path(folder)
    local, recipe = runs.load(run, heads=heads, trust_code=trust_code)
    recipe = runs.fed(run, recipe)
    splits = test_images(run, recipe, data_name, data_dir, download=download, accept=accept_data)
    return Evaluation(local.to(where), recipe, splits, where, batch_size or recipe.train["batch_size"])


def test_images(
    run: Path, recipe: Recipe, data_name: str | None, data_dir: str | None, *, download: bool, accept: bool
) -> data.TestSplit:
    """Read the test images of a run, or others with the same classes.

    Raises:
        MissingError: the classes differ, or the images of the run have changed.
        LocalizeError: see :func:`localize.train.data.load_test`.
    """
    before, how, train = recipe.dataset, recipe.preprocessing, recipe.train
    assert before is not None and how is not None, "it describes the input of its model"
    own = data_name is None and data_dir is None
    if data_name is not None:
        data_name, data_dir = data.place(data_name, data_dir)
    listing = runs.listing_of(run) if own else None
    where = data.located(train.get("data_dir"), listing) if own else data_dir
    splits = data.load_test(
        data_name or before.name,
        how,
        data_dir=where,
        download=download,
        split=train.get("split") if own else None,
        seed=train.get("seed", 0),
        listing=listing,
        hashed=before.hashed,
    )
    help = f"localize eval {run} --accept-data"
    if len(splits.classes) != len(before.classes):
        raise OptionError(
            f"data set {splits.name!r} has {len(splits.classes)} classes, but the model has {len(before.classes)}.",
            facts=list(fingerprint.class_differences(before.classes, splits.classes)),
            help=f"--data {before.name}",
        )
    if not accept and own:
        listings = (listing, splits.listing)
        fingerprint.refuse_changed(before, splits.record, listings, parts=("test",), accept=help)
    if not accept and (named := list(fingerprint.class_differences(before.classes, splits.classes))):
        raise MissingError(
            f"the classes of {splits.name!r} differ from those of the run.",
            facts=named,
            help=f"use folders with the same names; or, if intended, {help} with the same --data and --data-dir",
        )
    return splits


def check(opened: Evaluation, questions: Questions) -> None:
    """Refuse evaluations that this model does not support.

    Raises:
        LocalizeError: see :mod:`localize.inference`.
    """
    dict(_asked(opened.local, questions))


def evaluate_run(opened: Evaluation, questions: Questions, *, progress: bool | None = None) -> dict[str, Any]:
    """Evaluate a run on all test images.

    Args:
        opened: the run.
        questions: the evaluations.
        progress: show a progress bar on stderr; default: if stderr is a terminal.

    Returns:
        ``model``, ``method``, ``data``, ``images``, ``classes``; ``answer``, how the model predicts (``output`` if a
        loss trains its output, otherwise its deepest local loss by name, ``goodness``, or ``softmax_sum``, the sum of
        the softmax of all local losses' scores), and the ``accuracy`` (0..1) of that; and for each evaluation:
        ``layers`` (a list with ``name``, ``segment``, ``ends_at``, ``accuracy``), ``weighted`` (``p``, ``form``,
        ``accuracy``), ``without_classifier``, ``superlabels``, ``goodness`` (each with ``accuracy``).

    Raises:
        LocalizeError: this model does not support an evaluation; this is raised before any image is read.
    """
    local = opened.local
    asked = dict(_asked(local, questions))
    workers = opened.recipe.train.get("workers", 0)
    loader = data.evaluation_batches(opened.splits.test, opened.batch_size, workers=workers, device=opened.device)
    show = sys.stderr.isatty() if progress is None else progress
    right: dict[str, int | Tensor] = dict.fromkeys(asked, 0)
    with watching("evaluation", len(loader), show) as advance:
        for x, y in loader:
            batch = _Batch(local, x, y)
            for key, guess in asked.items():
                predicted, truth = guess(batch)
                right[key] += (predicted == truth).sum()
            advance()
    images = len(opened.splits.test)
    accuracy = {key: int(count) / images for key, count in right.items()}
    return {
        "model": local.plan.segments.trunk.name,
        "method": local.plan.method,
        "data": opened.splits.name,
        "images": images,
        "classes": local.plan.segments.trunk.num_classes,
        "answer": inference.answers_by(local),
        "accuracy": accuracy["answer"],
        **_report(local, questions, accuracy),
    }


@dataclass(frozen=True)
class _Batch:
    """Test images, with results that several evaluations share computed only once."""

    local: LocalModel
    x: Tensor
    y: Tensor

    @cached_property
    def scores(self) -> Mapping[str, Tensor]:
        return inference.scores(self.local, self.x)

    def at(self, *depths: inference.Depth) -> list[Tensor]:
        return [self.scores[depth.name] for depth in depths]


_Guess = Callable[[_Batch], tuple[Tensor, Tensor]]
"""Predicted class ids (N,) and the right ones (N,)."""


def _at(depth: inference.Depth, batch: _Batch) -> tuple[Tensor, Tensor]:
    return batch.at(depth)[0].argmax(1), batch.y


def _asked(local: LocalModel, questions: Questions) -> Iterator[tuple[str, _Guess]]:
    """Yield the evaluations by name; unsupported ones are refused here."""
    yield "answer", lambda batch: (inference.answer(local, batch.x).argmax(1), batch.y)
    for depth in _layers(local, questions):
        yield f"at {depth.name}", partial(_at, depth)
    if questions.weighted is not None:
        depths, p, form = inference.local_depths(local), questions.weighted, questions.form
        inference.weighted_sum([torch.zeros(1, 1)] * len(depths), p, form)
        yield "weighted", lambda batch: (inference.weighted_sum(batch.at(*depths), p, form).argmax(1), batch.y)
    if questions.without_classifier:
        last = inference.local_depths(local)[-1]
        yield "without classifier", lambda batch: (batch.at(last)[0].argmax(1), batch.y)
    if questions.superlabels is not None:
        groups, how = questions.groups, questions.superlabels
        coarse = inference.coarse_ids(groups, local.plan.segments.trunk.num_classes)
        inference.superlabels(local, _example(local), groups, how)
        yield (
            "superlabels",
            lambda batch: (
                inference.superlabels(local, batch.x, groups, how),
                coarse.to(batch.y.device)[batch.y],
            ),
        )
    if questions.goodness:
        skip = questions.skip_first
        inference.goodness(local, _example(local), skip_first=skip)
        yield "goodness", lambda batch: (inference.goodness(local, batch.x, skip_first=skip).argmax(1), batch.y)


def _example(local: LocalModel) -> Tensor:
    """Return two black images."""
    like = next(local.parameters())
    return torch.zeros(2, *local.plan.segments.trunk.input_shape, device=like.device, dtype=like.dtype)


def _layers(local: LocalModel, questions: Questions) -> tuple[inference.Depth, ...]:
    if questions.at is None:
        return ()
    return inference.depths(local) if questions.at == ALL else (inference.depth(local, questions.at),)


def _report(local: LocalModel, questions: Questions, accuracy: Mapping[str, float]) -> dict[str, Any]:
    """Return the results of the evaluations in the form that is printed."""
    report: dict[str, Any] = {}
    if questions.at is not None:
        report["layers"] = [
            {"name": d.name, "segment": d.segment, "ends_at": d.ends_at, "accuracy": accuracy[f"at {d.name}"]}
            for d in _layers(local, questions)
        ]
    if questions.weighted is not None:
        report["weighted"] = {"p": questions.weighted, "form": questions.form, "accuracy": accuracy["weighted"]}
    if questions.without_classifier:
        name = inference.local_depths(local)[-1].name
        report["without_classifier"] = {"name": name, "accuracy": accuracy["without classifier"]}
    if questions.superlabels is not None:
        superclasses = int(inference.coarse_ids(questions.groups, local.plan.segments.trunk.num_classes).max()) + 1
        report["superlabels"] = {
            "form": questions.superlabels,
            "classes": superclasses,
            "accuracy": accuracy["superlabels"],
        }
    if questions.goodness:
        report["goodness"] = {"skip_first": questions.skip_first, "accuracy": accuracy["goodness"]}
    return report


def write_saliency(
    opened: Evaluation, folder: str | Path, count: int, *, at: str | None = None
) -> list[dict[str, Any]]:
    """Write pictures of the first test images: each image, and its saliency for the two most likely labels.

    Args:
        opened: the run.
        folder: where ``saliency-0000.png``, ... are written; it is created.
        count: number of images.
        at: layer, see :func:`localize.inference.saliency`.

    Returns:
        ``file``, ``label``, ``top1`` and ``top2`` of each image.

    Raises:
        OptionError: there are not ``count`` test images, or see :func:`localize.inference.saliency`.
        MissingError: the files cannot be written.
    """
    test, local = opened.splits.test, opened.local
    if not 1 <= count <= len(test):
        raise OptionError(f"-n cannot be {count}.", facts=f"there are {len(test)} test images.", help="-n 8")
    written = []
    for start in range(0, count, opened.batch_size):
        x, y = test[list(range(start, min(count, start + opened.batch_size)))]
        x = x.to(opened.device)
        labels = inference.answer(local, x).topk(2, 1).indices
        maps = torch.stack([inference.saliency(local, x, labels[:, i], at=at) for i in (0, 1)], 1)
        for i, (image, heat, top) in enumerate(zip(x, maps, labels.tolist(), strict=True)):
            path = Path(folder) / f"saliency-{start + i:04d}.png"
            image = image if image.shape[0] in (1, 3) else image[:1]
            inference.save_saliency(path, image, heat, mean=opened.splits.mean, std=opened.splits.std)
            written.append({"file": str(path), "label": int(y[i]), "top1": top[0], "top2": top[1]})
    return written


def read_groups(source: str | None, classes: int) -> inference.Groups:
    """Read the super-class of each class.

    Args:
        source: ``cifar100``; or a JSON or YAML file with a list of super-class ids, one for each class, or with a key
            for each class; None means ``cifar100`` if the model has 100 classes.
        classes: number of classes of the model.

    Raises:
        OptionError: there is no map, or the file contains something else.
        MissingError: the file cannot be read.
    """
    if source == "cifar100" or (source is None and classes == len(inference.CIFAR100_COARSE)):
        return inference.CIFAR100_COARSE
    if source is None:
        raise OptionError(
            f"no map of super-classes was given, and the model has {classes} classes.",
            facts="the package contains only the map of CIFAR-100 (100 classes).",
            help="--map FILE, with a list of super-class ids, one for each class",
        )
    try:
        groups = yaml.safe_load(Path(source).read_text(encoding="utf-8"))
    except OSError as error:
        raise MissingError(
            f"{source} cannot be read.", facts=str(error), help="--map FILE, or --map cifar100"
        ) from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise OptionError(
            f"{source} is not a map of super-classes.", facts="it is neither JSON nor YAML.", help="[0, 0, 1, 1]"
        ) from error
    if isinstance(groups, Mapping):
        return {int(key) if str(key).isdigit() else key: value for key, value in groups.items()}
    if not isinstance(groups, list):
        raise OptionError(
            f"{source} is not a map of super-classes.", facts=f"it contains {groups!r:.60}.", help="[0, 0, 1, 1]"
        )
    return groups
