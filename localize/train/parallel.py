"""Train in several processes, started by ``torchrun``: each takes its part of every batch.

Gradients are averaged over the processes before the optimizer uses them: those of one loss where it is updated at once,
all of them where there is one update at the end. The mean over equal parts is the mean over the whole batch, so the
weights are those of one process on the joined batch, up to rounding; what looks at several images (BatchNorm, losses
that compare images) sees its own part, as in ``torch.nn.parallel.DistributedDataParallel``. BatchNorm sees all parts
after :func:`synchronize_norms`.
"""

from __future__ import annotations

import atexit
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from localize.errors import LocalizeError, MissingError, OptionError, ReportedError
from localize.torch_names import BATCH_NORMS, copy_all, set_timeout
from localize.train.places import Place, here, trouble

START = 1800.0
"""Seconds that a process may take to begin: to read or fetch its data, and to compile its first step."""
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, BatchNormAct2d)
"""Whose forward is known; a subclass may have another."""


@dataclass(frozen=True)
class Team:
    """The processes of a run."""

    rank: int = 0
    """Which of them this is."""
    size: int = 1
    places: tuple[Place, ...] = ()
    """Where each of them is; empty where that is not known."""

    @property
    def writes(self) -> bool:
        """Whether this is the process that prints, and writes files."""
        return self.rank == 0

    def troubled(self) -> tuple[int, str] | None:
        """Return the first process that has ended, or is stopped, and which of both; None where none is seen to.

        Only processes on the host of this one are seen.
        """
        others = [(rank, trouble(place)) for rank, place in enumerate(self.places) if rank != self.rank]
        stopped = next(((rank, what) for rank, what in others if what == "is stopped"), None)
        return stopped or next(((rank, what) for rank, what in others if what is not None), None)

    @contextmanager
    def _together(self) -> Iterator[None]:
        with _together(self):
            yield

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            with self._together():
                distributed.barrier()

    def part(self, values: Any) -> Any:
        """Return this process's part of a batch: as many as every other's."""
        count = len(values) // self.size
        return values[self.rank * count : (self.rank + 1) * count]

    def any(self, here: bool, device: torch.device) -> bool:
        """Tell whether something is so in any of the processes. All have to ask."""
        if self.size == 1:
            return here
        flag = torch.tensor(float(here), device=device)
        with self._together():
            distributed.all_reduce(flag, distributed.ReduceOp.MAX)
        return bool(flag)

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of tensors of one shape over the processes. All have to ask."""
        if self.size == 1:
            return values
        values = values.clone()
        with self._together():
            distributed.all_reduce(values)
        return values

    def gathered(self, value: Any) -> list[Any]:
        """Return a picklable value of every process, in the order of their ranks. All have to ask."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with self._together():
            distributed.all_gather_object(found, value)
        return found

    def same_start(self, module: nn.Module) -> None:
        """Give parameters and buffers the values that they have in the first process."""
        self._send(module.state_dict().values())

    def same_buffers(self, module: nn.Module) -> None:
        """Give buffers the values that they have in the first process: each process has statistics of its own."""
        self._send(module.buffers())

    def _send(self, tensors: Iterable[Tensor]) -> None:
        if self.size > 1:
            with self._together():
                for tensor in tensors:
                    distributed.broadcast(tensor, 0)

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """Run the body in every process; if it raises a LocalizeError in any of them, no process goes on.

        The body does not wait for other processes.

        Raises:
            LocalizeError: that of this process, unless the first one has the same.
            ReportedError: this process has none, or the same as the first one, which reports it.
        """
        mine: LocalizeError | None = None
        try:
            yield
        except LocalizeError as error:
            mine = error
        told = self.gathered(None if mine is None else str(mine))
        if mine is not None and (self.rank == 0 or told[0] != str(mine)):
            raise mine
        if any(told):
            raise ReportedError(next(filter(None, told)), mine)

    def refuse_unlike(self, what: Mapping[str, str]) -> None:
        """Refuse processes that do not have the same text under each name. All have to ask.

        Raises:
            MissingError: one has another than the first process; the message shows both.
        """
        every = self.gathered(dict(what))
        for rank, other in enumerate(every):
            for name, first in every[0].items():
                if other[name] != first:
                    was, here = first.splitlines(), other[name].splitlines()
                    error = MissingError(
                        f"process {rank} has {name} other than process 0.",
                        facts=[*(f"process 0: {line.strip()}" for line in was if line not in here),
                               *(f"process {rank}: {line.strip()}" for line in here if line not in was)][:6],
                        help="the same command line, data and versions of libraries in every process",
                    )  # fmt: skip
                    raise error if self.rank == 0 else ReportedError(str(error), error)

    def answer_within(self, seconds: float) -> None:
        """Let a process that does not answer for so long end the others, from now on. All have to ask."""
        if self.size > 1:
            set_timeout(timedelta(seconds=seconds))

    def average_gradients(self, optimizer: Optimizer) -> None:
        """Average gradients over the processes whenever ``optimizer`` steps, before other hooks that come later."""
        if self.size > 1:
            optimizer.register_step_pre_hook(lambda stepping, args, kwargs: self.average(stepping))

    def average(self, optimizer: Optimizer) -> None:
        """Average the gradients that an optimizer holds. All have to ask."""
        if self.size == 1:
            return
        kinds: dict[Any, list[Tensor]] = {}
        for gradient in _gradients(optimizer):
            kinds.setdefault((gradient.dtype, gradient.device), []).append(gradient)
        for gradients in kinds.values():
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            with self._together():
                distributed.all_reduce(flat)
            flat /= self.size
            parts = flat.split([gradient.numel() for gradient in gradients])
            copy_all(gradients, [p.view_as(g) for p, g in zip(parts, gradients, strict=True)])


