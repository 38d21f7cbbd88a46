"""Compare what the text of a training step does with what its plan declares, without running it.

What the text does comes from :mod:`localize.auditor.reader`; what is declared is the plan. Nothing here knows how the
text was made.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import networkx
import torch

from localize.auditor.matching import Departure, Match, Wishes, match
from localize.auditor.names import Vocabulary
from localize.auditor.reader import DRIVER, read
from localize.auditor.reading import Const, Event, Node, Reading, Ref
from localize.auditor.text import parse
from localize.ir import Check, LocalLoss, Plan, Term, Use

SCALE_GRADIENT = "localize.ops.scale_gradient"
SHARE = "localize.ops.share"
OUTPUT_ERROR = "localize.ops.output_error"
CHUNK = "torch.chunk"
TENSOR_SPLIT = "torch.tensor_split"
MAX_LINES = 8
"""Lines of evidence that a failing check prints at most."""


@dataclass(frozen=True)
class Run:
    """One call of a segment's function."""

    index: int
    line: int
    inputs: tuple[int | None, ...]
    outputs: tuple[int | None, ...]
    """Values that leave the segment."""
    sides: tuple[int | None, ...]
    """What it returns after them: further outputs of the model."""
    enter: int
    """Position of the call among the events."""
    leave: int
    called_from: int
    """Line of the call of the function that makes this call."""
    recomputed: bool
    """It is run again in the backward."""
    without_gradient: bool
    """Nothing in it is differentiated."""


class Evidence:
    """A reading beside the plan, with what several checks ask of it."""

    def __init__(self, local: Any) -> None:
        self.local = local
        self.plan: Plan = local.plan
        self.trainable = tuple(name for name, p in local.named_parameters() if p.requires_grad)
        self.known = frozenset(name for name, _ in local.named_parameters())
        self.inputs = tuple(argument.name for argument in self.plan.segments.trunk.inputs)
        self.words = Vocabulary.of(self.plan, local.trunk, local.heads)
        self.wishes = Wishes.of(self.plan, self.words)
        self.tree = parse(local.source, len(self.wishes))
        functions = _functions(self.plan)
        models = (local.trunk, local.heads)
        self.reading: Reading = read(local.source, *models, functions, self.inputs, self.tree, len(self.wishes))

    @cached_property
    def match(self) -> Match:
        """The text beside the plan, statement by statement."""
        return match(self.tree, self.plan, self.words, self.wishes)

    @cached_property
    def backwards(self) -> list[tuple[int, Event]]:
        """Backwards with their position among the events."""
        return [(i, event) for i, event in enumerate(self.reading.events) if event.kind == "backward"]

    @cached_property
    def runs(self) -> list[Run]:
        """Calls of segment functions, in order."""
        segments = {segment.name: segment for segment in self.plan.segments.segments}
        open_calls: list[int] = []
        runs = []
        for position, event in enumerate(self.reading.events):
            if event.kind == "enter":
                open_calls.append(position)
            elif event.kind == "leave":
                enter = open_calls.pop()
                if event.name in segments:
                    entered, segment = self.reading.events[enter], segments[event.name]
                    inputs = entered.inputs[2 if self.plan.feedback else 1 :]  # after the trunk, and the heads
                    caller = self.reading.events[open_calls[-1]].line if open_calls else 0
                    how = (entered.recomputed, entered.without_gradient)
                    count = len(segment.outputs)
                    returned = (event.outputs[:count], event.outputs[count:])
                    runs.append(Run(segment.index, event.line, inputs, *returned, enter, position, caller, *how))
        return runs

    @cached_property
    def runs_of(self) -> dict[int, list[Run]]:
        """Runs of each segment, by its index."""
        found: dict[int, list[Run]] = defaultdict(list)
        for run in self.runs:
            found[run.index].append(run)
        return found

    @cached_property
    def makers(self) -> dict[int | None, list[int]]:
        """Numbers of the runs that make a value, by its node."""
        makers: dict[int | None, list[int]] = defaultdict(list)
        for number, run in enumerate(self.runs):
            for node in _made_by(run):
                makers[node].append(number)
        return makers

    @cached_property
    def features(self) -> frozenset[int | None]:
        """Nodes that segments return."""
        return frozenset(node for run in self.runs for node in (*run.outputs, *run.sides))

    @cached_property
    def losses(self) -> dict[str, int]:
        """Node of every declared loss: the value returned under its name, or, failing that, by order of backward."""
        returned = _returned(self.reading, 0)
        nodes = {}
        for i, loss in enumerate(self.plan.losses):
            value = returned.get(loss.name)
            if isinstance(value, Ref):
                nodes[loss.name] = self.origin(value.node)[0]
            elif i < len(self.backwards) and (differentiated := self.backwards[i][1].inputs[0]) is not None:
                nodes[loss.name] = differentiated
        return nodes

    @cached_property
    def reach(self) -> dict[str, frozenset[str]]:
        """Parameters that a gradient of each loss reaches, by name of the loss."""
        return {name: self.reading.parameters(node) for name, node in self.losses.items()}

    @cached_property
    def behind(self) -> dict[str, set[int]]:
        """Nodes that a gradient of each loss passes through."""
        return {name: networkx.ancestors(self.reading.flow, n) | {n} for name, n in self.losses.items()}

    def idle(self, loss: LocalLoss) -> frozenset[str]:
        """Parameters in the segments of a loss that the forward of the model gives no gradient.

        The text is that graph, statement by statement; of a text that is not, nothing is known.
        """
        found: set[str] = set()
        if self.match.departures:
            return frozenset()
        for run in self.runs_for(loss):
            if run.index in _trained_segments(loss):
                own = set(self.plan.block(f"segment_{run.index}").parameters)
                for output in (*run.outputs, *run.sides):
                    own -= self.reading.parameters(output) if output is not None else set()
                found |= own
        return frozenset(found)

    def runs_for(self, loss: LocalLoss) -> list[Run]:
        """Return the runs of segments that a loss reads: with gradient, and before what it reads detached."""
        with_gradient = _runs_of(self, loss)
        if with_gradient or loss.name not in self.losses:
            return with_gradient
        seen, waiting = {self.losses[loss.name]}, [self.losses[loss.name]]
        found: dict[int, Run] = {}
        while waiting:
            for operand in self.reading.nodes[waiting.pop()].operands:
                if operand in self.makers:
                    run = self.runs[self.makers[operand][-1]]
                    found[run.enter] = run
                elif operand not in seen:
                    seen.add(operand)
                    waiting.append(operand)
        return [found[enter] for enter in sorted(found)]

    def node(self, value: Any) -> Node | None:
        """Return the node of a tensor, or None for anything else."""
        return self.reading.nodes[value.node] if isinstance(value, Ref) else None

    def nodes(self, values: Iterable[Any]) -> list[Node] | None:
        """Return the nodes of tensors, or None where one of the values is not a tensor."""
        found = [self.node(value) for value in values]
        return [node for node in found if node is not None] if None not in found else None

    def origin(self, index: int, stops: frozenset[int | None] = frozenset()) -> tuple[int, bool, bool]:
        """Follow a value back through detach and clone, at most to ``stops``.

        Returns:
            Where it comes from, whether it is detached, and whether it is copied.
        """
        detached = cloned = False
        node = self.reading.nodes[index]
        while node.index not in stops and (
            node.kind == "detach" or (node.kind == "method" and node.target == "clone" and len(node.operands) == 1)
        ):
            detached |= node.kind == "detach"
            cloned |= node.target == "clone"
            node = self.reading.nodes[node.operands[0]]
        return node.index, detached, cloned

    def told(self, index: int | None) -> str:
        """Describe a value: its name, its line, and the source of that line."""
        if index is None:
            return "no tensor"
        node = self.reading.nodes[index]
        if node.kind == "input":
            return f"the argument {node.target}"
        return f"{node.name or node.target} ({self.reading.quote(node.line)})"


