"""Build auxiliary networks from the trunk's own graph: sampled layers, re-created with fresh weights.

There are two ways, depending on the operations of a layer:

- :func:`resized`: a convolutional layer (convolutions, norms, activations, pooling, additions, gates) is built again
  for any input width and stride. Inner widths follow the layer's construction: a bottleneck keeps its width, an
  inverted residual keeps its expansion ratio, depthwise convolutions follow their input.
- :func:`copied`: anything else (attention, token mixing, windows of a fixed size) is built again as it is, after an
  :class:`Adapter` that converts the features to the shape for which the layer was made.

Source: C. Ma, J. Wu, C. Si, K. C. Tan, "Scaling supervised local learning with augmented auxiliary networks", ICLR
2024, sec. 3; strides and shortcuts as in the reference code (ChenxiangMA/AugLocal at 98c90d6).
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from localize.errors import MethodError
from localize.graph import cost
from localize.graph.operations import operation_kind, parameters_of
from localize.heads.maps import GlobalAverage
from localize.ir import Features, Trunk, facts, path_of
from localize.ops import average
from localize.reserved import path_in_head
from localize.torch_names import (
    BATCH_NORMS,
    RUNNING_NORMS,
    own_buffers,
    own_children,
    own_forward_hooks,
    own_parameters,
)


@dataclass(frozen=True)
class Part:
    """A piece of the trunk to build again: its graph, and the layout of its inputs and outputs."""

    name: str
    graph: fx.Graph
    inputs: tuple[Features, ...]
    outputs: tuple[Features, ...]


# ------------------------------------------------------------------------------------------------- copies as they are


def copied(part: Part, trunk: Trunk) -> fx.GraphModule:
    """Build a part again with the same widths and fresh parameters (on the meta device)."""
    root = nn.Module()
    for node in part.graph.nodes:
        if node.op == "call_module":
            _put(
                root, path_in_head(path_of(node)), fresh(trunk.twin.get_submodule(path_of(node)), path_of(node), trunk)
            )
        elif node.op == "get_attr" and not facts(node).support:
            _put_value(root, path_of(node), trunk)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(part.graph, copies), None)
    for node, twin in copies.items():
        twin.meta = node.meta
        if node.op in ("call_module", "get_attr"):
            twin.target = path_in_head(path_of(node))
    _keep_input(graph)
    return fx.GraphModule(root, graph, class_name="Copied")


def _keep_input(graph: fx.Graph) -> None:
    """Copy the input if the graph writes to it, because the features are also passed on to the next segment."""
    for placeholder in [node for node in graph.nodes if node.op == "placeholder"]:
        storage = facts(placeholder).storage
        if any(storage in facts(node).mutates for node in graph.nodes if node.op != "placeholder"):
            with graph.inserting_after(placeholder):
                kept = graph.call_method("clone", (placeholder,))
            placeholder.replace_all_uses_with(kept, delete_user_cb=lambda user, kept=kept: user is not kept)


def fresh(module: nn.Module, path: str, trunk: Trunk) -> nn.Module:
    """Return a copy of a module of the trunk without its weights.

    Parameters stay on the meta device until the head is made. The trunk's values are kept for buffers that are not
    statistics (index tables, masks), for attributes that are tensors, and for parameters that no ``reset_parameters``
    sets, if these are vectors (scales) or not trained (masks).

    Raises:
        MethodError: the module, or one inside, is scripted.
    """
    original = trunk.model.get_submodule(path)
    if any(isinstance(part, torch.jit.ScriptModule) for part in original.modules()):
        raise MethodError(
            f"module {path!r} is scripted (torch.jit.script), so a head cannot create it again.",
            help="use the module without torch.jit.script; or a method whose heads do not copy layers of the model",
        )
    clean = copy.deepcopy(module)
    for name, part in clean.named_modules():
        source = original.get_submodule(name)
        for key, buffer in own_buffers(source).items():
            if not (isinstance(part, RUNNING_NORMS) and key in _STATISTICS):
                own_buffers(part)[key] = None if buffer is None else buffer.detach().clone()
        for key, value in vars(source).items():
            if isinstance(value, Tensor):
                vars(part)[key] = value.detach().clone()
        part.constants = _kept(source)
    return clean


_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def _kept(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of a module that a head takes over from the trunk, if nothing initialises them."""
    owned = {name: p for name, p in own_parameters(module).items() if p is not None and not p.is_meta}
    return {name: p.detach().clone() for name, p in owned.items() if _is_constant(p)}


