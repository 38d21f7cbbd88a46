"""Predict the memory (bytes at every operation) and arithmetic of a training step, without data; or measure them.

The predicted step is the one that runs: the same text, on tensors that have shapes but no values
(:class:`torch._subclasses.fake_tensor.FakeTensorMode`). The bytes of every storage are counted from the operation that
creates it until it is freed. The same counter measures a real step.

Counted are parameters, buffers, gradients, the optimizer's state, the batch, and every tensor that an operation
returns. Not counted are memory that an operation frees before it returns (workspaces of convolutions), and memory that
an allocator holds beyond the requested bytes. Operations are those of the CPU: attention, for example, keeps what its
CPU kernel keeps.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, cast

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
from localize.torch_names import FakeTensors, TorchDispatchMode, fake_mode, tree_leaves

MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return SGD with momentum, which keeps one value for each element of the parameters."""
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def named(opt: str) -> MakeOptimizer:
    """Return a function that makes timm's optimizer of a name from parameter groups; momentum, if any, is 0.9.

    Raises:
        UnknownNameError: timm has no optimizer of that name.
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
    """Conditions under which steps are compared: the function that makes their optimizer, and the autocast type."""

    optimizer: MakeOptimizer = sgd
    autocast: torch.dtype | None = None
    speed: Speed = SPEEDS["cpu"]
    """Speed of the device for which seconds are predicted."""
    opt: str = ""
    """Name of the optimizer in timm; empty for SGD with momentum."""

    def around(self, device: str) -> AbstractContextManager:
        """Return the autocast context of a step on a kind of device."""
        return nullcontext() if self.autocast is None else torch.autocast(device, self.autocast)


PLAIN = Conditions()
"""SGD with momentum, in the model's own types."""


