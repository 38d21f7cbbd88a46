"""Run the training step on copies, and compare what happened with what is declared.

Three copies in float64 take one step on the same batch from the same random state:

- *stepped*: ``local.step`` with an optimizer that moves nothing and writes down the gradients it is given. Garbage is
  planted in every gradient before;
- *traced*: the text, executed here, with its segment functions and BatchNorms watched;
- *referred*: the losses of the plan on the recorded graphs (:mod:`localize.auditor.reference`), differentiated one by
  one.

The model handed in is not changed, and neither is the state of the random generators.
"""

from __future__ import annotations

import copy
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from localize.auditor.differences import numeric
from localize.auditor.reference import Evaluation, RandomState, Reference, function_named
from localize.auditor.structure import verdict
from localize.ir import Check, Copy, Plan, Trunk

SEED = 0
GARBAGE = 7.0
"""What every gradient holds before the step: it shows in an update unless the step clears it."""
SCALE = 1024.0
"""What losses are multiplied by where they are scaled; a power of two, which changes no digit of a gradient."""
CLOSE = 1e-9
"""Relative difference allowed between two float64 computations that sum in different orders."""
CLOSE_SINGLE = 1e-3
"""The same in float32, where a model cannot run in float64."""
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def not_run(why: Check) -> Check:
    """Return the check that stands for all others where the text is not trusted enough to be run."""
    return Check("measured.run", False, "the step runs on copies of the model", f"not run, since {why.id} fails")


def checks(local: Any, inputs: tuple[Tensor, ...], y: Tensor, *, numeric: bool = True) -> tuple[Check, ...]:
    """Return the checks that need execution; ``numeric``: central differences among them."""
    device = next(p.device for p in local.parameters())
    if device.type == "meta":
        return (Check("measured.run", False, "the step runs on copies of the model", "the model has no data (meta)"),)
    cuda = [device] if device.type == "cuda" else []
    cudnn = torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, deterministic=True)
    with torch.random.fork_rng(devices=cuda), torch.enable_grad(), cudnn:
        batch = tuple(value.detach().to(device) for value in inputs)
        evidence = Execution(local, batch, y.detach().to(device), device)
        wanted = [check for check in _applicable(local) if numeric or check is not numeric_gradients]
        found = [_guarded(evidence, check) for check in wanted]
    return tuple(found)


def _applicable(local: Any) -> list[Callable[[Execution], Check]]:
    plan: Plan = local.plan
    first, second = [keys, forward_eval, forward_train], [runs, text, reach, gradients, values]
    found = [*first, *second, numeric_gradients, still, crossings, norms]
    if plan.update == "immediate":
        found.append(nothing_left)
    if plan.micro_batch and not any(isinstance(module, BATCH_NORMS) for module in local.modules()):
        found.append(micro_batches)
    plain = not plan.feedback and plan.input is None and all(loss.part is None for loss in plan.losses)
    if plain and len(plan.segments) == 1 and [loss.terms[0].head for loss in plan.losses] == [None]:
        found.append(plain_training)
    return found


def _guarded(evidence: Execution, check: Callable[[Execution], Check]) -> Check:
    """Run a check; what it raises is its failure."""
    try:
        return check(evidence)
    except NotRun:
        told = f"not measured, since {_ID[runs]} fails"
    except Exception as error:  # whatever the text does wrong has to become a line of the report
        told = _raised(evidence, error)
    claim = (check.__doc__ or "").splitlines()[0].rstrip(".")
    return Check(_ID[check], False, claim[:1].lower() + claim[1:], told)


def _raised(evidence: Execution, error: Exception) -> str:
    """Describe an exception by the line of the text that raised it, and the first sentence of its message."""
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((f for f in reversed(frames) if f.filename == evidence.filename), None)
    source = evidence.local.source.splitlines()
    where = f"line {frame.lineno}: {source[frame.lineno - 1].strip()}: " if frame and frame.lineno else ""
    first = str(error).splitlines()[0].split(". ")[0] if str(error) else ""
    return f"{where}{type(error).__name__}: {first}"


