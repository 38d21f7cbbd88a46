"""Record the forward of a model as a graph over the user's own modules.

One real forward is run on a copy without data (meta device), in train mode, while every torch function and every leaf
module that is called is written down. Nothing is a proxy, so control flow, shapes, lists and in-place writes behave as
they do in training. Differences are taken between recordings, so that nothing is baked in:

- batch sizes 3 and 7 (verified at 5): a constant that differs is ``a * batch + b``;
- train and eval: a constant that differs is chosen by ``training`` when the graph runs;
- one forward behind the other on the same copy: where the first leaves something behind for the next, what does not
  depend on the input is computed anew in every forward; a model that keeps more is refused;
- the random states of Python and NumPy: a model that draws from them, outside of leaves, is refused.

The user's model is never touched: no attribute, no cache entry, no mode, no random state.
"""

from __future__ import annotations

import contextlib
import copy
import operator
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy
import torch
from torch import Tensor, fx, nn

from localize import ops
from localize.errors import ModelError, OptionError, TraceError, UnknownNameError, did_you_mean
from localize.features import add_features
from localize.inputs import Inputs, arguments_of, calling
from localize.ir import Argument, Side, Trunk
from localize.record import (
    Record,
    Recorder,
    Ref,
    TakeWhole,
    Unrecorded,
    is_leaf,
    is_of_torch,
    map_items,
    python_random_states,
)
from localize.twin import meta_twin

BATCHES = (3, 7, 5)
"""Batch sizes that are recorded, in this order: a number that grows from forward to forward fits no line through it."""


def trace(model: nn.Module, example_input: Inputs, *, name: str | None = None, leaves: Sequence[str] = ()) -> Trunk:
    """Record the forward of ``model``.

    Args:
        model: any module; it is not changed.
        example_input: a batch (N, C, H, W) of the shape and type that the model will be trained on, a tuple of all that
            the forward takes by position, or a dict of what it takes by keyword; values of tensors are unused.
        name: how reports call the model; default is its class.
        leaves: dotted names of modules that are called whole, and not looked into. They may read values of tensors: one
            that does not run without data is run on zeros and on random numbers to find what shapes it returns.

    Raises:
        ModelError: the model is wrapped (DDP, compiled, scripted) or is not a module, or returns no class scores.
        OptionError: the example holds no tensor, or tensors of several batch sizes.
        UnknownNameError: one of ``leaves`` is no module of the model that its forward calls.
        OptionError: ``leaves`` is a string.
        TraceError: the forward reads values of tensors, is not deterministic, or leaves torch.
    """
    check_model(model)
    _check_names(leaves, model)
    _warn_of_hooks(model)
    arguments = arguments_of(model, example_input)
    recorded = _record(model, arguments, frozenset(leaves))
    _check_called(leaves, recorded, model)
    whole = _Builder(recorded).graph()
    logits, _ = _outputs(whole)
    images = next(argument.shape for argument in arguments if argument.shape is not None)
    num_classes, *output_size = _scores_shape(logits, model, images)
    twin = meta_twin(model)
    graph = _returning(whole, logits)
    add_features(graph, twin, images)
    sides = tuple(_sides(whole, graph))
    return Trunk(
        model=model,
        twin=twin,
        graph=graph,
        name=name or type(model).__name__,
        arguments=arguments,
        num_classes=num_classes,
        output_size=tuple(output_size),
        state_keys=tuple(model.state_dict()),
        eval_differs=recorded.eval_differs,
        leaves=_taken_whole(whole, twin),
        sides=sides,
        whole=whole if sides else None,
    )


