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
    {"errors", "text"},
    {"torch_names", "outside"},
    {"losses", "ops", "reserved"},
    {"ir", "options", "files", "zoo"},
    {"graph"},
    {"cutting"},
    {"heads"},
    {"methods"},
    {"passes"},
    {"recipes"},
    {"codegen", "runtime", "auditor"},
    {"compiler", "inference"},
    {"build"},
    {"estimate", "testing"},
    {"pipeline"},
    {"train"},
    {"analysis", "pictures"},
    {"folder"},
    {"check", "report"},
    {"cli"},
    {"__main__", "__init__"},
)
"""From the ground up: a room imports only what lies below it, never what stands beside it."""

NARROWER = {
    "auditor": {"errors", "ir"},
    "codegen": {"ir", "reserved", "torch_names"},
    "zoo": {"errors", "outside"},
    "runtime": {"errors", "graph", "ir", "reserved", "ops", "torch_names"},
    "methods": {"errors", "outside", "ir", "options", "graph", "cutting", "heads"},
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


TORCHS = {
    *("_AdaptiveAvgPoolNd", "_AvgPoolNd", "_BatchNorm", "_ConvNd", "_DropoutNd", "_MaxPoolNd", "_NormBase"),
    *(
        "_buffers",
        "_cdata",
        "_modules",
        "_non_persistent_buffers_set",
        "_orig_mod",
        "_parameters",
        "_schema",
        "_version",
    ),
    *("_foreach_copy_", "_foreach_div_", "_foreach_lerp_", "_foreach_norm"),
    *("_C", "_forward_hooks", "_forward_pre_hooks", "_is_param", "_set_pg_timeout", "_torchdynamo_inline"),
    "_disable_current_modes",
    *("_inductor", "_python_dispatch", "_pytree", "_subclasses"),
}
"""Names of torch that its documentation does not promise. Only torch_names reads them, and has what stands in for each;
the auditor, which shares nothing with what it checks, has its own way to them."""

OTHERS = {"_getframe", "_asdict", "_fields", "_reset_parameters"}
"""Documented names of Python, and what modules of torch and of users call the method that draws their parameters."""


def private_names(path: Path) -> Iterator[tuple[int, str]]:
    """Yield every name with an underscore that a file reads or imports, and does not define, with its line."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own = {name for node in ast.walk(tree) for name in _attributes(node)}
    for node in ast.walk(tree):
        yield from ((node.lineno, name) for name in _reads(node) if re.match(r"_(?!_)", name) and name not in own)


def _attributes(node: ast.AST) -> Iterator[str]:
    """Yield the attributes that objects of a file's own classes have."""
    if isinstance(node, ast.ClassDef):
        yield from (item.name for item in node.body if isinstance(item, ast.FunctionDef | ast.ClassDef))
        targets = [item.target for item in node.body if isinstance(item, ast.AnnAssign)]
        targets += [target for item in node.body if isinstance(item, ast.Assign) for target in item.targets]
        yield from (target.id for target in targets if isinstance(target, ast.Name))
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        yield from (node.attr for owner in [node.value] if isinstance(owner, ast.Name) and owner.id in ("self", "cls"))


def _reads(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Attribute):
        yield node.attr
    elif isinstance(node, ast.ImportFrom):
        yield from (node.module or "").split(".")
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.Import):
        yield from (part for alias in node.names for part in alias.name.split("."))
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
        yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_private_name_is_read_from_another_file(path: Path) -> None:
    room = part_of(path)
    mine = {*OTHERS, *(TORCHS if room in ("torch_names", "auditor") else ())}

    wrong = [(line, name) for line, name in private_names(path) if name not in mine]

    assert not wrong, "give it a public name where it is defined; what is torch's gets one in localize/torch_names.py"


def test_every_listed_name_of_torch_is_read() -> None:
    read = {name for _, name in private_names(PACKAGE / "torch_names.py")}

    assert read == TORCHS


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

    ``backprop`` is the default, and the control; ``checkpoint`` is also what torch calls its function, and
    a hook of torch's has another's name in its own.
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
            name = name.replace("post_accumulate_grad", "")
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
