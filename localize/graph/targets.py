"""Say how fx writes a call of torch: the opcode and the target of a node."""

from __future__ import annotations

import operator
import types
from typing import Any

from torch import Tensor

from localize.torch_names import OPERATIONS, without_overload

_OPERATORS = {
    f"__{name}__": getattr(operator, alias)
    for name, alias in [
        *((n, n) for n in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "neg", "invert")),
        *((n, n) for n in ("eq", "ne", "lt", "le", "gt", "ge", "getitem", "lshift", "rshift")),
        ("and", "and_"), ("or", "or_"), ("xor", "xor"), ("div", "truediv"), ("pos", "pos"), ("abs", "abs"),
        *((f"i{n}", f"i{n}") for n in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")),
        ("iand", "iand"), ("ior", "ior"), ("ixor", "ixor"), ("idiv", "itruediv"),
    ]
}  # fmt: skip


_REFLECTED = {
    f"__r{name}__": getattr(operator, alias)
    for name, alias in [
        *((n, n) for n in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")),
        ("and", "and_"), ("or", "or_"), ("xor", "xor"), ("div", "truediv"),
    ]
}  # fmt: skip


def name_of(func: Any) -> str:
    return getattr(func, "__name__", str(func))


_WRITTEN_AS = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv, "matmul": operator.matmul,
    "neg": operator.neg,
}  # fmt: skip
"""Methods under which torch reports what the user wrote as an operator."""


def opcode_and_target(func: Any, args: tuple, kwargs: dict) -> tuple[str, Any]:
    """Return the fx opcode and target for a torch function."""
    if isinstance(func, OPERATIONS):
        return "call_function", without_overload(func)
    name = name_of(func)
    written = name in _WRITTEN_AS and getattr(Tensor, name) is func and not kwargs
    if written and len(args) == (1 if name == "neg" else 2):
        return "call_function", _WRITTEN_AS[name]
    if name == "__get__":  # a property such as x.T
        return "property", func.__self__.__name__
    for dunder in (f"__{name}__", f"__r{name}__"):  # wrapped ones go by the name of what they wrap: pow for __pow__
        if getattr(Tensor, dunder, None) is func:
            name = dunder
    if name in _OPERATORS:
        return "call_function", _OPERATORS[name]
    if name in _REFLECTED:
        return "reflected", _REFLECTED[name]
    if getattr(Tensor, name, None) is func or isinstance(func, types.MethodDescriptorType):
        return "call_method", name
    return "call_function", func
