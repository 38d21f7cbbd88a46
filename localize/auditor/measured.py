"""Compare what happened when the training step ran with what is declared."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from localize.auditor.differences import numeric
from localize.auditor.execution import (
    BATCH_NORMS,
    SEED,
    Execution,
    NotRun,
    Probe,
    compose,
    doubled,
    leaves_of,
    pulls,
    run_through,
    same,
    take_micro_batches,
)
from localize.auditor.reference import RandomState, function_named
from localize.auditor.state import copied, differing
from localize.auditor.structure import verdict
from localize.ir import Check, Plan, Term, Trunk


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
        evidence = Execution(local, batch, y.detach().to(device), device, double=False)
        wanted = [check for check in _applicable(local) if numeric or check is not numeric_gradients]
        found = [_guarded(evidence, check) for check in wanted]
    return tuple(found)


def _applicable(local: Any) -> list[Callable[[Execution], Check]]:
    plan: Plan = local.plan
    first, second = [keys, forward_eval, forward_train], [runs, text, reach, gradients, values]
    found: list[Callable[[Execution], Check]] = [
        *first,
        *second,
        numeric_gradients,
        still,
        left,
        again,
        graph,
        crossings,
        norms,
    ]
    if plan.update == "immediate":
        found.append(nothing_left)
    if plan.exact:
        found.append(exact_parts)
    elif plan.micro_batch and not any(isinstance(module, BATCH_NORMS) for module in local.modules()):
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
    """In eval mode the segments of the text, one after the other, are the model."""
    trunk = copied(evidence.local.trunk).eval()
    with torch.no_grad():
        torch.manual_seed(SEED)
        own = _scores(evidence, evidence.called(trunk, tuple(v.clone() for v in evidence.inputs)))
        if evidence.plan.segments.trunk.eval_differs:
            torch.manual_seed(SEED)
            found = _scores(evidence, evidence.called(copied(evidence.local).eval(), evidence.inputs))
            claim = "in eval mode local(x) is the model's own forward (it differs from train mode; no text for it)"
        else:
            torch.manual_seed(SEED)
            found = compose(evidence, copied(evidence.local.trunk).eval(), evidence.inputs)
            claim = "in eval mode the segments of the text, one after the other, equal the model's forward bit for bit"
    return verdict(_ID[forward_eval], claim, differences("output", found, own), f"output {tuple(own.shape)}: equal")


def forward_train(evidence: Execution) -> Check:
    """In train mode the segments of the text, one after the other, are the model."""
    left, right = (copied(evidence.local.trunk).train() for _ in range(2))
    skipped = _skip_unused(left, evidence)
    sides = [name for segment in evidence.plan.segments.segments for name in segment.sides]
    if sides and len(evidence.plan.segments) > 1:  # a further output may be computed earlier than in the model
        for trunk in (left, right):
            _draw_apart(trunk, evidence)
    held = dict(left.named_buffers())
    with torch.no_grad():
        torch.manual_seed(SEED)
        result = evidence.called(left, tuple(v.clone() for v in evidence.inputs))
        torch.manual_seed(SEED)
        found, further = run_through(evidence, right, evidence.inputs)
    own, named = _scores(evidence, result), _named_tensors(result)
    lines = list(differences("output", found, own))
    for name in sides:
        lines += differences(f"output {name}", further[name], named[name])
    buffers, saved = dict(right.named_buffers()), left.state_dict()
    for name, buffer in left.named_buffers():
        if name in saved or held.get(name) is buffer:  # others the model makes for itself, and does not save
            lines += differences(f"buffer {name}", buffers[name], buffer)
    parameters = dict(right.named_parameters())
    for name, parameter in left.named_parameters():  # a forward may write to them, too
        lines += differences(f"parameter {name}", parameters[name].detach(), parameter.detach())
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
            lines += differences(name, stepped.losses[name], value)
    return verdict(
        _ID[text],
        "the losses that step returns equal, bit for bit, those of the audited text executed on its own",
        lines,
        f"{len(traced.losses)} losses",
    )


def reach(evidence: Execution) -> Check:
    """Each loss reaches what it declares, by autograd's graph."""
    lines, total, without = [], 0, set[str]()
    failure = evidence.failure
    backwards = evidence.begun  # a leak can make the step fail: say what was seen before
    if failure is None and len(backwards) != len(evidence.plan.losses):
        lines.append(f"{len(backwards)} backwards ran, {len(evidence.plan.losses)} losses are declared")
    for loss, seen in zip(evidence.plan.losses, backwards, strict=False):
        declared = evidence.plan.reach(loss)
        total += len(seen.leaves)
        lines += [f"leak: the graph of {loss.name} ends at {name}" for name in sorted(seen.leaves - declared)]
        missing = declared - seen.leaves
        without |= missing & evidence.idle if missing else set()
        lines += [f"dead weight: the graph of {loss.name} has no {name}" for name in sorted(missing - without)]
    if failure is not None and not lines:
        raise NotRun
    return verdict(
        _ID[reach],
        f"the autograd graph of each of the {len(evidence.plan.losses)} losses ends at exactly the parameters it "
        "declares",
        lines,
        f"{total} pairs of loss and parameter, all declared{no_gradient(without)}",
    )