class NotRun(Exception):
    """The step failed before; what failed is told once."""


# --------------------------------------------------------------------------------------------------- three executions


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

    reference: Reference
    evaluations: list[Evaluation]
    gradients: list[dict[str, Tensor]]
    norms: Counter[str]


class Execution:
    """The executions, each done once, when a check first asks for it."""

    def __init__(self, local: Any, inputs: tuple[Tensor, ...], y: Tensor, device: torch.device) -> None:
        self.local, self.inputs, self.y, self.device = local, inputs, y, device
        self.plan: Plan = local.plan
        self.filename: str = local.filename
        self.begun: list[Differentiated] = []
        """Backwards of ``stepped``, also where it fails."""

    @cached_property
    def double(self) -> bool:
        """Whether the model runs in float64 (a type written into its forward may forbid that)."""
        if self.device.type == "mps":
            return False
        try:
            with torch.no_grad():
                trunk = copy.deepcopy(self.local.trunk).double().train()
                inputs = _doubled(self.inputs)
                self.called(trunk, inputs)
                _compose(self, trunk, inputs)
        except (RuntimeError, TypeError):
            return False
        return True

    @property
    def tolerance(self) -> float:
        """Relative difference allowed between two computations of the same gradient."""
        return CLOSE if self.double else CLOSE_SINGLE

    @cached_property
    def own_inputs(self) -> tuple[Tensor, ...]:
        """The inputs, in the type of the copies."""
        return _doubled(self.inputs) if self.double else self.inputs

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
        made = copy.deepcopy(self.local).train()
        for parameter in made.parameters():
            parameter.grad = None
        _move_copies(self.plan, made)
        _take(made.functions, micro_batch)
        return made.double() if self.double else made

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
        torch.manual_seed(SEED)
        with _watched_backward(names) as backwards:
            self.begun = backwards
            result = local.step(self.batch(self.own_inputs), self.y, probe, scaler=scaler)
        for seen in backwards if scaler is not None else ():
            seen.added = {name: gradient / SCALE for name, gradient in seen.added.items()}
        left = tuple(name for name, p in local.named_parameters() if p.grad is not None)
        pulled = _pulled(self.plan, local, before)
        moved = tuple(
            name
            for name, p in local.named_parameters()
            if (name not in pulled and not _same(p.detach(), before[name]))
            or (name in pulled and not torch.allclose(p.detach(), pulled[name], rtol=self.tolerance, atol=0))
        )
        return Stepped(result.losses, result.scores, backwards, probe.updates, left, moved)

    @cached_property
    def _traced(self) -> Traced:
        """The text, executed here."""
        local = self.copy()
        watch = _Watch(self.plan)
        functions = _functions(self.local.source, self.filename)
        _take(functions, None)
        space = functions["train_step"].__globals__
        for segment in self.plan.segments.segments:
            space[segment.name] = watch.segment(segment.index, functions[segment.name])
        torch.manual_seed(SEED)
        with _counted_norms(local) as norms, _watched_backward({}, watch):
            losses, _ = functions["train_step"](local.trunk, local.heads, *self.own_inputs, self.y, _Silent())
        return Traced(losses, watch.count, watch.problems, watch.copied, norms)

    @cached_property
    def referred(self) -> Referred:
        """The plan, evaluated and differentiated."""
        local = self.copy()
        reference = Reference(self.plan, local.trunk, local.heads, self.device)
        named = [(name, p) for name, p in local.named_parameters() if p.requires_grad]
        evaluations, gradients = [], []
        torch.manual_seed(SEED)
        with _counted_norms(local) as norms:
            for evaluation in reference.run(self.own_inputs, self.y):
                found = torch.autograd.grad(evaluation.value, [p for _, p in named], allow_unused=True)
                pairs = zip(named, found, strict=True)
                gradients.append({name: gradient for (name, _), gradient in pairs if gradient is not None})
                evaluations.append(evaluation.without_history())
        return Referred(reference, evaluations, gradients, norms)


