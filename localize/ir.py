"""The data that flows through the compiler: one frozen object per stage, nothing that acts.

::

    model, recipe
      trace   -> Trunk       the recorded forward of the user's own modules
      place   -> Layout      local layers, and the cuts chosen between them
      split   -> Segments    sub-graphs over the same parameters
      design  -> Plan        heads, losses, routes, declared reach
      lower   -> Program     statements, one function per segment
      emit    -> str         Python text

Parameter names are those of :class:`localize.LocalModel`: ``trunk.`` plus the name in the user's model, or ``heads.``
plus the block's name plus the name inside the block.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import fx, nn

from localize.errors import AuditError, PlanError

# --------------------------------------------------------------------------------------------------------- trace


@dataclass(frozen=True)
class Argument:
    """One argument of the model's forward: a tensor that every batch brings, or a constant of the recording."""

    name: str
    """In the generated text."""
    keyword: str | None
    """By which the forward is called with it; None is by position."""
    shape: tuple[int, ...] | None
    """Without the batch dimension; None for a constant."""
    dtype: torch.dtype | None
    constant: Any = None


@dataclass(frozen=True)
class Side:
    """A further output of the model: class scores of the shape of its logits, as an auxiliary classifier gives them.

    ``value`` is the node of :attr:`Trunk.whole` that it is, ``nodes`` are those that only it needs, in order.
    """

    name: str
    """Its field in what the model returns; ``output_1``, ``output_2`` by its place where fields have no names."""
    value: str
    nodes: tuple[str, ...]
    weight: float
    """Of its cross-entropy beside that of the logits, by convention of the field's name."""


@dataclass(frozen=True)
class NodeFacts:
    """What a recording knows of one node of its graph, beside operation and arguments."""

    shape: tuple[int, ...] | None = None
    """Shape of its value, without the batch dimension where it has one; None where the value is not a tensor."""
    dtype: torch.dtype | None = None
    batched: bool = False
    """Dimension 0 of the value is the batch."""
    fold: int = 0
    """How many times the batch size dimension 0 is; 0 where it does not depend on it."""
    depends: bool = True
    """The value depends on the input."""
    scope: tuple[tuple[str, str], ...] = ()
    """Dotted name and class of the enclosing modules, outermost first."""
    storage: int | None = None
    """Which storage the value lives in."""
    mutates: tuple[int, ...] = ()
    """Which storages the operation writes."""
    writes: tuple[str, ...] = ()
    """Dotted names of the model's own tensors (buffers, parameters, other attributes) that the operation writes: a
    function or method into the tensor itself or a view of it, a module that is called whole into its own. Such a node
    is part of the forward, whether or not its value is read, and its segment runs it once each time it runs, in the
    recorded order. Statistics of the norms of ``torch.nn`` are not listed."""
    draws: bool = False
    """The operation is a function or method that draws random numbers: part of the forward as well."""
    activates: bool = False
    """The operation is a module that is called whole, and applies an activation inside."""
    differentiable: bool = True
    """In plain backpropagation a gradient goes through the value to what it is made of."""
    macs: int = 0
    """Multiply-adds (convolution + linear) for one image."""
    fvcore_flops: int = 0
    """The AugLocal paper's count for one image, see :attr:`Block.fvcore_flops`."""
    features: Features | None = None
    """Layout of the value, where dimension 0 is the batch."""
    support: bool = False
    """The value is not a tensor: a batch size, a device, a choice by mode. Each segment computes its own."""


