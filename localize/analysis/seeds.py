"""Combine runs of one recipe with several seeds: their names, means and ranges."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from localize import recipes
from localize.recipes import Recipe

APART = ("seed", "output", "device", "data_dir", "workers", "download", "log_tensorboard", "log_wandb")
"""Settings in which runs of one recipe may differ."""


def grouped(runs: Mapping[str, Recipe]) -> dict[str, tuple[str, ...]]:
    """Return groups of runs that differ only in the seed, by the name of the group, in the order of their first runs.

    Args:
        runs: recipes of runs, by folder.

    Returns:
        Folders by the name of the group. The name is the method if no other group has it, otherwise method and model,
        otherwise the name of the folders; the number of runs is added if there are several.
    """
    groups: dict[str, list[str]] = {}
    for folder, recipe in runs.items():
        groups.setdefault(_key(recipe), []).append(folder)
    members = [tuple(group) for group in groups.values()]
    return dict(zip(_names(members, runs), members, strict=True))


def _key(recipe: Recipe) -> str:
    train = {name: value for name, value in recipe.train.items() if name not in APART}
    preprocessing = recipe.preprocessing  # with --split it depends on the seed
    size = None if preprocessing is None else preprocessing.input_size
    record = None if recipe.dataset is None else (recipe.dataset.name, recipe.dataset.classes)
    plain = dataclasses.replace(recipe, train=train, preprocessing=None, dataset=None)
    return f"{recipes.dump(plain)} {size} {record}"


def _names(groups: Sequence[tuple[str, ...]], runs: Mapping[str, Recipe]) -> list[str]:
    firsts = [runs[group[0]] for group in groups]
    tried = (
        [recipe.method for recipe in firsts],
        [f"{recipe.method}, {recipe.model}" for recipe in firsts],
        [_common(group) for group in groups],
        [group[0] for group in groups],
    )
    names = next((names for names in tried if len(set(names)) == len(names)), tried[-1])
    return [
        f"{name} ({len(group)} seeds)" if len(group) > 1 else name for name, group in zip(names, groups, strict=True)
    ]


def _common(group: Sequence[str]) -> str:
    """Return the common prefix of the folder names of a group."""
    names = [Path(folder).name for folder in group]
    return os.path.commonprefix(names).rstrip("-_. ") or names[0]


def mean(values: Sequence[float]) -> float:
    """Return the mean of the known values; NaN if there are none."""
    known = [value for value in values if value == value]
    return sum(known) / len(known) if known else float("nan")
