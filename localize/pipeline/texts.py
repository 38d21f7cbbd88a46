"""Partition -> one text for each rank: the functions of the one-process text as they are, and a driver of its own."""

from __future__ import annotations

from collections.abc import Iterator

from localize.codegen.emit import emit
from localize.ir import (
    Function,
    Partition,
    Program,
    Pull,
    Receive,
    ReceiveDelayed,
    Send,
    SendDelayed,
    Statement,
    Update,
    ZeroGrad,
)
from localize.pipeline.units import Tensors, Unit, made, reached_functions, read, units
from localize.runtime.model import LocalModel


def texts(local: LocalModel, partition: Partition) -> list[str]:
    """Return the text of each rank: ``train_step`` receives, runs its steps, and sends.

    The functions that it calls are those of ``local.source``, byte for byte.
    """
    found = units(local)
    return [emit(program(local, partition, rank, found)) for rank in range(len(partition.stages))]


def arrivals(local: LocalModel, partition: Partition, rank: int) -> list[tuple[int, str]]:
    """Return what a rank receives with each batch, rank and name, in the order in which each sender sends it."""
    found = units(local)
    return [
        (sender, statement.value)
        for sender in range(rank)
        for statement in _steps(partition, sender, found)
        if isinstance(statement, Send) and statement.receiver == rank
    ]


def program(local: LocalModel, partition: Partition, rank: int, found: tuple[Unit, ...]) -> Program:
    """Return the statements of one rank."""
    stage = partition.stages[rank]
    whole = local.program
    functions = {function.name: function for function in whole.functions}
    driver = whole.functions[-1]
    sent = [SendDelayed(one.name, one.receiver) for one in partition.delayed if one.sender == rank]
    statements = [ZeroGrad(), *sent, *_steps(partition, rank, found), *_end(local, partition, rank)]
    reached = reached_functions(tuple(statements), functions)
    inputs = [name for name in driver.arguments if name not in ("trunk", "heads", "y", "optimizer")]
    arguments = ("trunk", "heads", *(inputs if stage.images else ()), "y", "optimizer", "stream")
    step = Function("train_step", arguments, tuple(statements), (), _doc(local, partition, rank))
    doc = f"{whole.doc}\n\nThis is the part of rank {rank} of {len(partition.stages)}."
    kept = tuple(function for function in whole.functions if function.name in reached)
    return Program(doc, (*kept, step), tuple(whole.results[i] for i in stage.losses), whole.scores)


def _doc(local: LocalModel, partition: Partition, rank: int) -> str:
    stage = partition.stages[rank]
    names = [local.plan.losses[i].name for i in stage.losses]
    what = f"Train {names[0]}" + (f" to {names[-1]}" if len(names) > 1 else "")
    return f"{what} on what earlier ranks hand on; hand on what later ranks read."


def _steps(partition: Partition, rank: int, found: tuple[Unit, ...]) -> Iterator[Statement]:
    """Yield what a rank does for its losses; it receives a value where it is first read, and sends it once made."""
    arriving = {message.name: message for message in partition.messages if message.receiver == rank}
    leaving = [message for message in partition.messages if message.sender == rank]
    for i in partition.stages[rank].losses:
        for statement in found[i].statements:
            for name in read(statement):
                if name in arriving:
                    yield Receive(name, arriving.pop(name).sender)
            yield statement
            for name in made(statement):
                yield from (Send(name, message.receiver) for message in leaving if message.name == name)


def _end(local: LocalModel, partition: Partition, rank: int) -> Iterator[Statement]:
    """Yield the update at the end, if there is one, and the pulls of this rank's copies; each after what it reads."""
    stage, tensors = partition.stages[rank], Tensors(local)
    arriving = {one.name: one.sender for one in partition.delayed if one.receiver == rank}
    mine = {*stage.tensors, *stage.copied}
    for statement in local.program.functions[-1].statements:
        update = isinstance(statement, Update) and statement.loss is None
        if isinstance(statement, Pull) and statement.source in arriving:
            yield ReceiveDelayed(statement.source, arriving.pop(statement.source))
        if update or (isinstance(statement, Pull) and set(tensors.inside(statement.copy)) & mine):
            yield statement
