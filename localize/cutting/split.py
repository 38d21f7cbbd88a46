"""Split a recorded graph at its cuts into segments over the same parameters.

What depends on the input belongs to the segment in which it is computed. What does not (parameters, constants made from
them, batch sizes, modes) is computed again in every segment that needs it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import Any

from torch import fx

from localize.errors import Advice, TiedWeightsError
from localize.graph.operations import parameters_of
from localize.ir import Cut, Layout, Segment, Segments, Side, Tied, Trunk, facts, set_facts


def split(layout: Layout, *, shared: bool = False) -> Segments:
    """Split the trunk at the cuts of ``layout``.

    Args:
        layout: the trunk, and where it is cut.
        shared: parameters may be used on both sides of a cut: each loss whose segments use them trains them.

    Raises:
        TiedWeightsError: a parameter is used on both sides of a cut, and may not be.
    """
    trunk = layout.trunk
    segments = tuple(_Splitter(layout).segments())
    tied = _tied(segments, trunk)
    if tied and not shared:
        raise _refusal(tied[0], segments, trunk)
    used = {name for segment in segments for name in segment.parameters}
    unused = tuple(
        name for name, p in trunk.model.named_parameters() if p.requires_grad and f"trunk.{name}" not in used
    )
    entries: dict[int, list[Tied]] = {}
    for entry in tied:
        for index in entry.segments:
            entries.setdefault(index, []).append(entry)
    segments = tuple(_without(segment, entries.get(segment.index, ())) for segment in segments)
    return Segments(layout, segments, tuple(f"trunk.{name}" for name in unused), tied)


class _Recorded:
    """The nodes of one graph, in order, and what is asked about them for every piece that is copied."""

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = tuple(graph.nodes)
        self.by_name = {node.name: node for node in self.nodes}
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self.output = next(node for node in self.nodes if node.op == "output")
        self.writes: dict[int, list[fx.Node]] = {}
        """For every storage, the nodes that write it."""
        for node in self.nodes:
            for storage in facts(node).mutates:
                self.writes.setdefault(storage, []).append(node)
        self.of_inputs: set[fx.Node] = set()
        """The values that depend on an input of the model."""
        for node in self.nodes:
            parents = (parent for parent in node.all_input_nodes if facts(parent).depends)
            if node.op == "placeholder" or any(parent in self.of_inputs for parent in parents):
                self.of_inputs.add(node)

    def number(self, name: str) -> int:
        """Return how many nodes come before the one of this name."""
        return self.order[self.by_name[name]]

    def is_chance(self, node: fx.Node) -> bool:
        """Tell whether a value depends on no input of the model, but on random numbers."""
        return facts(node).depends and node not in self.of_inputs


class Pieces:
    """The pieces of one recorded graph, each from one cut to another: the graph is looked through once for all."""

    def __init__(self, trunk: Trunk) -> None:
        self.trunk = trunk
        self.recorded = _Recorded(trunk.graph)

    @cached_property
    def _whole(self) -> _Recorded:
        """The graph with what makes the further outputs."""
        return _Recorded(self.trunk.whole) if self.trunk.whole else self.recorded

    def between(self, start: Cut | None, stop: Cut | None, sides: Sequence[Side] = ()) -> fx.Graph:
        """Return the sub-graph from one cut to another: it takes the values of the first, returns those of the second.

        ``None`` stands for the input of the model, or its output. What makes ``sides`` is computed where it was
        recorded, and they are returned after the other values.
        """
        recorded = self._whole if sides else self.recorded
        copier = _Copier(recorded, start.values if start else _inputs(self.trunk), named=start is None)
        for node in self._inside(start, stop, sides):
            if facts(node).depends and node.op not in ("placeholder", "output"):
                copier.copy(node)
        ends = stop.values if stop else (self.recorded.output.args[0].name,)
        results = tuple(copier.returned(recorded.by_name[name]) for name in (*ends, *(side.value for side in sides)))
        copier.graph.output(results[0] if len(results) == 1 else results)
        copier.graph.lint()
        return copier.graph

    def _inside(self, start: Cut | None, stop: Cut | None, sides: Sequence[Side]) -> Sequence[fx.Node]:
        """Return the recorded nodes from one cut to another, and those that only ``sides`` need, in order."""
        first = self.recorded.number(start.after) + 1 if start else 0
        last = self.recorded.number(stop.after) + 1 if stop else len(self.recorded.nodes)
        inside = self.recorded.nodes[first:last]
        if not sides:
            return inside
        names = {node.name for node in inside} | {name for side in sides for name in side.nodes}
        return [node for node in self._whole.nodes if node.name in names]

    def alone(self, start: Cut | None, stop: Cut | None) -> fx.Graph | None:
        """Return the same sub-graph, from what heads read at a cut to what they read at the other.

        It is None where an input of the model is needed besides. What is made by chance and of parameters alone is made
        again.
        """
        if start is not None:
            named = ((name, self.recorded.by_name[name]) for name in start.values)
            start = replace(start, values=tuple(name for name, node in named if not self.recorded.is_chance(node)))
        graph = self.between(start, stop)
        first, *others = (node for node in graph.nodes if node.op == "placeholder")
        read = len(start.features) if start else 1
        output = next(node for node in graph.nodes if node.op == "output")
        if stop is not None and len(stop.features) < len(stop.values):
            results = tuple(output.args[0][: len(stop.features)])
            output.args = (results[0] if len(results) == 1 else results,)
            for node in reversed(list(graph.nodes)):
                if not (node.users or facts(node).mutates or node.op in ("placeholder", "output")):
                    graph.erase_node(node)
        for placeholder in [first, *others][read:]:
            if placeholder.users:
                return None
            graph.erase_node(placeholder)
        return graph


def _inputs(trunk: Trunk) -> tuple[str, ...]:
    return tuple(argument.name for argument in trunk.inputs)


class _Copier:
    """Copy nodes into a new graph whose placeholders are the values that enter; ``named``: by their own names."""

    def __init__(self, recorded: _Recorded, entering: Sequence[str], *, named: bool) -> None:
        self.recorded = recorded
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}
        for i, name in enumerate(entering):
            placeholder = self.graph.placeholder(name if named else "x" if len(entering) == 1 else f"x_{i}")
            node = recorded.by_name[name]
            placeholder.meta = dict(node.meta)
            self.copies[node] = self.viewed(placeholder, node, "flatten", 0, 1)
        self.first = next(node for node in self.graph.nodes if node.op == "placeholder")

    def viewed(self, value: fx.Node, recorded: fx.Node, method: str, *args: Any) -> fx.Node:
        """Return a value as it is recorded, or, where the batch is folded, a view that folds or unfolds it.

        A value (k N, T, C) crosses cuts as (N, k, T, C).
        """
        if facts(recorded).fold < 2:
            return value
        view = self.graph.call_method(method, (value, *args))
        view.meta = dict(recorded.meta)
        set_facts(view, macs=0, fvcore_flops=0, mutates=())
        return view

    def returned(self, recorded: fx.Node) -> fx.Node:
        """Return what a segment hands on for a recorded value."""
        return self.viewed(self.copies[recorded], recorded, "unflatten", 0, (-1, facts(recorded).fold))

    def copy(self, node: fx.Node) -> fx.Node:
        """Copy a node, and what it needs that does not depend on the input."""
        if node not in self.copies:
            self.copies[node] = self.graph.node_copy(node, lambda parent: self._input(parent, node))
        return self.copies[node]

    def _input(self, parent: fx.Node, user: fx.Node) -> fx.Node:
        if parent in self.copies and facts(parent).depends:
            return self.copies[parent]
        if parent.op == "placeholder" and facts(user).support:
            return self.first  # batch size and device are those of any value that enters
        made_anew = not facts(parent).depends or self.recorded.is_chance(parent)
        assert made_anew or parent in self.copies, f"{parent} is used after a cut that does not carry it"
        made = self.copy(parent)
        order = self.recorded.order
        storage = facts(parent).storage
        for write in self.recorded.writes.get(storage, ()) if storage is not None else ():
            if order[parent] < order[write] < order[user] and not facts(write).depends:
                self.copy(write)  # through a view, such as a[2:].zero_(), which nothing reads
        return made


class _Splitter:
    """Make the segments of one layout."""

    def __init__(self, layout: Layout) -> None:
        self.layout, self.trunk = layout, layout.trunk
        self.pieces = Pieces(layout.trunk)
        self.names = {id(p): f"trunk.{name}" for name, p in self.trunk.model.named_parameters()}
        """Names of parameters as ``named_parameters`` gives them: a tied one has its first name."""
        count = len(self.pieces.recorded.nodes)
        self.ends = [self._number(layer.end) if layer.end else count for layer in layout.layers]
        """How many nodes come before the end of each local layer."""

    def _number(self, cut: Cut) -> int:
        return self.pieces.recorded.number(cut.after)

    def segments(self) -> Iterator[Segment]:
        """Yield the segments, in order."""
        bounds: list[Cut | None] = [None, *self.layout.cuts, None]
        for index, (start, stop) in enumerate(pairwise(bounds)):
            yield self._segment(index, start, stop)

    def _segment(self, index: int, start: Cut | None, stop: Cut | None) -> Segment:
        graph = self.pieces.between(start, stop)
        owned = [(node, p) for node in graph.nodes for p in parameters_of(node, self.trunk.model).values()]
        distinct = {id(p): p for _, p in owned}
        reached = _reached(graph)
        trained = dict.fromkeys(id(p) for node, p in owned if node in reached and p.requires_grad)
        return Segment(
            index=index,
            graph=graph,
            inputs=start.values if start else _inputs(self.trunk),
            outputs=stop.values if stop else ("output",),
            features=stop.features if stop else (),
            parameters=tuple(self.names[key] for key in trained),
            size=sum(p.numel() for p in distinct.values()),
            layers=self._layers(start, stop),
            ends_at=stop.name if stop else "output",
            cloned=stop.cloned if stop else (),
        )

    def _layers(self, start: Cut | None, stop: Cut | None) -> tuple[int, int]:
        first = self._number(start) + 1 if start else 0
        last = self._number(stop) if stop else self.ends[-1]
        return bisect_left(self.ends, first), bisect_left(self.ends, last)


def _reached(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that a gradient reaches from what a graph returns: not what is after a ``detach`` alone."""
    writes: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        for storage in facts(node).mutates:
            writes.setdefault(storage, []).append(node)
    reached: set[fx.Node] = set()
    front = list(next(iter(graph.find_nodes(op="output"))).all_input_nodes)
    while front:
        node = front.pop()
        if node in reached or not facts(node).differentiable:
            continue
        reached.add(node)
        front += node.all_input_nodes
        lives_in = facts(node).storage
        front += writes.get(lives_in, ()) if lives_in is not None else ()
    return reached


