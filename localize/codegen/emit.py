"""Write a program as Python text. The text is deterministic: same program, same bytes.

A value that only the next statement reads is written inside that statement. The text then looks hand-written, and no
name keeps an intermediate tensor alive.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator
from operator import itemgetter
from typing import Any

from localize.ir import (
    Backward,
    Call,
    Detach,
    Function,
    Mode,
    Program,
    Pull,
    Receive,
    ReceiveDelayed,
    Send,
    SendDelayed,
    Statement,
    Update,
    Value,
    ValueRole,
    ZeroGrad,
)

WIDTH = 110
FREED_AHEAD = 4
"""A name that is not read again would keep its tensor alive. It is deleted if at least this many statements follow; in
the driver of one rank of several, if any does."""

_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "truediv": "/", "floordiv": "//", "mod": "%", "pow": "**", "matmul": "@",
    "and_": "&", "or_": "|", "xor": "^", "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
    "lshift": "<<", "rshift": ">>",
}  # fmt: skip
_OPS = "localize.ops."
_PREFIX = {"neg": "-", "invert": "~", "pos": "+"}


def emit(program: Program) -> str:
    """Return the text of ``program``: a module whose last function is ``train_step``."""
    bodies = [_function(function, program) for function in program.functions]
    text = "\n\n\n".join(bodies)
    return f'"""{_documented(program.doc)}\n"""\n\n{_imports(text, program)}\n\n\n{text}\n'


def _imports(text: str, program: Program) -> str:
    lines = []
    if "operator." in text:
        lines += ["import operator", ""]
    lines.append("import torch")
    if "F." in text:
        lines.append("import torch.nn.functional as F")
    foreign = sorted({_home(call.target) for call in _functions(program)} - {"torch", "torch.nn.functional"})
    ours = sorted({call.target.removeprefix(_OPS) for call in _functions(program) if call.target.startswith(_OPS)})
    if any(isinstance(statement, Pull) for function in program.functions for statement in function.statements):
        ours.append("pull")
    lines += [f"import {module}" for module in foreign if module != "localize.ops"]
    if ours:
        lines += ["", f"from localize.ops import {', '.join(sorted(ours))}"]
    return "\n".join(lines)


def _functions(program: Program) -> Iterator[Call]:
    for function in program.functions:
        yield from (s for s in function.statements if isinstance(s, Call) and s.kind == "function")


def _home(target: str) -> str:
    """Return the module to import for a dotted name: torch for torch.linalg.norm, else all but the last part."""
    home = target.rpartition(".")[0]
    return "torch" if home.startswith("torch.") and home != "torch.nn.functional" else home


def _function(function: Function, program: Program) -> str:
    lines = [f"def {function.name}({', '.join(function.arguments)}):", f'    """{_documented(function.doc)}"""']
    lines += [f"    {line}" for line in _Body(function).lines()]
    if function.name == "train_step":
        lines += _results(program)
    return "\n".join(lines)


def _documented(text: str) -> str:
    """Return a text escaped for use between triple quotes."""
    return text.replace("\\", "\\\\").replace('"', '\\"') if '"' in text or "\\" in text else text


def _results(program: Program) -> list[str]:
    losses = ", ".join(f'"{name}": {value}' for name, value, _ in program.results)
    if program.scores == "none":
        return [f"    losses = {{{losses}}}", "    return losses, {}"]
    scores = ", ".join(f'"{name}": {value}' for name, _, value in program.results)
    word = "classes" if program.scores == "argmax" else "scores"
    return [f"    losses = {{{losses}}}", f"    {word} = {{{scores}}}", f"    return losses, {word}"]


class _Body:
    """Print the statements of one function."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.ahead = 1 if any(isinstance(one, Send | Receive) for one in function.statements) else FREED_AHEAD
        self.reads = Counter(name for statement in function.statements for name in _reads(statement)) + Counter(
            function.returns
        )
        self.reader = {name: i for i, statement in enumerate(function.statements) for name in _reads(statement)}
        """Number of the last statement that reads each name."""
        self.reader |= dict.fromkeys(function.returns, len(function.statements))
        self.inline: dict[str, str] = {}
        """Text of values that are written inside a statement instead of under a name, by name."""
        self.named: list[tuple[int, int, str]] = []
        """Heap of the names that hold a tensor: last statement that reads it, line that makes it, name."""

    def lines(self) -> list[str]:
        """Return the printed statements and the return statement."""
        lines: list[str] = []
        statements = self.function.statements
        for i, statement in enumerate(statements):
            text = self._text(statement)
            result = getattr(statement, "result", None)
            if result is None:
                lines.append(text)
                continue
            if self._may_nest(i, result, text):
                self.inline[result] = text
            else:
                for name, role in _results_of(statement):
                    if role not in ("loss", "scores"):
                        heapq.heappush(self.named, (self.reader.get(name, -1), len(lines), name))
                lines.append(f"{', '.join(name for name, _ in _results_of(statement))} = {text}")
                lines += self._freed(i)
        if self.function.returns:
            lines.append(f"return {', '.join(self._value(name) for name in self.function.returns)}")
        return lines

    def _freed(self, i: int) -> list[str]:
        """Return the ``del`` of names that no statement after number ``i`` reads, unless the function soon ends."""
        if len(self.function.statements) - i - 1 < self.ahead:
            return []
        dead: list[tuple[int, str]] = []
        while self.named and self.named[0][0] <= i:
            _, made, name = heapq.heappop(self.named)
            dead.append((made, name))
        dead.sort(key=itemgetter(0))
        return [f"del {', '.join(name for _, name in dead)}"] if dead else []

    def _may_nest(self, i: int, result: str | tuple[str, ...], text: str) -> bool:
        """Return whether a value can be written inside the statement that reads it."""
        statements = self.function.statements
        statement = statements[i]
        if not isinstance(result, str) or self.reads[result] != 1 or len(text) > WIDTH:
            return False
        if result in self.function.returns:  # detaches in front of the return
            return isinstance(statement, Detach) and all(isinstance(s, Detach) for s in statements[i:])
        following = self._reader(i, result)
        if following is None:
            return False
        if isinstance(statement, Call) and statement.kind == "local":
            return False
        kept = isinstance(statement, Call | Detach | Receive) and statement.role != "intermediate"
        if result not in _reads(following) or kept:
            return False
        self.inline[result] = text
        fits = len(self._text(following)) + len(str(following.result)) < WIDTH - 8
        del self.inline[result]
        return fits

    def _reader(self, i: int, result: str) -> Call | None:
        """Return the call that may contain the value: the next statement or, for a parameter, the one that reads it."""
        statement = self.function.statements[i]
        anywhere = isinstance(statement, Call) and statement.kind == "attribute"
        number = self.reader[result] if anywhere else i + 1
        return next((s for s in self.function.statements[number : number + 1] if isinstance(s, Call)), None)

    def _text(self, statement: Statement) -> str:
        match statement:
            case Detach(_, value, clone):
                return f"{self._value(value)}.detach()" + (".clone()" if clone else "")
            case Backward(loss, scaled):
                return f"optimizer.scale({loss}).backward()" if scaled else f"{loss}.backward()"
            case Update(None):
                return "optimizer.step()"
            case Update(k):
                return f"optimizer[{k}].step()"
            case ZeroGrad(None):
                return "optimizer.zero_grad()"
            case ZeroGrad(k):
                return f"optimizer[{k}].zero_grad()"
            case Pull(copy, source, decay):
                return f"pull({copy}, {source}, {decay!r})"
            case Receive(result, sender):
                return f'stream.receive("{result}", source={sender})'
            case Send(value, receiver):
                return f'stream.send("{value}", {value}, to={receiver})'
            case SendDelayed(module, receiver):
                return f'stream.send_delayed("{module}", {module}, to={receiver})'
            case ReceiveDelayed(module, sender):
                return f'stream.receive_delayed("{module}", {module}, source={sender})'
            case Call():
                return self._call(statement)

    def _value(self, name: str) -> str:
        return self.inline.get(name, name)

    def _call(self, call: Call) -> str:
        if call.kind == "attribute":
            return call.target
        if call.kind == "property":
            return f"{self._operand(call.args[0])}.{call.target}"
        if call.kind == "operator":
            return self._operator(call)
        args = call.args
        callee = _callee(call)
        if call.kind == "method":
            callee, args = f"{self._operand(args[0])}.{call.target}", args[1:]
        parts = [self._print(arg) for arg in args] + [f"{key}={self._print(value)}" for key, value in call.kwargs]
        return f"{callee}({', '.join(parts)})"

    def _operator(self, call: Call) -> str:
        args = call.args
        if call.target == "getitem":
            return f"{self._operand(args[0])}[{self._index(args[1])}]"
        if call.target in _INFIX and len(args) == 2:
            return f"{self._operand(args[0])} {_INFIX[call.target]} {self._operand(args[1])}"
        if call.target in _PREFIX and len(args) == 1:
            return f"{_PREFIX[call.target]}{self._operand(args[0])}"
        return f"operator.{call.target}({', '.join(self._print(arg) for arg in args)})"

    def _operand(self, value: Any) -> str:
        """Print a value next to an operator or a dot, in parentheses if it needs them."""
        text = self._print(value)
        plain = text.replace("_", "a").replace(".", "a").isalnum() or _is_closed(text)
        return text if plain else f"({text})"

    def _index(self, index: Any) -> str:
        if isinstance(index, tuple) and index:
            return ", ".join(self._index_item(item) for item in index) + ("," if len(index) == 1 else "")
        return self._index_item(index)

    def _index_item(self, item: Any) -> str:
        if not isinstance(item, slice):
            return self._print(item)
        start, stop, step = ("" if part is None else self._print(part) for part in (item.start, item.stop, item.step))
        return f"{start}:{stop}" + (f":{step}" if step else "")

    def _print(self, value: Any) -> str:
        match value:
            case Value(name):
                return self._value(name)
            case Mode(train, eval_):
                return f"({self._print(train)} if trunk.training else {self._print(eval_)})"
            case tuple():
                return f"({', '.join(map(self._print, value))}{',' if len(value) == 1 else ''})"
            case list():
                return f"[{', '.join(map(self._print, value))}]"
            case dict():
                return "{" + ", ".join(f"{key!r}: {self._print(item)}" for key, item in value.items()) + "}"
            case slice():
                return f"slice({', '.join(self._print(p) for p in (value.start, value.stop, value.step))})"
            case float() if value in (float("inf"), float("-inf")) or value != value:
                return f'float("{value}")'
            case str():
                return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
        if value is Ellipsis:
            return "..."
        if type(value).__module__ == "torch" and type(value).__name__ == "device":
            return f'torch.device("{value}")'
        return repr(value)