class Probe(torch.optim.Optimizer):
    """An optimizer that moves nothing and writes down which parameters it is given, with which gradients."""

    def __init__(self, parameters: list[Tensor], names: dict[int, str]) -> None:
        super().__init__(parameters, {"lr": 0.0})
        self.names = names
        self.updates: list[dict[str, Tensor]] = []

    def step(self, closure: Any = None) -> None:
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
    original = Tensor.backward
    seen: list[Differentiated] = []

    def backward(value: Tensor, *args: Any, **kwargs: Any) -> None:
        if watch is not None:
            watch.backward(value)
        leaves = _leaves(value) if names else []
        before = {id(leaf): None if leaf.grad is None else leaf.grad.clone() for leaf in leaves}
        reached = frozenset(names.get(id(leaf), "a tensor that is no parameter") for leaf in leaves)
        seen.append(Differentiated(reached, {}))  # before the call, which may fail
        original(value, *args, **kwargs)
        if watch is not None:
            watch.differentiated()
        for leaf in leaves:
            name, old = names.get(id(leaf), "a tensor that is no parameter"), before[id(leaf)]
            if leaf.grad is not None:
                seen[-1].added[name] = leaf.grad.clone() if old is None else leaf.grad - old

    Tensor.backward = backward
    try:
        yield seen
    finally:
        Tensor.backward = original


def _leaves(value: Tensor) -> list[Tensor]:
    """Walk the graph behind ``value`` to the tensors whose ``.grad`` a backward adds to."""
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
            if value.shape != crossing.content.shape or not _same(value, crossing.content):
                self.problems.append(f"{where} is not what it was when segment_{index - 1} returned it")
            shares = value.untyped_storage().data_ptr() == crossing.tensor.untyped_storage().data_ptr()
            declared = previous.outputs[crossing.position] in previous.cloned
            if declared and shares:
                self.problems.append(f"{where} is declared to be a copy, but shares its memory")
            self.copied += declared and not shares

    def backward(self, loss: Tensor) -> None:
        """Check that nothing that waits for this backward has been written to."""
        for crossing in self.waiting:
            if crossing.tensor._version != crossing.version or not _same(crossing.tensor, crossing.content):
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


def _functions(source: str, filename: str) -> dict[str, Callable[..., Any]]:
    """Execute the audited text, which the reader has understood, in a namespace of its own."""
    namespace: dict[str, Any] = {"__name__": "localize.audited"}
    exec(compile(source, filename, "exec"), namespace)
    return {name: thing for name, thing in namespace.items() if callable(thing)}


# ------------------------------------------------------------------------------------------------------------- checks


def keys(evidence: Execution) -> Check:
    """The model keeps its class and its keys."""
    trunk, recorded = evidence.local.trunk, evidence.plan.segments.trunk
    found = tuple(trunk.state_dict())
    lines = []
    if type(trunk) is not type(recorded.model):
        lines.append(f"the class is {type(trunk).__qualname__}, it was {type(recorded.model).__qualname__}")
    lines += [f"{key} is new" for key in found if key not in set(recorded.state_keys)]
    lines += [f"{key} is gone" for key in recorded.state_keys if key not in set(found)]
    if not lines and found != recorded.state_keys:
        lines.append("the keys are in another order")
    return verdict(
        _ID[keys],
        "class, keys and order of keys of the model are those before the transformation",
        lines,
        f"{type(trunk).__qualname__}, {len(found)} keys",
    )


def forward_eval(evidence: Execution) -> Check:
    """In eval mode the segments of the text, one behind the other, are the model."""
    trunk = copy.deepcopy(evidence.local.trunk).eval()
    with torch.no_grad():
        torch.manual_seed(SEED)
        own = _first_tensor(evidence.called(trunk, evidence.inputs))
        if evidence.plan.segments.trunk.eval_differs:
            torch.manual_seed(SEED)
            found = _first_tensor(evidence.called(copy.deepcopy(evidence.local).eval(), evidence.inputs))
            claim = "in eval mode local(x) is the model's own forward (it differs from train mode; no text for it)"
        else:
            torch.manual_seed(SEED)
            found = _compose(evidence, trunk, evidence.inputs)
            claim = "in eval mode the segments of the text, one behind the other, equal the model's forward bit for bit"
    return verdict(_ID[forward_eval], claim, _differences("output", found, own), f"output {tuple(own.shape)}: equal")


