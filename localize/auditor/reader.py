"""Read the text of a training step, and say what each value is made of.

Takes the source and the modules it is about; runs nothing. ``train_step`` is followed from top to bottom, into every
function it calls. Each operation becomes a :class:`Node` that knows which nodes it reads and whether a gradient flows
back through it, so that "which parameters does this loss reach" is a question about a graph. What is done besides
computing (running a segment, backward, update, zero_grad) becomes an :class:`Event`, in order.

Only a small part of Python is understood: straight-line functions, single assignment, calls of modules, tensors and
importable functions. Everything else is a :class:`Problem` with its line: a text that cannot be followed is not
trusted.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from localize.auditor.names import looked_up
from localize.auditor.reading import (
    FORGOTTEN,
    MOST_NODES,
    TOO_LARGE,
    Bound,
    Const,
    Dotted,
    Event,
    Forgotten,
    Local,
    Node,
    Optimizer,
    Path,
    Problem,
    Reading,
    Ref,
    Sizes,
    Unreadable,
)
from localize.auditor.text import parse

DRIVER = "train_step"
DEPTH = 120
"""How deeply an expression may be nested."""
PULL = "localize.ops.pull"
MICRO_BATCHES = "localize.ops.micro_batches"
EXACT_PARTS = "localize.ops.exact_parts"
RECOMPUTE = "localize.ops.recompute"
WITHOUT_GRADIENT = "localize.ops.without_gradient"

# ----------------------------------------------------------------------------------------------- what torch does

_PLAIN_ATTRIBUTES = {"shape", "device", "dtype", "ndim", "layout", "is_cuda", "requires_grad", "itemsize", "nbytes"}
_VIEW_ATTRIBUTES = {"T", "mT", "H", "mH", "real", "imag"}
_VIEWS = {
    "view", "reshape", "flatten", "unflatten", "transpose", "permute", "movedim", "moveaxis", "swapaxes", "unsqueeze",
    "squeeze", "expand", "expand_as", "view_as", "narrow", "select", "chunk", "split", "tensor_split", "unbind", "t",
    "contiguous", "diagonal", "unfold", "getitem", "to", "type_as", "float", "double", "set_item", "as_strided",
    "hsplit", "vsplit", "adjoint", "getattr", "broadcast_to", "scale_gradient",
}  # fmt: skip
_NO_GRADIENT = {
    "argmax", "argmin", "argsort", "size", "dim", "numel", "stride", "storage_offset", "nelement", "ndimension",
    "eq", "ne", "lt", "le", "gt", "ge", "equal", "isnan", "isinf", "isfinite", "logical_and", "logical_or",
    "logical_not", "logical_xor", "is_contiguous", "is_floating_point", "long", "int", "bool", "short", "byte", "char",
    "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor", "zeros", "ones", "empty", "full", "arange", "eye",
    "linspace", "rand", "randn", "randint", "randperm", "tensor", "zeros_like", "ones_like", "empty_like", "full_like",
    "rand_like", "randn_like", "randint_like", "one_hot", "nonzero", "count_nonzero", "multinomial", "bincount",
    "searchsorted", "bucketize", "output_error", "is_", "is_not", "and_", "or_", "not_", "any", "all",
}  # fmt: skip
_REFUSED_METHODS = {
    "backward", "detach_", "requires_grad_", "retain_grad", "register_hook", "set_", "resize_", "data_ptr", "item",
    "tolist", "numpy", "register_post_accumulate_grad_hook", "share_memory_", "apply_", "map_",
}  # fmt: skip
_REFUSED_FUNCTIONS = {
    "set_grad_enabled", "no_grad", "enable_grad", "inference_mode", "load", "save", "manual_seed", "seed", "compile",
    "set_default_dtype", "set_default_device", "set_rng_state", "use_deterministic_algorithms", "set_num_threads",
    "attrgetter", "methodcaller", "itemgetter", "call", "vmap", "set_printoptions",
}  # fmt: skip
_REFUSED_MODULES = (
    "torch.autograd", "torch.utils", "torch.jit", "torch.hub", "torch.random", "torch.distributed", "torch.package",
    "torch.serialization", "torch.func", "torch.optim", "torch.compiler", "torch.multiprocessing", "torch.library",
)  # fmt: skip
_INPLACE_OPERATORS = {
    "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul", "ilshift",
    "irshift", "iconcat", "setitem", "set_item",
}  # fmt: skip
_BUILTINS = {"slice": slice, "getattr": getattr, "float": float, "int": int}
_INTEGERS = {torch.long, torch.int, torch.short, torch.int8, torch.uint8, torch.bool}
_BINARY = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow, ast.MatMult: operator.matmul,
    ast.BitAnd: operator.and_, ast.BitOr: operator.or_, ast.BitXor: operator.xor, ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
}  # fmt: skip
_UNARY = {ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Invert: operator.invert}


_FOLLOWED = (RECOMPUTE, MICRO_BATCHES, EXACT_PARTS, WITHOUT_GRADIENT)
"""Words that call a function of the text."""

# -------------------------------------------------------------------------------------------------------- reading


def read(
    source: str,
    trunk: nn.Module,
    heads: nn.Module,
    functions: frozenset[str] = frozenset(),
    inputs: tuple[str, ...] = ("x",),
    tree: ast.Module | Problem | None = None,
    operations: int = 0,
) -> Reading:
    """Follow ``train_step`` of ``source``.

    Args:
        source: the text.
        trunk: what ``trunk`` stands for; only its structure is used.
        heads: what ``heads`` stands for.
        functions: dotted names of functions that the text may call, besides those of torch, operator and math; other
            functions of their packages may be called too, but not those of localize.
        inputs: what the driver calls the inputs of the model, in order.
        tree: the text taken apart, or why it is not; None takes it apart here.
        operations: how many operations its plan has, which bounds how much is read.
    """
    reading = Reading(source.splitlines())
    tree = parse(source, operations) if tree is None else tree
    if isinstance(tree, Problem):
        reading.problems.append(tree)
        return reading
    _Reader(reading, trunk, heads, functions, operations).module(tree, inputs)
    for node in reading.nodes:
        reading.flow.add_node(node.index)
        if node.flows:
            reading.flow.add_edges_from((operand, node.index) for operand in node.operands)
    return reading


class _Reader:
    """Interpret the text over abstract values."""

    def __init__(
        self, reading: Reading, trunk: nn.Module, heads: nn.Module, functions: frozenset[str], operations: int
    ) -> None:
        self.reading, self.operations = reading, operations
        self.functions = functions
        self.roots = {"torch", "operator", "math", "localize", *(name.split(".")[0] for name in functions)}
        self.models = {"trunk": Path("trunk", trunk), "heads": Path("heads", heads)}
        self.names: dict[int, str] = {}
        for prefix, model in (("trunk", trunk), ("heads", heads)):
            for name, parameter in model.named_parameters():
                self.names.setdefault(id(parameter), f"{prefix}.{name}")
        self.parameter_nodes: dict[str, int] = {}
        self.globals: dict[str, Any] = {}
        self.scopes: list[str] = []
        self.depth = 0
        self.sizes = Sizes()
        self.read: dict[str, set[str]] = {}
        """Names that each function reads."""
        self.expressions = _EXPRESSIONS

    # -- statements

    def module(self, tree: ast.Module, inputs: tuple[str, ...]) -> None:
        """Read the top level, then follow the driver."""
        for number, statement in enumerate(tree.body):
            if isinstance(statement, ast.Import | ast.ImportFrom):
                self._guard(self._import, statement)
            elif isinstance(statement, ast.FunctionDef):
                self._guard(self._define, statement)
            elif not (number == 0 and _is_docstring(statement)):
                self._problem(statement, f"{type(statement).__name__} at the top level: only imports and functions")
        driver = self.globals.get(DRIVER)
        if not isinstance(driver, Local):
            self.reading.problems.append(Problem(0, f"there is no function {DRIVER}"))
            return
        wanted = ("trunk", "heads", *inputs, "y", "optimizer")
        if tuple(a.arg for a in driver.definition.args.args) != wanted:
            self._problem(driver.definition, f"the arguments of {DRIVER} are not {', '.join(wanted)}")
            return
        batch = [Ref(self._node(driver.definition, "input", name, flows=False).index) for name in (*inputs, "y")]
        given = [self.models["trunk"], self.models["heads"], *batch, Optimizer()]
        try:
            self.reading.results = self._run(driver.definition, given, driver.definition)
        except Unreadable as problem:
            self.reading.problems.append(Problem(problem.line, problem.what))

    def _guard(self, act: Callable[..., None], statement: ast.stmt, *more: Any) -> None:
        try:
            act(statement, *more)
        except Unreadable as problem:
            self.reading.problems.append(Problem(problem.line, problem.what))
            if isinstance(statement, ast.Assign) and more:  # the names exist, so that one problem is told once
                for name in {n.id for n in ast.walk(statement.targets[0]) if isinstance(n, ast.Name)}:
                    unknown = self._node(statement, "function", "unknown", flows=False)
                    more[0].setdefault(name, Ref(unknown.index))

    def _problem(self, node: ast.AST, what: str) -> None:
        self.reading.problems.append(Problem(getattr(node, "lineno", 0), what))

    def _import(self, statement: ast.Import | ast.ImportFrom) -> None:
        prefix = "" if isinstance(statement, ast.Import) else f"{statement.module}."
        for alias in statement.names:
            dotted = prefix + alias.name
            if dotted.split(".")[0] not in self.roots:
                raise Unreadable(statement, f"imports {dotted!r}, which no operation of this step needs")
            name = alias.asname or (alias.name if prefix else alias.name.split(".")[0])
            shown = dotted if alias.asname or prefix else name
            known = self.globals.get(name)
            if isinstance(known, Dotted) and known.name == shown:
                continue
            self._new_global(statement, name, Dotted(shown, _thing(statement, shown)))

    def _define(self, definition: ast.FunctionDef) -> None:
        a = definition.args
        if a.posonlyargs or a.kwonlyargs or a.vararg or a.kwarg or a.defaults or definition.decorator_list:
            raise Unreadable(definition, "a function with decorators, defaults or starred arguments")
        self._new_global(definition, definition.name, Local(definition))

    def _new_global(self, statement: ast.stmt, name: str, value: Any) -> None:
        if name in self.globals:
            raise Unreadable(statement, f"{name!r} is defined twice")
        self.globals[name] = value

    def _run(
        self,
        definition: ast.FunctionDef,
        inputs: Sequence[Any],
        call: ast.AST,
        *,
        recomputed: bool = False,
        without_gradient: bool = False,
    ) -> Any:
        """Follow a function of the text with these inputs; return what it returns."""
        names = [a.arg for a in definition.args.args]
        self.read.setdefault(definition.name, set())
        if len(names) != len(inputs):
            raise Unreadable(call, f"{definition.name} takes {len(names)} arguments, not {len(inputs)}")
        if definition.name in self.scopes:
            raise Unreadable(call, f"{definition.name} calls itself")
        self._same_roles(names, inputs, call)
        caller = self.scopes[-1] if self.scopes else ""
        nodes = tuple(_node_of(value) for value in inputs)
        line = getattr(call, "lineno", 0)
        how: dict[str, Any] = {"recomputed": recomputed, "without_gradient": without_gradient}
        entered = Event("enter", line, caller, definition.name, inputs=nodes, **how)
        self.reading.events.append(entered)
        self.scopes.append(definition.name)
        self.reading.calls[definition.name] = []
        result: Any = Const(None)
        scope = dict(zip(names, inputs, strict=True))
        if len(scope) != len(names):
            self._problem(definition, "two arguments have the same name")
        *body, last = definition.body
        for number, statement in enumerate(body):
            if not (number == 0 and _is_docstring(statement)):
                self._guard(self._statement, statement, scope)
        if isinstance(last, ast.Return) and last.value is not None:
            try:
                result = self._value(last.value, scope)
            except Unreadable as problem:
                self.reading.problems.append(Problem(problem.line, problem.what))
        else:
            self._problem(last, f"{definition.name} does not end by returning values")
        self._all_read(definition)
        self.scopes.pop()
        outputs = tuple(_node_of(value) for value in _flat(result))
        leave = Event("leave", line, caller, definition.name, inputs=nodes, outputs=outputs, returned=last.lineno)
        self.reading.events.append(leave)
        return result

    def _same_roles(self, names: list[str], inputs: Sequence[Any], call: ast.AST) -> None:
        """Refuse a call that hands something else to an argument called trunk, heads, y or optimizer."""
        for name, value in zip(names, inputs, strict=True):
            right: Any = True
            if name in self.models:
                right = value == self.models[name]
            elif name == "optimizer":
                right = value == Optimizer()
            elif name == "y":
                node = self.reading.nodes[value.node] if isinstance(value, Ref) else None
                right = node is not None and (node.kind, node.target) == ("input", "y")
            if not right:
                raise Unreadable(call, f"the argument {name!r} is given something else")

    def _statement(self, statement: ast.stmt, scope: dict[str, Any]) -> None:
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            self._assign(statement, scope)
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            self._act(statement.value, scope)
        elif isinstance(statement, ast.Delete):
            self._forget(statement, scope)
        elif isinstance(statement, ast.Return):
            raise Unreadable(statement, "return before the end of the function")
        else:
            raise Unreadable(statement, f"a statement of type {type(statement).__name__}")

    def _assign(self, statement: ast.Assign, scope: dict[str, Any]) -> None:
        value = self._value(statement.value, scope)
        target = statement.targets[0]
        names = _targets(target)
        for name in names:
            if name in scope or name in self.globals:
                raise Unreadable(statement, f"{name!r} is assigned a second time")
        if isinstance(target, ast.Name):
            values = [value]
        elif isinstance(value, tuple):
            values = list(value)
            if len(values) != len(names):
                raise Unreadable(statement, f"{len(values)} values for {len(names)} names")
        elif isinstance(value, Ref):
            values = [self._item(statement, value, Const(i)) for i in range(len(names))]
        else:
            raise Unreadable(statement, "unpacks something that is not a tuple")
        for name, item in zip(names, values, strict=True):
            if isinstance(item, Path | Dotted | Local | Bound | Optimizer):
                raise Unreadable(statement, f"{name!r} is another name for a module, a function or the optimizer")
            scope[name] = item
            if isinstance(item, Ref):
                made = self.reading.nodes[item.node]
                made.name = made.name or name
                made.places.append(f"{name} ({self.scopes[-1]}, line {statement.lineno})")
                if made.kind == "write":  # what a write in place returns need not be read
                    self.read[self.scopes[-1]].add(name)

    def _all_read(self, definition: ast.FunctionDef) -> None:
        """Note names that are assigned and never read."""
        for statement in definition.body:
            if not isinstance(statement, ast.Assign):
                continue
            for name in (n.id for n in ast.walk(statement.targets[0]) if isinstance(n, ast.Name)):
                if name not in self.read[definition.name]:
                    self.reading.unread.append(Problem(statement.lineno, f"{name!r} is never read"))

    def _forget(self, statement: ast.Delete, scope: dict[str, Any]) -> None:
        for target in statement.targets:
            if not isinstance(target, ast.Name) or isinstance(scope.get(target.id, FORGOTTEN), Forgotten):
                raise Unreadable(statement, "deletes something that is not a name of this function")
            scope[target.id] = FORGOTTEN

    def _act(self, call: ast.Call, scope: dict[str, Any]) -> None:
        """Follow a call that is a statement: backward, an update, or a write in place."""
        where: dict[str, Any] = {"line": call.lineno, "scope": self.scopes[-1]}
        scaled = _scaled_in(call)
        if scaled is not None:
            node = _node_of(self._scaled(scaled, scope))
            self.reading.events.append(Event("backward", inputs=(node,), scaled=True, **where))
            return
        function = self._value(call.func, scope)
        if isinstance(function, Dotted) and function.name == PULL:
            self.reading.events.append(self._pull(call, scope))
            return
        if isinstance(function, Bound) and isinstance(function.owner, Optimizer):
            if function.method not in ("step", "zero_grad") or call.args or call.keywords:
                raise Unreadable(call, "the optimizer is asked for something else than step() or zero_grad()")
            kind: Literal["update", "zero_grad"] = "update" if function.method == "step" else "zero_grad"
            self.reading.events.append(Event(kind, index=function.owner.index, **where))
        elif isinstance(function, Bound) and function.method == "backward":
            if call.args or call.keywords:
                raise Unreadable(call, "backward with arguments")
            node = _node_of(function.owner)
            self.reading.events.append(Event("backward", inputs=(node,), **where))
        else:
            self._value(call, scope)  # a draw or a write that was recorded; others are not in the plan

    def _scaled(self, call: ast.Call, scope: dict[str, Any]) -> Any:
        """Return the loss in ``optimizer.scale(loss)``, which may stand before ``.backward()`` and nowhere else."""
        if self._value(call.func, scope) != Bound(Optimizer(), "scale") or len(call.args) != 1 or call.keywords:
            raise Unreadable(call, "a loss is scaled by something else than optimizer.scale(loss)")
        return self._value(call.args[0], scope)

    def _pull(self, call: ast.Call, scope: dict[str, Any]) -> Event:
        """Follow ``pull(copy, source, decay)``."""
        args = [self._value(arg, scope) for arg in call.args]
        if len(args) != 3 or call.keywords or not isinstance(args[2], Const):
            raise Unreadable(call, "pull takes a copy, a module and a number")
        copy, source = args[:2]
        if not (isinstance(copy, Path) and isinstance(source, Path)):
            raise Unreadable(call, "pull takes a copy, a module and a number")
        names = {"name": copy.path, "source": source.path, "decay": args[2].value}
        return Event("pull", call.lineno, self.scopes[-1], **names)

    # -- values

    def _value(self, node: ast.expr, scope: dict[str, Any]) -> Any:
        evaluate = self.expressions.get(type(node))
        if evaluate is None:
            raise Unreadable(node, f"an expression of type {type(node).__name__}")
        self.depth += 1
        try:
            if self.depth > DEPTH:
                raise Unreadable(node, f"an expression nested more than {DEPTH} deep")
            return evaluate(self, node, scope)
        finally:
            self.depth -= 1

    def _name(self, node: ast.Name, scope: dict[str, Any]) -> Any:
        if isinstance(scope.get(node.id), Forgotten):
            raise Unreadable(node, f"{node.id!r} is used after it is deleted")
        if node.id in scope:
            self.read[self.scopes[-1]].add(node.id)
            return scope[node.id]
        if node.id in self.globals:
            return self.globals[node.id]
        if node.id in _BUILTINS:
            return Dotted(node.id, _BUILTINS[node.id])
        if hasattr(builtins, node.id):
            raise Unreadable(node, f"uses {node.id!r}")
        raise Unreadable(node, f"{node.id!r} is used before it is assigned")

    def _constant(self, node: ast.Constant, scope: dict[str, Any]) -> Any:
        return Const(node.value)

    def _tuple(self, node: ast.Tuple | ast.List, scope: dict[str, Any]) -> tuple[Any, ...]:
        return self._sized(node, tuple(self._value(item, scope) for item in node.elts))

    def _sized(self, node: ast.AST, value: Any) -> Any:
        if not self.sizes.fits(value, value.values() if isinstance(value, dict) else value):
            raise Unreadable(node, TOO_LARGE)
        return value

    def _dict(self, node: ast.Dict, scope: dict[str, Any]) -> dict[Any, Any]:
        result = {}
        for key, value in zip(node.keys, node.values, strict=True):
            if not isinstance(key, ast.Constant) or key.value in result:
                raise Unreadable(node, "a dict with computed or repeated keys")
            result[key.value] = self._value(value, scope)
        return self._sized(node, result)

    def _slice(self, node: ast.Slice, scope: dict[str, Any]) -> tuple[Any, ...]:
        parts = (node.lower, node.upper, node.step)
        return self._sized(node, tuple(self._value(part, scope) for part in parts if part is not None))

    def _attribute(self, node: ast.Attribute, scope: dict[str, Any]) -> Any:
        return self._member(node, self._value(node.value, scope), node.attr)

    def _member(self, node: ast.AST, owner: Any, name: str) -> Any:
        """Return ``owner.name``."""
        if name.startswith("__"):
            raise Unreadable(node, f"reads {name!r}")
        if isinstance(owner, Path):
            return self._module_member(node, owner, name)
        if isinstance(owner, Dotted):
            dotted = f"{owner.name}.{name}"
            return Dotted(dotted, _thing(node, dotted))
        if isinstance(owner, Optimizer):
            return Bound(owner, name)
        if isinstance(owner, Ref):
            return self._tensor_member(node, owner, name)
        raise Unreadable(node, f"reads .{name} of something that has no such attribute")

    def _module_member(self, node: ast.AST, owner: Path, name: str) -> Any:
        path, module = f"{owner.path}.{name}", owner.module
        child, parameter = module._modules.get(name), module._parameters.get(name)
        if child is not None:
            return Path(path, child)
        if parameter is not None:
            return Ref(self._parameter(node, parameter).index)
        value = module._buffers.get(name, vars(module).get(name))
        if isinstance(value, Tensor):
            return Ref(self._node(node, "buffer", path, flows=False).index)
        if name == "training" or (name in vars(module) and isinstance(value, bool | int | float | str | tuple)):
            return Const(value)
        raise Unreadable(node, f"{path} does not exist: {type(module).__name__} has no {name!r}")

    def _tensor_member(self, node: ast.AST, owner: Ref, name: str) -> Any:
        if name in _PLAIN_ATTRIBUTES:
            return Ref(self._node(node, "method", name, (owner,), flows=False).index)
        if name in _VIEW_ATTRIBUTES:
            return self._view(self._node(node, "method", name, (owner,)), owner)
        if name == "data":
            return Ref(self._node(node, "method", name, (owner,), flows=False).index)
        if not callable(getattr(Tensor, name, None)):
            raise Unreadable(node, f"a tensor has no {name!r} that can be followed")
        return Bound(owner, name)

    def _subscript(self, node: ast.Subscript, scope: dict[str, Any]) -> Any:
        owner, index = self._value(node.value, scope), self._value(node.slice, scope)
        constant = index.value if isinstance(index, Const) else None
        if isinstance(owner, Ref):
            return self._item(node, owner, index)
        if isinstance(owner, Path):
            return self._module_item(node, owner, constant)
        if isinstance(owner, Optimizer) and owner.index is None and type(constant) is int and constant >= 0:
            return Optimizer(constant)
        if isinstance(owner, tuple) and type(constant) is int and 0 <= constant < len(owner):
            return owner[constant]
        raise Unreadable(node, "a subscript that cannot be followed")

    def _module_item(self, node: ast.AST, owner: Path, key: Any) -> Any:
        members = {name: child for name, child in owner.module._modules.items() if child is not None}
        children = list(members.items())
        if isinstance(owner.module, nn.Sequential | nn.ModuleList) and type(key) is int and 0 <= key < len(children):
            return Path(f"{owner.path}.{children[key][0]}", children[key][1])
        if isinstance(owner.module, nn.ModuleDict) and key in members:
            return Path(f"{owner.path}.{key}", members[key])
        if isinstance(owner.module, nn.ParameterList | nn.ParameterDict) and str(key) in members:
            return Path(f"{owner.path}.{key}", members[str(key)])
        if isinstance(owner.module, nn.ParameterList) and type(key) is int and 0 <= key < len(owner.module):
            return Ref(self._parameter(node, owner.module[key]).index)
        if isinstance(owner.module, nn.ParameterDict) and key in owner.module:
            return Ref(self._parameter(node, owner.module[key]).index)
        raise Unreadable(node, f"{owner.path}[{key!r}] does not exist")

    def _binary(self, node: ast.BinOp, scope: dict[str, Any]) -> Any:
        left, right = self._value(node.left, scope), self._value(node.right, scope)
        function = _BINARY[type(node.op)]
        if isinstance(left, Const) and isinstance(right, Const):
            return _fold(node, function, left, right)
        if isinstance(left, tuple) and isinstance(right, tuple) and function is operator.add:
            return left + right
        return Ref(self._node(node, "operator", function.__name__, (left, right)).index)

    def _unary(self, node: ast.UnaryOp, scope: dict[str, Any]) -> Any:
        value = self._value(node.operand, scope)
        function: Any = _UNARY.get(type(node.op))
        if function is None:
            raise Unreadable(node, "'not'")
        if isinstance(value, Const):
            return _fold(node, function, value)
        return Ref(self._node(node, "operator", function.__name__, (value,)).index)

    def _compare(self, node: ast.Compare, scope: dict[str, Any]) -> Any:
        values = tuple(self._value(part, scope) for part in (node.left, *node.comparators))
        return Ref(self._node(node, "operator", "compare", values, flows=False).index)

    def _conditional(self, node: ast.IfExp, scope: dict[str, Any]) -> Any:
        """Follow ``a if trunk.training else b``: both, since the step runs in either mode."""
        test = node.test
        if not (isinstance(test, ast.Attribute) and test.attr == "training"):
            raise Unreadable(node, "a conditional expression on something else than .training")
        if not isinstance(self._value(test.value, scope), Path):
            raise Unreadable(node, "a conditional expression on something else than a module's .training")
        branches = (self._value(node.body, scope), self._value(node.orelse, scope))
        return Ref(self._node(node, "mode", "training", branches).index)

    # -- calls

    def _call(self, node: ast.Call, scope: dict[str, Any]) -> Any:
        function = self._value(node.func, scope)
        if any(keyword.arg is None for keyword in node.keywords):
            raise Unreadable(node, "a call with ** arguments")
        args = tuple(self._value(arg, scope) for arg in node.args)
        kwargs = tuple((str(k.arg), self._value(k.value, scope)) for k in node.keywords)
        for value in (*args, *(value for _, value in kwargs)):
            followed = isinstance(function, Local) or (
                isinstance(function, Dotted) and (function.thing is getattr or function.name in _FOLLOWED)
            )
            if isinstance(value, Path | Optimizer | Local | Bound) and not followed:
                raise Unreadable(node, "passes a module, the optimizer or a function to something that is not followed")
        if isinstance(function, Local):
            if kwargs:
                raise Unreadable(node, "a function of this text called with keywords")
            return self._run(function.definition, args, node)
        if isinstance(function, Dotted) and function.name == RECOMPUTE:
            if args and not kwargs and isinstance(args[0], Local):
                return self._run(args[0].definition, args[1:], node, recomputed=True)
            if args and not kwargs and isinstance(args[0], Path):
                return self._module_call(node, args[0], args[1:], kwargs, recomputed=True)
            raise Unreadable(node, "recompute takes a function of this text or a module, and its arguments")
        if isinstance(function, Dotted) and function.name == WITHOUT_GRADIENT:
            if not args or kwargs or not isinstance(args[0], Local):
                raise Unreadable(node, "without_gradient takes a function of this text and its arguments")
            return self._run(args[0].definition, args[1:], node, without_gradient=True)
        if isinstance(function, Dotted) and function.name in (MICRO_BATCHES, EXACT_PARTS):
            return self._in_parts(node, function.name, args, kwargs)
        if isinstance(function, Path):
            return self._module_call(node, function, args, kwargs)
        if isinstance(function, Bound) and isinstance(function.owner, Ref):
            return self._method(node, function, args, kwargs)
        if isinstance(function, Dotted):
            return self._function(node, function, args, kwargs, scope)
        raise Unreadable(node, "a call that cannot be followed")

    def _in_parts(self, node: ast.Call, name: str, args: tuple, kwargs: tuple) -> Any:
        """Follow the function that is called on every part of the batch, as if it were called once, on all of it."""
        word, exact = name.rpartition(".")[2], name == EXACT_PARTS
        wrong = any(key != "keep" or not exact or not isinstance(value, Const) for key, value in kwargs)
        if wrong or len(args) < 5 or not isinstance(args[0], Local) or not isinstance(args[1], Const):
            raise Unreadable(node, f"{word} takes a function of this text, a size, trunk, heads and a batch")
        handed_on = args[-1:] if args[-1] == Optimizer() else ()
        called, size, trunk, heads, *batch = args[: len(args) - len(handed_on)]
        if type(size.value) is not int or size.value < 0 or not all(isinstance(value, Ref) for value in batch):
            raise Unreadable(node, f"{word} takes a number of images, and tensors")
        events = len(self.reading.events)
        share = Ref(self._node(node, "share", "share", (size,), flows=False).index)
        given = (trunk, heads, *batch, share, *(() if exact else handed_on))
        result = self._run(called.definition, given, node)
        inside = {event.kind for event in self.reading.events[events:]}
        if inside.intersection(("update", "zero_grad", "pull")):
            raise Unreadable(node, f"{called.definition.name} updates parameters after every micro-batch")
        if not exact:
            return result
        if "backward" in inside:
            raise Unreadable(node, f"{called.definition.name} differentiates a loss itself")
        return self._differentiated(node, result, scaled=bool(handed_on))

    def _differentiated(self, node: ast.Call, result: Any, *, scaled: bool) -> Any:
        """Differentiate the one of several values that is not detached, and detach it."""
        values = result if isinstance(result, tuple) else (result,)
        losses = [value for value in values if isinstance(value, Ref) and not self._is_detached(value)]
        if len(losses) != 1:
            raise Unreadable(node, f"exact_parts takes a function that returns one loss, not {len(losses)}")
        line, scope = getattr(node, "lineno", 0), self.scopes[-1]
        self.reading.events.append(Event("backward", line, scope, inputs=(losses[0].node,), scaled=scaled))
        loss = Ref(self._node(node, "detach", "detach", (losses[0],), flows=False).index)
        made = tuple(loss if value is losses[0] else value for value in values)
        return made if isinstance(result, tuple) else loss

    def _is_detached(self, value: Ref) -> bool:
        """Tell whether a value is the result of a detach, or a copy of one, or a number of a class, without history."""
        node = self.reading.nodes[value.node]
        if (node.kind, node.target) == ("method", "clone") and len(node.operands) == 1:
            node = self.reading.nodes[node.operands[0]]
        return node.kind == "detach" or (node.kind, node.target) == ("method", "argmax")

    def _module_call(
        self, node: ast.Call, called: Path, args: tuple, kwargs: tuple, *, recomputed: bool = False
    ) -> Ref:
        if isinstance(called.module, nn.ModuleList | nn.ModuleDict):
            raise Unreadable(node, f"{called.path} is a {type(called.module).__name__}, which cannot be called")
        parameters = tuple(Ref(self._parameter(node, p).index) for p in self._trained(called.module))
        self.reading.calls[self.scopes[-1]].append(called.path)
        made = self._node(node, "module", called.path, args, kwargs, extra=parameters)
        made.recomputed = recomputed
        first = next(iter(_refs(args)), None)
        if getattr(called.module, "inplace", False) is True and first is not None:
            return self._write(node, first, made)
        if isinstance(called.module, nn.Identity | nn.Flatten | nn.Unflatten) and first is not None:
            return self._view(made, first)
        return Ref(made.index)

    def _trained(self, module: nn.Module) -> list[nn.Parameter]:
        """Return the parameters of a module that are trained; of most modules, which have no children, its own."""
        if not module._modules:
            return [p for p in module._parameters.values() if p is not None and p.requires_grad]
        return [p for p in module.parameters() if p.requires_grad]

    def _method(self, node: ast.Call, bound: Bound, args: tuple, kwargs: tuple) -> Ref:
        name, owner = bound.method, bound.owner
        if name in _REFUSED_METHODS:
            raise Unreadable(node, f"calls .{name}() inside an expression")
        if name == "detach":
            if args or kwargs:
                raise Unreadable(node, "detach with arguments")
            return Ref(self._node(node, "detach", name, (owner,), flows=False).index)
        return self._operation(node, "method", name, (owner, *args), kwargs)

    def _function(self, node: ast.Call, called: Dotted, args: tuple, kwargs: tuple, scope: dict[str, Any]) -> Any:
        short = called.name.rpartition(".")[2]
        if called.name == "getattr":
            if len(args) != 2 or not isinstance(args[1], Const) or not isinstance(args[1].value, str):
                raise Unreadable(node, "getattr by a computed name")
            return self._member(node, args[0], args[1].value)
        if called.name == "slice":
            return args
        ours = called.name.startswith("localize.") and not called.name.startswith("localize.ops.")
        if (
            (ours and called.name not in self.functions)
            or short in _REFUSED_FUNCTIONS
            or called.name.startswith(_REFUSED_MODULES)
            or not callable(called.thing)
        ):
            raise Unreadable(node, f"calls {called.name}, which cannot be followed")
        if called.name in ("torch.detach", "torch.Tensor.detach") and len(args) == 1 and isinstance(args[0], Ref):
            return Ref(self._node(node, "detach", "detach", args, flows=False).index)
        if _inplace_argument(called.thing, args, kwargs):
            return self._operation(node, "function", f"{called.name}_", args, kwargs)
        return self._operation(node, "function", called.name, args, kwargs)

    def _operation(self, node: ast.Call, kind: str, name: str, args: tuple, kwargs: tuple) -> Ref:
        """Make the node of a function or method, by what torch does with its first argument."""
        short = name.rpartition(".")[2]
        first = next(iter(_refs(args[:1])), None)
        integer = any(isinstance(a, Dotted) and a.thing in _INTEGERS for a in (*args, *(v for _, v in kwargs)))
        flows = short not in _NO_GRADIENT and not (integer and short in ("to", "type"))
        made = self._node(node, kind, name, args, kwargs, flows=flows)
        written = next((value for key, value in kwargs if key == "out" and value != Const(None)), None)
        if isinstance(written, Ref):
            return self._write(node, written, made)
        if written is not None:
            raise Unreadable(node, "writes to several tensors by out=")
        if (short.endswith("_") and not short.endswith("__") and flows) or short in _INPLACE_OPERATORS:
            if first is None:
                raise Unreadable(node, "writes in place into something that is not a tensor")
            return self._write(node, first, made)
        return self._view(made, first) if short in _VIEWS and first is not None else Ref(made.index)

    # -- nodes

    def _node(
        self,
        node: ast.AST,
        kind: Any,
        target: str,
        args: tuple[Any, ...] = (),
        kwargs: tuple[tuple[str, Any], ...] = (),
        *,
        extra: tuple[Ref, ...] = (),
        flows: bool = True,
    ) -> Node:
        if not self.sizes.may_read((*args, *(value for _, value in kwargs))):
            raise Unreadable(node, TOO_LARGE)
        if len(self.reading.nodes) >= MOST_NODES + 16 * self.operations:
            raise Unreadable(node, "makes far more values than a step has")
        operands = tuple(ref.node for ref in (*_refs(args), *_refs(tuple(v for _, v in kwargs)), *extra))
        scope = self.scopes[-1] if self.scopes else ""
        fixed = tuple(_freeze(arg) for arg in args)
        named = tuple((key, _freeze(value)) for key, value in kwargs)
        line = getattr(node, "lineno", 0)
        made = Node(len(self.reading.nodes), kind, target, line, scope, operands, flows, fixed, named)
        self.reading.nodes.append(made)
        return made

    def _parameter(self, node: ast.AST, parameter: Tensor) -> Node:
        name = self.names.get(id(parameter), "an unregistered parameter")
        if name not in self.parameter_nodes:
            kind = "parameter" if parameter.requires_grad else "buffer"
            self.parameter_nodes[name] = self._node(node, kind, name, flows=False).index
        return self.reading.nodes[self.parameter_nodes[name]]

    def _item(self, node: ast.AST, owner: Ref, index: Any) -> Ref:
        return self._view(self._node(node, "item", str(_shown(index)), (owner, index)), owner)

    def _view(self, made: Node, base: Ref) -> Ref:
        """Return a reference that shares the memory of ``base``: a write to one is a write to both."""
        made_ref = Ref(made.index, base.views)
        if base not in base.views:
            base.views.append(base)
        base.views.append(made_ref)
        return made_ref

    def _write(self, node: ast.AST, written: Ref, made: Node) -> Ref:
        """Record that ``made`` is written into ``written`` and into all that shares its memory."""
        if any(self.reading.nodes[view.node].kind == "parameter" for view in (written, *written.views)):
            raise Unreadable(node, "writes into a parameter")
        made.kind = "write"
        for view in written.views:
            if view is not written:
                joined = self._node(node, "write", made.target, (view, Ref(made.index)))
                joined.name, joined.places = self.reading.nodes[view.node].name, self.reading.nodes[view.node].places
                view.node = joined.index
        written.node = made.index
        return self._view(made, written)


_EXPRESSIONS: dict[type, Callable[..., Any]] = {
    ast.Name: _Reader._name,
    ast.Constant: _Reader._constant,
    ast.Tuple: _Reader._tuple,
    ast.List: _Reader._tuple,
    ast.Dict: _Reader._dict,
    ast.Slice: _Reader._slice,
    ast.Attribute: _Reader._attribute,
    ast.Subscript: _Reader._subscript,
    ast.BinOp: _Reader._binary,
    ast.UnaryOp: _Reader._unary,
    ast.Compare: _Reader._compare,
    ast.IfExp: _Reader._conditional,
    ast.Call: _Reader._call,
}


def _scaled_in(call: ast.Call) -> ast.Call | None:
    """Return the call of ``scale`` in ``optimizer.scale(loss).backward()``, whatever is scaled by what; else None."""
    made = call.func.value if isinstance(call.func, ast.Attribute) and call.func.attr == "backward" else None
    if not isinstance(made, ast.Call) or call.args or call.keywords:
        return None
    return made if isinstance(made.func, ast.Attribute) and made.func.attr == "scale" else None


def _is_docstring(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _targets(target: ast.expr) -> list[str]:
    parts = target.elts if isinstance(target, ast.Tuple | ast.List) else [target]
    names = []
    for part in parts:
        if not isinstance(part, ast.Name):
            raise Unreadable(target, "an assignment to something that is not a name")
        names.append(part.id)
    if len(set(names)) < len(names):
        raise Unreadable(target, "two names of one assignment are the same")
    return names


def _refs(values: Any) -> Iterator[Ref]:
    """Yield the tensors in nested tuples and dicts."""
    if isinstance(values, Ref):
        yield values
    elif isinstance(values, tuple):
        for value in values:
            yield from _refs(value)
    elif isinstance(values, dict):
        for value in values.values():
            yield from _refs(value)


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple):
        for item in value:
            yield from _flat(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _flat(item)
    else:
        yield value


def _freeze(value: Any) -> Any:
    """Return ``value`` with a snapshot of every reference: a later write must not change what was read."""
    if isinstance(value, Ref):
        return Ref(value.node)
    if isinstance(value, tuple):
        return tuple(_freeze(item) for item in value)
    return value


def _node_of(value: Any) -> int | None:
    return value.node if isinstance(value, Ref) else None


def _shown(index: Any) -> Any:
    return index.value if isinstance(index, Const) else "[...]"


def _fold(node: ast.AST, function: Callable[..., Any], *values: Const) -> Const:
    """Return the number that signs, or a real and an imaginary part, make."""
    numbers = [value.value for value in values]
    plain = all(isinstance(number, int | float | complex) for number in numbers)
    written = len(numbers) == 1 or (function in (operator.add, operator.sub) and isinstance(numbers[1], complex))
    if not (plain and written) or function is operator.invert:
        raise Unreadable(node, "arithmetic on constants")
    return Const(function(*numbers))


def _thing(node: ast.AST, dotted: str) -> Any:
    """Return what a dotted name refers to, among what is loaded.

    Raises:
        Unreadable: there is no such thing.
    """
    found = looked_up(dotted)
    if found is None:
        raise Unreadable(node, f"{dotted} does not exist")
    return found


def _inplace_argument(function: Callable[..., Any], args: tuple, kwargs: tuple) -> bool:
    """Tell whether a call has ``inplace=True``, by keyword or by position."""
    if any(key == "inplace" and value == Const(True) for key, value in kwargs):
        return True
    if Const(True) not in args[1:]:
        return False
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return False
    return "inplace" in names and names.index("inplace") < len(args) and args[names.index("inplace")] == Const(True)
