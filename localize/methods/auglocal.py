"""AugLocal: the auxiliary net of a layer is made of layers that are sampled from the rest of the trunk.

C. Ma, J. Wu, C. Si, K. C. Tan. Scaling supervised local learning with augmented auxiliary networks. ICLR 2024.
Reference code: ChenxiangMA/AugLocal at 98c90d6.

Layer l (of L) gets an auxiliary net of d^l trainable layers: d^l - 1 re-created from the trunk, and a classifier.

    selection   beta_i = l + nint((L - l) / (d^l - 1) * i),  i = 1 .. d^l - 1          (sec. 3.2, uniform)
    depth       d^l = min(nint((1 - r) d + r d_min), L - l + 1),  r = tau (l - 1) / (L - 2)   (eq. 3, pyramidal)
    loss        cross-entropy, weight 1; its gradient reaches the segment and its auxiliary net, nothing else

The ablations of the paper: ``selection`` of neighbours or of the layer itself (Table 5), or by stage (Table 10);
``construction`` from plain convolutions of the same depth, as wide as the cost of the sampled layers allows (Table 5),
or as wide as the layer (Table 10, last step).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import ClassVar, Literal

from torch import fx, nn

from localize.cutting import cuts
from localize.cutting.split import Pieces
from localize.errors import Advice, MethodError, OptionError, did_you_mean
from localize.graph.operations import operation_kind
from localize.heads import blocks, narrow
from localize.heads.branch import Branch
from localize.heads.maps import Chain
from localize.heads.recreate import (
    Adapter,
    Narrow,
    Part,
    Pooled,
    Rigid,
    Style,
    bottleneck_ratio,
    copied,
    hidden_linear_layers,
    output_features,
    resized,
    style_of,
)
from localize.ir import (
    Block,
    Features,
    Grain,
    LabelKind,
    LocalLayer,
    LocalLoss,
    Plan,
    Route,
    Segment,
    Segments,
    Term,
    Trunk,
)
from localize.methods.base import ANY_LABELS, Local, more_segments, needs_two, option


@dataclass(frozen=True)
class AugLocal(Local):
    """Auxiliary nets from sampled layers of the trunk."""

    name: ClassVar[str] = "auglocal"
    reference: ClassVar[str] = (
        "C. Ma, J. Wu, C. Si, K. C. Tan. Scaling supervised local learning with augmented auxiliary networks. "
        "ICLR 2024. Code: ChenxiangMA/AugLocal at 98c90d6."
    )
    labels: ClassVar[tuple[LabelKind, ...]] = ANY_LABELS
    deviations: ClassVar[tuple[str, ...]] = (
        "The last d layers are trained jointly, as the code does (tail=joint); the paper isolates them "
        "(tail=isolated).",
        "Rounding is half to even with the index inside and in floating point, as the code does: for d=7, tau=0.9 on "
        "ResNet-110 a depth of 1.5 falls short of it by one bit and becomes 1. The paper says nearest integer "
        "(rounding=half_up, in exact fractions).",
        "Auxiliary nets with one sampled layer have a BatchNorm1d before the classifier, as the code for CIFAR does; "
        "the paper does not mention it.",
        "A width that grows fourfold halves the map now and at the next sampled layer, as the code does.",
        "Layers that are not convolutional (attention, token mixing) are re-created at the width and size they were "
        "made for, after pooling and a linear map; paper and code have no such nets.",
        "A selection by stage repeats d - 1 copies throughout the stage, as Table 10 prints them, and a block where "
        "the layer is the stem; the paper does not say how the depth falls there.",
        "Nets of convolutions pool to a quarter of the side first, as Table 10 prints them, and are as wide as costs "
        "the multiply-adds of the sampled layers; the paper gives no widths.",
        "Scales of re-created layers that no constructor draws (LayerScale) start at the trunk's values.",
    )

    d: int = option(2, "depth of the auxiliary nets: trainable layers, the classifier included", low=2)
    d_min: int = option(2, "depth of the shallowest auxiliary net", low=2)
    tau: float = option(0.5, "how much of the way to d_min the depth falls from the first layer to the last", low=0)
    selection: str = option(
        "uniform",
        "which layers are re-created: uniform, sequential (the next ones), repetitive (the layer itself) or "
        "repetitive-ds (the first copy with stride 2); one word, or one for each stage, separated by commas",
    )
    construction: str = option(
        "trunk",
        "what auxiliary nets are made of: layers of the trunk, or as many 1x1 or 3x3 convolutions after a pooling to "
        "a quarter of the map's side",
        choices=("trunk", "conv1x1", "conv3x3"),
    )
    width: str = option(
        "matched",
        "channels of such convolutions: as many as cost the multiply-adds of the trunk's layers (matched, Table 5), or "
        "those of the layer (own, Table 10)",
        choices=("matched", "own"),
    )
    tail: str = option(
        "joint",
        "the last d layers are trained together by the output's loss (joint, the code) or each by its own (isolated, "
        "the paper)",
        choices=("joint", "isolated"),
    )
    rounding: str = option(
        "half_even",
        "how layer numbers and depths are rounded: half to even with the index inside, in floating point (half_even, "
        "the code), or half up in exact fractions (half_up, the paper)",
        choices=("half_even", "half_up"),
    )

    head_norm: bool = option(
        True,
        "a BatchNorm1d before the classifier of an auxiliary net with one re-created layer (the code for CIFAR has it, "
        "the code for ImageNet does not)",
    )
    head_width: int = option(0, narrow.MEANING, low=0)
    update: Literal["end", "immediate"] = option(
        "end",
        "parameters move once after all layers, as in the code, or after each layer's backward, which gives the same "
        "weights and frees gradients earlier",
        choices=("end", "immediate"),
    )

    def __post_init__(self) -> None:
        for word in self.selection.split(","):
            if word not in _SELECTIONS:
                raise OptionError(
                    f"option 'selection' of method {self.name!r} cannot be {self.selection!r}.",
                    facts=f"it is one of {', '.join(_SELECTIONS)}, or one for each stage: uniform,repetitive,uniform.",
                    help=did_you_mean(word, _SELECTIONS),
                    option="selection",
                )

    @property
    def grain(self) -> Grain:
        """The paper's layers: the stem, every block; pooling goes to the next; a VGG's linear layers are one."""
        return Grain(stem="own", classifier="merged", hidden_linear="classifier", pool="next")

    @property
    def together(self) -> int:
        """How many trailing layers stay in the last segment."""
        return self.d if self.tail == "joint" else 1

    def plan(self, segments: Segments) -> Plan:
        """Give every segment but the last an auxiliary net.

        Raises:
            MethodError: there is no cut.
            OptionError: d_min exceeds d.
        """
        if self.d_min > self.d:
            raise OptionError(
                f"d_min={self.d_min} exceeds d={self.d}.", help=Advice(f"d_min={self.d} or less"), option="d_min"
            )
        if len(segments) < 2:
            layers = len(segments.layout.layers)
            if layers <= 1 or self.together <= 1:
                needs_two(self, segments)
            less = layers > 2 and self.d > layers - 1
            isolated = self.tail != "isolated"
            typed = [f"d={layers - 1} or less"] * less + ["tail='isolated'"] * isolated
            raise MethodError(
                f"AugLocal needs at least two segments, {segments.trunk.name} has one.",
                facts=f"it has {layers} local layers, and the last {self.together} stay together.",
                help=Advice(", or ".join(typed)) if typed else more_segments(segments),
            )
        builder = _Builder(segments, self.grain, head_norm=self.head_norm, most=self.head_width)
        layers = len(segments.layout.layers)
        heads = []
        for segment in segments.segments[:-1]:
            layer, word = _last_layer(segment), self._selection_at(_last_layer(segment), builder.stages)
            copies = self.copies(segment.index, len(segments), layer, layers)
            if word.startswith("repetitive"):
                copies = self.d - 1 if "," in self.selection else copies
                sampled = (builder.repeated(layer) if "," in self.selection else layer,) * copies
            else:
                sampled = self.sampled(layer, copies, layers)
            if self.construction == "trunk":
                heads.append(builder.head(segment, sampled, downsample=word == "repetitive-ds"))
            else:
                heads.append(
                    builder.plain(segment, sampled, int(self.construction[-1]), matched=self.width == "matched")
                )
        losses = [
            LocalLoss(f"loss_{k}", Route(k, k), (Term(blocks.CROSS_ENTROPY, head.name),), (f"segment_{k}", head.name))
            for k, head in enumerate(heads)
        ]
        return Plan(
            method=self.name,
            options=asdict(self),
            segments=segments,
            blocks=(*blocks.of_segments(segments), *heads),
            losses=(*losses, blocks.output_loss(segments)),
            update=self.update,
            reference=self.reference,
            deviations=(*self.deviations, *self._narrowed()),
        )

    def _narrowed(self) -> tuple[str, ...]:
        """Say what a limit of widths leaves of the paper's auxiliary nets."""
        told = narrow.told(self.head_width)
        more = (
            "Re-created layers shrink in proportion; a layer that cannot be is a 3x3 convolution of that width, with "
        )
        return (*told, more + "BatchNorm and ReLU, and the classifier is pooling and one linear layer.") if told else ()

    def _selection_at(self, layer: int, stages: Sequence[int]) -> str:
        """Return how layers are selected for the auxiliary net after ``layer``; ``stages`` has each layer's stage."""
        words = self.selection.split(",")
        if len(words) not in (1, stages[-1] + 1):
            raise OptionError(
                f"selection {self.selection!r} is for {len(words)} stages.",
                facts=f"the model has {stages[-1] + 1} stages of equal width.",
                help="one word for all, or one for each stage",
                option="selection",
            )
        return words[0] if len(words) == 1 else words[stages[layer]]

    def copies(self, index: int, segments: int, layer: int, layers: int) -> int:
        """Return d^l - 1, how many layers the auxiliary net of a segment re-creates (eq. 3).

        Args:
            index: number of the segment, from 0.
            segments: number of segments, the last included.
            layer: number of the segment's last local layer, from 0.
            layers: L, the number of local layers.
        """
        most, least, last = self.d - 1, self.d_min - 1, max(1, segments - 2)
        if self.rounding == "half_up":
            fall = Fraction(index, last) * Fraction(str(self.tau))
            depth = _half_up(most * (1 - fall) + least * fall)
        else:
            share = index * self.tau / last
            depth = round(most * (1 - share) + least * share)
        return min(max(1, depth), max(1, layers - 1 - layer))

    def sampled(self, layer: int, copies: int, layers: int) -> tuple[int, ...]:
        """Return the numbers, from 0, of the layers that the auxiliary net after ``layer`` re-creates (sec. 3.2).

        Args:
            layer: number of the local layer, from 0.
            copies: how many layers to choose.
            layers: L, the number of local layers.
        """
        last = layers - 1
        if self.selection == "repetitive":
            return (layer,) * copies
        if self.selection == "sequential" or copies >= last - layer:
            return tuple(range(layer + 1, min(layer + copies, last) + 1))
        if self.rounding == "half_up":
            return tuple(layer + _half_up(Fraction(last - layer, copies) * i) for i in range(1, copies + 1))
        return tuple(round(layer + (last - layer) / copies * i) for i in range(1, copies + 1))


