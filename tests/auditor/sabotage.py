"""Edits of a generated text, by the hundred: those that change the step, and those that only change its layout.

:func:`edits` yields every edit of a text that the engine knows, each made when it is asked for; :func:`layouts` yields
edits that a person makes without changing anything. Whether an edit changes the step is decided by :func:`same_step`,
which runs both.
"""

from __future__ import annotations

import ast
import copy
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Edit:
    """A kind of edit at one place of a text; the text is made when it is asked for."""

    kind: str
    before: str
    change: Callable[[ast.Module], Any]

    def text(self) -> str:
        """Return the text with this edit made."""
        tree = ast.parse(self.before)
        self.change(tree)
        return ast.unparse(ast.fix_missing_locations(tree)) + "\n"


Changes = Iterator[tuple[str, Callable[[ast.Module], Any]]]
"""Kinds of edits, each with what makes it in the syntax tree of the text."""
WRITES = (
    "{x}.detach().zero_()",
    "{x}.data.mul_(0.5)",
    "{x}.detach().select(0, 0).copy_({x}.detach().select(0, 1))",
    "torch.atleast_3d({x}).detach().add_(1)",
    "{x}.cpu().detach().clamp_(-1, 1)",
    "{x}.view(-1).detach().fill_(0.25)",
    "torch.zeros_like({x}, out={x})",
    "written = torch.Tensor.mul_({x}.detach(), 0.5)",
    "{x}.requires_grad_(False)",
    "{x}.register_hook(print)",
    "{x}.retain_grad()",
    "{x}.grad = None",
    "{x}[0] = 1",
    "{x} += 1",
)
WRAPPED = (
    "{x}.clamp(-5, 5)",
    "{x} * 1.0000001",
    "{x}.detach()",
    "torch.where({x} > 8, {x}.detach(), {x})",
    "({x} if {x}.shape[0] != 5 else {x}.detach())",
    "({x} if {x}.dtype != torch.float16 else {x}.detach())",
    "({x}.detach() if trunk.training else {x})",
    "torch.nan_to_num({x})",
    "{x} + 0 * {x}.sum()",
    "{x}.float()",
    "{x}.flip(0)",
    "torch.nn.functional.dropout({x}, 0.5, True)",
    "torch.utils.checkpoint.checkpoint(lambda v: v, {x})",
    "({x} if trunk.training else {x})",
    "({x} if trunk.training else 0)",
    "(written := {x})",
    "[{x} for _ in (1,)][0]",
    "(*({x},),)[0]",
    "(lambda v={x}: v)()",
    "({x}, {x})[1]",
    "getattr({x}, 'data')",
    "getattr({x}, 'clone')()",
    "{x}.clone()",
    "{x}.contiguous()",
    "{x}.requires_grad_()",
    "{x}.view_as({x})",
    "torch.Tensor.add_({x}, 0)",
    "torch.ops.aten.mul_.Scalar({x}, 1)",
    "torch.special.expit({x})",
    "torch.func.functional_call(trunk, {{}}, ({x},))",
    "torch.autograd.Variable({x})",
)
STATEMENTS = (
    'a = torch.os.system("touch {marker}")',
    'torch.os.system("touch {marker}")',
    "a = torch.builtins.exec(\"open({marker!r}, 'w')\")",
    'a = torch.from_file("{marker}", True, 8)',
    'a = torch.serialization.os.mkdir("{marker}")',
    'a = __import__("os").mkdir("{marker}")',
    'a = open("{marker}", "w")',
    'exec("import os")',
    "print(1)",
    "a = [1 for _ in range(3)]",
    "a = (lambda: 1)()",
    "global step_0",
    "import os",
    "assert True",
    "raise StopIteration",
    "torch.manual_seed(0)",
    "a = torch.manual_seed(0)",
    "a = torch.set_rng_state(torch.get_rng_state())",
    "a = torch.set_grad_enabled(False)",
    "a = torch.set_autocast_enabled(True)",
    "a = torch.set_default_dtype(torch.float64)",
    "a = torch.autograd.set_detect_anomaly(True)",
    "a = torch.set_num_threads(1)",
    "a = torch.rand(1)",
    "a = torch.rand(1, generator=None)",
    "torch.counter = 1",
    "F.cross_entropy = F.nll_loss",
    "train_step = 1",
    "with torch.no_grad():\n    pass",
    "if torch.is_grad_enabled():\n    pass",
    "for i in (1, 2):\n    pass",
    "while False:\n    pass",
    "try:\n    pass\nfinally:\n    pass",
    "a: int = 1",
    "(a := 1)",
    "yield 1",
    "a, *b = 1, 2, 3",
    "1 << 40000000000",
    "a = trunk.apply(print)",
    "trunk.eval()",
    "trunk.requires_grad_(False)",
    "a = trunk.state_dict()",
    "a = trunk.training",
    "trunk.training = False",
    "F = trunk",
    "torch = F",
    "x = x",
    "trunk, heads = heads, trunk",
    "a = trunk.get_parameter('stem.weight')",
    "a = trunk.stem.weight.data",
    "trunk.stem.weight.grad = None",
    "trunk.bn.reset_running_stats()",
    "trunk.bn.momentum = 0.5",
    "a = trunk.bn.num_batches_tracked.add_(1)",
    "trunk.stem.register_forward_hook(print)",
    "__debug__ = 1",
    "a = __builtins__",
    "a = torch.utils.data.random_split",
    "a = F.torch.os.getcwd()",
    "[a for a in (1, 2)]",
    "match x:\n    case _:\n        pass",
    "def train_step():\n    pass",
    "nonlocal x",
    "x: open('{marker}', 'w') = 1",
    "del F",
    "...",
)
DRIVER_STATEMENTS = (
    "optimizer.step()",
    "optimizer[0].step()",
    "optimizer.zero_grad()",
    "optimizer[0].zero_grad()",
    "optimizer.param_groups.clear()",
    "a = optimizer.state",
    "optimizer.lr = 0",
    "pull(heads, heads, 0.5)",
    "from localize.ops import pull",
    "a = heads.requires_grad_(False)",
    "y.data.zero_()",
    "y.zero_()",
    "y[0] = 0",
    "del y",
    "heads = trunk",
    "trunk = heads",
    "optimizer = optimizer[0]",
    "a = optimizer.scale(x)",
    "optimizer.step",
    "optimizer.step() if trunk.training else 0",
    "a = 0 if trunk.training else optimizer.zero_grad()",
    "optimizer.zero_grad(set_to_none=False)",
    "optimizer.param_groups[0]['lr'] = 0",
    "optimizer.state.clear()",
    "y = y.clone()",
    "y = y.roll(1)",
    "x = x.flip(0)",
    "x += 0.01 * y.view(-1, 1, 1, 1)",
    "torch.nn.utils.clip_grad_norm_(trunk.parameters(), 1.0)",
    "a = segment_0(trunk, x)",
    "segment_0 = trunk",
)
TOP_LEVEL = (
    "import os",
    "import os.path",
    "from torch import os",
    "from torch import *",
    "from os import system",
    "import torch.utils.cpp_extension",
    "import antigravity",
    "from localize.runtime.model import load",
    'open("{marker}", "w")',
    "X = 1",
    "F.cross_entropy = F.nll_loss",
    "class A:\n    pass",
    "def unused(x):\n    return x",
    "def unused(x=torch.os.system('touch {marker}')):\n    return x",
    "@torch.compile\ndef unused(x):\n    return x",
    "async def unused(x):\n    return x",
    "if True:\n    pass",
    "del F",
    "__import__('os').mkdir({marker!r})",
    "torch.set_default_dtype(torch.float64)",
    "import torch as F",
    "import torch.nn.functional as torch",
    "from torch.nn import functional as segment_0",
    "F = torch",
    "type X = int",
    "X: open('{marker}', 'w') = 1",
    "def __getattr__(name):\n    return name",
    "def getattr(a, b):\n    return a",
    "def segment_0(trunk, x):\n    return x",
    "train_step = train_step",
    "lambda: 1",
    "'a text'",
    "[open('{marker}', 'w') for _ in (1,)]",
)