def checks(local: Any) -> tuple[tuple[Check, ...], list[Departure]]:
    """Return the checks that need no execution, and what departs from the plan."""
    evidence = Evidence(local)
    pulled = [copies] if any(copy.decay is not None for copy in evidence.plan.copies) else []
    return tuple(check(evidence) for check in (*STATIC, *pulled)), evidence.match.departures


# ---------------------------------------------------------------------------------------------------------- checks


def readable(evidence: Evidence) -> Check:
    """Every line is understood."""
    reading = evidence.reading
    lines = [
        f"{reading.quote(p.line)}: {p.what}" if p.line else p.what
        for p in sorted(reading.problems, key=lambda p: p.line)
    ]
    return verdict(
        "static.readable",
        "every line of the text is understood: straight-line functions, names assigned once and before use, "
        "modules that exist",
        lines,
        f"{len(reading.lines)} lines, {len(reading.nodes)} values, {len(reading.events)} calls and actions",
    )


def in_plan(evidence: Evidence) -> Check:
    """Every statement is one of the plan."""
    return verdict(
        "static.plan",
        "every statement is an operation of the recorded graph of its segment or a word of the plan, each once, on the "
        "same values and in the same order; nothing else is in the text",
        [told(evidence, departure) for departure in evidence.match.departures],
        f"{evidence.match.matched} operations, matched one to one",
    )


def told(evidence: Evidence, departure: Departure) -> str:
    """Describe something that is not in the plan: its line, what it is, what it touches, and what it does to reach."""
    where = f"{evidence.reading.quote(departure.line)}: " if departure.line else ""
    touched = [] if departure.segment is None else [f"segment_{departure.segment}"]
    touched += departure.losses[:4] + (("...",) if len(departure.losses) > 4 else ())
    if not touched or evidence.reading.problems:
        return f"{where}{departure.what}"
    plan, changed = evidence.plan, []
    for loss in plan.losses:
        if loss.name in departure.losses:
            found, declared = evidence.reach.get(loss.name, frozenset()), plan.reach(loss)
            changed += [f"{loss.name} reaches {name}" for name in sorted(found - declared)[:1]]
            changed += [f"{loss.name} does not reach {name}" for name in sorted(declared - found)[:1]]
    reached = f"then {', '.join(changed)}" if changed else "reach unchanged"
    return f"{where}{departure.what}; touches {', '.join(touched)}; {reached}"


def used(evidence: Evidence) -> Check:
    """Nothing is computed in vain."""
    reading = evidence.reading
    lines = [f"{reading.quote(p.line)}: {p.what}" for p in sorted(reading.unread, key=lambda p: p.line)]
    return verdict(
        "static.used",
        "every name that is assigned is read",
        lines,
        f"{sum(len(node.places) for node in reading.nodes)} names",
    )


def reach(evidence: Evidence) -> Check:
    """What each loss reaches is what it is declared to reach."""
    lines, total, idle = [], 0, set[str]()
    for loss in evidence.plan.losses:
        declared = evidence.plan.reach(loss)
        node = evidence.losses.get(loss.name)
        if node is None:
            lines.append(f"{loss.name}: the text has no value for this loss")
            continue
        found = evidence.reach[loss.name]
        total += len(found)
        for parameter in sorted(found - declared):
            path = evidence.reading.path(parameter, node)
            lines.append(f"leak: {loss.name} trains {parameter}, which it does not declare: {path}")
        missing = declared - found
        without = missing & evidence.idle(loss) if missing else frozenset()
        idle |= without
        for parameter in sorted(missing - without):
            where = evidence.reading.quote(evidence.reading.nodes[node].line)
            known = "" if parameter in evidence.known else " (the model has no such parameter)"
            lines.append(f"dead weight: {loss.name} declares {parameter}{known}, but no gradient reaches it: {where}")
    return verdict(
        "static.reach",
        f"each of the {len(evidence.plan.losses)} losses has a gradient path to exactly the parameters it declares",
        _mixed(lines),
        f"{total} pairs of loss and parameter, all declared; no leak, no dead weight"
        + (f"; without gradient in plain backpropagation too: {_some(sorted(idle))}" if idle else ""),
    )


