"""Train a pipeline: each process trains some segments on the values of earlier processes, and passes values on.

No gradients are sent back, so no process waits for a later one. Images have the same order everywhere, and the random
numbers of a loss depend only on the run, the batch and the loss. The weights therefore equal those of one process, bit
for bit. Losses and counts of an epoch follow the batches to the last process, which writes them.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from localize import build, recipes
from localize.auditor.ranks import check_ranks
from localize.errors import LocalizeError, MethodError, MissingError, OptionError, ReportedError
from localize.ir import AuditReport, Partition, Plan
from localize.pipeline.partition import partition, undivided
from localize.pipeline.rank import RankModel
from localize.pipeline.stream import PointToPoint
from localize.pipeline.texts import arrivals, texts
from localize.recipes import Recipe
from localize.recipes.settings import TrainConfig
from localize.runtime.devices import choose_device
from localize.runtime.model import LocalModel
from localize.text import visible
from localize.train import callbacks, data, runs, sharded
from localize.train.data.fingerprint import Listing
from localize.train.launch import say_stages
from localize.train.loop import (
    Run,
    Training,
    epoch_line,
    fresh,
    headline,
    prepare_here,
    refuse_unlike,
    summarize,
    unfinished,
)
from localize.train.metrics import write_segments
from localize.train.optimizers import create_optimizer, set_learning_rate
from localize.train.parallel import ALONE, Team, first_sentence, joined, own_device
from localize.train.passes import Outcome, check_weights, count_right, is_right, train_epoch
from localize.train.schedules import learning_rate
from localize.train.state import (
    Position,
    Tally,
    load_optimizer_values,
    optimizer_values,
    random_states,
    set_random_states,
)

ENDED = "localize/ended"
"""Key under which the first process that fails stores the reason, for all processes to see; the number of restarts is
added, since ``torchrun`` keeps its store when it restarts processes."""


@dataclass
class Pipeline:
    """The objects of one process of a pipeline."""

    training: Training
    """Its model is that of this rank; its team is a single process, since batches are not split."""
    model: RankModel
    team: Team
    stream: PointToPoint | None
    arriving: Sequence[tuple[int, str]]
    background: Any
    """The process group in which checkpoints are coordinated; None for a single process."""
    ended: Ended
    code: str

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer of this rank."""
        return self.training.optimizer

    @property
    def last(self) -> bool:
        """Whether this process is the last one, which writes metrics and the model."""
        return self.model.is_last


def run(config: TrainConfig, *, force: bool = False, progress: bool | None = None, callback: Any = None) -> Run:
    """Train a new run as a pipeline; see :func:`localize.train.loop.run`.

    Raises:
        LocalizeError: see there; or a pipeline does not support the method, the optimizer or a setting.
    """
    folder = None if config.output is None else runs.named(config.output, force=force)
    config = fresh(config)
    pipeline = prepare(config, callback=callback)
    training, team = pipeline.training, pipeline.team
    name = f"{config.model}-{training.recipe.method}-{config.data}-seed{config.seed}"
    folder = Path(team.gathered(str(folder or runs.numbered(name)))[0])
    with pipeline.ended.told(), runs.locked(folder) if team.rank == 0 else nullcontext():
        with team.agreeing():
            if team.rank == 0:
                runs.named(str(folder), force=force)
                runs.start(folder, training.recipe, training.splits.listing)
                sharded.clear(folder)
        if team.rank == 0:
            print("\n".join(map(visible, [*told(pipeline), *training.begun])), flush=True)
        return carry_out(pipeline, folder, Position(training.batches.generator.get_state()), [])


