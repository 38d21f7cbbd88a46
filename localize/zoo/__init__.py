"""Models by name: the networks of the local-learning papers, torchvision's, timm's, and the user's own files."""

from __future__ import annotations

from localize.zoo.names import (
    ModelSource,
    create_empty,
    create_model,
    family,
    input_shape_of,
    library,
    list_models,
    normalisation,
    resolve,
    timm_cfg,
)

__all__ = [
    "ModelSource",
    "create_empty",
    "create_model",
    "family",
    "input_shape_of",
    "library",
    "list_models",
    "normalisation",
    "resolve",
    "timm_cfg",
]
