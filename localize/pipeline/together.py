"""Run the ranks of a partition one after the other in one process, to be compared with the one-process step."""

from __future__ import annotations

import copy
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from localize.ir import Check, Partition
from localize.pipeline.partition import undivided
from localize.pipeline.rank import RankModel
from localize.pipeline.texts import texts
from localize.runtime.model import LocalModel, StepResult
from localize.runtime.updates import own_state_key

MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


class Queues:
    """A stream between ranks of one process, which holds what was sent until it is asked for."""

    def __init__(self) -> None:
        self.values: dict[tuple[int, str], deque[Tensor]] = defaultdict(deque)
        self.rank = 0
        """The one that runs."""
        self.sent: list[tuple[int, int, str, Tensor]] = []
        self.models: Sequence[nn.Module] = ()
        """Those of all ranks; a later one has not begun with the batch while an earlier one runs."""

    def batch(self, key: Any) -> None:
        """Do nothing: the batch of a value follows from its place in the queue."""

    def receive(self, name: str, *, source: int) -> Tensor:
        """Return the oldest value of this name that was sent to the rank that runs."""
        return self.values[self.rank, name].popleft()

    def send(self, name: str, value: Tensor, *, to: int) -> None:
        """Keep a copy of a value for a rank."""
        self.sent.append((self.rank, to, name, value))
        self.values[to, name].append(value.clone())

    def send_delayed(self, name: str, module: nn.Module, *, to: int) -> None:
        """Do nothing: an earlier rank has read the parameters before."""

    def receive_delayed(self, name: str, module: nn.Module, *, source: int) -> None:
        """Give a module the parameters of the same module of a rank."""
        module.load_state_dict(self.models[source].get_submodule(name).state_dict())


@dataclass(frozen=True)
class Together:
    """The ranks of a partition in one process."""

    models: tuple[RankModel, ...]
    optimizers: tuple[torch.optim.Optimizer, ...]
    queues: Queues

    def step(self, x: Any, y: Tensor) -> StepResult:
        """Run the step of every rank on a batch, and return what all of them return."""
        losses: dict[str, Tensor] = {}
        returned: dict[str, Tensor | None] = {}
        for rank, (model, optimizer) in enumerate(zip(self.models, self.optimizers, strict=True)):
            self.queues.rank = rank
            result = model.step(x, y, optimizer)
            losses |= result.losses
            returned |= result.returned
        plan = self.models[0].plan
        return StepResult(losses, returned, plan.scores, tuple(loss.name for loss in plan.outputs))

    def state(self) -> dict[str, Tensor]:
        """Return the state dict that the ranks hold between them."""
        return {name: value for model in self.models for name, value in model.own_state().items()}

    def optimizer_state(self) -> dict[str, dict[str, Any]]:
        """Return what the optimizers remember of each parameter, see :func:`optimizer_state`."""
        pairs = zip(self.models, self.optimizers, strict=True)
        return {key: value for model, optimizer in pairs for key, value in optimizer_state(model, optimizer).items()}


def optimizer_state(local: LocalModel, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """Return what an optimizer remembers of each parameter, by its name, and by loss where each has its own."""
    state: dict[Any, Any] = optimizer.state
    found = {name: state[p] for name, p in local.named_parameters() if p in state}
    keys = (own_state_key(loss.name, n) for loss, names in zip(local.plan.losses, local.reached(), strict=True)
            for n in names)  # fmt: skip
    return found | {key: state[key] for key in keys if key in state}


def ranks(
    local: LocalModel,
    partition: Partition,
    make_optimizer: MakeOptimizer,
    *,
    seed: int | None = None,
    sources: Sequence[str] | None = None,
) -> Together:
    """Make all ranks of a partition from copies of a local model, which is not changed.

    Args:
        local: with data.
        partition: of its step.
        make_optimizer: makes the optimizer of a rank from parameter groups.
        seed: see :class:`localize.pipeline.rank.RankModel`.
        sources: the text of each rank; default: as it is generated.
    """
    sources = sources or (texts(local, partition) if len(partition.stages) > 1 else [local.source])
    queues = Queues()
    models = []
    for rank, source in enumerate(sources):
        model = RankModel(copy.deepcopy(local), partition, rank, source, seed=seed)
        model.stream = queues
        models.append(model)
    queues.models = models
    return Together(tuple(models), tuple(make_optimizer(model.param_groups()) for model in models), queues)


def compared(
    local: LocalModel, partition: Partition, batch: tuple[Any, Tensor], sources: Sequence[str] | None = None
) -> tuple[Check, ...]:
    """Run steps of all ranks, and of the one-process text, on copies: what they send, and what they leave.

    Args:
        local: with data; it is not changed.
        partition: of its step.
        batch: images and labels.
        sources: the text of each rank; default: as it is generated.
    """
    x, y = batch

    def sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=0.05, momentum=0.9)

    whole = RankModel(copy.deepcopy(local), undivided(local), 0, local.source, seed=0).train()
    optimizer = sgd(whole.param_groups())
    shared = ranks(local, partition, sgd, seed=0, sources=sources)
    for model in shared.models:
        model.train()
    wrong: list[str] = []
    steps = 3 if partition.delayed else 2
    for number in range(steps):
        one, several = whole.step(x, y, optimizer), shared.step(x, y)
        wrong += _unequal(f"step {number}: loss", one.losses, several.losses)
    states = shared.state()
    wrong += _unequal("tensor", whole.state_dict(), states)
    memories = (optimizer_state(whole, optimizer), shared.optimizer_state())
    flat = [
        {f"{name} of {parameter}": value for parameter, state in memory.items() for name, value in state.items()}
        for memory in memories
    ]
    wrong += _unequal("optimizer's", *flat)
    attached = [f"rank {a} sends {name} to rank {b} with a history" for a, b, name, value in shared.queues.sent
                if value.requires_grad or value.grad_fn is not None]  # fmt: skip
    backward = [f"rank {a} sends {name} to rank {b}" for a, b, name, _ in shared.queues.sent if b <= a]
    left = [f"rank {to} never reads {name}" for (to, name), values in shared.queues.values.items() if values]
    count = len(shared.queues.sent)
    return (
        _check("run.messages", "what ranks send is detached, goes forward, and is read", [*attached, *backward, *left],
               f"{count} values were sent in {steps} steps."),
        _check("run.together", "the ranks together do what the one-process step does, bit for bit", wrong,
               f"losses, {len(states)} tensors and the optimizer's state are equal after {steps} steps."),
    )  # fmt: skip


def _check(id: str, claim: str, wrong: list[str], evidence: str) -> Check:
    return Check(id, not wrong, claim, "\n".join(wrong[:5]) if wrong else evidence)


def _unequal(what: str, one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    if one.keys() != other.keys():
        return [f"{what} {name} is in one of them alone" for name in sorted(one.keys() ^ other.keys())]
    return [f"{what} {name} differs" for name, value in one.items() if not _equal(value, other[name])]


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same_places = bool((one.isnan() == other.isnan()).all())
        return torch.equal(one, other) or (same_places and torch.equal(one.nan_to_num(), other.nan_to_num()))
    return bool(one == other)
