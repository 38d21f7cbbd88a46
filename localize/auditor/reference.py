"""The losses of a plan, computed from the recorded graphs and not from the text.

A loss of the plan is: take the detached values that enter its route, run the recorded graphs of its segments, apply its
heads, sum its terms. That is all of it, so it is written a second time here, over ``fx.Interpreter``, as the reference
for what the generated text did.
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable, Iterator, Sequence
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
    entering: tuple[Tensor, ...]
    """Detached values that enter the route."""
    features: tuple[Tensor, ...]
    """What the last segment of the route returns."""
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
            features=tuple(value.detach() for value in self.features),
        )


class Reference:
    """A plan over modules of one's own: evaluates its losses."""

    def __init__(self, plan: Plan, trunk: nn.Module, heads: nn.Module, device: torch.device) -> None:
        self.plan, self.trunk, self.heads, self.device = plan, trunk, heads, device

    def run(self, x: Tensor, y: Tensor) -> Iterator[Evaluation]:
        """Yield every loss, in the order of the plan."""
        passed: dict[int, tuple[Tensor, ...]] = {0: (x,)}
        for loss in self.plan.losses:
            entering = passed[loss.route.start]
            before = RandomState.now(self.device)
            values = entering
            for index in range(loss.route.start, loss.route.stop + 1):
                values = self.segment(index, values)
                passed[index + 1] = tuple(value.detach().clone() for value in values)
            between = RandomState.now(self.device)
            value, scores = self.terms(loss, values, y)
            yield Evaluation(loss, value, scores, entering, values, before, between)

    def segments(self, loss: LocalLoss, entering: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run the route of ``loss``."""
        values = tuple(entering)
        for index in range(loss.route.start, loss.route.stop + 1):
            values = self.segment(index, values)
        return values

    def segment(self, index: int, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run the recorded graph of a segment. It may write into its inputs, so it gets copies of them."""
        graph = self.plan.segments.segments[index].graph
        copies = [value.clone() for value in values]
        result = fx.Interpreter(self.trunk, graph=graph).run(*copies)
        return tuple(result) if isinstance(result, tuple | list) else (result,)

    def terms(
        self,
        loss: LocalLoss,
        features: Sequence[Tensor],
        y: Tensor,
        fixed: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the loss on these features, and its class scores.

        ``fixed`` holds the values of shared blocks around which a finite difference is taken.
        """
        total: Tensor | None = None
        scores: Tensor | None = None
        for term in loss.terms:
            prediction = self._prediction(term, features, fixed)
            summand = function_named(term.loss)(prediction, y)
            summand = summand if term.weight == 1.0 else term.weight * summand
            total = summand if total is None else total + summand
            if term.scores and scores is None:
                scores = prediction
        assert total is not None, f"{loss.name} has no terms"
        return total, scores

    def _prediction(self, term: Term, features: Sequence[Tensor], fixed: dict[str, Tensor] | None) -> Tensor:
        if term.head is None:
            return features[0]
        shared = [self._shared(use, fixed) for use in term.uses]
        return self.heads.get_submodule(term.head)(*features, *shared)

    def _shared(self, use: Use, fixed: dict[str, Tensor] | None) -> Tensor:
        """Return the value of a shared block, of which ``scale`` times the change (none if detached) is felt."""
        value = self.heads.get_submodule(use.block)()
        still = value.detach() if fixed is None else fixed[use.block]
        if use.detached:
            return still
        return value if use.scale == 1.0 else still + use.scale * (value - still)


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
