"""Tell what an operation of a recorded graph is: its parameters, and whether it activates, drops, or pools."""

from __future__ import annotations

import torch
from torch import fx, nn

from localize.ir import facts, path_of
from localize.torch_names import BATCH_NORMS, CONVOLUTIONS, DROPOUTS


def parameters_of(node: fx.Node, root: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that a node reads, by their names in ``root``."""
    if node.op == "call_module":
        module = root.get_submodule(path_of(node))
        return {f"{node.target}.{name}": p for name, p in module.named_parameters()}
    if node.op == "get_attr" and not facts(node).support:
        path, _, name = path_of(node).rpartition(".")
        value = getattr(root.get_submodule(path), name)
        return {path_of(node): value} if isinstance(value, nn.Parameter) else {}
    return {}


def is_batch_norm(node: fx.Node, root: nn.Module) -> bool:
    """Tell whether a node calls a BatchNorm of ``root``."""
    return node.op == "call_module" and isinstance(root.get_submodule(path_of(node)), BATCH_NORMS)


ACTIVATIONS = {
    "relu", "relu_", "relu6", "gelu", "silu", "silu_", "mish", "hardswish", "hardsigmoid", "leaky_relu", "elu", "selu",
    "celu", "sigmoid", "sigmoid_", "tanh", "tanh_", "softplus", "prelu", "hardtanh", "glu", "square", "_max", "relu6_",
    "leaky_relu_", "elu_", "selu_", "celu_", "hardtanh_", "hardswish_", "hardsigmoid_", "mish_", "rrelu", "rrelu_",
    "threshold", "threshold_", "softsign", "logsigmoid", "hardshrink", "softshrink", "tanhshrink",
}  # fmt: skip
_OF_TWO = {"max", "maximum", "min", "minimum"}
"""Activations where they are given two tensors (maxout)."""
_ELEMENTWISE = {"add", "iadd", "mul", "imul", "sub", "truediv", "add_", "mul_", "div", "div_", "contiguous", "clone"}
_POOLS = {"max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"}
_POOL_MODULES = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_NORMS = ("norm", "groupnorm", "frn")


def operation_kind(node: fx.Node, module: nn.Module | None) -> str:
    """Classify an operation: activation, dropout, elementwise, pool, or other."""
    if module is not None:
        if isinstance(module, _POOL_MODULES):
            return "pool"
        if isinstance(module, (nn.Identity, DROPOUTS)) or "drop" in type(module).__name__.lower():
            return "dropout"
        if isinstance(module, nn.MultiheadAttention):
            return "other"
        activation = type(module).__module__ == "torch.nn.modules.activation" or _is_custom_activation(node, module)
        return "activation" if activation else "other"
    name = getattr(node.target, "__name__", node.target)
    if name in ACTIVATIONS or (name in _OF_TWO and len(node.all_input_nodes) > 1):
        return "activation"
    if "drop" in str(name) or name == "stochastic_depth":
        return "dropout"
    if name in _POOLS:
        return "pool"
    return "elementwise" if name in _ELEMENTWISE else "other"


def _is_custom_activation(node: fx.Node, module: nn.Module) -> bool:
    """A module of the user's that maps a tensor to one of the same shape and has no weight matrix."""
    if type(module).__module__.startswith("torch.nn."):
        return False
    source = node.all_input_nodes[0] if node.all_input_nodes else None
    same_shape = source is not None and facts(source).shape == facts(node).shape
    weighted = any(p.dim() > 1 for p in module.parameters())
    return same_shape and not weighted and not any(word in type(module).__name__.lower() for word in _NORMS)


def is_whole(node: fx.Node, module: nn.Module | None) -> bool:
    """Say whether a module that is called whole is a layer by itself: several matrices, or one with an activation."""
    if module is None or isinstance(module, _SINGLE):
        return False
    matrices = sum(sum(size > 1 for size in p.shape) > 1 for p in module.parameters())
    return matrices > 1 or (matrices > 0 and (facts(node).activates or isinstance(module, torch.jit.ScriptModule)))


_SINGLE = (CONVOLUTIONS, nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag)
"""One operation each, whatever parameters a derived class adds."""


def has_activation(node: fx.Node, module: nn.Module | None) -> bool:
    """An activation, or a normalisation that applies one itself (timm's BatchNormAct2d)."""
    if operation_kind(node, module) == "activation":
        return True
    inner = getattr(module, "act", None)
    return isinstance(inner, nn.Module) and not isinstance(inner, nn.Identity)
