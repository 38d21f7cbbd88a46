"""Who may import whom, and where a method may be called by its name: read from the source, not from what happens."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import localize
from localize import methods, recipes

PACKAGE = Path(localize.__file__).parent
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "_recipes" not in path.parts)

STAGES = {"errors", "ir"}
GRAPH = STAGES | {
    "inputs",
    "ops",
    "shapes",
    "twin",
    "cost",
    "record",
    "trace",
    "operations",
    "features",
    "places",
    "layers",
    "cuts",
    "split",
}
ALLOWED = {
    "errors": set(),
    "files": STAGES,
    "devices": STAGES,
    "ir": {"errors"},
    "options": STAGES,
    "inputs": STAGES,
    "recomputation": set(),
    "ops": STAGES | {"recomputation"},
    "shapes": set(),
    "twin": STAGES,
    "cost": GRAPH,
    "record": GRAPH,
    "trace": GRAPH,
    "operations": GRAPH,
    "features": GRAPH,
    "places": GRAPH,
    "layers": GRAPH,
    "cuts": GRAPH,
    "split": GRAPH,
    "tied": STAGES,
    "zoo": STAGES | {"zoo"},
    "heads": GRAPH | {"heads", "options"},
    "losses": set(),
    "schedule": STAGES | {"losses", "options"},
    "lower": STAGES,
    "emit": STAGES,
    "runtime": STAGES | {"inputs"},
    "inference": STAGES | {"files", "runtime"},
    "auditor": STAGES | {"auditor"},
    "methods": GRAPH | {"heads", "methods", "options"},
    "svg": set(),
    "draw": STAGES | {"svg"},
    "draw_memory": {"memory", "svg"},
    "compose": GRAPH | {"heads"},
    "sides": GRAPH | {"heads"},
    "dense": STAGES | {"heads"},
    "recipes": STAGES | {"compose", "methods", "schedule", "train", "zoo"},
    "compiler": GRAPH
    | {"auditor", "compose", "dense", "emit", "heads", "lower", "methods", "recipes", "runtime", "schedule"}
    | {"sides", "tied"},
    "memory": STAGES | {"inputs", "runtime", "twin"},
    "train": STAGES | {"files", "compiled", "compiler", "devices", "inference", "recipes", "runtime", "train", "zoo"},
    "folder": STAGES | {"files", "auditor", "compiler", "draw", "recipes", "runtime", "zoo"},
    "capture": set(),
    "compiled": STAGES | {"capture", "runtime"},
    "timing": STAGES | {"capture", "memory", "runtime"},
    "compare": GRAPH
    | {"compiled", "devices", "emit", "folder", "lower", "memory", "methods", "recipes", "runtime", "timing"},
    "planner": GRAPH | {"compiler", "devices", "folder", "memory", "methods", "recipes", "timing"},
    "report": STAGES
    | {"compare", "draw_memory", "folder", "memory", "methods", "recipes"}
    | {"report", "svg", "train"},
    "check": GRAPH | {"check", "auditor", "compiler", "folder", "methods", "runtime", "zoo"},
    "cli": None,
    "__main__": {"cli"},
    "__init__": None,
}
"""For every part, the parts that it may import; None: any. ``train.config`` alone is below ``recipes``."""


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Yield every module of this package that a file imports, in functions too, but not for type checkers."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "localize" and "." in name)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_part_imports_only_what_lies_below_it(path: Path) -> None:
    part = part_of(path)
    allowed = ALLOWED[part]
    if allowed is not None:
        wrong = sorted(name for name in imports(path) if name.split(".")[1] not in allowed | {"__version__"})
        assert not wrong, f"{part} may import {sorted(allowed)}"


def test_methods_do_not_import_each_other() -> None:
    for path in (PACKAGE / "methods").glob("*.py"):
        if path.stem not in ("__init__", "base"):
            found = {name.split(".")[2] for name in imports(path) if name.startswith("localize.methods.")}
            assert found <= {"base"}, path.name


def test_recipes_import_only_the_settings_of_the_trainer() -> None:
    found = {name for name in imports(PACKAGE / "recipes.py") if name.startswith("localize.train")}
    assert all(name.startswith("localize.recipes.settings.") for name in found)
    assert not set(imports(PACKAGE / "train" / "config.py")) - {
        f"localize.errors.{name}" for name in ("LocalizeError", "OptionError", "did_you_mean")
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_method_is_called_by_its_name_outside_of_methods(path: Path) -> None:
    """Docstrings and comments may speak of a method; code may not.

    ``backprop`` is the default, and the control; ``checkpoint`` is also what torch calls its function.
    """
    if part_of(path) == "methods":
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    words: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            words += re.findall(r"[a-z0-9_]+", node.value.lower())
        elif isinstance(node, ast.Name | ast.Attribute | ast.FunctionDef | ast.ClassDef | ast.alias):
            name = getattr(node, "id", None) or getattr(node, "attr", None) or node.name  # type: ignore[union-attr]
            words += [name.lower(), *name.lower().split("_")]
    named = set(words) & (set(methods.names()) - {"backprop", "checkpoint"})
    assert not named


@pytest.mark.parametrize("name", methods.names())
def test_every_method_has_a_reference_a_recipe_and_a_test(name: str) -> None:
    method = methods.get(name)
    assert re.search(r"\b(19|20)\d\d\b", method.reference)
    assert isinstance(method.deviations, tuple)
    assert name in recipes.names()
    tests = Path(__file__).parent
    assert any(name in path.read_text(encoding="utf-8") for path in tests.rglob("test_*.py") if path != Path(__file__))