@dataclass(frozen=True)
class Footprint:
    """Memory and arithmetic of one training step after the first, which creates the optimizer's state."""

    resident: int
    """Bytes that are live before and after it: parameters, buffers, the optimizer's state, the batch, the result."""
    peak: int
    """Most bytes that are live at one time, including ``resident``."""
    saved: int
    """Most bytes that are live when a backward starts, beyond ``resident`` and gradients: mostly values that are kept
    for the backward."""
    macs: int
    """Multiply-adds of matrix products and convolutions, forward and backward."""
    timeline: tuple[tuple[int, int], ...]
    """Multiply-adds so far and live bytes, after each operation that changes the live bytes."""
    moved: int = 0
    """Bytes that operations read and write."""
    seconds: float = 0.0
    """Predicted seconds on a device, see :mod:`localize.estimate.speed`."""
    calls: tuple[Called, ...] = ()
    """Calls of training functions, if the step was predicted."""
    components: Mapping[str, int] = field(default_factory=dict)
    """Bytes that are live at the peak, by kind: ``parameters`` and ``states`` of the model; ``batch``; ``result`` of
    the previous step; ``head parameters`` and ``head states``; ``moments``, states that each loss keeps separately;
    ``segments`` and ``heads``, values from their forwards; ``backward``, gradients and values from backwards and
    updates."""


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
    """Return the memory and arithmetic of a step of ``local``, without running it or allocating its memory.

    Functions of the text that compute the same are followed only once, see :mod:`localize.estimate.repeats`.

    Args:
        local: the local model, which is not changed; its model may have no data (meta device).
        batch_size: N, the number of images.
        optimizer: makes the optimizer from parameter groups; default: SGD with momentum.
        autocast: type of a surrounding ``torch.autocast``; None for no autocast.
        speed: speed of the device for which seconds are predicted.
        known: costs of functions followed earlier with the same optimizer, autocast and speed; new ones are added.
        in_backward: every parameter has its own optimizer, which updates it and drops its gradient during the
            backward, as soon as the gradient exists.

    Returns:
        Bytes, multiply-adds and predicted seconds.

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
    """Return whether a model has its own option to save memory, as DenseNets have (``memory_efficient``)."""
    return any(hasattr(module, "memory_efficient") for module in model.modules())


def predict_plain(
    trunk: Trunk,
    batch_size: int,
    *,
    optimizer: MakeOptimizer = sgd,
    autocast: torch.dtype | None = None,
    speed: Speed = SPEEDS["cpu"],
) -> Footprint:
    """Return the costs of a plain backprop step of a model with its own memory saving on, see :func:`saves_memory`."""
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
        meter = meter_of(model, nn.Module(), x, y, [made], speed)
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
    """A step followed without values: the costs of its functions, and the tensors that are live at its peak."""

    def __init__(
        self, fake: LocalModel, x: Any, y: Tensor, states: Sequence[torch.optim.Optimizer], speed: Speed, known: Known
    ) -> None:
        self.meter = meter_of(fake.trunk, fake.heads, x, y, states, speed)
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
        """Count the operations inside."""
        with self.meter, self.kept, _around("cpu", autocast), self.meter.making("heads"):
            yield

    def footprint(self, result: StepResult) -> Footprint:
        """Return the costs of the step, assuming that the equally large result of the previous step is live."""
        left = sum({id(one.untyped_storage()): one.untyped_storage().nbytes() for one in left_of(result)}.values())
        calls = (replace(one, before=one.before + left, peak=one.peak + left) for one in self.repeats.calls)
        return _footprint(self.meter, self.kept, tuple(calls), left=left)


def _step_in_backward(local: LocalModel, optimizer: MakeOptimizer) -> list[torch.optim.Optimizer]:
    """Make each parameter be updated during the backward; return the optimizers, with their states."""
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
    """Create an optimizer's state as its first step does; call it in a ``FakeTensorMode``.

    One parameter of each form is stepped, with an empty gradient; the states of the others are made like its state.
    """
    groups = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    forms = {p: (i, p.shape, p.stride(), p.dtype, p.requires_grad) for p, i in groups.items()}
    updates, states, fakes = local.updates(optimizer), cast(dict[Any, Any], optimizer.state), FakeTensors()
    stepped: dict[Any, Any] = {}
    """By the form of a parameter, where the state of the one that was stepped is."""

    def make(parameters: Mapping[nn.Parameter, Any], step: Callable[[], None]) -> None:
        """Make the states of parameters, each with the key that its state is kept by."""
        new = {forms[p]: p for p in parameters if forms[p] not in stepped}
        if new:
            _fill(new.values())
            step()
            _drop(new.values())
        stepped.update({form: parameters[p] for form, p in new.items()})
        for p, key in parameters.items():
            known = states.get(stepped[forms[p]])
            if known and not states.get(key):  # an own state is an empty dict until its first step
                states[key] = {name: _like(value, fakes) for name, value in known.items()}

    for number, loss in enumerate(updates.parts):
        for part in loss:
            if local.plan.update == "immediate":
                own = {p: key for key, p in part.own}
                make({p: own.get(p, p) for p in part.parameters}, updates[number].step)
            else:
                make({p: p for p in part.parameters}, updates.step)


def _like(value: Any, fakes: FakeTensors) -> Any:
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    return fakes.like(value) if value.dim() else value.clone()  # a number of steps is known, and read


def _fill(parameters: Iterable[Tensor]) -> None:
    for parameter in dict.fromkeys(parameters):  # several losses may train the same one
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None


def _drop(parameters: Iterable[Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = None


def measure(
    local: LocalModel, x: Any, y: Tensor, optimizer: torch.optim.Optimizer, *, autocast: torch.dtype | None = None
) -> Footprint:
    """Measure the memory and arithmetic of a step by running two steps.

    The second one is counted, while the result of the first is still live, as in a loop with
    ``result = local.step(...)``.

    Args:
        local: the local model, which these steps train.
        x: images (N, C, H, W), or a tuple or dict of inputs, as for :meth:`localize.LocalModel.step`.
        y: class ids (N,).
        optimizer: an optimizer over ``local.param_groups()``.
        autocast: as in :func:`predict`.

    Returns:
        Bytes, multiply-adds and predicted seconds.
    """
    device = next(local.parameters()).device.type

    def step() -> StepResult:
        with _around(device, autocast):
            return local.step(x, y, optimizer)

    result = step()
    optimizer.zero_grad(set_to_none=True)
    meter = meter_of(local.trunk, local.heads, x, y, [optimizer])
    meter.own("result", left_of(result))
    kept = _Kept(meter, local.parameters())
    with meter, kept:
        result = step()
    return _footprint(meter, kept)


def _around(device: str, autocast: torch.dtype | None) -> AbstractContextManager:
    return nullcontext() if autocast is None else torch.autocast(device, autocast)


def meter_of(
    trunk: nn.Module,
    added: nn.Module,
    x: Any,
    y: Tensor,
    optimizers: Sequence[torch.optim.Optimizer],
    speed: Speed = SPEEDS["cpu"],
) -> Meter:
    """Return a meter that counts the tensors that are live before a step, by kind."""
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
    """Return the tensors of a step's result, which a loop keeps until the next step returns."""
    return (*result.losses.values(), *(one for one in result.returned.values() if one is not None))


