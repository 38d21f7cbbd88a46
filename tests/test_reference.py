"""The reference has an entry for every declared name, with its arguments, results, shapes, units, errors and source."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import Tensor, nn

import localize
import localize.heads
from localize import losses
from localize.estimate.memory import Footprint
from localize.estimate.rivals import Row
from localize.estimate.speed import Speed
from localize.heads.branches import headed
from tests.interface import MODULES

ENTRY = re.compile(r"^::: (\S+)$", re.M)
REFERENCE = "\n".join(
    path.read_text(encoding="utf-8")
    for path in sorted((Path(__file__).parent.parent / "docs" / "reference").glob("*.md"))
)
OF_TORCH = {"forward", "extra_repr"}
"""Methods of a module; what goes in and comes out is said by the class."""
SHAPE = re.compile(r"\(\)|\(\.\.\.(?:,[^()]*)?\)|\((?:\d?[A-Z]'?(?:_\w+)?|\*\w*),[^()]*\)|\bscalars?\b")
"""Such as (N, C, H, W), (2N,), (N, ...), (...), ``()`` or the word scalar."""
AMOUNT = re.compile(r"bytes|memory|peak|resident|saved|moved|seconds|timeout")
"""In the name of a field that counts bytes or seconds."""
UNIT = re.compile(r"\b(bytes?|MiB|GiB|seconds?)\b", re.I)
SOURCE = re.compile(r"\b(19|20)\d\d\b")
"""The year of a paper."""
PLACE = re.compile(r"\b(eqs?|secs?|app|figs?|table|definition|code)\b", re.I)
"""Where in a paper a formula is, or that it is that of its code."""
WITHOUT_PLACE = {"squared_error", "goodness_gap", "squared_prediction_error"}
"""Losses whose equation in the paper has not been looked up."""
OF_NO_PAPER = {"ClassWeights", "FeatureMap", "GlobalAverage", "Chain", "Narrowed", "ClassShares"}
"""Parts of heads that are not from a paper."""


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


def takes_tensors(function: Callable[..., Any]) -> bool:
    """Return whether a tensor is among the arguments of a function, or in its result."""
    signature = inspect.signature(function)
    annotations = [*(parameter.annotation for parameter in signature.parameters.values()), signature.return_annotation]
    return any(re.search(r"\bTensor\b", str(annotation)) for annotation in annotations)


def unmeasured(kind: type) -> list[str]:
    """Return the fields of a dataclass that count bytes or seconds, or are tensors, without a unit or shape."""
    missing = []
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    for field, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        described = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        text = f"{ast.unparse(field)} {str(after.value.value) if described else ''} {inspect.getdoc(kind)}"  # type: ignore[union-attr]
        if re.match(r"(int|float)\b", ast.unparse(field.annotation)) and AMOUNT.search(field.target.id):
            missing += [] if UNIT.search(text.replace("_", " ")) else [f"the unit of {field.target.id}"]
        if re.search(r"\bTensor\b", ast.unparse(field.annotation)) and not SHAPE.search(text):
            missing.append(f"the shape of {field.target.id}")
    return missing


def incomplete(value: Callable[..., Any]) -> list[str]:
    """Return what the docstring of a function or class lacks besides :func:`undescribed`: errors, shapes, units."""
    if inspect.isclass(value):
        return unmeasured(value) if dataclasses.is_dataclass(value) else []
    text = inspect.getdoc(value) or ""
    missing = ["a part Raises"] if inspect.isfunction(value) and raised(value) and "Raises:" not in text else []
    return [*missing, "a shape"] if takes_tensors(value) and not SHAPE.search(text) else missing


def modules_of_heads() -> Iterator[tuple[str, type[nn.Module]]]:
    """Yield the public modules in ``localize.heads``, each with the docstring of its file."""
    for info in pkgutil.iter_modules(localize.heads.__path__):
        file = importlib.import_module(f"localize.heads.{info.name}")
        for name, value in vars(file).items():
            own = inspect.isclass(value) and value.__module__ == file.__name__ and name[0] != "_"
            if own and issubclass(value, nn.Module):
                yield file.__doc__ or "", value


def test_every_declared_name_has_an_entry_in_the_reference() -> None:
    entries = [resolved(name) for name in ENTRY.findall(REFERENCE)]
    there = entries + [member for entry in entries if isinstance(entry, ModuleType) for member in members(entry)]

    missing = [name for name, value in declared() if not any(value is one for one in there)]

    assert not [name for name in missing if name != "localize.__version__"]


def test_every_declared_name_says_what_it_takes_returns_and_raises() -> None:
    missing = {name: found for name, value in described().items() if (found := undescribed(value))}

    assert not missing


def _silent(x: Tensor) -> Tensor:
    """Return ``x`` (see above)."""
    if x.dim() > 4:
        raise ValueError
    raise TypeError("ValueError or TypeError")


@dataclasses.dataclass
class _Unmeasured:
    """What a step needs."""

    peak: int
    """At most."""
    features: Tensor
    """Of a layer."""
    peak_bytes: int
    seconds: float


def _shaped(x: Tensor) -> Tensor:
    """Return ``x``, (N, C)."""
    return x


@pytest.mark.parametrize(
    ("value", "missing"),
    [
        (_silent, ["a part Raises", "a shape"]),
        (_Unmeasured, ["the unit of peak", "the shape of features"]),
        (_shaped, []),
    ],
)
def test_missing_shapes_units_and_errors_are_found(value: Callable[..., Any], missing: list[str]) -> None:
    assert incomplete(value) == missing


@pytest.mark.parametrize("text", ["(N, C, H, W)", "(2N,)", "(N, ...)", "(...)", "()", "a scalar", "(Z, C_D)", "(*, D)"])
def test_shapes_are_recognised(text: str) -> None:
    assert SHAPE.search(f"Features {text} of a layer.")


@pytest.mark.parametrize("text", ["(see above)", "(DCL, eq. 5)", "(the first)", "(0..1)"])
def test_other_parentheses_are_not_shapes(text: str) -> None:
    assert not SHAPE.search(f"Features {text} of a layer.")


def test_every_declared_name_has_shapes_units_and_errors() -> None:
    more = {kind.__name__: kind for kind in (Footprint, Row, Speed)} | {"headed": headed}
    missing = {name: found for name, value in (described() | more).items() if (found := incomplete(value))}

    assert not missing


def test_every_loss_names_its_paper_and_the_place_in_it() -> None:
    own = {
        name: inspect.getdoc(value) or ""
        for name, value in vars(losses).items()
        if name[0] != "_" and inspect.isfunction(value) and value.__module__ == losses.__name__ and takes_tensors(value)
    }

    assert len(own) > 10
    assert not [name for name, text in own.items() if "Source:" not in text or not SOURCE.search(text)]
    assert {name for name, text in own.items() if not PLACE.search(text.partition("Source:")[2])} <= WITHOUT_PLACE


def test_every_head_has_a_shape_and_a_source() -> None:
    heads = list(modules_of_heads())

    assert len(heads) > 20
    assert not [head.__name__ for _, head in heads if not SHAPE.search(head.__doc__ or "")]
    assert {head.__name__ for about, head in heads if not SOURCE.search(f"{about} {head.__doc__}")} == OF_NO_PAPER