def _scores_shape(logits: fx.Node, model: nn.Module, input_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the model's class scores without the batch: (Z,), or (Z, H, W) for the pixels of an image.

    Raises:
        ModelError: the output is not class scores.
    """
    shape = logits.meta["shape"]
    dense = len(shape) > 1 and tuple(shape[1:]) == input_shape[1:]
    if not logits.meta["batched"] or not (len(shape) == 1 or dense) or not logits.meta["dtype"].is_floating_point:
        told = ", ".join(("N", *map(str, shape)) if logits.meta["batched"] else map(str, shape))
        size = ", ".join(("N", "classes", *map(str, input_shape[1:])))
        raise ModelError(
            f"{type(model).__name__} returns {logits.meta['dtype']} of shape ({told}), not class scores (N, classes).",
            facts=f"losses compare one vector of class scores with the label of each image, or of each pixel ({size}).",
            help="pass a model with a classifier: num_classes=..., or nn.Sequential(model, classifier)",
        )
    return tuple(shape)


def check_model(model: nn.Module) -> None:
    """Refuse what cannot be taken as it is.

    Raises:
        ModelError: with the attribute that holds the plain model, where there is one.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"expected an nn.Module, got {type(model).__name__} {str(model)[:60]!r}.",
            help="localize.zoo.create_model(name) makes a model from its name",
        )
    kind = type(model).__name__
    if hasattr(model, "_orig_mod"):
        raise ModelError(
            "the model is compiled (torch.compile).",
            facts="a compiled module hides the graph that is to be cut.",
            help="pass the module you compiled, model._orig_mod",
        )
    if kind in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"):
        raise ModelError(
            f"the model is wrapped in {kind}.",
            facts="its single backward hook is wrong for one backward per segment.",
            help="pass the module inside, model.module",
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("the model is a ScriptModule.", help="pass the Python module it was scripted from")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError(f"{kind} has no trainable parameter.", help="set requires_grad=True on what is to be trained")
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
            raise ModelError(
                f"module {path!r} is lazy and has no shape yet.", help="run one forward on the model before"
            )


def _check_names(leaves: Sequence[str], model: nn.Module) -> None:
    if isinstance(leaves, str):
        raise OptionError(f"leaves are named by a tuple, not by {leaves!r}.", help=f"leaf=({leaves!r},)")
    known = [path for path, _ in model.named_modules() if path]
    for path in leaves:
        if path not in known:
            raise UnknownNameError(
                f"{type(model).__name__} has no module {path!r}.",
                facts="a leaf is named by its path in the model, as in the keys of its state_dict.",
                help=did_you_mean(path, known) or f"for example --leaf {known[0]}",
            )


def _check_called(leaves: Sequence[str], recorded: _Recorded, model: nn.Module) -> None:
    called = {record.target for record in recorded.records if record.kind == "call_module"}
    for path in leaves:
        if path not in called:
            raise UnknownNameError(
                f"the forward of {type(model).__name__} does not call module {path!r}.",
                facts="it is a list of modules, or not used, or inside another module that is taken whole.",
                help=did_you_mean(path, called),
            )


def _taken_whole(graph: fx.Graph, twin: nn.Module) -> tuple[str, ...]:
    """Return the modules with children that are called whole, but for those of torch."""
    called = {node.target: twin.get_submodule(node.target) for node in graph.nodes if node.op == "call_module"}
    return tuple(path for path, part in called.items() if any(part.children()) and not is_of_torch(part))


def _hooks_of(module: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)


def _warn_of_hooks(model: nn.Module) -> None:
    hooked = [p for p, m in model.named_modules() if not is_leaf(m) and _hooks_of(m)]
    if hooked:
        warnings.warn(
            f"hooks on {', '.join(map(repr, hooked))} are recorded once and not called in training: the "
            "generated step calls their inner modules. Put them on a torch.nn module, or remove them.",
            stacklevel=3,
        )


# ---------------------------------------------------------------------------------------------------------- recording


@dataclass(frozen=True)
class _Recorded:
    """What is the same in all recordings, with their differences."""

    records: list[Record]
    folds: list[int]
    depends: list[bool]
    eval_differs: bool
    """In eval mode the model does other things; these are left out."""


def _record(model: nn.Module, arguments: Sequence[Argument], leaves: frozenset[str]) -> _Recorded:
    """Record in train and eval mode; make modules leaves where their inside cannot be recorded."""
    while True:
        recordings = _Recordings(model, arguments, leaves)
        try:
            with _undisturbed():
                return recordings.merged()
        except TakeWhole as found:
            leaves = leaves.union(found.paths)
        except Unrecorded as error:
            raise TraceError(
                f"the forward of {type(model).__name__} cannot be recorded.",
                facts=str(error),
                help="move that line into the forward of a submodule, which is then called whole",
            ) from error


class _Recordings:
    """Recordings of one model in both modes and at several batch sizes."""

    def __init__(self, model: nn.Module, arguments: Sequence[Argument], leaves: frozenset[str]) -> None:
        self.model, self.arguments, self.leaves = model, arguments, leaves

    def inputs(self, batch: int) -> dict[str, Tensor]:
        """Return inputs without data of a batch, by their names."""
        tensors = [argument for argument in self.arguments if argument.shape is not None]
        return {a.name: torch.empty((batch, *(a.shape or ())), dtype=a.dtype, device="meta") for a in tensors}

    def merged(self) -> _Recorded:
        """Return what the recordings have in common, and how they differ.

        Raises:
            TakeWhole: modules whose inside cannot be recorded.
            Unrecorded: the same, of the model itself.
            TraceError: the forward is another for another batch size, or for the same input.
        """
        one = _Copy(self, training=True)
        trained = self._at_all_sizes(one, training=True)
        try:
            records = _merge_records(trained, _by_batch)
        except _Differs:
            raise TraceError(
                f"the forward of {type(self.model).__name__} does other things for other batch sizes.",
                facts=_first_difference(trained[0], trained[1]),
                help="a training step is generated for any batch size: do not decide on x.shape[0]",
            ) from None
        for record, first, last in zip(records, trained[0], trained[-1], strict=True):
            record.macs, record.fvcore_flops = (
                _for_one(first.macs, last.macs),
                _for_one(first.fvcore_flops, last.fvcore_flops),
            )
        folds = [_fold(column) for column in zip(*trained, strict=True)]
        differs = False
        one.twin.eval()
        if not _same(trained, (one.record(batch) for batch in BATCHES[:2])):
            try:
                evaluated = _merge_records(self._at_all_sizes(one, training=False), _by_batch)
                evaluated[-1].kwargs = records[-1].kwargs  # which further outputs eval mode returns does not matter
                records = _merge_records([records, evaluated], lambda pair: _ByMode(*pair))
            except _Differs:
                differs = True
        return _Recorded(records, folds, one.first.depends, differs)

    def _at_all_sizes(self, one: _Copy, *, training: bool) -> list[list[Record]]:
        """Return recordings at all batch sizes.

        They are taken one behind the other on one copy. If one finds what another has left there, each is taken on a
        copy of its own; a further one has to show that what is left does not depend on the input.
        """
        found = [one.record(batch) for batch in BATCHES]
        if _can_merge(found) and not any(record.kind == "kept" for record in found[0]):
            return found
        copies = [_Copy(self, training=training) for _ in BATCHES]
        found = [other.record(batch) for other, batch in zip(copies, BATCHES, strict=True)]
        again = _Copy(self, training=training).record(BATCHES[0])
        if difference := _first_difference(found[0], again):
            raise TraceError(
                f"two forwards of {type(self.model).__name__} on the same input are not the same.",
                facts=difference,
                help="draw random numbers with torch functions",
            )
        first = _on_input(copies[0].last)
        copies[0].record(BATCHES[0])
        if difference := _first_difference(first, _on_input(copies[0].last)):
            raise TraceError(
                f"a second forward of {type(self.model).__name__} is not the same as the first.",
                facts=difference,
                help="make in __init__ what the first forward makes",
            )
        return found


class _Copy:
    """A copy of the model without data, and the forwards that are recorded on it."""

    def __init__(self, recordings: _Recordings, *, training: bool) -> None:
        self.of = recordings
        self.twin = meta_twin(recordings.model).train()  # models drop here what they keep for eval mode
        self.twin.train(training)
        self.buffers = dict(self.twin.named_buffers())
        self.first: Recorder | None = None
        self.last: Recorder | None = None

    def record(self, batch: int) -> list[Record]:
        """Record a forward on ``batch`` images."""
        inputs = self.of.inputs(batch)
        called = calling(self.of.arguments, tuple(inputs.values()))
        before = python_random_states()
        self.last = Recorder(self.twin, self.of.model, self.of.leaves, before=self.last)
        self.first = self.first or self.last
        records = self.last.record(inputs, *called)
        self._refuse_assigned()
        if python_random_states() != before:
            watched = _Copy(self.of, training=self.twin.training)
            Recorder(watched.twin, self.of.model, self.of.leaves, watch=True).record(inputs, *called)
        return records

    def _refuse_assigned(self) -> None:
        """Refuse a forward that puts what it has made of its input in the place of a buffer: the step would not."""
        for name, buffer in self.twin.named_buffers():
            if self.buffers.get(name) is not buffer and self.last.made_from_input(buffer):
                raise TraceError(
                    f"the forward of {type(self.of.model).__name__} assigns another tensor to buffer {name!r}.",
                    help=f"write into it in place, e.g. self.{name.rpartition('.')[2]}.copy_(...)",
                )


def _on_input(recorder: Recorder) -> list[Record]:
    """Return the records that depend on the input, numbered anew, without what the others have computed."""
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


# ------------------------------------------------------------------------------------------- differences, and the graph


@dataclass(frozen=True)
class _Batch:
    """The integer ``scale * batch + offset``."""

    scale: int
    offset: int


@dataclass(frozen=True)
class _ByMode:
    train: Any
    eval: Any


class _Differs(Exception):
    """Two recordings do not have the same structure."""


def _first_difference(left: Sequence[Record], right: Sequence[Record]) -> str:
    for a, b in zip(left, right, strict=False):
        if (a.kind, a.args, a.kwargs) != (b.kind, b.args, b.kwargs) or a.target != b.target:
            scope = a.scope[-1][0] if a.scope else ""
            return f"first difference: {a.target} in module {scope!r} with {_short(a.args)} and {_short(b.args)}"
    return "" if len(left) == len(right) else f"{len(left)} and {len(right)} operations"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 80 else text[:77] + "..."


def _merge(values: Sequence[Any], combine: Callable[[Sequence[Any]], Any]) -> Any:
    """Merge arguments of equal structure; ``combine`` decides about constants that differ."""
    first = values[0]
    if all(type(value) is type(first) for value in values):
        if isinstance(first, list | tuple):
            if len({len(value) for value in values}) > 1:
                raise _Differs
            items = [_merge(column, combine) for column in zip(*values, strict=True)]
            return items if isinstance(first, list) else tuple(items)
        if isinstance(first, dict):
            if len({tuple(value) for value in values}) > 1:
                raise _Differs
            return {key: _merge([value[key] for value in values], combine) for key in first}
        if isinstance(first, slice):
            parts = [(value.start, value.stop, value.step) for value in values]
            return slice(*_merge(parts, combine))
        if all(value == first for value in values):
            return first
        if isinstance(first, Ref):
            raise _Differs
    return combine(values)


def _by_batch(values: Sequence[Any]) -> Any:
    """Return the ``scale * batch + offset`` that gives ``values`` at the recorded batch sizes."""
    if not all(type(value) is int for value in values):
        raise _Differs
    (n0, n1, n2), (v0, v1, v2) = BATCHES, values
    scale, rest = divmod(v1 - v0, n1 - n0)
    offset = v0 - scale * n0
    if rest or v2 != scale * n2 + offset:
        raise _Differs
    return _Batch(scale, offset)


def _merge_records(recordings: Sequence[Sequence[Record]], combine: Callable) -> list[Record]:
    if len({len(recording) for recording in recordings}) > 1:
        raise _Differs
    merged = []
    for column in zip(*recordings, strict=True):
        first = column[0]
        if any((record.kind, record.target) != (first.kind, first.target) for record in column):
            raise _Differs
        record = copy.copy(first)
        record.args = _merge([r.args for r in column], combine)
        record.kwargs = _merge([r.kwargs for r in column], combine)
        record.storage = column[0].storage
        merged.append(record)
    return merged


def _can_merge(recordings: Sequence[Sequence[Record]]) -> bool:
    try:
        _merge_records(recordings, _by_batch)
    except _Differs:
        return False
    return True


def _same(ones: Iterable[Sequence[Record]], others: Iterable[Sequence[Record]]) -> bool:
    """Tell whether recordings are the same, pair by pair, up to the last of the shorter list."""
    return not any(_first_difference(one, other) for one, other in zip(ones, others, strict=False))


def _for_one(first: int, last: int) -> int:
    """Return the number for a batch of one, from those for the first and the last of ``BATCHES``."""
    return first - (last - first) * (BATCHES[0] - 1) // (BATCHES[-1] - BATCHES[0])


def _fold(column: Sequence[Record]) -> int:
    """Return k where dimension 0 is k times the batch, and nothing else depends on it; 0 elsewhere."""
    shapes = [record.shape for record in column]
    if any(not shape for shape in shapes) or len({shape[1:] for shape in shapes if shape}) > 1:
        return 0
    folds = {divmod(shape[0], n) for shape, n in zip(shapes, BATCHES, strict=True) if shape}
    fold, rest = next(iter(folds))
    return fold if len(folds) == 1 and rest == 0 else 0


class _Builder:
    """Turn merged records into an fx graph; batch sizes, modes and devices become nodes."""

    def __init__(self, recorded: _Recorded) -> None:
        self.recorded = recorded
        self.fx = fx.Graph()
        self.nodes: list[fx.Node] = []
        self.shared: dict[Any, fx.Node] = {}

    def graph(self) -> fx.Graph:
        """Return the graph, without operations that nothing uses."""
        columns = (self.recorded.records, self.recorded.folds, self.recorded.depends)
        for record, fold, depends in zip(*columns, strict=True):
            node = self._node(record)
            node.meta.update(
                shape=record.shape[1:] if fold == 1 else record.shape,
                dtype=record.dtype,
                batched=fold == 1,
                fold=fold,
                scope=record.scope,
                storage=record.storage,
                mutates=record.mutates,
                depends=depends,
                macs=record.macs,
                fvcore_flops=record.fvcore_flops,
            )
            self.nodes.append(node)
        _drop_unused(self.fx)
        self.fx.lint()
        return self.fx

    def _node(self, record: Record) -> fx.Node:
        args, kwargs = self._value(record.args), self._value(record.kwargs)
        if record.kind == "placeholder":
            return self.fx.placeholder(record.target)
        if record.kind == "output":
            return self.fx.output((args[0], {name: v for name, v in kwargs.items() if _is_side(v, args[0])}))
        if record.kind == "get_attr":
            return self._attribute(record.target)
        if record.kind == "property":
            return self.fx.call_function(getattr, (args[0], record.target))
        if record.kind == "reflected":
            return self.fx.call_function(record.target, (args[1], args[0]))
        return self.fx.create_node(record.kind, record.target, tuple(args), kwargs)

    def _attribute(self, path: str) -> fx.Node:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the graph has no owning module yet
            return self.fx.get_attr(path)

    def _value(self, value: Any) -> Any:
        if isinstance(value, Ref):
            return self.nodes[value.index]
        if isinstance(value, _ByMode):
            train, evaluated = self._value(value.train), self._value(value.eval)
            return self._support("training", ops.by_mode, (self._training(), train, evaluated))
        if isinstance(value, _Batch):
            return self._batch(value)
        if isinstance(value, torch.device):
            return self._once("device", lambda: self._support("device", getattr, (self.nodes[0], "device")))
        return map_items(value, self._value)

    def _training(self) -> fx.Node:
        def make() -> fx.Node:
            node = self._attribute("training")
            node.meta.update(_SUPPORT)
            return node

        return self._once("training", make)

    def _batch(self, value: _Batch) -> fx.Node:
        node = self._once("batch", lambda: self._support("batch", "size", (self.nodes[0], 0)))
        if value.scale != 1:
            node = self._once(("scale", value.scale), lambda: self._support("n", operator.mul, (node, value.scale)))
        if value.offset:
            scaled = node
            node = self._once(value, lambda: self._support("n", operator.add, (scaled, value.offset)))
        return node

    def _support(self, name: str, target: Any, args: tuple) -> fx.Node:
        """Make a node whose value is no tensor: computed anew in every segment that needs it."""
        kind = "call_method" if isinstance(target, str) else "call_function"
        node = self.fx.create_node(kind, target, args, name=name)
        node.meta.update(_SUPPORT)
        return node

    def _once(self, key: Any, make: Callable[[], fx.Node]) -> fx.Node:
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]


