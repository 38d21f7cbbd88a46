"""Local learning for PyTorch models: every segment of a network trained by its own loss.

::

    local = localize.transform(model, "auglocal", example_input=x, d=4)
    optimizer = torch.optim.SGD(local.param_groups(lr=0.1, weight_decay=1e-4), lr=0.1)
    for x, y in loader:
        result = local.step(x, y, optimizer)
    localize.audit(local, (x, y)).raise_if_failed()
    model = local.export()

Names are imported when they are first used: ``import localize`` does not import torch.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from localize import zoo
    from localize.audit import audit
    from localize.errors import LocalizeError
    from localize.ir import AuditReport, CutSpec
    from localize.recipes import Recipe
    from localize.runtime import LocalModel
    from localize.transform import transform

__version__ = "0.1.0"

__all__ = [
    "AuditReport",
    "CutSpec",
    "LocalModel",
    "LocalizeError",
    "Recipe",
    "__version__",
    "audit",
    "transform",
    "zoo",
]

_CALLED = ("audit", "transform")
_MODULES = (*_CALLED, "zoo")
_HOME = {
    "AuditReport": "localize.ir",
    "CutSpec": "localize.ir",
    "LocalModel": "localize.runtime",
    "LocalizeError": "localize.errors",
    "Recipe": "localize.recipes",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"localize.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Called(ModuleType):
    """A module that is called as the function of its own name: ``localize.transform(...)``, ``localize.audit(...)``.

    Importing a submodule binds it as an attribute of its package. Were ``localize.transform`` the function, it would
    depend on who imported what before whether that name is the function or the module.
    """

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._function)

    @property
    def _function(self) -> Any:
        return self.__dict__[self.__name__.rpartition(".")[2]]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if name in _CALLED:
            value.__class__ = _Called
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