def go_on(folder: Path, asked: Recipe, written: Recipe, progress: bool | None, *, accept_data: bool = False) -> Run:
    """Resume a pipeline from its last checkpoint, with any number of processes; see :func:`localize.train.resume`."""
    from localize.train.resuming import changes_of, refuse_other_recipe

    found = sharded.folders(folder)
    listing = runs.listing_of(folder)
    changes: list[str] = []
    pipeline = prepare(
        runs.config_of(asked),
        weights=not found,
        listing=listing,
        check=lambda splits: changes.extend(changes_of(folder, written, splits, listing, accept=accept_data)),
    )
    training, team = pipeline.training, pipeline.team
    with pipeline.ended.told():
        metrics: list[dict[str, Any]] = []
        position = Position(training.batches.generator.get_state())
        with team.agreeing():
            if found:
                about = sharded.about(found[-1])
                there = recipes.parse(about["recipe"], str(found[-1]))
                refuse_other_recipe(found[-1] / sharded.RUN, there, training.recipe)
                if about["code"] != pipeline.code:
                    raise MissingError(
                        f"{found[-1]} belongs to another training step.",
                        facts="the model's code, or localize, has changed since.",
                        help=f"restore that code; or localize train --recipe {folder} --output NEW",
                    )
                position = take_up(pipeline, found[-1], about)
                metrics = [json.loads(line) for line in about["metrics"].splitlines()]
            if position.epoch - (position.tally.batches == 0) > training.config.epochs:
                raise OptionError(
                    f"--epochs cannot be {training.config.epochs}: the run in {folder} has done {position.epoch - 1}.",
                    help=f"--epochs {position.epoch} or more",
                )
        if team.rank == 0:
            done = f"{position.steps} steps done, {position.tally.batches} batches into epoch {position.epoch}"
            place = f"resuming from {found[-1]}: {done}" if found else f"{folder} has no checkpoint yet"
            print("\n".join(map(visible, [*told(pipeline), place])), flush=True)
        if pipeline.last:
            runs.keep_metrics(folder, runs.lines_of(metrics))
        return carry_out(pipeline, folder, position, metrics)


def told(pipeline: Pipeline) -> Iterator[str]:
    """Yield lines that describe the run and the parts of its processes."""
    yield headline(replace(pipeline.training, team=pipeline.team))
    stages = pipeline.model.partition.stages
    if len(stages) > 1:
        shares = ", ".join(
            f"{r}: segments {_range(stage.segments)} ({100 * stage.cost:.0f} %)" for r, stage in enumerate(stages)
        )
        yield f"pipeline: {shares}; predicted {pipeline.model.partition.speedup:.2f} times as fast as one process"


def _range(numbers: Sequence[int]) -> str:
    return f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else "".join(map(str, numbers)) or "none"


def prepare(
    config: TrainConfig,
    *,
    weights: bool = True,
    listing: Listing | None = None,
    check: Callable[[data.DataSplits], None] = lambda splits: None,
    callback: Any = None,
) -> Pipeline:
    """Make the objects of this process; nothing is written.

    The first process makes model and heads, and sends the others their parts; these make modules without data.

    Raises:
        LocalizeError: something is not available, in this process or another.
    """
    device = own_device(choose_device(config.device))
    team = joined(device)
    with team.agreeing():
        refuse_settings(config, callback)
        training = prepare_here(
            ALONE, device, config, weights=weights, listing=listing, check=check, progress=False,
            callback=callbacks.load(None), empty=team.rank > 0,
        )  # fmt: skip
        local = training.local
        refuse_plan(local.plan, config)
        refuse_coupling(config)
        parts = _partition(local, config, team)
        sources = texts(local, parts) if team.size > 1 else [local.source]
        if team.size > 1:
            AuditReport(check_ranks(local, sources)).raise_if_failed()
        code, order = training.code, arrivals(local, parts, team.rank)
        whole = dict(tensors_by_name(local))
        model = RankModel(local, parts, team.rank, sources[team.rank], seed=config.seed)
        batches, tests = _batches(training, read=model.stage.images), _tests(training, read=team.rank == 0)
    refuse_unlike(training.recipe, code, team)
    if team.size > 1:
        hand_out(whole, model, device)
        set_random_states(team.gathered(random_states(device) if team.rank == 0 else None)[0], device)
    del whole, local
    with team.agreeing():
        optimizer = create_optimizer(model, config)
    training = replace(training, local=model, optimizer=optimizer, batches=batches, tests=tests)
    ended = Ended(team, parts, model.plan)
    if team.rank == 0:
        say_stages([_range(stage.segments) for stage in parts.stages])
    stream = background = None
    if team.size > 1:
        limit = timedelta(seconds=config.timeout)
        ranks: Any = distributed.new_group(timeout=limit)
        mesh = DeviceMesh.from_group(ranks, device.type, mesh_dim_names=("stage",))
        stream = PointToPoint(mesh.get_group("stage"), device, ended.because)
        background = distributed.new_group(backend="gloo", timeout=limit)
        model.stream = stream
    return Pipeline(training, model, team, stream, order, background, ended, code)


