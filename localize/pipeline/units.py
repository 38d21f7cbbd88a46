"""Take a training step apart: for each loss what the driver does for it, what that touches, and what it changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from localize.ir import (
    Call,
    Detach,
    Function,
    Plan,
    Pull,
    Statement,
    Update,
    Value,
    ZeroGrad,
    facts,
)
from localize.runtime.model import LocalModel
from localize.torch_names import RUNNING_NORMS


@dataclass(frozen=True)
class Unit:
    """What the driver does for one loss, which no rank does in parts."""

    loss: int
    function: str
    """That computes it, and differentiates it."""
    statements: tuple[Statement, ...]
    makes: frozenset[str]
    """Values of the driver."""
    reads: frozenset[str]
    touched: frozenset[str]
    """Names of the parameters and buffers of which something is read."""
    trained: frozenset[str]
    moved: frozenset[str]
    """Names of the buffers that its forward writes."""
    functions: frozenset[str]
    """Names of the functions that it calls."""


def units(local: LocalModel) -> tuple[Unit, ...]:
    """Return the units of a step, in the order in which it computes its losses."""
    functions = {function.name: function for function in local.program.functions}
    tensors = Tensors(local)
    found: list[list[Statement]] = []
    pending: list[Statement] = []
    for statement in local.program.functions[-1].statements:
        if isinstance(statement, Update | ZeroGrad) and statement.loss is not None:
            found[-1].append(statement)
        elif isinstance(statement, Call | Detach):
            pending.append(statement)
            if "loss" in (statement.role if isinstance(statement.role, tuple) else (statement.role,)):
                found.append(pending)
                pending = []
    assert not pending, "a driver ends with a loss, updates and pulls"
    return tuple(_unit(number, statements, local.plan, functions, tensors) for number, statements in enumerate(found))


def _unit(
    number: int,
    statements: list[Statement],
    plan: Plan,
    functions: Mapping[str, Function],
    tensors: Tensors,
) -> Unit:
    calls = [statement for statement in statements if isinstance(statement, Call)]
    training = calls[-1]
    first = training.args[0]
    name = training.target if training.kind == "local" else first.name
    paths = list(_paths(statements, functions))
    touched = frozenset(one for path in paths for one in tensors.inside(path))
    called = set(_called(statements, functions))
    moved = {one for path in paths for one in tensors.moved(path)}
    for segment in plan.segments.segments:
        if segment.name in called:
            writes = {f"trunk.{name}" for node in segment.graph.nodes for name in facts(node).writes}
            moved |= writes & tensors.names
    return Unit(
        number,
        name,
        tuple(statements),
        frozenset(one for statement in statements for one in made(statement)),
        frozenset(one for statement in statements for one in read(statement)),
        touched | moved,
        frozenset(plan.reach(plan.losses[number])),
        frozenset(moved),
        frozenset(called),
    )


def made(statement: Statement) -> tuple[str, ...]:
    """Return the names that a statement binds."""
    result = getattr(statement, "result", None)
    return result if isinstance(result, tuple) else () if result is None else (result,)


def read(statement: Statement) -> Iterator[str]:
    """Yield the names that a statement of a driver reads."""
    if isinstance(statement, Detach):
        yield statement.value
    elif isinstance(statement, Call):
        yield from (value.name for value in _values((statement.args, statement.kwargs)))


def _values(argument: Any) -> Iterator[Value]:
    if isinstance(argument, Value):
        yield argument
    elif isinstance(argument, tuple | list):
        for item in argument:
            yield from _values(item)


def reached_functions(statements: tuple[Statement, ...], functions: Mapping[str, Function]) -> set[str]:
    """Return the names of the functions that statements call, by way of others too."""
    return set(_called(statements, functions))


def _called(statements: Any, functions: Mapping[str, Function]) -> Iterator[str]:
    for statement in statements:
        if isinstance(statement, Call):
            named = {statement.target} if statement.kind == "local" else set()
            named |= {value.name for value in _values(statement.args)}
            for name in named & functions.keys():
                yield name
                yield from _called(functions[name].statements, functions)


def _paths(statements: Any, functions: Mapping[str, Function]) -> Iterator[str]:
    """Yield what statements read of model and heads, as written: ``trunk.layer1[0].conv1``, ``heads.head_0``."""
    for statement in statements:
        if isinstance(statement, Pull):
            yield from (statement.copy, statement.source)
        if not isinstance(statement, Call):
            continue
        if statement.kind in ("module", "attribute"):
            yield statement.target
        if statement.kind == "local":
            yield from _paths(functions[statement.target].statements, functions)
        for value in _values(statement.args):
            if value.name.startswith(("trunk.", "heads.")):
                yield value.name
            elif value.name in functions:
                yield from _paths(functions[value.name].statements, functions)


class Tensors:
    """Parameters and buffers of a local model by what the text calls the modules that hold them."""

    def __init__(self, local: LocalModel) -> None:
        self.roots = {"trunk": local.trunk, "heads": local.heads, "getattr": getattr, "__builtins__": {}}
        self._named: dict[int, list[str]] = {}
        for named in (local.named_parameters, local.named_buffers):
            for name, tensor in named(remove_duplicate=False):
                self._named.setdefault(id(tensor), []).append(name)
        self.names = frozenset(name for names in self._named.values() for name in names)
        self._found: dict[str, Any] = {}

    def inside(self, path: str) -> Iterator[str]:
        """Yield the names of a tensor, or of all tensors inside of a module."""
        found = self._at(path)
        if isinstance(found, Tensor):
            yield from self._named.get(id(found), ())
        elif isinstance(found, nn.Module):
            for kept in (found.parameters(), found.buffers()):
                for tensor in kept:
                    yield from self._named[id(tensor)]

    def moved(self, path: str) -> Iterator[str]:
        """Yield the names of the running statistics inside of a module."""
        found = self._at(path)
        for module in found.modules() if isinstance(found, nn.Module) else ():
            if isinstance(module, RUNNING_NORMS) and module.track_running_stats:
                for tensor in module.buffers():
                    yield from self._named[id(tensor)]

    def _at(self, path: str) -> Any:
        if path not in self._found:
            self._found[path] = eval(path, self.roots)  # a path that localize has written itself
        return self._found[path]


def size_of(tensors: Mapping[str, torch.Tensor], names: Any) -> int:
    """Return the bytes of tensors, each counted once."""
    return sum({id(tensors[name]): tensors[name].nbytes for name in names}.values())
