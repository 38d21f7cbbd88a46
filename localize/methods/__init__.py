"""The zoo of methods, one file each, found by name; and what a method of your own is made of.

A method is a frozen dataclass of options with a :class:`Method`'s members. It inherits :class:`Local`, gives itself a
``name``, and returns a :class:`Plan` from ``plan``::

    @dataclass(frozen=True)
    class Prototypes(Local):
        name: ClassVar[str] = "prototypes"
        scale: float = option(10.0, "what similarities are multiplied by", low=0)

        def plan(self, segments: Segments) -> Plan:
            def supervise(segment: Segment) -> list[Branch]:
                head = Similarities(segment.features, segments.trunk.num_classes, self.scale)
                return [headed(segment, f"head_{segment.index}", head, Term(F.cross_entropy))]

            return isolated(self, segments, supervise)

``localize.transform(model, Prototypes(scale=5.0), example_input=x)`` then trains by it. :data:`BRANCHES` are the heads
of the packaged methods by name, and :mod:`localize.losses` their losses.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from localize import outside
from localize.errors import UnknownNameError, did_you_mean
from localize.heads.blocks import of_module, of_segments, output_loss
from localize.heads.branch import Branch
from localize.heads.branches import BRANCHES, headed
from localize.heads.maps import FeatureMap
from localize.ir import (
    Block,
    CutSpec,
    Features,
    Grain,
    LabelKind,
    LocalLoss,
    Plan,
    Route,
    Segment,
    Segments,
    Target,
    Term,
    Trunk,
    Use,
)
from localize.methods import base
from localize.methods.accumulate import Accumulate
from localize.methods.auglocal import AugLocal
from localize.methods.backprop import Backprop
from localize.methods.base import LayerByLayer, Local, Method, MethodClassError, Uncut, is_class, isolated
from localize.methods.cafo import CascadedForward
from localize.methods.cfl import CFL
from localize.methods.checkpoint import Checkpoint
from localize.methods.dcl import DCL
from localize.methods.deep_supervision import DeepSupervision
from localize.methods.dfa import DirectFeedbackAlignment
from localize.methods.dgl import DGL
from localize.methods.drtp import DirectRandomTargetProjection
from localize.methods.fa import FeedbackAlignment
from localize.methods.feat import Feat
from localize.methods.ff import ForwardForward
from localize.methods.infopro import InfoPro
from localize.methods.ll_bpf import LocalLossWithoutBackprop
from localize.methods.ll_cont import LLCont, LLContRec
from localize.methods.mlaan import MLAAN
from localize.methods.pff import PredictiveForwardForward
from localize.methods.predsim import PredSim
from localize.methods.symba import SymBa
from localize.options import build, option
from localize.options import of as options_of

__all__ = [
    "BRANCHES",
    "METHODS",
    "Block",
    "Branch",
    "CutSpec",
    "FeatureMap",
    "Features",
    "Grain",
    "LayerByLayer",
    "Local",
    "LocalLoss",
    "Method",
    "MethodClassError",
    "Plan",
    "Route",
    "Segment",
    "Segments",
    "Target",
    "Term",
    "Trunk",
    "Uncut",
    "Use",
    "checked",
    "create",
    "exists",
    "get",
    "headed",
    "is_class",
    "isolated",
    "name_of",
    "names",
    "of_module",
    "of_segments",
    "option",
    "output_loss",
]

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Backprop,
        AugLocal,
        DCL,
        DGL,
        PredSim,
        LocalLossWithoutBackprop,
        FeedbackAlignment,
        DirectFeedbackAlignment,
        DirectRandomTargetProjection,
        ForwardForward,
        SymBa,
        PredictiveForwardForward,
        CascadedForward,
        InfoPro,
        LLCont,
        LLContRec,
        Feat,
        CFL,
        MLAAN,
        Checkpoint,
        Accumulate,
        DeepSupervision,
    )
}
"""The class of every packaged method, by its name."""

CHECKED: tuple[tuple[str, dict[str, Any]], ...] = (("auglocal", {"d": 2}), ("dcl", {}))
"""Methods, with options, by which it is checked whether a model converts: one whose heads copy layers of the trunk, and
one whose heads are small and read a block that they share. The last, which is quick, is also run with data."""


BACKPROP = Backprop.name
"""What everything is compared with."""
CHECKPOINTING, ACCUMULATION = Checkpoint.name, Accumulate.name
RIVALS = (BACKPROP, CHECKPOINTING, ACCUMULATION)
"""Methods without a local loss."""
PLANNED = AugLocal.name
"""The method that cuts are planned for if nobody names one."""


GROUP = "localize.methods"
"""The entry points by which an installed package offers methods of its own."""


def checked(kind: Any, spelled: str) -> type[Method]:
    """Return a class that is a method; refuse anything else, and a class with the name of a packaged method.

    Args:
        kind: a class.
        spelled: where it is, for messages: ``FILE.py:Class``.

    Raises:
        MethodClassError: it is not a method, and the message says what it lacks; or its name is taken.
    """
    found = base.checked(kind, spelled)
    if METHODS.get(found.name, found) is not found:
        raise MethodClassError(
            f"{spelled} calls itself {found.name!r}, which is a packaged method.",
            facts="reports and plans would not tell the two apart.",
            help=f'a name of its own: name: ClassVar[str] = "my-{found.name}"',
        )
    return found


def names() -> tuple[str, ...]:
    """Return the names of the packaged methods."""
    return tuple(METHODS)


def exists(name: str) -> bool:
    """Tell whether a text is the name of a method, packaged or offered, or spells the class of one.

    Args:
        name: what :func:`get` takes.

    Returns:
        True where it is known. Nothing is imported to find out.
    """
    return name in METHODS or outside.is_spelled(name) or any(one.name == name for one in outside.offers(GROUP))


def get(name: str) -> type[Method]:
    """Return the class of a method: a dataclass whose fields are its options.

    Args:
        name: of a packaged method, or of one that an installed package offers (entry point ``localize.methods``); or
            where a class is, ``FILE.py:Class`` or ``module:Class``.

    Raises:
        UnknownNameError: there is no such method.
        CodeError: what it names cannot be imported.
        MethodClassError: what it names is not a method.
    """
    if name in METHODS:
        return METHODS[name]
    if outside.is_spelled(name) or name.endswith(".py"):
        return checked(outside.load(name, like="CLASS", fits=is_class), name)
    offer = outside.offered(GROUP, name)
    if offer is not None:
        return checked(offer.load(), offer.value)
    offers = [one.name for one in outside.offers(GROUP)]
    raise UnknownNameError(
        f"there is no method {name!r}.",
        facts=[
            f"methods are {', '.join(METHODS)}.",
            *([f"installed packages offer {', '.join(offers)}."] if offers else []),
        ],
        help=did_you_mean(name, (*METHODS, *offers)) or "localize methods; or FILE.py:CLASS for one of your own",
    )


def create(name: str, /, **options: Any) -> Method:
    """Make a method with these options; ``name`` is what :func:`get` takes.

    Args:
        options: values of its fields.

    Returns:
        The method, an object of its dataclass.

    Raises:
        UnknownNameError: there is no such method.
        CodeError: what it names cannot be imported.
        MethodClassError: what it names is not a method.
        OptionError: it has no such option, or the option cannot have this value.
    """
    return build(get(name), options, f"method {name!r}")


def taking(kind: LabelKind) -> tuple[str, ...]:
    """Return the methods that take labels of this kind; with the option that it needs, where the defaults do not."""
    return tuple(told for name, method in METHODS.items() for told in _taking(name, method, kind))


def _taking(name: str, method: type, kind: LabelKind) -> Iterator[str]:
    if kind in labels_of(method()):
        yield name
        return
    for one in options_of(method):
        yield from (f"{name} ({one.name}={c})" for c in one.choices if kind in labels_of(method(**{one.name: c})))


def labels_of(method: Method) -> tuple[LabelKind, ...]:
    """Return what labels a method takes: class ids, where it does not say."""
    return getattr(method, "labels", ("ids",))


def name_of(kind: type) -> str:
    """Return what :func:`get` finds a class by.

    Args:
        kind: the class of a method.

    Raises:
        MethodClassError: it is not a method.
    """
    name = getattr(kind, "name", "")
    if METHODS.get(name) is kind:
        return str(name)
    text = outside.spelled(kind)
    checked(kind, text)
    return text