def edits(source: str, marker: str) -> Iterator[Edit]:
    """Yield edits of a text that may change what it does. Those that run code outside of the step touch ``marker``."""
    tree = ast.parse(source)
    for number, top in enumerate(tree.body):
        found: Changes = iter(())
        if isinstance(top, ast.FunctionDef):
            found = _of_function(top, number, marker)
        elif isinstance(top, ast.Import | ast.ImportFrom):
            found = iter([("import dropped", lambda made, at=number: made.body.pop(at))])
        yield from (Edit(kind, source, change) for kind, change in found)
    yield from (Edit(kind, source, change) for kind, change in _of_functions(tree))
    for text in TOP_LEVEL:
        if text.startswith("type ") and sys.version_info < (3, 12):
            continue
        for at in (1, len(tree.body)):
            yield Edit("top level", source, _insertion(None, at, text.format(marker=marker)))


def _of_functions(tree: ast.Module) -> Changes:
    """Yield edits of two functions at once: their names or their bodies swapped, one before the other."""
    places = [i for i, top in enumerate(tree.body) if isinstance(top, ast.FunctionDef)]
    for a, b in zip(places, places[1:], strict=False):

        def names(made: ast.Module, a: int = a, b: int = b) -> None:
            made.body[a].name, made.body[b].name = made.body[b].name, made.body[a].name

        def bodies(made: ast.Module, a: int = a, b: int = b) -> None:
            made.body[a].body, made.body[b].body = made.body[b].body, made.body[a].body

        yield "names swapped", names
        yield "bodies swapped", bodies
        yield "function dropped", lambda made, a=a: made.body.pop(a)


