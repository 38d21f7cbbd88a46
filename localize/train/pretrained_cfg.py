"""The description of an exported model, in timm's format: its preprocessing, and the meaning of its outputs.

It is in ``config.json`` next to the weights, and in the metadata of a safetensors file::

    config = json.loads(Path("export/config.json").read_text())
    model = timm.create_model(
        config["architecture"],
        checkpoint_path="export/backbone.safetensors",
        pretrained_cfg=config["pretrained_cfg"],
        **config["model_args"],
    )
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))

The key ``localize`` has what timm's format lacks: the image mode to convert to, the data set and the method.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors

import localize
from localize.recipes import Recipe
from localize.zoo import library, timm_cfg

CONFIG = "config.json"
_KEY = "config"
"""Key in the metadata of a safetensors file; its value is the text of ``config.json``."""
_MOST = 16 * 2**20
"""Size limit of ``config.json`` in bytes."""


def config(recipe: Recipe) -> dict[str, Any]:
    """Return the content of ``config.json`` for the model of a run."""
    how, data = recipe.preprocessing, recipe.dataset
    assert recipe.model is not None and how is not None and data is not None, "it is the recipe of a run"
    where = library(recipe.model)
    architecture = recipe.model.partition("/")[2].partition(".")[0] if where != "file" else recipe.model
    words = {
        "architecture": architecture,
        "input_size": list(how.input_size),
        "interpolation": how.interpolation,
        "crop_pct": how.crop_pct,
        "crop_mode": how.crop_mode,
        "mean": list(how.mean),
        "std": list(how.std),
        "num_classes": recipe.num_classes,
        "label_names": list(data.classes),
    }
    base = timm_cfg(recipe.model) if where == "timm" else {}
    return {
        "architecture": architecture,
        "num_classes": recipe.num_classes,
        "label_names": list(data.classes),
        "model_args": dict(recipe.model_options),
        "pretrained_cfg": base | words,
        "localize": {
            "version": localize.__version__,
            "model": recipe.model,
            "method": recipe.method,
            "image_mode": how.mode,
            "bits": how.bits,
            "exif_transpose": True,
            "dataset": _without_none(dataclasses.asdict(data)),
        },
    }


def dump(values: Mapping[str, Any]) -> str:
    """Return the text of ``config.json``."""
    return json.dumps(values, indent=2, ensure_ascii=True, allow_nan=False) + "\n"


def metadata(text: str) -> dict[str, str]:
    """Return the metadata of a safetensors file for a text of ``config.json``."""
    return {"format": "pt", _KEY: text}


def normalisation_of(weights: Path) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return the mean and std with which a file of weights was trained; None if they are not recorded.

    They are in the file itself, if it is a safetensors file written by ``localize``, or in the ``config.json`` that
    ``localize`` and timm write next to it.
    """
    found = _in_metadata(weights) or _beside(weights)
    words = found.get("pretrained_cfg") if isinstance(found, Mapping) else None
    if not isinstance(words, Mapping):
        return None
    mean: Any = words.get("mean")
    std: Any = words.get("std")
    return (tuple(mean), tuple(std)) if _are_numbers(mean) and _are_numbers(std) else None


def _are_numbers(values: Any) -> bool:
    return (
        isinstance(values, list)
        and bool(values)
        and all(isinstance(one, int | float) and not isinstance(one, bool) for one in values)
    )


def _in_metadata(weights: Path) -> Any:
    if weights.suffix != ".safetensors":
        return None
    try:
        with safetensors.safe_open(weights, framework="pt") as file:
            return json.loads((file.metadata() or {}).get(_KEY, "null"))
    except (OSError, ValueError, safetensors.SafetensorError):
        return None


def _beside(weights: Path) -> Any:
    path = weights.with_name(CONFIG)
    try:
        return json.loads(path.read_bytes()) if path.stat().st_size <= _MOST else None
    except (OSError, ValueError):
        return None


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(child) for key, child in value.items() if child is not None}
    return list(value) if isinstance(value, tuple) else value