class Scaler(torch.amp.GradScaler):
    """A gradient scaler that averages gradients over the processes before it looks whether they are finite.

    So an overflow in one of them leaves out the update, and halves the scale, in all.
    """

    def __init__(self, device: torch.device, team: Team) -> None:
        super().__init__(device.type)
        self.team = team

    def unscale_(self, optimizer: Optimizer) -> None:
        """Average the gradients that ``optimizer`` holds, divide them by the scale, and see whether they are finite."""
        self.team.average(optimizer)
        super().unscale_(optimizer)


ALONE = Team()
"""The only process."""


def joined(device: torch.device) -> Team:
    """Join the processes that have been started, or return a team of one where none have.

    They communicate by NCCL on CUDA and by gloo on a CPU. Each may take ``START`` seconds to answer, until
    :meth:`Team.answer_within` says otherwise.

    Args:
        device: that of this process; on CUDA it becomes the current one, which NCCL sends objects through.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE
    if not distributed.is_initialized():
        limit = timedelta(seconds=START)
        with _together(ALONE):
            if device.type == "cuda":
                distributed.init_process_group("nccl", timeout=limit, device_id=device)
            else:
                distributed.init_process_group("gloo", timeout=limit)
                atexit.register(_leave)
    team = Team(distributed.get_rank(), size)
    return replace(team, places=tuple(team.gathered(here())))


def _leave() -> None:
    """Close the connections before the interpreter ends: a thread that still listens then may abort the process."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


@contextmanager
def _together(team: Team) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        found = team.troubled()
        said = first_sentence(error)
        help = "what that process says; then localize train --resume DIR, in as many processes"
        if found is not None and found[1] == "has ended":
            raise MissingError(f"process {found[0]} of this run has ended.", facts=said, help=help) from error
        if found is not None or re.search("time[d ]*out", said, re.IGNORECASE):
            which = "another process" if found is None else f"process {found[0]}"
            raise MissingError(
                f"{which} of this run does not answer.",
                facts=["it is stopped."] * (found is not None) + [said],
                help=f"{help}. If it was only slow, with a longer --timeout",
            ) from error
        raise MissingError("another process of this run has ended.", facts=said, help=help) from error


def first_sentence(error: BaseException) -> str:
    """Return what an error of torch says before it guesses at causes and lists where it comes from."""
    return str(error).strip().partition("\n")[0].partition(" This is typically")[0]


def leads() -> bool:
    """Return whether this is the process that will write, before it has joined the others."""
    return os.environ.get("RANK", "0") == "0"


def reports() -> bool:
    """Return whether this process reports an error: until all have joined, the first of each machine does."""
    return os.environ.get("LOCAL_RANK", "0") == "0" or distributed.is_initialized()


def synchronize_norms(module: nn.Module, team: Team, device: torch.device, *, compiled: bool = False) -> None:
    """Put ``torch.nn.SyncBatchNorm`` in the place of every BatchNorm inside of a module, over the same tensors.

    Keys of the state dict stay. In one process it computes what BatchNorm does, bit for bit.

    Args:
        module: is changed; is itself no BatchNorm.
        team: the processes that train.
        device: that of this process.
        compiled: the training step is going to be compiled.

    Raises:
        OptionError: there are several processes, and they are not on CUDA, or their steps are compiled; or a BatchNorm
            is of a class of its own.
    """
    if team.size > 1 and device.type != "cuda":
        raise OptionError(
            f"--sync-bn cannot be had in {team.size} processes on {device.type}.",
            facts="torch's SyncBatchNorm speaks between processes on CUDA only.",
            help="--device cuda, one process, or leave out --sync-bn",
        )
    if team.size > 1 and compiled:
        raise OptionError(
            f"--sync-bn and --compile were both given to {team.size} processes.",
            facts="a compiled segment does not wait for other processes.",
            help="one of them",
        )
    for name, part in module.named_modules():
        if isinstance(part, BATCH_NORMS) and type(part) not in NORMS:
            raise OptionError(
                f"--sync-bn cannot take the place of {name}.",
                facts=f"it is a {type(part).__name__}, which may compute something else than BatchNorm.",
                help="leave out --sync-bn",
            )
    convert_sync_batchnorm(module)


def own_device(device: torch.device) -> torch.device:
    """Return the device of this process: of several on ``cuda``, each has its own.

    Raises:
        MissingError: ``torchrun`` has started more processes on this machine than it has GPUs.
    """
    local_rank = os.environ.get("LOCAL_RANK")
    if device.type != "cuda" or local_rank is None:
        return device
    here, wanted = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if wanted > here:
        raise MissingError(
            f"there are {wanted} processes on this machine, and {here} GPUs.",
            facts="every process trains on a GPU of its own.",
            help=f"torchrun --nproc-per-node {here}, or --device cpu",
        )
    return torch.device(device.type, int(local_rank))


def _gradients(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from (parameter.grad for parameter in group["params"] if parameter.grad is not None)
