"""Run each function of a text once for all functions that compute the same, on tensors without values.

The cost of a function (bytes at every operation, arithmetic, traffic) depends on its text, on the forms of its modules
and values, and on which gradients already exist. Among calls that agree in all of these, only the first is followed.
For the others, empty results and gradients are made, and the meter adds the costs of the first call. The step of a deep
net thus takes little more work than its distinct segments, and so do many plans of one net.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import functools
import itertools
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from localize.ops.parts import divide
from localize.torch_names import OPERATIONS, FakeTensors, own_buffers, own_children, own_parameters, pytree, tree_leaves

if TYPE_CHECKING:
    from localize.estimate.memory import Meter
    from localize.runtime.model import LocalModel

ROOTS = ("trunk", "heads")
"""Names in the text for the objects that hold the modules."""


@dataclass(frozen=True)
class Form:
    """The form of a tensor, from which a similar one can be made."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    stored: int
    """Size of its storage in bytes."""
    source: tuple[str, int]
    """Its storage: ``("argument", i)`` for that of the i-th tensor among the arguments, or ``("new", i)``."""
    kind: str
    """The kind that the meter counts it as."""


@dataclass(frozen=True)
class Cost:
    """Costs of one call of a function, relative to its start."""

    rise: int
    """Most bytes that are live during it, above those at its start."""
    kinds: Mapping[str, int]
    """Bytes that are live at that point, by kind."""
    kept: int | None
    """Most bytes beyond those at its start, without gradients, when a backward starts; None if none does."""
    work: tuple[int, int, int, float]
    """As :attr:`localize.estimate.memory.Meter.work`."""
    timeline: tuple[tuple[int, int], ...]
    returned: Any
    """Its result, with forms instead of tensors."""
    gradients: tuple[tuple[int, Form | None], ...]
    """Parameters whose gradients it creates, with their form, or drops (None)."""


@dataclass(frozen=True)
class Called:
    """One call of a training function within the step."""

    function: str
    before: int
    """Bytes that are live when it starts."""
    peak: int
    """Most bytes that are live during it."""
    macs: int
    moved: int
    """Bytes that its operations read and write."""
    seconds: float
    """Predicted seconds on a device, see :mod:`localize.estimate.speed`."""
    key: Any
    """Equal for calls that compute the same."""
    forms: tuple[Any, ...]
    """Shape, strides and type of every tensor among the arguments and in lists; None for other arguments."""
    graded: tuple[int, ...]
    """Identities of the parameters that already had a gradient."""


Known = dict[Any, Cost]
"""Costs of calls by the things they depend on, for one optimizer and one autocast type."""


