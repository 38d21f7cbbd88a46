"""The losses of a plan, computed from the recorded graphs and not from the text.

A loss of the plan is: take the detached values that enter its route, run the recorded graphs of its segments, apply its
heads, sum its terms. That is all of it, so it is written a second time here, over ``fx.Interpreter``, as the reference
for what the generated text did.
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from localize.ir import LocalLoss, Plan, Term, Use


@dataclass(frozen=True)
class Evaluation:
    """One loss on one batch, with all that is needed to compute it again."""

    loss: LocalLoss
    value: Tensor
    scores: Tensor | None
    batch: Batch
    entering: tuple[Tensor, ...]
    """Detached values that enter the route."""
    features: Mapping[int, tuple[Tensor, ...]]
    """What each segment of the route returns, by its index: values that leave it, and the model's further outputs."""
    error: Tensor | None
    """Error of the model's output, for targets that are made of it."""
    before: RandomState
    """State of the random generators before the segments run."""
    between: RandomState
    """The same, between segments and heads."""

    def without_history(self) -> Evaluation:
        """Return the same values, detached: what was saved for backward is let go."""
        return replace(
            self,
            value=self.value.detach(),
            scores=None if self.scores is None else self.scores.detach(),
            features={k: tuple(value.detach() for value in values) for k, values in self.features.items()},
        )


@dataclass(frozen=True)
class Batch:
    """The inputs and class ids that a loss is computed on, and how large a share of the batch they are."""

    inputs: tuple[Tensor, ...]
    y: Tensor
    share: float = 1.0