def backward(evidence: Evidence) -> Check:
    """Each loss has one backward."""
    wanted = {node: name for name, node in evidence.losses.items()}
    seen = Counter(event.inputs[0] for _, event in evidence.backwards)
    lines = []
    for loss in evidence.plan.losses:
        count = seen[evidence.losses[loss.name]] if loss.name in evidence.losses else 0
        if count != 1:
            lines.append(f"{loss.name} has {count} backwards: {evidence.told(evidence.losses.get(loss.name))}")
    for _, event in evidence.backwards:
        if event.inputs[0] not in wanted:
            lines.append(f"{evidence.reading.quote(event.line)}: backward of a value that is returned as no loss")
        if event.scaled != evidence.plan.scaled:
            told = "scaled" if event.scaled else "not scaled"
            lines.append(f"{evidence.reading.quote(event.line)}: the loss is {told}, against the declaration")
    return verdict(
        "static.backward",
        f"each of the {len(evidence.plan.losses)} losses has exactly one backward, and nothing else has one"
        + (": that of the loss times the one scale of the step" if evidence.plan.scaled else ""),
        lines,
        f"{len(evidence.backwards)} backwards",
    )


def covered(evidence: Evidence) -> Check:
    """Every trainable parameter is trained."""
    trained = Counter(name for names in evidence.reach.values() for name in names)
    unused = set(evidence.plan.segments.unused)
    frozen = {name for block in evidence.plan.frozen for name in evidence.plan.block(block).parameters}
    untrained = [name for name in evidence.trainable if not trained[name] and name not in unused | frozen]
    idle = {name for loss in evidence.plan.losses for name in evidence.idle(loss)} if untrained else set()
    lines = [f"{name} is trainable, but no loss trains it" for name in untrained if name not in idle]
    lines += [f"{name} is declared as unused, but is trained" for name in sorted(unused) if trained[name]]
    lines += [f"{name} is declared as frozen, but is trained" for name in sorted(frozen) if trained[name]]
    count = sum(1 for name in evidence.trainable if trained[name])
    apart = f"{len(unused)} that the forward of the model does not use" + (
        ", or uses without a gradient" if unused else ""
    )
    apart += f" and {len(frozen)} that are declared as frozen" if frozen else ""
    return verdict(
        "static.covered",
        f"each of the {len(evidence.trainable)} trainable parameters is trained by at least one loss, except {apart}",
        lines,
        f"{count} trained, {len(unused)} unused"
        + (f": {_some(sorted(unused))}" if unused else "")
        + (f", {len(frozen)} frozen" if frozen else "")
        + (f", {len(idle)} that the model itself gives no gradient: {_some(sorted(idle))}" if idle else ""),
    )


def overlaps(evidence: Evidence) -> Check:
    """What several losses train, several losses declare."""
    plan = evidence.plan
    declared, found = defaultdict(set), defaultdict(set)
    for loss in plan.losses:
        for parameter in plan.reach(loss):
            declared[parameter].add(loss.name)
        for parameter in evidence.reach.get(loss.name, ()):
            found[parameter].add(loss.name)
    lines = [
        f"{name} is trained by {_some(sorted(found[name]))}, but declared by {_some(sorted(declared[name]))}"
        for name in sorted(found)
        if len(found[name]) > 1 and found[name] != declared[name]
    ]
    shared = [(block.name, [loss.name for loss in plan.losses if block.name in loss.reach]) for block in plan.blocks]
    told = [f"{name} by {_some(names)}" for name, names in shared if len(names) > 1]
    return verdict(
        "static.overlaps",
        "a parameter that several losses train is declared by each of them",
        lines,
        f"{len(told)} blocks are trained by several losses" + (f": {'; '.join(told)}" if told else ""),
    )


def route(evidence: Evidence) -> Check:
    """Each loss runs its declared segments, each fed by the one before."""
    owners: dict[int, list[str]] = defaultdict(list)
    lines = []
    for loss in evidence.plan.losses:
        runs = _runs_of(evidence, loss)
        for run in runs:
            owners[run.enter].append(loss.name)
        wanted = _trained_segments(loss)
        if [run.index for run in runs] != wanted:
            ran = ", ".join(f"segment_{run.index} (line {run.line})" for run in runs) or "none"
            lines.append(f"{loss.name} is declared to run segments {wanted} with gradient, and runs {ran}")
        lines += _wrong_inputs(evidence, loss, runs)
    for run in evidence.runs:
        sides = evidence.plan.segments.segments[run.index].sides
        if len(run.sides) != len(sides):
            where = evidence.reading.quote(run.line)
            lines.append(f"{where}: {len(run.sides)} values return after those that cross, declared are {_some(sides)}")
        if run.without_gradient != (f"segment_{run.index}" in evidence.plan.frozen):
            told = "without" if run.without_gradient else "with"
            lines.append(f"{evidence.reading.quote(run.line)}: segment_{run.index} is run {told} gradient")
        if run.recomputed != (f"segment_{run.index}" in evidence.plan.recompute):
            told = "recomputed in the backward" if run.recomputed else "not recomputed in the backward"
            lines.append(f"{evidence.reading.quote(run.line)}: segment_{run.index} is {told}, against the declaration")
        if not owners[run.enter] and f"segment_{run.index}" in evidence.plan.frozen:
            lines += _wrong_inputs(evidence, None, [run])
        elif len(owners[run.enter]) != 1:
            by = _some(owners[run.enter]) if owners[run.enter] else "no loss"
            lines.append(f"{evidence.reading.quote(run.line)}: this run of segment_{run.index} is trained by {by}")
    return verdict(
        "static.route",
        "each loss runs the segments of its route with gradient, in order, fed by the detached output of the segment "
        "before (copied exactly where declared), the first by the image",
        lines,
        f"{len(evidence.runs)} runs of {len(evidence.plan.segments)} segments for {len(evidence.plan.losses)} losses",
    )


def operations(evidence: Evidence) -> Check:
    """Each segment calls the modules that were recorded."""
    lines, count = [], 0
    replaced = {path: f"heads.{block}" for path, block in evidence.plan.feedback}
    ran = {run.index for run in evidence.runs}
    for segment in evidence.plan.segments.segments:
        if segment.name in evidence.plan.frozen and segment.index not in ran:
            continue
        modules = [node.target for node in segment.graph.nodes if node.op == "call_module"]
        wanted = Counter(replaced.get(path, f"trunk.{path}") for path in modules)
        found = Counter(evidence.reading.calls.get(segment.name, ()))
        count += sum(found.values())
        missing, extra = wanted - found, found - wanted
        if missing:
            lines.append(f"{segment.name} does not call {_some(sorted(missing))} as often as was recorded")
        if extra:
            lines.append(f"{segment.name} calls {_some(sorted(extra))} more often than was recorded")
    for function, paths in evidence.reading.calls.items():
        if function.startswith("segment_"):
            continue
        stray = [path for path in paths if path == "trunk" or path.startswith("trunk.")]
        if stray:
            lines.append(f"{function} calls {_some(stray)} outside of a segment")
    return verdict(
        "static.operations",
        "each segment calls the modules that were recorded for it, each as often as recorded",
        lines,
        f"{count} calls in {len(evidence.plan.segments)} segments"
        + (f", {len(replaced)} of them by a block with feedback, as declared" if replaced else ""),
    )