@dataclass
class Repeats:
    """Wraps the functions of a text while a step of it is followed."""

    local: LocalModel
    """The local model, without values, in train mode."""
    known: Known
    meter: Meter
    kept: Any
    calls: list[Called] = field(default_factory=list)

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a replacement for a function of the text, or for the word that sweeps parts."""

        @functools.wraps(function)
        def call(*values: Any, keep: str = "") -> Any:
            if name == "exact_parts":
                how = (values[1], keep)
                divide([value for value in values[4:] if isinstance(value, Tensor | list)], values[1])
                return self._call(values[0].__name__, values[4:], lambda: function(*values, keep=keep), how)
            return self._call(name, values[2:], lambda: function(*values), None)

        return call

    def _call(self, name: str, values: Sequence[Any], run: Callable[[], Any], how: tuple[int, str] | None) -> Any:
        text, parameters = self._texts(name)
        form = tuple(_shown(value) for value in values)
        graded = tuple(p.grad is not None for p in parameters)
        key = (text, how, form, graded)
        had = tuple(id(p) for p in parameters if p.grad is not None)
        before, seconds, macs, moved = self.meter.held, *self._done()
        if key not in self.known:
            result = self._follow(key, run, parameters, values)
        else:
            result = self._stand_in(self.known[key], parameters, values)
        after = self._done()
        peak = before + self.known[key].rise
        done = (after[1] - macs, after[2] - moved, after[0] - seconds)
        self.calls.append(Called(name, before, peak, done[0], done[1], done[2], key, form, had))
        return result

    def _done(self) -> tuple[float, int, int]:
        return self.meter.seconds, self.meter.flops // 2, self.meter.moved

    # -- a call that is followed

    def _follow(self, key: Any, run: Callable[[], Any], parameters: Sequence[Tensor], values: Sequence[Any]) -> Any:
        storages = [weakref.ref(value.untyped_storage()) for value in _tensors(values)]  # some die during the call
        meter, entered, work = self.meter, self.meter.held, self.meter.work
        at, start = len(meter.timeline), meter.flops // 2
        graded = [p.grad is not None for p in parameters]
        level = entered - self.kept.before - self.kept.gradients()
        most, kinds = self.kept.most, meter.by_kind.copy()
        outer = meter.peak, meter.at_peak
        self.kept.most, meter.peak, meter.at_peak = -1, entered, kinds
        result = run()
        rise, kept = meter.peak - entered, self.kept.most - level if self.kept.most >= 0 else None
        rises = {kind: size - kinds[kind] for kind, size in meter.at_peak.items()}
        if outer[0] >= meter.peak:
            meter.peak, meter.at_peak = outer
        self.kept.most = max(most, self.kept.most)
        sources = {id(alive): ("argument", i) for i, one in enumerate(storages) if (alive := one()) is not None}
        made = pytree.tree_map(lambda v: _form(v, sources, meter) if isinstance(v, Tensor) else v, result)
        gradients = tuple(
            (i, None if p.grad is None else _form(p.grad, {}, meter))
            for i, (p, had) in enumerate(zip(parameters, graded, strict=True))
            if had != (p.grad is not None)
        )
        line = tuple((macs - start, held - entered) for macs, held in meter.timeline[at:])
        done = tuple(now - then for now, then in zip(meter.work, work, strict=True))
        self.known[key] = Cost(rise, rises, kept, done, line, made, gradients)  # type: ignore[arg-type]
        return result

    # -- one that is not

    def _stand_in(self, cost: Cost, parameters: Sequence[Tensor], values: Sequence[Any]) -> Any:
        meter, entered, start = self.meter, self.meter.held, self.meter.flops // 2
        if cost.kept is not None:
            level = entered - self.kept.before - self.kept.gradients()
            self.kept.most = max(self.kept.most, level + cost.kept)
        meter.timeline += [(start + macs, entered + held) for macs, held in cost.timeline]
        peak, kinds = meter.peak, meter.at_peak
        if entered + cost.rise > peak:
            peak, kinds = entered + cost.rise, meter.by_kind + Counter(cost.kinds)
        with meter.unseen(cost.work):
            fakes = FakeTensors()
            made = _Made(meter, fakes, {("argument", i): v.untyped_storage() for i, v in enumerate(_tensors(values))})
            leaves, spec = pytree.tree_flatten(cost.returned, is_leaf=lambda value: isinstance(value, Form))
            result = pytree.tree_unflatten([made(v) if isinstance(v, Form) else v for v in leaves], spec)
            made.storages.clear()
            for i, form in cost.gradients:
                parameters[i].grad = None if form is None else _Made(meter, fakes, {})(form)
            for value in values:
                if isinstance(value, list):
                    value.clear()
        meter.peak, meter.at_peak = peak, kinds
        return result

    # -- what a function depends on

    def _texts(self, name: str) -> tuple[str, list[Tensor]]:
        function = self._functions[name]
        as_written = _named_by_number(function)  # functions with the same text also read the same modules
        if as_written not in self._read:
            reader = _Reader(self.local, self._functions)
            self._read[as_written] = (reader.text_of(name), reader.parameters)
        return self._read[as_written]

    @functools.cached_property
    def _read(self) -> dict[str, tuple[str, list[Tensor]]]:
        return {}

    @functools.cached_property
    def _functions(self) -> Mapping[str, ast.FunctionDef]:
        tree = ast.parse(self.local.source)
        return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    return (value for value in tree_leaves(list(values)) if isinstance(value, Tensor))


def _form(tensor: Tensor, sources: dict[int, tuple[str, int]], meter: Meter) -> Form:
    source = sources.setdefault(id(tensor.untyped_storage()), ("new", len(sources)))
    stored = tensor.untyped_storage().nbytes()
    offset = int(tensor.storage_offset())
    return Form(tuple(tensor.shape), tensor.stride(), tensor.dtype, offset, stored, source, meter.kind_of(tensor))


@dataclass
class _Made:
    """Makes tensors without values from forms, and counts them."""

    meter: Meter
    fakes: FakeTensors
    storages: dict[tuple[str, int], torch.UntypedStorage]

    def __call__(self, form: Form) -> Tensor:
        if form.source not in self.storages:
            new = self.fakes.empty((form.stored // form.dtype.itemsize,), (1,), form.dtype)
            with self.meter.making(form.kind):
                self.meter.add(new)
            self.storages[form.source] = new.untyped_storage()
        return self.fakes.view(self.storages[form.source], form.shape, form.stride, form.offset, form.dtype)


def _shown(value: Any) -> Any:
    """Return the properties of an argument on which a call depends."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    if isinstance(value, list):
        return tuple(_shown(part) for part in value)
    return None


