"""The forward of a whole training step as one fx graph, for those who work on graphs.

Segments are inlined as they were recorded, ``detach`` nodes stand at the cuts, heads are called, and losses and logits
are returned. Backwards and updates are none of a graph: :meth:`localize.LocalModel.step` has them.
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from localize import ops
from localize.ir import LocalLoss, Plan, Segment, Term, Use
from localize.reserved import path_in_head


def step_graph(local: nn.Module, plan: Plan) -> fx.GraphModule:
    """Return the forward of a step: a function of the inputs and the labels.

    Args:
        local: the module that ``trunk`` and ``heads`` are in; the result shares their parameters.
        plan: what is trained by what.

    Returns:
        A module that returns the losses by name, with their history, and the logits.
    """
    graph = _Step(local, plan).graph()
    root: Any = _renamed(local, graph)
    graph.lint()
    return fx.GraphModule(root, graph, class_name="StepForward")


def _renamed(local: nn.Module, graph: fx.Graph) -> nn.Module | dict[str, Any]:
    """Return what the targets of a graph are found in; fx writes paths as they are, so odd names are changed first."""
    held = [node for node in graph.nodes if node.op in ("call_module", "get_attr")]
    if all(path_in_head(node.target) == node.target for node in held):
        return local
    found = {}
    for node in held:
        parent, _, name = node.target.rpartition(".")
        node.target, value = path_in_head(node.target), getattr(local.get_submodule(parent), name)
        found[node.target] = value
    return found


class _Step:
    def __init__(self, local: nn.Module, plan: Plan) -> None:
        self.local, self.plan = local, plan
        self.made = fx.Graph()
        self.inputs = tuple(self.made.placeholder(argument.name) for argument in plan.segments.trunk.inputs)
        self.y = self.made.placeholder("y")
        self.losses: dict[str, fx.Node] = {}
        self.scores: dict[str, fx.Node | None] = {}

    def graph(self) -> fx.Graph:
        """Write all losses down."""
        first: tuple[fx.Node, ...] = self.inputs
        if self.plan.input is not None:
            first = (self._head(self.plan.input.block, (self.inputs[0], self.y)),)
        if self.plan.waits:
            self._after_the_forward(first)
        else:
            self._loss_by_loss(first)
        self.made.output((self.losses, self._logits()))
        return self.made

    def _logits(self) -> fx.Node | None:
        """Return the scores at the model's output, those of all parts after each other; else the deepest there are."""
        found = [score for loss in self.plan.outputs if (score := self.scores[loss.name]) is not None]
        found = found or [score for score in self.scores.values() if score is not None][-1:]
        return self.made.call_function(torch.cat, (found,)) if len(found) > 1 else next(iter(found), None)

    def _loss_by_loss(self, first: tuple[fx.Node, ...]) -> None:
        entering = {0: first}
        parts = max((loss.part[1] for loss in self.plan.losses if loss.part), default=1)
        wholes = (*self.inputs, self.y)
        split = [self.made.call_function(torch.tensor_split, (whole, parts)) for whole in wholes] if parts > 1 else []
        starts = [loss.route.start - len(self.plan.run_before(i)) for i, loss in enumerate(self.plan.losses)]
        first_at = {start: i for i, start in reversed(list(enumerate(starts)))}
        for number, loss in enumerate(self.plan.losses):
            for k in self.plan.run_before(number):
                segment = self.plan.segments.segments[k]
                entering[k + 1] = self._detached(segment, self._segment(segment, entering[k]))
            values, labels, images = entering[loss.route.start], self.y, self.inputs[0]
            if loss.part is not None:
                *taken, labels = (self._item(whole, loss.part[0]) for whole in split)
                values, images = tuple(taken), taken[0]
            features = {}
            running = values
            for segment in self.plan.segments.segments[loss.route.start : loss.route.stop + 1]:
                features[segment.index] = self._segment(segment, running)
                if number < first_at.get(segment.index + 1, -1):
                    entering[segment.index + 1] = self._detached(segment, features[segment.index])
                running = self._copied(segment, features[segment.index])
            self._loss(loss, features, values, labels, images, None)

    def _after_the_forward(self, first: tuple[fx.Node, ...]) -> None:
        entering, features = {0: first}, {}
        for segment in self.plan.segments.segments:
            features[segment.index] = self._segment(segment, entering[segment.index])
            entering[segment.index + 1] = self._detached(segment, features[segment.index])
        last = len(self.plan.segments) - 1
        error = self.made.call_function(ops.output_error, (features[last][0], self.y))
        for loss in self.plan.losses:
            k = loss.route.start
            self._loss(loss, {k: features[k]}, entering[k], self.y, self.inputs[0], error)

    # -- segments

    def _segment(self, segment: Segment, entering: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
        """Copy the recorded graph of a segment; return what leaves it, and the model's further outputs after that."""
        values: dict[fx.Node, Any] = {}
        left = list(entering)
        replaced = dict(self.plan.feedback)
        results: tuple[fx.Node, ...] = ()
        for node in segment.graph.nodes:
            if node.op == "placeholder":
                values[node] = left.pop(0)
            elif node.op == "output":
                returned = node.args[0] if isinstance(node.args[0], tuple | list) else (node.args[0],)
                results = tuple(values[one] for one in returned)
            elif node.op == "call_module" and node.target in replaced:
                values[node] = self._with_feedback(str(node.target), replaced[str(node.target)], values[node.args[0]])
            else:
                made = values[node] = self.made.node_copy(node, values.__getitem__)
                if node.op in ("call_module", "get_attr"):
                    made.target = f"trunk.{node.target}"
        if segment.name in self.plan.frozen:
            results = tuple(self._detach(value) for value in results)
        return results

    def _with_feedback(self, path: str, block: str, value: fx.Node) -> fx.Node:
        module = self.local.get_submodule(f"trunk.{path}")
        names = [name for name in ("weight", "bias") if getattr(module, name) is not None]
        return self._head(block, (value, *(self.made.get_attr(f"trunk.{path}.{name}") for name in names)))

    def _detached(self, segment: Segment, features: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
        return self._copied(segment, [self._detach(value) for value in features])

    def _copied(self, segment: Segment, values: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
        """Return what enters the next segment: copies of what that overwrites."""
        pairs = zip(values, segment.outputs, strict=False)
        return tuple(self.made.call_method("clone", (v,)) if name in segment.cloned else v for v, name in pairs)

    # -- losses

    def _loss(
        self,
        loss: LocalLoss,
        features: dict[int, tuple[fx.Node, ...]],
        entering: tuple[fx.Node, ...],
        labels: fx.Node,
        images: fx.Node,
        error: fx.Node | None,
    ) -> None:
        """Write a loss down: the sum of its terms."""
        total: fx.Node | None = None
        scores: fx.Node | None = None
        made_of: dict[str, tuple[Any, ...]] = {
            "labels": (labels,), "images": (images,), "input": entering, "error": (error,),
        }  # fmt: skip
        for term in loss.terms:
            at = loss.route.stop if term.at is None else term.at
            read = self._read(term, self.plan.segments.segments[at], features[at])
            prediction = read[0] if term.head is None else self._prediction(term, read, labels)
            target = made_of[term.target.of]
            if term.target.block is not None:
                target = (self._head(term.target.block, target),)
            options: dict[str, Any] = dict(term.options)
            if term.weights is not None:
                options["weight"] = self._head(term.weights, ())
            value = self.made.call_function(_imported(term.loss), (prediction, target[0]), options)
            if term.weight != 1.0:
                value = self.made.call_function(operator.mul, (term.weight, value))
            total = value if total is None else self.made.call_function(operator.add, (total, value))
            scores = prediction if term is loss.scored else scores
        assert total is not None, f"{loss.name} has no terms"
        if loss.part is not None:
            total = self.made.call_function(ops.share, (total, labels, self.y))
        self.losses[loss.name] = total
        self.scores[loss.name] = None if scores is None else self._detach(scores)

    def _read(self, term: Term, segment: Segment, returned: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
        if term.side is not None:
            read: tuple[fx.Node, ...] = (returned[len(segment.outputs) + segment.sides.index(term.side)],)
        else:
            read = returned[: len(segment.outputs) - len(segment.handed_on)]
        if term.stream is not None and self.plan.input is not None:
            chunks = [self.made.call_function(torch.chunk, (value, self.plan.input.streams)) for value in read]
            read = tuple(self._item(chunk, term.stream) for chunk in chunks)
        return tuple(self._detach(value) for value in read) if term.detached else read

    def _prediction(self, term: Term, read: tuple[fx.Node, ...], labels: fx.Node) -> fx.Node:
        shared = [self._shared(use) for use in term.uses]
        return self._head(term.head or "", (*read, *shared, *((labels,) if term.labels else ())))

    def _shared(self, use: Use) -> fx.Node:
        value = self._head(use.block, ())
        if use.detached:
            return self._detach(value)
        return value if use.scale == 1.0 else self.made.call_function(ops.scale_gradient, (value, use.scale))

    def _head(self, block: str, args: tuple[Any, ...]) -> fx.Node:
        return self.made.call_module(f"heads.{block}", args)

    def _detach(self, value: fx.Node) -> fx.Node:
        return self.made.call_method("detach", (value,))

    def _item(self, value: fx.Node, number: int) -> fx.Node:
        return self.made.call_function(operator.getitem, (value, number))


def _imported(dotted: str) -> Any:
    """Return the function of a dotted name, which the plan has found before."""
    home, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(home), name)
