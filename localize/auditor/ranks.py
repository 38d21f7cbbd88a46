"""Read the texts of ranks beside the one-process text: what crosses, which way, and whether together they are the step.

The texts are only parsed. What a function of a text trains is the audit of the one-process text; here it is shown that
the ranks call the very same functions, in the same order, on the same values.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from localize.ir import Check

CLAIMS = {
    "ranks.functions": "each rank calls functions of the one-process text, byte for byte",
    "ranks.forward": "a rank receives what an earlier one has sent it, and each message is read",
    "ranks.detached": "each value that is sent has left a training function detached",
    "ranks.apart": "what is trained, or moves, is on one rank",
    "ranks.delayed": "what goes to an earlier rank are parameters that the batch before has left, for a declared copy",
    "ranks.together": "the drivers, one after the other, are the one-process driver",
}


@dataclass
class _Rank:
    """A text, taken apart."""

    functions: dict[str, ast.FunctionDef]
    source: str
    sends: list[tuple[str, int, int]] = field(default_factory=list)
    """Names, receivers and lines."""
    receives: list[tuple[str, int, int]] = field(default_factory=list)
    late: list[tuple[str, str, int]] = field(default_factory=list)
    """What goes to earlier ranks: ``send`` or ``receive``, the module, and the other rank."""
    order: list[str] = field(default_factory=list)
    """What each statement of the driver is, or its text: for those that go to earlier ranks."""
    steps: list[str] = field(default_factory=list)
    """The other statements of the driver, written again, in order."""
    problems: list[str] = field(default_factory=list)

    def text_of(self, name: str) -> str:
        return ast.get_source_segment(self.source, self.functions[name]) or ""


def check_ranks(local: Any, sources: Sequence[str]) -> tuple[Check, ...]:
    """Compare the texts of ranks with the one-process text, without running any.

    Args:
        local: a :class:`localize.LocalModel`, whose ``source`` is the one-process text.
        sources: the text of each rank, in their order.
    """
    try:
        whole, ranks = _read(local.source), [_read(source) for source in sources]
    except SyntaxError as error:
        return (Check("ranks.functions", False, CLAIMS["ranks.functions"], f"a text is not Python: {error.msg}"),)
    found = {
        "ranks.functions": list(_functions(whole, ranks)),
        "ranks.forward": list(_forward(ranks)),
        "ranks.detached": list(_detached(whole, ranks)),
        "ranks.apart": list(_apart(local, ranks)),
        "ranks.delayed": list(_delayed(local, ranks)),
        "ranks.together": list(_together(whole, ranks)),
    }
    messages = [f"{name} from {r} to {to}" for r, rank in enumerate(ranks) for name, to, _ in rank.sends]
    messages += [f"{name} from {r} to {to}, a batch late" for r, rank in enumerate(ranks)
                 for way, name, to in rank.late if way == "send"]  # fmt: skip
    evidence = f"{len(ranks)} texts; messages: {', '.join(messages) or 'none'}."
    return tuple(
        Check(id, not wrong, CLAIMS[id], "\n".join(wrong[:5]) if wrong else evidence) for id, wrong in found.items()
    )


def _read(source: str) -> _Rank:
    tree = ast.parse(source)
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    read = _Rank(functions, source)
    driver = functions.get("train_step")
    if driver is None:
        read.problems.append("there is no train_step")
        return read
    others = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.Import | ast.ImportFrom)]
    read.problems += [f"line {node.lineno} stands outside of functions" for node in others[1:]]
    for statement in driver.body[1:]:
        _sort(statement, read)
    return read


def _sort(statement: ast.stmt, read: _Rank) -> None:
    """Note a statement of a driver as what it is: a message, or a step."""
    match statement:
        case ast.Expr(
            ast.Call(
                ast.Attribute(ast.Name("stream"), "send"),
                [ast.Constant(str(name)), ast.Name(value)],
                [ast.keyword("to", ast.Constant(int(to)))],
            )
        ) if name == value:
            read.sends.append((name, to, statement.lineno))
        case ast.Assign(
            [ast.Name(value)],
            ast.Call(
                ast.Attribute(ast.Name("stream"), "receive"),
                [ast.Constant(str(name))],
                [ast.keyword("source", ast.Constant(int(source)))],
            ),
        ) if name == value:
            read.receives.append((name, source, statement.lineno))
        case ast.Expr(
            ast.Call(
                ast.Attribute(ast.Name("stream"), "send_delayed" | "receive_delayed" as way),
                [ast.Constant(str(name)), ast.Attribute() as module],
                [ast.keyword("to" | "source" as side, ast.Constant(int(other)))],
            )
        ) if name == ast.unparse(module) and (side == "to") == (way == "send_delayed"):
            read.late.append((way.removesuffix("_delayed"), name, other))
            read.order.append(f"{way} {name}")
        case ast.Delete():
            pass
        case _:
            if any(isinstance(node, ast.Name) and node.id == "stream" for node in ast.walk(statement)):
                read.problems.append(f"line {statement.lineno} is no message: {ast.unparse(statement)[:100]}")
            read.steps.append(ast.unparse(statement))
            read.order.append(read.steps[-1])


def _functions(whole: _Rank, ranks: Sequence[_Rank]) -> Iterator[str]:
    for number, rank in enumerate(ranks):
        yield from (f"rank {number}: {problem}" for problem in rank.problems)
        for name in rank.functions:
            if name != "train_step" and (name not in whole.functions or rank.text_of(name) != whole.text_of(name)):
                yield f"rank {number}: {name} is not that of the one-process text"
            if any(isinstance(n, ast.Name) and n.id == "stream" for n in ast.walk(rank.functions[name])) and (
                name != "train_step"
            ):
                yield f"rank {number}: {name} sends or receives"


def _forward(ranks: Sequence[_Rank]) -> Iterator[str]:
    sent = {(name, r, to): line for r, rank in enumerate(ranks) for name, to, line in rank.sends}
    taken = {(name, source, r): line for r, rank in enumerate(ranks) for name, source, line in rank.receives}
    if len(sent) != sum(len(rank.sends) for rank in ranks) or len(taken) != sum(len(rank.receives) for rank in ranks):
        yield "a message is sent or read twice"
    for name, source, to in sent:
        if not source < to < len(ranks):
            yield f"rank {source} sends {name} to rank {to}, which is not after it"
    for name, source, to in sent.keys() - taken.keys():
        yield f"rank {to} does not read {name}, which rank {source} sends"
    for name, source, to in taken.keys() - sent.keys():
        yield f"rank {to} reads {name}, which rank {source} does not send"


def _detached(whole: _Rank, ranks: Sequence[_Rank]) -> Iterator[str]:
    """Yield what is sent and was not made by a detach."""
    for number, rank in enumerate(ranks):
        driver = rank.functions.get("train_step")
        if driver is None:
            continue
        for name, _, line in rank.sends:
            bound = [statement for statement in driver.body if _stores(statement, name)]
            if len(bound) != 1 or not _makes_detached(bound[0], name, whole):
                yield f"rank {number}, line {line}: {name} is not seen to be detached"


def _stores(statement: ast.stmt, name: str) -> bool:
    return any(isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Store) for n in ast.walk(statement))


def _makes_detached(statement: ast.stmt, name: str, whole: _Rank) -> bool:
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return False
    target = statement.targets[0]
    names = target.elts if isinstance(target, ast.Tuple) else [target]
    at = next((i for i, one in enumerate(names) if isinstance(one, ast.Name) and one.id == name), None)
    if at is None:
        return False
    if not isinstance(target, ast.Tuple) and _is_detach(statement.value):
        return True
    call = statement.value
    if not isinstance(call, ast.Call):
        return False
    inside = call.args[0] if isinstance(call.func, ast.Name) and call.func.id == "micro_batches" else call.func
    function = whole.functions.get(inside.id) if isinstance(inside, ast.Name) else None
    returned = function.body[-1] if function is not None else None
    if not isinstance(returned, ast.Return) or returned.value is None:
        return False
    values = returned.value.elts if isinstance(returned.value, ast.Tuple) else [returned.value]
    value = values[at] if at < len(values) else None
    if isinstance(value, ast.Name) and function is not None:
        bound = [one for one in function.body if isinstance(one, ast.Assign) and _binds(one, value.id)]
        value = bound[0].value if len(bound) == 1 else None
    return value is not None and _is_detach(value)


def _binds(statement: ast.Assign, name: str) -> bool:
    return any(isinstance(one, ast.Name) and one.id == name for one in statement.targets)


def _is_detach(value: ast.expr) -> bool:
    """Tell whether an expression is ``... .detach()`` or ``... .detach().clone()``."""
    match value:
        case ast.Call(ast.Attribute(inner, "clone"), [], []):
            return _is_detach(inner)
        case ast.Call(ast.Attribute(_, "detach"), [], []):
            return True
    return False


def _apart(local: Any, ranks: Sequence[_Rank]) -> Iterator[str]:
    """Yield what is trained, or moved by a norm, and is read by two ranks."""
    trained = {name for loss in local.plan.losses for name in local.plan.reach(loss)}
    changing = trained | _statistics(local)
    names: dict[int, str] = {}
    for kept in (local.named_parameters(), local.named_buffers()):
        names |= {id(tensor): name for name, tensor in kept}
    place: dict[str, int] = {}
    roots, modules = {"trunk": local.trunk, "heads": local.heads}, dict(local.named_modules())
    for number, rank in enumerate(ranks):
        arriving = [local.get_submodule(name) for way, name, _ in rank.late if way == "receive" and name in modules]
        read = [one for function in rank.functions.values() for one in _named(function, roots)]
        for thing in read:
            if any(thing is module for module in arriving):
                continue  # ranks.delayed
            for name in sorted({names[id(t)] for t in _tensors(thing) if id(t) in names}):
                if name in changing and place.setdefault(name, number) != number:
                    yield f"{name} is on ranks {place[name]} and {number}"


def _delayed(local: Any, ranks: Sequence[_Rank]) -> Iterator[str]:
    """Yield what goes to an earlier rank and is not what a declared copy is pulled towards, a batch late."""
    plan = local.plan
    declared = {f"heads.{c.source}": f"pull(heads.{c.block}, heads.{c.source}, {c.decay!r})" for c in plan.copies
                if c.of == "heads" and c.decay is not None and not c.part and plan.pull == "before"}  # fmt: skip
    sent = sorted((name, r, to) for r, rank in enumerate(ranks) for way, name, to in rank.late if way == "send")
    taken = sorted(
        (name, source, r) for r, rank in enumerate(ranks) for way, name, source in rank.late if way != "send"
    )
    if sent != taken:
        yield "what is sent to earlier ranks is not what they read"
    roots = {"trunk": local.trunk, "heads": local.heads}
    for name, source, to in set(sent) & set(taken):
        if not to < source < len(ranks):
            yield f"rank {source} sends {name} to rank {to}, which is not before it"
            continue
        if name not in declared:
            yield f"rank {source} sends {name} to rank {to}, and no copy is declared to be pulled towards it"
            continue
        sending, reading = ranks[source].order, ranks[to].order
        at = sending.index(f"send_delayed {name}")
        if any(not one.startswith(("optimizer.zero_grad()", "send_delayed ")) for one in sending[:at]):
            yield f"rank {source} sends {name} after a step of this batch"
        at = reading.index(f"receive_delayed {name}")
        if reading[at + 1 : at + 2] != [declared[name]]:
            yield f"rank {to} does not pull its copy towards {name} directly after it has arrived"
        module = local.get_submodule(name)
        for function in ranks[to].functions.values():
            if function.name != "train_step" and any(one is module for one in _named(function, roots)):
                yield f"rank {to} reads {name} in {function.name}"
    for number, rank in enumerate(ranks):
        for pull in declared.values():
            copy = local.get_submodule(pull.removeprefix("pull(").partition(",")[0])
            reads = any(one is copy for function in rank.functions.values() if function.name != "train_step"
                        for one in _named(function, roots))  # fmt: skip
            if reads and pull not in rank.steps:
                yield f"rank {number} reads a copy that it does not pull: {pull}"


def _statistics(local: Any) -> set[str]:
    """Return the names of the buffers that norms move."""
    found: set[str] = set()
    for prefix, module in local.named_modules():
        if getattr(module, "track_running_stats", False):
            found |= {f"{prefix}.{name}" for name, _ in module.named_buffers(recurse=False)}
    return found


def _named(node: ast.AST, roots: dict[str, nn.Module]) -> Iterator[Any]:
    """Yield the modules and tensors that an expression names, each by its whole path: ``trunk.layer1[0].conv1``."""
    if isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        found = _resolved(node, roots)
        if isinstance(found, nn.Module | Tensor):
            yield found
            return
    for child in ast.iter_child_nodes(node):
        yield from _named(child, roots)


def _resolved(node: ast.AST, roots: dict[str, nn.Module]) -> Any:
    match node:
        case ast.Name(name):
            return roots.get(name)
        case ast.Attribute(value, name):
            owner = _resolved(value, roots)
            return getattr(owner, name, None) if isinstance(owner, nn.Module) else None
        case ast.Subscript(value, ast.Constant(key)):
            owner = _resolved(value, roots)
            kinds = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
            return owner[key] if isinstance(owner, kinds) else None  # type: ignore[index]  # an int or a str, as it takes
        case ast.Call(ast.Name("getattr"), [value, ast.Constant(str(name))], []):
            owner = _resolved(value, roots)
            return getattr(owner, name, None) if isinstance(owner, nn.Module) else None
    return None


def _tensors(thing: Any) -> Iterator[Tensor]:
    if isinstance(thing, Tensor):
        yield thing
    else:
        yield from thing.parameters()
        yield from thing.buffers()


def _together(whole: _Rank, ranks: Sequence[_Rank]) -> Iterator[str]:
    """Yield where the drivers of the ranks, one after the other, differ from the one-process driver."""
    wanted = _shared(whole.steps)
    parts = [_shared(rank.steps) for rank in ranks]
    if any(part.around != wanted.around for part in parts):
        yield "a rank clears gradients, or updates, where the one-process step does not"
    middle = [step for part in parts for step in part.middle]
    for number, (mine, theirs) in enumerate(zip(middle, wanted.middle, strict=False)):
        if mine != theirs:
            yield f"statement {number} is {mine[:100]!r} and not {theirs[:100]!r}"
    if len(middle) != len(wanted.middle):
        yield f"the ranks have {len(middle)} statements, and the one-process step {len(wanted.middle)}"
    pulls = [pull for part in parts for pull in part.pulls]
    several = {pull for part in ranks for pull, before in zip(part.order[1:], part.order, strict=False)
               if before.startswith("receive_delayed ")}  # fmt: skip
    if sorted({*pulls}) != sorted(wanted.pulls) or any(pulls.count(pull) > 1 for pull in {*pulls} - several):
        yield "the ranks pull other copies"
    for kind in _RETURNED:
        joined = [item for part in parts for item in part.returned[kind]]
        if joined != wanted.returned[kind]:
            yield f"the ranks return other {kind}"


_RETURNED = ("losses", "scores", "classes")
"""What a driver returns dicts of, by the name of the loss."""


@dataclass
class _Driver:
    around: list[str]
    """Clearing, updating, returning: what every rank does for itself, and "..." where the middle stands."""
    middle: list[str]
    pulls: list[str]
    returned: dict[str, list[str]]


def _shared(steps: Sequence[str]) -> _Driver:
    driver = _Driver([], [], [], {kind: [] for kind in _RETURNED})
    for step in steps:
        kind = next((kind for kind in driver.returned if step.startswith(f"{kind} = {{")), None)
        if kind is not None:
            tree = ast.parse(step, mode="exec").body[0]
            value = tree.value if isinstance(tree, ast.Assign) else None
            if isinstance(value, ast.Dict):
                driver.returned[kind] += [
                    f"{ast.unparse(key)}: {ast.unparse(item)}"
                    for key, item in zip(value.keys, value.values, strict=True)
                    if key is not None
                ]
        elif step in ("optimizer.zero_grad()", "optimizer.step()") or step.startswith("return (losses, "):
            driver.around.append(step)
        elif step.startswith("pull("):
            driver.pulls.append(step)
        else:
            driver.middle.append(step)
            if driver.around[-1:] != ["..."]:
                driver.around.append("...")
    return driver