def _is_constant(parameter: nn.Parameter) -> bool:
    """Return whether a parameter is one number per channel, or not trained."""
    return sum(size > 1 for size in parameter.shape) < 2 or not parameter.requires_grad


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a dotted path, creating plain modules on the way."""
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in own_children(root):
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.add_module(name, module)


def _put_value(root: nn.Module, path: str, trunk: Trunk) -> None:
    """Put a parameter or buffer of the trunk at a dotted path."""
    prefix, _, name = path.rpartition(".")
    value = getattr(trunk.model.get_submodule(prefix), name)
    if prefix:
        for parent in path_in_head(prefix).split("."):
            if parent not in own_children(root):
                root.add_module(parent, nn.Module())
            root = root.get_submodule(parent)
    name = path_in_head(name)
    if isinstance(value, nn.Parameter):
        root.register_parameter(name, nn.Parameter(value.detach().to("meta"), requires_grad=value.requires_grad))
        constants = getattr(root, "constants", {})
        kept = {name: value.detach().clone()} if _is_constant(value) and not value.is_meta else {}
        root.constants = {**constants, **kept}  # type: ignore[assignment]  # a plain attribute, which a module can have
    else:
        root.register_buffer(name, value.detach().clone())


# --------------------------------------------------------------------------------------------- built for other widths


class Rigid(Exception):
    """A part cannot be built for another width or size."""


@dataclass(frozen=True)
class Style:
    """How the trunk's own blocks of one kind change width: by a projection on the shortcut, or without a shortcut."""

    projects: bool
    skips: bool


def style_of(parts: Sequence[Part], trunk: Trunk) -> Style:
    """Return whether any part of one kind has a shortcut, and whether any projects it."""
    shortcuts = [shortcut for part in parts if (shortcut := _Shortcut.find(part.graph, trunk)) is not None]
    return Style(
        projects=any(shortcut.convolution is not None for shortcut in shortcuts),
        skips=bool(shortcuts),
    )


@dataclass(frozen=True)
class _Shortcut:
    """The addition that closes a block, and the operations on its shortcut."""

    add: fx.Node
    main: fx.Node
    chain: tuple[fx.Node, ...]
    convolution: nn.Module | None
    norm: nn.Module | None

    @classmethod
    def find(cls, graph: fx.Graph, trunk: Trunk) -> _Shortcut | None:
        """Return the last addition with one side that reaches the input through at most a projection."""
        for node in reversed(list(graph.nodes)):
            if _name(node) not in _ADDITIONS or len(node.all_input_nodes) != 2:
                continue
            sides = [(cls._chain(side, trunk), side) for side in node.all_input_nodes]
            short = [(chain, side) for chain, side in sides if chain is not None]
            if not short:
                continue
            chain, side = min(short, key=lambda pair: len(pair[0]))
            main = next((other for other in node.all_input_nodes if other is not side), side)
            modules = [trunk.twin.get_submodule(path_of(n)) for n in chain if n.op == "call_module"]
            convolution = next((m for m in modules if isinstance(m, nn.Conv2d)), None)
            norm = next((m for m in modules if isinstance(m, BATCH_NORMS)), None)
            return cls(node, main, chain, convolution, norm)
        return None

    @staticmethod
    def _chain(node: fx.Node, trunk: Trunk) -> tuple[fx.Node, ...] | None:
        """Return the nodes from the input to ``node`` if they are at most a 1x1 convolution, a norm, and pooling."""
        chain: list[fx.Node] = []
        while node.op != "placeholder":
            if node.op != "call_module" or len(node.all_input_nodes) != 1:
                return None
            module = trunk.twin.get_submodule(path_of(node))
            pointwise = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)
            passive = isinstance(module, (BATCH_NORMS, nn.Identity, nn.AvgPool2d))
            if not pointwise and not passive:
                return None
            chain.append(node)
            node = node.all_input_nodes[0]
        if sum(isinstance(trunk.twin.get_submodule(path_of(n)), nn.Conv2d) for n in chain) > 1:
            return None
        return tuple(reversed(chain))


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target))