def forward_train(evidence: Execution) -> Check:
    """In train mode the segments of the text, one behind the other, are the model."""
    left, right = (copy.deepcopy(evidence.local.trunk).train() for _ in range(2))
    skipped = _skip_unused(left, evidence)
    sides = [name for segment in evidence.plan.segments.segments for name in segment.sides]
    if sides and len(evidence.plan.segments) > 1:  # a further output may be computed earlier than in the model
        for trunk in (left, right):
            _draw_apart(trunk, evidence)
    held = dict(left.named_buffers())
    with torch.no_grad():
        torch.manual_seed(SEED)
        result = evidence.called(left, evidence.inputs)
        torch.manual_seed(SEED)
        found, further = _run_through(evidence, right, evidence.inputs)
    own, named = _first_tensor(result), _named_tensors(result)
    lines = list(_differences("output", found, own))
    for name in sides:
        lines += _differences(f"output {name}", further[name], named[name])
    buffers, saved = dict(right.named_buffers()), left.state_dict()
    for name, buffer in left.named_buffers():
        if name in saved or held.get(name) is buffer:  # others the model makes for itself, and does not save
            lines += _differences(f"buffer {name}", buffers[name], buffer)
    return verdict(
        _ID[forward_train],
        "in train mode, from the same random state, the segments of the text equal the model's forward bit for bit, "
        "and leave the same buffers",
        lines,
        f"output {tuple(own.shape)} and {len(buffers)} buffers: equal"
        + (f"; also {', '.join(sides)}" if sides else "")
        + (f"; not run, since the output does not use them: {', '.join(skipped)}" if skipped else ""),
    )


def runs(evidence: Execution) -> Check:
    """The step runs."""
    lines = [] if evidence.failure is None else [_raised(evidence, evidence.failure)]
    return verdict(
        _ID[runs],
        "the step runs on a copy of the model, with an optimizer that moves nothing",
        lines,
        f"one step on {len(evidence.y)} images in {_type(evidence)}",
    )


def text(evidence: Execution) -> Check:
    """What ``step`` runs is the text."""
    stepped, traced = evidence.stepped, evidence.traced
    lines = []
    if list(stepped.losses) != list(traced.losses):
        lines.append(f"step returns {list(stepped.losses)}, the text {list(traced.losses)}")
    else:
        for name, value in traced.losses.items():
            lines += _differences(name, stepped.losses[name], value)
    return verdict(
        _ID[text],
        "the losses that step returns equal, bit for bit, those of the audited text executed on its own",
        lines,
        f"{len(traced.losses)} losses",
    )


def reach(evidence: Execution) -> Check:
    """Each loss reaches what it declares, by autograd's graph."""
    lines, total = [], 0
    failure = evidence.failure
    backwards = evidence.begun  # a leak can make the step fail: say what was seen before
    if failure is None and len(backwards) != len(evidence.plan.losses):
        lines.append(f"{len(backwards)} backwards ran, {len(evidence.plan.losses)} losses are declared")
    for loss, seen in zip(evidence.plan.losses, backwards, strict=False):
        declared = evidence.plan.reach(loss)
        total += len(seen.leaves)
        lines += [f"leak: the graph of {loss.name} ends at {name}" for name in sorted(seen.leaves - declared)]
        lines += [f"dead weight: the graph of {loss.name} has no {name}" for name in sorted(declared - seen.leaves)]
    if failure is not None and not lines:
        raise NotRun
    return verdict(
        _ID[reach],
        f"the autograd graph of each of the {len(evidence.plan.losses)} losses ends at exactly the parameters it "
        "declares",
        lines,
        f"{total} pairs of loss and parameter, all declared",
    )


