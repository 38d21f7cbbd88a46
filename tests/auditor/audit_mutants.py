"""Every program that differs from a given one in a single statement.

Not among them are changes that leave the same step: swapping two operations that do not depend on each other, moving
``h.detach()`` (which shares memory, and so is the same before and after an update), detaching it twice, clearing the
gradients behind a forward, and the order of ``a + b``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from localize.ir import Backward, Call, Detach, Function, Program, Pull, Statement, Update, Value, ZeroGrad

ACTIONS = (Backward, Update, ZeroGrad, Pull)
INPUTS = ("x", "y")
MICRO_BATCHES, EXACT_PARTS = "localize.ops.micro_batches", "localize.ops.exact_parts"
PARTS = {MICRO_BATCHES: EXACT_PARTS, EXACT_PARTS: MICRO_BATCHES}


def mutants(program: Program, *, segments: bool) -> Iterator[tuple[str, Program]]:
    """Yield a description and a program for each one-statement change.

    Args:
        program: what is changed.
        segments: change the forward functions too, and not only the training functions and the driver.
    """
    for number, function in enumerate(program.functions):
        if function.name.startswith("segment_") and not segments:
            continue
        for told, mutated in _of_function(function, program):
            functions = (*program.functions[:number], mutated, *program.functions[number + 1 :])
            yield f"{function.name}: {told}", dataclasses.replace(program, functions=functions)
    yield from _of_results(program)


def _of_function(function: Function, program: Program) -> Iterator[tuple[str, Function]]:
    for i, statement in enumerate(function.statements):
        earlier = _names(function, i)
        match statement:
            case Detach():
                yield from _of_detach(function, i, statement, earlier)
            case Backward() | Update() | ZeroGrad() | Pull():
                yield from _of_action(function, i, statement, program)
            case Call():
                yield from _of_call(function, i, statement, earlier, program)
    yield from _of_order(function)
    yield from _of_returns(function)


def _of_detach(function: Function, i: int, detach: Detach, earlier: list[str]) -> Iterator[tuple[str, Function]]:
    yield f"drop {detach.result} = {detach.value}.detach()", _drop(function, i, detach.result, detach.value)
    yield f"flip clone of {detach.result}", _with(function, i, dataclasses.replace(detach, clone=not detach.clone))
    same = {detach.value, *(s.result for s in function.statements if isinstance(s, Detach) and s.value == detach.value)}
    for other in earlier:
        if other not in same and other not in ("trunk", "heads", "optimizer"):
            yield f"{detach.result} = {other}.detach()", _with(function, i, dataclasses.replace(detach, value=other))


def _of_action(function: Function, i: int, action: Statement, program: Program) -> Iterator[tuple[str, Function]]:
    yield f"drop {action}", _replace(function, i, ())
    yield f"twice {action}", _replace(function, i, (action, action))
    if isinstance(action, Backward):
        for other in _names(function, i):
            if other != action.loss and other not in ("trunk", "heads", "optimizer", *INPUTS):
                yield f"{other}.backward()", _with(function, i, dataclasses.replace(action, loss=other))
        yield f"flip scale of {action}", _with(function, i, dataclasses.replace(action, scaled=not action.scaled))
        return
    if isinstance(action, Pull):
        yield f"{action} the other way", _with(function, i, Pull(action.source, action.copy, action.decay))
        yield f"{action} half as much", _with(function, i, dataclasses.replace(action, decay=action.decay / 2))
        return
    count = len(program.results)
    for index in (None, *range(count)):
        if index != action.loss:
            yield f"{action} for loss {index}", _with(function, i, type(action)(index))


def _of_call(
    function: Function, i: int, call: Call, earlier: list[str], program: Program
) -> Iterator[tuple[str, Function]]:
    told = f"{call.result} = {call.target}"
    first = next((arg.name for arg in call.args if isinstance(arg, Value) and arg.name not in ("trunk", "heads")), None)
    if isinstance(call.result, str) and first is not None:
        yield f"drop {told}, pass {first} through", _drop(function, i, call.result, first)
    if call.kind == "module":
        for target in _others(function, call, program):
            yield f"{told} -> {target}", _with(function, i, dataclasses.replace(call, target=target))
    yield from ((f"{told}: {what}", _with(function, i, changed)) for what, changed in _arguments(call, earlier))
    if call.target in PARTS:
        yield f"{told} -> the other word", _with(function, i, dataclasses.replace(call, target=PARTS[call.target]))
        yield f"{told} without its last argument", _with(function, i, dataclasses.replace(call, args=call.args[:-1]))
    if isinstance(call.result, tuple):
        for a, b in zip(range(len(call.result)), range(1, len(call.result)), strict=False):
            names = list(call.result)
            names[a], names[b] = names[b], names[a]
            yield f"{told}: swap names {a}, {b}", _with(function, i, dataclasses.replace(call, result=tuple(names)))
    if isinstance(call.result, str) and function.name.startswith(("step_", "part_")) and call.kind != "local":
        cut = f"{call.result}_cut"
        yield f"detach {call.result}", _rename_after(function, i, (call, Detach(cut, call.result)), call.result, cut)
        again = dataclasses.replace(call, result=f"{call.result}_again")
        if call.kind == "module":
            yield f"twice {told}", _replace(function, i, (call, again))
    if function.name.startswith("segment_") and call.kind == "module" and "conv" in call.target:
        cut = f"{call.result}_cut"
        yield f"detach {call.result}", _rename_after(function, i, (call, Detach(cut, call.result)), call.result, cut)


def _arguments(call: Call, earlier: list[str]) -> Iterator[tuple[str, Call]]:
    """Yield a call with one argument changed, or with two swapped."""
    values = [j for j, arg in enumerate(call.args) if isinstance(arg, Value)]
    near = earlier[-3:] if call.kind in ("module", "operator", "method") else earlier
    for j in values:
        for other in near:
            if other != call.args[j].name and other not in ("trunk", "heads", "optimizer"):
                yield f"argument {j} = {other}", _argument(call, j, Value(other))
    if call.target not in ("add", "mul"):
        for j, k in zip(values, values[1:], strict=False):
            swapped = _argument(_argument(call, j, call.args[k]), k, call.args[j])
            yield f"swap arguments {j}, {k}", swapped
    for j, arg in enumerate(call.args):
        if isinstance(arg, int | float) and not isinstance(arg, bool):
            yield f"argument {j} = {arg} * 2", _argument(call, j, arg * 2)
    for key, _ in call.kwargs:
        kwargs = tuple((k, v * 2 if k == key and isinstance(v, float) else v) for k, v in call.kwargs)
        yield f"{key} doubled", dataclasses.replace(call, kwargs=kwargs)
        yield f"without {key}", dataclasses.replace(call, kwargs=tuple(pair for pair in call.kwargs if pair[0] != key))
    if call.target == "add":
        yield "+ becomes -", dataclasses.replace(call, target="sub")


def _argument(call: Call, j: int, value: Any) -> Call:
    return dataclasses.replace(call, args=(*call.args[:j], value, *call.args[j + 1 :]))


def _others(function: Function, call: Call, program: Program) -> list[str]:
    """Return other modules that could be called: those of this function, or all heads."""
    root = call.target.split(".")[0]
    functions = program.functions if root == "heads" else (function,)
    found = {s.target for f in functions for s in f.statements if isinstance(s, Call) and s.kind == "module"}
    return sorted(target for target in found if target != call.target and target.split(".")[0] == root)


def _of_order(function: Function) -> Iterator[tuple[str, Function]]:
    """Swap neighbours of which at least one acts; not a detach, which is the same at either place."""
    for i, (a, b) in enumerate(zip(function.statements, function.statements[1:], strict=False)):
        acts = [isinstance(s, ACTIONS) for s in (a, b)]
        runs = [isinstance(s, Call) and s.kind == "local" for s in (a, b)]
        computes = isinstance(b, Call) and not (b.kind == "local" and b.target.startswith(("step_", "part_")))
        if isinstance(a, ZeroGrad) and computes:
            continue
        if (any(acts) or all(runs)) and not isinstance(a, Detach) and not isinstance(b, Detach):
            swapped = (*function.statements[:i], b, a, *function.statements[i + 2 :])
            yield f"swap {a} and {b}", dataclasses.replace(function, statements=swapped)


def _of_returns(function: Function) -> Iterator[tuple[str, Function]]:
    everything = _names(function, len(function.statements))
    for i, name in enumerate(function.returns):
        for other in everything:
            if other != name and other not in ("trunk", "heads", "optimizer"):
                returns = (*function.returns[:i], other, *function.returns[i + 1 :])
                yield f"return {other} for {name}", dataclasses.replace(function, returns=returns)


def _of_results(program: Program) -> Iterator[tuple[str, Program]]:
    for i, (name, loss, scores) in enumerate(program.results):
        for j, (_, other_loss, other_scores) in enumerate(program.results):
            if i != j:
                for changed in ((name, other_loss, scores), (name, loss, other_scores)):
                    results = (*program.results[:i], changed, *program.results[i + 1 :])
                    yield f"results: {changed}", dataclasses.replace(program, results=results)
        dropped = (*program.results[:i], *program.results[i + 1 :])
        yield f"results: without {name}", dataclasses.replace(program, results=dropped)


# ------------------------------------------------------------------------------------------------------------ editing


def _names(function: Function, until: int) -> list[str]:
    """Return the names that exist before statement ``until``."""
    names = list(function.arguments)
    for statement in function.statements[:until]:
        result = getattr(statement, "result", ())
        names += [result] if isinstance(result, str) else list(result)
    return names


def _with(function: Function, i: int, statement: Statement) -> Function:
    return _replace(function, i, (statement,))


def _replace(function: Function, i: int, statements: tuple[Statement, ...]) -> Function:
    return dataclasses.replace(
        function, statements=(*function.statements[:i], *statements, *function.statements[i + 1 :])
    )


def _drop(function: Function, i: int, result: str, value: str) -> Function:
    """Remove statement ``i``; what read its result reads ``value``."""
    return _rename_after(function, i, (), result, value)


def _rename_after(function: Function, i: int, statements: tuple[Statement, ...], old: str, new: str) -> Function:
    def rename(name: str) -> str:
        return new if name == old else name

    following = tuple(_renamed(statement, rename) for statement in function.statements[i + 1 :])
    returns = tuple(rename(name) for name in function.returns)
    return dataclasses.replace(
        function, statements=(*function.statements[:i], *statements, *following), returns=returns
    )


def _renamed(statement: Statement, rename: Callable[[str], str]) -> Statement:
    def value(argument: Any) -> Any:
        if isinstance(argument, Value):
            return Value(rename(argument.name))
        if isinstance(argument, tuple):
            return tuple(value(item) for item in argument)
        return argument

    match statement:
        case Call():
            return dataclasses.replace(statement, args=value(statement.args), kwargs=value(statement.kwargs))
        case Detach():
            return dataclasses.replace(statement, value=rename(statement.value))
        case Backward():
            return dataclasses.replace(statement, loss=rename(statement.loss))
    return statement
