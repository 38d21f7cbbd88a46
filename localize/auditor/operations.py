"""What a text and a plan are compared in: operations in order, and the values that they read.

Both sides are written down in the same form, each on its own: the recorded graph and the plan by
:mod:`localize.auditor.recorded` and :mod:`localize.auditor.planned`, the text by :mod:`localize.auditor.statements`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

Kind = Literal[
    "input", "module", "function", "method", "property", "operator", "segment", "backward", "optimizer", "pull",
    "micro", "exact", "part", "gathered", "share", "unknown",
]  # fmt: skip


@dataclass(frozen=True)
class Const:
    """A Python constant; two are equal if they have the same type and the same digits."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Const) and _key(self.value) == _key(other.value)

    def __hash__(self) -> int:
        return hash(_key(self.value))


@dataclass(frozen=True)
class Group:
    """Values that belong together: a tuple, list, dict (keys and values in turn), slice, device or a choice by mode."""

    kind: Literal["tuple", "list", "dict", "slice", "device", "mode"]
    items: tuple[Any, ...]


@dataclass(frozen=True)
class Attr:
    """A parameter, buffer or other attribute that is read: ``trunk.fc.weight``."""

    path: str


@dataclass(eq=False, slots=True)
class Operation:
    """One thing that is done, and the value that it gives; equal only to itself.

    ``how`` is ``recompute`` or ``without gradient`` of what is called through these words. ``loss`` is the loss that it
    is done for, of the plan's operations.
    """

    kind: Kind
    target: str
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()
    line: int = 0
    how: str = ""
    loss: str = ""

    def reads(self) -> Iterator[Operation]:
        """Yield the operations whose values it reads."""
        for value in (*self.args, *(value for _, value in self.kwargs)):
            yield from operations_in(value)


def operations_in(value: Any) -> Iterator[Operation]:
    """Yield the operations in a value, also inside tuples, lists and dicts."""
    if isinstance(value, Operation):
        yield value
    elif isinstance(value, Group):
        for item in value.items:
            yield from operations_in(item)


def attributes_in(value: Any) -> Iterator[Attr]:
    """Yield the attributes in a value."""
    if isinstance(value, Attr):
        yield value
    elif isinstance(value, Group):
        for item in value.items:
            yield from attributes_in(item)


def constant(value: Any) -> Any:
    """Return a Python value in the form in which both sides hold it."""
    if isinstance(value, tuple | list):
        kind: Any = "tuple" if isinstance(value, tuple) else "list"
        return Group(kind, tuple(constant(item) for item in value))
    if isinstance(value, dict):
        return Group("dict", tuple(part for k, v in value.items() for part in (constant(k), constant(v))))
    if isinstance(value, slice):
        return Group("slice", tuple(constant(part) for part in (value.start, value.stop, value.step)))
    if isinstance(value, torch.device):
        return Group("device", (Const(str(value)),))
    return value if isinstance(value, Operation | Group | Attr | Const) else Const(value)


def _key(value: Any) -> tuple[str, str]:
    if isinstance(value, float) and math.isnan(value):
        return ("float", "nan")
    return (type(value).__name__, repr(value))


# ------------------------------------------------------------------------------------------------------------- effects

PURE = frozenset({
    "abs", "absolute", "add", "addcdiv", "addcmul", "addmm", "adjoint", "all", "amax", "amin", "aminmax", "any",
    "arange", "argmax", "argmin", "argsort", "as_strided", "atan", "atan2", "baddbmm", "bmm", "bool", "broadcast_to",
    "cat", "ceil", "chunk", "clamp", "clamp_max", "clamp_min", "clip", "clone", "concat", "concatenate", "contiguous",
    "conv1d", "conv2d", "conv3d", "cos", "cross_entropy", "cumsum", "detach", "diagonal", "dim", "div", "divide",
    "double", "einsum", "empty_like", "eq", "erf", "exp", "expand", "expand_as", "expm1", "eye", "fft2", "fftn",
    "flatten", "flip", "float", "floor", "floor_divide", "frac", "full", "full_like", "gather", "ge", "getitem", "glu",
    "gt", "half", "hstack", "index_select", "int", "interpolate", "invert", "irfft2", "is_floating_point", "isfinite",
    "isinf", "isnan", "kthvalue", "le", "lerp", "linear", "linspace", "log", "log1p", "log2", "log_softmax",
    "logaddexp", "logical_and", "logical_not", "logical_or", "logsumexp", "long", "lt", "masked_fill", "matmul", "max",
    "maximum", "mean", "median", "meshgrid", "min", "minimum", "mm", "mod", "movedim", "mul", "multiply", "narrow",
    "ndimension", "ne", "neg", "negative", "nelement", "norm", "normalize", "numel", "one_hot", "ones", "ones_like",
    "outer", "pad", "permute", "pixel_shuffle", "pixel_unshuffle", "pos", "pow", "prod", "reciprocal", "relu6",
    "remainder", "repeat", "repeat_interleave", "reshape", "reshape_as", "rfft2", "roll", "round", "rsqrt", "select",
    "sigmoid", "sign", "sin", "size", "softmax", "softplus", "split", "sqrt", "square", "squeeze", "stack", "std",
    "std_mean", "stride", "sub", "subtract", "sum", "swapaxes", "t", "tan", "tanh", "tensor_split", "tile", "to",
    "topk", "transpose", "tril", "triu", "true_divide", "truediv", "type", "type_as", "unbind", "unflatten", "unfold",
    "unsqueeze", "upsample", "var", "var_mean", "view", "view_as", "vstack", "where", "zeros", "zeros_like", "floordiv",
    "and_", "or_", "xor", "lshift", "rshift",
})  # fmt: skip
"""What neither draws by chance nor writes, by name: of tensors, of operators, and of torch's functions.

Everything else keeps its place among what may draw or write."""
_TORCH = ("torch.", "torch.nn.functional.", "torch.linalg.", "torch.fft.", "torch.special.")
_FREE = frozenset({"input", "property", "part", "gathered", "share"})


