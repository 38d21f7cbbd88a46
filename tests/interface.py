"""The declared interface: names and signatures that users' programs and generated files rely on.

``python -m tests.interface`` writes ``interface.json`` again. A change of that file in a review is a change for every
user; docs/interface.md says when ``localize.files.VERSION`` grows with it.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import localize
from tests.codegen import texts

RECORDED = Path(__file__).with_name("interface.json")

MODULES = (
    "localize",
    "localize.auditor",
    "localize.errors",
    "localize.inference",
    "localize.losses",
    "localize.methods",
    "localize.ops",
    "localize.recipes",
    "localize.runtime",
    "localize.testing",
    "localize.train",
    "localize.zoo",
)
"""Modules whose public names are declared: those in ``__all__``, or all that they define without an underscore."""

CONVERSIONS = (
    "ResNet by backprop()",
    "ResNet by auglocal(d=2, recompute=all)",
    "ResNet by auglocal(d=2, loss_scaling=True, update=immediate)",
    "ResNet by dcl()",
    "ResNet by dcl(dictionary=averaged)",
    "ResNet by mlaan(window=2)",
    "ResNet by ff()",
    "ResNet by fa()",
    "ResNet by dfa()",
    "ResNet by drtp()",
    "ResNet by accumulate(parts=2)",
    "ResNet by cfl(total=dict)",
    "TwoStreams by dgl()",
    "TwoInputs by dgl()",
    "Auxiliary by dgl()",
    "ViT by dcl(micro_batch=2)",
    "ResNet by dcl(micro_batch=2)",
)
"""Conversions (see :mod:`tests.codegen.texts`) whose texts between them have every form of function and import."""


def package() -> dict[str, dict[str, Any]]:
    """Return every public name of the declared modules, with its signature."""
    return {name: dict(_module(name)) for name in MODULES}


def text() -> dict[str, list[str]]:
    """Return what generated texts import and define, and the attributes of what runs them; ``k`` is a number."""
    functions: set[str] = set()
    imports: set[str] = set()
    values: set[str] = set()
    attributes: set[str] = set()
    for name, convert in texts.requests():
        if name in CONVERSIONS:
            local = convert()
            attributes.update(name for name in (*vars(local), *dict(local.named_children())) if name[0] != "_")
            tree = ast.parse(local.source)
            for node in tree.body:
                if isinstance(node, ast.FunctionDef):
                    functions.add(_numberless(f"{node.name}({', '.join(a.arg for a in node.args.args)})"))
                    values.update(_milestones(node))
                elif isinstance(node, ast.ImportFrom):
                    imports.update(f"from {node.module} import {alias.name}" for alias in node.names)
                elif isinstance(node, ast.Import):
                    imports.add(ast.unparse(node))
    found = {"functions": functions, "imports": imports, "values": values, "attributes of LocalModel": attributes}
    return {key: sorted(names) for key, names in found.items()}


def _milestones(function: ast.FunctionDef) -> Iterator[str]:
    """Yield the names of features, losses and scores in a function that trains, and what it returns."""
    if function.name.startswith("segment_"):
        return
    kind = _numberless(function.name)
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and re.match("(h|loss|scores)_", node.id):
            yield f"{kind}: {_numberless(node.id)}"
    if function.name == "train_step":
        returned = function.body[-1]
        assert isinstance(returned, ast.Return)
        yield f"{kind}: {ast.unparse(returned)}"


def _numberless(name: str) -> str:
    return re.sub(r"_\d+", "_k", name)


def _module(name: str) -> Iterator[tuple[str, Any]]:
    module = importlib.import_module(name)
    own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == name and key[0] != "_"]
    for key in sorted(getattr(module, "__all__", own)):
        value = getattr(module, key)
        if inspect.isclass(value) and value.__module__.startswith("localize"):
            yield key, _class(value)
        elif inspect.isfunction(value):
            yield key, _signature(value)
        else:
            yield key, "a module" if inspect.ismodule(value) else type(value).__name__


def _class(kind: type) -> dict[str, str]:
    """Return the signature of a class, its public properties and methods, without those of its bases."""
    found = {"()": _signature(kind)}
    for name, value in vars(kind).items():
        if name.startswith("_"):
            continue
        if isinstance(value, property):
            found[name] = f"property{_signature(value.fget)}"
        elif inspect.isfunction(value):
            found[name] = _signature(value)
        elif isinstance(value, classmethod | staticmethod):
            found[name] = f"{type(value).__name__}{_signature(value.__func__)}"
    return found


def _signature(function: Any) -> str:
    return re.sub(r"<function .*? at 0x[0-9a-f]+>", "<function>", str(inspect.signature(function)))


if __name__ == "__main__":
    assert localize.__file__
    RECORDED.write_text(json.dumps({"package": package(), "text": text()}, indent=1) + "\n", encoding="utf-8")
