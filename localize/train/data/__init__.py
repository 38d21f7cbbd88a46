"""The trainer's data.

Data sets by name (``sources``), folders of images (``folders``, ``inspection``, ``decoding``), what a run records about
them (``fingerprint``), augmentation and normalisation (``transforms``, ``mixing``), batches (``loaders``).
"""

from __future__ import annotations

from localize.train.data.fingerprint import located
from localize.train.data.loaders import (
    Batches,
    DataSplits,
    Images,
    TestSplit,
    evaluation_batches,
    load,
    load_test,
    training_batches,
)
from localize.train.data.mixing import Mixing
from localize.train.data.sources import DATASETS, get, num_classes, place
from localize.train.data.transforms import AUGMENTATIONS

__all__ = [
    "AUGMENTATIONS",
    "DATASETS",
    "Batches",
    "DataSplits",
    "Images",
    "Mixing",
    "TestSplit",
    "evaluation_batches",
    "get",
    "load",
    "load_test",
    "located",
    "num_classes",
    "place",
    "training_batches",
]
