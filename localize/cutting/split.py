"""Split a recorded graph at its cuts into segments over the same parameters.

What depends on the input belongs to the segment in which it is computed. What does not (parameters, constants made from
them, batch sizes, modes) is computed anew in every segment that needs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx, nn

from localize.errors import TiedWeightsError
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
    bounds: list[Cut | None] = [None, *layout.cuts, None]
    pairs = enumerate(zip(bounds, bounds[1:], strict=False))
    segments = tuple(_segment(index, layout, start, stop) for index, (start, stop) in pairs)
    tied = _tied(segments, trunk)
    if tied and not shared:
        raise _refusal(tied[0], segments, trunk)
    used = {name for segment in segments for name in segment.parameters}
    unused = tuple(
        name for name, p in trunk.model.named_parameters() if p.requires_grad and f"trunk.{name}" not in used
    )
    segments = tuple(_without(segment, tied) for segment in segments)
    return Segments(layout, segments, tuple(f"trunk.{name}" for name in unused), tied)


def between(trunk: Trunk, start: Cut | None, stop: Cut | None, sides: Sequence[Side] = ()) -> fx.Graph:
    """Return the sub-graph from one cut to another: it takes the values of the first, and returns those of the second.

    ``None`` stands for the input of the model, or its output. What makes ``sides`` is computed where it was recorded,
    and they are returned behind the other values.
    """
    nodes = list(trunk.graph.nodes)
    order = {node.name: i for i, node in enumerate(nodes)}
    first = order[start.after] + 1 if start else 0
    last = order[stop.after] if stop else len(nodes) - 1
    inside = {node.name for node in nodes[first : last + 1]} | {name for side in sides for name in side.nodes}
    recorded = {node.name: node for node in (trunk.whole if sides and trunk.whole else trunk.graph).nodes}
    copier = _Copier(recorded, start.values if start else _inputs(trunk), named=start is None)
    for node in recorded.values():
        if node.name in inside and facts(node).depends and node.op not in ("placeholder", "output"):
            copier.copy(node)
    output = next(node for node in nodes if node.op == "output")
    wanted = (*(stop.values if stop else (output.args[0].name,)), *(side.value for side in sides))
    results = tuple(copier.returned(recorded[name]) for name in wanted)
    copier.graph.output(results[0] if len(results) == 1 else results)
    copier.graph.lint()
    return copier.graph


def _inputs(trunk: Trunk) -> tuple[str, ...]:
    return tuple(argument.name for argument in trunk.inputs)


def alone(trunk: Trunk, start: Cut | None, stop: Cut | None) -> fx.Graph | None:
    """Return the same sub-graph, from what heads read at a cut to what they read at the other.

    It is None where an input of the model is needed besides. What is made by chance and of parameters alone is made
    anew.
    """
    if start is not None:
        by_name = {node.name: node for node in trunk.graph.nodes}
        start = replace(start, values=tuple(name for name in start.values if not _is_chance(by_name[name])))
    graph = between(trunk, start, stop)
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


class _Copier:
    """Copy nodes into a new graph whose placeholders are the values that enter; ``named``: by their own names."""

    def __init__(self, recorded: Mapping[str, fx.Node], entering: Sequence[str], *, named: bool) -> None:
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}
        self.order = {node: i for i, node in enumerate(recorded.values())}
        self.writes: dict[int, list[fx.Node]] = {}
        for node in recorded.values():
            for storage in facts(node).mutates:
                self.writes.setdefault(storage, []).append(node)
        for i, name in enumerate(entering):
            placeholder = self.graph.placeholder(name if named else "x" if len(entering) == 1 else f"x_{i}")
            placeholder.meta = dict(recorded[name].meta)
            self.copies[recorded[name]] = self.viewed(placeholder, recorded[name], "flatten", 0, 1)
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
        made_anew = not facts(parent).depends or _is_chance(parent)
        assert made_anew or parent in self.copies, f"{parent} is used behind a cut that does not carry it"
        made = self.copy(parent)
        for write in self.writes.get(facts(parent).storage, ()):
            if self.order[parent] < self.order[write] < self.order[user] and not facts(write).depends:
                self.copy(write)  # through a view, such as a[2:].zero_(), which nothing reads
        return made


def _is_chance(node: fx.Node) -> bool:
    """Tell whether a value depends on no input of the model, but on random numbers."""
    front, seen = [node], {node}
    while front:
        current = front.pop()
        if current.op == "placeholder":
            return False
        parents = {parent for parent in current.all_input_nodes if facts(parent).depends} - seen
        seen |= parents
        front += parents
    return bool(facts(node).depends)


def _segment(index: int, layout: Layout, start: Cut | None, stop: Cut | None) -> Segment:
    trunk = layout.trunk
    graph = between(trunk, start, stop)
    owned = {name: p for node in graph.nodes for name, p in parameters_of(node, trunk.model).items()}
    distinct = {id(p): p for p in owned.values()}
    return Segment(
        index=index,
        graph=graph,
        inputs=start.values if start else _inputs(trunk),
        outputs=stop.values if stop else ("output",),
        features=stop.features if stop else (),
        parameters=_canonical([p for p in distinct.values() if p.requires_grad], trunk.model),
        size=sum(p.numel() for p in distinct.values()),
        layers=_layers(layout, start, stop),
        ends_at=stop.name if stop else "output",
        cloned=stop.cloned if stop else (),
    )


def _canonical(parameters: list[nn.Parameter], model: nn.Module) -> tuple[str, ...]:
    """Name parameters as ``named_parameters`` does (a tied one by its first name), in the order of use."""
    names = {id(p): name for name, p in model.named_parameters()}
    return tuple(f"trunk.{names[id(p)]}" for p in parameters)


def _layers(layout: Layout, start: Cut | None, stop: Cut | None) -> tuple[int, int]:
    order = {node.name: i for i, node in enumerate(layout.trunk.graph.nodes)}
    ends = [order[layer.end.after] if layer.end else len(order) for layer in layout.layers]
    first = order[start.after] + 1 if start else 0
    last = order[stop.after] if stop else len(order)
    return (
        next(i for i, end in enumerate(ends) if end >= first),
        next(i for i, end in enumerate(ends) if end >= last),
    )


def _tied(segments: tuple[Segment, ...], trunk: Trunk) -> tuple[Tied, ...]:
    """Return the parameters that several segments use, those of the same segments together."""
    users: dict[str, tuple[int, ...]] = {}
    for segment in segments:
        for name in segment.parameters:
            users[name] = (*users.get(name, ()), segment.index)
    sets = dict.fromkeys(indices for indices in users.values() if len(indices) > 1)
    sizes = {f"trunk.{name}": p.numel() for name, p in trunk.model.named_parameters()}
    tied = []
    for number, indices in enumerate(sets):
        names = tuple(name for name, found in users.items() if found == indices)
        tied.append(Tied(f"tied_{number}", names, sum(sizes[name] for name in names), indices))
    return tuple(tied)


def _without(segment: Segment, tied: tuple[Tied, ...]) -> Segment:
    """Return the segment without the parameters that it shares with others."""
    here = [entry for entry in tied if segment.index in entry.segments]
    names = {name for entry in here for name in entry.parameters}
    kept = tuple(name for name in segment.parameters if name not in names)
    return replace(segment, parameters=kept, size=segment.size - sum(entry.size for entry in here))


def _refusal(tied: Tied, segments: tuple[Segment, ...], trunk: Trunk) -> TiedWeightsError:
    first, second, *_ = (segments[index].ends_at for index in tied.segments)
    return TiedWeightsError(
        f"parameter {tied.parameters[0].removeprefix('trunk.')!r} of {trunk.name} is used on both sides of a cut.",
        facts=f"in the segment that ends at {first} and in the one that ends at {second}: several losses would "
        "train it.",
        help="--shared (in a recipe, shared: true) lets each of them train it; or --cut-at cuts that keep its uses in "
        "one segment, see `localize inspect`",
    )
