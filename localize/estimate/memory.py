"""Predict, without data, what a training step needs: bytes at every operation, and arithmetic. Or measure it.

The step that is predicted is the one that runs: the same text, on tensors that have shapes and no values
(:class:`torch._subclasses.fake_tensor.FakeTensorMode`), while the bytes of every storage are counted from the operation
that makes it to its end. The same counter measures a real step.

What is counted: parameters, buffers, gradients, the optimizer's state, the batch, and every tensor that an operation
returns. What is not: memory that an operation takes and gives back before it returns (workspaces of convolutions), and
what an allocator holds beyond what is asked of it. Operations are those of the CPU: attention, for example, keeps what
its kernel on the CPU keeps.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import timm.optim
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import flop_registry

from localize.errors import UnknownNameError, did_you_mean
from localize.graph.inputs import calling
from localize.graph.twin import fake_copy
from localize.ir import Trunk
from localize.ops.parts import REPEATED
from localize.runtime.model import LocalModel
from localize.torch_names import TorchDispatchMode, fake_mode, tree_leaves

MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return SGD with momentum, which keeps one value for every parameter."""
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def named(opt: str) -> MakeOptimizer:
    """Return what makes the optimizer that timm knows by a name, from parameter groups; a momentum is 0.9.

    Raises:
        UnknownNameError: timm knows none of that name.
    """
    known = timm.optim.list_optimizers()
    if opt not in known:
        raise UnknownNameError(
            f"there is no optimizer {opt!r}.",
            facts=f"timm has {len(known)}: {', '.join(known[:8])}, ...",
            help=did_you_mean(opt, known) or "--opt sgd",
        )
    return lambda groups: timm.optim.create_optimizer_v2(groups, opt=opt, lr=0.1, momentum=0.9)


@dataclass(frozen=True)
class Conditions:
    """What steps are compared under: what makes their optimizer, and the type that autocast casts to, if it does."""

    optimizer: MakeOptimizer = sgd
    autocast: torch.dtype | None = None

    def around(self, device: str) -> AbstractContextManager:
        """Return the autocast that a step runs under on a kind of device."""
        return nullcontext() if self.autocast is None else torch.autocast(device, self.autocast)


PLAIN = Conditions()
"""SGD with momentum, in the types of the model's own."""


@dataclass(frozen=True)
class Footprint:
    """What one training step needs, behind the first, which makes the state of the optimizer."""

    resident: int
    """Bytes that live before and behind it: parameters, buffers, the optimizer's state, the batch."""
    peak: int
    """Most bytes that live at one time, ``resident`` included."""
    saved: int
    """Most bytes that live when a backward begins, beyond ``resident`` and gradients: what is kept for it, and the
    little that is passed on."""
    macs: int
    """Multiply-adds of matrix products and convolutions, forward and backward."""
    timeline: tuple[tuple[int, int], ...]
    """For every operation of the step that changes them: multiply-adds so far, and bytes that live behind it."""


def predict(
    local: LocalModel,
    batch_size: int,
    *,
    optimizer: MakeOptimizer = sgd,
    autocast: torch.dtype | None = None,
) -> Footprint:
    """Return what a step of ``local`` needs, without running it and without allocating what it needs.

    Args:
        local: its model may have no data (meta device); it is not changed.
        batch_size: N, the number of images.
        optimizer: makes the optimizer from parameter groups; default is SGD with momentum.
        autocast: type of a surrounding ``torch.autocast``; None is none.

    Raises:
        RuntimeError: the step depends on values of tensors.
    """
    with fake_mode():
        fake = without_values(local)
        made = optimizer(fake.param_groups(lr=0.1))
        few = min(batch_size, 2) if local.plan.exact else batch_size  # what the optimizer keeps is of one size
        _step(fake, *empty_batch(local.plan.segments.trunk, few), made, autocast)
        return _counted(fake, *empty_batch(local.plan.segments.trunk, batch_size), made, autocast)