def terms(evidence: Evidence) -> Check:
    """Each loss is the declared sum of terms: head, what it reads, target, weight."""
    lines, count = [], 0
    used: Counter[int] = Counter()
    for loss in evidence.plan.losses:
        node = evidence.losses.get(loss.name)
        if node is None:
            lines.append(f"{loss.name}: the text has no value for this loss")
            continue
        if loss.part is not None or evidence.plan.micro_batch:
            node, wrong = _share_of(evidence, loss, node)
            lines += [f"{loss.name}: {line}" for line in wrong]
        found = list(_summands(evidence, node))
        if len(found) != len(loss.terms):
            lines.append(f"{loss.name} has {len(found)} terms, declared are {len(loss.terms)}: {evidence.told(node)}")
            continue
        count += len(found)
        for term, (weight, summand) in zip(loss.terms, found, strict=True):
            lines += [f"{loss.name}: {line}" for line in _wrong_term(evidence, loss, term, weight, summand)]
        used.update(_heads_of(evidence, node))
    lines += _other_weights(evidence)
    elsewhere = {f"heads.{block}" for _, block in evidence.plan.feedback}
    if evidence.plan.input is not None:
        elsewhere.add(f"heads.{evidence.plan.input.block}")
    for made in evidence.reading.nodes:
        if _is_head(made) and used[made.index] != 1 and made.target not in elsewhere:
            lines.append(f"{evidence.told(made.index)}: {made.target} is called for {used[made.index]} losses, not one")
    return verdict(
        "static.terms",
        "each loss is the declared sum: its heads read the features of its own route and the declared shared blocks "
        "(detached exactly where declared), its targets and weights are those of the plan",
        lines,
        f"{count} terms of {len(evidence.plan.losses)} losses",
    )


def order(evidence: Evidence) -> Check:
    """Gradients are cleared, computed and used in the declared order."""
    events = evidence.reading.events
    actions = [(i, e) for i, e in enumerate(events) if e.kind in ("backward", "update", "zero_grad")]
    lines = []
    if not actions or (actions[0][1].kind, actions[0][1].index) != ("zero_grad", None):
        first = evidence.reading.quote(actions[0][1].line) if actions else "nothing"
        lines.append(f"optimizer.zero_grad() does not come before everything else; first is {first}")
        rest = actions
    else:
        rest = actions[1:]
    expect = _order_at_end if evidence.plan.update == "end" else _order_immediate
    lines += expect(evidence, rest)
    count = Counter(event.kind for _, event in actions)
    when = "once, after all backwards" if evidence.plan.update == "end" else "directly after each backward"
    return verdict(
        "static.order",
        f"gradients are cleared first, parameters are updated {when}, and nothing is updated before its backward",
        lines,
        f"{count['zero_grad']} zero_grad, {count['backward']} backward, {count['update']} step",
    )


def locality(evidence: Evidence) -> Check:
    """A loss is differentiated before the next segment runs."""
    if evidence.plan.waits:
        last, first = (
            max((r.leave for r in evidence.runs), default=0),
            min((i for i, _ in evidence.backwards), default=0),
        )
        return verdict(
            "static.locality",
            "the losses need the error of the output, as declared: all are differentiated after the whole forward",
            [] if last < first else ["a loss is differentiated before the last segment has run"],
            f"{len(evidence.backwards)} backwards, {len(evidence.runs)} forwards",
        )
    lines = []
    for loss in evidence.plan.losses:
        node = evidence.losses.get(loss.name)
        position = next((i for i, event in evidence.backwards if event.inputs[0] == node), None)
        later = next((run for run in evidence.runs if run.index > loss.route.stop), None)
        if position is not None and later is not None and later.enter < position:
            lines.append(
                f"segment_{later.index} runs ({evidence.reading.quote(later.line)}) before {loss.name} is "
                f"differentiated ({evidence.reading.quote(evidence.reading.events[position].line)})"
            )
    return verdict(
        "static.locality",
        "the backward of each loss precedes the forward of the segment after it: one route's activations are held "
        "at a time",
        lines,
        f"{len(evidence.backwards)} backwards, {len(evidence.runs)} forwards",
    )


def detached(evidence: Evidence) -> Check:
    """Nothing that leaves a training function has a history."""
    segments = {segment.name for segment in evidence.plan.segments.segments}
    lines, count = [], 0
    events = evidence.reading.events
    for event, following in itertools.zip_longest(events, events[1:]):
        if event.kind != "leave" or event.name in segments:
            continue
        at_once = evidence.plan.exact and following is not None and following.kind == "backward"
        for node in event.outputs:
            if node is None or (at_once and node == following.inputs[0]):
                continue
            count += 1
            found = sorted(evidence.reading.parameters(node))
            if found:
                path = evidence.reading.path(found[0], node)
                where = evidence.reading.quote(event.returned)
                lines.append(f"{where}: {event.name} returns a value with its history: {path}")
    return verdict(
        "static.detached",
        "only detached values leave a training function, so that no graph outlives its backward",
        lines,
        f"{count} values leave, none has a gradient path to a parameter",
    )


