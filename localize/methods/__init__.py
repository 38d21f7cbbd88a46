"""The zoo of methods: one file each, found by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from localize.errors import UnknownNameError, did_you_mean
from localize.ir import LabelKind
from localize.methods.accumulate import Accumulate
from localize.methods.auglocal import AugLocal
from localize.methods.backprop import Backprop
from localize.methods.base import Method
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
from localize.options import build

METHODS: dict[str, type] = {
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


def names() -> tuple[str, ...]:
    """Return the names of all methods."""
    return tuple(METHODS)


def get(name: str) -> type:
    """Return the class of the method called ``name``: a frozen dataclass whose fields are its options.

    Raises:
        UnknownNameError: there is no such method.
    """
    if name not in METHODS:
        raise UnknownNameError(
            f"there is no method {name!r}.",
            facts=f"methods are {', '.join(METHODS)}.",
            help=did_you_mean(name, METHODS) or "localize recipes ls",
        )
    return METHODS[name]


def create(name: str, **options: Any) -> Method:
    """Make the method called ``name`` with these options.

    Raises:
        UnknownNameError: there is no such method.
        OptionError: it has no such option, or the option cannot have this value.
    """
    return build(get(name), options, f"method {name!r}")


def taking(kind: LabelKind) -> tuple[str, ...]:
    """Return the methods that take labels of this kind; with the option that it needs, where the defaults do not."""
    return tuple(told for name, method in METHODS.items() for told in _taking(name, method, kind))


def _taking(name: str, method: type, kind: LabelKind) -> Iterator[str]:
    plain = method()
    if kind in labels_of(plain):
        yield name
        return
    for item in dataclasses.fields(method):
        for choice in item.metadata["choices"]:
            if kind in labels_of(dataclasses.replace(plain, **{item.name: choice})):
                yield f"{name} ({item.name}={choice})"


def labels_of(method: Method) -> tuple[LabelKind, ...]:
    """Return what labels a method takes: class ids, where it does not say."""
    return getattr(method, "labels", ("ids",))