def facts(node: fx.Node) -> NodeFacts:
    """Return what the recording knows of a node; of a node that a pass has added, the defaults."""
    return node.meta.get("facts") or NodeFacts()


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Return the shape of a value that is a tensor, without the batch dimension where it has one.

    Raises:
        TypeError: the value is not a tensor.
    """
    shape = facts(node).shape
    if shape is None:
        raise TypeError(f"{node.name} is not a tensor, and has no shape")
    return shape


def dtype_of(node: fx.Node) -> torch.dtype:
    """Return the type of the elements of a value that is a tensor.

    Raises:
        TypeError: the value is not a tensor.
    """
    dtype = facts(node).dtype
    if dtype is None:
        raise TypeError(f"{node.name} is not a tensor, and has no dtype")
    return dtype


def path_of(node: fx.Node) -> str:
    """Return the dotted path of the module or attribute that a node names, or the name of the method that it calls.

    Raises:
        TypeError: the node calls a function.
    """
    if not isinstance(node.target, str):
        raise TypeError(f"{node.name} calls the function {node.target}, which has no path in the model")
    return node.target


def set_facts(node: fx.Node, **changed: Any) -> None:
    """Change what is known of a node while its graph is being made."""
    node.meta["facts"] = replace(facts(node), **changed)


@dataclass(frozen=True)
class Trunk:
    """A model whose forward has been recorded.

    ``graph`` refers to the user's own modules by their dotted names; :func:`facts` says what is known of each node.
    """

    model: nn.Module
    """The user's model, untouched."""
    twin: nn.Module
    """A copy without data (meta device), with the same qualified names, for shapes and costs."""
    graph: fx.Graph
    name: str
    arguments: tuple[Argument, ...]
    """What the forward is called with, in order."""
    num_classes: int
    """Size of dimension 1 of the class scores."""
    state_keys: tuple[str, ...]
    """``state_dict`` keys of the model when it was traced, in order."""
    eval_differs: bool
    """The model computes other operations in eval than in train mode; the graph holds those of train mode."""
    output_size: tuple[int, ...] = ()
    """Further dimensions of the class scores, (H, W) of a model that classifies pixels; of others there are none."""
    leaves: tuple[str, ...] = ()
    """Modules with children that are called whole: asked for, or because their inside could not be recorded."""
    sides: tuple[Side, ...] = ()
    """Further outputs that are class scores."""
    output: str = "output"
    """Name of the output that holds the class scores: its field in what the model returns, ``output_1`` by its place in
    a tuple or list, ``output`` of a model that returns one tensor."""
    output_in_eval: str = "output"
    """The same in eval mode, where a model may return something else."""
    whole: fx.Graph | None = None
    """``graph`` with what makes the further outputs, which it returns after the logits; nodes have the same names."""

    @property
    def inputs(self) -> tuple[Argument, ...]:
        """The arguments that are tensors; the first one is what is called the images."""
        return tuple(argument for argument in self.arguments if argument.shape is not None)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one image, without the batch dimension: (C, H, W)."""
        return self.inputs[0].shape or ()


# --------------------------------------------------------------------------------------------------------- place


@dataclass(frozen=True)
class Grain:
    """What a method takes as its local layer (methods differ: see the papers).

    ``stem``: a conv-bn-relu before the first block is a local layer of its own, or part of the first block.
    ``classifier``: what follows the last block belongs to the last local layer, or is a layer of its own.
    ``hidden_linear``: hidden linear layers of a convolutional net belong to the classifier, or are local layers.
    ``pool``: a pooling layer between two conv-bn-relu layers belongs to the next one, or to the same.
    ``norm``: a BatchNorm between the activation (and pooling) of a layer and the weights of the next one belongs to the
    next one, or to the same.
    """

    stem: Literal["own", "merged"] = "own"
    classifier: Literal["merged", "own"] = "merged"
    hidden_linear: Literal["classifier", "own"] = "classifier"
    pool: Literal["next", "same"] = "next"
    norm: Literal["next", "same"] = "next"


@dataclass(frozen=True)
class CutSpec:
    """What the user asks for: how many segments, where, or balanced by what.

    ``max`` is one segment per local layer, ``sqrt`` as many as the square root of the number of local layers.
    """

    segments: int | Literal["max", "sqrt"] = "max"
    at: tuple[str, ...] = ()
    by: Literal["layer", "node", "parameters", "macs", "memory"] = "layer"


@dataclass(frozen=True)
class Features:
    """How the values of a tensor are laid out, for heads.

    ``kind`` is ``map`` (N, C, H, W) or (N, H, W, C), with any number of spatial dimensions from two on, ``tokens``
    (N, T, C), or ``flat`` (N, F); ``channels`` is the dimension that holds the channels. For tokens, ``token`` says how
    the model itself reads them: ``class`` (the first one) or ``mean``; the first ``prefix`` tokens are no places of the
    image, and are left out of a mean. The others are those of a ``grid``, row by row, where the model shows it.
    """

    kind: Literal["map", "tokens", "flat"]
    shape: tuple[int, ...]
    """Without the batch dimension."""
    channels: int
    """Dimension of the channels, counted with the batch dimension: 1, or the last."""
    token: Literal["class", "mean"] = "mean"
    prefix: int = 0
    grid: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        """Number of channels."""
        return self.shape[self.channels - 1]

    @property
    def space(self) -> tuple[int, ...]:
        """Sizes of the places: of a map, or of the grid of tokens, a column where it is not known; none if flat."""
        if self.kind == "flat":
            return ()
        if self.kind == "map":
            return tuple(n for axis, n in enumerate(self.shape, start=1) if axis != self.channels)
        return self.grid or (self.shape[2 - self.channels] - self.prefix, 1)


@dataclass(frozen=True)
class Stated:
    """What a recipe says of a layout, see :class:`Features`; None is as inferred."""

    kind: Literal["map", "tokens", "flat"] | None = None
    channels: int | None = None
    token: Literal["class", "mean"] | None = None
    prefix: int | None = None
    grid: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Cut:
    """A place in the graph where the gradient can be stopped.

    ``after`` is the node after which the graph is cut; ``values`` are the nodes whose values cross (all of them are
    detached): those of ``features``, which heads read, and after them inputs of the model that are needed further on
    (and what is made of these without parameters), which are only handed on. ``cloned`` are those whose storage a later
    operation overwrites: they are copied as well.
    """

    name: str
    after: str
    values: tuple[str, ...]
    features: tuple[Features, ...]
    cloned: tuple[str, ...] = ()
    parameters_before: int = 0
    parameters_after: int = 0
    macs_before: int = 0
    """Multiply-adds (convolution + linear) for one image up to the cut."""
    bytes_before: int = 0
    """Bytes of the values that are computed for one image up to the cut."""


@dataclass(frozen=True)
class LocalLayer:
    """The paper's local layer: a residual block, a conv-bn-relu, a transformer block. ``end`` is None for the last."""

    index: int
    name: str
    start: Cut | None
    end: Cut | None