def _footprint(meter: Meter, kept: _Kept, calls: tuple[Called, ...] = (), *, left: int = 0) -> Footprint:
    """Return the counts; ``left`` is the number of bytes that were always live but not counted."""
    line = tuple((done, held + left) for done, held in meter.timeline)
    components = {kind: size for kind, size in meter.at_peak.items() if size}
    if left:
        components["result"] = left
    return Footprint(
        kept.before + left, meter.peak + left, kept.most, meter.flops // 2, line, meter.moved, meter.seconds, calls,
        components,
    )  # fmt: skip


def without_values(local: LocalModel) -> LocalModel:
    """Return a copy of ``local`` in train mode, with tensors without values; call it in a ``FakeTensorMode``."""
    trunk, heads = fake_copy(local.trunk), fake_copy(local.heads)
    assert isinstance(heads, nn.ModuleDict)
    return LocalModel(trunk, heads, local.plan, local.program, local.source, local.filename).train()


def empty_batch(trunk: Trunk, batch_size: int) -> tuple[Any, Tensor]:
    """Return inputs (N, C, H, W) with uninitialised values and class ids (N,) of 0, as a step takes them."""
    tensors = [torch.empty((batch_size, *(a.shape or ())), dtype=a.dtype) for a in trunk.inputs]
    by_position, by_keyword = calling(trunk.arguments, tuple(tensors))
    x = by_keyword or (tuple(by_position) if len(by_position) > 1 else by_position[0])
    return x, torch.zeros((batch_size, *trunk.output_size), dtype=torch.long)


class Meter(TorchDispatchMode):
    """Count the bytes of every storage that an operation creates, until it is freed, and floating-point operations.

    The latter use torch's formulas (``torch.utils.flop_counter``), with two for a multiply-add. Torch's counter itself
    cannot be used, since it keeps tensors alive. ``moved`` counts the bytes that each operation reads and writes.
    """

    def __init__(self, speed: Speed = SPEEDS["cpu"]) -> None:
        super().__init__()
        self.speed = speed
        self.held = self.peak = self.flops = self.moved = self.calls = 0
        self.seconds = 0.0
        """Predicted seconds of the operations so far."""
        self.timeline: list[tuple[int, int]] = []
        self.kind = "backward"
        """Kind of tensors that are being created."""
        self.by_kind: Counter[str] = Counter()
        """Live bytes, by kind."""
        self.at_peak: Counter[str] = Counter()
        """Live bytes at the peak so far, by kind."""
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
        """Replace the work done inside by this, and leave the timeline unchanged."""
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
        """Count tensors created inside as of this kind."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def own(self, kind: str, values: Iterable[Any]) -> None:
        """Count tensors that already exist."""
        with self.making(kind):
            for value in values:
                if isinstance(value, Tensor):
                    self.add(value)

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage from now on, unless it is already counted."""
        storage = tensor.untyped_storage()
        if id(storage) not in self._live:
            size = storage.nbytes()
            self._live[id(storage)] = size, self.kind
            self.held += size
            self.by_kind[self.kind] += size
            if self.held > self.peak:
                self.peak, self.at_peak = self.held, self.by_kind.copy()
            weakref.finalize(storage, self._died, id(storage))

    def kind_of(self, tensor: Tensor) -> str:
        """Return the kind that a tensor is counted as."""
        return self._live[id(tensor.untyped_storage())][1]

    def _died(self, key: int) -> None:
        size, kind = self._live.pop(key)
        self.held -= size
        self.by_kind[kind] -= size


class _Kept(TorchFunctionMode):
    """Records the live bytes when a backward starts, which are kept for it."""

    def __init__(self, meter: Meter, parameters: Iterable[Tensor]) -> None:
        super().__init__()
        self.meter, self.parameters = meter, list(parameters)
        self.before, self.most = meter.held, 0

    def gradients(self) -> int:
        """Return the bytes of live gradients."""
        return sum(p.grad.nbytes for p in self.parameters if p.grad is not None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.backward:
            self.most = max(self.most, self.meter.held - self.before - self.gradients())
            with self.meter.making("backward"):
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))
