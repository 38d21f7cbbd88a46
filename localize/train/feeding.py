"""The normalisation of a run's images, and the lines about its data that a run prints when it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from localize.recipes import Recipe
from localize.recipes.settings import TrainConfig
from localize.train import data, pretrained_cfg
from localize.train.data import inspection
from localize.zoo import normalisation


@dataclass(frozen=True)
class Feeding:
    """Mean and std for normalising images; None: measured. ``source`` says where they come from."""

    mean: Sequence[float] | None
    std: Sequence[float] | None
    source: str


def feed(recipe: Recipe, config: TrainConfig) -> Feeding:
    """Return the normalisation of images: as configured, or as the initial weights need it."""
    if recipe.preprocessing is not None:
        return Feeding(None, None, "as when the run started")
    found, source = None, "measured on the training images"
    if config.initial_checkpoint is not None:
        found, source = pretrained_cfg.normalisation_of(Path(config.initial_checkpoint)), "of the weights in that file"
    if found is None and (config.pretrained or config.initial_checkpoint is not None):
        found, source = normalisation(config.model), f"of the published weights of {config.model}"
    mean, std = found or (None, None)
    if found is None or (config.pixel_mean is not None and config.pixel_std is not None):
        source = "measured on the training images"
    if config.pixel_mean is not None or config.pixel_std is not None:
        source = "as given" if config.pixel_mean and config.pixel_std else f"one as given, the other {source}"
    return Feeding(config.pixel_mean or mean, config.pixel_std or std, source)


def fed_lines(splits: data.DataSplits, feeding: Feeding) -> list[str]:
    """Return lines about oddities in the files, the classes, and the normalisation."""
    names = splits.classes
    shown = ", ".join(names[:10]) + (f", ... {names[-1]}" if len(names) > 10 else "")
    lines = [f"classes: {len(names)} ({shown})"]
    mean, std = (", ".join(f"{value:.4f}" for value in values) for values in (splits.mean, splits.std))
    lines.append(f"normalisation: mean {mean}, std {std}, {feeding.source}")
    if splits.inspection is not None:
        lines += inspection.oddities(splits.inspection)
        lines += (f"left out: {path}: {reason}" for path, reason in splits.inspection.damaged.items())
    return lines
