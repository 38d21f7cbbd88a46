"""Whether a segment removes the length of the activities that enter it.

A normalisation is a module or function with such a name, or a value that does not change if its inputs are multiplied
by a number: ``x / (x.norm(2, 1, keepdim=True) + 1e-4)``, as in the forward of Hinton's forward-forward nets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import fx

from localize.ir import Segment, Trunk, facts, path_of

_EACH_IMAGE = ("layernorm", "groupnorm", "instancenorm", "rmsnorm")
"""Parts of the names of modules and functions that normalise every image by itself."""


def length_of_input(segment: Segment, trunk: Trunk) -> str:
    """Return whether a segment's output depends on the length of the activities of an image that entered it.

    Returns:
        ``removed``: every path from input to output passes a normalisation of each image by itself (layer, group,
        instance, RMS norm, a division by the length). ``partly kept``: there is a normalisation, but a path avoids it
        (a shortcut), or it is a BatchNorm, which scales all images alike and so keeps their relative lengths.
        ``kept``: there is none.
    """
    nodes = list(segment.graph.nodes)
    reached = {node for node in nodes if node.op == "placeholder"}
    normed = False
    for node in nodes:
        normed = normed or _normalises(node, trunk, each_image=False)
        if reached.intersection(node.all_input_nodes) and not _normalises(node, trunk, each_image=True):
            reached.add(node)
    if not any(node.op == "output" and node in reached for node in nodes):
        return "removed"
    return "partly kept" if normed else "kept"


def _normalises(node: fx.Node, trunk: Trunk, *, each_image: bool) -> bool:
    """Return whether an operation is a normalisation (with ``each_image``, of each image by itself)."""
    words = _EACH_IMAGE if each_image else (*_EACH_IMAGE, "batchnorm")
    if node.op == "call_module":
        module = trunk.twin.get_submodule(path_of(node))
        parts = (
            [module] if each_image else module.modules()
        )  # inside a module taken as a whole, a path may avoid the norm
        names = {kind.__name__ for part in parts for kind in type(part).__mro__}
    elif node.op in ("call_function", "call_method"):
        names = {getattr(node.target, "__name__", str(node.target))}
    else:
        names = set()
    named = any(word in name.lower().replace("_", "") for name in names for word in words)
    return named or _forgets_scale(node)


# ------------------------------------------------------------------------------------------------ division by a length

_SAME = {
    "norm", "vector_norm", "linalg_vector_norm", "std", "mean", "sum", "abs", "relu", "clamp", "clamp_min", "clip",
    "unsqueeze", "view", "reshape", "flatten", "expand", "expand_as", "to", "float", "contiguous", "clone",
}  # fmt: skip
"""Operations whose value is multiplied by c if all their inputs are, c > 0 (reductions, shapes)."""
_POWERS = {"square": 2.0, "var": 2.0, "sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0}
_SMALL = 1e-2
"""Up to this number an addend only keeps a division from zero."""


def _forgets_scale(node: fx.Node) -> bool:
    """Return whether a quotient or a product stays the same if an image's activities are multiplied by a number."""
    name = _name(node)
    if name == "normalize":
        return _dimension(node) != 0
    if name not in ("truediv", "div", "divide", "true_divide", "mul", "multiply"):
        return False
    above = _above(node)
    return any(_degrees(above, source).get(node) == 0.0 for source in above if source is not node)


def _above(node: fx.Node) -> list[fx.Node]:
    """Return a node and all nodes that it depends on, in the order of the graph."""
    found, waiting = {node}, [node]
    while waiting:
        for one in waiting.pop().all_input_nodes:
            if one not in found:
                found.add(one)
                waiting.append(one)
    return [one for one in node.graph.nodes if one in found]


def _degrees(nodes: list[fx.Node], source: fx.Node) -> Mapping[fx.Node, float]:
    """Return, for each node, the known p such that its value is multiplied by c^p if ``source`` is multiplied by c.

    Values that depend on other images are left out.
    """
    found = {source: 1.0}
    for node in nodes:
        if node is not source and facts(node).batched:
            degree = _degree(node, found)
            if degree is not None:
                found[node] = degree
    return found


def _degree(node: fx.Node, known: Mapping[fx.Node, float]) -> float | None:
    """Return the degree of a node from those of its inputs; None if it has none."""
    if not all(one in known for one in node.all_input_nodes) or not node.all_input_nodes:
        return None
    name, values = _name(node), [known[one] if isinstance(one, fx.Node) else None for one in node.args[:2]]
    first = values[0] if values else None  # otherwise the input is given by a keyword
    constants = [one for one in node.args[:2] if isinstance(one, int | float)]
    if name in _SAME:
        return first
    if name in _POWERS:
        return None if first is None else _POWERS[name] * first
    if name == "pow" and constants and first is not None:
        return constants[0] * first
    degrees = [one for one in values if one is not None]
    if name in ("add", "sub"):
        small = all(math.fabs(one) <= _SMALL for one in constants)
        return degrees[0] if len(set(degrees)) == 1 and len(degrees) + len(constants) == 2 and small else None
    if name in ("mul", "multiply"):
        return sum(degrees)
    if name in ("truediv", "div", "divide", "true_divide"):
        return (first or 0.0) - (values[1] or 0.0) if len(values) == 2 else None
    return None


def _name(node: fx.Node) -> str:
    """Return the name of a function or method, without the suffix for writing in place."""
    if node.op not in ("call_function", "call_method"):
        return ""
    return str(getattr(node.target, "__name__", node.target)).rstrip("_").removeprefix("i")


def _dimension(node: fx.Node) -> Any:
    """Return the dimension along which ``F.normalize`` divides by the length."""
    return node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 1)
