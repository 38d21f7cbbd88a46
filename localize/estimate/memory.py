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

import functools
import inspect
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import timm.optim
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import flop_registry

from localize.errors import UnknownNameError, did_you_mean
from localize.estimate import speed as speeds
from localize.estimate.repeats import Called, Known, Repeats
from localize.estimate.speed import SPEEDS, Speed
from localize.graph.inputs import calling
from localize.graph.outputs import output_called
from localize.graph.twin import fake_copy
from localize.ir import Trunk
from localize.ops.parts import REPEATED
from localize.runtime.model import LocalModel, StepResult
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
    known = [str(name) for name in timm.optim.list_optimizers()]
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
    speed: Speed = SPEEDS["cpu"]
    """What seconds are predicted by."""
    opt: str = ""
    """Name of the optimizer in timm; empty is SGD with momentum."""

    def around(self, device: str) -> AbstractContextManager:
        """Return the autocast that a step runs under on a kind of device."""
        return nullcontext() if self.autocast is None else torch.autocast(device, self.autocast)


PLAIN = Conditions()
"""SGD with momentum, in the types of the model's own."""


@dataclass(frozen=True)
class Footprint:
    """What one training step needs, behind the first, which makes the state of the optimizer."""

    resident: int
    """Bytes that live before and behind it: parameters, buffers, the optimizer's state, the batch, the result."""
    peak: int
    """Most bytes that live at one time, ``resident`` included."""
    saved: int
    """Most bytes that live when a backward begins, beyond ``resident`` and gradients: what is kept for it, and the
    little that is passed on."""
    macs: int
    """Multiply-adds of matrix products and convolutions, forward and backward."""
    timeline: tuple[tuple[int, int], ...]
    """For every operation of the step that changes them: multiply-adds so far, and bytes that live behind it."""
    moved: int = 0
    """Bytes that operations read and write."""
    seconds: float = 0.0
    """By the model of a device, see :mod:`localize.estimate.speed`."""
    calls: tuple[Called, ...] = ()
    """Calls of functions that train, where the step was predicted."""
    components: Mapping[str, int] = field(default_factory=dict)
    """What lives at the peak, in bytes by kind: ``parameters`` and ``states`` of the model, ``batch``, and ``result``,
    what the step before returned; ``head parameters`` and ``head states``; ``moments``, states that are kept for each
    loss apart; ``segments`` and ``heads``, values that their forwards have made; ``backward``, gradients and values
    that backwards and updates have made."""


def predict(
    local: LocalModel,
    batch_size: int,
    *,
    optimizer: MakeOptimizer = sgd,
    autocast: torch.dtype | None = None,
    speed: Speed = SPEEDS["cpu"],
    known: Known | None = None,
    in_backward: bool = False,
) -> Footprint:
    """Return what a step of ``local`` needs, without running it and without allocating what it needs.

    Of functions of the text that compute the same only one is followed, see :mod:`localize.estimate.repeats`.

    Args:
        local: its model may have no data (meta device); it is not changed.
        batch_size: N, the number of images.
        optimizer: makes the optimizer from parameter groups; default is SGD with momentum.
        autocast: type of a surrounding ``torch.autocast``; None is none.
        speed: what seconds are predicted by.
        known: costs of functions that were followed before under the same optimizer, autocast and speed; what is
            followed now is added.
        in_backward: every parameter has an optimizer of its own, which updates it and drops its gradient in the
            backward, as soon as there is one.

    Raises:
        RuntimeError: the step depends on values of tensors.
    """
    with fake_mode():
        fake = without_values(local)
        x, y = empty_batch(local.plan.segments.trunk, batch_size)
        made = optimizer(fake.param_groups(lr=0.1))
        states = _step_in_backward(fake, optimizer) if in_backward else [made]
        if not in_backward:
            make_states(fake, made)
        followed = Following(fake, x, y, states, speed, {} if known is None or in_backward else known)
        with followed.metered(autocast):
            result = followed.step(x, y, made)
        return followed.footprint(result)


