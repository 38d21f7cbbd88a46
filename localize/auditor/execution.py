"""Run the training step on copies, and write down what happens.

Copies take one step on the same batch, each on its own copy of it, from the same random state:

- *stepped*: ``local.step`` with an optimizer that moves nothing and writes down the gradients it is given. Garbage is
  planted in every gradient before;
- *traced*: the text, executed here, with its segment functions and BatchNorms watched;
- *referred*: the losses of the plan on the recorded graphs (:mod:`localize.auditor.reference`), differentiated one by
  one with ``autograd.grad``.

The model handed in is not changed, and neither is the state of the random generators.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from types import CodeType
from typing import Any

import torch
from torch import Tensor, fx, nn

from localize.auditor.reference import Evaluation, Reference
from localize.auditor.state import Left, changed, copied, left_by, process, tolerance
from localize.ir import Copy, Plan, facts

SEED = 0
GARBAGE = 7.0
"""What every gradient holds before the step: it shows in an update unless the step clears it."""
SCALE = 1024.0
"""What losses are multiplied by where they are scaled; a power of two, which changes no digit of a gradient."""
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class NotRun(Exception):
    """The step failed before; what failed is told once."""


@dataclass
class Differentiated:
    """One ``backward()``: the leaves it walks to, and what it added to their gradients."""

    leaves: frozenset[str]
    added: dict[str, Tensor]


@dataclass
class Stepped:
    """What ``local.step`` did."""

    losses: dict[str, Tensor]
    scores: dict[str, Tensor | None]
    backwards: list[Differentiated]
    updates: list[dict[str, Tensor]]
    left: tuple[str, ...]
    """Parameters with a gradient after the step."""
    moved: tuple[str, ...]
    """Parameters that changed, and copies that were not pulled as declared."""
    after: Left
    outside: tuple[str, ...]
    """What it changed that is none of a step's."""


@dataclass
class Crossing:
    """A value that a segment returned."""

    segment: int
    position: int
    tensor: Tensor
    version: int
    content: Tensor


@dataclass
class Traced:
    """What the text did when its segments were watched."""

    losses: dict[str, Tensor]
    crossed: int
    problems: list[str]
    copied: int
    norms: Counter[str]


@dataclass
class Referred:
    """What the plan says: every loss, and its gradient for every trainable parameter."""

    local: Any
    """The local model that it was evaluated on."""
    reference: Reference
    evaluations: list[Evaluation]
    gradients: list[dict[str, Tensor]]
    norms: Counter[str]
    after: Left
    own_backward: list[bool]
    """Whether each loss passes a backward that is not torch's: of an ``autograd.Function`` in the model."""


