"""AugLocal: the auxiliary net of a layer is made of layers that are sampled from the rest of the trunk.

C. Ma, J. Wu, C. Si, K. C. Tan. Scaling supervised local learning with augmented auxiliary networks. ICLR 2024.
Reference code: ChenxiangMA/AugLocal at 98c90d6.

Layer l (of L) gets an auxiliary net of d^l trainable layers: d^l - 1 re-created from the trunk, and a classifier.

    selection   beta_i = l + nint((L - l) / (d^l - 1) * i),  i = 1 .. d^l - 1          (sec. 3.2, uniform)
    depth       d^l = min(nint((1 - r) d + r d_min), L - l + 1),  r = tau (l - 1) / (L - 2)   (eq. 3, pyramidal)
    loss        cross-entropy, weight 1; its gradient reaches the segment and its auxiliary net, nothing else
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import ClassVar

from torch import Tensor, nn

from localize import cuts
from localize.errors import MethodError, OptionError
from localize.heads import blocks
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
from localize.ir import Block, Features, Grain, LocalLoss, Plan, Route, Segment, Segments, Term, Trunk
from localize.methods.base import Local, option
from localize.operations import operation_kind
from localize.split import between


@dataclass(frozen=True)
class AugLocal(Local):
    """Auxiliary nets from sampled layers of the trunk."""

    name: ClassVar[str] = "auglocal"
    reference: ClassVar[str] = (
        "C. Ma, J. Wu, C. Si, K. C. Tan. Scaling supervised local learning with augmented auxiliary networks. "
        "ICLR 2024. Code: ChenxiangMA/AugLocal at 98c90d6."
    )
    deviations: ClassVar[tuple[str, ...]] = (
        "The last d layers are trained jointly, as the code does (tail=joint); the paper isolates them "
        "(tail=isolated).",
        "Rounding is half to even with the index inside, as the code does; the paper says nearest integer "
        "(rounding=half_up).",
        "Auxiliary nets with one sampled layer have a BatchNorm1d before the classifier, as the code for CIFAR does; "
        "the paper does not mention it.",
        "A width that grows fourfold halves the map now and at the next sampled layer, as the code does.",
        "Layers that are not convolutional (attention, token mixing) are re-created at the width and size they were "
        "made for, behind pooling and a linear map; paper and code have no such nets.",
        "Scales of re-created layers that no constructor draws (LayerScale) start at the trunk's values.",
    )

    d: int = option(2, "depth of the auxiliary nets: trainable layers, the classifier included", low=2)
    d_min: int = option(2, "depth of the shallowest auxiliary net", low=2)
    tau: float = option(0.5, "how much of the way to d_min the depth falls from the first layer to the last", low=0)
    selection: str = option("uniform", "which layers are re-created", choices=("uniform", "sequential", "repetitive"))
    tail: str = option(
        "joint",
        "the last d layers are trained together by the output's loss (joint, the code) or each by its own (isolated, "
        "the paper)",
        choices=("joint", "isolated"),
    )
    rounding: str = option(
        "half_even",
        "how layer numbers and depths are rounded: half to even with the index inside (half_even, the code) or half up "
        "(half_up, the paper)",
        choices=("half_even", "half_up"),
    )

    head_norm: bool = option(
        True,
        "a BatchNorm1d before the classifier of an auxiliary net with one re-created layer (the code for CIFAR has it, "
        "the code for ImageNet does not)",
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
            raise OptionError(f"d_min={self.d_min} exceeds d={self.d}.", help=f"--d-min {self.d} or less")
        if len(segments) < 2:
            layers = len(segments.layout.layers)
            raise MethodError(
                f"AugLocal needs at least two segments, {segments.trunk.name} has one.",
                facts=f"it has {layers} local layers, and the last {self.together} stay together.",
                help=(f"--d {layers - 1} or less, or " if layers > 2 else "") + "--tail isolated",
            )
        builder = _Builder(segments, self.grain, head_norm=self.head_norm)
        layers = len(segments.layout.layers)
        heads = []
        for segment in segments.segments[:-1]:
            copies = self.copies(segment.index, len(segments), _last_layer(segment), layers)
            heads.append(builder.head(segment, self.sampled(_last_layer(segment), copies, layers)))
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
            update="end",
            reference=self.reference,
            deviations=self.deviations,
        )

    def copies(self, index: int, segments: int, layer: int, layers: int) -> int:
        """Return d^l - 1, how many layers the auxiliary net of a segment re-creates (eq. 3).

        Args:
            index: number of the segment, from 0.
            segments: number of segments, the last included.
            layer: number of the segment's last local layer, from 0.
            layers: L, the number of local layers.
        """
        fall = Fraction(index, max(1, segments - 2)) * Fraction(str(self.tau))
        depth = self._round((1 - fall) * (self.d - 1) + fall * (self.d_min - 1))
        return min(max(1, depth), max(1, layers - 1 - layer))

    def sampled(self, layer: int, copies: int, layers: int) -> tuple[int, ...]:
        """Return the numbers, from 0, of the layers that the auxiliary net behind ``layer`` re-creates (sec. 3.2).

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
        step = Fraction(last - layer, copies)
        if self.rounding == "half_up":
            return tuple(layer + self._round(step * i) for i in range(1, copies + 1))
        return tuple(self._round(layer + step * i) for i in range(1, copies + 1))

    def _round(self, value: Fraction) -> int:
        return round(value) if self.rounding == "half_even" else math.floor(value + Fraction(1, 2))


