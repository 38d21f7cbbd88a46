"""Plan, program and costs -> ranks: which losses each computes, what it holds, and what it hands to whom.

A rank may hand detached values to later ranks. What would have to go the other way, or be trained in two places, keeps
losses together on one rank; where that leaves fewer ranks than were asked for, the reason is said.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from localize.codegen.lower import crossing
from localize.errors import MethodError, OptionError
from localize.ir import LocalLoss, Message, Partition, Plan, Pull, Stage, facts
from localize.pipeline.costs import Cost, costs, needed
from localize.pipeline.units import Tensors, Unit, size_of, units
from localize.runtime.model import LocalModel


@dataclass(frozen=True)
class Bond:
    """Why losses ``first`` to ``last`` are on one rank."""

    first: int
    last: int
    why: str


def partition(
    local: LocalModel, stages: int | Sequence[int], *, batch_size: int = 32, memory: int | None = None
) -> Partition:
    """Share a training step out to ranks.

    Args:
        local: a model with its step, with or without data.
        stages: number of ranks, which are then balanced: that which takes longest takes as short as can be. Or the
            number of the first loss of each rank, from 0 on.
        batch_size: that costs are predicted for.
        memory: most bytes that a rank may need: its weights, a state of the optimizer of that size, and the largest of
            its losses with gradients; not the values at its cuts.

    Raises:
        MethodError: the losses cannot be computed on so many ranks; the message says why.
        OptionError: ``stages`` are no stages of this step, or need more memory.
    """
    plan = local.plan
    refuse(plan)
    found = units(local)
    bonds = list(_bonds(local, found))
    spent = costs(local, found, batch_size)
    weights = [_resident(local, unit) for unit in found]
    if isinstance(stages, int):
        starts = _balanced(plan, stages, bonds, spent, weights, memory)
    else:
        starts = _given(plan, stages, bonds)
        over = [(rank, need) for rank, need in enumerate(_needs(starts, spent, weights)) if memory and need > memory]
        if over:
            raise OptionError(
                f"rank {over[0][0]} of these stages needs {over[0][1]:,} bytes, and {memory:,} are allowed.",
                help="a number of stages, which are then balanced",
                option="stages",
            )
    return _made(local, starts, found, spent)


def undivided(local: LocalModel) -> Partition:
    """Return the partition with a single rank, which does all.

    Raises:
        MethodError: the step could not be shared out to several, whatever they are.
    """
    plan = local.plan
    refuse(plan)
    names = (*dict(local.named_parameters(remove_duplicate=False)), *dict(local.named_buffers(remove_duplicate=False)))
    return Partition(
        (Stage(tuple(range(len(plan.losses))), tuple(range(len(plan.segments))), names, (), True, 1.0),), ()
    )


def refuse(plan: Plan) -> None:
    """Refuse a plan whose losses cannot be handed from rank to rank.

    Raises:
        MethodError: it is one.
    """
    why = ""
    if plan.waits:
        why = "its losses wait for the error of the output, so that every segment would wait for the last one."
    elif plan.exact:
        why = "exact parts sweep a segment several times, and draw for each sweep."
    elif len(plan.losses) == 1:
        why = "it has one loss, whose gradient flows back through all segments."
    if why:
        raise MethodError(
            f"{plan.method} cannot be trained as a pipeline.", facts=why,
            help="another method; or --parallel data, where each process takes a part of the batch",
        )  # fmt: skip


def _bonds(local: LocalModel, found: Sequence[Unit]) -> Iterator[Bond]:
    """Yield what keeps losses on one rank."""
    plan = local.plan
    touching: dict[str, list[int]] = {}
    for unit in found:
        for name in unit.touched | unit.trained:
            touching.setdefault(name, []).append(unit.loss)
    block_of = {name: block.name for block in plan.blocks for name in block.parameters}
    said = set()
    for name, numbers in sorted(touching.items(), key=lambda item: item[1]):
        trainers = [unit.loss for unit in found if name in unit.trained] if len(numbers) > 1 else []
        movers = [unit.loss for unit in found if name in unit.moved] if len(numbers) > 1 else []
        if not trainers and not movers:
            continue
        why = _why(plan, block_of.get(name, name), numbers, trainers, movers)
        bond = Bond(min(numbers), max(numbers), why)
        if bond not in said:
            said.add(bond)
            yield bond
    for segment in plan.segments.segments:
        running = [unit.loss for unit in found if segment.name in unit.functions]
        if len(running) > 1:
            names = _told(plan.losses, running)
            yield Bond(min(running), max(running), f"{segment.name} is run by {names}: two ranks would run it.")
    yield from _pulled(local, found)


def _why(plan: Plan, what: str, touching: list[int], trainers: list[int], movers: list[int]) -> str:
    losses = plan.losses
    if len(trainers) > 1:
        return f"{what} is trained by {_told(losses, trainers)}: two ranks would train it."
    if trainers:
        readers = [i for i in touching if i not in trainers]
        way = "it would have to flow backward." if min(readers) < trainers[0] else "it would change after it was read."
        return f"{what} is trained by {losses[trainers[0]].name} and read by {_told(losses, readers)}: {way}"
    return f"{what} is written by {_told(losses, movers)}: two ranks would have values of their own."


def _told(losses: Sequence[LocalLoss], numbers: list[int]) -> str:
    names = [losses[i].name for i in numbers]
    return " and ".join(names) if len(names) < 3 else f"{names[0]} to {names[-1]}"


def _pulled(local: LocalModel, found: Sequence[Unit]) -> Iterator[Bond]:
    """Yield what pulls of copies keep on one rank: the copy, and what it is pulled towards.

    Nothing does where the copy is pulled towards a head as the batch before has left it: that value may arrive late.
    """
    tensors = Tensors(local)
    late = {pull.copy for pull in late_pulls(local)}
    for pull in _pulls(local):
        if pull.copy in late:
            continue
        copy, source = frozenset(tensors.inside(pull.copy)), frozenset(tensors.inside(pull.source))
        readers = [unit.loss for unit in found if copy & unit.touched]
        trainers = [unit.loss for unit in found if source & (unit.touched | unit.trained)]
        if readers and trainers and {*readers} | {*trainers} != {readers[0]}:
            names = _told(local.plan.losses, trainers)
            yield Bond(
                min(readers + trainers), max(readers + trainers),
                f"{pull.copy} is pulled towards {pull.source}, which {names} trains: it would have to flow backward.",
            )  # fmt: skip


def late_pulls(local: LocalModel) -> list[Pull]:
    """Return the pulls of untrained copies towards heads, with the values that the batch before has left."""
    plan = local.plan
    trained = {name for loss in plan.losses for name in loss.reach}
    late = {f"heads.{c.block}": f"heads.{c.source}" for c in plan.copies
            if c.of == "heads" and not c.part and c.block not in trained and plan.pull == "before"}  # fmt: skip
    return [pull for pull in _pulls(local) if late.get(pull.copy) == pull.source]


def _pulls(local: LocalModel) -> list[Pull]:
    return [one for one in local.program.functions[-1].statements if isinstance(one, Pull)]


def _resident(local: LocalModel, unit: Unit) -> int:
    tensors = {**dict(local.named_parameters(remove_duplicate=False)), **dict(local.named_buffers())}
    return 2 * size_of(tensors, unit.touched & tensors.keys())


def _starts(losses: int, bonds: Sequence[Bond]) -> list[int]:
    """Return the losses that a rank may begin with."""
    held = {i for bond in bonds for i in range(bond.first + 1, bond.last + 1)}
    return [i for i in range(losses) if i not in held]


def _balanced(
    plan: Plan, count: int, bonds: Sequence[Bond], spent: Sequence[Cost], weights: Sequence[int], memory: int | None
) -> list[int]:
    """Return the first losses of the ranks, such that the largest part is the least."""
    starts = _starts(len(plan.losses), bonds)
    if count < 1 or len(starts) < count:
        raise MethodError(
            f"{plan.method} cannot be trained on {count} ranks here, but on {len(starts)} at most.",
            facts=list(dict.fromkeys(bond.why for bond in bonds))[:4] or f"it has {len(plan.losses)} losses.",
            help=f"--processes {len(starts)}" if len(starts) > 1 else "another method, or --parallel data",
        )
    # best[k][j]: the least largest part when the losses before starts[j] are shared out to k ranks, and where the last
    # of them begins.
    bounds = [*starts, len(plan.losses)]
    best: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
    for _ in range(count):
        row: dict[int, tuple[float, int]] = {}
        for j in range(1, len(bounds)):
            for i in range(j):
                if i not in best[-1]:
                    continue
                part = range(bounds[i], bounds[j])
                if memory is not None and _need(part, spent, weights) > memory:
                    continue
                largest = max(best[-1][i][0], sum(spent[k].time for k in part))
                if j not in row or largest < row[j][0]:
                    row[j] = (largest, i)
        best.append(row)
    j = len(bounds) - 1
    if j not in best[count]:
        least = max(_need(range(a, b), spent, weights) for a, b in itertools.pairwise(bounds))
        raise OptionError(
            f"{plan.method} does not fit on {count} ranks of {memory:,} bytes.",
            facts=f"a rank that does least needs {least:,} bytes.",
            help="more ranks, or smaller batches",
            option="stages",
        )
    found = []
    for k in range(count, 0, -1):
        j = best[k][j][1]
        found.append(bounds[j])
    return found[::-1]


def _need(part: range, spent: Sequence[Cost], weights: Sequence[int]) -> int:
    return sum(weights[k] for k in part) + needed([spent[k] for k in part])


def _needs(starts: Sequence[int], spent: Sequence[Cost], weights: Sequence[int]) -> list[int]:
    return [_need(range(a, b), spent, weights) for a, b in itertools.pairwise([*starts, len(spent)])]


def _given(plan: Plan, starts: Sequence[int], bonds: Sequence[Bond]) -> list[int]:
    """Return the first losses of the ranks as they were asked for."""
    count = len(plan.losses)
    if list(starts[:1]) != [0] or list(starts) != sorted(set(starts)) or starts[-1] >= count:
        raise OptionError(
            f"stages cannot begin with losses {', '.join(map(str, starts))}.",
            facts=f"they are numbers of losses in ascending order, of which there are {count}, and 0 is the first.",
            help=f"--stages 0,{count // 2}",
            option="stages",
        )
    for start in starts:
        for bond in bonds:
            if bond.first < start <= bond.last:
                raise MethodError(
                    f"a rank cannot begin with loss {start}.",
                    facts=bond.why,
                    help=f"other --stages: ranks may begin with {', '.join(map(str, _starts(count, bonds)))}",
                )
    return list(starts)


def _made(local: LocalModel, starts: Sequence[int], found: Sequence[Unit], spent: Sequence[Cost]) -> Partition:
    """Return the partition whose ranks begin with these losses."""
    plan = local.plan
    parts = [range(a, b) for a, b in itertools.pairwise([*starts, len(found)])]
    rank_of = {loss: rank for rank, part in enumerate(parts) for loss in part}
    inputs = {argument.name for argument in plan.segments.trunk.inputs}
    names = [*dict(local.named_parameters(remove_duplicate=False)), *dict(local.named_buffers(remove_duplicate=False))]
    touched = [set().union(*(found[i].touched | found[i].trained for i in part)) for part in parts]
    anywhere = set().union(*touched)
    owner = {name: next((r for r, inside in enumerate(touched) if name in inside), 0) for name in names}
    segments = _segments(plan, rank_of, len(parts))
    total = sum(cost.time for cost in spent)
    delayed = tuple(_delayed(local, touched, owner))
    arriving = [
        {name for one in delayed if one.receiver == rank for name in names if name.startswith(f"{one.name}.")}
        for rank in range(len(parts))
    ]
    stages = tuple(
        Stage(
            tuple(part),
            segments[rank],
            tuple(name for name in names if owner[name] == rank),
            tuple(n for n in names if n in (touched[rank] & anywhere) | arriving[rank] and owner[n] != rank),
            any(inputs & found[i].reads for i in part),
            sum(spent[i].time for i in part) / total,
        )
        for rank, part in enumerate(parts)
    )
    return Partition(stages, tuple(_messages(plan, found, rank_of)), delayed)


def _delayed(local: LocalModel, touched: Sequence[set[str]], owner: Mapping[str, int]) -> Iterator[Message]:
    """Yield the heads that a rank hands to others whose copies are pulled towards them."""
    tensors = Tensors(local)
    for pull in late_pulls(local):
        copy, source = set(tensors.inside(pull.copy)), sorted(tensors.inside(pull.source))
        weight = local.get_parameter(source[0])
        assert len(source) == 1, "a message is one tensor"
        for rank, inside in enumerate(touched):
            if copy & inside and rank != owner[source[0]]:
                yield Message(pull.source, owner[source[0]], rank, tuple(weight.shape), 0, weight.dtype)


def _segments(plan: Plan, rank_of: dict[int, int], count: int) -> list[tuple[int, ...]]:
    """Return the segments that each rank holds; one that no loss runs goes with the one before it."""
    found: list[list[int]] = [[] for _ in range(count)]
    rank = 0
    for segment in plan.segments.segments:
        k = segment.index
        runs = [rank_of[i] for i, loss in enumerate(plan.losses) if loss.route.start <= k <= loss.route.stop]
        runs += [rank_of[i] for i in range(len(plan.losses)) if k in plan.run_before(i)]
        rank = max(rank, min(runs, default=rank))
        found[rank].append(k)
    return [tuple(ones) for ones in found]


def _messages(plan: Plan, found: Sequence[Unit], rank_of: dict[int, int]) -> Iterator[Message]:
    values = crossing(plan)
    maker = {name: rank_of[unit.loss] for unit in found for name in unit.makes}
    streams = plan.input.streams if plan.input is not None else 1
    sent = set()
    for unit in found:
        here = rank_of[unit.loss]
        for name in sorted(unit.reads & maker.keys()):
            if maker[name] == here or (name, here) in sent:
                continue
            sent.add((name, here))
            k, j = values[name]
            segment = plan.segments.segments[k]
            node = next(node for node in segment.graph.nodes if node.op == "output").args[0]
            about = facts(node[j] if isinstance(node, tuple | list) else node)
            rows = about.fold * streams if about.batched or about.fold else 0
            assert about.dtype is not None, "only tensors cross a cut"
            yield Message(name, maker[name], here, about.shape or (), rows, about.dtype)
