"""The reference has an entry for every declared name, which says what goes in, what comes out, and what is raised."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import localize
from tests.interface import MODULES

ENTRY = re.compile(r"^::: (\S+)$", re.M)
REFERENCE = "\n".join(
    path.read_text(encoding="utf-8")
    for path in sorted((Path(__file__).parent.parent / "docs" / "reference").glob("*.md"))
)
OF_TORCH = {"forward", "extra_repr"}
"""Methods of a module; what goes in and comes out is said by the class."""


def resolved(name: str) -> Any:
    """Return what a dotted name means."""
    found: Any = localize
    parts = name.split(".")
    for i, part in enumerate(parts[1:], 2):
        found = getattr(found, part) if hasattr(found, part) else importlib.import_module(".".join(parts[:i]))
    return found


def members(module: ModuleType) -> list[Any]:
    """Return the public values of a module that are its own, or that it lists."""
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return [getattr(module, name) for name in listed]
    return [
        value
        for name, value in vars(module).items()
        if name[0] != "_" and getattr(value, "__module__", module.__name__) == module.__name__
    ]


def declared() -> Iterator[tuple[str, Any]]:
    """Yield every declared name, and what it means."""
    for module in map(importlib.import_module, MODULES):
        names = getattr(module, "__all__", None) or [
            name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__
        ]
        yield from ((f"{module.__name__}.{name}", getattr(module, name)) for name in names if name[0] != "_")


def described() -> dict[str, Callable[..., Any]]:
    """Return what is declared and can be called: functions, classes, and the public methods of classes."""
    found: dict[str, Callable[..., Any]] = {}
    for name, value in declared():
        if inspect.isclass(value):
            found[name] = value
            for part, member in vars(value).items():
                if (
                    part[0] != "_"
                    and part not in OF_TORCH
                    and isinstance(member, classmethod | staticmethod | type(described))
                ):
                    found[f"{name}.{part}"] = getattr(value, part)
        elif inspect.isroutine(value):
            found[name] = value
    return found


def text_of(value: Any) -> str:
    """Return a docstring; of a class also its source, where its fields are described one by one."""
    text = inspect.getdoc(value) or ""
    return text + inspect.getsource(value) if inspect.isclass(value) else text


def undescribed(value: Callable[..., Any]) -> list[str]:
    """Return what is missing in the docstring of a function or class."""
    text = text_of(value)
    own = inspect.getdoc(value) or ""
    missing = [] if own else ["a docstring"]
    for name in inspect.signature(value).parameters if inspect.isroutine(value) or "Args:" in own else ():
        if name not in ("self", "cls") and not re.search(rf"^\s*{name}: |``{name}\b", text, re.M):
            missing.append(f"the argument {name}")
    if inspect.isfunction(value):
        signature = inspect.signature(value)
        if signature.return_annotation not in (None, "None") and not re.search(r"\b(return|yield)", text, re.I):
            missing.append("what it returns")
        missing += [f"the error {name}" for name in raised(value) if name not in text and "LocalizeError" not in text]
    return missing


def raised(function: Callable[..., Any]) -> set[str]:
    """Return the names of the errors that stand in the raise statements of a function."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    names = {ast.unparse(call.func).rpartition(".")[2] for call in calls}
    return {name for name in names if name.endswith("Error")}


def test_every_declared_name_has_an_entry_in_the_reference() -> None:
    entries = [resolved(name) for name in ENTRY.findall(REFERENCE)]
    there = entries + [member for entry in entries if isinstance(entry, ModuleType) for member in members(entry)]

    missing = [name for name, value in declared() if not any(value is one for one in there)]

    assert not [name for name in missing if name != "localize.__version__"]


def test_every_declared_name_says_what_it_takes_returns_and_raises() -> None:
    missing = {name: found for name, value in described().items() if (found := undescribed(value))}

    assert not missing