_UNIQUE = itertools.count()


class _Reader(ast.NodeTransformer):
    """Rewrites a function of the text, so that functions that compute the same get the same text.

    Names of values become numbers; called functions, and the forms of modules and tensors, are written out in place.
    """

    def __init__(self, local: LocalModel, functions: Mapping[str, ast.FunctionDef]) -> None:
        self.roots = {"trunk": local.trunk, "heads": local.heads}
        self.functions = functions
        self.parameters: list[Tensor] = []
        self._numbers: dict[int, int] = {}
        self._names: list[dict[str, int]] = []

    def text_of(self, name: str) -> str:
        """Return a text of everything that a function depends on."""
        function = self.functions[name]
        self._names.append({name: number for number, name in enumerate(_own_names(function))})
        body = [node for node in function.body if not _is_doc(node)]
        lines = [ast.unparse(self.visit(_copied(node))) for node in body]
        self._names.pop()
        return "\n".join([str(len(function.args.args)), *lines])

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id in self.roots:
            return node
        if node.id in self._names[-1]:
            return ast.Name(f"v{self._names[-1][node.id]}", node.ctx)
        if node.id in self.functions:
            return ast.Constant(self.text_of(node.id))
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        return self._held(node) or self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        if isinstance(node.value, ast.Name) and node.value.id == "optimizer":
            return node.value
        return self._held(node) or self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        if isinstance(node.op, ast.Mult) and isinstance(node.left, ast.Constant) and isinstance(node.left.value, float):
            node.left = ast.Constant("a factor")  # any other one costs the same: weights of losses differ by segment
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        is_getattr = isinstance(node.func, ast.Name) and node.func.id == "getattr"
        return (self._held(node) if is_getattr else None) or self.generic_visit(node)

    def _held(self, node: ast.expr) -> ast.AST | None:
        """Return the form of the part of the model or the heads that an expression names; None for other objects."""
        root: Any = node
        while isinstance(root, ast.Attribute | ast.Subscript | ast.Call):
            if isinstance(root, ast.Call):
                if not (isinstance(root.func, ast.Name) and root.func.id == "getattr"):
                    return None
                root = root.args[0]
            else:
                root = root.value
        if not isinstance(root, ast.Name) or root.id not in self.roots:
            return None
        try:
            found = eval(compile(ast.Expression(ast.fix_missing_locations(node)), "<path>", "eval"), dict(self.roots))
        except AttributeError:
            return None
        if callable(found) and not isinstance(found, nn.Module | Tensor):
            return None  # a method of a module: the module is written instead
        return ast.Constant(self._told(found))

    def _told(self, value: Any) -> str:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, nn.Module):
            return self._module(value)
        if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device | enum.Enum):
            return repr(value)
        if isinstance(value, list | tuple):
            return f"{type(value).__name__}[{', '.join(map(self._told, value))}]"
        if isinstance(value, set | frozenset):
            return f"set[{', '.join(sorted(map(self._told, value)))}]"
        if isinstance(value, Mapping):
            return f"{{{', '.join(f'{self._told(k)}: {self._told(v)}' for k, v in value.items())}}}"
        if isinstance(value, functools.partial):
            return f"partial {self._told((value.func, value.args, value.keywords))}"
        if isinstance(value, type) or (isinstance(value, types.FunctionType) and not value.__closure__):
            return f"{value.__module__}.{value.__qualname__}"
        if isinstance(value, (types.BuiltinFunctionType, *OPERATIONS)):
            return str(getattr(value, "__name__", value))
        if dataclasses.is_dataclass(value):
            fields = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
            return f"{type(value).__qualname__} {self._told(fields)}"
        return f"{type(value).__qualname__} {next(_UNIQUE)}"  # an unknown object equals nothing else

    def _tensor(self, value: Tensor) -> str:
        known = id(value) in self._numbers
        number = self._numbers.setdefault(id(value), len(self._numbers))
        if not known and isinstance(value, nn.Parameter):
            self.parameters.append(value)
        return f"#{number} {tuple(value.shape)} {value.stride()} {value.dtype} {value.requires_grad}"

    def _module(self, module: nn.Module) -> str:
        known = self._numbers.get(id(module))
        if known is not None:
            return f"#{known}"
        self._numbers[id(module)] = len(self._numbers)
        kind = type(module)
        if isinstance(module, fx.GraphModule):
            lines = ["graph", *self._graph(module)]
        else:
            lines = [f"{kind.__module__}.{kind.__qualname__}"]
            lines += [f"{name}: {self._told(child)}" for name, child in own_children(module).items()]
        for held in (own_parameters(module), own_buffers(module)):
            lines += [f"{name}: {self._told(tensor)}" for name, tensor in held.items()]
        for name, value in vars(module).items():
            graph = isinstance(module, fx.GraphModule) and (name.startswith("_") or name in ("meta", "graph"))
            if name not in _HELD and not graph and not (isinstance(value, dict) and not value):
                lines.append(f"{name}: {self._told(value)}")
        return "(" + "; ".join(lines) + ")"

    def _graph(self, module: fx.GraphModule) -> Iterator[str]:
        numbers: dict[fx.Node, str] = {}
        for node in module.graph.nodes:
            told = ""
            if node.op == "call_module":
                told = self._told(module.get_submodule(str(node.target)))
            elif node.op == "get_attr":
                held: Any = module
                for part in str(node.target).split("."):
                    held = getattr(held, part)
                told = self._told(held)
            elif node.op in ("call_function", "call_method"):
                told = str(getattr(node.target, "__name__", node.target))
            numbers[node] = f"n{len(numbers)}"
            arguments = fx.map_arg((node.args, node.kwargs), lambda n: numbers[n])
            yield f"{node.op} {told} {arguments}"


_HELD = frozenset({"_parameters", "_buffers", "_modules"})


def _own_names(function: ast.FunctionDef) -> list[str]:
    """Return the names of a function's arguments and of what it assigns to, each once."""
    own = [argument.arg for argument in function.args.args]
    own += [node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    return list(dict.fromkeys(own))


def _named_by_number(function: ast.FunctionDef) -> str:
    """Return the text of a function without its name, and with numbers for the names that it assigns."""
    numbers = {name: number for number, name in enumerate(_own_names(function))}
    body = [_copied(node) for node in function.body if not _is_doc(node)]
    for node in (found for statement in body for found in ast.walk(statement)):
        if isinstance(node, ast.Name) and node.id in numbers:
            node.id = f"v{numbers[node.id]}"
    return "\n".join([str(len(function.args.args)), *map(ast.unparse, body)])


def _is_doc(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _copied(node: ast.stmt) -> ast.stmt:
    return ast.parse(ast.unparse(node)).body[0]
