"""Record one model in both modes and at several batch sizes, and merge what was found."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from localize.errors import Advice, TraceError
from localize.graph.inputs import calling
from localize.graph.merge import (
    BATCHES,
    ByMode,
    Differs,
    batch_fold,
    by_batch,
    can_merge,
    cost_of_one,
    differing_scope,
    first_difference,
    merge_records,
    same_records,
)
from localize.graph.outputs import Outputs
from localize.graph.record import Record, Recorder, Ref, TakeWhole, Unrecorded, map_items, python_random_states
from localize.graph.twin import meta_twin
from localize.ir import Argument


@dataclass(frozen=True)
class Recorded:
    """What is the same in all recordings, with their differences."""

    records: list[Record]
    folds: list[int]
    depends: list[bool]
    eval_differs: bool
    """In eval mode the model does other things; these are left out."""
    outputs: Outputs
    """What the first forward in train mode returned."""
    output_in_eval: str
    """Name of the output that holds the class scores in eval mode."""
    checkpoints: tuple[int, ...] = ()
    """For every checkpoint in the forward, the bytes that are computed in it for each image."""


def record_model(
    model: nn.Module,
    arguments: Sequence[Argument],
    leaves: frozenset[str],
    output: str | None = None,
    further: Collection[str] = (),
) -> Recorded:
    """Record in train and eval mode; make modules leaves where their inside cannot be recorded."""
    while True:
        recordings = _Recordings(model, arguments, leaves, output, further)
        try:
            with _undisturbed():
                return recordings.merged()
        except TakeWhole as found:
            leaves = leaves.union(found.paths)
        except Unrecorded as error:
            raise TraceError(
                f"the forward of {type(model).__name__} cannot be recorded.",
                facts=str(error),
                help="move that line into the forward of a submodule, which is then called whole"
                + ("; or requires_grad_(False) on what is frozen" if "torch.no_grad" in str(error) else "")
                + ("; or make it one: self.register_buffer(NAME, tensor)" if "nor a parameter" in str(error) else ""),
            ) from error


class _Recordings:
    """Recordings of one model in both modes and at several batch sizes."""

    def __init__(
        self,
        model: nn.Module,
        arguments: Sequence[Argument],
        leaves: frozenset[str],
        output: str | None,
        further: Collection[str],
    ) -> None:
        self.model, self.arguments, self.leaves, self.output, self.further = model, arguments, leaves, output, further

    def inputs(self, batch: int) -> dict[str, Tensor]:
        """Return inputs without data of a batch, by their names."""
        tensors = [argument for argument in self.arguments if argument.shape is not None]
        return {a.name: torch.empty((batch, *(a.shape or ())), dtype=a.dtype, device="meta") for a in tensors}

    def merged(self) -> Recorded:
        """Return what the recordings have in common, and how they differ.

        Raises:
            TakeWhole: modules whose inside cannot be recorded.
            Unrecorded: the same, of the model itself.
            TraceError: the forward is another for another batch size, or for the same input.
        """
        one = _Copy(self, training=True)
        trained = self._at_all_sizes(one, training=True)
        try:
            records = merge_records(trained, by_batch)
        except Differs:
            raise TraceError(
                f"the forward of {type(self.model).__name__} does other things for other batch sizes.",
                facts=first_difference(trained[0], trained[1]),
                help=_any_size(differing_scope(trained[0], trained[1])),
            ) from None
        for record, first, last in zip(records, trained[0], trained[-1], strict=True):
            record.macs, record.fvcore_flops = (
                cost_of_one(first.macs, last.macs),
                cost_of_one(first.fvcore_flops, last.fvcore_flops),
            )
        folds = [batch_fold(column) for column in zip(*trained, strict=True)]
        differs = False
        one.twin.eval()
        if not same_records(trained, (one.record(batch) for batch in BATCHES[:2])):
            try:
                evaluated = merge_records(self._at_all_sizes(one, training=False), by_batch)
                evaluated[-1].kwargs = records[-1].kwargs  # which further outputs eval mode returns does not matter
                records = merge_records([records, evaluated], lambda pair: ByMode(*pair))
            except Differs:
                differs = True
        seen, checkpoints = one.first, tuple(one.first.checkpoints)
        return Recorded(records, folds, seen.depends, differs, seen.outputs, one.last.outputs.name, checkpoints)

    def _at_all_sizes(self, one: _Copy, *, training: bool) -> list[list[Record]]:
        """Return recordings at all batch sizes.

        They are taken one after the other on one copy. If one finds what another has left there, each is taken on a
        copy of its own; a further one has to show that what is left does not depend on the input.
        """
        found = [one.record(batch) for batch in BATCHES]
        if can_merge(found) and not any(record.kind == "kept" for record in found[0]):
            return found
        copies = [_Copy(self, training=training) for _ in BATCHES]
        found = [other.record(batch) for other, batch in zip(copies, BATCHES, strict=True)]
        again = _Copy(self, training=training).record(BATCHES[0])
        if difference := first_difference(found[0], again):
            raise TraceError(
                f"two forwards of {type(self.model).__name__} on the same input are not the same.",
                facts=difference,
                help="draw random numbers with torch functions",
            )
        first = _on_input(copies[0].last)
        copies[0].record(BATCHES[0])
        if difference := first_difference(first, _on_input(copies[0].last)):
            raise TraceError(
                f"a second forward of {type(self.model).__name__} is not the same as the first.",
                facts=[difference, *_written_once(copies[0].first, copies[0].last)],
                help="make in __init__ what the first forward makes",
            )
        return found


class _Copy:
    """A copy of the model without data, and the forwards that are recorded on it."""

    def __init__(self, recordings: _Recordings, *, training: bool) -> None:
        self.of = recordings
        self.twin = meta_twin(recordings.model).train()  # models drop here what they keep for eval mode
        self.twin.train(training)
        self.buffers, self.state = dict(self.twin.named_buffers()), frozenset(self.twin.state_dict())
        self.earliest: Recorder | None = None
        self.latest: Recorder | None = None

    @property
    def first(self) -> Recorder:
        """The recorder of the first forward."""
        assert self.earliest is not None, "a forward has been recorded"
        return self.earliest

    @property
    def last(self) -> Recorder:
        """The recorder of the latest forward."""
        assert self.latest is not None, "a forward has been recorded"
        return self.latest

    def record(self, batch: int) -> list[Record]:
        """Record a forward on ``batch`` images."""
        inputs = self.of.inputs(batch)
        called = calling(self.of.arguments, tuple(inputs.values()))
        before = python_random_states()
        asked: dict[str, Any] = {"output": self.of.output, "further": self.of.further}
        self.latest = Recorder(self.twin, self.of.model, self.of.leaves, **asked, before=self.latest)
        self.earliest = self.earliest or self.latest
        records = self.last.record(inputs, *called)
        self._refuse_assigned()
        if python_random_states() != before:
            watched = _Copy(self.of, training=self.twin.training)
            Recorder(watched.twin, self.of.model, self.of.leaves, **asked, watch=True).record(inputs, *called)
        return records

    def _refuse_assigned(self) -> None:
        """Refuse a forward that puts what it has made of its input in the place of a buffer: the step would not.

        Nor does the step make buffers that belong to the model's state.
        """
        kind = type(self.of.model).__name__
        for name in self.twin.state_dict():
            if name not in self.state:
                raise TraceError(
                    f"the first forward of {kind} makes buffer {name!r}.",
                    facts="the training step would not make it, and the model's state would lack it.",
                    help="make it in __init__; or run one forward on the model before",
                )
        for name, buffer in self.twin.named_buffers():
            if self.buffers.get(name) is not buffer and self.last.made_from_input(buffer):
                raise TraceError(
                    f"the forward of {kind} assigns another tensor to buffer {name!r}.",
                    facts=self.last.unlike.get(name, ()),
                    help=f"write into it in place, e.g. self.{name.rpartition('.')[2]}.copy_(...)",
                )


def _written_once(first: Recorder, second: Recorder) -> list[str]:
    """Return the lines that write into the model's own tensors in one forward and not in the next."""
    lines = [[record.where for record in one.records if record.writes] for one in (first, second)]
    return [f"written in the first alone: {line}" for line in dict.fromkeys(lines[0]) if line not in lines[1]]


def _any_size(path: str) -> str:
    told = "a training step is generated for any batch size: do not decide on x.shape[0]"
    if not path:
        return told
    return Advice(f"{told}; or leaf=({path!r},), which is called whole", f"{told}; or --leaf {path}")


def _on_input(recorder: Recorder) -> list[Record]:
    """Return the records that depend on the input, numbered again, without what the others have computed."""
    depends = recorder.depends
    number = {i: Ref(n) for n, i in enumerate(i for i, own in enumerate(depends) if own)}

    def renumbered(value: Any) -> Any:
        if isinstance(value, Ref):
            made = recorder.records[value.index]
            return number.get(value.index, (made.shape, made.dtype))
        return map_items(value, renumbered)

    found = [record for record, own in zip(recorder.records, depends, strict=True) if own]
    return [replace(r, args=renumbered(r.args), kwargs=renumbered(r.kwargs)) for r in found]


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Run without leaving a trace in any random state."""
    python, numpy_state = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(numpy_state)