def no_gradient(names: Iterable[str]) -> str:
    """Name parameters that the model itself gives no gradient."""
    names = sorted(names)
    return f"; without gradient in plain backpropagation too: {', '.join(names[:6])}" if names else ""


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
        pairs: list[tuple[str, Tensor | None, Tensor | None]] = [("loss", stepped.losses.get(name), evaluation.value)]
        found, expected = stepped.scores.get(name), None if evidence.plan.scores == "none" else evaluation.scores
        if evidence.plan.scores == "argmax" and found is not None and expected is not None:
            found, expected = expected.gather(1, found.unsqueeze(1)), expected.amax(1, keepdim=True)  # or a tie
        pairs.append(("scores", found, expected))
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
    fine = evidence
    if any(evidence.referred.own_backward):  # differences want digits
        fine = Execution(evidence.local, evidence.inputs, evidence.y, evidence.device)
    lines, told = numeric(fine, [seen.added for seen in fine.stepped.backwards])
    return verdict(
        _ID[numeric_gradients],
        "a loss applies a gradient to each parameter it declares, and to no other; where a backward is not torch's "
        "own, central differences of the loss are taken along each block",
        lines,
        told,
    )


def graph(evidence: Execution) -> Check:
    """The graph of the step is its text."""
    local = evidence.copy()
    leaves = {id(p): name for name, p in local.named_parameters()}
    torch.manual_seed(SEED)
    losses, _ = local.graph_module()(*evidence.own_inputs, evidence.own_y)
    lines: list[str] = []
    if list(losses) != list(evidence.stepped.losses):
        lines.append(f"the graph returns {list(losses)}, step {list(evidence.stepped.losses)}")
    else:
        for loss in evidence.plan.losses:
            lines += differences(loss.name, losses[loss.name].detach(), evidence.stepped.losses[loss.name])
            reached = {
                leaves.get(id(leaf), "a tensor that is not a parameter") for leaf in leaves_of(losses[loss.name])
            }
            apart = reached ^ (
                evidence.plan.reach(loss) - evidence.idle if reached != evidence.plan.reach(loss) else reached
            )
            lines += [
                f"{loss.name} of the graph reaches {name}, or does not, against the plan" for name in sorted(apart)
            ]
    return verdict(
        _ID[graph],
        "local.graph_module() gives the losses of step bit for bit, and each reaches what it declares",
        lines,
        f"{len(losses)} losses",
    )


def left(evidence: Execution) -> Check:
    """The step leaves what the declared losses leave, and nothing else."""
    stepped = evidence.stepped
    lines = [*stepped.outside, *differing(stepped.after, evidence.referred.after, evidence.tolerance)]
    return verdict(
        _ID[left],
        "buffers and random generator are after the step where the declared losses on the recorded graphs leave them; "
        "batch, labels, modes, grad mode, autocast, default types and hooks are as before",
        lines,
        f"{len(stepped.after.buffers)} buffers, {len(stepped.after.process)} states of the process",
    )


def again(evidence: Execution) -> Check:
    """The same holds on other batches, in the trained type, and from a state that has moved."""
    lines: list[str] = []
    told: list[str] = []
    for other in _elsewhere(evidence):
        where = f"on {len(other.y)} images in {_type(other)}"
        try:
            _ = other.referred
        except Exception as error:  # the model's own forward does not take this batch
            told.append(f"not {where}, which the model itself refuses ({type(error).__name__})")
            continue
        if other.failure is not None:
            lines.append(f"{where}: {_raised(other, other.failure)}")
            continue
        for check in (gradients, values, left, still):
            found = check(other)
            lines += [] if found.ok else [f"{where}: {line}" for line in found.evidence.splitlines()]
        told.append(where)
    return verdict(
        _ID[again],
        "gradients, losses, scores and all that is left are those of the plan on batches of other sizes too, in the "
        "trained type and in float64, from a state whose statistics, counters and weights have moved",
        lines,
        "; ".join(told),
    )