def _of_function(function: ast.FunctionDef, number: int, marker: str) -> Changes:
    yield from _of_signature(number, marker)
    for place in range(len(function.body)):
        yield from _of_statement(function, number, place, marker)
    yield from _of_expressions(function, number)


def _insertion(function: int | None, at: int, text: str) -> Callable[[ast.Module], Any]:
    def change(made: ast.Module) -> None:
        body = made.body if function is None else made.body[function].body
        body[at:at] = ast.parse(text).body

    return change


def _of_signature(number: int, marker: str) -> Changes:
    evil = f"torch.os.system('touch {marker}')"

    def with_default(made: ast.Module) -> None:
        made.body[number].args.defaults = [_parsed(evil)]

    def decorated(made: ast.Module) -> None:
        made.body[number].decorator_list = [_parsed("torch.no_grad()")]

    def annotated(made: ast.Module) -> None:
        made.body[number].args.args[0].annotation = _parsed(evil)

    def returning(made: ast.Module) -> None:
        made.body[number].returns = _parsed(evil)

    def starred(made: ast.Module) -> None:
        made.body[number].args.kwarg = ast.arg("more")

    def with_constant(made: ast.Module) -> None:
        made.body[number].args.defaults = [ast.Constant(0)]

    def by_keyword(made: ast.Module) -> None:
        found = made.body[number].args
        found.kwonlyargs, found.kw_defaults = [found.args.pop()], [None]

    def by_position(made: ast.Module) -> None:
        found = made.body[number].args
        found.posonlyargs, found.args = found.args, []

    def swapped(made: ast.Module) -> None:
        found = made.body[number].args.args
        found[-2:] = found[:-3:-1]

    def dropped(made: ast.Module) -> None:
        made.body[number].args.args.pop()

    changes = (with_default, decorated, annotated, returning, starred, with_constant, by_keyword, by_position)
    for change in (*changes, swapped, dropped):
        yield "signature", change


