"""The reference trainer: a data set by name, a plain loop around ``local.step``, a run folder, an export.

``TrainConfig`` can be imported without torch; everything else is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from localize.recipes.settings import TrainConfig

if TYPE_CHECKING:
    from localize.train.callbacks import Callback, Step
    from localize.train.loop import Run, run
    from localize.train.passes import DivergedError
    from localize.train.resuming import resume
    from localize.train.runs import ExportError, export, verify

__all__ = [
    "Callback", "DivergedError", "ExportError", "Run", "Step", "TrainConfig", "export", "resume", "run", "verify"
]  # fmt: skip


_HOME = {
    "Callback": "callbacks",
    "DivergedError": "passes",
    "ExportError": "runs",
    "Run": "loop",
    "Step": "callbacks",
    "export": "runs",
    "resume": "resuming",
    "run": "loop",
    "verify": "runs",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"localize.train.{_HOME[name]}"), name)
