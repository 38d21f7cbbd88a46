"""Infer how the values of a tensor are laid out: which dimension holds the channels, which tokens are read."""

from __future__ import annotations

from torch import fx, nn

from localize.ir import Features, Trunk


def features(node: fx.Node, trunk: Trunk) -> Features:
    """Infer how the values of a tensor are laid out, from the modules that make and read it."""
    shape = tuple(node.meta["shape"])
    if len(shape) == 1:
        return Features("flat", shape, 1)
    last = len(shape)
    channels = _channel_axis(node, trunk)
    if channels is None:
        channels = 1 if len(shape) == 3 else last
    if len(shape) == 3:
        return Features("map", shape, channels)
    token, prefix = _token_reading(trunk)
    return Features("tokens", shape, channels, token, prefix)


def _channel_axis(node: fx.Node, trunk: Trunk) -> int | None:
    """Follow the value to the nearest module that shows which dimension holds the channels.

    The value is followed forward, then backward, through operations that keep its shape, and through reshapes that
    keep its first or its last dimension: what is shown behind those counts only for the dimension that was kept.
    """
    shape = node.meta["shape"]
    sides = frozenset({"first", "last"})
    for step in ("users", "all_input_nodes"):
        front, seen = [(node, sides)], {node}
        while front:
            current, kept = front.pop(0)
            for neighbour in getattr(current, step):
                consumer, value = (neighbour, current) if step == "users" else (neighbour, neighbour)
                side = _revealed(consumer, value, trunk)
                if side in kept:
                    return 1 if side == "first" else len(shape)
                still = kept & _kept(neighbour.meta.get("shape"), shape)
                if neighbour not in seen and still and neighbour.meta.get("depends"):
                    seen.add(neighbour)
                    front.append((neighbour, still))
    return None


def _kept(shape: tuple[int, ...] | None, original: tuple[int, ...]) -> frozenset[str]:
    """Return which ends of ``original`` a shape still has: its first dimension, its last one, or both."""
    if not shape or len(shape) < 2:
        return frozenset()
    kept = {side for side, i in (("first", 0), ("last", -1)) if shape[i] == original[i]}
    return frozenset(kept) if shape == original or len(kept) == 1 else frozenset()


def _revealed(consumer: fx.Node, value: fx.Node, trunk: Trunk) -> str | None:
    """Tell whether ``consumer`` takes the channels of ``value`` in the ``first`` dimension or in the ``last``."""
    if consumer.op != "call_module":
        return None
    module, shape = trunk.twin.get_submodule(consumer.target), value.meta["shape"]
    if isinstance(module, nn.modules.conv._ConvNd | nn.modules.batchnorm._BatchNorm | nn.GroupNorm):
        return "first"
    if isinstance(module, nn.LayerNorm):
        width = module.normalized_shape[-1]
        first = len(shape) == 3 and shape[0] == width and (shape[-1] != width or type(module).__name__.endswith("2d"))
        return "first" if first else "last"
    return "last" if isinstance(module, nn.Linear | nn.MultiheadAttention) else None


def _token_reading(trunk: Trunk) -> tuple[str, int]:
    """Find how the model reduces tokens (N, T, C) to a vector: one token, or the mean behind a prefix."""
    for node in reversed(list(trunk.graph.nodes)):
        shape = node.meta.get("shape")
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        if shape is None or len(shape) != 1 or source is None or len(source.meta.get("shape") or ()) != 2:
            continue
        name = getattr(node.target, "__name__", node.target)
        if name in ("getitem", "select"):
            return "class", 0
        if name == "mean":
            return "mean", _prefix(source)
    return "mean", 0


def _prefix(node: fx.Node) -> int:
    """Return k for ``x[:, k:]``."""
    if getattr(node.target, "__name__", "") != "getitem" or not isinstance(node.args[1], tuple):
        return 0
    index = node.args[1][1]
    return index.start or 0 if isinstance(index, slice) else 0
