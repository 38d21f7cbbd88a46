"""Override inferred layouts with those that a recipe states: a pass from a trunk to a trunk."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from fnmatch import fnmatchcase

from torch import fx

from localize.errors import OptionError, did_you_mean
from localize.graph.features import describe
from localize.ir import Cut, Features, Stated, Trunk, set_facts


def override_features(trunk: Trunk, stated: Mapping[str, Stated | Sequence[Stated]], cuts: Iterable[Cut]) -> Trunk:
    """Return the trunk with layouts as they are stated, instead of as they were inferred.

    Args:
        trunk: the recorded model.
        stated: by the name of a cut, or a shell pattern of names: one statement for all values that cross, or one for
            each. A pattern leaves out the values that its statement does not fit.
        cuts: every cut of the trunk that can be named.

    Raises:
        OptionError: no such cut, or a statement that does not fit what crosses it.
    """
    known = {cut.name: cut for cut in cuts}
    values: dict[str, Features] = {}
    for pattern, statement in stated.items():
        names = [name for name in known if fnmatchcase(name, pattern)] if pattern not in known else [pattern]
        found: dict[str, Features] = {}
        for name in names:
            found |= _stated(known[name], statement, strict=name == pattern)
        if not found:
            raise OptionError(
                f"features of {pattern!r} are stated, and {trunk.name} has no {'such ' if names else ''}cut"
                f"{' whose values they fit' if names else ' of this name'}.",
                facts=f"cuts: {', '.join(known)}",
                help=did_you_mean(pattern, known) or "localize inspect MODEL",
                option="features",
            )
        values |= found
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(trunk.graph, copies)
    graph.output(result).meta = dict(next(iter(trunk.graph.find_nodes(op="output"))).meta)
    for node, copied in copies.items():
        copied.meta = dict(node.meta)
        if node.name in values:
            set_facts(copied, features=values[node.name])
    return replace(trunk, graph=graph)


def _stated(cut: Cut, statement: Stated | Sequence[Stated], *, strict: bool) -> dict[str, Features]:
    """Return the layouts of the values that cross a cut; unless ``strict``, without those that do not fit."""
    each = [statement] * len(cut.features) if isinstance(statement, Stated) else list(statement)
    if len(each) != len(cut.features):
        raise OptionError(
            f"features of {cut.name!r} are stated for {len(each)} values, and {len(cut.features)} cross there.",
            facts=f"shapes: {', '.join(str(f.shape) for f in cut.features)}",
            help="one statement for all, or one for each",
            option="features",
        )
    found = {}
    for value, inferred, one in zip(cut.values, cut.features, each, strict=False):
        problem, layout = _restated(inferred, one)
        if problem and strict:
            raise OptionError(
                f"features of {cut.name!r} cannot be as stated: {problem}.",
                facts=f"without the batch its shape is {inferred.shape}; inferred: {describe(inferred)}.",
                help="localize inspect MODEL shows what is inferred",
                option="features",
            )
        if not problem:
            found[value] = layout
    return found


def _restated(inferred: Features, stated: Stated) -> tuple[str, Features]:
    """Return what is wrong with a statement (nothing, if it fits), and the layout that it makes."""
    given = {key: value for key, value in asdict(stated).items() if value is not None}
    layout = replace(inferred, **given)
    rank = len(inferred.shape)
    if layout.kind != inferred.kind:
        return f"a value of {rank} dimensions is {inferred.kind}", inferred
    if layout.channels not in (1, rank):
        return f"channels lie in dimension 1 or {rank}", inferred
    if layout.kind != "tokens":
        wrong = next((key for key in ("token", "prefix", "grid") if key in given), None)
        return (f"{wrong} is said of tokens", inferred) if wrong else ("", layout)
    count = layout.shape[2 - layout.channels]
    if not 0 <= layout.prefix < count:
        return f"a prefix of {layout.prefix} leaves none of {count} tokens", inferred
    if math.prod(layout.grid or (count - layout.prefix,)) != count - layout.prefix:
        if "grid" in given:
            return f"{count - layout.prefix} tokens are left after the prefix", inferred
        layout = replace(layout, grid=())
    return "", layout
