"""What reading a text gives: values, events, and what could not be followed."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import networkx
from torch import nn

LARGEST = 4096
"""Parts that a tuple, list or dict may have, with those of its parts."""
MOST_PARTS = 2**17
"""Parts of values that operations may read, all together."""
MOST_NODES = 20000
"""Most values a text may create: each in-place write creates new views of everything it writes."""
TOO_LARGE = "values of far more parts than a step has"

# ---------------------------------------------------------------------------------------------------- what is read


@dataclass(frozen=True)
class Problem:
    """Something in the text that cannot be followed."""

    line: int
    what: str


@dataclass
class Node:
    """One value: the operation that makes it, and what it reads.

    ``flows`` says that a gradient of this value reaches what it reads. ``args`` and ``kwargs`` are as written, with
    :class:`Ref` for tensors and :class:`Const` for constants.
    """

    index: int
    kind: Literal[
        "input",
        "parameter",
        "buffer",
        "module",
        "function",
        "method",
        "operator",
        "item",
        "mode",
        "write",
        "detach",
        "share",
    ]
    target: str
    line: int
    scope: str
    operands: tuple[int, ...] = ()
    flows: bool = True
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()
    name: str = ""
    """What it was called first."""
    places: list[str] = field(default_factory=list)
    """Every name it was given: ``h_0 (step_0, line 21)``."""
    recomputed: bool = False
    """The module that makes it is run again in the backward."""


@dataclass(frozen=True)
class Event:
    """Something the step does, in order: a function runs and returns, backward, update, zero_grad, pull.

    ``name`` is the function, or the copy that is pulled towards ``source`` with ``decay``; ``index`` the number in
    ``optimizer[index]``; ``inputs`` and ``outputs`` are nodes (None for what is not a tensor); ``returned`` is the
    line of the return.
    """

    kind: Literal["enter", "leave", "backward", "update", "zero_grad", "pull"]
    line: int
    scope: str
    name: str = ""
    index: int | None = None
    inputs: tuple[int | None, ...] = ()
    outputs: tuple[int | None, ...] = ()
    returned: int = 0
    recomputed: bool = False
    """The function is run again in the backward."""
    without_gradient: bool = False
    """Nothing in the function is differentiated."""
    scaled: bool = False
    """Of a backward: that of ``optimizer.scale(loss)``."""
    source: str = ""
    decay: float = 0.0


@dataclass
class Reading:
    """Everything that was read: values, events in order, what the driver returns, and what could not be followed."""

    lines: list[str]
    nodes: list[Node] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    unread: list[Problem] = field(default_factory=list)
    """Names that are assigned and never read."""
    results: Any = None
    calls: dict[str, list[str]] = field(default_factory=dict)
    """Paths of the modules that each function calls, once for every call (of one run of the function)."""
    flow: networkx.DiGraph = field(default_factory=networkx.DiGraph)
    """Edges from what is read to what is made of it, where a gradient flows back."""

    def quote(self, line: int) -> str:
        """Return ``line 12: source``."""
        text = self.lines[line - 1].strip() if 0 < line <= len(self.lines) else ""
        return f"line {line}: {text if len(text) <= 120 else text[:117] + '...'}"

    def parameters(self, index: int) -> frozenset[str]:
        """Return the names of the parameters that a gradient of this value reaches."""
        reached = networkx.ancestors(self.flow, index) | {index}
        return frozenset(self.nodes[i].target for i in reached if self.nodes[i].kind == "parameter")

    def path(self, parameter: str, index: int) -> str:
        """Describe the shortest way from a parameter to a value, by the named values between them."""
        source = next((n.index for n in self.nodes if n.kind == "parameter" and n.target == parameter), None)
        if source is None or not networkx.has_path(self.flow, source, index):
            return f"{parameter} (no path)"
        steps = [self.nodes[i] for i in networkx.shortest_path(self.flow, source, index)[1:]]
        named = [step for step in steps if step.name or step.index == index]
        told = [" = ".join(n.places) or f"{n.target} ({n.scope}, line {n.line})" for n in named]
        if len(told) > 8:
            told = [*told[:3], "...", *told[-5:]]
        return " -> ".join([parameter, *told])


# ------------------------------------------------------------------------------------------------- abstract values


@dataclass(eq=False)
class Ref:
    """A tensor, as a name of the text refers to it. ``views`` are all references to the same memory."""

    node: int
    views: list[Ref] = field(default_factory=list)


@dataclass(frozen=True)
class Const:
    """A Python constant."""

    value: Any


@dataclass(frozen=True)
class Path:
    """A module of the model: ``trunk.layer1.0``."""

    path: str
    module: nn.Module


@dataclass(frozen=True)
class Dotted:
    """Something importable: ``torch.flatten``."""

    name: str
    thing: Any


@dataclass(frozen=True)
class Local:
    """A function of the text."""

    definition: ast.FunctionDef


@dataclass(frozen=True)
class Bound:
    """A method of a tensor or of the optimizer, not called yet."""

    owner: Any
    method: str


@dataclass(frozen=True)
class Optimizer:
    """``optimizer``, or ``optimizer[index]``."""

    index: int | None = None


@dataclass(frozen=True)
class Forgotten:
    """What a deleted name stands for."""


FORGOTTEN = Forgotten()


class Sizes:
    """How many parts values have that are made of others: with names, a short text can write down any number."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[Any, int]] = {}
        self.read = 0

    def _of(self, parts: Iterable[Any]) -> int:
        return sum(self.known[id(part)][1] if id(part) in self.known else 1 for part in parts)

    def may_read(self, parts: Iterable[Any]) -> bool:
        """Note what an operation reads; tell whether all have read at most :data:`MOST_PARTS` so far."""
        self.read += self._of(parts)
        return self.read <= MOST_PARTS

    def fits(self, value: Any, parts: Iterable[Any]) -> bool:
        """Note a value and what it is made of; tell whether it has at most :data:`LARGEST` parts."""
        size = 1 + self._of(parts)
        self.known[id(value)] = (value, size)
        return size <= LARGEST


class Unreadable(Exception):
    """Raised where an expression cannot be followed; becomes a problem of its statement."""

    def __init__(self, node: ast.AST, what: str) -> None:
        self.line = getattr(node, "lineno", 0)
        self.what = what
        super().__init__(what)
