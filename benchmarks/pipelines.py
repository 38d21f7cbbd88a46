"""Measure pipelines of processes: bytes on the wire, memory, CPU time, and what is left after kills and other failures.

Run from the root of the repository, on Linux::

    OMP_NUM_THREADS=1 python benchmarks/pipelines.py [bytes] [memory] [live] [path] [delay] [kills] [disk] [stop]
    OMP_NUM_THREADS=1 python benchmarks/pipelines.py delay --data-dir DIR

Appends one line for each measurement to ``benchmarks/pipelines.jsonl``. Processes are forked after everything has been
imported, and communicate by gloo on this machine; nothing is downloaded.

bytes
    What each process handed to the transport, beside the sizes of the values at the cuts; and what it sent back.
memory
    Resident memory of each process, of one with the whole model, and the bytes of the tensors that it holds.
live
    Most bytes of tensors that live in each process in training steps, beside what is predicted: what it holds, the
    largest of its own segments' steps, and the values at its cuts.
path
    CPU seconds of a training step in each process, the median of many; the critical path is the largest. Beside it what
    was predicted; and how long the slowest process has nothing to do, counted from the order of the messages.
delay
    Test accuracy with a dictionary that reaches earlier layers a batch late, beside the sequential forms: on digits; or
    on MNIST, in DIR as torchvision stores it.
kills
    Ten times a random process is killed in a random step; the run goes on in 2, 4, 1, 2, ... processes, and is compared
    with one that nothing has disturbed.
disk
    One process cannot write any more (a limit on the size of its files): what is said.
stop
    One process is stopped by SIGSTOP: what is said, and when.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import resource
import signal
import socket
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from localize import build, recipes
from localize.errors import LocalizeError
from localize.estimate import memory as memory_of
from localize.pipeline.costs import costs, needed
from localize.pipeline.rank import RankModel
from localize.pipeline.stream import PointToPoint
from localize.pipeline.units import units
from localize.train import TrainConfig, piped, resume, run, runs, sharded
from localize.train.optimizers import create_optimizer

ROWS = Path(__file__).with_suffix(".jsonl")
STEPS, BATCHES = 12, 40
NETS = """
from torch import nn

def net(width, depth, num_classes):
    layers = [nn.Flatten(), nn.Linear(64, width), nn.ReLU()]
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.ReLU(), nn.Dropout(0.1)]
    return nn.Sequential(*layers, nn.Linear(width, num_classes))

def deep(num_classes=10):
    return net(1536, 12, num_classes)

def small(num_classes=10):
    return net(48, 4, num_classes)

deep.input_shape = small.input_shape = (1, 8, 8)
deep.num_classes = small.num_classes = 10
"""
SMALL = {"data": "digits", "batch_size": 32, "lr": 0.005, "device": "cpu", "parallel": "pipe"}


def main() -> None:
    """Take the measurements that are asked for, or all."""
    known = {
        "bytes": wire,
        "memory": memory,
        "live": live,
        "path": path,
        "delay": delay,
        "kills": kills,
        "disk": disk,
        "stop": stop,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=[*known, []], default=list(known))
    parser.add_argument("--data-dir", metavar="DIR", help="of MNIST, for delay")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.data_dir:
        known["delay"] = partial(delay, data_dir=args.data_dir)
    for name in args.what:
        with tempfile.TemporaryDirectory() as folder:
            for row in known[name](Path(folder)):
                line = json.dumps({"what": name, **row, "torch": torch.__version__, "cores": os.cpu_count()})
                print(line, flush=True)
                with ROWS.open("a") as rows:
                    rows.write(line + "\n")


# ------------------------------------------------------------------------------------------------------------ processes


def together(work: Callable[[], Any], processes: int, each: Callable[[int], None] = lambda rank: None) -> list[Any]:
    """Run ``work`` in forked processes that know each other, as torchrun would start them.

    Args:
        work: is called in every process; what it returns can be written as JSON.
        processes: how many.
        each: is called in a process before, with its rank.

    Returns:
        For every rank what its work has returned; else a string: the error, or the signal that has ended it.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    sys.stdout.flush()
    children = []
    for rank in range(processes):
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            _child(work, rank, processes, port, each, writing)
        os.close(writing)
        children.append((pid, reading))
    found: list[Any] = []
    for pid, reading in children:
        with open(reading) as pipe:
            said = pipe.read()
        _, status = os.waitpid(pid, 0)
        found.append(json.loads(said) if said else f"ended by signal {os.waitstatus_to_exitcode(status)}")
    return found