def _partition(local: LocalModel, config: TrainConfig, team: Team) -> Partition:
    if config.stages is not None and len(config.stages) != team.size:
        raise OptionError(
            f"--stages names {len(config.stages)} stages, but there are {team.size} processes.",
            help=f"--processes {len(config.stages)}",
            option="stages",
        )
    if team.size == 1:
        return undivided(local)
    return partition(local, config.stages or team.size, batch_size=config.batch_size)


def tensors_by_name(local: LocalModel) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers, under each of their names."""
    yield from local.named_parameters(remove_duplicate=False)
    yield from local.named_buffers(remove_duplicate=False)


def hand_out(whole: Mapping[str, Tensor], model: RankModel, device: torch.device) -> None:
    """In the first process, send every other process its part of the model; in the others, receive it.

    Every process has the buffers that are not in the state dict.

    Args:
        whole: tensors of the whole model by name; they have data in the first process.
        model: the model of this process; it has data only in the first one.
        device: device of the received data.
    """
    unsaved = whole.keys() - model.state_dict().keys()
    for rank, stage in enumerate(model.partition.stages[1:], 1):
        names = sorted({*stage.tensors, *stage.copied, *unsaved})
        if model.rank == 0:
            for name in names:
                if whole[name].numel():
                    distributed.send(as_bytes(whole[name].detach().contiguous()), rank)
        elif model.rank == rank:
            model.fill(frozenset(names), device)
            mine = dict(tensors_by_name(model))
            for name in names:
                if mine[name].numel():
                    value = torch.empty(mine[name].shape, dtype=mine[name].dtype, device=device)
                    distributed.recv(as_bytes(value), 0)
                    with torch.no_grad():
                        mine[name].copy_(value)


def as_bytes(value: Tensor) -> Tensor:
    """Return a contiguous tensor as its bytes, over the same memory."""
    return value.view(-1).view(torch.uint8)


def _batches(training: Training, *, read: bool) -> data.Batches:
    config = training.config
    return data.training_batches(
        training.splits.train, config.batch_size, generator=training.batches.generator, workers=config.workers,
        device=training.device, mixing=training.batches.mixing, read=read,
    )  # fmt: skip


def _tests(training: Training, *, read: bool) -> data.Batches:
    config = training.config
    return data.evaluation_batches(
        training.splits.test, config.batch_size, workers=config.workers, device=training.device, read=read
    )


# ------------------------------------------------------------------------------------------------------ what is refused


def refuse_settings(config: TrainConfig, callback: Any) -> None:
    """Refuse settings that a pipeline does not support.

    Raises:
        OptionError: one of them was given.
    """
    refused = {
        "amp_dtype": (
            config.scales,
            "one gradient scaler for all losses would need the gradients of every process",
        ),
        "model_ema": (config.model_ema, "the average would need a test pass of its own through all processes"),
        "sync_bn": (config.sync_bn, "each BatchNorm already sees the whole batch"),
        "compile": (config.compile, "compiled pipelines have not been compared with one process"),
        "channels_last": (config.channels_last, "it has not been compared with one process"),
        "stage_epochs": (config.stage_epochs is not None, "one segment at a time leaves the other processes idle"),
        "freeze_after": (config.freeze_after is not None, "the work of processes would change between epochs"),
        "callback": (config.callback is not None or callback is not None, "no process has the whole model"),
        "log_tensorboard": (config.log_tensorboard, "only metrics.jsonl is written"),
        "log_wandb": (config.log_wandb, "only metrics.jsonl is written"),
    }
    for name, (asked, why) in refused.items():
        if asked:
            flag = f"--{name.replace('_', '-')}"
            raise OptionError(
                f"{flag} does not work with --parallel pipe.", facts=f"{why}.",
                help=f"leave out {flag}; or --parallel data", option=name,
            )  # fmt: skip


def refuse_plan(plan: Plan, config: TrainConfig) -> None:
    """Refuse a plan that a pipeline cannot train, or test, as one process does.

    Raises:
        OptionError: gradients are to be clipped by their joint norm.
        MethodError: the model cannot be tested as a pipeline.
    """
    if config.clip_grad is not None and plan.update == "end":
        raise OptionError(
            "--clip-grad does not work with --parallel pipe if there is one update for all losses.",
            facts=f"{plan.method} updates after all backwards, so the norm would cover the gradients of all processes.",
            help="leave out --clip-grad; or use --update immediate, if the method has it",
            option="clip_grad",
        )
    trunk = plan.segments.trunk
    why = ""
    if trunk.eval_differs:
        why = f"{trunk.name} computes other operations in eval mode than its segments do."
    elif plan.answer != "output":
        why = "it predicts with the sum of all local losses, which no single process has."
    elif not plan.outputs and not any(t.scores and not t.labels for loss in plan.losses for t in loss.terms):
        why = "it predicts by goodness, trying every label in turn."
    if why:
        raise MethodError(
            f"{plan.method} on {trunk.name} cannot be tested as a pipeline.", facts=why, help="--parallel data"
        )


@dataclass(frozen=True)
class _Parameters:
    """A stand-in for a local model, with two parameters or one of them."""

    tensors: list[torch.nn.Parameter]

    def param_groups(self, **options: Any) -> list[dict[str, Any]]:
        return [{"params": self.tensors, "name": "trunk", **options}]


def refuse_coupling(config: TrainConfig) -> None:
    """Refuse an optimizer whose update of one parameter depends on others; two small parameters are tried.

    Raises:
        OptionError: it does.
    """
    plain = replace(config, clip_grad=None)
    generator = torch.Generator().manual_seed(0)
    values, gradients = torch.randn(2, 4, 3, generator=generator), 9 * torch.randn(3, 2, 4, 3, generator=generator)
    results = []
    for shared in ([[0, 1]], [[0], [1]]):
        parameters = [torch.nn.Parameter(values[i].clone()) for i in range(2)]
        for numbers in shared:
            optimizer = create_optimizer(_Parameters([parameters[i] for i in numbers]), plain)  # type: ignore[arg-type]
            for gradient in gradients:
                for i in numbers:
                    parameters[i].grad = gradient[i].clone()
                optimizer.step()
        results.append([parameter.detach() for parameter in parameters])
    if not all(torch.equal(one, other) for one, other in zip(*results, strict=True)):
        raise OptionError(
            f"optimizer {config.opt!r} does not work with --parallel pipe.",
            facts="its update of a parameter depends on others, which are in other processes.",
            help="--opt sgd, or --opt adamw",
            option="opt",
        )


# -------------------------------------------------------------------------------------------------------------- failure


class Ended:
    """The first process that failed, and why; only that one is reported."""

    def __init__(self, team: Team, parts: Partition, plan: Plan) -> None:
        self.team, self.parts, self.plan = team, parts, plan
        self.store = None
        if team.size > 1 and "MASTER_PORT" in os.environ:
            place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            self.store = distributed.TCPStore(
                *place, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10)
            )

    def because(self, rank: int, error: BaseException) -> LocalizeError:
        """Return the error for a process that has ended or does not answer, or the reason that another one stored."""
        found = self.team.troubled()  # before those that report it have ended too
        said = first_sentence(error)
        late = re.search("time[d ]*out", said, re.IGNORECASE) is not None
        return self._named(found or (rank, "does not answer" if late else "has ended"), said, 0.0 if late else 0.5)

    def somewhere(self, error: BaseException) -> LocalizeError:
        """Return the error if some process has ended or does not answer, and it is not known which."""
        found = self.team.troubled()
        said = first_sentence(error)
        if found is not None:
            return self._named(found, said, 0.5)
        time.sleep(2)  # a process that exchanges values with it will know
        problem = "another process of this run has ended, or does not answer."
        again = "localize train --resume DIR, with any number of processes"
        return self.first(MissingError(problem, facts=said, help=again))

    def _named(self, found: tuple[int, str], said: str, seconds: float) -> LocalizeError:
        """Return the error for a known process, after so many seconds: it may be about to store the reason itself."""
        rank, what = found
        stopped = what == "is stopped"
        what = "does not answer" if stopped else what
        problem = f"process {rank}, which trains segments {_range(self.parts.stages[rank].segments)}, {what}."
        time.sleep(seconds)
        longer = " If it was only slow, use a longer --timeout" * (what == "does not answer")
        return self.first(
            MissingError(
                problem,
                facts=["it is stopped."] * stopped + [said],
                help=f"localize train --resume DIR, with any number of processes.{longer}",
            )
        )

    def first(self, error: LocalizeError) -> LocalizeError:
        """Store an error, and return it; if another process has stored one before, return what stands for that one."""
        rank, code, problem = self._stored(error.exit_code, error.problem)
        return error if rank == self.team.rank else ReportedError(problem, code)

    def _stored(self, exit_code: int, problem: str) -> tuple[int, int, str]:
        """Store an exit code and a problem if no process has; return the rank of the process that has, and both."""
        mine = self.team.rank, exit_code, problem
        if self.store is None:
            return mine
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        try:
            rank, code, told = json.loads(self.store.compare_set(f"{ENDED}/{restarts}", "", json.dumps(mine)))
        except RuntimeError:  # the process that keeps the store has ended
            return mine
        return rank, code, told

    @contextmanager
    def told(self) -> Iterator[None]:
        """Tell other processes if the body raises an error, so that they do not report that this process ended.

        Raises:
            ReportedError: another process has already reported an error.
        """
        try:
            yield
        except LocalizeError as error:
            known = error if isinstance(error, ReportedError) else self.first(error)
            if known is error:
                raise
            raise known from error
        except BaseException as error:
            self._stored(1, str(error).partition("\n")[0])
            raise


# ----------------------------------------------------------------------------------------------------------- the epochs


def carry_out(pipeline: Pipeline, folder: Path, position: Position, metrics: list[dict[str, Any]]) -> Run:
    """Train from ``position`` to the end, with a checkpoint after every epoch."""
    training, config = pipeline.training, pipeline.training.config
    writer = sharded.Writer(folder, pipeline.background, pipeline.ended.somewhere)
    while unfinished(config, position):
        trained = _train(pipeline, position, writer, metrics)
        tested = _test(pipeline)
        if pipeline.last:
            assert trained is not None and tested is not None, "all results reach the last process"
            about = {"epoch": position.epoch, "step": position.steps, "images": position.tally.images}
            speed = round(position.tally.images / position.tally.seconds, 1)
            rates = {"lr": pipeline.optimizer.param_groups[0]["lr"], "images_per_second": speed}
            metrics.append(about | summarize(training.local, trained, tested) | rates)
            runs.append_metrics(folder, metrics[-1])
            write_segments(folder)
            print(epoch_line(metrics[-1], config.epochs), flush=True)
        position.epoch, position.tally = position.epoch + 1, Tally()
        position.order = training.batches.generator.get_state()
        _save(pipeline, writer, position, metrics)
    writer.wait()
    if pipeline.stream is not None:
        pipeline.stream.close()
    if pipeline.last:
        sharded.prune(folder)
        runs.finish(folder, pipeline.model, training.recipe, _reading(pipeline, sharded.folders(folder)[-1]))
        if metrics:
            best = max(metrics, key=lambda line: line["test_accuracy"])
            last = f"last epoch {100 * metrics[-1]['test_accuracy']:.2f} %"
            print(f"test: {last}, best {100 * best['test_accuracy']:.2f} % (epoch {best['epoch']})", flush=True)
        print(f"weights: {folder / runs.BACKBONE}", flush=True)
    pipeline.team.wait()
    return Run(folder, tuple(metrics), pipeline.model)


def _train(
    pipeline: Pipeline, position: Position, writer: sharded.Writer, metrics: list[dict[str, Any]]
) -> Outcome | None:
    """Train to the end of an epoch; return its results in the last process, and None in the others."""
    training, model, config, tally = pipeline.training, pipeline.model, pipeline.training.config, position.tally
    before = position.steps - len(tally.losses)
    set_learning_rate(pipeline.optimizer, learning_rate(config, position.epoch))
    total = len(training.batches)
    if config.max_steps is not None:
        total = min(total, (config.max_steps - before) * config.grad_accum_steps)
    training.batches.generator.set_state(position.order)
    batches = iter(training.batches)
    for _ in range(tally.batches):
        next(batches)
    taken = batches if total == len(training.batches) else islice(batches, total - tally.batches)
    if pipeline.stream is not None:
        pipeline.stream.begin([("train", config.batch_size)] * (total - tally.batches), pipeline.arriving)

    def behind_step() -> None:
        position.steps += 1
        due = config.checkpoint_every is not None and position.steps % config.checkpoint_every == 0
        if due and tally.batches < total:
            _save(pipeline, writer, position, metrics)

    train_epoch(
        model, pipeline.optimizer, taken, training.device, config, total=total, tally=tally, done=before,
        behind_step=behind_step,
    )  # fmt: skip
    return _shown(pipeline, torch.stack(tally.losses), tally.right, int(tally.final_right), tally.images)


def _test(pipeline: Pipeline) -> Outcome | None:
    """Test the pipeline; return the results in the last process, and None in the others."""
    training, model, stream = pipeline.training, pipeline.model, pipeline.stream
    model.eval()
    count, size = len(training.splits.test), training.config.batch_size
    sizes = [min(size, count - start) for start in range(0, count, size)]
    names: list[tuple[int, str]] = []
    if model.rank > 0 and model.stage.segments:
        before = model.plan.segments.segments[model.stage.segments[0] - 1]
        names = [(model.rank - 1, f"tested_{j}") for j in range(len(before.outputs))]
    if stream is not None:
        stream.begin([("test", n) for n in sizes], names)
    right: dict[str, Tensor] = {}
    final = 0
    for x, y in training.tests:
        if stream is not None:
            stream.batch(("test", len(y)))
        values: tuple[Tensor, ...] = (x,)
        if stream is not None and model.rank > 0:
            values = tuple(stream.receive(name, source=source) for source, name in names)
        scores, leaving, answer = model.predict(values)
        if stream is not None and not model.is_last:
            for j, value in enumerate(leaving):
                stream.send(f"tested_{j}", value, to=model.rank + 1)
        count_right(right, {name: one.argmax(1) for name, one in scores.items()}, y)
        if answer is not None:
            final += int(is_right(answer.argmax(1), y).sum())
    return _shown(pipeline, None, right, final, count)


def _shown(
    pipeline: Pipeline, losses: Tensor | None, right: Mapping[str, Tensor | int], final: int, images: int
) -> Outcome | None:
    """Pass on the results of a pass, together with those of earlier processes; the last process returns them."""
    model, stream = pipeline.model, pipeline.stream
    named = _scored(model.plan)
    counts = torch.tensor([float(right.get(name, -1)) for name in named], dtype=torch.float64)
    steps = 0 if losses is None else len(losses)
    if stream is not None:
        key = ("shown", losses is not None, steps)
        names = ["counts"] if losses is None else ["losses", "counts"]
        stream.begin([key], [(model.rank - 1, name) for name in names] if model.rank else [])
        stream.batch(key)
        if model.rank:
            if losses is not None:
                losses = torch.cat([stream.receive("losses", source=model.rank - 1), losses], 1)
            counts = torch.maximum(stream.receive("counts", source=model.rank - 1).cpu(), counts)
        if not model.is_last:
            if losses is not None:
                stream.send("losses", losses.contiguous(), to=model.rank + 1)
            stream.send("counts", counts.to(stream.device), to=model.rank + 1)
            return None
    means: dict[str, float] = {}
    if losses is not None:
        names = [loss.name for loss in model.plan.losses]
        means = dict(zip(names, losses.double().mean(0).tolist(), strict=True))
    accuracy = {name: n / images for name, n in zip(named, counts.tolist(), strict=True) if n >= 0}
    return Outcome(means, accuracy, final / images, images)


def _scored(plan: Plan) -> list[str]:
    """Return the names under which a pass counts right predictions."""
    found = [depth for loss in plan.losses for depth in (loss.name, *(f"{loss.name}.{t.head}" for t in loss.terms))]
    return list(dict.fromkeys(found))


# ---------------------------------------------------------------------------------------------------------- checkpoints


def _save(pipeline: Pipeline, writer: sharded.Writer, position: Position, metrics: list[dict[str, Any]]) -> None:
    """Start writing this rank's part of a checkpoint."""
    training, model = pipeline.training, pipeline.model
    check_weights(model, position)
    values: dict[str, Any] = {f"model.{name}": value for name, value in model.own_state().items()}
    kept = optimizer_values(model, pipeline.optimizer)
    for name, state in kept["states"].items():
        values |= {f"optimizer.{name}.{key}": value for key, value in state.items()}
    for loss, states in kept["own"].items():
        for name, state in states.items():
            values |= {f"own.{loss}.{name}.{key}": value for key, value in state.items()}
    tally = position.tally
    if tally.losses:
        table = torch.stack(tally.losses)
        values |= {f"losses.{name}": table[:, i].contiguous() for i, name in enumerate(tally.names)}
        values |= {f"right.{name}": torch.as_tensor(count) for name, count in tally.right.items()}
    about = None
    if pipeline.last:
        about = {
            "recipe": training.written,
            "code": pipeline.code,
            "versions": build.versions(),
            "threads": torch.get_num_threads(),
            "metrics": runs.lines_of(metrics),
            "groups": [{key: value for key, value in group.items() if key != "params"} for group in kept["groups"]],
            "position": {"order": position.order, "epoch": position.epoch, "steps": position.steps},
            "tally": {"batches": tally.batches, "images": tally.images, "seconds": tally.seconds,
                      "final_right": int(tally.final_right), "steps": len(tally.losses)},
            "number": model.number,
        }  # fmt: skip
    writer.save(position.steps, values, about)


