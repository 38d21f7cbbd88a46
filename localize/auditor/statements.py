"""Read the statements of a function as operations, without running any of them.

Only what a plan can be written in is known: assignments of names, calls, constants, paths of modules, arithmetic, the
choice by mode, ``del`` and ``return``. Everything else is a :class:`Problem` with its line. The names of local
variables, and which values have one, do not matter.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from localize.auditor.names import OPS, Vocabulary, torch_constants
from localize.auditor.operations import Attr, Const, Group, Operation, show
from localize.auditor.reading import TOO_LARGE, Problem, Sizes

DEPTH = 120
"""How deeply an expression may be nested."""
MOST = 200
"""Problems after which a text is not read any further."""
DRIVER = "train_step"
_BINARY = {
    ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "truediv", ast.FloorDiv: "floordiv", ast.Mod: "mod",
    ast.Pow: "pow", ast.MatMult: "matmul", ast.BitAnd: "and_", ast.BitOr: "or_", ast.BitXor: "xor",
    ast.LShift: "lshift", ast.RShift: "rshift",
}  # fmt: skip
_COMPARED = {ast.Eq: "eq", ast.NotEq: "ne", ast.Lt: "lt", ast.LtE: "le", ast.Gt: "gt", ast.GtE: "ge"}
_UNARY = {ast.USub: "neg", ast.UAdd: "pos", ast.Invert: "invert"}


@dataclass(frozen=True)
class Module:
    """A module of the model, by its one path."""

    path: str
    module: nn.Module


@dataclass(frozen=True)
class Dotted:
    """Something that an import gives, by its dotted name: ``torch.nn.functional.relu``."""

    name: str


@dataclass(frozen=True)
class Defined:
    """A function of the text."""

    name: str


@dataclass(frozen=True)
class Bound:
    """A method that is not called yet."""

    owner: Any
    name: str


@dataclass(frozen=True)
class Optimizer:
    """``optimizer``, or ``optimizer[index]``."""

    index: int | None = None


@dataclass(frozen=True)
class Scaled:
    """``optimizer.scale(loss)``, which may stand before ``.backward()`` and nowhere else."""

    loss: Any


@dataclass(frozen=True)
class Handle:
    """A parameter list or dict, or another thing of a module that is only a step on a path."""

    path: str
    thing: Any


class NotKnown(Exception):
    """Raised where an expression is not one of a plan."""

    def __init__(self, node: ast.AST, what: str) -> None:
        self.line: int = getattr(node, "lineno", 0)
        self.what = what
        super().__init__(what)


@dataclass
class Body:
    """What the statements of a function do, in order."""

    operations: list[Operation] = field(default_factory=list)
    returned: Any = None
    attributes: list[tuple[Attr, int]] = field(default_factory=list)
    """Attributes of the model that are read, with their lines."""
    line: int = 0
    """Of the definition."""
    end: int = 0
    """Of the return."""


@dataclass
class Text:
    """The functions of a text, and what its imports give."""

    functions: dict[str, ast.FunctionDef] = field(default_factory=dict)
    imports: dict[str, Dotted] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    called: set[str] = field(default_factory=set)
    """Functions that have been followed."""

    def problem(self, line: int, what: str) -> None:
        """Note what is not in the plan."""
        if len(self.problems) < MOST:
            self.problems.append(Problem(line, what))


def text_of(tree: ast.Module, words: Vocabulary) -> Text:
    """Read the top level: imports that the plan needs, and functions."""
    text = Text()
    for number, statement in enumerate(tree.body):
        if isinstance(statement, ast.FunctionDef):
            _define(text, statement)
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            _import(text, statement, words)
        elif not (number == 0 and _is_docstring(statement)):
            text.problem(statement.lineno, f"{_article(statement)} at the top level: only imports and functions")
    return text


def _define(text: Text, definition: ast.FunctionDef) -> None:
    a = definition.args
    extra = {
        "decorators": definition.decorator_list,
        "defaults": [*a.defaults, *(d for d in a.kw_defaults if d)],
        "annotations": [definition.returns, *(arg.annotation for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs))],
        "starred, keyword-only or positional-only arguments": [a.vararg, a.kwarg, *a.kwonlyargs, *a.posonlyargs],
        "parameters of a type": getattr(definition, "type_params", []),
    }
    for what, found in extra.items():
        if any(one is not None for one in found):
            text.problem(definition.lineno, f"{definition.name} has {what}, which run before or beside the step")
    if definition.name in text.functions or definition.name in text.imports:
        text.problem(definition.lineno, f"{definition.name!r} is defined twice")
    names = [arg.arg for arg in a.args]
    if len(set(names)) < len(names):
        text.problem(definition.lineno, "two arguments have the same name")
    for name in (definition.name, *names, *sorted(_stored(definition))):
        if name.startswith("__"):
            text.problem(definition.lineno, f"{name} is a name that Python keeps for itself")
    text.functions.setdefault(definition.name, definition)


def _import(text: Text, statement: ast.Import | ast.ImportFrom, words: Vocabulary) -> None:
    known = words.functions
    prefix = "" if isinstance(statement, ast.Import) else f"{'.' * statement.level}{statement.module or ''}."
    for alias in statement.names:
        dotted = prefix + alias.name
        if dotted not in known.modules and known.named(dotted) is None:
            text.problem(statement.lineno, f"imports {dotted}, which no operation of this step needs")
            continue
        whole = bool(alias.asname or prefix)
        name = alias.asname or (alias.name if prefix else alias.name.split(".")[0])
        value = Dotted(dotted if whole else name)
        if name.startswith("__") and dotted != "__main__":  # in a script, losses of the user's are in __main__
            text.problem(statement.lineno, f"{name} is a name that Python keeps for itself")
        if text.imports.setdefault(name, value) != value or name in text.functions:
            text.problem(statement.lineno, f"{name!r} is defined twice")


class Interpreter:
    """Go through the statements of a function over symbolic values."""

    def __init__(self, text: Text, words: Vocabulary) -> None:
        self.text, self.words = text, words
        self.body = Body()
        self.depth = 0
        self.sizes = Sizes()
        self.locals: list[set[str]] = []
        self.segments = True
        """Segments may be called, and functions of the text followed."""
        self.scaled = 0
        """Losses that are scaled, and not differentiated yet."""

    def segment(self, definition: ast.FunctionDef, inputs: tuple[Operation, ...], *, heads: bool) -> Body:
        """Read the function of a segment, which calls no other."""
        self.segments = False
        return self._read(definition, [*self._roots(heads), *inputs])

    def driver(self, definition: ast.FunctionDef, inputs: tuple[Operation, ...]) -> Body:
        """Read the driver, and each function that it calls where it calls it."""
        body = self._read(definition, [*self._roots(True), *inputs, Optimizer()])
        if self.scaled:
            self.text.problem(definition.lineno, "the step scales a loss that has no backward")
        return body

    def _roots(self, heads: bool) -> list[Module]:
        roots = self.words.model.roots
        return [Module(name, roots[name]) for name in ("trunk", *(("heads",) if heads else ()))]

    def _read(self, definition: ast.FunctionDef, given: list[Any]) -> Body:
        self.body.line = definition.lineno
        try:
            self.body.returned = self._follow(definition, given, definition)
        except NotKnown as problem:
            self.text.problem(problem.line, problem.what)
        self.body.end = definition.body[-1].lineno
        return self.body

    # -- statements

    def _follow(self, definition: ast.FunctionDef, given: list[Any], call: ast.AST) -> Any:
        """Go through a function with these arguments; return what it returns."""
        names = [a.arg for a in definition.args.args]
        if len(names) != len(given):
            raise NotKnown(call, f"{definition.name} has {len(names)} arguments, not {len(given)}")
        if definition.name in self.text.called:
            raise NotKnown(call, f"{definition.name} is called a second time")
        self.text.called.add(definition.name)
        scope = dict(zip(names, given, strict=True))
        self.locals.append({*names, *_stored(definition)})
        returned: Any = Const(None)
        for number, statement in enumerate(definition.body):
            last = number == len(definition.body) - 1
            if number == 0 and _is_docstring(statement) and not last:
                continue
            if isinstance(statement, ast.Return) and last and statement.value is not None:
                returned = self._guarded(statement, statement.value, scope)
            else:
                if last:
                    self.text.problem(statement.lineno, f"{definition.name} does not end by returning values")
                try:
                    self._statement(statement, scope)
                except NotKnown as problem:
                    self.text.problem(problem.line, problem.what)
                    self._bind_unknown(statement, scope)
            if len(self.text.problems) >= MOST:
                break
        self.locals.pop()
        return returned

    def _guarded(self, statement: ast.AST, value: ast.expr, scope: dict[str, Any]) -> Any:
        try:
            return self._value(value, scope)
        except NotKnown as problem:
            self.text.problem(problem.line or getattr(statement, "lineno", 0), problem.what)
            return self._unknown(statement)

    def _unknown(self, node: ast.AST) -> Operation:
        return Operation("unknown", "unknown", line=getattr(node, "lineno", 0))

    def _bind_unknown(self, statement: ast.stmt, scope: dict[str, Any]) -> None:
        """Let the names of a statement exist, so that one problem is reported once."""
        if isinstance(statement, ast.Assign):
            for target in statement.targets:
                for part in target.elts if isinstance(target, ast.Tuple | ast.List) else [target]:
                    if isinstance(part, ast.Name):
                        scope.setdefault(part.id, self._unknown(statement))

    def _statement(self, statement: ast.stmt, scope: dict[str, Any]) -> None:
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            self._assign(statement, scope)
        elif isinstance(statement, ast.Expr):
            if not isinstance(statement.value, ast.Call):
                raise NotKnown(statement, "an expression whose value is not used")
            self._value(statement.value, scope)
        elif isinstance(statement, ast.Delete):
            for target in statement.targets:
                if not isinstance(target, ast.Name) or target.id not in scope:
                    raise NotKnown(statement, "deletes something that is not a name of this function")
                del scope[target.id]
        elif not isinstance(statement, ast.Pass):
            raise NotKnown(statement, _article(statement))

    def _assign(self, statement: ast.Assign, scope: dict[str, Any]) -> None:
        value, target = self._value(statement.value, scope), statement.targets[0]
        if isinstance(value, Bound) and isinstance(value.owner, Operation | Attr):
            value = self._plain(statement, value)
        if isinstance(value, Bound):
            raise NotKnown(statement, f"gives {_described(value)} another name")
        if isinstance(target, ast.Name):
            scope[target.id] = value
            return
        if not isinstance(target, ast.Tuple | ast.List):
            raise NotKnown(statement, f"writes to {_short(target)}, which is not a name of this function")
        if not all(isinstance(part, ast.Name) for part in target.elts):
            raise NotKnown(statement, "unpacks into something else than names")
        names = [part.id for part in target.elts if isinstance(part, ast.Name)]
        if len(set(names)) < len(names):
            raise NotKnown(statement, "two names of one assignment are the same")
        if isinstance(value, Group) and value.kind in ("tuple", "list"):
            values = list(value.items)
        elif isinstance(value, Operation):
            count = self._count(statement, value)
            if count is not None and count != len(names):
                raise NotKnown(statement, f"unpacks {count} values into {len(names)} names")
            values = [self._made(statement, "operator", "getitem", (value, Const(i))) for i in range(len(names))]
        else:
            raise NotKnown(statement, "unpacks something that is not several values")
        if len(values) != len(names):
            raise NotKnown(statement, f"unpacks {len(values)} values into {len(names)} names")
        scope.update(zip(names, values, strict=True))

    def _count(self, node: ast.AST, operation: Operation) -> int | None:
        """Return how many values an operation gives; None where nothing is known of it.

        Raises:
            NotKnown: an operation of a recorded graph: what it gives may depend on the batch.
        """
        if not self.segments:
            raise NotKnown(node, f"unpacks `{show(operation)}`; its items are read by number")
        if operation.kind == "segment":
            return self.words.returned[operation.target]
        last = operation.args[-1] if operation.args else None
        return last.value if operation.kind == "function" and isinstance(last, Const) else None

    # -- expressions

    def _value(self, node: ast.expr, scope: dict[str, Any]) -> Any:
        evaluate = _EXPRESSIONS.get(type(node))
        if evaluate is None:
            raise NotKnown(node, _article(node))
        self.depth += 1
        try:
            if self.depth > DEPTH:
                raise NotKnown(node, f"an expression nested more than {DEPTH} deep")
            return evaluate(self, node, scope)
        finally:
            self.depth -= 1

    def _name(self, node: ast.Name, scope: dict[str, Any]) -> Any:
        if node.id in self.locals[-1]:
            if node.id not in scope:
                raise NotKnown(node, f"{node.id!r} is used before it is assigned, or after it is deleted")
            return scope[node.id]
        if node.id in self.text.functions:
            return Defined(node.id)
        if node.id in self.text.imports:
            return self.text.imports[node.id]
        if node.id in ("getattr", "slice", "float"):
            return Dotted(f"builtins.{node.id}")
        raise NotKnown(node, f"uses {node.id!r}, which is not a name of this step")

    def _constant(self, node: ast.Constant, scope: dict[str, Any]) -> Const:
        return Const(node.value)

    def _several(self, node: ast.Tuple | ast.List, scope: dict[str, Any]) -> Group:
        kind: Any = "tuple" if isinstance(node, ast.Tuple) else "list"
        return self._group(node, kind, tuple(self._plain(item, self._value(item, scope)) for item in node.elts))

    def _group(self, node: ast.AST, kind: Any, items: tuple[Any, ...]) -> Group:
        group = Group(kind, items)
        if not self.sizes.fits(group, items):
            raise NotKnown(node, TOO_LARGE)
        return group

    def _dict(self, node: ast.Dict, scope: dict[str, Any]) -> Group:
        parts: list[Any] = []
        for key, value in zip(node.keys, node.values, strict=True):
            if not isinstance(key, ast.Constant):
                raise NotKnown(node, "a dict with computed keys")
            parts += [Const(key.value), self._plain(value, self._value(value, scope))]
        if len(set(parts[::2])) < len(parts[::2]):
            raise NotKnown(node, "a dict with a key twice")
        return self._group(node, "dict", tuple(parts))

    def _slice(self, node: ast.Slice, scope: dict[str, Any]) -> Group:
        parts = (node.lower, node.upper, node.step)
        values = (Const(None) if p is None else self._plain(p, self._value(p, scope)) for p in parts)
        return self._group(node, "slice", tuple(values))

    def _attribute(self, node: ast.Attribute, scope: dict[str, Any]) -> Any:
        return self._member(node, self._value(node.value, scope), node.attr)

    def _member(self, node: ast.AST, owner: Any, name: str) -> Any:
        """Return ``owner.name``."""
        if isinstance(owner, Bound) and isinstance(owner.owner, Operation | Attr):
            owner = self._plain(node, owner)
        if isinstance(owner, Module):
            return self._of_module(node, owner, name)
        if isinstance(owner, Dotted):
            dotted = f"{owner.name}.{name}"
            constant = torch_constants().get(dotted)
            return Dotted(dotted) if constant is None else Const(constant)
        if isinstance(owner, Optimizer):
            return Bound(owner, name)
        if isinstance(owner, Operation | Attr | Scaled):
            return Bound(owner, name)
        if isinstance(owner, Handle):
            inner = self.words.model.child(owner.thing, name) if isinstance(owner.thing, nn.Module) else None
            return Handle(f"{owner.path}.{name}", inner)
        raise NotKnown(node, f"reads .{name} of something that has no such attribute in the plan")

    def _of_module(self, node: ast.AST, owner: Module, name: str) -> Any:
        child = self.words.model.child(owner.module, name)
        if child is not None:
            if isinstance(child, nn.ParameterList | nn.ParameterDict):
                return Handle(f"{owner.path}.{name}", child)
            return Module(self.words.model.paths[id(child)], child)
        if name in ("get_submodule", "get_parameter", "get_buffer"):
            return Bound(owner, name)
        return self._attr(node, f"{owner.path}.{name}")

    def _attr(self, node: ast.AST, path: str) -> Attr:
        found = Attr(path)
        self.body.attributes.append((found, getattr(node, "lineno", 0)))
        return found

    def _subscript(self, node: ast.Subscript, scope: dict[str, Any]) -> Any:
        owner, index = self._value(node.value, scope), self._value(node.slice, scope)
        key = index.value if isinstance(index, Const) else None
        if isinstance(owner, Module | Handle):
            return self._of_container(node, owner, key)
        if isinstance(owner, Optimizer) and owner.index is None and type(key) is int:
            return Optimizer(key)
        if isinstance(owner, Group) and owner.kind == "tuple" and type(key) is int and 0 <= key < len(owner.items):
            return owner.items[key]
        return self._made(node, "operator", "getitem", (self._plain(node, owner), self._plain(node, index)))

    def _of_container(self, node: ast.AST, owner: Module | Handle, key: Any) -> Any:
        module = owner.module if isinstance(owner, Module) else owner.thing
        name = None if module is None else self.words.model.item(module, key)
        if name is None:
            raise NotKnown(node, f"{owner.path}[{key!r}] does not exist")
        if isinstance(module, nn.ParameterList | nn.ParameterDict):
            inner = self.words.model.child(module, name)
            return (
                Handle(f"{owner.path}.{name}", inner) if inner is not None else self._attr(node, f"{owner.path}.{name}")
            )
        return self._of_module(node, Module(owner.path, module), name)

    def _binary(self, node: ast.BinOp, scope: dict[str, Any]) -> Any:
        left, right = self._value(node.left, scope), self._value(node.right, scope)
        name = _BINARY[type(node.op)]
        if isinstance(left, Const) and isinstance(right, Const):
            numbers = (left.value, right.value)
            if name in ("add", "sub") and isinstance(right.value, complex) and isinstance(left.value, int | float):
                return Const(numbers[0] + numbers[1] if name == "add" else numbers[0] - numbers[1])
            raise NotKnown(node, "arithmetic on constants")
        return self._made(node, "operator", name, (self._plain(node, left), self._plain(node, right)))

    def _unary(self, node: ast.UnaryOp, scope: dict[str, Any]) -> Any:
        value = self._value(node.operand, scope)
        name = _UNARY.get(type(node.op))
        if name is None:
            raise NotKnown(node, "'not'")
        if isinstance(value, Const):
            if name == "neg" and isinstance(value.value, int | float | complex) and not isinstance(value.value, bool):
                return Const(-value.value)
            raise NotKnown(node, "arithmetic on constants")
        return self._made(node, "operator", name, (self._plain(node, value),))

    def _compare(self, node: ast.Compare, scope: dict[str, Any]) -> Any:
        name = _COMPARED.get(type(node.ops[0])) if len(node.ops) == 1 else None
        if name is None:
            raise NotKnown(node, "a comparison of this form")
        values = (self._value(node.left, scope), self._value(node.comparators[0], scope))
        return self._made(node, "operator", name, tuple(self._plain(node, value) for value in values))

    def _conditional(self, node: ast.IfExp, scope: dict[str, Any]) -> Group:
        """Read ``a if trunk.training else b``."""
        test = node.test
        owner = self._value(test.value, scope) if isinstance(test, ast.Attribute) and test.attr == "training" else None
        if not (isinstance(owner, Module) and owner.path == "trunk"):
            raise NotKnown(node, "a conditional expression on something else than trunk.training")
        before = len(self.body.operations)
        chosen = tuple(self._plain(node, self._value(part, scope)) for part in (node.body, node.orelse))
        if len(self.body.operations) > before:  # what is done in one mode only
            raise NotKnown(node, "does something in one mode, and something else in the other")
        return self._group(node, "mode", chosen)

    def _plain(self, node: ast.AST, value: Any) -> Any:
        """Return a value that can be an argument of an operation: no module, no function, no optimizer."""
        if isinstance(value, Operation | Const | Group | Attr):
            return value
        if isinstance(value, Bound) and isinstance(value.owner, Operation | Attr):
            return self._made(node, "property", value.name, (value.owner,))
        if isinstance(value, Handle):
            return self._attr(node, value.path)
        raise NotKnown(node, f"uses {_described(value)} as a value")

    # -- calls

    def _call(self, node: ast.Call, scope: dict[str, Any]) -> Any:
        called = self._value(node.func, scope)
        if any(isinstance(arg, ast.Starred) for arg in node.args) or any(k.arg is None for k in node.keywords):
            raise NotKnown(node, "a call with starred arguments")
        args = [self._value(arg, scope) for arg in node.args]
        kwargs = [(str(k.arg), self._value(k.value, scope)) for k in node.keywords]
        if isinstance(called, Bound):
            return self._method(node, called, args, kwargs)
        if isinstance(called, Module):
            return self._module_call(node, called, args, kwargs)
        if isinstance(called, Defined):
            return self._defined(node, called, args, kwargs)
        if isinstance(called, Dotted):
            return self._function(node, called, args, kwargs)
        raise NotKnown(node, f"calls {_described(called)}")

    def _method(self, node: ast.Call, called: Bound, args: list[Any], kwargs: list[tuple[str, Any]]) -> Any:
        owner, name = called.owner, called.name
        if isinstance(owner, Optimizer):
            return self._optimizer(node, owner, name, args, kwargs)
        if isinstance(owner, Module):
            path = args[0].value if len(args) == 1 and not kwargs and isinstance(args[0], Const) else None
            if not isinstance(path, str):
                raise NotKnown(node, f"{name} by a computed name")
            value: Any = owner
            for part in path.split("."):
                value = self._member(node, value, part)
            return value
        if name == "backward":
            if args or kwargs:
                raise NotKnown(node, "backward with arguments")
            scaled = isinstance(owner, Scaled)
            self.scaled -= scaled
            return self._made(node, "backward", "scaled" if scaled else "", (owner.loss if scaled else owner,))
        if isinstance(owner, Scaled):
            raise NotKnown(node, "optimizer.scale(loss) stands before .backward() and nowhere else")
        return self._operation(node, "method", name, [owner, *args], kwargs)

    def _optimizer(
        self, node: ast.Call, owner: Optimizer, name: str, args: list[Any], kwargs: list[tuple[str, Any]]
    ) -> Any:
        if name == "scale" and owner.index is None and len(args) == 1 and not kwargs:
            self.scaled += 1
            return Scaled(self._plain(node, args[0]))
        whose = "optimizer" if owner.index is None else f"optimizer[{owner.index}]"
        if args or kwargs or name not in ("step", "zero_grad"):
            raise NotKnown(node, f"asks {whose} for {name}, with or without arguments")
        self._made(node, "optimizer", f"{whose}.{name}()")
        return Const(None)

    def _module_call(
        self, node: ast.Call, called: Module, args: list[Any], kwargs: list[tuple[str, Any]], how: str = ""
    ) -> Operation:
        return self._operation(node, "module", called.path, args, kwargs, how)

    def _defined(
        self, node: ast.Call, called: Defined, args: list[Any], kwargs: list[tuple[str, Any]], how: str = ""
    ) -> Any:
        if kwargs:
            raise NotKnown(node, "a function of this text called with keywords")
        if not self.segments:
            raise NotKnown(node, f"a segment calls {called.name}")
        if called.name in self.words.segments:
            roots = [arg.path if isinstance(arg, Module) else "" for arg in args]
            count = 2 if roots[:2] == ["trunk", "heads"] else 1
            if roots[:1] != ["trunk"]:
                raise NotKnown(node, f"{called.name} is given something else for the trunk")
            taken = len(self.text.functions[called.name].args.args)
            if taken != len(args):
                raise NotKnown(node, f"{called.name} has {taken} arguments, not {len(args)}")
            return self._operation(node, "segment", called.name, args[count:], [], how)
        if how:
            raise NotKnown(node, f"{called.name}, which is not a segment, is called through {how}")
        return self._follow(self.text.functions[called.name], args, node)

    def _function(self, node: ast.Call, called: Dotted, args: list[Any], kwargs: list[tuple[str, Any]]) -> Any:
        name = called.name
        if name.startswith("builtins."):
            return self._builtin(node, name.removeprefix("builtins."), args, kwargs)
        if name == "torch.device":
            if len(args) != 1 or kwargs or not isinstance(args[0], Const):
                raise NotKnown(node, "a device by a computed name")
            return Group("device", (args[0],))
        if name.startswith("operator.") and not kwargs:
            return self._operation(node, "operator", name.removeprefix("operator."), args, kwargs)
        known = self.words.functions.named(name)
        if known is None:
            self._operation(node, "function", name, [a for a in args if isinstance(a, Operation)], [])
            raise NotKnown(node, f"calls {name}, which no operation of this step is")
        word = known.removeprefix(OPS) if known.startswith(OPS) else ""
        if word in ("recompute", "without_gradient") and args and not kwargs:
            how = "recompute" if word == "recompute" else "without gradient"
            if isinstance(args[0], Defined):
                return self._defined(node, args[0], args[1:], [], how)
            if isinstance(args[0], Module):
                return self._module_call(node, args[0], args[1:], [], how)
        if word in ("micro_batches", "exact_parts") and self.segments:
            return self._in_parts(node, word, args, kwargs)
        if word == "pull":
            return self._pull(node, args, kwargs)
        return self._operation(node, "function", known, args, kwargs)

    def _builtin(self, node: ast.Call, name: str, args: list[Any], kwargs: list[tuple[str, Any]]) -> Any:
        constants = [arg.value if isinstance(arg, Const) else None for arg in args]
        if name == "slice" and not kwargs and 1 <= len(args) <= 3:
            parts = [Const(None), args[0], Const(None)] if len(args) == 1 else [*args, Const(None)][:3]
            return Group("slice", tuple(parts))
        if name == "float" and constants in (["inf"], ["-inf"], ["nan"]) and not kwargs:
            return Const(float(str(constants[0])))
        if name == "getattr" and len(args) == 2 and isinstance(constants[1], str) and not kwargs:
            return self._member(node, args[0], constants[1])
        known = self.words.functions.named(f"builtins.{name}")
        if known is not None:
            return self._operation(node, "function", known, args, kwargs)
        raise NotKnown(node, f"{name}(...) of this form")

    def _pull(self, node: ast.Call, args: list[Any], kwargs: list[tuple[str, Any]]) -> Const:
        if len(args) != 3 or kwargs or not all(isinstance(arg, Module) for arg in args[:2]):
            raise NotKnown(node, "pull of something else than a copy, a module and a number")
        paths = (Const(args[0].path), Const(args[1].path))
        self._made(node, "pull", f"{OPS}pull", (*paths, self._plain(node, args[2])))
        return Const(None)

    def _in_parts(self, node: ast.Call, word: str, args: list[Any], kwargs: list[tuple[str, Any]]) -> Any:
        """Follow the function that is called on every part of the batch, once; exact parts differentiate its loss."""
        roots = [arg.path if isinstance(arg, Module) else "" for arg in args[2:4]]
        options = tuple((key, self._plain(node, value)) for key, value in kwargs)
        wrong = any(word == "micro_batches" or key != "keep" for key, _ in options)
        if wrong or len(args) < 5 or not isinstance(args[0], Defined) or roots != ["trunk", "heads"]:
            raise NotKnown(node, f"{word} of something else than a function, a size, trunk, heads and a batch")
        size, batch = self._plain(node, args[1]), args[4:]
        if Optimizer() in batch[:-1]:
            raise NotKnown(node, f"{word} with an optimizer before the end of the batch")
        handed_on = [arg for arg in batch if arg == Optimizer()]
        tensors = [self._plain(node, arg) for arg in batch if arg != Optimizer()]
        if args[0].name in self.words.segments or not isinstance(size, Const):
            raise NotKnown(node, f"{word} of a segment, or of a computed size")
        kind = "exact" if word == "exact_parts" else "micro"
        self._made(node, kind, "begins", (size, *tensors), options)
        parts = [Operation("part", str(size.value), (value,), line=node.lineno) for value in tensors]
        share = Operation("share", "share", (size,), line=node.lineno)
        given = [*args[2:4], *parts, share, *(handed_on if kind == "micro" else ())]
        result = self._follow(self.text.functions[args[0].name], given, node)
        items = result.items if isinstance(result, Group) and result.kind == "tuple" else (result,)
        if kind == "exact":
            items = self._differentiated(node, items, "scaled" if handed_on else "")
        self._made(node, kind, "ends")
        gathered = tuple(Operation("gathered", "gathered", (item,), line=node.lineno) for item in items)
        return gathered[0] if len(gathered) == 1 else Group("tuple", gathered)

    def _differentiated(self, node: ast.Call, items: tuple[Any, ...], how: str) -> tuple[Any, ...]:
        """Differentiate the one of these values that is not detached, and detach it."""
        with_history = [item for item in items if isinstance(item, Operation) and not _is_detached(item)]
        if len(with_history) != 1:
            raise NotKnown(node, f"exact_parts of a function that returns {len(with_history)} losses")
        self._made(node, "backward", how, (with_history[0],))
        loss = self._made(node, "method", "detach", (with_history[0],))
        return tuple(loss if item is with_history[0] else item for item in items)

    # -- operations

    def _operation(
        self, node: ast.AST, kind: Any, target: str, args: list[Any], kwargs: list[tuple[str, Any]], how: str = ""
    ) -> Operation:
        values = tuple(self._plain(node, arg) for arg in args)
        options = tuple(sorted((key, self._plain(node, value)) for key, value in kwargs))
        return self._made(node, kind, target, values, options, how)

    def _made(
        self,
        node: ast.AST,
        kind: Any,
        target: str,
        args: tuple[Any, ...] = (),
        kwargs: tuple[tuple[str, Any], ...] = (),
        how: str = "",
    ) -> Operation:
        if not self.sizes.may_read((*args, *(value for _, value in kwargs))):
            raise NotKnown(node, TOO_LARGE)
        made = Operation(kind, target, args, kwargs, getattr(node, "lineno", 0), how)
        self.body.operations.append(made)
        return made


_EXPRESSIONS: dict[type, Callable[..., Any]] = {
    ast.Name: Interpreter._name,
    ast.Constant: Interpreter._constant,
    ast.Tuple: Interpreter._several,
    ast.List: Interpreter._several,
    ast.Dict: Interpreter._dict,
    ast.Slice: Interpreter._slice,
    ast.Attribute: Interpreter._attribute,
    ast.Subscript: Interpreter._subscript,
    ast.BinOp: Interpreter._binary,
    ast.UnaryOp: Interpreter._unary,
    ast.Compare: Interpreter._compare,
    ast.IfExp: Interpreter._conditional,
    ast.Call: Interpreter._call,
}
_TOLD = {
    ast.If: "a condition", ast.For: "a loop", ast.While: "a loop", ast.With: "a with block", ast.Try: "a try block",
    ast.AugAssign: "an assignment in place", ast.AnnAssign: "an annotation", ast.ClassDef: "a class",
    ast.FunctionDef: "a function inside a function", ast.Global: "global", ast.Lambda: "a lambda",
    ast.NamedExpr: "an assignment inside an expression", ast.JoinedStr: "a formatted string",
    ast.ListComp: "a comprehension", ast.Starred: "a starred expression", ast.BoolOp: "and, or",
    ast.Return: "a return before the end", ast.Assign: "an assignment", ast.Expr: "an expression",
    ast.Raise: "raise", ast.Assert: "an assertion",
}  # fmt: skip


def _is_detached(value: Operation) -> bool:
    """Tell whether a value is the result of a detach, or a copy of one, or the number of a class."""
    if value.kind == "method" and value.target == "clone" and isinstance(value.args[0], Operation):
        value = value.args[0]
    return value.kind == "method" and value.target in ("detach", "argmax")


def _article(node: ast.AST) -> str:
    return _TOLD.get(type(node), f"a form of Python that no step has ({type(node).__name__})")


def _described(value: Any) -> str:
    match value:
        case Module():
            return f"the module {value.path}"
        case Dotted():
            return value.name
        case Defined():
            return f"the function {value.name}"
        case Optimizer() | Scaled():
            return "the optimizer"
        case Bound():
            return f".{value.name}"
        case Const():
            return "a constant"
    return "a value"


def _short(node: ast.AST) -> str:
    return f".{node.attr}" if isinstance(node, ast.Attribute) else type(node).__name__.lower()


def _stored(definition: ast.FunctionDef) -> set[str]:
    """Return the names that a function assigns or deletes somewhere: these are its own, whatever is imported."""
    found = set()
    for statement in definition.body:
        targets = statement.targets if isinstance(statement, ast.Assign | ast.Delete) else []
        for target in targets:
            found |= {n.id for n in ast.walk(target) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    return found


def _is_docstring(statement: ast.stmt) -> bool:
    value = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)