def _of_statement(function: ast.FunctionDef, number: int, place: int, marker: str) -> Changes:
    body = function.body
    if place > 0:
        yield "statement dropped", lambda made: made.body[number].body.pop(place)
        yield "statement twice", _insertion(number, place, ast.unparse(body[place]))
    if 0 < place < len(body) - 1:

        def swap(made: ast.Module) -> None:
            found = made.body[number].body
            found[place], found[place + 1] = found[place + 1], found[place]

        yield "statements swapped", swap
        rng = random.Random(f"move {number} {place}")
        for to in rng.sample(range(1, len(body)), min(2, len(body) - 1)):

            def move(made: ast.Module, to: int = to) -> None:
                found = made.body[number].body
                found.insert(to, found.pop(place))

            if to not in (place, place + 1):
                yield "statement moved", move
    yield from _of_targets(body[place], number, place)
    known = [name for name in _tensors(function, place) if name not in ("trunk", "heads", "optimizer", "share")]
    names = list(dict.fromkeys((*known[:2], *known[-2:])))
    rng = random.Random(f"{number} {place}")
    texts = list(rng.sample(STATEMENTS, 5))
    texts += [text.format(x=name) for name in names[:2] for text in rng.sample(WRITES, 2)]
    if function.name == "train_step" or function.name.startswith("step_"):
        texts += rng.sample(DRIVER_STATEMENTS, 4)
    for text in texts:
        yield "statement added", _insertion(number, max(place, 1), text.replace("{marker}", marker))


def _of_targets(statement: ast.stmt, number: int, place: int) -> Changes:
    """Yield edits of what a statement assigns to: names swapped or dropped, in place, in one mode only."""

    def at(made: ast.Module) -> Any:
        return made.body[number].body[place]

    def put(made: ast.Module, text: str) -> None:
        made.body[number].body[place : place + 1] = ast.parse(text).body

    if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Tuple):

        def swapped(made: ast.Module) -> None:
            names = at(made).targets[0].elts
            names[0], names[-1] = names[-1], names[0]

        def starred(made: ast.Module) -> None:
            names = at(made).targets[0].elts
            names[-1] = ast.Starred(names[-1], ast.Store())

        yield "names swapped", swapped
        yield "name dropped", lambda made: at(made).targets[0].elts.pop()
        yield "name starred", starred
    elif isinstance(statement, ast.Assign):
        name, value = ast.unparse(statement.targets[0]), ast.unparse(statement.value)
        yield "in place", lambda made: put(made, f"{name} = 0\n{name} += {value}")
        yield "two targets", lambda made: put(made, f"{name} = F = {value}")
        yield "annotated", lambda made: put(made, f"{name}: int = {value}")
        yield "in one mode", lambda made: put(made, f"{name} = {value} if trunk.training else 0")
    elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        value = ast.unparse(statement.value)
        yield "in one mode", lambda made: put(made, f"a = {value} if trunk.training else 0")
        yield "in a condition", lambda made: put(made, f"if x.shape[0] != 5:\n    {value}")
        yield "behind and", lambda made: put(made, f"trunk.training and {value}")
    elif isinstance(statement, ast.Delete):
        yield "deleted, and more", lambda made: at(made).targets.append(ast.Name("x", ast.Del()))
    elif isinstance(statement, ast.Return) and isinstance(statement.value, ast.Tuple):

        def turned(made: ast.Module) -> None:
            at(made).value.elts.reverse()

        yield "return turned", turned
        yield "return as a list", lambda made: setattr(at(made), "value", ast.List(at(made).value.elts, ast.Load()))


def _tensors(function: ast.FunctionDef, place: int) -> list[str]:
    names = [a.arg for a in function.args.args]
    for statement in function.body[:place]:
        if isinstance(statement, ast.Assign):
            names += [n.id for n in ast.walk(statement.targets[0]) if isinstance(n, ast.Name)]
        elif isinstance(statement, ast.Delete):
            gone = {n.id for n in ast.walk(statement) if isinstance(n, ast.Name)}
            names = [name for name in names if name not in gone]
    return names