_ADDITIONS = {"add", "add_", "iadd"}
_PLAIN_FUNCTIONS = {*_ADDITIONS, "mul", "mul_", "imul", "mean", "sigmoid", "relu", "relu_", "silu", "gelu", "hardswish"}


def resized(
    part: Part, trunk: Trunk, *, width: int, stride: int, style: Style, pool_first: bool, most: int = 0
) -> fx.GraphModule:
    """Build a convolutional part again for ``width`` input channels and a stride.

    Args:
        part: a piece of the trunk from one NCHW map to one NCHW map.
        width: number of input channels.
        stride: 1 or 2.
        style: how the shortcut changes if width or size change.
        pool_first: the trunk shrinks maps with pooling between layers, which is left out here.
        most: largest number of output channels; inner widths shrink in proportion. 0: no limit.

    Raises:
        Rigid: it is not convolutional, or contains an operation whose width or size cannot be adapted.
    """
    return _Resizer(part, trunk, width, stride, style, pool_first, most).build()


def output_features(module: nn.Module, given: Features) -> Features:
    """Return the layout of a module's output for an NCHW map.

    Raises:
        Rigid: the module does not run on such a map, or its output is not one.
    """
    try:
        result = cost.output_of(module, given.shape)
    except RuntimeError as error:
        raise Rigid(str(error)) from error
    if result.dim() != 4:
        raise Rigid(f"the result has shape {tuple(result.shape)}")
    return Features("map", tuple(result.shape[1:]), 1)


