"""Train in several processes, started by ``torchrun``: each takes its part of every batch.

Gradients are averaged over the processes before the optimizer uses them: loss by loss if updates are immediate, or all
together if there is one update at the end. The mean over equal parts is the mean over the whole batch, so the weights
are those of one process on the joined batch, up to rounding. Operations on several images (BatchNorm, losses that
compare images) see only the process's own part, as in ``torch.nn.parallel.DistributedDataParallel``. After
:func:`synchronize_norms`, BatchNorm sees all parts.
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
"""Seconds that a process may take to start: to read or download its data, and to compile its first step."""
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, BatchNormAct2d)
"""Classes whose forward is known; a subclass may have another one."""


@dataclass(frozen=True)
class Team:
    """The processes of a run."""

    rank: int = 0
    """The number of this process."""
    size: int = 1
    places: tuple[Place, ...] = ()
    """Where each of them is; empty where that is not known."""

    @property
    def writes(self) -> bool:
        """Whether this is the process that prints and writes files."""
        return self.rank == 0

    def troubled(self) -> tuple[int, str] | None:
        """Return the first process that has ended, or is stopped, and which of both; None where none is seen to.

        Only processes on the host of this one are seen.
        """
        others = [(rank, trouble(place)) for rank, place in enumerate(self.places) if rank != self.rank]
        stopped = next(((rank, what) for rank, what in others if what == "is stopped"), None)
        return stopped or next(((rank, what) for rank, what in others if what is not None), None)

    def wait(self) -> None:
        """Wait until every process has reached this point."""
        if self.size > 1:
            with _together(self):
                distributed.barrier()

    def part(self, values: Any) -> Any:
        """Return this process's part of a batch; all parts have the same size."""
        count = len(values) // self.size
        return values[self.rank * count : (self.rank + 1) * count]

    def any(self, here: bool, device: torch.device) -> bool:
        """Return whether ``here`` is true in any of the processes. All processes must call this."""
        if self.size == 1:
            return here
        flag = torch.tensor(float(here), device=device)
        with _together(self):
            distributed.all_reduce(flag, distributed.ReduceOp.MAX)
        return bool(flag)

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of tensors of one shape over the processes. All processes must call this."""
        if self.size == 1:
            return values
        values = values.clone()
        with _together(self):
            distributed.all_reduce(values)
        return values

    def gathered(self, value: Any) -> list[Any]:
        """Return the picklable values of all processes, in the order of ranks. All processes must call this."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with _together(self):
            distributed.all_gather_object(found, value)
        return found

    def same_start(self, module: nn.Module) -> None:
        """Copy the parameters and buffers of the first process to all others."""
        self._send(module.state_dict().values())

    def same_buffers(self, module: nn.Module) -> None:
        """Copy the buffers of the first process to all others, since each process has statistics of its own."""
        self._send(module.buffers())

    def _send(self, tensors: Iterable[Tensor]) -> None:
        if self.size > 1:
            with _together(self):
                for tensor in tensors:
                    distributed.broadcast(tensor, 0)

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """Run the body in every process; if it raises a LocalizeError in any of them, all of them stop.

        The body must not wait for other processes.

        Raises:
            LocalizeError: the error of this process, unless the first process has the same one.
            ReportedError: this process has no error, or the same as the first process, which reports it.
        """
        mine: LocalizeError | None = None
        try:
            yield
        except LocalizeError as error:
            mine = error
        told = self.gathered(None if mine is None else (str(mine), mine.exit_code))
        if mine is not None and (self.rank == 0 or told[0] != (str(mine), mine.exit_code)):
            raise mine
        if any(told):
            raise ReportedError(*next(filter(None, told)))

    def refuse_unlike(self, what: Mapping[str, str]) -> None:
        """Refuse processes whose texts differ under any name. All processes must call this.

        Raises:
            MissingError: the text of a process differs from that of the first; the message shows both.
        """
        every = self.gathered(dict(what))
        for rank, other in enumerate(every):
            for name, first in every[0].items():
                if other[name] != first:
                    was, here = first.splitlines(), other[name].splitlines()
                    error = MissingError(
                        f"process {rank} differs from process 0 in {name}.",
                        facts=[*(f"process 0: {line.strip()}" for line in was if line not in here),
                               *(f"process {rank}: {line.strip()}" for line in here if line not in was)][:6],
                        help="use the same command line, data and versions of libraries in every process",
                    )  # fmt: skip
                    raise error if self.rank == 0 else ReportedError(str(error), error.exit_code)

    def answer_within(self, seconds: float) -> None:
        """From now on, stop all processes if one does not answer for this long. All processes must call this."""
        if self.size > 1:
            set_timeout(timedelta(seconds=seconds))

    def average_gradients(self, optimizer: Optimizer) -> None:
        """Average gradients over the processes whenever ``optimizer`` steps, before hooks that are added later."""
        if self.size > 1:
            optimizer.register_step_pre_hook(lambda stepping, args, kwargs: self.average(stepping))

    def average(self, optimizer: Optimizer) -> None:
        """Average the gradients of an optimizer's parameters over the processes. All processes must call this."""
        if self.size == 1:
            return
        kinds: dict[Any, list[Tensor]] = {}
        for gradient in _gradients(optimizer):
            kinds.setdefault((gradient.dtype, gradient.device), []).append(gradient)
        for gradients in kinds.values():
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            with _together(self):
                distributed.all_reduce(flat)
            flat /= self.size
            parts = flat.split([gradient.numel() for gradient in gradients])
            copy_all(gradients, [p.view_as(g) for p, g in zip(parts, gradients, strict=True)])