def _of_expressions(function: ast.FunctionDef, number: int) -> Changes:
    """Yield edits of one expression: wrapped, dropped, with other arguments, other constants, another operator."""
    for i, node in enumerate(ast.walk(function)):
        rng = random.Random(f"{number} {i}")
        for what, make in _replacements(node, function, rng):

            def change(made: ast.Module, i: int = i, make: Callable[[Any], Any] = make) -> None:
                target = list(ast.walk(made.body[number]))[i]
                replaced = make(copy.deepcopy(target))
                for parent in ast.walk(made.body[number]):
                    for name, value in ast.iter_fields(parent):
                        if value is target:
                            setattr(parent, name, replaced)
                        elif isinstance(value, list):
                            value[:] = [replaced if item is target else item for item in value]

            yield what, change


def _replacements(node: ast.AST, function: ast.FunctionDef, rng: random.Random) -> Iterator[tuple[str, Callable]]:
    if isinstance(node, ast.Call):
        if node.args and isinstance(node.args[0], ast.Name | ast.Call):
            yield "call dropped", lambda call: call.args[0]
        for text in rng.sample(WRAPPED, 3):
            yield "wrapped", lambda call, text=text: _parsed(text.format(x=ast.unparse(call)))
        if len(node.args) > 1:
            yield "arguments swapped", lambda call: _with_args(call, [*call.args[1:], call.args[0]])
            yield "argument dropped", lambda call: _with_args(call, call.args[:-1])
        if node.keywords:
            yield "keyword dropped", lambda call: ast.Call(call.func, call.args, call.keywords[1:])
        yield (
            "arguments starred",
            lambda call: _with_args(call, [ast.Starred(ast.List(call.args, ast.Load()), ast.Load())]),
        )
        if node.keywords:
            yield "keyword twice", lambda call: ast.Call(call.func, call.args, [*call.keywords, call.keywords[0]])
        yield "argument added", lambda call: _with_args(call, [*call.args, ast.Constant(0)])
        yield (
            "keyword added",
            lambda call: ast.Call(call.func, call.args, [*call.keywords, ast.keyword("inplace", ast.Constant(True))]),
        )
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        others = [name for name in _tensors(function, len(function.body)) if name != node.id]
        for other in rng.sample(others, min(2, len(others))):
            yield "another name", lambda _, other=other: ast.Name(other, ast.Load())
    elif isinstance(node, ast.Attribute):
        for other in ("relu", "weight", "data", "requires_grad_", "__class__"):
            if other != node.attr and rng.random() < 0.3:
                yield "another attribute", lambda one, other=other: ast.Attribute(one.value, other, one.ctx)
    elif isinstance(node, ast.Constant) and not isinstance(node.value, str):
        changed = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v * 1.01}.get(type(node.value))
        if changed is not None:
            yield "constant", lambda one, changed=changed: ast.Constant(changed(one.value))
            yield "type of constant", lambda one: ast.Constant(float(one.value))
        yield "no constant", lambda _: ast.Constant("x")
    elif isinstance(node, ast.Constant):
        yield "text", lambda one: ast.Constant(one.value + "x")
    elif isinstance(node, ast.BinOp):
        yield "operator", lambda one: ast.BinOp(one.left, ast.Sub(), one.right)
        yield "operands swapped", lambda one: ast.BinOp(one.right, one.op, one.left)