def results(evidence: Evidence) -> Check:
    """The driver returns every loss and its scores under the loss's name."""
    losses, scores = _returned(evidence.reading, 0), _returned(evidence.reading, 1)
    names = [loss.name for loss in evidence.plan.losses]
    lines = []
    scored = [] if evidence.plan.scores == "none" else names
    for what, found, wanted in (("losses", losses, names), ("scores", scores, scored)):
        if list(found) != wanted:
            lines.append(f"{DRIVER} returns {what} {_some(found)}; declared are {_some(wanted)}")
    backwards = [event.inputs[0] for _, event in evidence.backwards]
    for number, loss in enumerate(evidence.plan.losses):
        value = losses.get(loss.name)
        origin = evidence.origin(value.node)[0] if isinstance(value, Ref) else None
        if origin is None or number >= len(backwards) or origin != backwards[number]:
            due = evidence.told(backwards[number]) if number < len(backwards) else "a value with a backward"
            lines.append(f"{loss.name} is returned as {evidence.told(origin)}, not as {due}")
        lines += _wrong_scores(evidence, loss, scores.get(loss.name))
        for returned, plain in ((value, _is_plain_detach), (scores.get(loss.name), _KEPT[evidence.plan.scores][0])):
            if isinstance(returned, Ref) and not plain(evidence, returned):
                call = "detach()" if plain is _is_plain_detach else "argmax(1)"
                lines.append(f"{loss.name} returns {evidence.told(returned.node)}, which is not a plain {call}")
    kept = _KEPT[evidence.plan.scores][1]
    return verdict(
        "static.results",
        f"the step returns each loss{kept and f', and the {kept} of its own head'}, under the name of the loss",
        lines,
        f"{len(losses)} losses, {sum(isinstance(value, Ref) for value in scores.values())} {kept or 'class scores'}",
    )


def copies(evidence: Evidence) -> Check:
    """Copies are pulled as declared."""
    plan, events = evidence.plan, evidence.reading.events
    pulls = [(i, event) for i, event in enumerate(events) if event.kind == "pull"]
    found: Counter[tuple[str, str, float | None]] = Counter(
        (event.name, event.source, event.decay) for _, event in pulls
    )
    declared = [copy for copy in plan.copies if copy.decay is not None]
    wanted = Counter((f"heads.{c.block}.{c.part}".rstrip("."), f"{c.of}.{c.source}", c.decay) for c in declared)
    lines = [f"{copy} is not pulled towards {source} by {decay}" for copy, source, decay in wanted - found]
    lines += [
        f"{copy} is pulled towards {source} by {decay}, which is not declared" for copy, source, decay in found - wanted
    ]
    update = next((i for i, event in enumerate(events) if event.kind == "update"), None)
    last = max((i for i, _ in evidence.backwards), default=-1)
    for position, event in pulls:
        placed = update is not None and last < position and (position < update) == (plan.pull == "before")
        if not placed:
            lines.append(f"{evidence.reading.quote(event.line)}: does not stand directly {plan.pull} the update")
    return verdict(
        "static.copies",
        f"each of the {len(declared)} copies is pulled towards what it copies once, {plan.pull} the update",
        lines,
        f"{len(pulls)} pulls",
    )


STATIC: tuple[Callable[[Evidence], Check], ...] = (
    readable, in_plan, used, reach, backward, covered, overlaps, route, operations, terms, order, locality, detached,
    results,
)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- route


def _runs_of(evidence: Evidence, loss: LocalLoss) -> list[Run]:
    """Return the runs of segments that a gradient of ``loss`` passes through."""
    behind = evidence.behind.get(loss.name, set())
    numbers = {number for node in behind for number in evidence.makers.get(node, ())}
    return [evidence.runs[number] for number in sorted(numbers)]


def _made_by(run: Run) -> set[int | None]:
    """Return what a run returns, but for inputs that it hands on as they are."""
    return {*run.outputs, *run.sides} - {*run.inputs}


def _trained_segments(loss: LocalLoss) -> list[int]:
    """Return the segments that a loss runs with gradient: those of its route, up to the last that a term reads so."""
    read = [loss.route.stop if term.at is None else term.at for term in loss.terms if not term.detached]
    return list(range(loss.route.start, max(read) + 1)) if read else []


def _wrong_inputs(evidence: Evidence, loss: LocalLoss | None, runs: list[Run]) -> Iterator[str]:
    before: Run | None = None
    for run in runs:
        quote = evidence.reading.quote
        who = loss.name if loss else "no loss trains it"
        where = f"{who}: {quote(run.line)} (called from {quote(run.called_from)}): segment_{run.index}"
        if before is not None:
            if not _follows(evidence, run, before):
                yield f"{where} does not read the output of segment_{before.index} of the same route"
        elif run.index == 0:
            yield from (f"{where} {line}" for line in _wrong_first(evidence, run, loss))
        else:
            yield from (f"{where} {line}" for line in _wrong_entry(evidence, run))
        before = run


def _wrong_entry(evidence: Evidence, run: Run) -> Iterator[str]:
    """Check that a run enters at the cut: detached outputs of the segment before, copied where declared."""
    previous = evidence.plan.segments.segments[run.index - 1]
    sources = [r for r in evidence.runs_of[run.index - 1] if r.leave < run.enter]
    if len(run.inputs) != len(previous.outputs):
        yield f"reads {len(run.inputs)} values, {len(previous.outputs)} cross the cut"
        return
    for position, (value, name) in enumerate(zip(run.inputs, previous.outputs, strict=True)):
        if value is None:
            yield "reads something that is not a tensor"
            continue
        wanted = frozenset(source.outputs[position] for source in sources if position < len(source.outputs))
        origin, is_detached, is_cloned = evidence.origin(value, wanted)
        if origin not in wanted:
            yield f"reads {evidence.told(origin)}, not value {position} of segment_{previous.index}"
        if not is_detached:
            yield f"reads {evidence.told(value)} with its history"
        if is_cloned != (name in previous.cloned):
            yield f"reads {name}, which is {'copied' if is_cloned else 'not copied'} against the declaration"


def _follows(evidence: Evidence, run: Run, before: Run) -> bool:
    """Tell whether a run reads what the one before returned, with its history, copied exactly where declared."""
    names = evidence.plan.segments.segments[before.index]
    if len(run.inputs) != len(before.outputs):
        return False
    for value, output, name in zip(run.inputs, before.outputs, names.outputs, strict=True):
        if value is None:
            return False
        origin, is_detached, is_cloned = evidence.origin(value, frozenset({output}))
        if origin != output or is_detached or is_cloned != (name in names.cloned):
            return False
    return True