class _Resizer:
    def __init__(
        self, part: Part, trunk: Trunk, width: int, stride: int, style: Style, pool_first: bool, most: int
    ) -> None:
        if len(part.inputs) != 1 or len(part.outputs) != 1:
            raise Rigid("several values enter or leave")
        if any(f.kind != "map" or f.channels != 1 or len(f.space) != 2 for f in (*part.inputs, *part.outputs)):
            raise Rigid("not from map to map")
        self.part, self.trunk, self.style = part, trunk, style
        self.width, self.stride, self.pool_first = width, stride, pool_first
        self.width_in, self.width_out = part.inputs[0].width, part.outputs[0].width
        self.scale = min(1.0, most / self.width_out) if most else 1.0
        """Factor by which widths shrink that do not follow the input."""
        self.nodes = list(part.graph.nodes)
        self.shortcut = _Shortcut.find(part.graph, trunk)
        self.root, self.graph = nn.Module(), fx.Graph()
        self.channels: dict[fx.Node, int] = {}
        """Number of channels of every value, as built."""
        self.values: dict[fx.Node, fx.Node] = {}
        self.skipped = set(self.shortcut.chain) if self.shortcut else set()
        self.strided = self._strided()

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.trunk.twin.get_submodule(path_of(node)) if node.op == "call_module" else None

    def _strided(self) -> fx.Node | None:
        """The convolution that shrinks the map: the first one larger than 1x1, or otherwise the first one."""
        convolutions = [n for n in self.nodes if n not in self.skipped and isinstance(self._module(n), nn.Conv2d)]
        wide = [n for n in convolutions if getattr(self._module(n), "kernel_size", None) != (1, 1)]
        return (wide or convolutions or [None])[0]

    def build(self) -> fx.GraphModule:
        """Return the new module, on the meta device."""
        for node in self.nodes:
            if node.op == "placeholder":
                self.values[node] = self.graph.placeholder("x")
                self.values[node].meta = dict(node.meta)
                self.channels[node] = self.width
            elif node.op == "output":
                self.graph.output(self._closed(node.args[0]))
            elif self.shortcut is not None and node is self.shortcut.add:
                self._add_shortcut(node)
            elif node not in self.skipped:
                self._copy(node)
        self.graph.lint()
        _keep_input(self.graph)
        return fx.GraphModule(self.root, self.graph, class_name="Resized")

    def _closed(self, output: fx.Node) -> fx.Node:
        """Add the shortcut that the trunk's block of this kind has if neither width nor size change."""
        identity = self.stride == 1 and self.width == self.channels[output]
        if self.shortcut is None and self.style.skips and not self.style.projects and identity:
            return self.graph.call_function(operator.add, (self.values[output], self.values[self.nodes[0]]))
        return self.values[output]

    # -- one operation

    def _copy(self, node: fx.Node) -> None:
        for source in node.all_input_nodes:
            if source not in self.channels:
                raise Rigid(f"{node.name} reads {source.name}, a part of the shortcut")
        module = self._module(node)
        if module is None:
            self._copy_function(node)
            return
        source = node.all_input_nodes[0]
        channels = self.channels[source]
        built: nn.Module
        if isinstance(module, nn.Conv2d):
            built = self._convolution(node, module, channels)
            channels = built.out_channels
        elif isinstance(module, BATCH_NORMS):
            built = self._norm(node, module, channels)
        elif operation_kind(node, module) == "pool":
            if self.pool_first and self._is_leading(node):
                self.values[node], self.channels[node] = self.values[source], channels
                return
            built = fresh(module, path_of(node), self.trunk)
        elif self._is_widthless(node, module):
            built = fresh(module, path_of(node), self.trunk)
        else:
            raise Rigid(f"{type(module).__name__} at {node.target}")
        _put(self.root, path_in_head(path_of(node)), built)
        copied_node = self.graph.call_module(path_in_head(path_of(node)), (self.values[source],))
        self._done(node, copied_node, channels)

    def _is_widthless(self, node: fx.Node, module: nn.Module) -> bool:
        kind = operation_kind(node, module)
        pooling = isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1))
        return not any(True for _ in module.parameters()) and (kind in ("activation", "dropout") or pooling)

    def _is_leading(self, node: fx.Node) -> bool:
        """Return whether only pooling comes before this node."""
        while node.op != "placeholder":
            if operation_kind(node, self._module(node)) != "pool":
                return False
            node = node.all_input_nodes[0]
        return True

    def _copy_function(self, node: fx.Node) -> None:
        name = getattr(node.target, "__name__", node.target)
        pooled = operation_kind(node, None) == "pool"
        if pooled and self.pool_first and self._is_leading(node):
            source = node.all_input_nodes[0]
            self.values[node], self.channels[node] = self.values[source], self.channels[source]
            return
        if name not in _PLAIN_FUNCTIONS and not pooled:
            raise Rigid(f"{name}")
        if name == "mean" and not self._is_global_mean(node):
            raise Rigid("mean over other than height and width, kept")
        widths = {self.channels[source] for source in node.all_input_nodes}
        if len(widths) != 1 or any(isinstance(a, fx.Node) and a not in self.values for a in node.args):
            raise Rigid(f"{name} of widths {sorted(widths)}")
        self._done(node, self.graph.node_copy(node, lambda parent: self.values[parent]), widths.pop())

    @staticmethod
    def _is_global_mean(node: fx.Node) -> bool:
        dims: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        keepdim = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
        dims = [dims] if isinstance(dims, int) else dims or ()
        return bool(keepdim) and sorted(d % 4 for d in dims) == [2, 3]

    def _done(self, node: fx.Node, value: fx.Node, channels: int) -> None:
        value.meta = dict(node.meta)
        self.values[node], self.channels[node] = value, channels

    # -- widths

    def _convolution(self, node: fx.Node, conv: nn.Conv2d, channels: int) -> nn.Conv2d:
        groups, out = conv.groups, conv.out_channels
        ratio = channels / conv.in_channels
        if groups > 1 and groups == conv.in_channels:  # depthwise
            out, groups = channels * (out // conv.in_channels), channels
        elif channels != conv.in_channels or self.scale < 1:
            gate = self._gated(node)
            if gate is not None:
                out = gate
            elif out == self.width_out and not self._is_squeeze(node):
                out = round(out * self.scale)
            elif self._is_expansion(conv) or self._is_squeeze(node):
                out = max(1, round(out * ratio))
            else:
                out = max(1, round(out * self.scale))
            if channels % groups or out % groups:
                raise Rigid(f"{groups} groups do not divide {channels} and {out} channels")
        stride = self.stride if node is self.strided else 1
        padding: Any = conv.padding
        if padding == "same" and stride > 1:  # torch does not support it
            spread = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
            if any(size % 2 for size in spread):
                raise Rigid(f"{node.target} pads one side more than the other")
            padding = tuple(size // 2 for size in spread)
        kernel_size: Any = conv.kernel_size  # PyTorch takes a pair of numbers, and declares a tuple of any length
        dilation: Any = conv.dilation
        return type_of_convolution(conv)(
            channels,
            out,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
            device="meta",
        )

    def _is_expansion(self, conv: nn.Conv2d) -> bool:
        """Return whether it widens its input by a fixed ratio, as in an inverted residual."""
        return conv.out_channels > self.width_out and conv.out_channels % conv.in_channels == 0

    def _is_squeeze(self, node: fx.Node) -> bool:
        """Return whether it acts on pooled values, so that its width follows that of the values it gates."""
        return (facts(node).shape or (0, 0, 0))[1:] == (1, 1) and self.part.outputs[0].shape[1:] != (1, 1)

    def _gated(self, node: fx.Node) -> int | None:
        """Return the width of the map by which this convolution's output is multiplied."""
        if not self._is_squeeze(node):
            return None
        while len(node.users) == 1:
            user = next(iter(node.users))
            if getattr(user.target, "__name__", user.target) in ("mul", "mul_", "imul"):
                other = next((n for n in user.all_input_nodes if n is not node), None)
                return self.channels.get(other) if other is not None else None
            if isinstance(self._module(user), nn.Conv2d):
                return None
            node = user
        return None

    def _norm(self, node: fx.Node, norm: nn.Module, channels: int) -> nn.Module:
        if not {*own_parameters(norm), *own_buffers(norm)} <= {"weight", "bias", *_STATISTICS}:
            raise Rigid(f"{type(norm).__name__} has parameters of its own")
        built = fresh(norm, path_of(node), self.trunk)
        setattr(built, "num_features", channels)  # noqa: B010  the class of a norm is not known here
        for name in ("weight", "bias"):
            if getattr(norm, name) is not None:
                setattr(built, name, nn.Parameter(torch.empty(channels, device="meta")))
        for name in ("running_mean", "running_var"):
            if getattr(norm, name) is not None:
                built.register_buffer(name, torch.zeros(channels, device="meta"))
        return built

    # -- the shortcut

    def _add_shortcut(self, node: fx.Node) -> None:
        assert self.shortcut is not None, "only a part with a shortcut closes one"
        main, entry = self.values[self.shortcut.main], self.values[self.nodes[0]]
        channels = self.channels[self.shortcut.main]
        if self.stride == 1 and self.width == channels:
            short = entry
        elif self.style.projects:
            norm = nn.BatchNorm2d(channels, device="meta")
            conv = nn.Conv2d(self.width, channels, 1, stride=self.stride, bias=False, device="meta")
            _put(self.root, "shortcut", nn.Sequential(conv, norm))
            short = self.graph.call_module("shortcut", (entry,))
        else:  # without a projection, the trunk's block of this kind has no shortcut either
            self.values[node], self.channels[node] = main, channels
            return
        in_place = _name(node) in ("add_", "iadd") and node.args[0] is self.shortcut.main
        function = operator.iadd if in_place else operator.add
        self._done(node, self.graph.call_function(function, (main, short)), channels)


def type_of_convolution(conv: nn.Conv2d) -> type[nn.Conv2d]:
    """Return the class to build a convolution with: its own, if it is built like ``nn.Conv2d``.

    Raises:
        Rigid: it is a derived class with a constructor of its own.
    """
    plain = {*own_parameters(conv), *own_buffers(conv)} <= {"weight", "bias"} and not any(own_forward_hooks(conv))
    if type(conv).__init__ is not nn.Conv2d.__init__ or not plain or any(True for _ in conv.children()):
        raise Rigid(f"{type(conv).__name__} is not built like nn.Conv2d")
    return type(conv)


def bottleneck_ratio(part: Part, trunk: Trunk) -> int:
    """Return how much wider a block's output is than its inner spatial convolution (4 for ResNet-50, else 1)."""
    inner = [
        module.out_channels
        for node in part.graph.nodes
        if node.op == "call_module"
        and isinstance(module := trunk.twin.get_submodule(path_of(node)), nn.Conv2d)
        and module.kernel_size != (1, 1)
    ]
    width = part.outputs[0].width
    return max(1, width // min(inner)) if inner and part.outputs[0].kind == "map" else 1


# ---------------------------------------------------------------------------------------------------------- adapters


class Adapter(nn.Module):
    """Convert features to the shapes for which a part of the trunk was made.

    Adaptive average pooling reduces space, and a linear map without bias changes channels. Several inputs are each
    adapted, and then added.

    Shape:
        one tensor (N, ...) for every entry of ``given``; returns one tensor (N, ...) for every entry of ``wanted``.
    """

    def __init__(self, given: Sequence[Features], wanted: Sequence[Features]) -> None:
        super().__init__()
        self.given, self.wanted = tuple(given), tuple(wanted)
        pairs = [(i, j) for j in range(len(wanted)) for i in self._sources(j)]
        self.linear = nn.ModuleDict(
            {
                f"{i}_{j}": nn.Linear(given[i].width, wanted[j].width, bias=False)
                for i, j in pairs
                if given[i].width != wanted[j].width
            }
        )

    def _sources(self, j: int) -> list[int]:
        """Return the inputs for output ``j``: the one at the same position, or all."""
        return [j] if len(self.given) == len(self.wanted) else list(range(len(self.given)))

    def forward(self, *values: Tensor) -> Tensor | tuple[Tensor, ...]:
        results = []
        for j in range(len(self.wanted)):
            parts = [self._adapt(values[i], i, j) for i in self._sources(j)]
            results.append(parts[0] if len(parts) == 1 else torch.stack(parts).sum(0))
        return results[0] if len(results) == 1 else tuple(results)

    def _adapt(self, value: Tensor, i: int, j: int) -> Tensor:
        given, wanted = self.given[i], self.wanted[j]
        value = value if given.kind == "flat" else value.movedim(given.channels, 1)
        space = _space(wanted)
        if given.kind != "flat" and _space(given) != space:
            value = _pool(value, space)
        elif given.kind == "flat" and space:
            value = value.reshape(*value.shape, *(1 for _ in space)).expand(*value.shape, *space)
        if f"{i}_{j}" in self.linear:
            value = self.linear[f"{i}_{j}"](value.movedim(1, -1)).movedim(-1, 1)
        return value if wanted.kind == "flat" else value.movedim(1, wanted.channels)

    def extra_repr(self) -> str:
        """Show the shapes."""
        return f"{[f.shape for f in self.given]} -> {[f.shape for f in self.wanted]}"


def _space(features: Features) -> tuple[int, ...]:
    """Return the dimensions without batch and channels."""
    return features.space if features.kind != "tokens" else (features.shape[2 - features.channels],)


def _pool(value: Tensor, space: tuple[int, ...]) -> Tensor:
    """Pool (N, C, ...) to (N, C, *space)."""
    if not space:
        return average(value.flatten(2), 2)
    if len(space) == 2 and value.dim() == 4:
        return F.adaptive_avg_pool2d(value, space)
    if len(space) == 3 and value.dim() == 5:
        return F.adaptive_avg_pool3d(value, space)
    pooled = F.adaptive_avg_pool1d(value.flatten(2), torch.Size(space).numel())
    return pooled.reshape(*pooled.shape[:2], *space)


# ------------------------------------------------------------------------------------------------------- classifiers


class Pooled(nn.Sequential):
    """The classifier of a convolutional net: global average pooling, and one linear layer.

    Args:
        width: number of channels.
        classes: number of classes.
        norm: whether to normalise the pooled features.

    Shape:
        (N, C, H, W); returns (N, classes).
    """

    def __init__(self, width: int, classes: int, *, norm: bool) -> None:
        norms = [nn.BatchNorm1d(width)] if norm else []
        super().__init__(GlobalAverage(), nn.Flatten(), *norms, nn.Linear(width, classes))


class Narrow(nn.Sequential):
    """The classifier of a VGG, narrowed: the flattened map is pooled to 512 values, and three linear layers follow.

    Shape:
        (N, C, H, W); returns (N, classes).
    """

    WIDTH = 512

    def __init__(self, classes: int) -> None:
        n = self.WIDTH
        super().__init__(
            nn.Flatten(1),
            nn.AdaptiveAvgPool1d(n),
            *(nn.Linear(n, n), nn.BatchNorm1d(n), nn.ReLU()),
            *(nn.Linear(n, n), nn.BatchNorm1d(n), nn.ReLU()),
            nn.Linear(n, classes),
        )


def hidden_linear_layers(part: Part, trunk: Trunk) -> int:
    """Return the number of linear layers of a classifier before its last one."""
    linear = [n for n in part.graph.nodes if n.op == "call_module" and _is_linear(n, trunk)]
    return max(0, len(linear) - 1)


def _is_linear(node: fx.Node, trunk: Trunk) -> bool:
    return isinstance(trunk.twin.get_submodule(path_of(node)), nn.Linear) and bool(parameters_of(node, trunk.twin))