def _parsed(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def _with_args(call: ast.Call, args: list[ast.expr]) -> ast.Call:
    return ast.Call(call.func, args, call.keywords)


# ------------------------------------------------------------------------------------------------------------- layout


def layouts(source: str) -> Iterator[tuple[str, str]]:
    """Yield kinds and texts of edits that change names, lines and comments, and nothing else."""
    tree = ast.parse(source)
    yield "formatted anew", ast.unparse(tree) + "\n"
    yield "comments", "".join(f"{line}  # {i}\n" if line and '"""' not in line else f"{line}\n"
                              for i, line in enumerate(ast.unparse(tree).splitlines()))  # fmt: skip
    yield "blank lines", source.replace("\n    ", "\n\n    ")
    yield "renamed", ast.unparse(_Renaming().visit(ast.parse(source))) + "\n"
    yield "one value a line", ast.unparse(_split(ast.parse(source))) + "\n"
    yield "without docstrings", ast.unparse(_without_docstrings(ast.parse(source))) + "\n"


class _Renaming(ast.NodeTransformer):
    """Give every local variable another name; arguments keep theirs."""

    def visit_FunctionDef(self, function: ast.FunctionDef) -> ast.FunctionDef:  # noqa: N802
        own = {
            n.id
            for s in function.body
            if isinstance(s, ast.Assign)
            for n in ast.walk(s.targets[0])
            if isinstance(n, ast.Name)
        }
        for node in ast.walk(function):
            if isinstance(node, ast.Name) and node.id in own:
                node.id = f"renamed_{node.id}"
        return function


def _split(tree: ast.Module) -> ast.Module:
    """Give every nested call a name of its own."""
    for function in tree.body:
        if isinstance(function, ast.FunctionDef):
            body: list[ast.stmt] = []
            for number, statement in enumerate(function.body):
                splitter = _Splitter(number)
                value = getattr(statement, "value", None)
                if isinstance(value, ast.Call) and isinstance(statement, ast.Assign):
                    value.args = [splitter.visit(arg) for arg in value.args]
                body += [*splitter.made, statement]
            function.body = body
    return ast.fix_missing_locations(tree)


class _Splitter(ast.NodeTransformer):
    def __init__(self, number: int) -> None:
        self.number = number
        self.made: list[ast.stmt] = []

    def visit_Call(self, call: ast.Call) -> ast.expr:  # noqa: N802
        self.generic_visit(call)
        name = f"value_{self.number}_{len(self.made)}"
        self.made.append(ast.Assign([ast.Name(name, ast.Store())], call, lineno=0))
        return ast.Name(name, ast.Load())

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:  # noqa: N802
        return node


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in (tree, *tree.body):
        first = node.body[0] if isinstance(node, ast.Module | ast.FunctionDef) else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            node.body.pop(0)
    return tree


# -------------------------------------------------------------------------------------------------------- equivalence


def same_step(local: Any, edited: Any) -> bool:
    """Tell whether two texts do the same: on batches of 2, 4 and 7, one after the other, in float32 and float64."""
    return all(_same_from(local, edited, dtype) for dtype in (torch.float32, torch.float64))


def _same_from(local: Any, edited: Any, dtype: torch.dtype) -> bool:
    pair = [copy.deepcopy(one).train().to(dtype) for one in (local, edited)]
    optimizers = [torch.optim.SGD(one.param_groups(lr=0.05), lr=0.05, momentum=0.9) for one in pair]
    for size in (2, 4, 7):
        left = []
        for one, optimizer in zip(pair, optimizers, strict=True):
            generator = torch.Generator().manual_seed(size)
            x = torch.randn(size, 3, 8, 8, generator=generator, dtype=dtype)
            y = torch.randint(5, (size,), generator=generator)
            torch.manual_seed(size)
            try:
                result = one.step(x, y, optimizer)
            except Exception as error:  # noqa: BLE001  (a text that fails is another text)
                left.append([type(error).__name__])
                continue
            left.append([*one.state_dict().values(), *result.losses.values(), x, y, torch.get_rng_state(), *_state()])
        if len(left[0]) != len(left[1]) or not all(map(_equal, *left)):
            return False
    return True


def _state() -> list[Any]:
    return [torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_default_dtype(), random.getstate()]


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and one == other


def of_the_day(found: list[Any], count: int) -> list[Any]:
    """Return a sample that changes every day, and is the same all day."""
    return random.Random(date.today().isoformat()).sample(found, min(count, len(found)))