def saves_memory(model: nn.Module) -> bool:
    """Tell whether a model offers to save memory by itself, as DenseNets do (``memory_efficient``)."""
    return any(hasattr(module, "memory_efficient") for module in model.modules())


def predict_plain(
    trunk: Trunk,
    batch_size: int,
    *,
    optimizer: MakeOptimizer = sgd,
    autocast: torch.dtype | None = None,
    speed: Speed = SPEEDS["cpu"],
) -> Footprint:
    """Return what a plain step of backprop needs of a model that saves memory by itself, see :func:`saves_memory`."""
    with fake_mode():
        model = fake_copy(trunk.model).train()
        for module in model.modules():
            if hasattr(module, "memory_efficient"):
                module.memory_efficient = True  # type: ignore[assignment]
        x, y = empty_batch(trunk, batch_size)
        made = optimizer([{"params": [p for p in model.parameters() if p.requires_grad]}])
        _fill(p for p in model.parameters())
        made.step()
        made.zero_grad(set_to_none=True)
        meter = _meter(model, nn.Module(), x, y, [made], speed)
        kept = _Kept(meter, model.parameters())
        with meter, kept, _around("cpu", autocast), meter.making("segments"):
            by_position = () if isinstance(x, dict) else x if isinstance(x, tuple) else (x,)
            returned = model(*by_position, **(x if isinstance(x, dict) else {}))
            F.cross_entropy(output_called(returned, trunk.output), y).backward()
            del returned
            with meter.making("backward"):
                made.step()
                made.zero_grad(set_to_none=True)
        return _footprint(meter, kept)


class Following:
    """A step without values that is followed: what its functions cost, and what lives at its peak."""

    def __init__(
        self, fake: LocalModel, x: Any, y: Tensor, states: Sequence[torch.optim.Optimizer], speed: Speed, known: Known
    ) -> None:
        self.meter = _meter(fake.trunk, fake.heads, x, y, states, speed)
        self.kept = _Kept(self.meter, fake.parameters())
        self.repeats = Repeats(fake, known, self.meter, self.kept)
        self.local = fake.with_functions(self.repeats.around)
        self.text = inspect.unwrap(self.local.functions_of_text["train_step"]).__globals__
        for name in [name for name in self.text if re.fullmatch(r"segment_\d+", name)]:
            self.text[name] = self._as_segment(self.text[name])
        self.step = self.local.step

    def _as_segment(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*values: Any) -> Any:
            with self.meter.making("segments"):
                return function(*values)

        return call

    @contextmanager
    def metered(self, autocast: torch.dtype | None) -> Iterator[None]:
        """Count what is done inside."""
        with self.meter, self.kept, _around("cpu", autocast), self.meter.making("heads"):
            yield

    def footprint(self, result: StepResult) -> Footprint:
        """Return what was found, while the result of the step before, which is as large as this one, lives."""
        left = sum({id(one.untyped_storage()): one.untyped_storage().nbytes() for one in left_of(result)}.values())
        calls = (replace(one, before=one.before + left, peak=one.peak + left) for one in self.repeats.calls)
        return _footprint(self.meter, self.kept, tuple(calls), left=left)


def _step_in_backward(local: LocalModel, optimizer: MakeOptimizer) -> list[torch.optim.Optimizer]:
    """Let every parameter be updated in the backward, and return its optimizers, which have their states."""
    made = []
    for group in local.param_groups(lr=0.1):
        for parameter in group["params"]:
            own = optimizer([{**group, "params": [parameter]}])
            _fill([parameter])
            own.step()
            own.zero_grad(set_to_none=True)
            made.append(own)

            def update(ready: Tensor, own: torch.optim.Optimizer = own) -> None:
                own.step()
                ready.grad = None

            parameter.register_post_accumulate_grad_hook(update)
    return made


