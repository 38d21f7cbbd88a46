"""Record the forward of a model as a graph over the user's own modules.

One real forward is run on a copy without data (meta device), in train mode, while every torch function and every leaf
module that is called is written down. Nothing is a proxy, so control flow, shapes, lists and in-place writes behave as
they do in training. Three differences are taken between recordings, so that nothing is baked in:

- batch sizes 3 and 5 (verified at 7): a constant that differs is ``a * batch + b``;
- train and eval: a constant that differs is chosen by ``training`` when the graph runs;
- twice the same: a model whose recordings differ is not deterministic, and is refused.

The user's model is never touched: no attribute, no cache entry, no mode, no random state.
"""

from __future__ import annotations

import contextlib
import copy
import operator
import random
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from localize import cost, ops
from localize.errors import ModelError, TraceError
from localize.ir import Trunk

BATCHES = (3, 5, 7)


def trace(model: nn.Module, example_input: Tensor, *, name: str | None = None) -> Trunk:
    """Record the forward of ``model``.

    Args:
        model: any module whose forward takes one tensor; it is not changed.
        example_input: a batch (N, C, H, W) of the shape and type that the model will be trained on; values are unused.
        name: how reports call the model; default is its class.

    Raises:
        ModelError: the model is wrapped (DDP, compiled, scripted) or is not a module.
        TraceError: the forward reads values of tensors, is not deterministic, or leaves torch.
    """
    check_model(model)
    _warn_of_hooks(model)
    recordings, twin, leaves = _record_all(model, example_input)
    graph, eval_differs = _build(recordings, twin)
    output = _output_node(graph)
    _add_costs(graph, meta_twin(model), tuple(example_input.shape[1:]))  # eval forwards may fill caches of their twin
    return Trunk(
        model=model,
        twin=twin,
        graph=graph,
        name=name or type(model).__name__,
        input_shape=tuple(example_input.shape[1:]),
        num_classes=output.meta["shape"][-1],
        state_keys=tuple(model.state_dict()),
        eval_differs=eval_differs,
        leaves=leaves,
    )