def _wrong_first(evidence: Evidence, run: Run, loss: LocalLoss | None) -> Iterator[str]:
    """Check that the first segment reads the inputs in order, the declared part of them, or what a block makes."""
    made = evidence.plan.input
    if made is not None:
        value = run.inputs[0] if len(run.inputs) == 1 else None
        if not _is_made(evidence, value, made.block):
            yield f"reads {evidence.told(value)}, not what heads.{made.block} makes of {evidence.inputs[0]} and y"
        return
    part = loss.part if loss else None
    whose = f"part {part[0]} of {part[1]} of " if part else ""
    for value, name in itertools.zip_longest(run.inputs, evidence.inputs):
        if name is None or not _is_part(evidence, value, name, part):
            yield f"reads {evidence.told(value)}, not {f'{whose}the argument {name}' if name else 'fewer values'}"


def _is_made(evidence: Evidence, index: int | None, block: str) -> bool:
    """Tell whether a value is what a block makes of the images and the labels."""
    node = None if index is None else evidence.reading.nodes[index]
    if node is None or node.kind != "module" or node.target != f"heads.{block}" or len(node.args) != 2:
        return False
    names = (evidence.inputs[0], "y")
    read = [evidence.node(arg) for arg in node.args]
    return all(n is not None and _is_input(evidence, n.index, name) for n, name in zip(read, names, strict=True))


def _is_part(evidence: Evidence, index: int | None, name: str, part: tuple[int, int] | None) -> bool:
    """Tell whether a value is an argument of the driver, or the declared part of it."""
    if part is None or index is None:
        return _is_input(evidence, index, name)
    item = evidence.reading.nodes[index]
    if item.kind != "item" or len(item.args) != 2 or item.args[1] != Const(part[0]):
        return False
    split = evidence.node(item.args[0])
    if split is None or split.kind != "function" or split.target != TENSOR_SPLIT or split.kwargs:
        return False
    whole = evidence.node(split.args[0])
    return whole is not None and _is_input(evidence, whole.index, name) and split.args[1:] == (Const(part[1]),)


def _is_input(evidence: Evidence, index: int | None, name: str) -> bool:
    if index is None:
        return False
    node = evidence.reading.nodes[index]
    return node.kind == "input" and node.target == name


# ----------------------------------------------------------------------------------------------------------- terms


def _summands(evidence: Evidence, index: int, weight: float = 1.0) -> Iterator[tuple[float, int]]:
    """Yield the terms of a sum with their weights, in order."""
    node = evidence.reading.nodes[index]
    values = [evidence.node(arg) for arg in node.args]
    numbers = [arg.value if isinstance(arg, Const) else None for arg in node.args]
    name = node.target if node.kind == "operator" else ""
    tensors = evidence.nodes(node.args)
    if name in ("add", "sub") and tensors is not None:
        left, right = tensors
        yield from _summands(evidence, left.index, weight)
        yield from _summands(evidence, right.index, weight if name == "add" else -weight)
    elif name == "mul" and values[1] is not None and numbers[0] is not None:
        yield from _summands(evidence, values[1].index, weight * numbers[0])
    elif name == "mul" and values[0] is not None and numbers[1] is not None:
        yield from _summands(evidence, values[0].index, weight * numbers[1])
    elif name == "truediv" and values[0] is not None and numbers[1]:
        yield from _summands(evidence, values[0].index, weight / numbers[1])
    elif name == "neg" and tensors is not None:
        yield from _summands(evidence, tensors[0].index, -weight)
    else:
        yield weight, index


def _wrong_term(evidence: Evidence, loss: LocalLoss, term: Term, weight: float, index: int) -> Iterator[str]:
    node = evidence.reading.nodes[index]
    where = evidence.reading.quote(node.line)
    if not math.isclose(weight, term.weight, rel_tol=1e-12):
        yield f"{where}: the weight of {term.loss} is {weight!r}, declared is {term.weight!r}"
    if node.kind != "function" or node.target != term.loss:
        yield f"{where}: is {node.target}, declared is {term.loss}"
        return
    options = {key: value.value if isinstance(value, Const) else value for key, value in node.kwargs}
    weights = options.pop("weight", None)
    if len(node.args) != 2 or options != dict(term.options):
        yield f"{where}: {term.loss} takes a prediction, a target, and {dict(term.options) or 'nothing else'}"
        return
    if not _are_weights(evidence, term, weights):
        declared = f"the value of heads.{term.weights}" if term.weights else "no weights of classes"
        yield f"{where}: {term.loss} takes {declared}"
    yield from _wrong_target(evidence, loss, term, evidence.node(node.args[1]), where)
    yield from _wrong_prediction(evidence, loss, term, evidence.node(node.args[0]))


def _are_weights(evidence: Evidence, term: Term, found: Any) -> bool:
    """Tell whether the weights of the classes are what the declared block returns, or none are declared."""
    if term.weights is None or found is None:
        return term.weights is None and found is None
    node = evidence.node(found)
    if node is None or node.args or node.kwargs:
        return False
    return (node.kind, node.target) == ("module", f"heads.{term.weights}")


def _other_weights(evidence: Evidence) -> Iterator[str]:
    """Yield the blocks whose weights of the classes are not those of the plan."""
    for name in sorted({term.weights for loss in evidence.plan.losses for term in loss.terms if term.weights}):
        declared = evidence.plan.block(name).facts.get("weights")
        held = list(evidence.local.heads.get_submodule(name).buffers())
        if len(held) != 1 or held[0].is_meta or declared is None:
            continue
        wanted = torch.tensor(declared, dtype=held[0].dtype)
        if not torch.equal(held[0].cpu(), wanted):
            yield f"heads.{name} holds {_some(map(str, held[0].tolist()))}, declared are {_some(map(str, declared))}"


def _share_of(evidence: Evidence, loss: LocalLoss, index: int) -> tuple[int, list[str]]:
    """Return the loss of a part of the batch before it is weighted by its share, and what is wrong with the weight."""
    node = evidence.reading.nodes[index]
    read = evidence.nodes(node.args) or []
    if evidence.plan.micro_batch:
        size = (Const(evidence.plan.part_size(loss)),)
        weighted = (node.kind, node.target) == ("operator", "mul") and len(read) == 2
        if weighted and read[0].kind == "share" and read[0].args == size:
            return read[1].index, []
        return index, [f"{evidence.told(index)} is not weighted by the share of {size[0].value} images of the batch"]
    if node.kind != "function" or node.target != SHARE or len(read) != 3 or node.kwargs:
        return index, [f"{evidence.told(index)} is not weighted by the part's share of the batch"]
    right = _is_part(evidence, read[1].index, "y", loss.part) and _is_input(evidence, read[2].index, "y")
    wrong = [] if right else [f"{evidence.told(index)}: the share is not that of part {loss.part} of y"]
    return read[0].index, wrong