@dataclass(frozen=True)
class Layout:
    """Where the model can be cut (``layers``) and where it is (``cuts``)."""

    trunk: Trunk
    layers: tuple[LocalLayer, ...]
    cuts: tuple[Cut, ...]


# --------------------------------------------------------------------------------------------------------- split


@dataclass(frozen=True)
class Segment:
    """A piece of the trunk between two cuts.

    ``graph`` takes the values of the cut before it and returns those of the cut after it (the last segment returns the
    model's output). ``layers`` are the indices of its first and last local layer.
    """

    index: int
    graph: fx.Graph
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    features: tuple[Features, ...]
    parameters: tuple[str, ...]
    """Names of the trainable parameters, in the order of use."""
    size: int
    """Number of parameter elements, frozen ones included."""
    layers: tuple[int, int]
    """Indices of the first and of the last local layer that it holds, whole or in part."""
    ends_at: str
    cloned: tuple[str, ...] = ()
    sides: tuple[str, ...] = ()
    """Names of the model's further outputs that it returns after its own, as the last of them."""

    @property
    def handed_on(self) -> tuple[str, ...]:
        """The outputs that no head reads: inputs of the model that are needed further on."""
        return self.outputs[len(self.features) :] if self.features else ()

    @property
    def name(self) -> str:
        """Name of its block and of its function in the generated text."""
        return f"segment_{self.index}"


@dataclass(frozen=True)
class Tied:
    """Parameters that the same segments use: several losses train them."""

    name: str
    parameters: tuple[str, ...]
    size: int
    """Number of parameter elements."""
    segments: tuple[int, ...]