def check_model(model: nn.Module) -> None:
    """Refuse what cannot be taken as it is.

    Raises:
        ModelError: with the attribute that holds the plain model, where there is one.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"expected an nn.Module, got {type(model).__name__} {str(model)[:60]!r}.",
            help="localize.zoo.create_model(name) makes a model from its name",
        )
    kind = type(model).__name__
    if hasattr(model, "_orig_mod"):
        raise ModelError(
            "the model is compiled (torch.compile).",
            facts="a compiled module hides the graph that is to be cut.",
            help="pass the module you compiled, model._orig_mod",
        )
    if kind in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"):
        raise ModelError(
            f"the model is wrapped in {kind}.",
            facts="its single backward hook is wrong for one backward per segment.",
            help="pass the module inside, model.module",
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("the model is a ScriptModule.", help="pass the Python module it was scripted from")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError(f"{kind} has no trainable parameter.", help="set requires_grad=True on what is to be trained")
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
            raise ModelError(
                f"module {path!r} is lazy and has no shape yet.", help="run one forward on the model before"
            )


def _warn_of_hooks(model: nn.Module) -> None:
    hooked = [p for p, m in model.named_modules() if not is_leaf(m) and (m._forward_hooks or m._forward_pre_hooks)]
    if hooked:
        warnings.warn(
            f"forward hooks on {', '.join(map(repr, hooked))} are recorded once and not called in training: the "
            "generated step calls their inner modules. Put them on a torch.nn module, or remove them.",
            stacklevel=3,
        )


# ---------------------------------------------------------------------------------------------------------- recording


@dataclass(frozen=True)
class _Ref:
    """The tensor that record number ``index`` returned."""

    index: int


@dataclass
class _Record:
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


class _Unrecorded(Exception):
    """A tensor reached a recorded call without having been recorded itself."""

    def __init__(self, message: str, scope: tuple[tuple[str, str], ...]) -> None:
        self.scope = scope
        super().__init__(message)


def _record_all(model: nn.Module, example: Tensor) -> tuple[dict[tuple[str, int], list[_Record]], nn.Module, tuple]:
    """Record in train and eval mode at three batch sizes; make a module a leaf where its inside cannot be recorded."""
    leaves: list[str] = []
    while True:
        twin = meta_twin(model)
        try:
            with _undisturbed():
                recordings = _record_modes(twin, example, frozenset(leaves))
            _refuse_lazy(recordings, model)
            return recordings, meta_twin(model), tuple(leaves)  # the recorded one may hold what forwards cached
        except _Unrecorded as error:
            path = error.scope[-1][0] if error.scope else ""
            if not path or path in leaves:
                raise TraceError(
                    f"the forward of {type(model).__name__} cannot be recorded.", facts=str(error)
                ) from error
            leaves.append(path)


def _record_modes(twin: nn.Module, example: Tensor, leaves: frozenset[str]) -> dict[tuple[str, int], list[_Record]]:
    def batch(n: int) -> Tensor:
        return torch.empty((n, *example.shape[1:]), dtype=example.dtype, device="meta")

    recordings = {}
    for mode in ("train", "eval"):
        twin.train(mode == "train")
        _Recorder(twin, leaves).record(batch(2))  # not kept: some modules make their buffers in the first forward
        for n in BATCHES:
            recordings[mode, n] = _Recorder(twin, leaves).record(batch(n))
        again = _Recorder(twin, leaves).record(batch(BATCHES[0]))
        if difference := _first_difference(recordings[mode, BATCHES[0]], again):
            raise TraceError(
                f"two forwards of {type(twin).__name__} on the same input are not the same.",
                facts=difference,
                help="draw random numbers with torch functions, not with random or numpy",
            )
    twin.train()
    return recordings


def _refuse_lazy(recordings: dict[tuple[str, int], list[_Record]], model: nn.Module) -> None:
    """Refuse a model whose forward reads tensors that only its first forward makes."""
    for record in (r for recording in recordings.values() for r in recording if r.kind == "get_attr"):
        path, _, name = record.target.rpartition(".")
        value = getattr(model.get_submodule(path), name, None)
        if not isinstance(value, Tensor) or tuple(value.shape) != record.shape:
            raise TraceError(
                f"{type(model).__name__} makes {record.target!r} only in its first forward.",
                help="run model(example_input) once before",
            )


def _run(twin: nn.Module, x: Tensor) -> Any:
    """Run the twin; say where in the user's code it fails.

    Raises:
        TraceError: with file, line and the source line.
    """
    try:
        return twin(x)
    except (_Unrecorded, TraceError):
        raise
    except Exception as error:
        raise TraceError(
            f"the forward of {type(twin).__name__} fails on an input of shape {tuple(x.shape)}.",
            facts=[*_user_frame(error), f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"],
            help="check that model(example_input) runs; values of tensors cannot be read while tracing",
        ) from error


def _user_frame(error: BaseException) -> list[str]:
    """Describe the innermost frame that is not inside torch or this file."""
    import linecache

    frames = []
    trace_back = error.__traceback__
    while trace_back is not None:
        frames.append((trace_back.tb_frame.f_code.co_filename, trace_back.tb_lineno))
        trace_back = trace_back.tb_next
    for filename, line in reversed(frames):
        if filename != __file__ and "/torch/" not in filename.replace("\\", "/"):
            return [f"{filename}:{line}: {linecache.getline(filename, line).strip()}"]
    return []


def meta_twin(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` without data: same classes and names, parameters and buffers on the meta device.

    Raises:
        ModelError: the model cannot be deep-copied.
    """
    memo: dict[int, Any] = {}
    for tensor in _tensors_of(model):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = (
            nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        )
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} cannot be copied: {error}", help="check that copy.deepcopy(model) works"
        ) from error