def _child(work: Callable[[], Any], rank: int, size: int, port: int, each: Callable[[int], None], writing: int) -> None:
    if size > 1:
        values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in values.items()}, MASTER_ADDR="localhost")
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    try:
        each(rank)
        result = work()
    except LocalizeError as error:
        result = f"{type(error).__name__}: {error}"
    except BaseException:
        result = traceback.format_exc()
    os.write(writing, json.dumps(result).encode())
    if torch.distributed.is_initialized() and not isinstance(result, str):
        torch.distributed.destroy_process_group()
    os._exit(0)


def config(model: str, recipe: str, folder: Path, **settings: Any) -> TrainConfig:
    """Return a run on small images."""
    shape = (3, 16, 16) if model.startswith("cifar/resnet") else None
    return TrainConfig(model, recipe=recipe, output=str(folder), **{**SMALL, "input_shape": shape, **settings})


def whole(results: list[Any]) -> list[Any]:
    """Return results of which none is an error."""
    errors = [result for result in results if isinstance(result, str)]
    if errors:
        raise SystemExit("\n".join(errors))
    return results


# --------------------------------------------------------------------------------------------------------- measurements


def stepped(asked: TrainConfig, count: int, before: Callable[[piped.Pipeline], None], around: Any = None) -> Any:
    """Prepare this process of a pipeline and do steps; ``around`` calls each. Return the pipeline."""
    pipeline = piped.prepare(asked)
    before(pipeline)
    if pipeline.stream is not None:
        pipeline.stream.begin([("train", asked.batch_size)] * count, pipeline.arriving)
    pipeline.model.train()
    for number, (x, y) in zip(range(count), pipeline.training.batches, strict=False):
        step = partial(pipeline.model.step, x, y, pipeline.optimizer)
        step() if around is None else around(number, step)
    if pipeline.stream is not None:
        pipeline.stream.close()
    return pipeline


def wire(folder: Path) -> list[dict[str, Any]]:
    """Count the bytes of training that each process hands to the transport, and compare them with the messages."""
    cases = [("fc_mnist", "dcl-ld", 3), ("cifar/resnet20", "dgl", 2), ("cifar/resnet20", "infopro", 4)]
    return [
        {"model": model, "method": method, "processes": processes, "steps": STEPS,
         "ranks": whole(together(partial(_sent, config(model, method, folder)), processes))}
        for model, method, processes in cases
    ]  # fmt: skip


def _sent(asked: TrainConfig) -> dict[str, int]:
    sent: dict[int, int] = {}
    handed = PointToPoint._start

    def start(stream: PointToPoint, flat: torch.Tensor, to: int) -> None:
        sent[to] = sent.get(to, 0) + flat.nbytes
        handed(stream, flat, to)

    PointToPoint._start = start  # type: ignore[method-assign]
    pipeline = stepped(asked, STEPS, lambda pipeline: None)
    rank = pipeline.model.rank
    leaving = [message for message in pipeline.model.partition.messages if message.sender == rank]
    return {
        "at the cut": STEPS * sum(message.bytes_of(asked.batch_size) for message in leaving),
        "sent": sum(sent.values()),
        "of these, type, sizes and strides": sum(sent.values()) - pipeline.stream.bytes_sent,
        "sent backward": sum(count for to, count in sent.items() if to <= rank),
    }