def _wrong_target(evidence: Evidence, loss: LocalLoss, term: Term, found: Node | None, where: str) -> Iterator[str]:
    """Check that a loss compares with the declared target."""
    told = evidence.told(found.index if found else None)
    if found is None:
        yield f"{where}: the target is {told}"
        return
    values: list[Node] | None = [found]
    if term.target.block is not None:
        if found.kind != "module" or found.target != f"heads.{term.target.block}" or found.kwargs:
            yield f"{where}: the target is {told}, not what heads.{term.target.block} makes of the {term.target.of}"
            return
        values = evidence.nodes(found.args)
    if values is None or not _are_target(evidence, loss, term.target.of, [value.index for value in values]):
        whose = f" by heads.{term.target.block}" if term.target.block else ""
        images = f"the argument {evidence.inputs[0]}"
        what = {"labels": "the argument y", "images": images, "input": "what enters the route"}
        yield f"{where}: the target is {told}, not {what.get(term.target.of, 'the error of the output')}{whose}"


def _are_target(evidence: Evidence, loss: LocalLoss, of: str, values: list[int]) -> bool:
    if of == "labels":
        return len(values) == 1 and _is_part(evidence, values[0], "y", loss.part)
    if of == "images":
        return len(values) == 1 and _is_part(evidence, values[0], evidence.inputs[0], loss.part)
    runs = evidence.runs_for(loss)
    if of == "input":
        return bool(runs) and tuple(values) == runs[0].inputs
    node = evidence.reading.nodes[values[0]]
    if len(values) != 1 or node.kind != "function" or node.target != OUTPUT_ERROR or len(node.args) != 2:
        return False
    read = evidence.nodes(node.args)
    outputs = {run.outputs[0] for run in evidence.runs if run.index == len(evidence.plan.segments) - 1}
    return read is not None and read[0].index in outputs and _is_input(evidence, read[1].index, "y")


def _wrong_prediction(evidence: Evidence, loss: LocalLoss, term: Term, found: Node | None) -> Iterator[str]:
    """Check that a prediction is that of the declared head on the features of the route."""
    if found is None:
        yield "the prediction is not a tensor"
        return
    where = evidence.reading.quote(found.line)
    at = loss.route.stop if term.at is None else term.at
    run = next((run for run in evidence.runs_for(loss) if run.index == at), None)
    features = list(run.outputs[: len(evidence.plan.segments.segments[at].features) or None]) if run else []
    if term.side is not None:
        sides = evidence.plan.segments.segments[at].sides
        made = dict(zip(sides, run.sides if run else (), strict=False))
        if term.head is not None or not _is_read(evidence, term, found, made.get(term.side)):
            yield f"{where}: the prediction is {evidence.told(found.index)}, not the further output {term.side}"
        return
    if term.head is None:
        if len(features) != 1 or not _is_read(evidence, term, found, features[0]):
            yield f"{where}: the prediction is {evidence.told(found.index)}, not the output of segment_{at}"
        return
    if found.kind != "module" or found.target != f"heads.{term.head}":
        yield f"{where}: the prediction comes from {found.target}, not from heads.{term.head}"
        return
    if found.recomputed != (term.head in evidence.plan.recompute):
        told = "is computed again in the backward" if found.recomputed else "is not computed again in the backward"
        yield f"{where}: {found.target} {told}, against the declaration"
    args = evidence.nodes(found.args)
    wanted = len(features) + len(term.uses) + term.labels
    if args is None or len(args) != wanted or found.kwargs:
        yield f"{where}: {found.target} reads {len(found.args)} values, declared are {wanted}"
        return
    for arg, feature in zip(args, features, strict=False):
        if not _is_read(evidence, term, arg, feature):
            yield f"{where}: {found.target} reads {evidence.told(arg.index)}, not {evidence.told(feature)} as declared"
    for arg, use in zip(args[len(features) :], term.uses, strict=False):
        yield from (f"{where}: {found.target} {line}" for line in _wrong_use(evidence, arg, use))
    if term.labels and not _is_part(evidence, args[-1].index, "y", loss.part):
        yield f"{where}: {found.target} reads {evidence.told(args[-1].index)}, not the argument y"


def _is_read(evidence: Evidence, term: Term, value: Node, feature: int | None) -> bool:
    """Tell whether a head reads a feature as declared: detached, one stream of it, or as it is."""
    if term.detached:
        if value.kind != "detach":
            return False
        value = evidence.reading.nodes[value.operands[0]]
    if term.stream is not None:
        if value.kind != "item" or len(value.args) != 2 or value.args[1] != Const(term.stream):
            return False
        chunks = evidence.node(value.args[0])
        streams = evidence.plan.input.streams if evidence.plan.input else 0
        if chunks is None or chunks.target != CHUNK or chunks.args[1:] != (Const(streams),) or chunks.kwargs:
            return False
        value = evidence.reading.nodes[chunks.operands[0]]
    return value.index == feature


def _wrong_use(evidence: Evidence, value: Node, use: Use) -> Iterator[str]:
    """Check that a head reads a shared block as declared: detached, or with its gradient scaled, or as it is."""
    scale, is_detached, shared = 1.0, False, value
    if value.kind == "detach":
        is_detached, shared = True, evidence.reading.nodes[value.operands[0]]
    elif value.kind == "function" and value.target == SCALE_GRADIENT:
        factor = value.args[1] if len(value.args) == 2 else None
        scale = factor.value if isinstance(factor, Const) else math.nan
        shared = evidence.reading.nodes[value.operands[0]]
    if shared.kind != "module" or shared.target != f"heads.{use.block}" or shared.args or shared.kwargs:
        yield f"reads {evidence.told(value.index)}, not the value of {use.block}"
    elif is_detached != use.detached:
        stated = "detached" if use.detached else "with its history"
        yield f"is declared to read {use.block} {stated}, and reads {evidence.told(value.index)}"
    elif not use.detached and scale != use.scale:
        yield f"is declared to scale its gradient to {use.block} by {use.scale!r}, not by {scale!r}"