def _last_layer(segment: Segment) -> int:
    """Return the number of the last local layer of a segment (of one that a cut goes through: the one before it)."""
    return segment.layers[1]


class _Builder:
    """Build auxiliary nets from the parts of one trunk."""

    def __init__(self, segments: Segments, grain: Grain, *, head_norm: bool) -> None:
        self.trunk, self.head_norm = segments.trunk, head_norm
        self.parts, self.classifier = _parts(self.trunk, grain)
        self.styles = [self._style(part) for part in self.parts]
        self.pools = any(_pools_first(part, self.trunk) for part in self.parts[1:])

    def _style(self, part: Part) -> Style:
        kind = _kind_of(part, self.trunk)
        return style_of([p for p in self.parts if kind and _kind_of(p, self.trunk) == kind] or [part], self.trunk)

    def head(self, segment: Segment, sampled: Sequence[int]) -> Block:
        """Return the auxiliary net of a segment."""
        chain = _Chain(self, segment, sampled).build()
        return blocks.of_module(
            f"head_{segment.index}",
            chain,
            *(f.shape for f in segment.features),
            facts={"sampled": list(sampled), "copies": [self.parts[i].name for i in sampled]},
        )


class _Chain:
    """The auxiliary net of one segment: re-created layers, one behind the other, and a classifier."""

    def __init__(self, builder: _Builder, segment: Segment, sampled: Sequence[int]) -> None:
        self.builder, self.trunk = builder, builder.trunk
        self.sampled = sampled
        self.features: tuple[Features, ...] = segment.features
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
        return _Sequence(*self.modules)

    def _append(self, part: Part, style: Style) -> None:
        if len(self.features) == 1 and self.features[0].kind == "map" and self.features[0].channels == 1:
            try:
                self._append_resized(part, style)
                return
            except Rigid:
                pass  # built as it is instead, behind an adapter
        self._adapt(part.inputs)
        self.modules.append(copied(part, self.trunk))
        self.features = part.outputs

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
        if shrink and min(given.shape[1:]) > 1:
            stride, halvings = (1 if pooled else 2), max(0, halvings - 1)
        made = resized(part, self.trunk, width=given.width, stride=stride, style=style, pool_first=self.builder.pools)
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
        classifier, classes = self.builder.classifier, self.trunk.num_classes
        is_map = len(self.features) == 1 and self.features[0].kind == "map" and self.features[0].channels == 1
        plain = classifier is None or _is_pooling_and_linear(classifier, self.trunk)
        if is_map and classifier is not None and hidden_linear_layers(classifier, self.trunk):
            self.modules.append(Narrow(classes).to("meta"))
        elif is_map and plain:
            norm = self.builder.head_norm and len(self.sampled) == 1
            self.modules.append(Pooled(self.features[0].width, classes, norm=norm).to("meta"))
        elif classifier is not None:
            self._adapt(classifier.inputs)
            self.modules.append(copied(classifier, self.trunk))
        else:
            flat = Features("flat", (self.features[0].width,), 1)
            self.modules += [Adapter(self.features, (flat,)).to("meta"), nn.Linear(flat.width, classes, device="meta")]


class _Sequence(nn.Sequential):
    """Modules one behind the other, where the first may take several tensors."""

    def forward(self, *values: Tensor) -> Tensor:
        for module in self:
            result = module(*values)
            values = result if isinstance(result, tuple) else (result,)
        return values[0]


def _parts(trunk: Trunk, grain: Grain) -> tuple[list[Part], Part | None]:
    """Return the local layers as parts, and the classifier behind the last."""
    layers = cuts.local_layers(trunk, grain)
    bodies = cuts.local_layers(trunk, replace(grain, classifier="own"))
    classifier = None
    if len(bodies) == len(layers) + 1:
        last = bodies[-1]
        classifier = Part("classifier", between(trunk, last.start, None), last.start.features, ())
        bodies = bodies[:-1]
    parts = [
        Part(
            body.name,
            between(trunk, body.start, body.end),
            body.start.features if body.start else (_image(trunk),),
            body.end.features if body.end else (Features("flat", (trunk.num_classes,), 1),),
        )
        for body in bodies
    ]
    return parts, classifier


def _image(trunk: Trunk) -> Features:
    kinds = {3: "map", 2: "tokens", 1: "flat"}
    return Features(kinds[len(trunk.input_shape)], trunk.input_shape, 1)


def _kind_of(part: Part, trunk: Trunk) -> str:
    """Return the class of the block that a part is, or an empty string for a layer that is no module."""
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
