"""Record the forward of a model as a graph over the user's own modules.

One real forward is run on a copy without data (meta device), in train mode, while every torch function and every leaf
module that is called is written down. Nothing is a proxy, so control flow, shapes, lists and in-place writes behave as
they do in training. Three differences are taken between recordings, so that nothing is baked in:

- batch sizes 3 and 5 (verified at 7): a constant that differs is ``a * batch + b``;
- train and eval: a constant that differs is chosen by ``training`` when the graph runs;
- twice the same: a model whose recordings differ is not deterministic, and is refused.

The user's model is never touched: no attribute, no cache entry, no mode, no random state.
"""

from __future__ import annotations

import contextlib
import copy
import operator
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, fx, nn

from localize import cost, ops
from localize.errors import ModelError, TraceError
from localize.features import add_features
from localize.ir import Side, Trunk
from localize.record import Record, Recorder, Ref, Unrecorded, is_leaf, name_of

BATCHES = (3, 5, 7)


def trace(model: nn.Module, example_input: Tensor, *, name: str | None = None) -> Trunk:
    """Record the forward of ``model``.

    Args:
        model: any module whose forward takes one tensor; it is not changed.
        example_input: a batch (N, C, H, W) of the shape and type that the model will be trained on; values are unused.
        name: how reports call the model; default is its class.

    Raises:
        ModelError: the model is wrapped (DDP, compiled, scripted) or is not a module, or returns no class scores.
        TraceError: the forward reads values of tensors, is not deterministic, or leaves torch.
    """
    check_model(model)
    _warn_of_hooks(model)
    recordings, twin, leaves = _record_all(model, example_input)
    whole, eval_differs = _build(recordings, twin)
    logits, _ = _outputs(whole)
    num_classes = _num_classes(logits, model)
    _add_costs(whole, meta_twin(model), tuple(example_input.shape[1:]))  # eval forwards may fill caches of their twin
    graph = _returning(whole, logits)
    add_features(graph, twin, tuple(example_input.shape[1:]))
    sides = tuple(_sides(whole, graph))
    return Trunk(
        model=model,
        twin=twin,
        graph=graph,
        name=name or type(model).__name__,
        input_shape=tuple(example_input.shape[1:]),
        num_classes=num_classes,
        state_keys=tuple(model.state_dict()),
        eval_differs=eval_differs,
        leaves=leaves,
        sides=sides,
        whole=whole if sides else None,
    )


def _num_classes(logits: fx.Node, model: nn.Module) -> int:
    """Return how many classes the model's output tells apart: the size of its dimension 1.

    Raises:
        ModelError: the output is not class scores.
    """
    shape = logits.meta["shape"]
    if not logits.meta["batched"] or len(shape) != 1 or not logits.meta["dtype"].is_floating_point:
        told = ", ".join(("N", *map(str, shape)) if logits.meta["batched"] else map(str, shape))
        raise ModelError(
            f"{type(model).__name__} returns {logits.meta['dtype']} of shape ({told}), not class scores (N, classes).",
            facts="losses compare one vector of class scores for each image with its label.",
            help="pass a model with a classifier: num_classes=..., or nn.Sequential(model, classifier)",
        )
    return shape[0]


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


def _record_all(model: nn.Module, example: Tensor) -> tuple[dict[tuple[str, int], list[Record]], nn.Module, tuple]:
    """Record in train and eval mode at three batch sizes; make a module a leaf where its inside cannot be recorded."""
    leaves: list[str] = []
    while True:
        twin = meta_twin(model)
        try:
            with _undisturbed():
                recordings = _record_modes(twin, example, frozenset(leaves))
            _refuse_lazy(recordings, model)
            return recordings, meta_twin(model), tuple(leaves)  # the recorded one may hold what forwards cached
        except Unrecorded as error:
            path = error.scope[-1][0] if error.scope else ""
            if not path or path in leaves:
                raise TraceError(
                    f"the forward of {type(model).__name__} cannot be recorded.",
                    facts=str(error),
                    help="move that line into the forward of a submodule, which is then called whole",
                ) from error
            leaves.append(path)


def _record_modes(twin: nn.Module, example: Tensor, leaves: frozenset[str]) -> dict[tuple[str, int], list[Record]]:
    def batch(n: int) -> Tensor:
        return torch.empty((n, *example.shape[1:]), dtype=example.dtype, device="meta")

    recordings = {}
    for mode in ("train", "eval"):
        twin.train(mode == "train")
        Recorder(twin, leaves).record(batch(2))  # not kept: some modules make their buffers in the first forward
        for n in BATCHES:
            held = _buffers_of(twin)
            recordings[mode, n] = Recorder(twin, leaves).record(batch(n))
            _refuse_assigned(held, twin)
        again = Recorder(twin, leaves).record(batch(BATCHES[0]))
        if difference := _first_difference(recordings[mode, BATCHES[0]], again):
            raise TraceError(
                f"two forwards of {type(twin).__name__} on the same input are not the same.",
                facts=difference,
                help="draw random numbers with torch functions, not with random or numpy",
            )
    twin.train()
    return recordings


def _buffers_of(twin: nn.Module) -> dict[str, Tensor]:
    return dict(twin.named_buffers())


def _refuse_assigned(held: dict[str, Tensor], twin: nn.Module) -> None:
    """Refuse a forward that puts another tensor in the place of a buffer: the generated step would not."""
    replaced = [name for name, buffer in _buffers_of(twin).items() if held.get(name) is not buffer]
    if replaced:
        raise TraceError(
            f"the forward of {type(twin).__name__} assigns another tensor to buffer {replaced[0]!r}.",
            help=f"write into it in place, e.g. self.{replaced[0].rpartition('.')[2]}.copy_(...)",
        )


