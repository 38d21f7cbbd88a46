"""Hand values from process to process by ``isend`` and ``irecv`` of ``torch.distributed``: forward only.

(But for parameters that a method declares to be a batch late, such as a dictionary: ``send_delayed``.)

A pass (of training, or of testing) is a known number of batches of known sizes. Of the values that arrive, those of
``buffers`` batches are held: of the one that is worked on, and of others that have been asked for. Of those that leave,
at most ``pending`` batches are under way, the one that is worked on included. What a
tensor is (type, sizes, strides) is sent once for every size of a batch in each mode; otherwise nothing but the bytes of
the values is on the wire.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed, nn

FORM = 24
"""Numbers that describe a tensor: type, number of dimensions, sizes, strides."""
TYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)  # fmt: skip
Failed = Callable[[int, BaseException], Exception]


@dataclass
class _Arriving:
    """Values of one batch that have been asked for."""

    waiting: dict[tuple[int, str], tuple[Any, Tensor]] = field(default_factory=dict)


class PointToPoint:
    """What connects the processes of a partition.

    Args:
        group: of the processes, as a ``DeviceMesh`` has it.
        device: of the tensors.
        failed: makes the error for a process that has ended, or does not answer.
        buffers: how many batches that arrive are held, the one that is worked on included; 2 or more.
        pending: how many batches may be under way before a send waits, the one that is worked on included.
    """

    def __init__(self, group: Any, device: torch.device, failed: Failed, *, buffers: int = 2, pending: int = 2) -> None:
        self.group, self.device, self.failed = group, device, failed
        self.buffers, self.pending = buffers, pending
        self.bytes_sent = self.bytes_delayed = 0
        self._arrivals: Sequence[tuple[int, str]] = ()
        self._keys: deque[Hashable] = deque()
        self._asked: deque[_Arriving] = deque()
        self._forms: dict[Hashable, tuple[torch.dtype, tuple[int, ...], tuple[int, ...]]] = {}
        self._told: set[Hashable] = set()
        self._key: Hashable = None
        self._leaving: deque[tuple[int, list[tuple[Any, Tensor]]]] = deque()

    def begin(self, keys: Sequence[Hashable], arrivals: Sequence[tuple[int, str]]) -> None:
        """Begin a pass.

        Args:
            keys: for each batch what its forms follow from, such as mode and size; the same in all processes.
            arrivals: what arrives with each batch, in the order in which it is sent: process and name.
        """
        self._arrivals = arrivals
        self._keys, self._asked = deque(keys), deque()
        self._ask()

    def batch(self, key: Hashable) -> None:
        """Say that what is sent from now on belongs to a batch with this key."""
        self._key = key
        self._leaving.append((len(self._leaving), []))
        while len(self._leaving) > self.pending:
            self._wait_for(self._leaving.popleft()[1])

    def receive(self, name: str, *, source: int) -> Tensor:
        """Return a value of the batch at hand; on its last value, further batches are asked for.

        Raises:
            Exception: what ``failed`` makes, where the other process has ended or does not answer.
        """
        if not self._asked:
            self._ask_one()
        arriving = self._asked[0].waiting
        work, value = arriving.pop((source, name))
        self._finish(work, source)
        if not arriving:
            self._asked.popleft()
            self._ask()
        return value

    def send(self, name: str, value: Tensor, *, to: int) -> None:
        """Hand a value to a later process; it must not be written into until the send is over.

        Raises:
            Exception: see :meth:`receive`.
        """
        assert not value.requires_grad, f"{name} would carry a history"
        if not self._leaving:
            self._leaving.append((0, []))
        value = value if is_dense(value) else value.contiguous()
        key = (to, name, self._key)
        if key not in self._told:
            self._told.add(key)
            self._start(form_of(value), to)
        flat = torch.as_strided(value, (value.numel(),), (1,), value.storage_offset()).view(torch.uint8)
        self.bytes_sent += flat.numel()
        self._start(flat, to)

    def send_delayed(self, name: str, module: nn.Module, *, to: int) -> None:
        """Hand the parameters of a module to an earlier process, as they are now.

        Raises:
            Exception: see :meth:`receive`.
        """
        for parameter in module.parameters():
            flat = parameter.detach().clone().view(-1).view(torch.uint8)
            self.bytes_delayed += flat.numel()
            self._start(flat, to)

    def receive_delayed(self, name: str, module: nn.Module, *, source: int) -> None:
        """Give a module the parameters that a later process had when it began, or is going to begin, with this batch.

        Raises:
            Exception: see :meth:`receive`.
        """
        for parameter in module.parameters():
            value = torch.empty(parameter.shape, dtype=parameter.dtype, device=self.device)
            self._finish(self._get(value.view(-1).view(torch.uint8), source), source)
            with torch.no_grad():
                parameter.copy_(value)

    def close(self) -> None:
        """Wait until all that was sent has been taken."""
        while self._leaving:
            self._wait_for(self._leaving.popleft()[1])

    def _start(self, flat: Tensor, to: int) -> None:
        flat = flat.to(self.device)
        try:
            work = distributed.isend(flat, to, group=self.group)
        except RuntimeError as error:
            raise self.failed(to, error) from error
        self._leaving[-1][1].append(((work, to), flat))

    def _wait_for(self, sent: list[tuple[Any, Tensor]]) -> None:
        for (work, to), _ in sent:
            self._finish(work, to)

    def _finish(self, work: Any, other: int) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise self.failed(other, error) from error

    def _ask(self) -> None:
        """Ask for as many batches as may be asked for, as long as what they look like is known."""
        while self._keys and len(self._asked) < self.buffers - 1:
            key = self._keys[0]
            if self._arrivals and any((source, name, key) not in self._forms for source, name in self._arrivals):
                return
            self._ask_one()

    def _ask_one(self) -> None:
        """Ask for the values of one more batch; the first of a new form waits until that is known."""
        key = self._keys.popleft()
        asked = _Arriving()
        self._asked.append(asked)
        for source, name in self._arrivals:
            if (source, name, key) not in self._forms:
                told = torch.empty(FORM, dtype=torch.int64, device=self.device)
                self._finish(self._get(told, source), source)
                self._forms[source, name, key] = read_form(told)
            dtype, shape, strides = self._forms[source, name, key]
            value = torch.empty_strided(shape, strides, dtype=dtype, device=self.device)
            flat = torch.as_strided(value, (value.numel(),), (1,)).view(torch.uint8)
            asked.waiting[source, name] = (self._get(flat, source), value)

    def _get(self, flat: Tensor, source: int) -> Any:
        try:
            return distributed.irecv(flat, source, group=self.group)
        except RuntimeError as error:
            raise self.failed(source, error) from error


def is_dense(value: Tensor) -> bool:
    """Tell whether a tensor fills a piece of memory, in whatever order of its dimensions."""
    expected = 1
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def form_of(value: Tensor) -> Tensor:
    """Return type, sizes and strides of a tensor as numbers."""
    numbers = [TYPES.index(value.dtype), value.dim(), *value.shape, *value.stride()]
    return torch.tensor([*numbers, *[0] * (FORM - len(numbers))], dtype=torch.int64)


def read_form(told: Tensor) -> tuple[torch.dtype, tuple[int, ...], tuple[int, ...]]:
    """Return what :func:`form_of` has put into numbers."""
    kind, dims, *numbers = told.tolist()
    return TYPES[kind], tuple(numbers[:dims]), tuple(numbers[dims : 2 * dims])