@dataclass(frozen=True)
class Segments:
    """The trunk, cut: every parameter of the graph is in exactly one segment, or tied between several."""

    layout: Layout
    segments: tuple[Segment, ...]
    unused: tuple[str, ...]
    """Trainable parameters of the model that its forward does not use."""
    tied: tuple[Tied, ...] = ()
    """Parameters that several segments use, one entry for every set of segments."""

    @property
    def trunk(self) -> Trunk:
        """The recorded model."""
        return self.layout.trunk

    def __len__(self) -> int:
        return len(self.segments)


# --------------------------------------------------------------------------------------------------------- design

Role = Literal["segment", "tied", "head", "shared", "leap", "side"]


@dataclass(frozen=True)
class Block:
    """A named set of parameters: a segment of the trunk, a head, or something several losses share.

    A ``side`` holds those that only a further output of the model needs; they are in the trunk.
    """

    name: str
    role: Role
    parameters: tuple[str, ...]
    size: int
    """Number of parameter elements."""
    macs: int = 0
    """Multiply-adds (convolution + linear) for one image."""
    fvcore_flops: int = 0
    """The AugLocal paper's count (fvcore 0.1.5): ``macs`` + 2 per BatchNorm element + 1 per pooled input element."""
    module: nn.Module | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What a reader wants to know about it, for plan.json: e.g. which local layers a head copies."""
    feedback: bool = False
    """The gradient that it hands to what it reads is not that of its forward (fixed random feedback)."""


@dataclass(frozen=True)
class Copy:
    """A part of a block that starts with the values of a module of the trunk, or of another block.

    With a ``decay`` it is pulled towards that module once in every step: p <- decay * p + (1 - decay) * p_source, for
    each parameter (buffers are left alone). By a decay of 0, before the update, it has the values of the batch before.
    """

    block: str
    part: str
    """Path inside the block's module."""
    source: str
    """Path of the module in the user's model; or the name of the block, where ``of`` is ``heads``."""
    decay: float | None = None
    of: Literal["trunk", "heads"] = "trunk"
    """Where the module is that is copied."""


@dataclass(frozen=True)
class Input:
    """What enters the first segment where it is not the images themselves: ``block(images, labels)``.

    The block returns ``streams`` batches of the size of the images, one after the other along the batch dimension.
    """

    block: str
    streams: int = 1


@dataclass(frozen=True)
class Route:
    """A loss enters at the cut before segment ``start``, and runs segments ``start..stop`` with gradient."""

    start: int
    stop: int


@dataclass(frozen=True)
class Use:
    """What a head reads besides the features: the value of a shared block.

    ``detached``: the loss does not train it. ``scale``: the gradient that reaches it is multiplied by this number.
    """

    block: str
    detached: bool = False
    scale: float = 1.0


@dataclass(frozen=True)
class Target:
    """What a prediction is compared with.

    ``labels`` are the class ids (N,), or (N, H, W) of a model that classifies pixels; ``images`` the batch as it was
    passed to the step; ``input`` the values that enter the route of the loss; ``error`` the error of the model's
    output, softmax(logits) - one-hot(labels), (N, Z), for which the loss has to wait for the whole forward. None of
    them has a history. A ``block``, which no loss trains, may map it: labels to their similarity, images to [0, 1], the
    error to a layer's width.
    """

    of: Literal["labels", "images", "input", "error"] = "labels"
    block: str | None = None


def importable(function: Any) -> str:
    """Return the dotted name that a function is imported by; such a name is returned as it is.

    Raises:
        PlanError: it has none, or is not a function, or no function has this name.
    """
    if isinstance(function, str) and _is_function(function):
        return function
    if isinstance(function, type) or not callable(function):
        raise PlanError(
            f"loss {function!r} is not a function.",
            facts="the generated text calls losses as loss(prediction, target).",
            help="a function of torch.nn.functional or of localize.losses; or def my_loss(prediction, target): ... at "
            "the top of a module",
        )
    module, name = getattr(function, "__module__", None) or "", getattr(function, "__qualname__", "")
    if not name or getattr(sys.modules.get(module), name, None) is not function:
        raise PlanError(
            f"loss {name or function!r} cannot be imported, and the generated text calls losses by their names.",
            facts=f"it is not {name!r} of module {module!r}." if name else (),
            help="def my_loss(prediction, target): ... at the top of a module",
        )
    return f"{module}.{name}"