def _refuse_lazy(recordings: dict[tuple[str, int], list[Record]], model: nn.Module) -> None:
    """Refuse a model whose forward reads tensors that only its first forward makes."""
    for record in (r for recording in recordings.values() for r in recording if r.kind == "get_attr"):
        path, _, name = record.target.rpartition(".")
        value = getattr(model.get_submodule(path), name, None)
        if not isinstance(value, Tensor) or tuple(value.shape) != record.shape:
            raise TraceError(
                f"{type(model).__name__} makes {record.target!r} only in its first forward.",
                help="run model(example_input) once before",
            )


def meta_twin(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` without data: same classes and names, parameters and buffers on the meta device.

    Raises:
        ModelError: the model cannot be deep-copied.
    """
    memo: dict[int, Any] = {}
    for tensor in _tensors_of(model):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = (
            nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        )
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} cannot be copied: {error}", help="check that copy.deepcopy(model) works"
        ) from error


def _tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Yield parameters, buffers, and tensors kept as plain attributes (also in lists and dicts)."""
    for module in model.modules():
        yield from (p for p in module._parameters.values() if p is not None)
        yield from (b for b in module._buffers.values() if b is not None)
        for value in vars(module).values():
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, list | tuple):
                yield from (item for item in value if isinstance(item, Tensor))
            elif isinstance(value, dict):
                yield from (item for item in value.values() if isinstance(item, Tensor))


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Run without leaving a trace in any random state."""
    python, numpy_state = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
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


def _build(recordings: dict[tuple[str, int], list[Record]], twin: nn.Module) -> tuple[fx.Graph, bool]:
    """Merge the recordings into one graph. The flag says that eval has another structure, and is left out."""
    train = [recordings["train", n] for n in BATCHES]
    try:
        records = _merge_records(train, _by_batch)
    except _Differs:
        raise TraceError(
            f"the forward of {type(twin).__name__} does other things for other batch sizes.",
            facts=_first_difference(train[0], train[1]),
            help="a training step is generated for any batch size: do not decide on x.shape[0]",
        ) from None
    folds = [_fold([recording[i] for recording in train]) for i in range(len(records))]
    try:
        in_eval = _merge_records([recordings["eval", n] for n in BATCHES], _by_batch)
        in_eval[-1].kwargs = records[-1].kwargs  # which further outputs are returned in eval mode does not matter
        records = _merge_records([records, in_eval], lambda pair: _ByMode(*pair))
        differs = False
    except _Differs:
        differs = True
    return _Builder(records, folds).graph(), differs


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

    def __init__(self, records: list[Record], folds: list[int]) -> None:
        self.records, self.folds = records, folds
        self.fx = fx.Graph()
        self.nodes: list[fx.Node] = []
        self.shared: dict[Any, fx.Node] = {}

    def graph(self) -> fx.Graph:
        """Return the graph, without operations that nothing uses."""
        for record, fold in zip(self.records, self.folds, strict=True):
            node = self._node(record)
            node.meta.update(
                shape=record.shape[1:] if fold == 1 else record.shape,
                dtype=record.dtype,
                batched=fold == 1,
                fold=fold,
                scope=record.scope,
                storage=record.storage,
                mutates=record.mutates,
                random=_is_random(record),
            )
            self.nodes.append(node)
        _mark_dependence(self.fx)
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
        if isinstance(value, list | tuple):
            items = [self._value(item) for item in value]
            return items if isinstance(value, list) else tuple(items)
        if isinstance(value, dict):
            return {key: self._value(item) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(*(self._value(item) for item in (value.start, value.stop, value.step)))
        if isinstance(value, _ByMode):
            train, evaluated = self._value(value.train), self._value(value.eval)
            return self._support("training", ops.by_mode, (self._training(), train, evaluated))
        if isinstance(value, _Batch):
            return self._batch(value)
        if isinstance(value, torch.device):
            return self._once("device", lambda: self._support("device", getattr, (self.nodes[0], "device")))
        return value

    def _training(self) -> fx.Node:
        def make() -> fx.Node:
            node = self._attribute("training")
            node.meta.update(support=True)
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
        node.meta.update(support=True)
        return node

    def _once(self, key: Any, make: Callable[[], fx.Node]) -> fx.Node:
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]


_RANDOM_FACTORIES = {"rand", "randn", "randint", "randperm", "bernoulli", "normal", "rand_like", "randn_like"}


def _is_random(record: Record) -> bool:
    return record.kind == "call_function" and name_of(record.target) in _RANDOM_FACTORIES


def _mark_dependence(graph: fx.Graph) -> None:
    """Mark values that depend on the input (or on chance): they cross cuts. All others are computed where needed."""
    for node in graph.nodes:
        if node.meta.get("support"):
            node.meta.update(depends=False, shape=None, batched=False, scope=(), storage=None, mutates=())
            continue
        node.meta["depends"] = (
            node.op == "placeholder"
            or node.meta.get("random", False)
            or any(parent.meta["depends"] for parent in node.all_input_nodes)
        )


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


def _add_costs(graph: fx.Graph, twin: nn.Module, input_shape: tuple[int, ...]) -> None:
    counts = cost.of_nodes(graph, twin, input_shape)
    for node in graph.nodes:
        node.meta.update(macs=counts[node.name].macs, fvcore_flops=counts[node.name].fvcore_flops)


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