def take_up(pipeline: Pipeline, path: Path, about: Mapping[str, Any]) -> Position:
    """Restore this rank's part of a checkpoint, which any number of ranks wrote; return the position of the run.

    Raises:
        MissingError: it is damaged, or belongs to another model.
    """
    model, device = pipeline.model, pipeline.training.device
    stored = sharded.keys(path)
    held = {name for name, value in model.state_dict().items() if not value.is_meta}
    losses = [model.plan.losses[i].name for i in model.stage.losses]
    own = {f"own.{loss}.{name}." for loss in losses for name in held}
    mine = {f"optimizer.{name}." for name in held}
    wanted = {f"model.{name}" for name in held} | {f"{kind}.{loss}" for kind in ("losses", "right") for loss in losses}
    missing = sorted(f"model.{name}" for name in held if f"model.{name}" not in stored)
    if missing:
        raise MissingError(
            f"{path} does not contain all weights of {model.plan.segments.trunk.name}.",
            facts=f"{missing[0]} is missing, for example.",
        )
    chosen = {
        key: value
        for key, value in stored.items()
        if key in wanted or key.rpartition(".")[0] + "." in mine or key.rpartition(".")[0] + "." in own
    }
    values = sharded.read(path, chosen)
    state = model.state_dict()
    with torch.no_grad():
        for name in held:
            state[name].copy_(values[f"model.{name}"])
    load_optimizer_values(model, pipeline.optimizer, _optimizer_of(pipeline, values, losses, about))
    model.number = about["number"]
    tally, place = about["tally"], about["position"]
    steps = tally["steps"]
    rows = [values[f"losses.{loss}"] for loss in losses] if steps else []
    found = Tally(
        losses if steps else [],
        list(torch.stack(rows, 1).to(device)) if steps else [],
        {loss: values[f"right.{loss}"].to(device) for loss in losses if f"right.{loss}" in values},
        tally["final_right"],
        tally["batches"],
        tally["images"],
        tally["seconds"],
    )
    return Position(place["order"], place["epoch"], place["steps"], found)