def memory(folder: Path) -> list[dict[str, Any]]:
    """Read what is resident in each process, less what was before the model was made."""
    net = folder / "nets.py"
    net.write_text(NETS)
    piped.prepare(config("fc_mnist", "dcl-ld", folder))  # imports what is imported late
    return [
        {"model": "12 x Linear(1536, 1536)", "method": "dcl-ld", "opt": "momentum", "processes": processes,
         "ranks": whole(together(partial(_held, config(f"{net}:deep", "dcl-ld", folder, lr=1e-4)), processes))}
        for processes in (1, 2, 4)
    ]  # fmt: skip


def _held(asked: TrainConfig) -> dict[str, int]:
    clear, found = Path("/proc/self/clear_refs"), {}
    clear.write_text("5")
    before = resident("VmRSS")

    def prepared(pipeline: piped.Pipeline) -> None:
        found["parameters"] = sum(value.nbytes for value in pipeline.model.state_dict().values() if not value.is_meta)
        found["when prepared"] = resident("VmRSS") - before
        found["most until then"] = resident("VmHWM") - before
        clear.write_text("5")

    stepped(asked, STEPS, prepared)
    return {
        name: round(count / 2**20) for name, count in (found | {"most in steps": resident("VmHWM") - before}).items()
    }


def resident(name: str) -> int:
    """Return an entry of what Linux says of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def live(folder: Path) -> list[dict[str, Any]]:
    """Count the bytes of tensors that live in each process, from before its first message to the end of its steps."""
    net = folder / "nets.py"
    net.write_text(NETS)
    rows = []
    for model, shown, method, options in ((f"{net}:deep", "12 x Linear(1536, 1536)", "dcl-ld", {}),
                                          ("cifar/resnet20", "cifar/resnet20", "dgl", {})):  # fmt: skip
        asked = config(model, method, folder, lr=1e-4, options=options)
        piped.prepare(config("fc_mnist", "dcl-ld", folder))  # imports what is imported late
        for processes in (2, 4):
            ranks = whole(together(partial(_lives, asked), processes))
            rows.append({"model": shown, "method": method, "processes": processes, "ranks": ranks})
    return rows


def _lives(asked: TrainConfig) -> dict[str, int]:
    shape = asked.input_shape or (1, 8, 8)
    recipe = recipes.load(asked.recipe)
    options = {**recipe.options, **asked.options}
    recipe = replace(recipe, options=options, model=asked.model, num_classes=10, input_shape=shape)
    local = build.build(recipe, data=False)
    make = partial(create_optimizer, config=asked)
    spent = costs(local, units(local), asked.batch_size, optimizer=make)
    pipeline = piped.prepare(asked)
    model, optimizer, partition = pipeline.model, pipeline.optimizer, pipeline.model.partition
    stage, size = model.stage, asked.batch_size
    held = [value for kept in (model.parameters(), model.buffers()) for value in kept if not value.is_meta]
    meter = memory_of.Meter()
    meter.own("parameters", held)
    batches = iter(pipeline.training.batches)
    model.train()
    with meter:
        pipeline.stream.begin([("train", size)] * STEPS, pipeline.arriving)
        for _ in range(STEPS):
            x, y = next(batches)
            model.step(x, y, optimizer)
        pipeline.stream.close()
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    inputs = (x, y) if stage.images else (y,)
    resident_bytes = sum(value.nbytes for value in (*held, *states, *inputs))
    arriving = sum(m.bytes_of(size) for m in partition.messages if m.receiver == model.rank)
    leaving = sum(m.bytes_of(size) for m in partition.messages if m.sender == model.rank)
    stream = pipeline.stream
    boundaries = stream.buffers * arriving + (stream.pending - 1) * leaving
    of_steps = needed([spent[i] for i in stage.losses])
    return {"resident": resident_bytes, "largest segment": of_steps, "boundaries": boundaries,
            "predicted": resident_bytes + of_steps + boundaries, "measured": meter.peak}  # fmt: skip


def path(folder: Path) -> list[dict[str, Any]]:
    """Measure the CPU time of training steps in each process, beside that of one process."""
    rows = []
    for side, (method, options) in itertools.product((16, 32), (("auglocal", {"d": 2}), ("dcl-s", {}))):
        asked = config("cifar/resnet20", method, folder, options=options, input_shape=(3, side, side))
        times, shares = {}, {}
        for processes in (1, 2, 4):
            found = whole(together(partial(_spent, asked), processes))
            times[processes] = [rank["ms"] for rank in found]
            shares[processes] = [rank["share"] for rank in found]
        rows += [
            {"model": "cifar/resnet20", "method": method, **options, "processes": processes, "batches": BATCHES,
             "image": asked.input_shape, "ms of one": times[1][0], "ms": times[processes],
             "predicted shares": shares[processes], "speedup": round(times[1][0] / max(times[processes]), 2),
             "predicted": round(1 / max(shares[processes]), 2),
             "bubble": round(bubble(times[processes], 2000), 5)}
            for processes in (2, 4)
        ]  # fmt: skip
    return rows


def _spent(asked: TrainConfig) -> dict[str, float]:
    spent = []

    def timed(number: int, step: Callable[[], Any]) -> None:
        start = time.thread_time()
        step()
        spent.append(time.thread_time() - start)

    pipeline = stepped(asked, BATCHES + 3, lambda pipeline: None, timed)
    return {"ms": round(1000 * statistics.median(spent[3:]), 2), "share": pipeline.model.stage.cost}


def bubble(times: Sequence[float], batches: int, *, buffers: int = 2, pending: int = 2) -> float:
    """Return the share of the time of a run in which the slowest process has nothing to do.

    A process begins with a batch when it has done the one before and the values have arrived; it goes on from a batch
    when the values of ``pending`` batches before it have been asked for, which the next process does for ``buffers``
    batches, that which it works on included. Messages take no time.

    Args:
        times: of a step, for each process.
        batches: how many steps.
        buffers: see :class:`localize.pipeline.stream.PointToPoint`.
        pending: see there.
    """
    begun = [[0.0] * batches for _ in times]
    ended = [[0.0] * batches for _ in times]
    for t in range(batches):
        for rank, time_of_step in enumerate(times):
            start = ended[rank][t - 1] if t else 0.0
            if rank:
                start = max(start, ended[rank - 1][t])
            taken = t - pending - (buffers - 1)  # begun there when the values of t - pending were asked for
            if rank + 1 < len(times) and taken >= 0:
                start = max(start, begun[rank + 1][taken])
            begun[rank][t], ended[rank][t] = start, start + time_of_step
    return 1 - batches * max(times) / ended[-1][-1]


DELAYED = {"dcl": {}, "dcl-o": {}, "dcl-o --delay 1": {"delay": 1}}
"""Forms of dictionary learning whose dictionary is trained, with their options."""
SEEDS, EPOCHS = 3, 5


def delay(folder: Path, data_dir: str | None = None) -> list[dict[str, Any]]:
    """Train ResNet-20 on digits, or a net of fully connected layers on MNIST, with each form of the dictionary."""
    if data_dir is None:
        model, about = "cifar/resnet20", {"data": "digits", "lr": 0.05, "momentum": 0.9, "input_shape": (3, 8, 8)}
    else:
        model, about = "fc_mnist", {"data": "mnist", "data_dir": data_dir, "lr": 5e-4, "opt": "adamw"}
    settings = {"batch_size": 64, "epochs": EPOCHS, "parallel": "data", **about}
    rows = []
    for form, options in DELAYED.items():
        found = []
        for seed in range(SEEDS):
            asked = config(model, form.split()[0], folder / f"{form.split()[0]}-{len(options)}-{seed}",
                           options=options, seed=seed, **settings)  # fmt: skip
            found.append(run(asked, progress=False).metrics[-1]["test_accuracy"])
        rows.append({"form": form, "model": model, "data": about["data"], "epochs": EPOCHS, "accuracies": found})
    return rows


def kills(folder: Path) -> list[dict[str, Any]]:
    """Kill a random process in a random step, ten times, and compare what the run leaves with an undisturbed one."""
    draw = random.Random(21)
    settings = {"epochs": 3, "checkpoint_every": 5}
    net = folder / "nets.py"
    net.write_text(NETS)
    whole(together(lambda: bool(run(config(f"{net}:small", "dcl-ld", folder / "whole", **settings))), 1))
    killed, events, last = folder / "killed", [], 0
    step = RankModel.step
    counts = iter([3, *[2, 4, 1] * 4])
    begin: Callable[[], Any] = lambda: bool(run(config(f"{net}:small", "dcl-ld", killed, **settings)))  # noqa: E731
    for number in range(11):
        processes = next(counts)
        victim, at = draw.randrange(processes), last + draw.randint(2, 15)

        def each(rank: int, victim: int = victim, at: int = at, number: int = number) -> None:
            def killing(model: RankModel, *values: Any, **options: Any) -> Any:
                if rank == victim and model.number == at and number < 10:
                    os.kill(os.getpid(), signal.SIGKILL)
                return step(model, *values, **options)

            RankModel.step = killing  # type: ignore[method-assign]

        found = together(begin, processes, each)
        if number == 10:
            whole(found)
            break
        done = sharded.folders(killed)
        last = int(done[-1].name.removeprefix("step-")) if done else 0
        said = [str(one).splitlines()[0] for one in found if isinstance(one, str)]
        events.append(
            {"processes": processes, "killed": victim, "in step": at + 1, "whole checkpoint": last, "said": said}
        )
        if (killed / recipes.FILE_NAME).exists():
            begin = lambda: bool(resume(killed, trust_code=True))  # noqa: E731
    return [{"kills": len(events), "identical": _same(folder / "whole", killed), "events": events}]


def _same(one: Path, other: Path) -> bool:
    """Compare metrics, exported files, weights and optimizer states of two runs, bit for bit."""
    lines = [
        [{**json.loads(line), "images_per_second": 0} for line in (each / runs.METRICS).read_text().splitlines()]
        for each in (one, other)
    ]
    files = all((one / name).read_bytes() == (other / name).read_bytes() for name in (runs.BACKBONE, runs.HEADS))
    states = [sharded.read(path, sharded.keys(path)) for path in (sharded.folders(each)[-1] for each in (one, other))]
    tensors = states[0].keys() == states[1].keys() and all(
        torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][key])) for key, value in states[0].items()
    )
    return lines[0] == lines[1] and files and tensors


def disk(folder: Path) -> list[dict[str, Any]]:
    """Let one process write no file of more than 64 KiB."""

    def each(rank: int) -> None:
        if rank == 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))

    start = time.monotonic()
    settings = {"epochs": 2, "checkpoint_every": 5, "timeout": 60.0}
    found = together(lambda: bool(run(config("fc_mnist", "dcl-ld", folder / "run", **settings))), 3, each)
    said = [str(one).replace(str(folder), "DIR") for one in found]
    return [{"processes": 3, "full": 1, "seconds": round(time.monotonic() - start, 1), "said": said}]


def stop(folder: Path) -> list[dict[str, Any]]:
    """Stop one process in its twentieth step, with a timeout of ten seconds."""
    step, stopped = RankModel.step, folder / "stopped"

    def each(rank: int) -> None:
        def stopping(model: RankModel, *values: Any, **options: Any) -> Any:
            if rank == 1 and model.number == 20:
                stopped.write_text(f"{os.getpid()} {time.monotonic()}")
                os.kill(os.getpid(), signal.SIGSTOP)
            return step(model, *values, **options)

        RankModel.step = stopping  # type: ignore[method-assign]

    def work() -> str:
        try:
            run(config("fc_mnist", "dcl-ld", folder / "run", epochs=2, timeout=10.0))
        except LocalizeError as error:
            pid, since = stopped.read_text().split()
            time.sleep(1)
            os.kill(int(pid), signal.SIGKILL)  # which the launcher does otherwise
            return f"after {time.monotonic() - float(since) - 1:.1f} s, {type(error).__name__}: {error}"
        return "ended"

    return [{"processes": 3, "stopped": 1, "timeout": 10, "said": together(work, 3, each)}]


if __name__ == "__main__":
    main()
