"""Local learning for PyTorch models: every segment of a network trained by its own loss.

::

    local = localize.transform(model, "auglocal", example_input=x, d=4)
    optimizer = torch.optim.SGD(local.param_groups(lr=0.1, weight_decay=1e-4), lr=0.1)
    for x, y in loader:
        result = local.step(x, y, optimizer)
    localize.audit(local, (x, y)).raise_if_failed()
    model = local.export()

    run = localize.load("runs/resnet20-dcl-digits-seed0")  # what localize train has left

Names are imported when they are first used: ``import localize`` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from localize import analysis, inference, zoo
    from localize.auditor import audit
    from localize.compiler import freeze, transform
    from localize.errors import LocalizeError
    from localize.ir import AuditReport, CutSpec
    from localize.recipes import Recipe
    from localize.runtime.compiled import compile
    from localize.runtime.model import LocalModel
    from localize.train.loaded import LoadedRun, load

__version__ = "0.1.0"

__all__ = [
    "AuditReport",
    "CutSpec",
    "LoadedRun",
    "LocalModel",
    "LocalizeError",
    "Recipe",
    "__version__",
    "analysis",
    "audit",
    "compile",
    "freeze",
    "inference",
    "load",
    "transform",
    "zoo",
]

_HOME = {
    "AuditReport": "localize.ir",
    "CutSpec": "localize.ir",
    "LoadedRun": "localize.train.loaded",
    "LocalModel": "localize.runtime.model",
    "LocalizeError": "localize.errors",
    "Recipe": "localize.recipes",
    "audit": "localize.auditor",
    "compile": "localize.runtime.compiled",
    "freeze": "localize.compiler",
    "load": "localize.train.loaded",
    "transform": "localize.compiler",
}


def __getattr__(name: str) -> Any:
    if name in ("analysis", "inference", "zoo"):
        return importlib.import_module(f"localize.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