def _tied(segments: tuple[Segment, ...], trunk: Trunk) -> tuple[Tied, ...]:
    """Return the parameters that several segments use, those of the same segments together."""
    users: dict[str, list[int]] = {}
    for segment in segments:
        for name in segment.parameters:
            users.setdefault(name, []).append(segment.index)
    sets: dict[tuple[int, ...], list[str]] = {}
    for name, indices in users.items():
        if len(indices) > 1:
            sets.setdefault(tuple(indices), []).append(name)
    sizes = {f"trunk.{name}": p.numel() for name, p in trunk.model.named_parameters()}
    return tuple(
        Tied(f"tied_{number}", tuple(names), sum(sizes[name] for name in names), indices)
        for number, (indices, names) in enumerate(sets.items())
    )


def _without(segment: Segment, tied: Sequence[Tied]) -> Segment:
    """Return the segment without the parameters that it shares with others, which are in ``tied``."""
    names = {name for entry in tied for name in entry.parameters}
    kept = tuple(name for name in segment.parameters if name not in names)
    return replace(segment, parameters=kept, size=segment.size - sum(entry.size for entry in tied))


def _refusal(tied: Tied, segments: tuple[Segment, ...], trunk: Trunk) -> TiedWeightsError:
    first, second, *_ = (segments[index].ends_at for index in tied.segments)
    return TiedWeightsError(
        f"parameter {tied.parameters[0].removeprefix('trunk.')!r} of {trunk.name} is used on both sides of a cut.",
        facts=f"in the segment that ends at {first} and in the one that ends at {second}: several losses would "
        "train it.",
        help=Advice(
            "shared=True lets each of them train it; or cut=localize.CutSpec(at=(...)) at cuts that keep its uses in "
            "one segment",
            "--shared (in a recipe, shared: true) lets each of them train it; or --cut-at cuts that keep its uses in "
            "one segment, see `localize inspect`",
        ),
    )