def gradients(evidence: Execution) -> Check:
    """Each update is given the gradients of the declared losses."""
    plan, referred, updates = evidence.plan, evidence.referred, evidence.stepped.updates
    lines: list[str] = []
    wanted = _wanted_updates(plan, referred.gradients)
    if len(updates) != len(wanted):
        lines.append(f"{len(updates)} updates ran, {len(wanted)} are declared")
    worst, count = 0.0, 0
    for number, (given, expected) in enumerate(zip(updates, wanted, strict=False)):
        where = f"update {number}" if plan.update == "immediate" else "the update"
        lines += [f"{where} is given {name}, which it should not" for name in given if name not in expected]
        lines += [f"{where} is not given {name}" for name in expected if name not in given]
        scale = max((float(g.norm()) for g in expected.values()), default=0.0)
        for name in sorted(set(given) & set(expected)):
            count += 1
            difference = _relative(given[name], expected[name], scale)
            worst = max(worst, difference)
            if not difference <= evidence.tolerance:
                lines.append(f"{where} is given a gradient of {name} that is off by {difference:.1e} (relative)")
    return verdict(
        _ID[gradients],
        f"each of the {len(wanted)} updates of an executed step is given exactly the sum of the declared losses' "
        f"gradients, differentiated one by one on the recorded graphs (stale gradients planted before)",
        lines,
        f"{count} gradients in {_type(evidence)}, largest relative difference {worst:.1e}",
    )


def values(evidence: Execution) -> Check:
    """Losses and scores are those of the plan."""
    lines: list[str] = []
    worst = 0.0
    stepped = evidence.stepped
    for evaluation in evidence.referred.evaluations:
        name = evaluation.loss.name
        pairs = [("loss", stepped.losses.get(name), evaluation.value)]
        pairs.append(("scores", stepped.scores.get(name), evaluation.scores))
        for what, found, expected in pairs:
            if (found is None) != (expected is None):
                lines.append(f"the {what} of {name}: {'missing' if found is None else 'not declared'}")
            elif found is not None and expected is not None:
                difference = _relative(found.detach(), expected, float(expected.norm()))
                worst = max(worst, difference)
                if found.requires_grad:
                    lines.append(f"the {what} of {name} is returned with its history")
                if not difference <= evidence.tolerance:
                    lines.append(f"the {what} of {name} is off by {difference:.1e} (relative)")
    return verdict(
        _ID[values],
        "each returned loss and its class scores equal the plan's, computed on the recorded graphs",
        lines,
        f"{len(stepped.losses)} losses in {_type(evidence)}, largest relative difference {worst:.1e}",
    )


def numeric_gradients(evidence: Execution) -> Check:
    """Applied gradients are what finite differences say."""
    applied = [seen.added for seen in evidence.stepped.backwards]
    central = "the central difference of a loss along a direction in each block it declares equals its gradient; "
    lines, told = numeric(evidence.plan, evidence.referred.reference, evidence.referred.evaluations, applied, evidence)
    return verdict(
        _ID[numeric_gradients],
        (central if evidence.double else "") + "a loss applies no gradient to a parameter it does not declare",
        lines,
        told,
    )


def still(evidence: Execution) -> Check:
    """Only the optimizer moves parameters."""
    return verdict(
        _ID[still],
        "with an optimizer that moves nothing, the step changes no parameter"
        + (", and moves each declared copy by decay * p + (1 - decay) * p_source" if _pulls(evidence.plan) else ""),
        [f"{name} has changed, or not as declared" for name in evidence.stepped.moved],
        f"{sum(1 for _ in evidence.local.parameters())} parameters: equal, bit for bit",
    )


def crossings(evidence: Execution) -> Check:
    """Nothing that crosses a cut is overwritten while it is needed."""
    traced = evidence.traced
    return verdict(
        _ID[crossings],
        "a value that crosses a cut is not written to before its backward, enters the next segment as it left the one "
        "before, bit for bit, and is a copy where one is declared",
        traced.problems,
        f"{traced.crossed} values, {traced.copied} copied",
    )