_REFORMS = frozenset({
    "as_strided_", "resize_", "resize_as_", "set_", "squeeze_", "swapaxes_", "swapdims_", "t_", "transpose_",
    "unsqueeze_",
})  # fmt: skip


def reforms(operation: Operation) -> bool:
    """Tell whether an operation changes the shape of a tensor in place: views taken before and after it differ."""
    return operation.kind in ("method", "function") and operation.target.rpartition(".")[2] in _REFORMS


def is_free(operation: Operation) -> bool:
    """Tell whether an operation only names a value that exists: done twice, or later, it changes nothing."""
    if operation.kind in _FREE:
        return True
    if operation.kind == "method" and operation.target == "detach":
        return len(operation.args) == 1 and not operation.kwargs
    return operation.kind == "operator" and operation.target == "getitem" and _is_plain(operation.args[1:])


def is_pure(operation: Operation) -> bool:
    """Tell whether an operation neither draws nor writes."""
    if is_free(operation):
        return True
    if operation.kind in ("method", "operator"):
        return operation.target in PURE
    if operation.kind != "function":
        return False
    home, _, name = operation.target.rpartition(".")
    options = any(key in ("out", "inplace") for key, _ in operation.kwargs)
    return f"{home}." in _TORCH and name in PURE and not options and Const(True) not in operation.args


def may_write(operation: Operation, modules: dict[str, nn.Module]) -> bool:
    """Tell whether an operation may write into memory that others read; ``modules`` are those it may call, by path."""
    if is_pure(operation):
        return False
    if operation.kind == "module":
        module = modules.get(operation.target)
        known = type(module).__module__.startswith("torch.nn.modules.")
        if module is None or not known or getattr(module, "inplace", False) is not False:
            return True
        return next(module.children(), None) is not None
    return True


def _is_plain(values: Iterable[Any]) -> bool:
    """Tell whether values are constants: an index of these gives a view."""
    return all(
        (isinstance(value, Const) and not isinstance(value.value, bool))
        or (isinstance(value, Group) and value.kind in ("tuple", "slice") and _is_plain(value.items))
        for value in values
    )


_WORDS_OF_PARTS = {"micro": "micro_batches", "exact": "exact_parts"}


def words_of(operation: Operation) -> Iterator[str]:
    """Yield the functions of ``localize.ops`` by which an operation of a plan is written."""
    if operation.kind in _WORDS_OF_PARTS:
        yield _WORDS_OF_PARTS[operation.kind]
    if operation.how:
        yield operation.how.replace(" ", "_")
    if operation.kind in ("function", "pull") and operation.target.startswith("localize.ops."):
        yield operation.target.removeprefix("localize.ops.")


# ------------------------------------------------------------------------------------------------------------ printing


def show(value: Any, depth: int = 2) -> str:
    """Write a value down for a reader, at most ``depth`` operations deep."""
    match value:
        case Const():
            return repr(value.value)
        case Attr():
            return value.path
        case Group("mode", (train, other)):
            return f"{show(train, depth)} if trunk.training else {show(other, depth)}"
        case Group("list"):
            return f"[{', '.join(show(item, depth) for item in value.items)}]"
        case Group("tuple"):
            return f"({', '.join(show(item, depth) for item in value.items)})"
        case Group():
            return f"{value.kind}({', '.join(show(item, depth) for item in value.items)})"
        case Operation():
            return _shown(value, depth)
    return str(value)


def _shown(operation: Operation, depth: int) -> str:
    if operation.kind in ("input", "share"):
        return operation.target
    if depth == 0:
        return "..."
    args = [show(arg, depth - 1) for arg in operation.args]
    options = [f"{key}={show(value, depth - 1)}" for key, value in operation.kwargs]
    if operation.kind == "backward":
        return f"optimizer.scale({args[0]}).backward()" if operation.target else f"{args[0]}.backward()"
    if operation.kind == "optimizer":
        return operation.target
    if operation.kind in ("part", "gathered"):
        return args[0]
    if operation.kind == "property":
        return f"{args[0]}.{operation.target}"
    if operation.kind == "method":
        return f"{args[0]}.{operation.target}({', '.join((*args[1:], *options))})"
    if operation.kind == "operator" and operation.target == "getitem":
        return f"{args[0]}[{args[1]}]"
    name = operation.target.replace("torch.nn.functional.", "F.").removeprefix("localize.ops.")
    if operation.kind == "operator":
        name = f"operator.{name}"
    called = f"{name}({', '.join((*args, *options))})"
    return f"{called} through {operation.how}" if operation.how else called
