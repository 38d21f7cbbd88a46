"""Choose where a graph is cut: by number, by name, or balanced by a cost; at the ends of local layers or anywhere."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from localize.cutting.layers import Layers
from localize.cutting.places import Places
from localize.errors import Advice, CutError, OptionError
from localize.ir import Cut, CutSpec, Grain, Layout, LocalLayer, Trunk, facts


def place(trunk: Trunk, spec: CutSpec, *, grain: Grain, together: int = 1) -> Layout:
    """Choose the cuts that ``spec`` asks for.

    Args:
        trunk: the recorded model.
        spec: how many, where, balanced by what.
        grain: what the method takes as a local layer.
        together: how many trailing local layers have to stay in the last segment.

    Raises:
        CutError: no such cut, fewer cuts than asked for, nothing to train between two of them, or the method does not
            cut the model.
        OptionError: the names of the cuts are not a tuple, or ``spec`` holds what no request is.
    """
    _check(spec)
    graph = Layers(trunk)
    layers = graph.local_layers(grain)
    whole = 1 < together >= len(layers)
    if whole and (spec.at or isinstance(spec.segments, int) and spec.segments > 1):
        asked = f"cuts at {', '.join(spec.at)}" if spec.at else f"{spec.segments} segments"
        raise CutError(
            f"{asked} were asked for, and the method keeps all of {trunk.name} in one.",
            help=Advice("cut=1, or another method", "-K 1, or another method"),
        )
    if spec.at:
        return Layout(trunk, layers, _named(spec.at, graph, layers))
    allowed = [layer.end for layer in layers[: max(0, len(layers) - together)] if layer.end is not None]
    if spec.by == "node" and not whole:
        end = graph.places.order(allowed[-1]) if together > 1 and allowed else len(graph.nodes)
        allowed = [cut for cut in graph.candidates if graph.places.order(cut) <= end]
    if spec.segments == "max":
        return Layout(trunk, layers, tuple(allowed))
    sqrt = max(1, min(round(math.sqrt(len(layers))), len(allowed) + 1))
    number = sqrt if spec.segments == "sqrt" else spec.segments
    if number < 1:
        raise CutError(
            f"a model cannot have {number} segments.", help=Advice("cut=1 or more", "-K 1 or more, or -K max")
        )
    if number - 1 > len(allowed):
        raise CutError(
            f"{number} segments were asked for, {trunk.name} has {len(allowed)} cuts here.",
            facts=f"cuts: {', '.join(cut.name for cut in allowed) or 'none'}",
            help=_fewer(len(allowed) + 1, spec.by),
        )
    return Layout(trunk, layers, _balanced(allowed, number, spec.by, graph.places))


def _fewer(most: int, by: str) -> Advice:
    """Say how many segments there can be; by another measure, if there are more by it."""
    python, flags = f"cut={most}", f"-K {most}, -K max"
    if by == "node":
        return Advice(python, flags)
    return Advice(f'{python}, or cut=localize.CutSpec(by="node")', f"{flags}, or --cut-by node")


def _check(spec: CutSpec) -> None:
    if isinstance(spec.at, str):
        raise OptionError(f"cuts are named by a tuple, not by {spec.at!r}.", help=f"CutSpec(at=({spec.at!r},))")
    if not all(isinstance(name, str) for name in spec.at):
        raise OptionError(f"cuts are named by a tuple of names, not by {spec.at!r}.", help="localize inspect MODEL")
    if spec.segments not in ("max", "sqrt") and type(spec.segments) is not int:
        raise OptionError(f"a number of segments cannot be {spec.segments!r}.", help="a whole number, max or sqrt")
    if spec.by not in ("layer", "node", "parameters", "macs", "memory"):
        raise OptionError(f"cuts cannot be chosen by {spec.by!r}.", help="layer, node, parameters, macs or memory")


def candidates(trunk: Trunk) -> tuple[Cut, ...]:
    """Return every place where the model can be cut, in the order of the forward."""
    return Layers(trunk).candidates


@dataclass(frozen=True)
class Piece:
    """What lies between two neighbouring cuts, or before the first, or after the last."""

    cut: Cut | None
    """The cut that ends it; None is the output."""
    parameters: int
    """Number of elements that are not used before."""
    share: float
    """Of the parameters that the graph uses."""
    macs_share: float
    """Of the multiply-adds (convolution + linear)."""


def pieces(trunk: Trunk) -> tuple[Piece, ...]:
    """Return the pieces between all cuts of the model: no segment can be smaller."""
    found = candidates(trunk)
    macs = sum(facts(node).macs for node in trunk.graph.nodes)
    total = found[-1].parameters_before + found[-1].parameters_after if found else 0
    before, macs_before, made = 0, 0, []
    for cut in found:
        size, products = cut.parameters_before - before, cut.macs_before - macs_before
        made.append(Piece(cut, size, size / max(1, total), products / max(1, macs)))
        before, macs_before = cut.parameters_before, cut.macs_before
    rest = (total - before) / max(1, total) if found else 1.0
    return (*made, Piece(None, total - before, rest, 1 - macs_before / max(1, macs)))


def notes(trunk: Trunk) -> tuple[str, ...]:
    """Say why cuts go through several tensors, and what no cut makes smaller."""
    places = Layers(trunk).places
    return (*map(places.described, places.regions), *places.indivisible)


def local_layers(trunk: Trunk, grain: Grain) -> tuple[LocalLayer, ...]:
    """Return the local layers of the model, as ``grain`` defines them."""
    return Layers(trunk).local_layers(grain)


def _named(names: Sequence[str], graph: Layers, layers: Sequence[LocalLayer]) -> tuple[Cut, ...]:
    """Return the cuts of these names, in the order of the forward."""
    if len(set(names)) < len(names):
        raise CutError(f"a cut is named twice: {', '.join(names)}.", help="name every cut once")
    found = sorted((graph.named(name, layers) for name in names), key=graph.places.order)
    for first, last in pairwise(found):
        if not graph.places.trains_between(first, last):
            raise CutError(
                f"nothing is trained between cuts {first.name!r} and {last.name!r}.", help="name one of them"
            )
    return tuple(found)


def _balanced(allowed: Sequence[Cut], number: int, by: str, places: Places) -> tuple[Cut, ...]:
    """Choose the cuts of a number of segments such that the largest segment is as small as can be."""
    total = sum(p.numel() for p in places.trunk.model.parameters())
    if by == "parameters":
        ends = [cut.parameters_before for cut in allowed] + [total]
    elif by == "macs":
        ends = [cut.macs_before for cut in allowed]
        ends.append(sum(facts(node).macs for node in places.nodes))
    elif by == "memory":
        ends = [*(cut.bytes_before for cut in allowed), places.bytes[-1]]
    else:
        ends = list(range(1, len(allowed) + 2))
    chosen = _partition(ends, number)
    return tuple(allowed[i] for i in chosen)


def _partition(ends: Sequence[int], parts: int) -> list[int]:
    """Split 0..ends[-1] at ``parts - 1`` of ``ends`` such that the largest part is smallest; return the indices.

    The more a last part leaves to those before it, the larger is the largest of these, and the smaller the last part:
    the best start of the last part is found by bisection. Of several that are equally good, it is the first.
    """
    before = [0, *ends]
    largest, chosen = list(before), []
    for part in range(2, parts + 1):
        row, starts = list(largest), [0] * len(before)
        for stop in range(part, len(before) - (parts - part)):
            start = _best_start(before, largest, part - 1, stop)
            row[stop], starts[stop] = max(largest[start], before[stop] - before[start]), start
        largest = row
        chosen.append(starts)
    stops = [len(ends)]
    for starts in reversed(chosen):
        stops.append(starts[stops[-1]])
    return [stop - 1 for stop in reversed(stops[1:])]


def _best_start(before: Sequence[int], largest: Sequence[int], first: int, stop: int) -> int:
    """Return where the last part before ``stop`` starts; ``largest`` has the largest part before each place."""
    crossing = bisect_left(range(stop), True, first, key=lambda start: largest[start] >= before[stop] - before[start])
    if crossing == stop or (crossing > first and before[stop] - before[crossing - 1] <= largest[crossing]):
        return bisect_left(before, before[crossing - 1], first, crossing)
    return crossing