class Execution:
    """The executions, each done once, when a check first asks for it."""

    def __init__(
        self,
        local: Any,
        inputs: tuple[Tensor, ...],
        y: Tensor,
        device: torch.device,
        *,
        start: Any = None,
        double: bool = True,
    ) -> None:
        """Prepare to run a step.

        Args:
            local: the local model whose text is run.
            inputs: inputs of the model, in order.
            y: labels.
            device: where all of them are.
            start: a local model whose state the step starts from; None is ``local``.
            double: run in float64, if the model can be run so; else in its own types.
        """
        self.local, self.inputs, self.y, self.device = local, inputs, y, device
        self.start, self.wants_double = start or local, double
        self.plan: Plan = local.plan
        self.filename: str = local.filename
        self.begun: list[Differentiated] = []
        """Backwards of ``stepped``, also where it fails."""

    @cached_property
    def double(self) -> bool:
        """Whether the model runs in float64 (a type written into its forward may forbid that)."""
        if self.device.type == "mps" or not self.wants_double:
            return False
        try:
            with torch.no_grad():
                trunk = copied(self.local.trunk).double().train()
                inputs = doubled(self.inputs)
                compose(self, trunk, inputs)
        except (RuntimeError, TypeError):
            return False
        return True

    @cached_property
    def tolerance(self) -> float:
        """Relative difference allowed between two computations of the same gradient."""
        if self.double:
            return tolerance(torch.float64)
        return max(tolerance(p.dtype) for p in self.local.parameters())

    @property
    def own_inputs(self) -> tuple[Tensor, ...]:
        """Copies of the inputs, in the type of the copies of the model."""
        return tuple(value.clone() for value in (doubled(self.inputs) if self.double else self.inputs))

    @property
    def own_y(self) -> Tensor:
        """A copy of the labels."""
        return self.y.clone()

    def called(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        """Call a forward of the model with the inputs and the recorded constants, as it was recorded."""
        by_position, by_keyword = self._arguments(inputs)
        return model(*by_position, **by_keyword)

    def batch(self, inputs: tuple[Tensor, ...]) -> Any:
        """Return the inputs in the form that ``step`` takes: a tensor, a list, or a dict."""
        by_position, by_keyword = self._arguments(inputs)
        return by_keyword or (by_position if len(by_position) > 1 else by_position[0])

    def _arguments(self, inputs: tuple[Tensor, ...]) -> tuple[list[Any], dict[str, Any]]:
        left, by_position, by_keyword = list(inputs), [], {}
        for argument in self.plan.segments.trunk.arguments:
            value = left.pop(0) if argument.shape is not None else argument.constant
            if argument.keyword is None:
                by_position.append(value)
            else:
                by_keyword[argument.keyword] = value
        return by_position, by_keyword

    def copy(self, micro_batch: int | None = None) -> Any:
        """Return a copy of the local model in train mode, in float64 if it can be.

        Its micro-batches have another size; None takes every batch whole, so that each loss has one backward.
        """
        made = copied(self.start).train()
        for parameter in made.parameters():
            parameter.grad = None
        _move_copies(self.plan, made)
        take_micro_batches(made.functions_of_text, micro_batch)
        return made.double() if self.double else made

    @cached_property
    def written(self) -> frozenset[str]:
        """Parameters that recorded forwards, of the model and in heads, write themselves, such as a running average."""
        graphs = [("trunk", segment.graph) for segment in self.plan.segments.segments]
        heads = ((path, part) for path, part in self.local.named_modules() if isinstance(part, fx.GraphModule))
        graphs += [(path, part.graph) for path, part in heads]
        found = {f"{path}.{name}" for path, graph in graphs for node in graph.nodes for name in facts(node).writes}
        return frozenset(found.intersection(name for name, _ in self.local.named_parameters()))

    @cached_property
    def idle(self) -> frozenset[str]:
        """Parameters of the trunk that plain backpropagation through the model gives no gradient either."""
        trunk = copied(self.start.trunk).train()
        trunk = trunk.double() if self.double else trunk
        torch.manual_seed(SEED)
        outputs = [value for value in tensors_in(self.called(trunk, self.own_inputs)) if value.requires_grad]
        named = [(name, p) for name, p in trunk.named_parameters() if p.requires_grad]
        total = sum((value.sum() for value in outputs), torch.zeros((), device=self.device))
        if not outputs or not named:
            return frozenset()
        found = torch.autograd.grad(total, [p for _, p in named], allow_unused=True)
        return frozenset(f"trunk.{name}" for (name, _), g in zip(named, found, strict=True) if g is None)

    def moved(self) -> Any:
        """Return a local model whose statistics, counters and weights have moved as in training.

        One step along the gradients of the declared losses, of a hundredth of each parameter, from where evaluating
        these losses has left the buffers.
        """
        made = copied(self.referred.local)
        named = {name: p for name, p in made.named_parameters() if p.requires_grad}
        total: dict[str, Tensor] = {}
        for found in self.referred.gradients:
            for name, gradient in found.items():
                total[name] = total[name] + gradient if name in total else gradient
        with torch.no_grad():
            for name, gradient in total.items():
                size = float(gradient.norm())
                if 0 < size < float("inf"):
                    length = 0.01 * max(float(named[name].norm()), 0.01)
                    named[name].add_(gradient.to(named[name].dtype), alpha=-length / size)
        return made

    @property
    def stepped(self) -> Stepped:
        """What ``local.step`` did.

        Raises:
            NotRun: it failed.
        """
        if self.failure is not None:
            raise NotRun
        return self._stepped

    @property
    def traced(self) -> Traced:
        """What the text did.

        Raises:
            NotRun: ``local.step`` failed, and so would the text.
        """
        if self.failure is not None:
            raise NotRun
        return self._traced

    @cached_property
    def failure(self) -> Exception | None:
        """What ``local.step`` raised."""
        try:
            _ = self._stepped
        except Exception as error:  # whatever the text raises is a finding
            return error
        return None

    @cached_property
    def _stepped(self) -> Stepped:
        """``local.step`` with planted gradients and an optimizer that writes down."""
        local = self.copy()
        names = {id(p): name for name, p in local.named_parameters()}
        trained = [p for p in local.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.grad = torch.full_like(parameter, GARBAGE)
        probe = Probe(trained, names)
        scaler = torch.amp.GradScaler(self.device.type, init_scale=SCALE) if self.plan.scaled else None
        before = {name: p.detach().clone() for name, p in local.named_parameters()}
        inputs, held, y = self.own_inputs, self.own_inputs, self.own_y
        process_before = process(local)
        torch.manual_seed(SEED)
        with _watched_backward(names) as backwards:
            self.begun = backwards
            result = local.step(self.batch(inputs), y, probe, scaler=scaler)
        after = left_by(local, (*inputs, y), self.device, self.written)
        outside = [f"input {i} of the batch was written to" for i, v in enumerate(inputs) if not same(v, held[i])]
        outside += [] if torch.equal(y, self.y) else ["the labels were written to"]
        outside += changed(process_before, after.process)
        for seen in backwards if scaler is not None else ():
            seen.added = {name: gradient / SCALE for name, gradient in seen.added.items()}
        left = tuple(name for name, p in local.named_parameters() if p.grad is not None)
        wanted = pulled(self.plan, local, before)
        moved = tuple(
            name
            for name, p in local.named_parameters()
            if (name not in wanted and name not in self.written and not same(p.detach(), before[name]))
            or (name in wanted and not is_sum(p.detach(), *wanted[name], self.tolerance))
        )
        return Stepped(result.losses, result.returned, backwards, probe.updates, left, moved, after, tuple(outside))

    @cached_property
    def _traced(self) -> Traced:
        """The text, executed here."""
        local = self.copy()
        watch = _Watch(self.plan)
        functions = functions_of(self.local.source, self.filename)
        take_micro_batches(functions, None)
        space = functions["train_step"].__globals__
        for segment in self.plan.segments.segments:
            space[segment.name] = watch.segment(segment.index, functions[segment.name])
        torch.manual_seed(SEED)
        with _counted_norms(local) as norms, _watched_backward({}, watch):
            losses, _ = functions["train_step"](local.trunk, local.heads, *self.own_inputs, self.own_y, _Silent())
        return Traced(losses, watch.count, watch.problems, watch.copied, norms)

    @cached_property
    def referred(self) -> Referred:
        """The plan, evaluated and differentiated."""
        local = self.copy()
        reference = Reference(self.plan, local.trunk, local.heads, self.device)
        names = {id(p): (name, p) for name, p in local.named_parameters() if p.requires_grad}
        evaluations, gradients, own_backward = [], [], []
        inputs, y = self.own_inputs, self.own_y
        torch.manual_seed(SEED)
        with _counted_norms(local) as norms:
            for evaluation in reference.run(inputs, y):
                leaves = [leaf for leaf in leaves_of(evaluation.value) if id(leaf) in names]
                own_backward.append(_has_own_backward(evaluation.value))
                found = torch.autograd.grad(evaluation.value, leaves, allow_unused=True) if leaves else ()
                pairs = zip(leaves, found, strict=True)
                gradients.append({names[id(leaf)][0]: gradient for leaf, gradient in pairs if gradient is not None})
                evaluations.append(evaluation.without_history())
        after = left_by(local, (*inputs, y), self.device, self.written)
        return Referred(local, reference, evaluations, gradients, norms, after, own_backward)


class Probe(torch.optim.Optimizer):
    """An optimizer that moves nothing and writes down which parameters it is given, with which gradients."""

    def __init__(self, parameters: list[Tensor], names: dict[int, str]) -> None:
        super().__init__(parameters, {"lr": 0.0})
        self.names = names
        self.updates: list[dict[str, Tensor]] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # a step of the text has no closure
        """Write down the gradients."""
        given = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.updates.append({self.names[id(p)]: p.grad.detach().clone() for p in given})


class _Silent:
    """An optimizer, or a part of one, that only clears gradients it was told about: none."""

    def scale(self, loss: Tensor) -> Tensor:
        """Return the loss as it is."""
        return loss

    def step(self) -> None:
        """Move nothing."""

    def zero_grad(self) -> None:
        """Clear nothing."""

    def __getitem__(self, loss: int) -> _Silent:
        return self


@contextmanager
def _watched_backward(names: dict[int, str], watch: _Watch | None = None) -> Iterator[list[Differentiated]]:
    """Watch every ``Tensor.backward``: walk its graph to the leaves, and compare their gradients before and after."""
    tensors: Any = Tensor  # Any, since its backward is replaced for a while
    original = tensors.backward
    seen: list[Differentiated] = []

    def backward(value: Tensor, *args: Any, **kwargs: Any) -> None:
        if watch is not None:
            watch.backward(value)
        leaves = leaves_of(value) if names else []
        if leaves and not any(
            id(leaf) in names for leaf in leaves
        ):  # of another copy: step tries a single image on one
            original(value, *args, **kwargs)
            return
        before = {id(leaf): None if leaf.grad is None else leaf.grad.clone() for leaf in leaves}
        reached = frozenset(names.get(id(leaf), "a tensor that is not a parameter") for leaf in leaves)
        seen.append(Differentiated(reached, {}))  # before the call, which may fail
        original(value, *args, **kwargs)
        if watch is not None:
            watch.differentiated()
        for leaf in leaves:
            name, old = names.get(id(leaf), "a tensor that is not a parameter"), before[id(leaf)]
            if leaf.grad is not None:
                seen[-1].added[name] = leaf.grad.clone() if old is None else leaf.grad - old

    tensors.backward = backward
    try:
        yield seen
    finally:
        tensors.backward = original


def leaves_of(value: Tensor) -> list[Tensor]:
    """Walk the graph after ``value`` to the tensors whose ``.grad`` a backward adds to."""
    if value.grad_fn is None:
        return [value] if value.requires_grad else []
    seen, waiting, leaves = {value.grad_fn}, [value.grad_fn], []
    while waiting:
        function = waiting.pop()
        if hasattr(function, "variable"):
            leaves.append(function.variable)
        for following, _ in function.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return leaves


def _has_own_backward(value: Tensor) -> bool:
    """Tell whether a value's history holds the backward of an ``autograd.Function`` that is not this package's."""
    seen, waiting = {value.grad_fn}, [value.grad_fn]
    while waiting:
        function = waiting.pop()
        if isinstance(function, torch.autograd.function.BackwardCFunction):
            written = [v for v in vars(type(function)).values() if isinstance(v, type)]
            if not any(one.__module__.startswith("localize.") for one in written):
                return True
        for following, _ in getattr(function, "next_functions", ()):
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return False


class _Watch:
    """Wrap the segment functions of the text, and note what happens to the values that cross the cuts."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.last: dict[int, list[Crossing]] = {}
        self.waiting: list[Crossing] = []
        """Values whose backward is to come."""
        self.problems: list[str] = []
        self.count = self.copied = 0
        self.differentiating = False

    def segment(self, index: int, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function``, watched."""

        def watched(*arguments: Any) -> Any:
            if self.differentiating:  # computed again in the backward
                return function(*arguments)
            self._enters(index, arguments[2 if self.plan.feedback else 1 :])
            result = function(*arguments)
            outputs = result if isinstance(result, tuple) else (result,)
            crossings = [
                Crossing(index, i, tensor, tensor._version, tensor.detach().clone()) for i, tensor in enumerate(outputs)
            ]
            self.last[index] = crossings
            self.waiting += crossings
            self.count += len(self.plan.segments.segments[index].outputs)
            return result

        return watched

    def _enters(self, index: int, inputs: Sequence[Tensor]) -> None:
        """Compare what enters a segment with what left the one before."""
        if index == 0 or index - 1 not in self.last:
            return
        previous = self.plan.segments.segments[index - 1]
        for crossing, value in zip(self.last[index - 1], inputs, strict=False):
            where = f"value {crossing.position} between segment_{index - 1} and segment_{index}"
            if value.shape != crossing.content.shape or not same(value, crossing.content):
                self.problems.append(f"{where} is not what it was when segment_{index - 1} returned it")
            shares = value.untyped_storage().data_ptr() == crossing.tensor.untyped_storage().data_ptr()
            declared = previous.outputs[crossing.position] in previous.cloned
            if declared and shares:
                self.problems.append(f"{where} is declared to be a copy, but shares its memory")
            self.copied += declared and not shares

    def backward(self, loss: Tensor) -> None:
        """Check that nothing that waits for this backward has been written to."""
        for crossing in self.waiting:
            if crossing.tensor._version != crossing.version or not same(crossing.tensor, crossing.content):
                self.problems.append(
                    f"value {crossing.position} of segment_{crossing.segment} was written to before its backward"
                )
        if not self.plan.waits:
            self.waiting.clear()
        self.differentiating = True

    def differentiated(self) -> None:
        """Note that a backward is over."""
        self.differentiating = False


@contextmanager
def _counted_norms(local: nn.Module) -> Iterator[Counter[str]]:
    """Count the forwards of every BatchNorm."""
    counts: Counter[str] = Counter()
    handles = []

    def count(name: str) -> Callable[..., None]:
        return lambda module, inputs: counts.update([name])

    for name, module in local.named_modules():
        if isinstance(module, BATCH_NORMS):
            handles.append(module.register_forward_pre_hook(count(name)))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def functions_of(source: str, filename: str) -> dict[str, Callable[..., Any]]:
    """Execute the audited text, which the reader has understood, in a namespace of its own."""
    namespace: dict[str, Any] = {"__name__": "localize.audited"}
    exec(_compiled(source, filename), namespace)
    return {name: thing for name, thing in namespace.items() if callable(thing)}


@lru_cache(maxsize=1)
def _compiled(source: str, filename: str) -> CodeType:
    """Compile a text, which several checks execute one after the other, once."""
    return compile(source, filename, "exec")


def take_micro_batches(functions: dict[str, Callable[..., Any]], size: int | None) -> None:
    """Let a text take micro-batches of another size, or, for None, every batch whole."""
    space = functions["train_step"].__globals__
    for word in ("micro_batches", "exact_parts"):
        if word in space:
            space[word] = partial(_resized, space[word], size or sys.maxsize)


def _resized(
    taken: Callable[..., Any], size: int, function: Callable[..., Any], _: int, *others: Any, **options: Any
) -> Any:
    return taken(function, size, *others, **options)


def doubled(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(value.double() if value.is_floating_point() else value for value in inputs)


def compose(evidence: Execution, trunk: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """Run the text's segment functions on ``trunk``, each on what the one before returned."""
    return run_through(evidence, trunk, inputs)[0]


def run_through(evidence: Execution, trunk: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """Run the text's segment functions, one after the other; return the output, and further ones by their names."""
    functions = functions_of(evidence.local.source, evidence.filename)
    values = tuple(value.clone() for value in inputs)
    further: dict[str, Tensor] = {}
    heads = copy.deepcopy(evidence.local.heads).to(inputs[0].dtype) if evidence.plan.feedback else None
    for segment in evidence.plan.segments.segments:
        roots = (trunk,) if heads is None else (trunk, heads)
        result = functions[segment.name](*roots, *values)
        returned = result if isinstance(result, tuple) else (result,)
        values, sides = returned[: len(segment.outputs)], returned[len(segment.outputs) :]
        further |= dict(zip(segment.sides, sides, strict=True))
    return values[0], further


def pulls(plan: Plan) -> list[Copy]:
    return [one for one in plan.copies if one.decay is not None]


def _move_copies(plan: Plan, local: Any) -> None:
    """Move the copies that are to be pulled away from what they copy: at the start of training they are equal to it."""
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for one in pulls(plan):
            for parameter in local.heads.get_submodule(f"{one.block}.{one.part}".rstrip(".")).parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.1 * noise.to(parameter))


def pulled(plan: Plan, local: Any, before: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the two addends of what the declared pulls make of the copies' parameters, by name."""
    wanted = {}
    for one in pulls(plan):
        path = f"{one.block}.{one.part}".rstrip(".")
        decay = one.decay
        assert decay is not None, "what is pulled has a decay"
        sources = dict(getattr(local, one.of).get_submodule(one.source).named_parameters())
        for name, _ in local.heads.get_submodule(path).named_parameters():
            old = before[f"heads.{path}.{name}"]
            wanted[f"heads.{path}.{name}"] = decay * old, (1 - decay) * sources[name].detach()
    return wanted


def is_sum(found: Tensor, first: Tensor, second: Tensor, allowed: float) -> bool:
    """Tell whether a tensor is a sum of two, up to a relative difference from their sizes: they may cancel."""
    return bool(((found - (first + second)).abs() <= allowed * (first.abs() + second.abs())).all())


def same(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left, right) or torch.equal(torch.nan_to_num(left), torch.nan_to_num(right))


def tensors_in(result: Any) -> Iterator[Tensor]:
    """Yield the floating tensors of what a model returns."""
    if isinstance(result, Tensor):
        if result.is_floating_point():
            yield result
    elif isinstance(result, dict):
        for value in result.values():
            yield from tensors_in(value)
    elif isinstance(result, list | tuple):
        for value in result:
            yield from tensors_in(value)
    elif hasattr(result, "__dict__"):
        yield from tensors_in(vars(result))
