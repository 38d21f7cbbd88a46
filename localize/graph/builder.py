"""Make an fx graph of a recording, and find the logits and the further outputs in it."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from localize import ops
from localize.graph.merge import BatchLinear, ByMode
from localize.graph.record import Record, Ref, map_items
from localize.graph.recordings import Recorded
from localize.ir import Side, dtype_of, facts, set_facts


class Builder:
    """Turn merged records into an fx graph; batch sizes, modes and devices become nodes."""

    def __init__(self, recorded: Recorded) -> None:
        self.recorded = recorded
        self.fx = fx.Graph()
        self.nodes: list[fx.Node] = []
        self.shared: dict[Any, fx.Node] = {}

    def graph(self) -> fx.Graph:
        """Return the graph, without operations that nothing uses."""
        columns = (self.recorded.records, self.recorded.folds, self.recorded.depends)
        for record, fold, depends in zip(*columns, strict=True):
            node = self._node(record)
            set_facts(
                node,
                shape=record.shape[1:] if record.shape is not None and fold == 1 else record.shape,
                dtype=record.dtype,
                batched=fold == 1,
                fold=fold,
                scope=record.scope,
                storage=record.storage,
                mutates=record.mutates,
                writes=record.writes,
                draws=record.random and record.kind != "call_module",
                differentiable=record.requires_grad,
                activates=record.activates,
                depends=depends,
                macs=record.macs,
                fvcore_flops=record.fvcore_flops,
            )
            self.nodes.append(node)
        _drop_unused(self.fx)
        self.fx.lint()
        return self.fx

    def _node(self, record: Record) -> fx.Node:
        args, kwargs = self._value(record.args), self._value(record.kwargs)
        if record.kind == "placeholder":
            return self.fx.placeholder(record.target)
        if record.kind == "output":
            return self.fx.output((args[0], {name: v for name, v in kwargs.items() if _is_side(v, args[0])}))
        if record.kind == "get_attr":
            return self._attribute(record.target)
        if record.kind == "property":
            return self.fx.call_function(getattr, (args[0], record.target))
        if record.kind == "reflected":
            return self.fx.call_function(record.target, (args[1], args[0]))
        return self.fx.create_node(record.kind, record.target, tuple(args), kwargs)

    def _attribute(self, path: str) -> fx.Node:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the graph has no owning module yet
            return self.fx.get_attr(path)

    def _value(self, value: Any) -> Any:
        if isinstance(value, Ref):
            return self.nodes[value.index]
        if isinstance(value, ByMode):
            train, evaluated = self._value(value.train), self._value(value.eval)
            return self._support("training", ops.by_mode, (self._training(), train, evaluated))
        if isinstance(value, BatchLinear):
            return self._batch(value)
        if isinstance(value, torch.device):
            return self._once("device", lambda: self._support("device", getattr, (self.nodes[0], "device")))
        return map_items(value, self._value)

    def _training(self) -> fx.Node:
        def make() -> fx.Node:
            node = self._attribute("training")
            set_facts(node, support=True, depends=False)
            return node

        return self._once("training", make)

    def _batch(self, value: BatchLinear) -> fx.Node:
        node = self._once("batch", lambda: self._support("batch", "size", (self.nodes[0], 0)))
        if value.scale != 1:
            node = self._once(("scale", value.scale), lambda: self._support("n", operator.mul, (node, value.scale)))
        if value.offset:
            scaled = node
            node = self._once(value, lambda: self._support("n", operator.add, (scaled, value.offset)))
        return node

    def _support(self, name: str, target: Any, args: tuple) -> fx.Node:
        """Make a node whose value is not a tensor: computed again in every segment that needs it."""
        kind = "call_method" if isinstance(target, str) else "call_function"
        node = self.fx.create_node(kind, target, args, name=name)
        set_facts(node, support=True, depends=False)
        return node

    def _once(self, key: Any, make: Callable[[], fx.Node]) -> fx.Node:
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]


def _drop_unused(graph: fx.Graph, left_out: Collection[fx.Node] = ()) -> None:
    """Remove operations whose value, and whose writes, nothing that is kept reads.

    Kept are writes into the model's own tensors, and random draws, but for those ``left_out``.
    """
    read_later: set[int] = set()
    for node in reversed(list(graph.nodes)):
        writes_what_is_read = any(storage in read_later for storage in facts(node).mutates)
        acts = is_effect(node) and node not in left_out
        if node.op in ("output", "placeholder") or node.users or writes_what_is_read or acts:
            storages = (facts(parent).storage for parent in node.all_input_nodes)
            read_later.update(storage for storage in storages if storage is not None)
        else:
            graph.erase_node(node)


def is_effect(node: fx.Node) -> bool:
    """Tell whether a node changes the state of the model or of the random generator, whoever reads its value."""
    return bool(facts(node).writes or facts(node).draws)


def ancestors(nodes: Iterable[fx.Node], without: Collection[fx.Node] = ()) -> set[fx.Node]:
    """Return nodes and everything that they are made of, back to the nodes that are left out."""
    found: set[fx.Node] = set()
    front = list(nodes)
    while front:
        node = front.pop()
        if node not in found and node not in without:
            found.add(node)
            front += node.all_input_nodes
    return found


def _of_others(whole: fx.Graph, outputs: Sequence[fx.Node]) -> set[fx.Node]:
    """Return the effects that belong to other outputs than these: what makes those outputs alone takes part in them."""
    logits, further = result_nodes(whole)
    others = [value for value in (logits, *further.values()) if value not in outputs]
    alone = ancestors(others) - ancestors(outputs) if others else set()
    return {node for node in whole.nodes if is_effect(node) and not alone.isdisjoint(ancestors([node]))}


def result_nodes(whole: fx.Graph) -> tuple[fx.Node, dict[str, fx.Node]]:
    return next(node for node in whole.nodes if node.op == "output").args[0]


WEIGHTS = {"aux_logits": 0.4, "aux_logits1": 0.3, "aux_logits2": 0.3, "aux": 0.5}
"""Weight of the cross-entropy on a further output of this name: those of Inception v3, GoogLeNet (Szegedy et al. 2014,
sec. 5) and torchvision's segmentation reference. Any other name has weight 1."""


def _is_side(value: fx.Node, logits: fx.Node) -> bool:
    """Tell whether a further output is class scores as the logits are."""
    alike = all(getattr(facts(value), key) == getattr(facts(logits), key) for key in ("shape", "dtype", "batched"))
    return alike and value is not logits and dtype_of(value).is_floating_point


def returning(whole: fx.Graph, *outputs: fx.Node) -> fx.Graph:
    """Return a copy of the graph with these outputs and what they need; nodes keep their names."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in whole.nodes:
        if node.op != "output":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    results = tuple(copies[output] for output in outputs)
    returned = graph.output(results[0] if len(results) == 1 else results)
    returned.meta = dict(next(iter(whole.find_nodes(op="output"))).meta)
    _drop_unused(graph, {copies[node] for node in _of_others(whole, outputs)})
    graph.lint()
    return graph


def side_outputs(whole: fx.Graph, graph: fx.Graph) -> Iterator[Side]:
    """Yield the further outputs in the order of the forward, each with the nodes that the logits do not need."""
    logits, others = result_nodes(whole)
    needed = {node.name for node in graph.nodes}
    order = {node: i for i, node in enumerate(whole.nodes)}
    for name, value in sorted(others.items(), key=lambda item: order[item[1]]):
        own = returning(whole, logits, value)
        nodes = tuple(node.name for node in own.nodes if node.name not in needed)
        yield Side(name, value.name, nodes, WEIGHTS.get(name, 1.0))
