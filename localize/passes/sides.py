"""Train a model's further outputs as its own loss does: a pass from a plan to a plan, after the method's design.

::

    L_i  ->  L_i + w CE(auxiliary scores, labels)        for the loss that trains the segment that makes them

A further output (:class:`localize.ir.Side`) is computed in the segment whose values it reads, and its cross-entropy is
added to the loss that trains this segment, with the weight that the model's own loss gives it. With one segment that is
the model's own loss. Where this does not fit, the output is left out, and the plan says why.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import fx, nn

from localize.cutting.split import Pieces
from localize.errors import OptionError, did_you_mean
from localize.graph.operations import operation_kind, parameters_of
from localize.heads import blocks
from localize.ir import Block, LocalLoss, Plan, Segments, Side, Term, Trunk, facts


def attach(plan: Plan, weights: Mapping[str, float]) -> Plan:
    """Return a plan whose losses train the further outputs of the model as well.

    Args:
        plan: what a method has made.
        weights: of the cross-entropy on further outputs, by their names; the others keep their own. 0 leaves one out.

    Raises:
        OptionError: the model has no further output of this name, or a weight is below 0 or not finite.
    """
    trunk = plan.segments.trunk
    _check(weights, trunk)
    for side in trunk.sides:
        side = replace(side, weight=float(weights.get(side.name, side.weight)))
        place = _Place(plan, side)
        why = "its weight is 0" if side.weight == 0 else _obstacle(plan) or place.obstacle
        told = f"The model's further output {side.name} is not trained: {why}."
        plan = replace(plan, deviations=(*plan.deviations, told)) if why else place.attached()
    return plan


def _check(weights: Mapping[str, float], trunk: Trunk) -> None:
    names = [side.name for side in trunk.sides]
    for name, weight in weights.items():
        if name not in names:
            raise OptionError(
                f"{trunk.name} has no further output {name!r} in train mode.",
                facts=f"it has {', '.join(names) or 'none'}: outputs of the shape of the logits, besides them.",
                help=did_you_mean(name, names) or f"leave {name!r} out of outputs",
                option="outputs",
            )
        if not math.isfinite(weight) or weight < 0:
            raise OptionError(
                f"output {name!r} cannot have the weight {weight!r}.",
                help="0 or more; 0 leaves it out",
                option="outputs",
            )


def _obstacle(plan: Plan) -> str:
    """Say why this plan trains no further output, or nothing."""
    if plan.input is not None:
        return "what enters the first segment is not the images alone"
    if plan.waits:
        return "the losses wait for the error of the logits"
    return "the backward of the model's layers is replaced" if plan.feedback else ""


class _Place:
    """Where a further output is made, and which losses train it."""

    def __init__(self, plan: Plan, side: Side) -> None:
        self.plan, self.side = plan, side
        self.trunk = plan.segments.trunk
        assert self.trunk.whole is not None, "a model with further outputs has a graph with them"
        nodes = list(self.trunk.whole.nodes)
        self.order = {node.name: i for i, node in enumerate(nodes)}
        self.own = [node for node in nodes if node.name in side.nodes]
        self.main = [node for node in nodes if not any(node.name in other.nodes for other in self.trunk.sides)]
        self.ends = [self.order[cut.after] for cut in plan.segments.layout.cuts]
        parents = [parent for node in self.own for parent in node.all_input_nodes]
        read = parents if self.own else [node for node in nodes if node.name == side.value]
        self.read = [node for node in read if facts(node).depends and node.name not in side.nodes]
        self.segment = plan.segments.segments[max((self._made(node) for node in self.read), default=0)]

    def _made(self, node: fx.Node) -> int:
        """Return the index of the segment that makes a value."""
        return sum(end < self.order[node.name] for end in self.ends)

    @property
    def losses(self) -> list[LocalLoss]:
        """The losses that train the segment: of several, the one that starts nearest to it; on parts of the batch, all.

        A segment that several losses run makes the output every time, but only one of them trains it.
        """
        k = self.segment.index
        found = [x for x in self.plan.losses if self.segment.name in x.reach and x.route.start <= k <= x.route.stop]
        if not found:
            return []
        nearest = max(found, key=lambda loss: (loss.route.start, -loss.route.stop))
        return [loss for loss in found if loss is nearest or (loss.part and loss.route == nearest.route)]

    @property
    def obstacle(self) -> str:
        """Say why the output cannot be trained in its segment, or nothing."""
        if not self.losses:
            return f"no loss trains {self.segment.name}, which makes it"
        late = [n.name for n in self.read if self._made(n) < self.segment.index and n.name not in self.segment.inputs]
        if late:
            return f"it reads {late[0]}, which does not enter {self.segment.name}, as well as values made there"
        moved = [node for node in self.own if self._made(node) != self.segment.index]
        if moved and self._writes(moved):
            return f"it is computed outside of {self.segment.name}, where its values are overwritten"
        if any(_draws(node) for node in moved):
            return f"it draws random numbers outside of {self.segment.name}"
        shared = self._shared()
        return f"it shares parameter {shared} with another part of the model" if shared else ""

    def _writes(self, moved: Sequence[fx.Node]) -> bool:
        """Tell whether nodes that were recorded outside of the segment would read, or write, other values in it."""
        k, places = self.segment.index, [self.order[node.name] for node in moved]
        first, last = [-1, *self.ends][k], [*self.ends, len(self.order)][k]
        before = [n for n in self.main if min(places) < self.order[n.name] <= first]
        behind = [n for n in self.main if last < self.order[n.name] < max(places)]
        passed = (*before, *behind)
        written = {storage for node in passed for storage in facts(node).mutates}
        writes = {storage for node in moved for storage in facts(node).mutates}
        read = {facts(node).storage for node in self.read}
        return bool(written & read or writes & {facts(node).storage for node in self.main})

    def _parameters(self) -> dict[int, nn.Parameter]:
        found = (p for node in self.own for p in parameters_of(node, self.trunk.model).values())
        return {id(parameter): parameter for parameter in found}

    def _shared(self) -> str:
        """Return the name of a trainable parameter that another segment, or a further output made there, needs too."""
        own = self._parameters()
        for segment in self.plan.segments.segments:
            for node in segment.graph.nodes if segment.index != self.segment.index else ():
                for name, parameter in parameters_of(node, self.trunk.model).items():
                    if id(parameter) in own and parameter.requires_grad:
                        return name
        return ""

    def attached(self) -> Plan:
        """Return the plan with the output made in its segment, and trained."""
        plan, side, losses = self.plan, self.side, self.losses
        segments = _with_side(plan.segments, self.segment.index, side)
        block = self._block()
        k = self.segment.index
        changed = []
        for loss in plan.losses:
            if loss in losses:
                at = None if k == loss.route.stop else k
                term = Term(blocks.CROSS_ENTROPY, weight=side.weight, scores=False, at=at, side=side.name)
                reach = (*loss.reach, block.name) if block.parameters else loss.reach
                loss = replace(loss, terms=(*loss.terms, term), reach=reach)
            changed.append(loss)
        return replace(plan, segments=segments, blocks=(*plan.blocks, block), losses=tuple(changed))

    def _block(self) -> Block:
        """Return the parameters that the segment does not have without the output."""
        names = {id(p): f"trunk.{name}" for name, p in self.trunk.model.named_parameters()}
        taken = {name for block in self.plan.blocks for name in block.parameters}
        own = self._parameters().values()
        return Block(
            f"side_{self.side.name}",
            "side",
            tuple(names[id(p)] for p in own if p.requires_grad and names[id(p)] not in taken),
            sum(p.numel() for p in own if names[id(p)] not in taken),
            macs=sum(facts(node).macs for node in self.own),
            fvcore_flops=sum(facts(node).fvcore_flops for node in self.own),
            facts={"segment": self.segment.index},
        )


def _draws(node: fx.Node) -> bool:
    """Tell whether a node that is not a module draws random numbers."""
    return node.op != "call_module" and operation_kind(node, None) == "dropout"


def _with_side(segments: Segments, index: int, side: Side) -> Segments:
    """Return the segments with a further output made in the segment number ``index``."""
    trunk, segment = segments.trunk, segments.segments[index]
    cuts = [None, *segments.layout.cuts, None]
    names = (*segment.sides, side.name)
    sides = [other for name in names for other in trunk.sides if other.name == name]
    graph = Pieces(trunk).between(cuts[index], cuts[index + 1], sides)
    changed = replace(segment, graph=graph, sides=names)
    used = {id(p) for node in graph.nodes for p in parameters_of(node, trunk.model).values()}
    found = dict(trunk.model.named_parameters())
    unused = tuple(name for name in segments.unused if id(found[name.removeprefix("trunk.")]) not in used)
    others = segments.segments
    return replace(segments, segments=(*others[:index], changed, *others[index + 1 :]), unused=unused)