def _tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Yield parameters, buffers, and tensors kept as plain attributes (also in lists and dicts)."""
    for module in model.modules():
        yield from (p for p in module._parameters.values() if p is not None)
        yield from (b for b in module._buffers.values() if b is not None)
        for value in vars(module).values():
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, list | tuple):
                yield from (item for item in value if isinstance(item, Tensor))
            elif isinstance(value, dict):
                yield from (item for item in value.values() if isinstance(item, Tensor))


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Run without leaving a trace in any random state."""
    python, numpy_state = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    random.setstate(python)
    numpy.random.set_state(numpy_state)


class _Recorder(TorchFunctionMode):
    """Write down the calls of one forward."""

    def __init__(self, twin: nn.Module, leaves: frozenset[str]) -> None:
        super().__init__()
        self.twin = twin
        self.paths = {id(module): path for path, module in twin.named_modules()}
        self.leaves = leaves
        self.records: list[_Record] = []
        self.refs: dict[int, _Ref] = {}
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

    def record(self, x: Tensor) -> list[_Record]:
        """Run the twin on ``x`` and return the calls."""
        self._add(_Record("placeholder", "x"), x)
        original = nn.Module.__call__
        recorder = self

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return recorder._module(original, module, args, kwargs)

        nn.Module.__call__ = call
        try:
            with self:
                result = _run(self.twin, x)
        finally:
            nn.Module.__call__ = original
        self.records.append(_Record("output", "output", (self._argument(_first_output(result)),)))
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
        kind, target = _target(func, args, kwargs)
        return self._call(kind, target, func, args, kwargs, args)

    def _refuse_value(self, func: Callable, args: tuple) -> None:
        reference = self.refs.get(id(args[0])) if args else None
        if reference is not None:
            where = _calling_line()
            raise TraceError(
                f"the forward of {type(self.twin).__name__} reads the value of a tensor ({_name_of(func)}).",
                facts=[where, f"inside module {self.scope[-1][0] if self.scope else ''!r}"],
                help="a generated training step is straight-line code: decide on shapes and modes, not on values",
            )

    # -- the common part: run, compare versions, write down

    def _call(self, kind: str, target: Any, func: Callable, args: tuple, kwargs: dict, call_args: tuple) -> Any:
        tensors = list(_flat_tensors((args, kwargs)))
        versions = [tensor._version for tensor in tensors]
        result = func(*call_args, **kwargs)
        mutated = tuple(
            _storage(tensor) for tensor, version in zip(tensors, versions, strict=True) if tensor._version != version
        )
        writes = kind != "call_module" and _name_of(func) == "__setitem__"
        if not mutated and not any(True for _ in _flat_tensors(result)):
            return result  # sizes, dtypes, flags: constants of this recording
        record = _Record(
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
            self._unpack(result, _Ref(len(self.records) - 1))
        return result

    def _add(self, record: _Record, tensor: Tensor | None) -> None:
        self.records.append(record)
        if tensor is None:
            return
        record.shape, record.dtype, record.storage = tuple(tensor.shape), tensor.dtype, _storage(tensor)
        self.refs[id(tensor)] = _Ref(len(self.records) - 1)
        self.alive.append(tensor)

    def _unpack(self, result: Any, reference: _Ref) -> None:
        items = result.items() if isinstance(result, dict) else enumerate(result)
        for key, item in items:
            if isinstance(item, Tensor | list | tuple | dict) and any(True for _ in _flat_tensors(item)):
                record = _Record("call_function", operator.getitem, (reference, key), {}, tuple(self.scope))
                if isinstance(item, Tensor):
                    self._add(record, item)
                else:
                    self._add(record, None)
                    self._unpack(item, _Ref(len(self.records) - 1))

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
        raise _Unrecorded(f"an argument of type {type(value).__name__} at {_calling_line()}", tuple(self.scope))

    def _tensor(self, tensor: Tensor) -> _Ref:
        if id(tensor) in self.refs:
            return self.refs[id(tensor)]
        if id(tensor) in self.attributes:
            self._add(_Record("get_attr", self.attributes[id(tensor)], scope=tuple(self.scope)), tensor)
            return self.refs[id(tensor)]
        raise _Unrecorded(f"a tensor of unknown origin at {_calling_line()}", tuple(self.scope))


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
    if any(cls.__module__.startswith("torch.nn.") and cls is not nn.Module for cls in type(module).__mro__):
        return True
    code = getattr(type(module).forward, "__code__", None)
    names = code.co_names if code is not None else ()
    if "training" in names and not any(True for _ in module.children()):
        return True
    return any(name in names for name in ("autocast", "no_grad", "enable_grad", "set_grad_enabled"))


def _first_output(result: Any) -> Any:
    """Return the logits of a result: itself, or the first tensor of a tuple, a dict ("out", "logits") or a record."""
    if isinstance(result, Tensor):
        return result
    if isinstance(result, list | tuple):
        values = list(result)
    else:
        values = list((result if isinstance(result, dict) else getattr(result, "__dict__", {})).values())
    for value in values:
        if isinstance(value, Tensor):
            return value
    raise TraceError(
        f"the model returns {type(result).__name__}, which holds no tensor.", help="return logits (N, classes)"
    )


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
    import linecache

    frame = sys._getframe(1)
    while frame is not None:
        filename = frame.f_code.co_filename
        if filename != __file__ and "/torch/" not in filename.replace("\\", "/"):
            return f"{filename}:{frame.f_lineno}: {linecache.getline(filename, frame.f_lineno).strip()}"
        frame = frame.f_back
    return "an unknown line"


# ---------------------------------------------------------------------------------------------------- naming functions

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


def _reflected(op: Callable) -> Callable:
    def call(x: Any, y: Any) -> Any:
        return op(y, x)

    return call


def _name_of(func: Any) -> str:
    return getattr(func, "__name__", str(func))


_WRITTEN_AS = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv, "matmul": operator.matmul,
    "neg": operator.neg,
}  # fmt: skip
"""Methods under which torch reports what the user wrote as an operator."""