def _optimizer_of(
    pipeline: Pipeline, values: Mapping[str, Any], losses: Sequence[str], about: Mapping[str, Any]
) -> dict[str, Any]:
    """Return groups and states of this rank's optimizer, in the form of :func:`optimizer_values`."""
    model = pipeline.model
    now = optimizer_values(model, pipeline.optimizer)
    written = {group["name"]: group for group in about["groups"]}
    groups = [{**written.get(group["name"], group), "params": group["params"]} for group in now["groups"]]
    names = [name for group in groups for name in group["params"]]
    states: dict[str, dict[str, Any]] = {}
    own: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        kind, _, rest = key.partition(".")
        inside, _, last = rest.rpartition(".")
        if kind == "optimizer" and inside in names:
            states.setdefault(inside, {})[last] = value
        if kind == "own":
            loss, _, name = inside.partition(".")
            own.setdefault(loss, {}).setdefault(name, {})[last] = value
    return {"groups": groups, "states": states, "own": {loss: own[loss] for loss in losses if loss in own}}


def _reading(pipeline: Pipeline, path: Path) -> Callable[[nn.Module, Path, str], None]:
    """Return a function that writes the state of the trunk or the heads from a checkpoint, of which it reads little."""
    stored, model = sharded.keys(path), pipeline.model

    def write(module: nn.Module, to: Path, config: str) -> None:
        before = "model.heads." if module is model.heads else "model.trunk."

        def read(keys: Sequence[str]) -> dict[str, Tensor]:
            values = sharded.read(path, {before + key: torch.empty_like(stored[before + key]) for key in keys})
            return {key: values[before + key] for key in keys}

        runs.write_in_pieces(module, to, config, read)

    return write