def _is_function(name: str) -> bool:
    """Tell whether a dotted name is that of a function, which is imported."""
    home, _, function = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(home), function, None) if home else None
    except ImportError:
        return False
    return callable(found) and not isinstance(found, type)


@dataclass(frozen=True)
class Term:
    """One summand of a local loss: ``weight * loss(head(features, *uses), target, **options)``."""

    loss: str
    """Importable name of a function of (prediction, target) that returns a scalar; the function itself becomes it."""
    head: str | None = None
    """Block that maps the features; None where the loss takes the features as they are (the model's own output)."""
    uses: tuple[Use, ...] = ()
    weight: float = 1.0
    scores: bool = True
    """The prediction is class scores (N, Z): usable as an answer at this depth."""
    target: Target = Target()
    at: int | None = None
    """Segment of the route whose output the term reads; None is the last."""
    detached: bool = False
    """The features are detached: the term trains its head and no segment."""
    labels: bool = False
    """The head reads the class ids as well, as its last argument."""
    stream: int | None = None
    """Which of the input's streams the term reads; None is all of them."""
    options: tuple[tuple[str, float], ...] = ()
    """Keyword arguments of the loss."""
    side: str | None = None
    """The prediction is this further output of the model, made in the segment ``at``; there is no head."""
    weights: str | None = None
    """Block whose value, the weights of the classes (Z,), is the argument ``weight`` of the loss."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss", importable(self.loss))


@dataclass(frozen=True)
class LocalLoss:
    """A loss, its route through the segments, and its declared reach: the blocks that it trains, and no others.

    With a ``part`` (i, n) it is computed on part i of n of the batch, and weighted by that part's share of it.
    """

    name: str
    route: Route
    terms: tuple[Term, ...]
    reach: tuple[str, ...]
    part: tuple[int, int] | None = None

    @property
    def scored(self) -> Term | None:
        """The term whose class scores are those of this loss: the last that has any."""
        return next((term for term in reversed(self.terms) if term.scores), None)


LabelKind = Literal["ids", "soft", "multi"]
"""Class ids (N,), int64; soft labels (N, Z), rows of shares of the classes that sum to 1; or multi-label targets
(N, Z), for each class by itself how true it is, from 0 to 1."""


@dataclass(frozen=True)
class Labels:
    """What labels a training step takes."""

    kinds: tuple[LabelKind, ...] = ("ids",)
    why: str = ""
    """What in the plan needs class ids, where only they are taken."""
    counted: str = ""
    """What in the plan needs the class of every image, so that none may be -100; empty where nothing does."""
    methods: tuple[str, ...] = ()
    """Methods that take soft labels, for the message that refuses them."""


@dataclass(frozen=True)
class Plan:
    """What is trained by what: the only result of the method-specific stage."""

    method: str
    options: Mapping[str, Any]
    segments: Segments
    blocks: tuple[Block, ...]
    losses: tuple[LocalLoss, ...]
    update: Literal["end", "immediate"]
    """``end``: one update after all backwards. ``immediate``: after each segment's backward, of what it reaches."""
    moments: Literal["per-loss", "shared"] = "per-loss"
    """State of the optimizer for a block that several losses update: one set for each loss, or one for all."""
    input: Input | None = None
    """What enters the first segment; None is the images."""
    copies: tuple[Copy, ...] = ()
    pull: Literal["before", "after"] = "after"
    """When copies are pulled: directly before the update at the end of the step, or directly after it."""
    feedback: tuple[tuple[str, str], ...] = ()
    """Modules of the trunk whose backward is replaced, each with the block that computes it: called with the module's
    input, weight and bias, it returns what the module returns."""
    recompute: tuple[str, ...] = ()
    """Segments and heads that keep nothing for backward but what they read, and are computed again there."""
    micro_batch: int = 0
    """Number of images that a training function takes at a time; 0 is the whole batch."""
    part_sizes: tuple[int, ...] = ()
    """The same for each loss, where they differ; 0 is the whole batch."""
    kept: tuple[tuple[str, str], ...] = ()
    """Names of losses, each with the last names of the norms whose inputs its exact parts keep, + between them."""
    exact: bool = False
    """Parts of ``micro_batch`` images are swept until BatchNorms normalise, and differentiate, by the whole batch."""
    scores: Literal["all", "argmax", "none"] = "all"
    """What a step returns of the class scores after each loss: all of them, the class of the highest, or nothing."""
    scaled: bool = False
    """Losses are multiplied by the scale of a gradient scaler, if the step is given one, before their backward."""
    frozen: tuple[str, ...] = ()
    """Segments that no loss trains. What a loss needs of them is computed without gradient."""
    left_out: tuple[LocalLoss, ...] = ()
    """Losses of the method that this step does not compute, since what they train is frozen."""
    answer: Literal["output", "softmax_sum"] = "output"
    """What the model is asked for its class: its own output (or, where no loss trains that, the deepest scores), or the
    sum over all local losses of the softmax of their scores."""
    labels: Labels = Labels()
    loss: Mapping[str, Any] = field(default_factory=dict)
    """Name and options of what class scores are trained by, where it is not the plain cross-entropy."""
    reference: str = ""
    deviations: tuple[str, ...] = ()

    def block(self, name: str) -> Block:
        """Return the block called ``name``."""
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> Mapping[str, Block]:
        return {block.name: block for block in self.blocks}

    def reach(self, loss: LocalLoss) -> frozenset[str]:
        """Return the names of the parameters that ``loss`` is declared to train."""
        return frozenset(name for block in loss.reach for name in self.block(block).parameters)

    def run_before(self, number: int) -> range:
        """Return the frozen segments that are run for loss ``number`` to enter: no loss before it has run them."""
        return self._run_before[number]

    @cached_property
    def _run_before(self) -> tuple[range, ...]:
        """The frozen segments that are run for each loss."""
        entered, found = {0}, []
        for loss in self.losses:
            start = loss.route.start
            known = start if start in entered else max(cut for cut in entered if cut <= start)
            found.append(range(known, start))
            entered.update(range(start, loss.route.stop + 2))
        return tuple(found)

    @property
    def outputs(self) -> tuple[LocalLoss, ...]:
        """Losses on the model's own output: one, or one for every part of the batch."""
        last = len(self.segments) - 1
        return tuple(loss for loss in self.losses if loss.route.stop == last)

    def keeps_scores(self, loss: LocalLoss) -> bool:
        """Tell whether a step returns class scores after a loss, or the class of the highest.

        Args:
            loss: one of :attr:`losses`.
        """
        return self.scores != "none" and loss.scored is not None

    def part_size(self, loss: LocalLoss) -> int:
        """Return how many images the training function of a loss takes at a time; 0 is the whole batch.

        Args:
            loss: one of :attr:`losses`.
        """
        return self.part_sizes[self.losses.index(loss)] if self.part_sizes else self.micro_batch

    def keeps(self, loss: LocalLoss) -> str:
        """Return the last names of the norms whose inputs the exact parts of a loss keep, with + between them.

        Args:
            loss: one of :attr:`losses`.
        """
        return dict(self.kept).get(loss.name, "")

    def schedule_of(self, segment: Segment) -> str:
        """Say how a segment and its head are scheduled: in parts, with kept values, recomputed.

        Args:
            segment: one of ``segments.segments``.

        Returns:
            Text such as ``parts of 8, head recomputed``; empty where they run as usual.
        """
        losses = [loss for loss in self.losses if loss.route.stop == segment.index]
        sizes = [size for size in map(self.part_size, losses) if size]
        heads = {term.head for loss in losses for term in loss.terms}
        body, head = segment.name in self.recompute, bool(heads & set(self.recompute))
        told = [f"parts of {sizes[0]}"] if sizes else []
        told += [f"{kept} kept" for kept in map(self.keeps, losses) if kept][:1]
        told += [f"{'all' if body and head else 'body' if body else 'head'} recomputed"] if body or head else []
        return ", ".join(told)

    @property
    def waits(self) -> bool:
        """Some loss needs the error of the output: all losses are computed after the whole forward."""
        return any(term.target.of == "error" for loss in self.losses for term in loss.terms)