def _target(func: Any, args: tuple, kwargs: dict) -> tuple[str, Any]:
    """Return the fx opcode and target for a torch function."""
    name = _name_of(func)
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


# ------------------------------------------------------------------------------------------- differences, and the graph


@dataclass(frozen=True)
class _Batch:
    """The integer ``scale * batch + offset``."""

    scale: int
    offset: int


@dataclass(frozen=True)
class _ByMode:
    train: Any
    eval: Any


class _Differs(Exception):
    """Two recordings do not have the same structure."""


def _first_difference(left: Sequence[_Record], right: Sequence[_Record]) -> str:
    for a, b in zip(left, right, strict=False):
        if (a.kind, a.args, a.kwargs) != (b.kind, b.args, b.kwargs) or a.target != b.target:
            scope = a.scope[-1][0] if a.scope else ""
            return f"first difference: {a.target} in module {scope!r} with {_short(a.args)} and {_short(b.args)}"
    return "" if len(left) == len(right) else f"{len(left)} and {len(right)} operations"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 80 else text[:77] + "..."


def _merge(values: Sequence[Any], combine: Callable[[Sequence[Any]], Any]) -> Any:
    """Merge arguments of equal structure; ``combine`` decides about constants that differ."""
    first = values[0]
    if all(type(value) is type(first) for value in values):
        if isinstance(first, list | tuple):
            if len({len(value) for value in values}) > 1:
                raise _Differs
            items = [_merge(column, combine) for column in zip(*values, strict=True)]
            return items if isinstance(first, list) else tuple(items)
        if isinstance(first, dict):
            if len({tuple(value) for value in values}) > 1:
                raise _Differs
            return {key: _merge([value[key] for value in values], combine) for key in first}
        if isinstance(first, slice):
            parts = [(value.start, value.stop, value.step) for value in values]
            return slice(*_merge(parts, combine))
        if all(value == first for value in values):
            return first
        if isinstance(first, _Ref):
            raise _Differs
    return combine(values)


