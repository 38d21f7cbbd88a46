"""The trainer's data: sets by name (``sources``), what happens to images (``transforms``), batches (``loaders``)."""

from __future__ import annotations

from localize.train.data.loaders import Batches, DataSplits, evaluation_batches, load, training_batches
from localize.train.data.sources import DATASETS, get, num_classes
from localize.train.data.transforms import AUGMENTATIONS

__all__ = [
    "AUGMENTATIONS",
    "DATASETS",
    "Batches",
    "DataSplits",
    "evaluation_batches",
    "get",
    "load",
    "num_classes",
    "training_batches",
]