class Scaler(torch.amp.GradScaler):
    """A gradient scaler that averages gradients over the processes before it checks whether they are finite.

    An overflow in one process then skips the update, and halves the scale, in all of them.
    """

    def __init__(self, device: torch.device, team: Team) -> None:
        super().__init__(device.type)
        self.team = team

    def unscale_(self, optimizer: Optimizer) -> None:
        """Average the gradients of ``optimizer``, divide them by the scale, and check whether they are finite."""
        self.team.average(optimizer)
        super().unscale_(optimizer)


ALONE = Team()
"""The only process."""


def joined(device: torch.device) -> Team:
    """Join the processes that were started together, or return a team of one if there are no others.

    They communicate with NCCL on CUDA and with gloo on a CPU. Each may take ``START`` seconds to answer, until
    :meth:`Team.answer_within` changes this.

    Args:
        device: the device of this process; on CUDA it becomes the current one, through which NCCL sends objects.
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
                distributed.init_process_group(
                    "nccl", timeout=limit, device_id=device, **_store_of_attempt(size, limit)
                )
            else:
                distributed.init_process_group("gloo", timeout=limit, **_store_of_attempt(size, limit))
                atexit.register(_leave)
    team = Team(distributed.get_rank(), size)
    return replace(team, places=tuple(team.gathered(here())))


def _store_of_attempt(size: int, limit: timedelta) -> dict[str, Any]:
    """Return arguments of ``init_process_group`` that keep the keys of a restarted job apart from those before.

    ``torchrun`` may keep its store when it restarts the processes of a host, with the addresses of those that ended.
    Hosts may count restarts differently, so that nothing is changed where there are several.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return {}
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = distributed.TCPStore(*place, is_master=False, wait_for_workers=False, timeout=limit)
    prefix = f"localize/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return {"store": distributed.PrefixStore(prefix, store), "rank": int(os.environ["RANK"]), "world_size": size}


def _leave() -> None:
    """Close the connections before the interpreter ends; a thread that is still listening could abort the process."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


@contextmanager
def _together(team: Team) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        found = team.troubled()
        said = first_sentence(error)
        help = "see the output of that process; then localize train --resume DIR, with as many processes"
        if found is not None and found[1] == "has ended":
            raise MissingError(f"process {found[0]} of this run has ended.", facts=said, help=help) from error
        if found is not None or re.search("time[d ]*out", said, re.IGNORECASE):
            which = "another process" if found is None else f"process {found[0]}"
            raise MissingError(
                f"{which} of this run does not answer.",
                facts=["it is stopped."] * (found is not None) + [said],
                help=f"{help}. If it was only slow, use a longer --timeout",
            ) from error
        raise MissingError("another process of this run has ended.", facts=said, help=help) from error


def first_sentence(error: BaseException) -> str:
    """Return the message of an error of torch, without its guesses at causes and its stack."""
    return str(error).strip().partition("\n")[0].partition(" This is typically")[0]


def leads() -> bool:
    """Return, before the processes have joined, whether this is the process that will write."""
    return os.environ.get("RANK", "0") == "0"


def reports() -> bool:
    """Return whether this process reports errors: until all have joined, the first of each machine does."""
    return os.environ.get("LOCAL_RANK", "0") == "0" or distributed.is_initialized()


def synchronize_norms(module: nn.Module, team: Team, device: torch.device, *, compiled: bool = False) -> None:
    """Replace every BatchNorm inside a module with ``torch.nn.SyncBatchNorm``, keeping its tensors.

    The keys of the state dict stay the same. In one process it computes the same as BatchNorm, bit for bit.

    Args:
        module: the module to change; it must not be a BatchNorm itself.
        team: the processes that train.
        device: the device of this process.
        compiled: whether the training step will be compiled.

    Raises:
        OptionError: there are several processes that are not on CUDA or that compile their steps, or a BatchNorm has a
            class of its own.
    """
    if team.size > 1 and device.type != "cuda":
        raise OptionError(
            f"--sync-bn does not work in {team.size} processes on {device.type}.",
            facts="torch's SyncBatchNorm communicates between processes on CUDA only.",
            help="--device cuda, a single process, or leave out --sync-bn",
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
                f"--sync-bn cannot replace {name}.",
                facts=f"it is a {type(part).__name__}, which may compute something other than BatchNorm.",
                help="leave out --sync-bn",
            )
    convert_sync_batchnorm(module)


def own_device(device: torch.device) -> torch.device:
    """Return the device of this process; on ``cuda``, each process has its own GPU.

    Raises:
        MissingError: ``torchrun`` started more processes on this machine than it has GPUs.
    """
    local_rank = os.environ.get("LOCAL_RANK")
    if device.type != "cuda" or local_rank is None:
        return device
    here, wanted = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if wanted > here:
        raise MissingError(
            f"there are {wanted} processes on this machine, but {here} GPUs.",
            facts="every process needs a GPU of its own.",
            help=f"torchrun --nproc-per-node {here}, or --device cpu",
        )
    return torch.device(device.type, int(local_rank))


def _gradients(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from (parameter.grad for parameter in group["params"] if parameter.grad is not None)