def norms(evidence: Execution) -> Check:
    """Each BatchNorm runs as often as the routes say."""
    found, wanted = evidence.traced.norms, Counter(evidence.referred.norms)
    again = {f"heads.{name}" for name in evidence.plan.recompute} | {
        f"trunk.{node.target}"
        for segment in evidence.plan.segments.segments
        if segment.name in evidence.plan.recompute
        for node in segment.graph.nodes
        if node.op == "call_module"
    }
    for name in wanted:
        inside = any(name == path or name.startswith(f"{path}.") for path in again)
        wanted[name] *= 2 if inside else 1
    names = [name for name, module in evidence.local.named_modules() if isinstance(module, BATCH_NORMS)]
    lines = [
        f"{name} ran {found[name]} times, by the declared routes {wanted[name]}"
        for name in names
        if found[name] != wanted[name]
    ]
    counts = Counter(found[name] for name in names)
    told = "; ".join(f"{n} BatchNorms, {times} forward{'' if times == 1 else 's'} each" for times, n in counts.items())
    return verdict(
        _ID[norms],
        "in one step each BatchNorm runs as often as the declared routes pass through it, and once more where its "
        "segment or head is recomputed (any other forward would update its statistics once more)",
        lines,
        told or "no BatchNorm",
    )


def nothing_left(evidence: Execution) -> Check:
    """No gradient is left behind by a step that updates after each segment."""
    left = evidence.stepped.left
    return verdict(
        _ID[nothing_left],
        "after a step that updates behind each backward, no parameter has a gradient left",
        [f"{name} has a gradient left" for name in left],
        f"{sum(1 for _ in evidence.local.parameters())} parameters, none has a gradient",
    )


def micro_batches(evidence: Execution) -> Check:
    """Micro-batches add up to the whole batch."""
    found: list[list[dict[str, Tensor]]] = []
    draws = False
    for size in (None, 1):
        local = evidence.copy(size).eval()  # without dropout, which draws anew for every part
        probe = Probe(_trained(local), {id(p): name for name, p in local.named_parameters()})
        torch.manual_seed(SEED)
        before = torch.get_rng_state()
        local.step(evidence.batch(evidence.own_inputs), evidence.y, probe)
        draws = draws or not torch.equal(before, torch.get_rng_state())
        found.append(probe.updates)
    if draws:
        found[1] = found[0]
    lines = [
        f"{name}: the gradients of the parts do not add up to that of the batch in update {number}"
        for number, (whole, parts) in enumerate(zip(*found, strict=True))
        for name in whole
        if name not in parts or not _near(parts[name], whole[name], evidence.tolerance)
    ]
    return verdict(
        _ID[micro_batches],
        "taken one image at a time, a batch gives the gradients that it gives as a whole (in eval mode)",
        lines,
        "not compared: the step draws by chance in eval mode too"
        if draws
        else f"{sum(map(len, found[0]))} gradients of a batch of {len(evidence.y)}",
    )


