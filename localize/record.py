"""Run a forward and write down every torch function and every leaf module that it calls."""

from __future__ import annotations

import linecache
import operator
import re
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from localize import ops
from localize.errors import ModelError, TraceError


@dataclass(frozen=True)
class Ref:
    """The tensor that record number ``index`` returned."""

    index: int


@dataclass
class Record:
    kind: str
    """placeholder | get_attr | call_module | call_function | call_method | output"""
    target: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    scope: tuple[tuple[str, str], ...] = ()
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    storage: int | None = None
    mutates: tuple[int, ...] = ()


class Unrecorded(Exception):
    """A tensor reached a recorded call without having been recorded itself."""

    def __init__(self, message: str, scope: tuple[tuple[str, str], ...]) -> None:
        self.scope = scope
        super().__init__(message)


class Recorder(TorchFunctionMode):
    """Write down the calls of one forward."""

    def __init__(self, twin: nn.Module, leaves: frozenset[str]) -> None:
        super().__init__()
        self.twin = twin
        self.paths = {id(module): path for path, module in twin.named_modules()}
        self.leaves = leaves
        self.records: list[Record] = []
        self.refs: dict[int, Ref] = {}
        self.alive: list[Any] = []  # keeps every tensor, so that an id names one tensor only
        self.scope: list[tuple[str, str]] = []
        self.inside_leaf = False
        self.attributes: dict[int, str] = {}
        for path, module in twin.named_modules():
            prefix = f"{path}." if path else ""
            owned = [*module._parameters.items(), *module._buffers.items(), *vars(module).items()]
            for name, value in owned:
                if isinstance(value, Tensor):
                    self.attributes.setdefault(id(value), prefix + name)

    def record(self, x: Tensor) -> list[Record]:
        """Run the twin on ``x`` and return the calls."""
        self._add(Record("placeholder", "x"), x)
        original, apply = nn.Module.__call__, torch.autograd.Function.__dict__["apply"]
        recorder = self
        self.autocast = torch.is_autocast_enabled("cpu")

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return recorder._module(original, module, args, kwargs)

        def apply_custom(cls: type, *args: Any, **kwargs: Any) -> Any:
            if not recorder.inside_leaf:
                recorder._refuse_region(f"{cls.__name__} has a backward of its own (torch.autograd.Function)")
            return apply.__get__(None, cls)(*args, **kwargs)

        nn.Module.__call__ = call
        torch.autograd.Function.apply = classmethod(apply_custom)
        try:
            with torch.device("meta"), self:  # tensors that the forward makes lie beside those of the twin
                result = _run(self.twin, x)
        finally:
            nn.Module.__call__ = original
            torch.autograd.Function.apply = apply
        logits, others = _outputs(result)
        further = {name: self._argument(value) for name, value in others.items()}
        self.records.append(Record("output", "output", (self._argument(logits),), further))
        return self.records

    # -- modules

    def _module(self, original: Callable, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        path = self.paths.get(id(module))
        if self.inside_leaf or path is None:
            return original(module, *args, **kwargs)
        if not (is_leaf(module) or path in self.leaves) or path == "":
            self.scope.append((path, type(module).__name__))
            try:
                return original(module, *args, **kwargs)
            finally:
                self.scope.pop()
        self.inside_leaf = True
        try:
            return self._call("call_module", path, original, args, kwargs, (module, *args))
        finally:
            self.inside_leaf = False

    # -- functions

    def __torch_function__(self, func: Callable, types_: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self.inside_leaf:
            return func(*args, **kwargs)
        if func in _READS_VALUES:
            self._refuse_value(func, args)
        if func is Tensor.register_hook:
            self._refuse_region("a hook on a tensor changes its gradient")
        kind, target = _target(func, args, kwargs)
        return self._call(kind, target, func, args, kwargs, args)

    def _refuse_region(self, what: str) -> None:
        """Refuse to look into a module that does what a list of calls does not show; it is called whole instead."""
        raise Unrecorded(f"{what} at {_calling_line()}", tuple(self.scope))

    def _refuse_value(self, func: Callable, args: tuple) -> None:
        reference = self.refs.get(id(args[0])) if args else None
        if reference is not None:
            where = _calling_line()
            raise TraceError(
                f"the forward of {type(self.twin).__name__} reads the value of a tensor ({name_of(func)}).",
                facts=[where, f"inside module {self.scope[-1][0] if self.scope else ''!r}"],
                help="a generated training step is straight-line code: decide on shapes and modes, not on values",
            )

    # -- the common part: run, compare versions, write down

    def _call(self, kind: str, target: Any, func: Callable, args: tuple, kwargs: dict, call_args: tuple) -> Any:
        tensors = list(_flat_tensors((args, kwargs)))
        own = list(call_args[0].parameters()) if kind == "call_module" else []
        if not torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, *own)):
            self._refuse_region("gradients are switched off (torch.no_grad)")
        if torch.is_autocast_enabled("cpu") != self.autocast:
            self._refuse_region("autocast is switched on or off")
        versions = [tensor._version for tensor in tensors]
        result = func(*call_args, **kwargs)
        mutated = tuple(
            _storage(tensor) for tensor, version in zip(tensors, versions, strict=True) if tensor._version != version
        )
        writes = kind != "call_module" and name_of(func) == "__setitem__"
        if not mutated and not any(True for _ in _flat_tensors(result)):
            return result  # sizes, dtypes, flags: constants of this recording
        record = Record(
            kind,
            target,
            tuple(self._argument(a) for a in args),
            {key: self._argument(value) for key, value in kwargs.items()},
            tuple(self.scope),
            mutates=mutated,
        )
        if writes:
            record.kind, record.target = "call_function", ops.set_item
            self._add(record, args[0])
        elif result is None and mutated:
            self._add(record, tensors[0])
        elif isinstance(result, Tensor):
            self._add(record, result)
        else:
            self._add(record, None)
            self._unpack(result, Ref(len(self.records) - 1))
        return result

    def _add(self, record: Record, tensor: Tensor | None) -> None:
        self.records.append(record)
        if tensor is None:
            return
        record.shape, record.dtype, record.storage = tuple(tensor.shape), tensor.dtype, _storage(tensor)
        self.refs[id(tensor)] = Ref(len(self.records) - 1)
        self.alive.append(tensor)

    def _unpack(self, result: Any, reference: Ref) -> None:
        items = result.items() if isinstance(result, dict) else enumerate(result)
        for key, item in items:
            if isinstance(item, Tensor | list | tuple | dict) and any(True for _ in _flat_tensors(item)):
                record = Record("call_function", operator.getitem, (reference, key), {}, tuple(self.scope))
                if isinstance(item, Tensor):
                    self._add(record, item)
                else:
                    self._add(record, None)
                    self._unpack(item, Ref(len(self.records) - 1))

    def _argument(self, value: Any) -> Any:
        """Return ``value`` with every tensor replaced by a reference."""
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, torch.Size):
            return tuple(value)
        if isinstance(value, list | tuple):
            items = [self._argument(item) for item in value]
            return items if isinstance(value, list) else tuple(items)
        if isinstance(value, dict):
            return {key: self._argument(item) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(*(self._argument(item) for item in (value.start, value.stop, value.step)))
        if isinstance(value, numpy.generic):
            return value.item()
        if value is None or value is Ellipsis or isinstance(value, _CONSTANTS):
            return value
        raise Unrecorded(f"an argument of type {type(value).__name__} at {_calling_line()}", tuple(self.scope))

    def _tensor(self, tensor: Tensor) -> Ref:
        if id(tensor) in self.refs:
            return self.refs[id(tensor)]
        if id(tensor) in self.attributes:
            self._add(Record("get_attr", self.attributes[id(tensor)], scope=tuple(self.scope)), tensor)
            return self.refs[id(tensor)]
        raise Unrecorded(f"a tensor of unknown origin at {_calling_line()}", tuple(self.scope))


_CONSTANTS = (bool, int, float, complex, str, torch.dtype, torch.device, torch.memory_format, torch.layout)

_READS_VALUES = {
    getattr(Tensor, name)
    for name in ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__")
}

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def is_leaf(module: nn.Module) -> bool:
    """Tell whether a module is called as it is, and not looked into.

    Leaves are the modules of ``torch.nn`` and what is derived from them (not containers), modules without children that
    read ``self.training``, and modules that open a context whose effect a list of calls does not show.
    """
    if isinstance(module, _CONTAINERS):
        return False
    if isinstance(module, torch.jit.ScriptModule):
        return True
    if any(cls.__module__.startswith("torch.nn.") and cls is not nn.Module for cls in type(module).__mro__):
        return True
    code = getattr(type(module).forward, "__code__", None)
    names = code.co_names if code is not None else ()
    if "training" in names and not any(True for _ in module.children()):
        return True
    return any(name in names for name in ("autocast", "no_grad", "enable_grad", "set_grad_enabled"))


_LOGITS = ("logits", "out")
"""Fields of a result that hold the logits wherever they stand; without them, the first tensor does."""


def _outputs(result: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits of a result, and its other tensors by their names.

    A field of a named tuple, a dict or a record has its own name, an item of a tuple or list is ``output_i``.

    Raises:
        ModelError: there is no tensor in it.
    """
    found = dict(_named_tensors(result, ""))
    if not found:
        raise ModelError(
            f"the model returns {type(result).__name__}, which holds no tensor.", help="return logits (N, classes)"
        )
    main = next((name for name in _LOGITS if name in found), next(iter(found)))
    return found.pop(main), found


def _named_tensors(result: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(result, Tensor):
        yield name or "output", result
        return
    if isinstance(result, dict):
        items = [(str(key), value) for key, value in result.items()]
    elif isinstance(result, list | tuple):
        fields = getattr(result, "_fields", None)
        items = [(fields[i] if fields else f"{name or 'output'}_{i}", value) for i, value in enumerate(result)]
    else:
        items = [(key, value) for key, value in getattr(result, "__dict__", {}).items() if isinstance(value, Tensor)]
    for key, value in sorted(items, key=lambda item: not isinstance(item[1], Tensor)):
        yield from _named_tensors(value, re.sub(r"\W", "_", key))


def _flat_tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _flat_tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _flat_tensors(item)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _calling_line() -> str:
    """Return ``file:line: source`` of the innermost frame outside torch and this file."""
    frame = sys._getframe(1)
    while frame is not None:
        filename = frame.f_code.co_filename
        if filename != __file__ and "/torch/" not in filename.replace("\\", "/"):
            return f"{filename}:{frame.f_lineno}: {linecache.getline(filename, frame.f_lineno).strip()}"
        frame = frame.f_back
    return "an unknown line"


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


def _target(func: Any, args: tuple, kwargs: dict) -> tuple[str, Any]:
    """Return the fx opcode and target for a torch function."""
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


def _run(twin: nn.Module, x: Tensor) -> Any:
    """Run the twin; say where in the user's code it fails.

    Raises:
        TraceError: with file, line and the source line.
    """
    try:
        return twin(x)
    except (Unrecorded, TraceError):
        raise
    except Exception as error:
        raise TraceError(
            f"the forward of {type(twin).__name__} fails on an input of shape {tuple(x.shape)}.",
            facts=[*_user_frame(error), f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"],
            help="check that model(example_input) runs; values of tensors cannot be read while tracing",
        ) from error


def _user_frame(error: BaseException) -> list[str]:
    """Describe the innermost frame that is not inside torch or this file."""
    frames = []
    trace_back = error.__traceback__
    while trace_back is not None:
        frames.append((trace_back.tb_frame.f_code.co_filename, trace_back.tb_lineno))
        trace_back = trace_back.tb_next
    for filename, line in reversed(frames):
        if filename != __file__ and "/torch/" not in filename.replace("\\", "/"):
            return [f"{filename}:{line}: {linecache.getline(filename, line).strip()}"]
    return []