def _half_up(value: Fraction) -> int:
    return math.floor(value + Fraction(1, 2))


_SELECTIONS = ("uniform", "sequential", "repetitive", "repetitive-ds")


def _last_layer(segment: Segment) -> int:
    """Return the number of the last local layer of a segment (of one that a cut goes through: the one before it)."""
    return segment.layers[1]


class _Builder:
    """Build auxiliary nets from the parts of one trunk."""

    def __init__(self, segments: Segments, grain: Grain, *, head_norm: bool, most: int) -> None:
        self.trunk, self.head_norm, self.most = segments.trunk, head_norm, most
        self.parts, self.classifier = _parts(self.trunk, grain)
        self.styles = self._styles()
        self.stages = self._stages()
        """The stage of each layer: neighbours of the same width are in the same."""
        self.pools = any(_pools_first(part, self.trunk) for part in self.parts[1:])

    def _styles(self) -> list[Style]:
        """Return the style of each part: that of all parts of its kind, or of its own where it is no block."""
        kinds = [_kind_of(part, self.trunk) or str(i) for i, part in enumerate(self.parts)]
        alike: dict[str, list[Part]] = {}
        for kind, part in zip(kinds, self.parts, strict=True):
            alike.setdefault(kind, []).append(part)
        styles = {kind: style_of(parts, self.trunk) for kind, parts in alike.items()}
        return [styles[kind] for kind in kinds]

    def _stages(self) -> list[int]:
        widths = [part.outputs[0].width for part in self.parts]
        return list(itertools.accumulate((a != b for a, b in itertools.pairwise(widths)), initial=0))

    def repeated(self, layer: int) -> int:
        """Return the layer that is repeated for a whole stage: the layer itself, but a block for a stem (Table 10)."""
        same = [i for i, stage in enumerate(self.stages) if stage == self.stages[layer]]
        blocks_of_stage = [i for i in same if self.styles[i].skips]
        return layer if self.styles[layer].skips or not blocks_of_stage else blocks_of_stage[0]

    def head(self, segment: Segment, sampled: Sequence[int], *, downsample: bool = False) -> Block:
        """Return the auxiliary net of a segment; ``downsample`` halves the map at its first layer."""
        facts = {"sampled": list(sampled), "copies": [self.parts[i].name for i in sampled]}

        def made(read: Segment) -> Branch:
            chain = _Chain(self, segment, read.features, sampled, downsample=downsample).build()
            head = blocks.of_module(
                f"head_{segment.index}", chain, *(features.shape for features in read.features), facts=facts
            )
            return Branch(Term(blocks.CROSS_ENTROPY, head.name), (head,))

        return narrow.narrowed(segment, self.most, made).blocks[0]

    def plain(self, segment: Segment, sampled: Sequence[int], kernel: int, *, matched: bool) -> Block:
        """Return an auxiliary net of as many plain convolutions as layers were sampled.

        Raises:
            MethodError: the features are no map.
        """
        features = segment.features[0]
        if not _is_map(segment.features, 2):
            raise MethodError(
                f"auxiliary nets of convolutions need one feature map of an image, {segment.ends_at} has none.",
                facts=f"it gives {', '.join(f'{f.kind} {f.shape}' for f in segment.features)}.",
                help=Advice("construction='trunk'"),
            )
        side = tuple(-(-size // 4) for size in features.shape[1:])
        width = features.width
        if matched:
            per_pair = side[0] * side[1] * kernel**2
            inputs = width + self.trunk.num_classes / per_pair  # the classifier's share
            width = _width_of_cost(self.head(segment, sampled).macs / per_pair, inputs, len(sampled))
        width = min(width, self.most or width)
        modules: list[nn.Module] = [nn.AdaptiveAvgPool2d(side)]
        for i in range(len(sampled)):
            inputs = features.width if i == 0 else width
            conv = nn.Conv2d(inputs, width, kernel, padding=kernel // 2, bias=False, device="meta")
            modules += [conv, nn.BatchNorm2d(width, device="meta"), nn.ReLU()]
        modules.append(Pooled(width, self.trunk.num_classes, norm=False).to("meta"))
        facts = {"convolutions": f"{len(sampled)} x {kernel}x{kernel}", "width": width}
        return blocks.of_module(f"head_{segment.index}", nn.Sequential(*modules), features.shape, facts=facts)


class _Chain:
    """The auxiliary net of one segment: re-created layers, one after the other, and a classifier."""

    def __init__(
        self,
        builder: _Builder,
        segment: Segment,
        features: tuple[Features, ...],
        sampled: Sequence[int],
        *,
        downsample: bool,
    ) -> None:
        self.builder, self.trunk = builder, builder.trunk
        self.sampled, self.downsample = sampled, downsample
        self.features = features
        self.base = self._base_of(segment)
        self.halvings = 0
        self.modules: list[nn.Module] = []

    def _base_of(self, segment: Segment) -> int:
        """Width of the features in units of the trunk's planes (a bottleneck's output is four times as wide)."""
        part = self.builder.parts[min(_last_layer(segment), len(self.builder.parts) - 1)]
        width = segment.features[0].width
        return max(1, width // bottleneck_ratio(part, self.trunk)) if part.outputs == segment.features else width

    def build(self) -> nn.Sequential:
        for index in self.sampled:
            self._append(self.builder.parts[index], self.builder.styles[index])
        self._classify()
        return Chain(*self.modules)

    def _append(self, part: Part, style: Style) -> None:
        if _is_map(self.features, 2):
            try:
                self._append_resized(part, style)
                return
            except Rigid:
                pass  # built as it is instead, after an adapter
        if self.builder.most:
            self._append_plain()
            return
        self._adapt(part.inputs)
        self.modules.append(copied(part, self.trunk))
        self.features = part.outputs

    def _append_plain(self) -> None:
        """Append a 3x3 convolution that keeps width and size, in the place of a layer that cannot be narrowed."""
        width = self.features[0].width
        conv = nn.Conv2d(width, width, 3, padding=1, bias=False, device="meta")
        self.modules.append(nn.Sequential(conv, nn.BatchNorm2d(width, device="meta"), nn.ReLU()))

    def _append_resized(self, part: Part, style: Style) -> None:
        """Re-create a convolutional layer at the width at hand; the map is halved when the width doubles."""
        (given,) = self.features
        base = part.outputs[0].width // bottleneck_ratio(part, self.trunk)
        halvings, stride = self.halvings, 1
        pooled = self.builder.pools and not style.skips
        if pooled:
            shrink = part.outputs[0].width != given.width
        else:
            halvings += max(0, int(math.log2(max(1, base // self.base))))
            shrink = halvings >= 1
        if self.downsample and not self.modules:
            shrink = True
        if shrink and min(given.shape[1:]) > 1:
            stride, halvings = (1 if pooled else 2), max(0, halvings - 1)
        made: nn.Module = resized(
            part,
            self.trunk,
            width=given.width,
            stride=stride,
            style=style,
            pool_first=self.builder.pools,
            most=self.builder.most,
        )
        if pooled and shrink and min(given.shape[1:]) > 1:
            made = nn.Sequential(nn.MaxPool2d(2), made)
        self.features = (output_features(made, given),)
        self.modules.append(made)
        self.halvings, self.base = halvings, base

    def _adapt(self, wanted: Sequence[Features]) -> None:
        if tuple(f.shape for f in self.features) != tuple(f.shape for f in wanted) or self._layouts(wanted):
            self.modules.append(Adapter(self.features, wanted).to("meta"))
            self.features = tuple(wanted)

    def _layouts(self, wanted: Sequence[Features]) -> bool:
        return tuple(f.channels for f in self.features) != tuple(f.channels for f in wanted)

    def _classify(self) -> None:
        """Append the classifier: the trunk's own, in the form that fits features of any size."""
        classes = self.trunk.num_classes
        classifier = None if self.trunk.output_size else self.builder.classifier  # a head classifies whole images
        is_map = _is_map(self.features, 2, 3)
        narrowed = self.builder.most > 0
        plain = narrowed or classifier is None or _is_pooling_and_linear(classifier, self.trunk)
        if is_map and not narrowed and classifier is not None and hidden_linear_layers(classifier, self.trunk):
            self.modules.append(Narrow(classes).to("meta"))
        elif is_map and plain:
            norm = self.builder.head_norm and len(self.sampled) == 1
            (features,) = self.features
            self.modules.append(Pooled(features.width, classes, norm=norm).to("meta"))
        elif classifier is not None:
            self._adapt(classifier.inputs)
            self.modules.append(copied(classifier, self.trunk))
        else:
            flat = Features("flat", (self.features[0].width,), 1)
            self.modules += [Adapter(self.features, (flat,)).to("meta"), nn.Linear(flat.width, classes, device="meta")]


def _is_map(features: Sequence[Features], *dims: int) -> bool:
    """Tell whether one map is there, its channels first, with so many spatial dimensions."""
    return (
        len(features) == 1
        and features[0].kind == "map"
        and features[0].channels == 1
        and (len(features[0].space) in dims)
    )


def _width_of_cost(products: float, inputs: float, count: int) -> int:
    """Return the width w at which ``count`` convolutions have closest to ``products`` pairs of channels.

    The pairs are inputs * w + (count - 1) * w^2; the root of the quadratic, rounded to the nearer side.
    """
    if count == 1:
        return max(1, round(products / inputs))
    root = (math.sqrt(inputs**2 + 4 * (count - 1) * max(0.0, products)) - inputs) / (2 * (count - 1))
    near = (max(1, math.floor(root)), math.floor(root) + 1)
    return min(near, key=lambda w: abs(inputs * w + (count - 1) * w**2 - products))


def _parts(trunk: Trunk, grain: Grain) -> tuple[list[Part], Part | None]:
    """Return the local layers as parts, and the classifier after the last."""
    layers = cuts.local_layers(trunk, grain)
    bodies = cuts.local_layers(trunk, replace(grain, classifier="own"))
    pieces = Pieces(trunk)
    classifier = None
    if len(bodies) == len(layers) + 1:
        start = bodies[-1].start
        graph = pieces.alone(start, None)
        if graph is not None and start is not None:
            classifier = Part("classifier", graph, start.features, ())
        bodies = bodies[:-1]
    parts = [
        Part(
            body.name,
            _alone(pieces, body),
            body.start.features if body.start else (_image(trunk),),
            body.end.features if body.end else (_output(trunk),),
        )
        for body in bodies
    ]
    return parts, classifier


def _alone(pieces: Pieces, layer: LocalLayer) -> fx.Graph:
    """Return the graph of a layer.

    Raises:
        MethodError: it reads an input of the model besides what leaves the layer before it.
    """
    graph = pieces.alone(layer.start, layer.end)
    if graph is None:
        raise MethodError(
            f"{layer.name} of {pieces.trunk.name} reads an input of the model besides what leaves the layer before it.",
            facts="auxiliary nets re-create layers, and read what leaves a segment.",
            help="a method with other heads",
        )
    return graph


def _image(trunk: Trunk) -> Features:
    return _first(trunk.input_shape)


def _output(trunk: Trunk) -> Features:
    return _first((trunk.num_classes, *trunk.output_size))


def _first(shape: tuple[int, ...]) -> Features:
    """Return the layout of a value whose channels come first."""
    kinds: dict[int, Literal["flat", "tokens"]] = {1: "flat", 2: "tokens"}
    return Features(kinds.get(len(shape), "map"), shape, 1)


def _kind_of(part: Part, trunk: Trunk) -> str:
    """Return the class of the block that a part is, or an empty string for a layer that is not a module."""
    try:
        return type(trunk.twin.get_submodule(part.name)).__name__
    except AttributeError:
        return ""


def _pools_first(part: Part, trunk: Trunk) -> bool:
    """Tell whether a layer begins with pooling (VGG)."""
    for node in part.graph.nodes:
        if node.op in ("call_module", "call_function", "call_method"):
            module = trunk.twin.get_submodule(node.target) if node.op == "call_module" else None
            return operation_kind(node, module) == "pool"
    return False


def _is_pooling_and_linear(classifier: Part, trunk: Trunk) -> bool:
    """Tell whether a classifier is global pooling, dropout and one linear layer."""
    for node in classifier.graph.nodes:
        if node.op != "call_module":
            continue
        module = trunk.twin.get_submodule(node.target)
        plain = isinstance(module, nn.Linear | nn.AdaptiveAvgPool2d | nn.AvgPool2d | nn.Flatten | nn.Identity)
        if not plain and any(True for _ in module.parameters()):
            return False
    return True