def _results_of(statement: Statement) -> Iterator[tuple[str, ValueRole]]:
    """Yield the names that a statement binds, each with its role."""
    match statement:
        case Call(result=tuple(names), role=tuple(roles)):
            yield from zip(names, roles, strict=True)
        case Call(result=tuple(names), role=str(role)):
            yield from ((name, role) for name in names)
        case Call(result=str(name), role=str(role)) | Detach(result=name, role=role) | Receive(result=name, role=role):
            yield name, role


def _is_closed(text: str) -> bool:
    """Return whether a text is a single call, subscript or parenthesis, and so needs no further parentheses."""
    if not text.endswith((")", "]")):
        return False
    depth = 0
    for i, character in enumerate(text):
        depth += character in "([{"
        depth -= character in ")]}"
        if depth == 0 and character == " ":
            return False
        if depth == 0 and character in "-~" and i == 0:
            return False
    return True


def _callee(call: Call) -> str:
    if call.kind != "function":
        return call.target
    if call.target.startswith("torch.nn.functional."):
        return "F." + call.target.removeprefix("torch.nn.functional.")
    return call.target.removeprefix(_OPS)


def _reads(statement: Statement) -> Iterator[str]:
    """Yield the values that a statement reads, once for each time it reads them."""
    match statement:
        case Detach(_, value, _) | Send(value, _):
            yield value
        case Backward(loss):
            yield loss
        case Call(args=args, kwargs=kwargs):
            yield from _values(args)
            yield from _values(kwargs)


def _values(argument: Any) -> Iterator[str]:
    match argument:
        case Value(name):
            yield name
        case Mode(train, eval_):
            yield from _values(train)
            yield from _values(eval_)
        case tuple() | list():
            for item in argument:
                yield from _values(item)
        case dict():
            yield from _values(list(argument.values()))
        case slice():
            yield from _values([argument.start, argument.stop, argument.step])
