"""Find where a graph can be cut, and choose.

A cut is a place in the recorded order behind which only a few values are still needed: usually one. Places between
which no parameter lies are one possibility; the best of them is taken (after an activation, before a reshape, past an
in-place operation). From these the local layers of the papers are made: a block is the module in whose own forward a
skip connection closes; outside blocks, a weighted operation with its activation is a layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import fx, nn

from localize.errors import CutError, OptionError, did_you_mean
from localize.features import features
from localize.ir import Cut, CutSpec, Grain, Layout, LocalLayer, Trunk
from localize.operations import has_activation, operation_kind, parameters_of

MOST_LIVE = 4
FEWEST_LAYERS = 4


def place(trunk: Trunk, spec: CutSpec, *, grain: Grain, together: int = 1) -> Layout:
    """Choose the cuts that ``spec`` asks for.

    Args:
        trunk: the recorded model.
        spec: how many, where, balanced by what.
        grain: what the method takes as a local layer.
        together: how many trailing local layers have to stay in the last segment.

    Raises:
        CutError: no such cut, or fewer cuts than asked for.
        OptionError: the names of the cuts are not a tuple.
    """
    graph = _Places(trunk)
    layers = graph.local_layers(grain)
    if isinstance(spec.at, str):
        raise OptionError(f"cuts are named by a tuple, not by {spec.at!r}.", help=f"CutSpec(at=({spec.at!r},))")
    if spec.at:
        return Layout(trunk, layers, tuple(graph.named(name, layers) for name in _ordered(spec.at, graph, layers)))
    allowed = [layer.end for layer in layers[: max(0, len(layers) - together)] if layer.end is not None]
    if spec.by == "node" and together < len(layers):
        end = graph.order(allowed[-1]) if together > 1 and allowed else len(graph.nodes)
        allowed = [cut for cut in graph.candidates if graph.order(cut) <= end]
    if spec.segments == "max":
        return Layout(trunk, layers, tuple(allowed))
    if spec.segments == "sqrt":
        spec = replace(spec, segments=max(1, min(round(math.sqrt(len(layers))), len(allowed) + 1)))
    if spec.segments < 1:
        raise CutError(f"a model cannot have {spec.segments} segments.", help="-K 1 or more, or -K max")
    if spec.segments > 1 and together >= len(layers) > 1:
        raise CutError(
            f"{spec.segments} segments were asked for, and the method keeps all of {trunk.name} in one.",
            help="-K 1, or another method",
        )
    if spec.segments - 1 > len(allowed):
        raise CutError(
            f"{spec.segments} segments were asked for, {trunk.name} has {len(allowed)} cuts here.",
            facts=f"cuts: {', '.join(cut.name for cut in allowed) or 'none'}",
            help=f"-K {len(allowed) + 1}, -K max" + ("" if spec.by == "node" else ", or --cut-by node"),
        )
    return Layout(trunk, layers, _balanced(allowed, spec, trunk))


def candidates(trunk: Trunk) -> tuple[Cut, ...]:
    """Return every place where the model can be cut, in the order of the forward."""
    return _Places(trunk).candidates


def local_layers(trunk: Trunk, grain: Grain) -> tuple[LocalLayer, ...]:
    """Return the local layers of the model, as ``grain`` defines them."""
    return _Places(trunk).local_layers(grain)


def _ordered(names: Sequence[str], graph: _Places, layers: Sequence[LocalLayer]) -> list[str]:
    if len(set(names)) < len(names):
        raise CutError(f"a cut is named twice: {', '.join(names)}.", help="name every cut once")
    return sorted(names, key=lambda name: graph.order(graph.named(name, layers)))


def _balanced(allowed: Sequence[Cut], spec: CutSpec, trunk: Trunk) -> tuple[Cut, ...]:
    """Choose cuts such that the largest segment is as small as can be."""
    total = sum(p.numel() for p in trunk.model.parameters())
    if spec.by == "parameters":
        ends = [cut.parameters_before for cut in allowed] + [total]
    elif spec.by == "macs":
        ends = [cut.macs_before for cut in allowed]
        ends.append(sum(node.meta["macs"] for node in trunk.graph.nodes))
    else:
        ends = list(range(1, len(allowed) + 2))
    chosen = _partition(ends, spec.segments)
    return tuple(allowed[i] for i in chosen)


def _partition(ends: Sequence[int], parts: int) -> list[int]:
    """Split 0..ends[-1] at ``parts - 1`` of ``ends`` such that the largest part is smallest; return the indices."""
    n = len(ends)
    best: list[dict[int, tuple[float, tuple[int, ...]]]] = [{0: (0.0, ())}]
    for part in range(1, parts + 1):
        row = {}
        for stop in range(part, n + 1 - (parts - part)):
            options = []
            for start, (largest, chosen) in best[-1].items():
                if start < stop:
                    size = ends[stop - 1] - (ends[start - 1] if start else 0)
                    options.append((max(largest, size), (*chosen, stop)))
            row[stop] = min(options, key=lambda option: option[0])
        best.append(row)
    return [stop - 1 for stop in best[-1][n][1][:-1]]


# ----------------------------------------------------------------------------------------------- places in one graph


@dataclass(frozen=True)
class _Place:
    """The place after node number ``index``, and the values that are still needed there."""

    index: int
    live: tuple[fx.Node, ...]
    overwritten: tuple[fx.Node, ...]


class _Places:
    """Everything that is known about the places of one recorded graph."""

    def __init__(self, trunk: Trunk) -> None:
        self.trunk = trunk
        self.nodes = list(trunk.graph.nodes)
        self.index = {node: i for i, node in enumerate(self.nodes)}
        modules = dict(trunk.twin.named_modules())
        self.module = {n: modules[n.target] for n in self.nodes if n.op == "call_module"}
        self.parameters = [self._parameters(node) for node in self.nodes]

    def order(self, cut: Cut) -> int:
        """Return the number of the node that the cut comes after."""
        return next(i for i, node in enumerate(self.nodes) if node.name == cut.after)

    def _parameters(self, node: fx.Node) -> dict[str, nn.Parameter]:
        return parameters_of(node, self.trunk.twin)

    # -- liveness

    @cached_property
    def live(self) -> list[tuple[fx.Node, ...]]:
        """For every node, the values that depend on the input and are needed behind it."""
        last = {
            node: max((self.index[user] for user in node.users), default=-1)
            for node in self.nodes
            if node.meta.get("depends")
        }
        live: list[tuple[fx.Node, ...]] = []
        current: list[fx.Node] = []
        for i, node in enumerate(self.nodes):
            current = [value for value in [*current, *([node] if node in last else [])] if last[value] > i]
            live.append(tuple(current))
        return live

    def _place(self, i: int) -> _Place | None:
        """Return the place after node ``i`` if it is one where training can be cut."""
        live = self.live[i]
        if not live or any(v.op == "placeholder" or not _is_cuttable(v) for v in live):
            return None
        return _Place(i, live, tuple(v for v in live if self.last_write.get(v.meta["storage"], -1) > i))

    @cached_property
    def last_write(self) -> dict[int, int]:
        """For every storage that is written in place, the number of the last node that does."""
        return {storage: i for i, node in enumerate(self.nodes) for storage in node.meta.get("mutates", ())}

    @cached_property
    def groups(self) -> list[list[_Place]]:
        """Places between which no parameter lies, for the smallest number of live values that gives enough layers."""
        for most in range(1, MOST_LIVE + 1):
            groups = self._groups(most)
            if len(groups) >= FEWEST_LAYERS - 1:
                return groups
        return groups

    def _groups(self, most: int) -> list[list[_Place]]:
        trainable = [i for i, owned in enumerate(self.parameters) if any(p.requires_grad for p in owned.values())]
        weighted = [bool(owned) for owned in self.parameters]
        groups: list[list[_Place]] = []
        fresh = True
        for i in range(len(self.nodes)):
            fresh = fresh or weighted[i]
            if not trainable or not trainable[0] <= i < trainable[-1]:
                continue
            if len(self.live[i]) > most or (place := self._place(i)) is None:
                continue
            if fresh:
                groups.append([])
            groups[-1].append(place)
            fresh = False
        return groups

    @cached_property
    def candidates(self) -> tuple[Cut, ...]:
        """One cut for every group."""
        return tuple(self._cut(self._representative(group, pool="same")) for group in self.groups)

    def _representative(self, group: Sequence[_Place], *, pool: str) -> _Place:
        """Choose the place of a group: the end of a block, or past its activation (and pooling) and not further."""
        ends = {end for _, end in self.blocks}
        safe = [place for place in group if not place.overwritten]
        for place in safe:
            if place.index in ends:
                return place
        chosen = group[0]
        for place in group[1:]:
            passed = [n for n in self.nodes[chosen.index + 1 : place.index + 1] if n.meta.get("depends")]
            if not all(self._extends(node, pool, place.index) for node in passed):
                break
            chosen = place
        if chosen.overwritten:
            chosen = next((place for place in safe if place.index > chosen.index), chosen)
        fewest = min(len(place.live) for place in group)
        return chosen if len(chosen.live) == fewest else next(p for p in group if len(p.live) == fewest)

    def _extends(self, node: fx.Node, pool: str, index: int) -> bool:
        """Tell whether an operation without parameters belongs to the layer before it."""
        kind = operation_kind(node, self.module.get(node))
        if kind == "pool":
            return pool == "same" or self._block_follows(index)
        return kind in ("activation", "dropout", "elementwise")

    def _block_follows(self, index: int) -> bool:
        """Tell whether the next parameter behind a place is inside a block."""
        following = next((i for i in range(index + 1, len(self.nodes)) if self.parameters[i]), None)
        return following is not None and any(start <= following <= end for start, end in self.blocks)

    # -- blocks

    @cached_property
    def instances(self) -> dict[str, tuple[str, int, int]]:
        """Modules with children that run once, without a break: path -> (class, first node, last node)."""
        spans: dict[str, list] = {}
        for i, node in enumerate(self.nodes):
            if not node.meta.get("depends"):
                continue
            for path, kind in node.meta["scope"]:
                span = spans.setdefault(path, [kind, i, i, 0])
                span[2] = i
                span[3] += 1
        dependent = [bool(node.meta.get("depends")) for node in self.nodes]
        return {
            path: (kind, first, last)
            for path, (kind, first, last, count) in spans.items()
            if path and count == sum(dependent[first : last + 1])
        }

    @cached_property
    def blocks(self) -> list[tuple[int, int]]:
        """First and last node of the outermost blocks, in order."""
        kinds = self._block_kinds()
        found = [(path, *span) for path, span in self.instances.items() if span[0] in kinds]
        found = [block for block in found if not self._holds_blocks(block, found)]
        spans = sorted({(first, last) for _, _, first, last in found}, key=lambda span: (span[0], -span[1]))
        outermost: list[tuple[int, int]] = []
        for first, last in spans:
            if not outermost or first > outermost[-1][1]:
                outermost.append((first, last))
        return outermost

    def _block_kinds(self) -> set[str]:
        """Classes in whose own forward a region with parameters, that no single value crosses, is closed."""
        single = [i for i, live in enumerate(self.live) if len(live) == 1]
        kinds = set()
        for before, after in zip([-1, *single], single, strict=False):
            inside = [i for i in range(before + 1, after + 1) if self.nodes[i].meta.get("depends")]
            if len(inside) < 2 or not any(self.parameters[i] for i in inside) or not self.nodes[after].meta["scope"]:
                continue
            path = self.nodes[after].meta["scope"][-1][0]
            if path in self.instances and self.instances[path][1] <= inside[0]:
                kinds.add(self.instances[path][0])
        return kinds

    @staticmethod
    def _holds_blocks(block: tuple[str, str, int, int], found: Sequence[tuple[str, str, int, int]]) -> bool:
        """Tell whether a block is a stage: it holds two or more blocks of one class."""
        path, _, first, last = block
        inner = [kind for other, kind, f, l in found if other.startswith(path + ".") and first <= f and l <= last]  # noqa: E741
        return any(inner.count(kind) > 1 for kind in inner)

    # -- local layers

    def local_layers(self, grain: Grain) -> tuple[LocalLayer, ...]:
        """Make local layers: blocks, and weighted operations with their activation between them."""
        ends = self._layer_ends(grain)
        cuts: list[Cut | None] = [None, *(self._cut(place) for place in ends), None]
        layers = []
        for index, (start, end) in enumerate(zip(cuts, cuts[1:], strict=False)):
            layers.append(LocalLayer(index, end.name if end else "output", start, end))
        return tuple(layers)

    def _layer_ends(self, grain: Grain) -> list[_Place]:
        ends: list[_Place] = []
        start = 0
        for group in self.groups:
            place = self._representative(group, pool=grain.pool)
            if any(first <= place.index < last for first, last in self.blocks):
                continue
            if self._is_layer(start, place.index) and self._is_wanted(place, grain):
                ends.append(place)
                start = place.index + 1
        if grain.stem == "merged" and self.blocks:
            kept = [place for place in ends if place.index >= self.blocks[0][0]]
            ends = kept or ends
        if grain.classifier == "merged" and ends and self._is_classifier(start, grain):
            ends.pop()
        return ends

    def _is_layer(self, first: int, last: int, *, preactivation: bool = True) -> bool:
        """Tell whether these nodes hold a block, or a weighted operation with an activation behind it.

        With ``preactivation``, a normalisation and an activation before the weighted operation will do (DenseNet).
        """
        if any(first <= start and end <= last for start, end in self.blocks):
            return True
        normed = activated = weighted = False
        for i in range(first, last + 1):
            node = self.nodes[i]
            if not node.meta.get("depends"):
                continue
            weighted = weighted or any(p.dim() > 1 for p in self.parameters[i].values())
            normed = normed or (bool(self.parameters[i]) and not weighted)
            if has_activation(node, self.module.get(node)):
                if weighted:
                    return True
                activated = normed
            if preactivation and activated and weighted:
                return True
        return False

    def _is_classifier(self, start: int, grain: Grain) -> bool:
        """Tell whether what follows the last cut is no layer of its own."""
        if not self._is_layer(start, len(self.nodes) - 1, preactivation=False):
            return True
        weighted = [n for i, n in enumerate(self.nodes) if i >= start and self.parameters[i]]
        return grain.hidden_linear == "classifier" and self._is_flat_behind_maps(weighted)

    def _is_wanted(self, place: _Place, grain: Grain) -> bool:
        return grain.hidden_linear == "own" or not self._is_flat_behind_maps(place.live)

    def _is_flat_behind_maps(self, values: Sequence[fx.Node]) -> bool:
        """Tell whether these values are flat vectors of a model that computes with maps or tokens before."""
        weighted = [n for i, n in enumerate(self.nodes) if self.parameters[i] and n.meta.get("depends")]
        flat = all(len(v.meta["shape"] or ()) == 1 for v in values)
        return flat and any(len(n.meta["shape"] or ()) > 1 for n in weighted)

    # -- making cuts

    def _cut(self, place: _Place) -> Cut:
        before = _size(self.parameters[: place.index + 1])
        return Cut(
            name=self._name(place),
            after=self.nodes[place.index].name,
            values=tuple(node.name for node in place.live),
            features=tuple(features(node, self.trunk) for node in place.live),
            cloned=tuple(node.name for node in place.overwritten),
            parameters_before=before,
            parameters_after=_size(self.parameters) - before,
            macs_before=sum(node.meta["macs"] for node in self.nodes[: place.index + 1]),
        )

    def _name(self, place: _Place) -> str:
        """Name a place by the block or the module that ends there."""
        node = self.nodes[place.index]
        for path, (_, first, last) in self.instances.items():  # outermost first
            if last == place.index and ((first, last) in self.blocks or self._weights(first, last) == 1):
                return path
        return node.target if node.op == "call_module" and self._called_once(node) else node.name

    def _weights(self, first: int, last: int) -> int:
        return sum(any(p.dim() > 1 for p in self.parameters[i].values()) for i in range(first, last + 1))

    def _called_once(self, node: fx.Node) -> bool:
        return sum(other.op == "call_module" and other.target == node.target for other in self.nodes) == 1

    def named(self, name: str, layers: Sequence[LocalLayer]) -> Cut:
        """Return the cut of this name.

        Raises:
            CutError: there is none.
        """
        known = {cut.name: cut for cut in self.candidates}
        known.update({layer.end.name: layer.end for layer in layers if layer.end is not None})
        if name not in known:
            raise CutError(
                f"no cut {name!r} in {self.trunk.name}.",
                facts=f"cuts: {', '.join(layer.end.name for layer in layers if layer.end)}; all {len(known)} with "
                "`localize inspect`",
                help=did_you_mean(name, known) or "localize inspect MODEL",
            )
        return known[name]


def _size(owned: Sequence[dict[str, nn.Parameter]]) -> int:
    distinct = {name: parameter.numel() for parameters in owned for name, parameter in parameters.items()}
    return sum(distinct.values())


def _is_cuttable(node: fx.Node) -> bool:
    return bool(node.meta["batched"]) and node.meta["dtype"].is_floating_point and len(node.meta["shape"]) in (1, 2, 3)
