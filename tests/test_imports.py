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

FLOORS = (
    {"errors", "losses", "ops", "reserved", "text"},
    {"ir", "options", "devices", "files", "zoo"},
    {"graph"},
    {"cutting"},
    {"heads"},
    {"methods"},
    {"passes"},
    {"recipes"},
    {"codegen", "runtime", "auditor"},
    {"compiler", "inference"},
    {"build"},
    {"estimate", "train"},
    {"pictures"},
    {"folder"},
    {"check", "report"},
    {"cli"},
    {"__main__", "__init__"},
)
"""From the ground up: a room imports only what lies below it, never what stands beside it."""

NARROWER = {
    "auditor": {"errors", "ir"},
    "codegen": {"ir", "reserved"},
    "zoo": {"errors"},
    "runtime": {"errors", "graph", "ir"},
    "methods": {"errors", "ir", "options", "graph", "cutting", "heads"},
    "inference": {"errors", "files", "ir", "runtime"},
}
"""Rooms that may know less than their floor would allow: what checks shares nothing with what it checks."""


def allowed(part: str) -> set[str]:
    floor = next(i for i, rooms in enumerate(FLOORS) if part in rooms)
    return NARROWER.get(part, set().union(*FLOORS[:floor]))


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
def test_a_room_imports_only_what_lies_below_it(path: Path) -> None:
    room = part_of(path)

    wrong = sorted(name for name in imports(path) if name.split(".")[1] not in {*allowed(room), room, "__version__"})

    assert not wrong, f"{room} may import {sorted(allowed(room))}"


def test_few_files_lie_beside_the_rooms() -> None:
    loose = sorted(path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("__"))

    assert len(loose) <= 12, loose


def test_the_tests_mirror_the_package() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").is_file()}
    tested = {path.name for path in Path(__file__).parent.iterdir() if path.is_dir() and path.name[0] not in "._"}

    assert tested - {"corpus"} == rooms


def test_methods_do_not_import_each_other() -> None:
    for path in (PACKAGE / "methods").glob("*.py"):
        if path.stem not in ("__init__", "base"):
            found = {name.split(".")[2] for name in imports(path) if name.startswith("localize.methods.")}
            assert found <= {"base"}, path.name


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
