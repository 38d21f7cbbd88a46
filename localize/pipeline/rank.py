"""The part of a local model that one rank holds, and its step."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from localize.graph.inputs import Inputs, tensors_of
from localize.ir import Partition
from localize.runtime.labels import check_labels
from localize.runtime.model import LocalModel, StepResult, fresh_casts, load
from localize.torch_names import own_buffers, own_parameters, unsaved_buffers_of


class Stream(Protocol):
    """What connects ranks: values arrive in the order in which they were sent."""

    def batch(self, key: Hashable) -> None:
        """Say that what is sent from now on belongs to a batch, of a mode and size that ``key`` names."""

    def receive(self, name: str, *, source: int) -> Tensor:
        """Return the value of this name on this batch, from an earlier rank."""

    def send(self, name: str, value: Tensor, *, to: int) -> None:
        """Hand a detached value to a later rank."""

    def send_delayed(self, name: str, module: nn.Module, *, to: int) -> None:
        """Hand the parameters of a module to an earlier rank, as they are before this rank updates them."""

    def receive_delayed(self, name: str, module: nn.Module, *, source: int) -> None:
        """Give a module the parameters that a later rank has handed on this batch, which may not have begun there."""


class RankModel(LocalModel):
    """What one rank trains of a local model, over the same modules: the tensors of all others have no data.

    ``plan`` is the whole plan; of its losses, ``reached`` and the parameter groups have those of this rank alone.

    Args:
        local: is used up: its modules are those of this rank from now on.
        partition: of its step.
        rank: which part.
        source: the text of this rank; that of the whole step where there is one rank.
        seed: what the random numbers of losses follow from, in every step and for every loss: they are then the same on
            any number of ranks. None leaves torch's generator as it is.
    """

    def __init__(self, local: LocalModel, partition: Partition, rank: int, source: str, *, seed: int | None = None):
        super().__init__(local.trunk, local.heads, local.plan, local.program, source)
        self.training = local.training
        self.partition, self.rank, self.stage, self.seed = partition, rank, partition.stages[rank], seed
        self.stream: Stream | None = None
        self.number = 0
        """Of the batch that comes next, over the whole run."""
        self._calls: Counter[str] = Counter()
        self._loaded: dict[str, Callable] | None = None
        for name, parameter in self.named_parameters():
            if name in self.stage.copied:
                parameter.requires_grad_(False)  # another rank trains it
        _keep(self, frozenset((*self.stage.tensors, *self.stage.copied)))

    @property
    def is_last(self) -> bool:
        """Whether no rank comes after this one."""
        return self.rank == len(self.partition.stages) - 1

    @property
    def device(self) -> torch.device:
        """Where the tensors of this rank are."""
        return next(t.device for kept in (self.parameters(), self.buffers()) for t in kept if not t.is_meta)

    @property
    def functions_of_text(self) -> dict[str, Callable]:
        """The functions of this rank's text, by name; those that train draw by seeds of their own."""
        if self._loaded is None:
            self._loaded = load(self.source, self.filename, self._seeded)
        return self._loaded

    def reached(self) -> list[list[str]]:
        """Return the names of the parameters that each loss of the plan trains on this rank."""
        mine = self.stage.losses
        return [sorted(self.plan.reach(loss)) if i in mine else [] for i, loss in enumerate(self.plan.losses)]

    def fill(self, names: frozenset[str], device: torch.device) -> None:
        """Give the tensors with these names memory, where they have none; what is one under two names stays one."""
        made: dict[int, Tensor] = {}
        for prefix, module in self.named_modules(remove_duplicate=False):
            start = f"{prefix}." if prefix else ""
            for kept in (own_parameters(module), own_buffers(module)):
                for name, tensor in kept.items():
                    if tensor is not None and tensor.is_meta and start + name in names:
                        if id(tensor) not in made:
                            empty = torch.empty_like(tensor, device=device)
                            is_parameter = isinstance(tensor, nn.Parameter)
                            made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                        kept[name] = made[id(tensor)]  # type: ignore[assignment]

    def own_state(self) -> dict[str, Tensor]:
        """Return the state dict of what this rank holds, and is the one to keep."""
        return {name: value for name, value in self.state_dict().items() if name in set(self.stage.tensors)}

    def step(
        self,
        x: Inputs | None,
        y: Tensor,
        optimizer: Any,
        *,
        batch: tuple[int, int] = (0, 1),
        scaler: Any = None,
    ) -> StepResult:
        """Do this rank's part of a step, see :meth:`localize.LocalModel.step`; it may wait for the rank before.

        Args:
            x: images; None where ``stage.images`` says that they are not read.
            y: labels.
            optimizer: over the parameter groups of this rank.
            batch: number of this batch, and of all that make one update.
            scaler: must be None: one scale for all losses would have to go from rank to rank.

        Returns:
            The losses and scores of this rank; ``logits`` are the deepest scores that it has, if it has any.
        """
        assert scaler is None, "one scale for all losses"
        updates = self.updates(optimizer)
        updates.batch, updates.batches = batch
        check_labels(y, len(y), self.plan, values=y.device.type == "cpu")
        inputs = tensors_of(self.plan.segments.trunk.arguments, x) if self.stage.images and x is not None else ()
        stream = (self.stream,) if len(self.partition.stages) > 1 else ()
        if self.stream is not None:
            self.stream.batch(("train", len(y)))
        self._calls.clear()
        with fresh_casts(y.device.type), self._drawing("train_step"):
            losses, scores = self.functions_of_text["train_step"](self.trunk, self.heads, *inputs, y, updates, *stream)
        self.number += 1
        outputs = tuple(loss.name for loss in self.plan.outputs if loss.name in scores)
        return StepResult(losses, scores, self.plan.scores, outputs)

    def predict(self, values: tuple[Tensor, ...]) -> tuple[dict[str, Tensor], tuple[Tensor, ...], Tensor | None]:
        """Run the segments of this rank on what enters them, in the current mode and without gradients.

        Returns:
            Class scores (N, Z) by loss, as :meth:`localize.LocalModel.scores` has them; what enters the next rank; and,
            on the last one, the scores that the model answers with.
        """
        features: dict[int, tuple[Tensor, ...]] = {}
        with torch.no_grad():
            for k in self.stage.segments:
                segment = self.plan.segments.segments[k]
                if segment.name in self.functions_of_text:
                    features[k], values = self.run_segment(segment, values)
            scores = self.scores_from(features, [self.plan.losses[i] for i in self.stage.losses])
        if not self.is_last:
            return scores, values, None
        answer = features[len(self.plan.segments) - 1][0] if self.plan.outputs else list(scores.values())[-1]
        return scores, (), answer

    def _seeded(self, name: str, function: Callable) -> Callable:
        """Let a function that trains draw by a seed of its own, in whatever rank it runs."""
        if name == "train_step":
            return function

        def call(*values: Any) -> Any:
            self._calls[name] += 1
            with self._drawing(f"{name}/{self._calls[name]}"):
                return function(*values)

        return call

    @contextmanager
    def _drawing(self, what: str) -> Iterator[None]:
        if self.seed is None:
            yield
            return
        device = self.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed_of(self.seed, self.number, what))
            yield


def seed_of(run: int, batch: int, what: str) -> int:
    """Return the seed of what is drawn for one loss on one batch of a run."""
    return int.from_bytes(hashlib.sha256(f"{run}/{batch}/{what}".encode()).digest()[:8], "big") >> 1


def _keep(model: nn.Module, names: frozenset[str]) -> None:
    """Let tensors of a model have no data, all but those with these names."""
    for prefix, module in model.named_modules():
        start = f"{prefix}." if prefix else ""
        for name, parameter in own_parameters(module).items():
            if parameter is not None and start + name not in names:
                own_parameters(module)[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), False)
        for name, buffer in own_buffers(module).items():
            if buffer is not None and start + name not in names and name not in unsaved_buffers_of(module):
                own_buffers(module)[name] = torch.empty_like(buffer, device="meta")