# --------------------------------------------------------------------------------------------------------- lower


@dataclass(frozen=True)
class Value:
    """A reference to a value of the generated text."""

    name: str


@dataclass(frozen=True)
class Mode:
    """An argument that differs between train and eval mode: ``train if trunk.training else eval``."""

    train: Any
    eval: Any


ValueRole = Literal["intermediate", "features", "loss", "scores"]
"""What a value of a training function is to a reader: ``h_k``, ``loss_k`` and ``scores_k``, or none of these."""


@dataclass(frozen=True)
class Call:
    """``result = target(*args, **kwargs)``.

    ``kind`` says how the target is written: ``module`` (a dotted path below ``trunk`` or ``heads``), ``attribute`` (the
    same, but read and not called), ``function`` (an importable dotted name), ``local`` (a function of this program),
    ``method`` and ``property`` (of the first argument), ``operator`` (a Python operator or subscript, by its name in
    :mod:`operator`). ``result`` is a tuple where the call returns several values; so is ``role`` where these differ.
    It is None where nothing reads the value of a call that acts: a write, a draw.
    """

    result: str | tuple[str, ...] | None
    kind: Literal["module", "attribute", "function", "local", "method", "property", "operator"]
    target: str
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()
    role: ValueRole | tuple[ValueRole, ...] = "intermediate"