class Reference:
    """A plan over modules of one's own: evaluates its losses."""

    def __init__(self, plan: Plan, trunk: nn.Module, heads: nn.Module, device: torch.device) -> None:
        self.plan, self.trunk, self.heads, self.device = plan, trunk, heads, device

    def run(self, inputs: tuple[Tensor, ...], y: Tensor) -> Iterator[Evaluation]:
        """Yield every loss, in the order of the plan."""
        first = inputs
        if self.plan.input is not None:
            first = (self.heads.get_submodule(self.plan.input.block)(inputs[0], y),)
        if self.plan.waits:
            yield from self._behind_the_forward(first, Batch(inputs, y))
            return
        passed: dict[int, tuple[Tensor, ...]] = {0: first}
        for i, loss in enumerate(self.plan.losses):
            for k in self.plan.run_before(i):
                with torch.no_grad():
                    returned = self.segment(k, passed[k])
                passed[k + 1] = tuple(value.clone() for value in self.leaving(k, returned))
            batch, entering = Batch(inputs, y), passed.get(loss.route.start, first)
            if loss.part is not None:
                number, parts = loss.part
                *own, labels = (torch.tensor_split(whole, parts)[number] for whole in (*inputs, y))
                batch, entering = Batch(tuple(own), labels, len(labels) / len(y)), tuple(own)
            before = RandomState.now(self.device)
            features = self.segments(loss, entering)
            for index, values in features.items():
                passed[index + 1] = tuple(value.detach().clone() for value in self.leaving(index, values))
            yield self._evaluated(loss, batch, entering, features, None, before)

    def _behind_the_forward(self, first: tuple[Tensor, ...], batch: Batch) -> Iterator[Evaluation]:
        """Yield every loss of a plan whose losses need the error of the output."""
        entering, before, features = {0: first}, {}, {}
        for index in range(len(self.plan.segments)):
            before[index] = RandomState.now(self.device)
            features[index] = self.segment(index, entering[index])
            entering[index + 1] = tuple(value.detach().clone() for value in self.leaving(index, features[index]))
        scores = features[len(self.plan.segments) - 1][0].detach()
        y = batch.y if batch.y.is_floating_point() else nn.functional.one_hot(batch.y, scores.shape[1])
        error = torch.softmax(scores, 1) - y.to(scores.dtype)
        for loss in self.plan.losses:
            k = loss.route.stop
            yield self._evaluated(loss, batch, entering[k], {k: features[k]}, error, before[k])

    def _evaluated(
        self,
        loss: LocalLoss,
        batch: Batch,
        entering: tuple[Tensor, ...],
        features: Mapping[int, tuple[Tensor, ...]],
        error: Tensor | None,
        before: RandomState,
    ) -> Evaluation:
        between = RandomState.now(self.device)
        blank = Evaluation(loss, torch.empty(0), None, batch, entering, features, error, before, between)
        value, scores = self.terms(blank, features)
        return replace(blank, value=value, scores=scores)

    def segments(self, loss: LocalLoss, entering: Sequence[Tensor]) -> dict[int, tuple[Tensor, ...]]:
        """Run the route of ``loss``; return what each of its segments returns."""
        features = {}
        values = tuple(entering)
        for index in range(loss.route.start, loss.route.stop + 1):
            features[index] = self.segment(index, values)
            values = self.leaving(index, features[index])
        return features

    def leaving(self, index: int, returned: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return those of a segment's values that enter the next."""
        return tuple(returned[: len(self.plan.segments.segments[index].outputs)])

    def segment(self, index: int, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run the recorded graph of a segment. It may write into its inputs, so it gets copies of them."""
        graph = self.plan.segments.segments[index].graph
        copies = [value.clone() for value in values]
        result = _Recorded(self.trunk, graph, self.heads, dict(self.plan.feedback)).run(*copies)
        return tuple(result) if isinstance(result, tuple | list) else (result,)

    def terms(
        self,
        here: Evaluation,
        features: Mapping[int, Sequence[Tensor]],
        fixed: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return a loss on these features, and its class scores.

        ``fixed`` holds the values of shared blocks around which a finite difference is taken; what a term reads
        detached, and what it is compared with, then stays as it is in ``here``.
        """
        loss = here.loss
        total: Tensor | None = None
        scores: Tensor | None = None
        for term in loss.terms:
            at = loss.route.stop if term.at is None else term.at
            returned = here.features[at] if term.detached else features[at]
            segment = self.plan.segments.segments[at]
            read: Sequence[Tensor] = returned[: len(segment.features) or 1]  # after them, inputs that are handed on
            if term.side is not None:
                read = [returned[len(segment.outputs) + segment.sides.index(term.side)]]
            if term.stream is not None and self.plan.input is not None:
                read = [value.chunk(self.plan.input.streams)[term.stream] for value in read]
            if term.detached:
                read = [value.detach() for value in read]
            prediction = self._prediction(term, read, here.batch.y, fixed)
            options: dict[str, Any] = dict(term.options)
            if term.weights is not None:
                options["weight"] = self.heads.get_submodule(term.weights)()
            summand = function_named(term.loss)(prediction, self._target(term, here), **options)
            summand = summand if term.weight == 1.0 else term.weight * summand
            total = summand if total is None else total + summand
            if term is loss.scored:
                scores = prediction
        assert total is not None, f"{loss.name} has no terms"
        return total if loss.part is None else total * here.batch.share, scores

    def _target(self, term: Term, here: Evaluation) -> Tensor:
        values: dict[str, tuple[Any, ...]] = {
            "labels": (here.batch.y,),
            "images": here.batch.inputs[:1],
            "input": here.entering,
            "error": (here.error,),
        }
        found = values[term.target.of]
        target: Tensor = found[0] if term.target.block is None else self.heads.get_submodule(term.target.block)(*found)
        return target

    def _prediction(self, term: Term, features: Sequence[Tensor], y: Tensor, fixed: dict[str, Tensor] | None) -> Tensor:
        if term.head is None:
            return features[0]
        shared = [self._shared(use, fixed) for use in term.uses]
        return self.heads.get_submodule(term.head)(*features, *shared, *([y] if term.labels else []))

    def _shared(self, use: Use, fixed: dict[str, Tensor] | None) -> Tensor:
        """Return the value of a shared block, of which ``scale`` times the change (none if detached) is felt."""
        value = self.heads.get_submodule(use.block)()
        still = value.detach() if fixed is None else fixed[use.block]
        if use.detached:
            return still
        return value if use.scale == 1.0 else still + use.scale * (value - still)


class _Recorded(fx.Interpreter):
    """Run a recorded graph; modules with a replaced backward are computed by their block."""

    def __init__(self, trunk: nn.Module, graph: fx.Graph, heads: nn.Module, feedback: dict[str, str]) -> None:
        super().__init__(trunk, graph=graph)
        self.heads, self.feedback = heads, feedback

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a module of the trunk, or the block that stands for it."""
        if target not in self.feedback:
            return super().call_module(target, args, kwargs)
        module = self.fetch_attr(target)
        weights = [w for w in (module.weight, module.bias) if w is not None]
        return self.heads.get_submodule(self.feedback[target])(*args, *weights)


@dataclass(frozen=True)
class RandomState:
    """State of torch's random generators: of the CPU, and of the device where that is another."""

    cpu: Tensor
    device: torch.device
    cuda: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        """Return the present state."""
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), device, cuda)

    def restore(self) -> None:
        """Make this the present state."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


def function_named(dotted: str) -> Callable[..., Any]:
    """Import a function by its dotted name.

    Raises:
        ImportError: there is no such module.
        AttributeError: the module has no such function.
    """
    parts = dotted.split(".")
    for count in range(len(parts) - 1, 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        return operator.attrgetter(".".join(parts[count:]))(module)
    raise ImportError(f"no module of {dotted!r} can be imported")
