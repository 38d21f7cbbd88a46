"""Write the recorded graph of a segment down as operations, to be compared with the text of its function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from localize.auditor.names import Vocabulary
from localize.auditor.operations import Attr, Group, Operation, constant
from localize.ir import Plan, Segment, facts


@dataclass(frozen=True)
class Wanted:
    """What a function of the text is to do: operations in order, and what it returns."""

    inputs: tuple[Operation, ...]
    operations: tuple[Operation, ...]
    returned: Any
    attributes: frozenset[str] = frozenset()
    """Attributes of the model that it may read."""


def segment_operations(segment: Segment, plan: Plan, words: Vocabulary) -> Wanted:
    """Return the operations of a segment's recorded graph; modules with a declared feedback are their blocks."""
    return _Recorded(plan, words).run(segment.graph)


class _Recorded:
    def __init__(self, plan: Plan, words: Vocabulary) -> None:
        self.words = words
        self.replaced = dict(plan.feedback)
        self.values: dict[fx.Node, Any] = {}
        self.operations: list[Operation] = []
        self.attributes: set[str] = set()

    def run(self, graph: fx.Graph) -> Wanted:
        """Go through a graph."""
        inputs: list[Operation] = []
        returned: Any = None
        for node in graph.nodes:
            if node.op == "placeholder":
                self.values[node] = Operation("input", node.name)
                inputs.append(self.values[node])
            elif node.op == "output":
                returned = node.args[0]
            else:
                self.values[node] = self._value_of(node)
        results = returned if isinstance(returned, tuple | list) else (returned,)
        values = tuple(self._argument(result) for result in results)
        result = values[0] if len(values) == 1 else Group("tuple", values)
        return Wanted(tuple(inputs), tuple(self.operations), result, frozenset(self.attributes))

    def _value_of(self, node: fx.Node) -> Any:
        if _is_mode(node):
            return Group("mode", tuple(self._argument(arg) for arg in node.args[1:])) if node.op != "get_attr" else None
        if node.op == "get_attr":
            return self._attribute(f"trunk.{node.target}")
        args = tuple(self._argument(arg) for arg in node.args)
        kwargs = tuple(sorted((key, self._argument(value)) for key, value in node.kwargs.items()))
        if node.op == "call_module":
            return self._module(str(node.target), args, kwargs)
        if node.op == "call_method":
            return self._made("method", str(node.target), args, kwargs)
        if node.target is getattr:
            return self._made("property", str(node.args[1]), args[:1])
        if getattr(node.target, "__module__", None) == "_operator":
            return self._made("operator", getattr(node.target, "__name__", ""), args)
        return self._made("function", self.words.functions.add(node.target), args, kwargs)

    def _module(self, path: str, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]) -> Operation:
        if path not in self.replaced:
            return self._made("module", self.words.model.module(f"trunk.{path}"), args, kwargs)
        module = self.words.model.roots["trunk"].get_submodule(path)
        weights = [self._attribute(f"trunk.{path}.{k}") for k in ("weight", "bias") if getattr(module, k) is not None]
        return self._made("module", self.words.model.module(f"heads.{self.replaced[path]}"), (args[0], *weights))

    def _attribute(self, path: str) -> Attr:
        one = self.words.model.attribute(path)
        self.attributes.add(one)
        return Attr(one)

    def _made(self, kind: Any, target: str, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...] = ()) -> Any:
        made = Operation(kind, target, args, kwargs)
        self.operations.append(made)
        return made

    def _argument(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return self.values[value]
        if isinstance(value, tuple | list):
            return Group("tuple" if isinstance(value, tuple) else "list", tuple(self._argument(v) for v in value))
        if isinstance(value, dict):
            parts = tuple(part for k, v in value.items() for part in (constant(k), self._argument(v)))
            return Group("dict", parts)
        if isinstance(value, slice):
            return Group("slice", tuple(self._argument(part) for part in (value.start, value.stop, value.step)))
        return constant(value)


def _is_mode(node: fx.Node) -> bool:
    """Tell whether a node is a choice by mode, or the mode that it reads."""
    chooses = node.op == "get_attr" or getattr(node.target, "__name__", "") == "by_mode"
    return chooses and facts(node).support