@dataclass(frozen=True)
class Detach:
    """``result = value.detach()``: the value without its history; ``clone`` copies it as well."""

    result: str
    value: str
    clone: bool = False
    role: ValueRole = "intermediate"


@dataclass(frozen=True)
class Backward:
    """``loss.backward()``: add the gradient of the loss to ``.grad`` of what it reaches.

    ``scaled``: ``optimizer.scale(loss).backward()``, the gradient times the scale of the step's gradient scaler.
    """

    loss: str
    scaled: bool = False


@dataclass(frozen=True)
class Update:
    """``optimizer.step()``; with an index, only of what that loss reaches."""

    loss: int | None = None


@dataclass(frozen=True)
class ZeroGrad:
    """``optimizer.zero_grad()``; with an index, only of what that loss reaches."""

    loss: int | None = None


@dataclass(frozen=True)
class Pull:
    """``pull(copy, source, decay)``: move every parameter of a copy towards that of the module it copies."""

    copy: str
    source: str
    decay: float


@dataclass(frozen=True)
class Receive:
    """``result = stream.receive("result", source=sender)``: a value that an earlier rank has made, on this batch."""

    result: str
    sender: int
    role: ValueRole = "features"


@dataclass(frozen=True)
class Send:
    """``stream.send("value", value, to=receiver)``: hand a detached value to a later rank."""

    value: str
    receiver: int


@dataclass(frozen=True)
class SendDelayed:
    """``stream.send_delayed("module", module, to=receiver)``: hand parameters, as the batch before has left them."""

    module: str
    receiver: int


@dataclass(frozen=True)
class ReceiveDelayed:
    """``stream.receive_delayed("module", module, source=sender)``: overwrite parameters with those of a later rank."""

    module: str
    sender: int


Statement = Call | Detach | Backward | Update | ZeroGrad | Pull | Receive | Send | SendDelayed | ReceiveDelayed


@dataclass(frozen=True)
class Function:
    """A function of the generated text: straight-line statements over named arguments."""

    name: str
    arguments: tuple[str, ...]
    statements: tuple[Statement, ...]
    returns: tuple[str, ...]
    doc: str = ""