def make_states(local: LocalModel, optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer have the state that the first step makes: it is stepped once with empty gradients."""
    updates = local.updates(optimizer)
    if local.plan.update != "immediate":
        _fill(p for loss in updates.parts for part in loss for p in part.parameters)
        updates.step()
        optimizer.zero_grad(set_to_none=True)
        return
    for number, loss in enumerate(updates.parts):
        _fill(p for part in loss for p in part.parameters)
        updates[number].step()
        updates[number].zero_grad()


def _fill(parameters: Iterable[Tensor]) -> None:
    for parameter in dict.fromkeys(parameters):  # several losses may train one
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None


def measure(
    local: LocalModel, x: Any, y: Tensor, optimizer: torch.optim.Optimizer, *, autocast: torch.dtype | None = None
) -> Footprint:
    """Return what a step needs, by running two of them; the second is counted, while the result of the first lives.

    So it does where a loop writes ``result = local.step(...)``.

    Args:
        local: it is trained by these steps.
        x: images, or a tuple or dict of inputs, as :meth:`localize.LocalModel.step` takes them.
        y: class ids.
        optimizer: over ``local.param_groups()``.
        autocast: as in :func:`predict`.
    """
    device = next(local.parameters()).device.type

    def step() -> StepResult:
        with _around(device, autocast):
            return local.step(x, y, optimizer)

    result = step()
    optimizer.zero_grad(set_to_none=True)
    meter = _meter(local.trunk, local.heads, x, y, [optimizer], SPEEDS["cpu"])
    meter.own("result", left_of(result))
    kept = _Kept(meter, local.parameters())
    with meter, kept:
        result = step()
    return _footprint(meter, kept)


def _around(device: str, autocast: torch.dtype | None) -> AbstractContextManager:
    return nullcontext() if autocast is None else torch.autocast(device, autocast)


def _meter(
    trunk: nn.Module,
    added: nn.Module,
    x: Any,
    y: Tensor,
    optimizers: Sequence[torch.optim.Optimizer],
    speed: Speed,
) -> Meter:
    """Return a meter that counts what lives before a step, by its kind."""
    meter = Meter(speed)
    meter.own("parameters", (*trunk.parameters(), *trunk.buffers()))
    meter.own("head parameters", (*added.parameters(), *added.buffers()))
    meter.own("batch", (*tree_leaves(x), y))
    heads = set(added.parameters())
    for optimizer in optimizers:
        for key, values in optimizer.state.items():
            kind = "moments" if isinstance(key, str) else "head states" if key in heads else "states"
            meter.own(kind, tree_leaves(values))
    return meter


def left_of(result: StepResult) -> tuple[Tensor, ...]:
    """Return the tensors of a step's result, which a loop keeps until the next one returns."""
    return (*result.losses.values(), *(one for one in result.returned.values() if one is not None))


def _footprint(meter: Meter, kept: _Kept, calls: tuple[Called, ...] = (), *, left: int = 0) -> Footprint:
    """Return what was counted; ``left`` are bytes that lived all the time and were not."""
    line = tuple((done, held + left) for done, held in meter.timeline)
    components = {kind: size for kind, size in meter.at_peak.items() if size}
    if left:
        components["result"] = left
    return Footprint(
        kept.before + left, meter.peak + left, kept.most, meter.flops // 2, line, meter.moved, meter.seconds, calls,
        components,
    )  # fmt: skip


def without_values(local: LocalModel) -> LocalModel:
    """Return a copy of ``local`` in train mode whose tensors have no values; to be called in a ``FakeTensorMode``."""
    trunk, heads = fake_copy(local.trunk), fake_copy(local.heads)
    assert isinstance(heads, nn.ModuleDict)
    return LocalModel(trunk, heads, local.plan, local.program, local.source, local.filename).train()


def empty_batch(trunk: Trunk, batch_size: int) -> tuple[Any, Tensor]:
    """Return inputs of uninitialised values and class ids of 0, in the form that a step takes."""
    tensors = [torch.empty((batch_size, *(a.shape or ())), dtype=a.dtype) for a in trunk.inputs]
    by_position, by_keyword = calling(trunk.arguments, tuple(tensors))
    x = by_keyword or (tuple(by_position) if len(by_position) > 1 else by_position[0])
    return x, torch.zeros((batch_size, *trunk.output_size), dtype=torch.long)


class Meter(TorchDispatchMode):
    """Count bytes of every storage that an operation makes, from then until it dies, and floating-point operations.

    The latter are those of torch's own formulas (``torch.utils.flop_counter``): two for a multiply-add. Its counter
    itself cannot be used, since it keeps tensors alive. ``moved`` are the bytes that operations read and write, each by
    itself.
    """

    def __init__(self, speed: Speed = SPEEDS["cpu"]) -> None:
        super().__init__()
        self.speed = speed
        self.held = self.peak = self.flops = self.moved = self.calls = 0
        self.seconds = 0.0
        """Of the operations so far, by the model of a device."""
        self.timeline: list[tuple[int, int]] = []
        self.kind = "backward"
        """Of what is made now."""
        self.by_kind: Counter[str] = Counter()
        """Bytes that live now."""
        self.at_peak: Counter[str] = Counter()
        """And at the peak so far."""
        self._live: dict[int, tuple[int, str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        for value in made:
            self.add(value)
        flops = 0
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            flops = count(*args, **(kwargs or {}), out_val=result)
            self.flops += REPEATED.get() * flops
        read = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        moved = speeds.traffic(func, read, made)
        if moved >= 0:
            times = REPEATED.get()
            self.moved += times * moved
            self.calls += times
            grouped = flops > 0 and speeds.is_grouped(func, args)
            self.seconds += times * self.speed.seconds(flops / 2, moved, grouped=grouped)
        if not self.timeline or self.held != self.timeline[-1][1]:
            self.timeline.append((self.flops // 2, self.held))
        return result

    @property
    def work(self) -> tuple[int, int, int, float]:
        """Floating-point operations, bytes read and written, calls, seconds so far."""
        return self.flops, self.moved, self.calls, self.seconds

    @contextmanager
    def unseen(self, work: tuple[int, int, int, float]) -> Iterator[None]:
        """Count no work of what is done inside but this, and no change of what lives in the timeline."""
        then, line = self.work, self.timeline
        self.timeline = []
        try:
            yield
        finally:
            self.flops, self.moved, self.calls = (a + b for a, b in zip(then[:3], work[:3], strict=True))
            self.seconds = then[3] + work[3]
            self.timeline = line

    @contextmanager
    def making(self, kind: str) -> Iterator[None]:
        """Count what is made inside as of this kind."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def own(self, kind: str, values: Iterable[Any]) -> None:
        """Count what lives already."""
        with self.making(kind):
            for value in values:
                if isinstance(value, Tensor):
                    self.add(value)

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage from now on, unless it is counted."""
        storage = tensor.untyped_storage()
        if id(storage) not in self._live:
            size = storage.nbytes()
            self._live[id(storage)] = size, self.kind
            self.held += size
            self.by_kind[self.kind] += size
            if self.held > self.peak:
                self.peak, self.at_peak = self.held, self.by_kind.copy()
            weakref.finalize(storage, self._died, id(storage))

    def _died(self, key: int) -> None:
        size, kind = self._live.pop(key)
        self.held -= size
        self.by_kind[kind] -= size


class _Kept(TorchFunctionMode):
    """Note what lives when a backward begins: what is kept for it."""

    def __init__(self, meter: Meter, parameters: Iterable[Tensor]) -> None:
        super().__init__()
        self.meter, self.parameters = meter, list(parameters)
        self.before, self.most = meter.held, 0

    def gradients(self) -> int:
        """Return the bytes of gradients that live now."""
        return sum(p.grad.nbytes for p in self.parameters if p.grad is not None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.backward:
            self.most = max(self.most, self.meter.held - self.before - self.gradients())
            with self.meter.making("backward"):
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))
