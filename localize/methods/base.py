"""What a method is: options as fields, and a function from segments to a plan.

A method never edits a graph and never writes code. Everything that distinguishes one from another is data: which local
layers it wants (``grain``), which trailing layers stay together (``together``), and the plan.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

from localize.cutting import cuts
from localize.errors import Advice, LocalizeError, MethodError, PlanError
from localize.heads import blocks
from localize.heads.branch import Branch
from localize.ir import CutSpec, Grain, LabelKind, LocalLoss, Plan, Route, Segment, Segments, Trunk
from localize.options import option as option  # noqa: PLC0414  methods take it from here

CLASS_IDS: tuple[LabelKind, ...] = ("ids",)
"""Of a method whose losses ask for the one class of each image."""
IDS_OR_SOFT: tuple[LabelKind, ...] = ("ids", "soft")
ANY_LABELS: tuple[LabelKind, ...] = ("ids", "soft", "multi")
"""Of a method that compares nothing but class scores with labels, or maps labels linearly. Multi-label targets need the
loss ``bce``; all other losses of labels can be had as well."""


class Method(Protocol):
    """The interface of the frozen dataclasses in this package."""

    name: ClassVar[str]
    reference: ClassVar[str]
    """Paper: authors, title, venue, year, link."""
    deviations: ClassVar[tuple[str, ...]]
    """Where paper and reference code disagree, and what is done here."""

    @property
    def labels(self) -> tuple[LabelKind, ...]:
        """What labels it takes, by its options; a class attribute where these do not matter."""
        ...

    @property
    def grain(self) -> Grain:
        """Which local layers the method cuts between."""
        ...

    @property
    def together(self) -> int:
        """How many trailing local layers stay in the last segment."""
        ...

    @property
    def cut(self) -> CutSpec:
        """How many segments there are if nobody asks for a number."""
        ...

    def plan(self, segments: Segments) -> Plan:
        """Attach heads and losses to the segments.

        Args:
            segments: the trunk, cut.

        Returns:
            Segments, blocks and losses: all that is generated and audited.
        """
        ...


class MethodClassError(LocalizeError, TypeError):
    """What was given as a method is none."""


_MEMBERS = tuple(name for name in (*Method.__annotations__, "grain", "together", "cut", "plan"))
_EXAMPLE = "a dataclass of options: @dataclass(frozen=True) class Mine(localize.methods.Local), see docs/extending.md"


def is_class(value: Any) -> bool:
    """Tell whether a value is a class whose instances are methods.

    Args:
        value: anything.

    Returns:
        True for a class with the members of :class:`Method`.
    """
    return isinstance(value, type) and dataclasses.is_dataclass(value) and all(hasattr(value, n) for n in _MEMBERS)


def checked(kind: Any, spelled: str) -> type[Method]:
    """Return a class whose instances are methods; refuse anything else.

    Raises:
        MethodClassError: it is none; the message says what it lacks.
    """
    if not isinstance(kind, type):
        raise MethodClassError(
            f"{spelled} is {type(kind).__name__} {kind!r:.60}, not the class of a method.", help=_EXAMPLE
        )
    lacking = [name for name in _MEMBERS if not hasattr(kind, name)]
    if lacking:
        raise MethodClassError(
            f"{spelled} is not a method.", facts=f"it has no {', no '.join(lacking)}.", help=_EXAMPLE
        )
    if not dataclasses.is_dataclass(kind):
        raise MethodClassError(
            f"{spelled} is not a dataclass, and the options of a method are the fields of one.", help=_EXAMPLE
        )
    undeclared = _not_fields(kind)
    if undeclared:
        raise MethodClassError(
            f"{spelled} has {undeclared[0]!r}, which is not an option.",
            facts="the class that it inherits from is a dataclass, and it is not one itself.",
            help=f"@dataclass(frozen=True) above class {kind.__name__}",
        )
    fixed = {field.name for field in dataclasses.fields(kind)} & set(Method.__annotations__)
    if fixed:
        raise MethodClassError(
            f"{spelled} has an option {sorted(fixed)[0]!r}, which belongs to the class.",
            facts="a dataclass takes every annotated attribute for an option, unless it knows it for a ClassVar.",
            help="from typing import ClassVar, at the top of the module; then name: ClassVar[str] = ...",
        )
    if not (isinstance(kind.name, str) and kind.name.strip()):  # type: ignore[attr-defined]
        raise MethodClassError(f"{spelled} has no name.", help='name: ClassVar[str] = "mine"')
    method: type[Method] = kind  # type: ignore[assignment]  # which is what has been checked
    return method


def _not_fields(kind: type) -> list[str]:
    """Return what a subclass that is not a dataclass itself declares as options are, which no option becomes."""
    if "__dataclass_fields__" in vars(kind):
        return []
    declared = vars(kind).get("__annotations__", {})
    return [name for name, told in declared.items() if "ClassVar" not in str(told)]


class Local:
    """What most methods share: one segment per local layer, each trained by a loss of its own."""

    reference: ClassVar[str] = ""
    deviations: ClassVar[tuple[str, ...]] = ()

    @property
    def grain(self) -> Grain:
        """The stem and every block are local layers; what follows the last block belongs to it."""
        return Grain()

    @property
    def together(self) -> int:
        """Only the last local layer is in the last segment."""
        return 1

    @property
    def cut(self) -> CutSpec:
        """One segment per local layer."""
        return CutSpec()


class LayerByLayer(Local):
    """Methods whose layers are those of fully connected and convolutional nets: all that has weights is one."""

    @property
    def grain(self) -> Grain:
        """Stem in the first block, pooling in the layer before it, hidden linear layers and the classifier alone."""
        return Grain(stem="merged", classifier="own", hidden_linear="own", pool="same")


class Uncut:
    """What methods without a cut share: the whole model is one segment."""

    reference: ClassVar[str] = ""
    deviations: ClassVar[tuple[str, ...]] = ()

    @property
    def grain(self) -> Grain:
        """Which local layers the method cuts between: none, so any."""
        return Grain()

    @property
    def together(self) -> int:
        """All layers stay together."""
        return 10**9

    @property
    def cut(self) -> CutSpec:
        """No cut."""
        return CutSpec(segments=1)


def isolated(
    method: Any,
    segments: Segments,
    supervise: Callable[[Segment], Sequence[Branch]],
    *,
    output: LocalLoss | None = None,
    **more: Any,
) -> Plan:
    """Return the plan in which every segment but the last is trained by the branches after it, and by nothing else.

    Args:
        method: the method; its name, options, reference and deviations go into the plan.
        segments: at least two.
        supervise: makes the branches of a segment; blocks of the same name, in branches of several segments, are one.
        output: loss of the last segment; default is the cross-entropy on the model's own output.
        more: other fields of :class:`localize.ir.Plan`, such as ``update="immediate"``.

    Raises:
        MethodError: there is no cut.
        PlanError: ``supervise`` returns something else than branches.
    """
    needs_two(method, segments)
    branches = [_branches_of(method, segment, supervise(segment)) for segment in segments.segments[:-1]]
    losses = tuple(
        LocalLoss(
            f"loss_{k}",
            Route(k, k),
            tuple(branch.term for branch in own),
            tuple(dict.fromkeys((f"segment_{k}", *(b.name for branch in own for b in branch.blocks if b.parameters)))),
        )
        for k, own in enumerate(branches)
    )
    attached = {block.name: block for own in branches for branch in own for block in branch.blocks}
    return Plan(
        method=method.name,
        options=dataclasses.asdict(method),
        segments=segments,
        blocks=(*blocks.of_segments(segments), *attached.values()),
        losses=(*losses, output or blocks.output_loss(segments)),
        update=more.pop("update", "end"),
        reference=method.reference,
        deviations=more.pop("deviations", method.deviations),
        **more,
    )


def _branches_of(method: Any, segment: Segment, branches: Any) -> tuple[Branch, ...]:
    """Return the branches of a segment.

    Raises:
        PlanError: there is none, or it is something else.
    """
    if isinstance(branches, list | tuple) and branches and all(isinstance(one, Branch) for one in branches):
        return tuple(branches)
    told = f"{branches!r:.60}" if isinstance(branches, list | tuple) else type(branches).__name__
    raise PlanError(
        f"supervise() of {method.name} returns {told} for segment {segment.index}, not a list of branches.",
        facts="every segment but the last is trained by its branches, one at least.",
        help='return [localize.methods.headed(segment, f"head_{segment.index}", module, Term(my_loss))]',
    )


def needs_two(method: Any, segments: Segments) -> None:
    """Refuse a model without a cut.

    Raises:
        MethodError: there is none.
    """
    if len(segments) < 2:
        layers = len(segments.layout.layers)
        raise MethodError(
            f"{method.name} needs at least two segments, {segments.trunk.name} has one.",
            facts=[f"it has {layers} local layer{'' if layers == 1 else 's'}.", *_frozen(segments.trunk)],
            help=more_segments(segments),
        )


def more_segments(segments: Segments) -> str:
    """Say how a model that is one segment can be cut, by what has not been asked for."""
    trunk, layers = segments.trunk, len(segments.layout.layers)
    if layers > 1:
        return Advice(f"cut={layers}, or any number from 2 on", f"-K {layers}, or any number from 2 on")
    places = len(cuts.candidates(trunk))
    if places:
        spec = f'cut=localize.CutSpec(segments={places + 1}, by="node") cuts between any operations'
        return Advice(spec, f"-K {places + 1} --cut-by node cuts between any operations")
    if _frozen(trunk):
        return "requires_grad_(True) on earlier layers: gradients stop only between layers that are trained"
    return "a model in which one to three tensors lead from layer to layer; or backprop"


def _frozen(trunk: Trunk) -> list[str]:
    """Say how much of a model is not trained, where something is not."""
    sizes = [(p.numel(), p.requires_grad) for p in trunk.model.parameters()]
    frozen, total = sum(size for size, trained in sizes if not trained), sum(size for size, _ in sizes)
    return [f"{frozen:,} of its {total:,} parameters are frozen (requires_grad is False)."] if frozen else []