@dataclass(frozen=True)
class Program:
    """The generated training step. The last function is the driver, ``train_step``."""

    doc: str
    functions: tuple[Function, ...]
    results: tuple[tuple[str, str, str | None], ...]
    """For every loss: its name, the value of the loss, and the value of its class scores (or None)."""
    scores: Literal["all", "argmax", "none"] = "all"
    """What the last are: see :attr:`Plan.scores`."""


# ----------------------------------------------------------------------------------------------------- partition


@dataclass(frozen=True)
class Message:
    """A detached value that a rank hands to a later one in every training step.

    In ``Partition.delayed``: the parameters of a module, which a rank hands to an earlier one, of the batch before.
    """

    name: str
    """In the text of both."""
    sender: int
    receiver: int
    shape: tuple[int, ...]
    """Without the batch dimension, where it has one."""
    rows: int
    """Size of the batch dimension for one image; 0 where it has none."""
    dtype: torch.dtype

    def bytes_of(self, images: int) -> int:
        """Return its size for a batch of ``images``."""
        return math.prod(self.shape) * (self.rows * images or 1) * self.dtype.itemsize


@dataclass(frozen=True)
class Stage:
    """What one rank does in every step: some of the losses, one after the other."""

    losses: tuple[int, ...]
    """Their numbers in the plan."""
    segments: tuple[int, ...]
    """The segments that it holds: those which its losses run."""
    tensors: tuple[str, ...]
    """Names of the parameters and buffers that it holds, of which it is the one to keep them."""
    copied: tuple[str, ...]
    """And of those that it holds as well, but another rank keeps: nothing changes them, or they arrive with a delay."""
    images: bool
    """Whether it reads the images; labels are read by all."""
    cost: float
    """Predicted time of a step, as a share of that of all ranks together."""


@dataclass(frozen=True)
class Partition:
    """A training step shared out to ranks, which are numbered from 0 in the order of their losses."""

    stages: tuple[Stage, ...]
    messages: tuple[Message, ...]
    delayed: tuple[Message, ...] = ()
    """Modules that copies on earlier ranks are pulled towards, with the values that they had a batch before. The name
    is that in the text: ``heads.dictionary``."""

    @property
    def speedup(self) -> float:
        """How many times as many steps as one rank these can take: 1 / the largest cost."""
        return 1.0 / max(stage.cost for stage in self.stages)


# --------------------------------------------------------------------------------------------------------- audit


@dataclass(frozen=True)
class Check:
    """One claim about the training step, and what was found."""

    id: str
    ok: bool
    claim: str
    evidence: str


@dataclass(frozen=True)
class AuditReport:
    """All checks of one audit, and where the method is declared to deviate from its paper."""

    checks: tuple[Check, ...]
    deviations: tuple[str, ...] = ()
    accepted: tuple[tuple[int, str], ...] = ()
    """Statements that are not in the plan and that the caller accepts: line and text of each."""

    @property
    def verdict(self) -> str:
        """The outcome in one sentence."""
        failed, total = sum(not check.ok for check in self.checks), len(self.checks)
        count = len(self.accepted)
        told = f", with {count} accepted statement{'' if count == 1 else 's'}" if count else ""
        return f"{failed} of {total} checks fail{told}." if failed else f"All {total} checks hold{told}."

    @property
    def ok(self) -> bool:
        """True if every check holds."""
        return all(check.ok for check in self.checks)

    def __str__(self) -> str:
        lines = [f"{check.id}: {check.evidence}" for check in self.checks if not check.ok]
        return "\n".join([self.verdict, *lines])

    def raise_if_failed(self) -> AuditReport:
        """Return the report itself if every check holds.

        Raises:
            AuditError: at least one check failed; the message holds the evidence of each.
        """
        failed = [check for check in self.checks if not check.ok]
        if failed:
            raise AuditError(
                f"the training step fails {len(failed)} of {len(self.checks)} checks.",
                facts=[f"{check.id}: {check.evidence}" for check in failed],
            )
        return self