_SUPPORT = {
    "support": True, "depends": False, "shape": None, "dtype": None, "batched": False, "fold": 0, "scope": (),
    "storage": None, "mutates": (), "macs": 0, "fvcore_flops": 0,
}  # fmt: skip
"""Of nodes whose value is no tensor."""


def _drop_unused(graph: fx.Graph) -> None:
    """Remove operations whose value, and whose writes, nothing that is kept reads."""
    read_later: set[int] = set()
    for node in reversed(list(graph.nodes)):
        writes_what_is_read = any(storage in read_later for storage in node.meta.get("mutates", ()))
        if node.op in ("output", "placeholder") or node.users or writes_what_is_read:
            read_later.update(
                parent.meta["storage"] for parent in node.all_input_nodes if parent.meta.get("storage") is not None
            )
        else:
            graph.erase_node(node)


def _outputs(whole: fx.Graph) -> tuple[fx.Node, dict[str, fx.Node]]:
    return next(node for node in whole.nodes if node.op == "output").args[0]


# ---------------------------------------------------------------------------------------------------- further outputs

WEIGHTS = {"aux_logits": 0.4, "aux_logits1": 0.3, "aux_logits2": 0.3, "aux": 0.5}
"""Weight of the cross-entropy on a further output of this name: those of Inception v3, GoogLeNet (Szegedy et al. 2014,
sec. 5) and torchvision's segmentation reference. Any other name has weight 1."""