def _near(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    return float((found - wanted).norm()) <= tolerance * max(float(wanted.norm()), tolerance)


def plain_training(evidence: Execution) -> Check:
    """One loss and no cut is ordinary training."""
    local = copy.deepcopy(evidence.local).train()
    _take(local.functions, None)
    trunk = copy.deepcopy(evidence.local.trunk).train()
    _skip_unused(trunk, evidence)
    for parameter in (*local.parameters(), *trunk.parameters()):
        parameter.grad = None
    terms = evidence.plan.losses[0].terms
    step, loop = (torch.optim.SGD(_trained(m), lr=0.05, momentum=0.9, weight_decay=1e-4) for m in (local, trunk))
    for number in range(2):
        torch.manual_seed(SEED + number)
        local.step(evidence.batch(evidence.inputs), evidence.y, step)
        torch.manual_seed(SEED + number)
        loop.zero_grad()
        result = evidence.called(trunk, evidence.inputs)
        output, further = _first_tensor(result), _named_tensors(result)
        read = [output if term.side is None else further[term.side] for term in terms]
        losses = [
            function_named(term.loss)(value, evidence.y, **dict(term.options))
            for term, value in zip(terms, read, strict=True)
        ]
        weighted = [v if t.weight == 1.0 else t.weight * v for t, v in zip(terms, losses, strict=True)]
        total = weighted[0]
        for value in weighted[1:]:
            total = total + value
        total.backward()
        loop.step()
    lines: list[str] = []
    found = local.trunk.state_dict()
    for name, value in trunk.state_dict().items():
        lines += _differences(name, found[name], value)
    return verdict(
        _ID[plain_training],
        "two steps of SGD with momentum leave the same parameters and buffers, bit for bit, as a plain PyTorch loop",
        lines,
        f"{len(found)} tensors: equal",
    )


_ID: dict[Callable[[Execution], Check], str] = {
    keys: "measured.keys",
    forward_eval: "measured.forward-eval",
    forward_train: "measured.forward-train",
    runs: "measured.run",
    text: "measured.text",
    reach: "measured.reach",
    gradients: "measured.gradients",
    values: "measured.values",
    numeric_gradients: "measured.numeric",
    still: "measured.still",
    crossings: "measured.crossings",
    norms: "measured.batchnorm",
    nothing_left: "measured.nothing-left",
    plain_training: "measured.plain-training",
    micro_batches: "measured.micro-batches",
}


# ------------------------------------------------------------------------------------------------------------ helpers


def _take(functions: dict[str, Callable[..., Any]], size: int | None) -> None:
    """Let a text take micro-batches of another size, or, for None, every batch whole."""
    space = functions["train_step"].__globals__
    taken = space.get("micro_batches")
    if taken is not None:
        space["micro_batches"] = lambda function, _, trunk, heads, *batch: taken(
            function, size or len(batch[0]), trunk, heads, *batch
        )


def _doubled(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(value.double() if value.is_floating_point() else value for value in inputs)


def _compose(evidence: Execution, trunk: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """Run the text's segment functions on ``trunk``, each on what the one before returned."""
    return _run_through(evidence, trunk, inputs)[0]


def _run_through(evidence: Execution, trunk: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """Run the text's segment functions, one behind the other; return the output, and further ones by their names."""
    functions = _functions(evidence.local.source, evidence.filename)
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


def _pulls(plan: Plan) -> list[Copy]:
    return [one for one in plan.copies if one.decay is not None]


def _move_copies(plan: Plan, local: Any) -> None:
    """Move the copies that are to be pulled away from what they copy: at the start of training they are equal to it."""
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for one in _pulls(plan):
            for parameter in local.heads.get_submodule(f"{one.block}.{one.part}".rstrip(".")).parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.1 * noise.to(parameter))


def _pulled(plan: Plan, local: Any, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what the declared pulls make of the copies' parameters, by name."""
    wanted = {}
    for one in _pulls(plan):
        path = f"{one.block}.{one.part}".rstrip(".")
        sources = dict(local.trunk.get_submodule(one.source).named_parameters())
        for name, _ in local.heads.get_submodule(path).named_parameters():
            old = before[f"heads.{path}.{name}"]
            wanted[f"heads.{path}.{name}"] = one.decay * old + (1 - one.decay) * sources[name].detach()
    return wanted


def _skip_unused(trunk: nn.Module, evidence: Execution) -> list[str]:
    """Let the modules whose parameters the losses do not use (auxiliary classifiers) leave no trace; name them.

    They are not in the recorded graph. Where they run, they draw random numbers and move their own statistics: both are
    put back. What they return becomes NaN: if the output did use it, it would show.
    """
    unused = {name.removeprefix("trunk.") for name in evidence.plan.segments.unused}
    skipped: list[str] = []
    for path, module in trunk.named_modules():
        inside = {f"{path}.{name}" for name, p in module.named_parameters() if p.requires_grad}
        if path and inside and inside <= unused and not any(path.startswith(f"{outer}.") for outer in skipped):
            module.forward = _without_trace(module, module.forward, evidence.device)
            skipped.append(path)
    return skipped


def _without_trace(module: nn.Module, forward: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    def run(*inputs: Any, **options: Any) -> Any:
        state, held = RandomState.now(device), {name: b.clone() for name, b in module.named_buffers()}
        result = forward(*inputs, **options)
        state.restore()
        for name, buffer in module.named_buffers():
            buffer.copy_(held[name])
        return torch.full_like(result, float("nan")) if isinstance(result, Tensor) else torch.zeros(())

    return run


def _draw_apart(trunk: nn.Module, evidence: Execution) -> None:
    """Let the modules that make further outputs draw from a state of their own: the others then draw as without them.

    A further output is computed in the segment whose values it reads, which can be earlier than in the model's forward.
    """
    recorded = evidence.plan.segments.trunk
    assert recorded.whole is not None, "further outputs are recorded with the graph that makes them"
    made = {node.target for node in recorded.whole.nodes if node.op == "call_module" and _makes_sides(node, recorded)}
    for number, path in enumerate(sorted(made)):
        module = trunk.get_submodule(path)
        module.forward = _seeded(module.forward, SEED + 1 + number, evidence.device)


def _makes_sides(node: fx.Node, trunk: Trunk) -> bool:
    return any(node.name in side.nodes for side in trunk.sides)


def _seeded(forward: Callable[..., Any], seed: int, device: torch.device) -> Callable[..., Any]:
    def run(*inputs: Any, **options: Any) -> Any:
        state = RandomState.now(device)
        torch.manual_seed(seed)
        result = forward(*inputs, **options)
        state.restore()
        return result

    return run


def _wanted_updates(plan: Plan, gradients: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Return what each update should be given: gradients of one loss, or the sum over all."""
    if plan.update == "immediate":
        return list(gradients)
    total: dict[str, Tensor] = {}
    for found in gradients:
        for name, gradient in found.items():
            total[name] = total[name] + gradient if name in total else gradient
    return [total]


def _relative(found: Tensor, expected: Tensor, scale: float) -> float:
    """Return the norm of the difference relative to the norm of ``expected``.

    ``scale`` is the largest norm among what is compared: a gradient below 1e-6 of it is rounding (the bias in front of
    a BatchNorm has gradient zero, computed as a sum that cancels).
    """
    if found.shape != expected.shape:
        return float("inf")
    denominator = max(float(expected.norm()), 1e-6 * scale)
    difference = float((found - expected).norm())
    return difference / denominator if denominator else difference


def _differences(what: str, found: Tensor, expected: Tensor) -> Iterator[str]:
    """Yield a line if two tensors are not equal bit for bit."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        yield f"{what} is {tuple(found.shape)} {found.dtype}, not {tuple(expected.shape)} {expected.dtype}"
    elif not _same(found, expected):
        wrong = int((found != expected).sum())
        largest = float((found.double() - expected.double()).abs().max())
        yield f"{what}: {wrong} of {found.numel()} values differ, by at most {largest:.1e}"


def _same(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left, right) or torch.equal(torch.nan_to_num(left), torch.nan_to_num(right))


def _first_tensor(result: Any) -> Tensor:
    """Return the logits of a model's result, as the recorded graph does: a field of that name, or the first tensor."""
    found = _named_tensors(result)
    return next((found[name] for name in ("logits", "out") if name in found), next(iter(found.values())))


def _named_tensors(result: Any, prefix: str = "output") -> dict[str, Tensor]:
    """Return the tensors of a model's result by the names of its fields, or by their places; nested ones last."""
    if isinstance(result, Tensor):
        return {prefix: result}
    if hasattr(result, "_asdict"):
        result = result._asdict()
    if not isinstance(result, dict | list | tuple):
        result = {name: value for name, value in vars(result).items() if isinstance(value, Tensor)}
    pairs = result.items() if isinstance(result, dict) else ((f"{prefix}_{i}", v) for i, v in enumerate(result))
    found: dict[str, Tensor] = {}
    nested: dict[str, Tensor] = {}
    for key, value in pairs:
        name = "".join(c if c.isalnum() else "_" for c in str(key))
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, dict | list | tuple):
            nested |= _named_tensors(value, name)
    return found | nested


def _trained(module: nn.Module) -> list[Tensor]:
    return [p for p in module.parameters() if p.requires_grad]


def _type(evidence: Execution) -> str:
    return "float64" if evidence.double else "the model's own type (it does not run in float64)"
