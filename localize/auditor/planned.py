"""Write the plan of a step down as operations, to be compared with the text of ``train_step`` and what it calls.

Each loss runs the segments of its route on what enters it, applies its heads, sums its terms, is differentiated, and
passes detached values on. How a text divides this into functions is its own affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from localize.auditor.names import OPS, Vocabulary
from localize.auditor.operations import Const, Group, Operation, constant
from localize.auditor.recorded import Wanted
from localize.ir import LocalLoss, Plan, Segment, Term, Use


def step_operations(plan: Plan, words: Vocabulary) -> Wanted:
    """Return the operations of a training step, in order."""
    return _Step(plan, words).run()


class _Step:
    def __init__(self, plan: Plan, words: Vocabulary) -> None:
        self.plan, self.words = plan, words
        self.operations: list[Operation] = []
        self.loss = ""
        self.inputs = tuple(Operation("input", argument.name) for argument in plan.segments.trunk.inputs)
        self.y = Operation("input", "y")
        self.passed_on = _passed_on(plan)
        self.losses: list[Any] = []
        self.scores: list[Any] = []

    def run(self) -> Wanted:
        """Go through the losses."""
        self._act("zero_grad")
        first: tuple[Any, ...] = self.inputs
        if self.plan.input is not None:
            first = (self._head(self.plan.input.block, (self.inputs[0], self.y)),)
        if self.plan.waits:
            self._behind_the_forward(first)
        else:
            self._loss_by_loss(first)
        self.loss = ""
        if self.plan.pull == "before":
            self._pulls()
        if self.plan.update == "end":
            self._act("step")
        if self.plan.pull == "after":
            self._pulls()
        scores = Group("dict", ()) if self.plan.scores == "none" else self._by_name(self.scores)
        returned = Group("tuple", (self._by_name(self.losses), scores))
        return Wanted((*self.inputs, self.y), tuple(self.operations), returned)

    def _by_name(self, values: Sequence[Any]) -> Group:
        pairs = zip(self.plan.losses, values, strict=True)
        return Group("dict", tuple(part for loss, value in pairs for part in (Const(loss.name), value)))

    def _pulls(self) -> None:
        for copy in self.plan.copies:
            if copy.decay is not None:
                pulled = self.words.model.module(f"heads.{copy.block}.{copy.part}".rstrip("."))
                source = self.words.model.module(f"{copy.of}.{copy.source}")
                self._made("pull", f"{OPS}pull", (Const(pulled), Const(source), Const(copy.decay)))

    # -- losses

    def _loss_by_loss(self, first: tuple[Any, ...]) -> None:
        entering: dict[int, tuple[Any, ...]] = {0: first}
        parts = self._parts()
        for number, loss in enumerate(self.plan.losses):
            self.loss = loss.name
            for k in self.plan.run_before(number):
                entering[k + 1] = self._passed(k, self._run(self.plan.segments.segments[k], entering[k]))
            values, labels, images = entering[loss.route.start], self.y, self.inputs[0]
            if loss.part is not None:
                *own, labels = (self._item(whole, loss.part[0]) for whole in parts)
                values, images = tuple(own), own[0]
            passed = self._train(number, loss, values, labels, images)
            for k, crossing in passed.items():
                entering[k + 1] = crossing

    def _train(
        self, number: int, loss: LocalLoss, entering: tuple[Any, ...], labels: Any, images: Any
    ) -> dict[int, tuple[Any, ...]]:
        """Write down one loss; return what it passes on, by the segment that it leaves."""
        size, in_parts, exact = self.plan.part_size(loss), bool(self.plan.micro_batch), self.plan.exact
        kind = "exact" if exact else "micro"
        if in_parts:
            wants_images = any(t.target.of == "images" for t in loss.terms)
            enter = loss.route.start == 0 and self.plan.input is None
            batch = (*entering, *((images,) if wants_images and not enter else ()), labels)
            keep = self.plan.keeps(loss)
            self._made(kind, "begins", (Const(size), *batch), (("keep", Const(keep)),) if keep else ())
            of = {id(value): Operation("part", str(size), (value,)) for value in batch}
            entering, labels = tuple(of[id(value)] for value in entering), of[id(labels)]
            images = of.get(id(images), images)
        features = self._route(loss, entering)
        value, scores = self._terms(loss, features, entering, labels, images, None)
        classes = self._classes(scores)
        if not exact:
            self._backward(value)
        if self.plan.update == "immediate" and not in_parts:
            self._act("step", number)
            self._act("zero_grad", number)
        passed = {k: self._passed(k, features[k]) for k in self.passed_on.get(number, ())}
        if exact:
            self._backward(value)
        kept = [self._detach(value), self._kept(scores, classes)]
        if in_parts:
            passed = {k: tuple(map(_gathered, values)) for k, values in passed.items()}
            kept = [_gathered(one) for one in kept]
            self._made(kind, "ends")
        self.losses.append(kept[0])
        self.scores.append(kept[1])
        if self.plan.update == "immediate" and in_parts:
            self._act("step", number)
            self._act("zero_grad", number)
        return passed

    def _behind_the_forward(self, first: tuple[Any, ...]) -> None:
        """Write down losses that wait for the error of the output."""
        entering = {0: first}
        features: dict[int, tuple[Any, ...]] = {}
        for segment in self.plan.segments.segments:
            k = segment.index
            features[k] = self._run(segment, entering[k])
            entering[k + 1] = self._passed(k, features[k])
        last = len(self.plan.segments) - 1
        error = self._made("function", f"{OPS}output_error", (features[last][0], self.y))
        for loss in self.plan.losses:
            self.loss = loss.name
            k = loss.route.start
            value, scores = self._terms(loss, {k: features[k]}, entering[k], self.y, self.inputs[0], error)
            classes = self._classes(scores)
            self._backward(value)
            self.losses.append(self._detach(value))
            self.scores.append(self._kept(scores, classes))

    def _classes(self, scores: Any) -> Any:
        """Return the class of the highest score, where the step keeps no more of them."""
        if scores is None or self.plan.scores != "argmax":
            return Const(None)
        return self._made("method", "argmax", (scores, Const(1)))

    def _kept(self, scores: Any, classes: Any) -> Any:
        """Return what the step returns of class scores."""
        return self._detach(scores) if scores is not None and self.plan.scores == "all" else classes

    def _parts(self) -> list[Operation]:
        """Return the split inputs and labels of a plan that takes the batch in parts."""
        count = max((loss.part[1] for loss in self.plan.losses if loss.part), default=1)
        if count == 1:
            return []
        wholes, split = (*self.inputs, self.y), self.words.functions.add_named("torch.tensor_split")
        return [self._made("function", split, (whole, Const(count))) for whole in wholes]

    # -- segments

    def _route(self, loss: LocalLoss, entering: tuple[Any, ...]) -> dict[int, tuple[Any, ...]]:
        """Run the segments of a route; return what each returns."""
        features = {}
        for segment in self.plan.segments.segments[loss.route.start : loss.route.stop + 1]:
            features[segment.index] = self._run(segment, entering)
            if segment.index < loss.route.stop:
                entering = tuple(
                    self._made("method", "clone", (value,)) if name in segment.cloned else value
                    for value, name in zip(features[segment.index], segment.outputs, strict=False)
                )
        return features

    def _run(self, segment: Segment, entering: tuple[Any, ...]) -> tuple[Any, ...]:
        """Write the call of a segment down; return what leaves it, and the model's further outputs after."""
        how = "recompute" if segment.name in self.plan.recompute else ""
        how = "without gradient" if segment.name in self.plan.frozen else how
        called = self._made("segment", segment.name, entering, how=how)
        count = len(segment.outputs) + len(segment.sides)
        return (called,) if count == 1 else tuple(self._item(called, j) for j in range(count))

    def _passed(self, k: int, features: tuple[Any, ...]) -> tuple[Any, ...]:
        segment = self.plan.segments.segments[k]
        values = []
        for value, name in zip(features, segment.outputs, strict=False):
            detached = self._detach(value)
            values.append(self._made("method", "clone", (detached,)) if name in segment.cloned else detached)
        return tuple(values)

    # -- terms

    def _terms(
        self,
        loss: LocalLoss,
        features: dict[int, tuple[Any, ...]],
        entering: tuple[Any, ...],
        labels: Any,
        images: Any,
        error: Any,
    ) -> tuple[Any, Any]:
        """Write the sum of a loss's terms down; return it, and its class scores."""
        total: Any = None
        scores: Any = None
        made_of = {"labels": (labels,), "images": (images,), "input": entering, "error": (error,)}
        for term in loss.terms:
            at = loss.route.stop if term.at is None else term.at
            segment = self.plan.segments.segments[at]
            read = self._read(term, segment, features[at])
            prediction = read[0] if term.head is None else self._prediction(term, read, labels)
            target = made_of[term.target.of]
            if term.target.block is not None:
                target = (self._head(term.target.block, target),)
            options = {key: constant(value) for key, value in term.options}
            if term.weights is not None:
                options["weight"] = self._head(term.weights, ())
            name = self.words.functions.add_named(term.loss)
            value = self._made("function", name, (prediction, target[0]), tuple(sorted(options.items())))
            if term.weight != 1.0:
                value = self._made("operator", "mul", (Const(term.weight), value))
            total = value if total is None else self._made("operator", "add", (total, value))
            if term is loss.scored:
                scores = prediction
        if loss.part is not None:
            total = self._made("function", f"{OPS}share", (total, labels, self.y))
        elif self.plan.micro_batch:
            share = Operation("share", "share", (Const(self.plan.part_size(loss)),))
            total = self._made("operator", "mul", (share, total))
        return total, scores

    def _read(self, term: Term, segment: Segment, returned: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return what a term reads of a segment's values."""
        if term.side is not None:
            read: tuple[Any, ...] = (returned[len(segment.outputs) + segment.sides.index(term.side)],)
        else:
            read = returned[: len(segment.outputs) - len(segment.handed_on)]
        if term.stream is not None and self.plan.input is not None:
            chunk, count = self.words.functions.add_named("torch.chunk"), Const(self.plan.input.streams)
            read = tuple(self._item(self._made("function", chunk, (value, count)), term.stream) for value in read)
        return tuple(self._detach(value) for value in read) if term.detached else read

    def _prediction(self, term: Term, read: tuple[Any, ...], labels: Any) -> Operation:
        shared = [self._shared(use) for use in term.uses]
        how = "recompute" if term.head in self.plan.recompute else ""
        return self._head(term.head or "", (*read, *shared, *((labels,) if term.labels else ())), how)

    def _shared(self, use: Use) -> Operation:
        value = self._head(use.block, ())
        if use.detached:
            return self._detach(value)
        if use.scale != 1.0:
            return self._made("function", f"{OPS}scale_gradient", (value, Const(use.scale)))
        return value

    # -- operations

    def _head(self, block: str, args: tuple[Any, ...], how: str = "") -> Operation:
        return self._made("module", self.words.model.module(f"heads.{block}"), args, how=how)

    def _detach(self, value: Any) -> Operation:
        return self._made("method", "detach", (value,))

    def _item(self, value: Any, j: int) -> Operation:
        return self._made("operator", "getitem", (value, Const(j)))

    def _backward(self, loss: Any) -> None:
        self._made("backward", "scaled" if self.plan.scaled else "", (loss,))

    def _act(self, what: str, number: int | None = None) -> None:
        self._made("optimizer", f"optimizer.{what}()" if number is None else f"optimizer[{number}].{what}()")

    def _made(
        self, kind: Any, target: str, args: tuple[Any, ...] = (), kwargs: tuple[Any, ...] = (), how: str = ""
    ) -> Operation:
        made = Operation(kind, target, args, kwargs, how=how, loss=self.loss)
        self.operations.append(made)
        return made


def _gathered(value: Any) -> Any:
    """Return what a value of each micro-batch becomes: all of them, put together."""
    return Operation("gathered", "gathered", (value,)) if isinstance(value, Operation) else value


def _passed_on(plan: Plan) -> dict[int, list[int]]:
    """Return the segments whose values each loss passes on, by the number of the loss.

    Where a loss starts after a segment, the values come from the last loss before it that runs that segment.
    """
    readers: dict[int, int] = {}
    for number, loss in enumerate(plan.losses):
        readers.setdefault(loss.route.start - len(plan.run_before(number)) - 1, number)
    last: dict[int, int] = {}
    for number, loss in enumerate(plan.losses):
        for k in range(loss.route.start, loss.route.stop + 1):
            if number < readers.get(k, 0):
                last[k] = number
    passed: dict[int, list[int]] = {}
    for k in sorted(last):
        passed.setdefault(last[k], []).append(k)
    return passed
