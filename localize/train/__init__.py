"""The reference trainer: a data set by name, a plain loop around ``local.step``, a run folder, an export.

``TrainConfig`` can be imported without torch; everything else is imported when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from localize.train.config import TrainConfig

if TYPE_CHECKING:
    from localize.train.loop import DivergedError, Run, resume, run
    from localize.train.runs import ExportError, export, verify

__all__ = ["DivergedError", "ExportError", "Run", "TrainConfig", "export", "resume", "run", "verify"]


def __getattr__(name: str) -> Any:
    if name in ("DivergedError", "Run", "resume", "run"):
        from localize.train import loop

        return {"DivergedError": loop.DivergedError, "Run": loop.Run, "resume": loop.resume, "run": loop.run}[name]
    if name in ("ExportError", "export", "verify"):
        from localize.train import runs

        return {"ExportError": runs.ExportError, "export": runs.export, "verify": runs.verify}[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