def _is_head(node: Node) -> bool:
    return node.kind == "module" and (node.target == "heads" or node.target.startswith("heads."))


def _heads_of(evidence: Evidence, loss: int) -> set[int]:
    """Return the calls of heads and shared blocks that a loss is made of, up to the features of its segments."""
    seen, waiting = {loss}, [loss]
    while waiting:
        for operand in evidence.reading.nodes[waiting.pop()].operands:
            if operand not in seen and operand not in evidence.features:
                seen.add(operand)
                waiting.append(operand)
    return {node for node in seen if _is_head(evidence.reading.nodes[node])}


# ------------------------------------------------------------------------------------------------ order and results


def _order_at_end(evidence: Evidence, actions: list[tuple[int, Event]]) -> Iterator[str]:
    quote = evidence.reading.quote
    if not actions or actions[-1][1].kind != "update" or actions[-1][1].index is not None:
        yield f"the last action is not optimizer.step(): {quote(actions[-1][1].line) if actions else 'nothing'}"
    for _, event in actions[:-1]:
        if event.kind != "backward":
            yield f"{quote(event.line)}: between the first zero_grad and the last step there are only backwards"
    last_run = max((run.leave for run in evidence.runs), default=-1)
    if actions and actions[-1][0] < last_run:
        yield f"{quote(actions[-1][1].line)}: parameters are updated before the last segment has run"


def _order_immediate(evidence: Evidence, actions: list[tuple[int, Event]]) -> Iterator[str]:
    quote = evidence.reading.quote
    events, micro_batch = evidence.reading.events, evidence.plan.micro_batch
    numbers = {evidence.losses.get(loss.name): i for i, loss in enumerate(evidence.plan.losses)}
    expected: list[int] = []
    for position, event in actions:
        if event.kind != "backward":
            continue
        number = numbers.get(event.inputs[0])
        if number is None:
            continue
        later = range(position + 1, len(events))
        behind = list(itertools.islice((i for i in later if not (micro_batch and events[i].kind == "leave")), 2))
        following = [(events[i].kind, events[i].index) for i in behind]
        if following != [("update", number), ("zero_grad", number)]:
            yield (
                f"{quote(event.line)}: is not directly followed by optimizer[{number}].step() and "
                f"optimizer[{number}].zero_grad()"
            )
        expected += [position, *behind]
    for position, event in actions:
        if position not in expected:
            yield f"{quote(event.line)}: is not part of the backward, step, zero_grad of one loss"


def _returned(reading: Reading, part: int) -> dict[str, Any]:
    """Return one of the two dicts that the driver returns, or nothing where it does not."""
    value = reading.results
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[part], dict):
        return value[part]
    return {}


def _is_plain_detach(evidence: Evidence, value: Ref) -> bool:
    node = evidence.reading.nodes[value.node]
    return node.kind == "detach" and evidence.origin(value.node)[0] == node.operands[0]


def _is_plain_argmax(evidence: Evidence, value: Ref) -> bool:
    """Tell whether a value is the class of the highest score, of scores that nothing was done to."""
    node = evidence.reading.nodes[value.node]
    plain = node.kind == "method" and node.target == "argmax" and node.args[1:] == (Const(1),) and not node.kwargs
    return plain and evidence.origin(node.operands[0])[0] == node.operands[0]


_KEPT: Mapping[str, tuple[Callable[[Evidence, Ref], bool], str]] = {
    "all": (_is_plain_detach, "class scores"),
    "argmax": (_is_plain_argmax, "predicted classes"),
    "none": (_is_plain_detach, ""),
}
"""By what a step keeps of class scores: what it returns, and what that is called."""


def _wrong_scores(evidence: Evidence, loss: LocalLoss, value: Any) -> Iterator[str]:
    declared = next((i for i, term in reversed(list(enumerate(loss.terms))) if term.scores), None)
    if evidence.plan.scores == "none":
        return
    if declared is None:
        if value != Const(None):
            yield f"{loss.name} declares no class scores, and returns some"
        return
    node = evidence.losses.get(loss.name)
    if node is not None and (loss.part is not None or evidence.plan.micro_batch):
        node, _ = _share_of(evidence, loss, node)
    summands = list(_summands(evidence, node)) if node is not None else []
    if declared >= len(summands) or not isinstance(value, Ref):
        yield f"{loss.name} returns no class scores"
        return
    term = evidence.reading.nodes[summands[declared][1]]
    prediction = evidence.node(term.args[0]) if term.args else None
    origin, _, _ = evidence.origin(value.node)
    if evidence.plan.scores == "argmax" and _is_plain_argmax(evidence, value):
        origin = evidence.reading.nodes[value.node].operands[0]
    if prediction is None or origin != prediction.index:
        wanted = evidence.told(prediction.index if prediction else None)
        yield f"the scores of {loss.name} are {evidence.told(origin)}, not {wanted}"


# ---------------------------------------------------------------------------------------------------------- helpers


def verdict(id: str, claim: str, wrong: Iterable[str], evidence: str) -> Check:
    """Return a check that holds if nothing is wrong, and else prints what is, the most telling first."""
    lines = list(dict.fromkeys(wrong))
    if not lines:
        return Check(id, True, claim, evidence)
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], f"and {len(lines) - MAX_LINES + 1} more"]
    return Check(id, False, claim, "\n".join(lines))


def _mixed(lines: list[str]) -> list[str]:
    """Put the first leak and the first dead weight in front, so that neither hides the other."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for line in lines:
        kinds[":".join(line.split(" ")[:1])].append(line)
    return [*(group[0] for group in kinds.values()), *(line for group in kinds.values() for line in group[1:])]


def _some(names: Iterable[str]) -> str:
    """List names, at most six of them."""
    names = list(names)
    shown = ", ".join(names[:6])
    return f"{shown} and {len(names) - 6} more" if len(names) > 6 else shown or "none"


def _functions(plan: Plan) -> frozenset[str]:
    """Return the dotted names of the functions that graphs and losses call."""
    found = {term.loss for loss in plan.losses for term in loss.terms}
    for segment in plan.segments.segments:
        for node in segment.graph.nodes:
            module = getattr(node.target, "__module__", None) if node.op == "call_function" else None
            if module not in (None, "builtins", "_operator"):
                found.add(f"{module}.{getattr(node.target, '__qualname__', '')}")
    return frozenset(found)