def _by_batch(values: Sequence[Any]) -> Any:
    """Return the ``scale * batch + offset`` that gives ``values`` at the recorded batch sizes."""
    if not all(type(value) is int for value in values):
        raise _Differs
    (n0, n1, n2), (v0, v1, v2) = BATCHES, values
    scale, rest = divmod(v1 - v0, n1 - n0)
    offset = v0 - scale * n0
    if rest or v2 != scale * n2 + offset:
        raise _Differs
    return _Batch(scale, offset)


def _merge_records(recordings: Sequence[Sequence[_Record]], combine: Callable) -> list[_Record]:
    if len({len(recording) for recording in recordings}) > 1:
        raise _Differs
    merged = []
    for column in zip(*recordings, strict=True):
        first = column[0]
        if any((record.kind, record.target) != (first.kind, first.target) for record in column):
            raise _Differs
        record = copy.copy(first)
        record.args = _merge([r.args for r in column], combine)
        record.kwargs = _merge([r.kwargs for r in column], combine)
        record.storage = column[0].storage
        merged.append(record)
    return merged


def _build(recordings: dict[tuple[str, int], list[_Record]], twin: nn.Module) -> tuple[fx.Graph, bool]:
    """Merge the recordings into one graph. The flag says that eval has another structure, and is left out."""
    train = [recordings["train", n] for n in BATCHES]
    try:
        records = _merge_records(train, _by_batch)
    except _Differs:
        raise TraceError(
            f"the forward of {type(twin).__name__} does other things for other batch sizes.",
            facts=_first_difference(train[0], train[1]),
            help="a training step is generated for any batch size: do not decide on x.shape[0]",
        ) from None
    batched = [_is_batched([recording[i] for recording in train]) for i in range(len(records))]
    try:
        in_eval = _merge_records([recordings["eval", n] for n in BATCHES], _by_batch)
        records = _merge_records([records, in_eval], lambda pair: _ByMode(*pair))
        differs = False
    except _Differs:
        differs = True
    return _Builder(records, batched).graph(), differs


def _is_batched(column: Sequence[_Record]) -> bool:
    shapes = [record.shape for record in column]
    if any(shape is None or not shape for shape in shapes):
        return False
    return all(shape[0] == n for shape, n in zip(shapes, BATCHES, strict=True)) and len({s[1:] for s in shapes}) == 1