def measure(
    local: LocalModel, x: Any, y: Tensor, optimizer: torch.optim.Optimizer, *, autocast: torch.dtype | None = None
) -> Footprint:
    """Return what a step needs, by running two of them; the second is counted.

    Args:
        local: it is trained by these steps.
        x: images, or a tuple or dict of inputs, as :meth:`localize.LocalModel.step` takes them.
        y: class ids.
        optimizer: over ``local.param_groups()``.
        autocast: as in :func:`predict`.
    """
    _step(local, x, y, optimizer, autocast)
    return _counted(local, x, y, optimizer, autocast)


def _step(local: LocalModel, x: Any, y: Tensor, optimizer: torch.optim.Optimizer, autocast: torch.dtype | None) -> None:
    with Conditions(autocast=autocast).around(next(local.parameters()).device.type):
        local.step(x, y, optimizer)
    optimizer.zero_grad(set_to_none=True)


def _counted(
    local: LocalModel, x: Any, y: Tensor, optimizer: torch.optim.Optimizer, autocast: torch.dtype | None
) -> Footprint:
    """Return what a step needs, by running it; the state of the optimizer is there already."""
    meter = Meter()
    state = [value for values in optimizer.state.values() for value in tree_leaves(values)]
    for value in (*local.parameters(), *local.buffers(), *tree_leaves(x), y, *state):
        if isinstance(value, Tensor):
            meter.add(value)
    kept = _Kept(meter, local.parameters())
    with meter, kept:
        _step(local, x, y, optimizer, autocast)
    return Footprint(kept.before, meter.peak, kept.most, meter.flops // 2, tuple(meter.timeline))


def without_values(local: LocalModel) -> LocalModel:
    """Return a copy of ``local`` in train mode whose tensors have no values; to be called in a ``FakeTensorMode``."""
    trunk, heads = fake_copy(local.trunk), fake_copy(local.heads)
    return LocalModel(trunk, heads, local.plan, local.program, local.source, local.filename).train()


def empty_batch(trunk: Trunk, batch_size: int) -> tuple[Any, Tensor]:
    """Return inputs of uninitialised values and class ids of 0, in the form that a step takes."""
    tensors = [torch.empty((batch_size, *(a.shape or ())), dtype=a.dtype) for a in trunk.inputs]
    by_position, by_keyword = calling(trunk.arguments, tuple(tensors))
    x = by_keyword or (tuple(by_position) if len(by_position) > 1 else by_position[0])
    return x, torch.zeros((batch_size, *trunk.output_size), dtype=torch.long)


class Meter(TorchDispatchMode):
    """Count the bytes of every storage that an operation makes, from then until it dies, and floating-point operations.

    The latter are those of torch's own formulas (``torch.utils.flop_counter``): two for a multiply-add. Its counter
    itself cannot be used, since it keeps tensors alive.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = self.flops = 0
        self.timeline: list[tuple[int, int]] = []
        self._live: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self.add(value)
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.flops += REPEATED.get() * count(*args, **(kwargs or {}), out_val=result)
        if not self.timeline or self.held != self.timeline[-1][1]:
            self.timeline.append((self.flops // 2, self.held))
        return result

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage from now on, unless it is counted."""
        storage = tensor.untyped_storage()
        if id(storage) not in self._live:
            self._live[id(storage)] = storage.nbytes()
            self.held += storage.nbytes()
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self._died, id(storage))

    def _died(self, key: int) -> None:
        self.held -= self._live.pop(key)


class _Kept(TorchFunctionMode):
    """Note what lives when a backward begins: what is kept for it."""

    def __init__(self, meter: Meter, parameters: Iterable[Tensor]) -> None:
        super().__init__()
        self.meter, self.parameters = meter, list(parameters)
        self.before, self.most = meter.held, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.backward:
            gradients = sum(p.grad.nbytes for p in self.parameters if p.grad is not None)
            self.most = max(self.most, self.meter.held - self.before - gradients)
        return func(*args, **(kwargs or {}))