def _elsewhere(evidence: Execution) -> Iterator[Execution]:
    """Yield executions on other batches from a moved state: on few images in float64, on more in the trained type."""
    start = evidence.moved()
    yield Execution(evidence.local, *_batch_of(evidence, 2), evidence.device, start=start)
    yield Execution(evidence.local, *_batch_of(evidence, 7), evidence.device, start=start, double=False)


def _batch_of(evidence: Execution, count: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return a batch of another size, of the images at hand: shifted by a pixel where they come again."""
    count = max(count, *(loss.part[1] for loss in evidence.plan.losses if loss.part), 1)
    have = len(evidence.y)
    rows = torch.arange(count, device=evidence.device) % have
    inputs = []
    for whole in evidence.inputs:
        scale = len(whole) // have
        value = whole[rows] if scale == 1 else whole.unflatten(0, (have, scale))[rows].flatten(0, 1)
        if count > have and value.dim() > 1 and value.is_floating_point():
            value = torch.cat([value[:have], value[have:].roll(1, -1)])
        inputs.append(value)
    return tuple(inputs), evidence.y[rows]


def still(evidence: Execution) -> Check:
    """Only the optimizer moves parameters."""
    own = evidence.written
    return verdict(
        _ID[still],
        "with an optimizer that moves nothing, the step changes no parameter"
        + (" that the forward does not write" if own else "")
        + (", and moves each declared copy by decay * p + (1 - decay) * p_source" if pulls(evidence.plan) else ""),
        [f"{name} has changed, or not as declared" for name in evidence.stepped.moved],
        f"{sum(name not in own for name, _ in evidence.local.named_parameters())} parameters: equal, bit for bit"
        + (f"; written by the forward: {', '.join(sorted(own))}" if own else ""),
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
    """No gradient is left by a step that updates after each segment."""
    left = evidence.stepped.left
    return verdict(
        _ID[nothing_left],
        "after a step that updates after each backward, no parameter has a gradient left",
        [f"{name} has a gradient left" for name in left],
        f"{sum(1 for _ in evidence.local.parameters())} parameters, none has a gradient",
    )


def micro_batches(evidence: Execution) -> Check:
    """Micro-batches add up to the whole batch."""
    found: list[list[dict[str, Tensor]]] = []
    draws = False
    for size in (None, 1):
        local = evidence.copy(size).eval()  # without dropout, which draws again for every part
        probe = Probe(_trained(local), {id(p): name for name, p in local.named_parameters()})
        torch.manual_seed(SEED)
        before = torch.get_rng_state()
        local.step(evidence.batch(evidence.own_inputs), evidence.own_y, probe)
        draws = draws or not torch.equal(before, torch.get_rng_state())
        found.append(probe.updates)
    if draws:
        found[1] = found[0]
    lines = [
        f"{name}: the gradients of the parts do not add up to that of the batch in update {number}"
        for number, (whole, parts) in enumerate(zip(*found, strict=True))
        for name in _apart(parts, whole, evidence.tolerance)
    ]
    return verdict(
        _ID[micro_batches],
        "taken one image at a time, a batch gives the gradients that it gives as a whole (in eval mode)",
        lines,
        "not compared: the step draws by chance in eval mode too"
        if draws
        else f"{sum(map(len, found[0]))} gradients of a batch of {len(evidence.y)}",
    )


def exact_parts(evidence: Execution) -> Check:
    """Parts of a batch train as the whole batch does."""
    exact = Execution(evidence.local, evidence.inputs, evidence.y, evidence.device)
    batches = [_batch_of(evidence, count) for count in (4, 3)]
    found: list[list[dict[str, Tensor]]] = []
    for size in (None, 2):
        local = exact.copy(size)
        probe = Probe(_trained(local), {id(p): name for name, p in local.named_parameters()})
        made: list[dict[str, Tensor]] = []
        torch.manual_seed(SEED)
        for inputs, y in batches:
            result = local.step(exact.batch(doubled(inputs) if exact.double else inputs), y.clone(), probe)
            made += [result.losses, {name: value for name, value in result.returned.items() if value is not None}]
        found.append([*made, *probe.updates, dict(local.named_buffers())])
    lines = [
        f"{name} is not that of the whole batch"
        for whole, parts in zip(*found, strict=True)
        for name in _apart(parts, whole, exact.tolerance)
    ]
    return verdict(
        _ID[exact_parts],
        "taken in parts of two images, a batch gives the losses, scores, gradients and buffers that it gives whole, "
        f"in train mode and {_type(exact)}",
        lines,
        f"{sum(map(len, found[0]))} tensors of batches of {' and '.join(str(len(y)) for _, y in batches)}",
    )


def _apart(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> Iterator[str]:
    """Yield the names of tensors that differ. Below a thousandth of the largest norm, differences are relative to that.

    In front of a BatchNorm the gradient of a bias is a sum that cancels, in another order.
    """
    least = 1e-3 * max((float(value.double().norm()) for value in wanted.values()), default=0.0)
    for name, value in wanted.items():
        off = float((found[name].double() - value.double()).norm()) if name in found else float("inf")
        if not off <= tolerance * max(float(value.double().norm()), least):
            yield name


def _options(local: Any, term: Term) -> dict[str, Any]:
    """Return the keyword arguments of a term's loss."""
    weights = {} if term.weights is None else {"weight": local.heads.get_submodule(term.weights)()}
    return {**dict(term.options), **weights}


def plain_training(evidence: Execution) -> Check:
    """One loss and no cut is ordinary training."""
    local = copied(evidence.local).train()
    take_micro_batches(local.functions_of_text, None)
    trunk = copied(evidence.local.trunk).train()
    _skip_unused(trunk, evidence)
    for parameter in (*local.parameters(), *trunk.parameters()):
        parameter.grad = None
    terms = evidence.plan.losses[0].terms
    step, loop = (torch.optim.SGD(_trained(m), lr=0.05, momentum=0.9, weight_decay=1e-4) for m in (local, trunk))
    for number in range(2):
        torch.manual_seed(SEED + number)
        local.step(evidence.batch(tuple(v.clone() for v in evidence.inputs)), evidence.own_y, step)
        torch.manual_seed(SEED + number)
        loop.zero_grad()
        result = evidence.called(trunk, tuple(v.clone() for v in evidence.inputs))
        output, further = _scores(evidence, result), _named_tensors(result)
        read = [output if term.side is None else further[term.side] for term in terms]
        losses = [
            function_named(term.loss)(value, evidence.y, **_options(local, term))
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
        lines += differences(name, found[name], value)
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
    left: "measured.left",
    again: "measured.again",
    graph: "measured.graph",
    crossings: "measured.crossings",
    norms: "measured.batchnorm",
    nothing_left: "measured.nothing-left",
    plain_training: "measured.plain-training",
    micro_batches: "measured.micro-batches",
    exact_parts: "measured.exact-parts",
}


# ------------------------------------------------------------------------------------------------------------ helpers


def _skip_unused(trunk: nn.Module, evidence: Execution) -> list[str]:
    """Let the modules whose parameters the losses do not use (auxiliary classifiers) leave no trace; name them.

    They are not in the recorded graph. Where they run, they draw random numbers and move their own statistics: both are
    put back. What they return becomes NaN: if the output did use it, it would show.
    """
    unused = {name.removeprefix("trunk.") for name in evidence.plan.segments.unused}
    nodes = (node for segment in evidence.plan.segments.segments for node in segment.graph.nodes)
    recorded = {str(node.target) for node in nodes if node.op in ("call_module", "get_attr")}
    used = {".".join(parts[:i]) for parts in (name.split(".") for name in recorded) for i in range(1, len(parts) + 1)}
    skipped: list[str] = []
    for path, module in trunk.named_modules():
        inside = {f"{path}.{name}" for name, p in module.named_parameters() if p.requires_grad}
        if (
            path
            and path not in used
            and inside
            and inside <= unused
            and not any(path.startswith(f"{outer}.") for outer in skipped)
        ):
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


def differences(what: str, found: Tensor, expected: Tensor) -> Iterator[str]:
    """Yield a line if two tensors are not equal bit for bit."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        yield f"{what} is {tuple(found.shape)} {found.dtype}, not {tuple(expected.shape)} {expected.dtype}"
    elif not same(found, expected):
        wrong = int((found != expected).sum())
        largest = float((found.double() - expected.double()).abs().max())
        yield f"{what}: {wrong} of {found.numel()} values differ, by at most {largest:.1e}"


def _scores(evidence: Execution, result: Any) -> Tensor:
    """Return the class scores of a model's result: the output that the plan names.

    In eval mode a model may return another form, such as a tensor alone: then a field of that name, or the first one.
    """
    found = _named_tensors(result)
    names = (evidence.plan.segments.trunk.output, "logits", "out", next(iter(found)))
    return next(found[name] for name in names if name in found)


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
    if evidence.double:
        return "float64"
    own = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in evidence.local.parameters()}))
    return f"{own} (it does not run in float64)" if evidence.wants_double else own