def _is_side(value: fx.Node, logits: fx.Node) -> bool:
    """Tell whether a further output is class scores as the logits are."""
    alike = all(value.meta[key] == logits.meta[key] for key in ("shape", "dtype", "batched"))
    return alike and value is not logits and value.meta["dtype"].is_floating_point


def _returning(whole: fx.Graph, *outputs: fx.Node) -> fx.Graph:
    """Return a copy of the graph with these outputs and what they need; nodes keep their names."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in whole.nodes:
        if node.op != "output":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    results = tuple(copies[output] for output in outputs)
    returned = graph.output(results[0] if len(results) == 1 else results)
    returned.meta = dict(next(reversed(whole.nodes)).meta)
    _drop_unused(graph)
    graph.lint()
    return graph


def _sides(whole: fx.Graph, graph: fx.Graph) -> Iterator[Side]:
    """Yield the further outputs in the order of the forward, each with the nodes that the logits do not need."""
    logits, others = _outputs(whole)
    needed = {node.name for node in graph.nodes}
    order = {node: i for i, node in enumerate(whole.nodes)}
    for name, value in sorted(others.items(), key=lambda item: order[item[1]]):
        own = _returning(whole, logits, value)
        nodes = tuple(node.name for node in own.nodes if node.name not in needed)
        yield Side(name, value.name, nodes, WEIGHTS.get(name, 1.0))