class _Builder:
    """Turn merged records into an fx graph; batch sizes, modes and devices become nodes."""

    def __init__(self, records: list[_Record], batched: list[bool]) -> None:
        self.records, self.batched = records, batched
        self.fx = fx.Graph()
        self.nodes: list[fx.Node] = []
        self.shared: dict[Any, fx.Node] = {}

    def graph(self) -> fx.Graph:
        """Return the graph, without operations that nothing uses."""
        for record, batched in zip(self.records, self.batched, strict=True):
            node = self._node(record)
            node.meta.update(
                shape=record.shape[1:] if batched else record.shape,
                dtype=record.dtype,
                batched=batched,
                scope=record.scope,
                storage=record.storage,
                mutates=record.mutates,
                random=_is_random(record),
            )
            self.nodes.append(node)
        _mark_dependence(self.fx)
        _drop_unused(self.fx)
        self.fx.lint()
        return self.fx

    def _node(self, record: _Record) -> fx.Node:
        args, kwargs = self._value(record.args), self._value(record.kwargs)
        if record.kind == "placeholder":
            return self.fx.placeholder(record.target)
        if record.kind == "output":
            return self.fx.output(args[0])
        if record.kind == "get_attr":
            return self._attribute(record.target)
        if record.kind == "property":
            return self.fx.call_function(getattr, (args[0], record.target))
        if record.kind == "reflected":
            return self.fx.call_function(record.target, (args[1], args[0]))
        return self.fx.create_node(record.kind, record.target, tuple(args), kwargs)

    def _attribute(self, path: str) -> fx.Node:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the graph has no owning module yet
            return self.fx.get_attr(path)

    def _value(self, value: Any) -> Any:
        if isinstance(value, _Ref):
            return self.nodes[value.index]
        if isinstance(value, list | tuple):
            items = [self._value(item) for item in value]
            return items if isinstance(value, list) else tuple(items)
        if isinstance(value, dict):
            return {key: self._value(item) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(*(self._value(item) for item in (value.start, value.stop, value.step)))
        if isinstance(value, _ByMode):
            train, evaluated = self._value(value.train), self._value(value.eval)
            return self._support("training", ops.by_mode, (self._training(), train, evaluated))
        if isinstance(value, _Batch):
            return self._batch(value)
        if isinstance(value, torch.device):
            return self._once("device", lambda: self._support("device", getattr, (self.nodes[0], "device")))
        return value

    def _training(self) -> fx.Node:
        def make() -> fx.Node:
            node = self._attribute("training")
            node.meta.update(support=True)
            return node

        return self._once("training", make)

    def _batch(self, value: _Batch) -> fx.Node:
        node = self._once("batch", lambda: self._support("batch", "size", (self.nodes[0], 0)))
        if value.scale != 1:
            node = self._once(("scale", value.scale), lambda: self._support("n", operator.mul, (node, value.scale)))
        if value.offset:
            scaled = node
            node = self._once(value, lambda: self._support("n", operator.add, (scaled, value.offset)))
        return node

    def _support(self, name: str, target: Any, args: tuple) -> fx.Node:
        """Make a node whose value is no tensor: computed anew in every segment that needs it."""
        kind = "call_method" if isinstance(target, str) else "call_function"
        node = self.fx.create_node(kind, target, args, name=name)
        node.meta.update(support=True)
        return node

    def _once(self, key: Any, make: Callable[[], fx.Node]) -> fx.Node:
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]


_RANDOM_FACTORIES = {"rand", "randn", "randint", "randperm", "bernoulli", "normal", "rand_like", "randn_like"}


def _is_random(record: _Record) -> bool:
    return record.kind == "call_function" and _name_of(record.target) in _RANDOM_FACTORIES


def _mark_dependence(graph: fx.Graph) -> None:
    """Mark values that depend on the input (or on chance): they cross cuts. All others are computed where needed."""
    for node in graph.nodes:
        if node.meta.get("support"):
            node.meta.update(depends=False, shape=None, batched=False, scope=(), storage=None, mutates=())
            continue
        node.meta["depends"] = (
            node.op == "placeholder"
            or node.meta.get("random", False)
            or any(parent.meta["depends"] for parent in node.all_input_nodes)
        )


def _drop_unused(graph: fx.Graph) -> None:
    """Remove operations whose value, and whose writes, nothing that is kept reads."""
    read_later: set[int] = set()
    for node in reversed(list(graph.nodes)):
        writes_what_is_read = any(storage in read_later for storage in node.meta.get("mutates", ()))
        if node.op in ("output", "placeholder") or node.users or writes_what_is_read:
            read_later.update(
                parent.meta["storage"] for parent in node.all_input_nodes if parent.meta.get("storage") is not None
            )
        else:
            graph.erase_node(node)


def _add_costs(graph: fx.Graph, twin: nn.Module, input_shape: tuple[int, ...]) -> None:
    counts = cost.of_nodes(graph, twin, input_shape)
    for node in graph.nodes:
        node.meta.update(macs=counts[node.name].macs, fvcore_flops=counts[node.name].fvcore_flops)


def _output_node(graph: fx.Graph) -> fx.Node:
    return next(node for node in graph.nodes if node.op == "output").args[0]
