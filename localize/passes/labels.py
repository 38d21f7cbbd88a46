"""Choose what class scores are trained by, and say which labels a step takes: passes from a plan to a plan.

Methods train class scores by the cross-entropy with class ids. Where a recipe asks for another loss of labels, it
replaces each such term: on the model's own output, on those of local heads, and on further outputs. All other terms
stay as the method has them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from localize import methods, options, outside
from localize.errors import Advice, MethodError, OptionError
from localize.heads import blocks
from localize.heads.class_weights import ClassWeights
from localize.ir import LabelKind, Labels, LocalLoss, Plan, Target, Term, importable
from localize.losses import about
from localize.options import build, option

LOSSES = {
    "cross-entropy": blocks.CROSS_ENTROPY,
    "focal": "localize.losses.focal",
    "bce": "localize.losses.binary_cross_entropy",
}
"""Losses of class scores and labels by the words of a recipe; ``FILE.py:NAME`` and ``module:NAME`` name others."""
GROUP = "localize.losses"
"""The entry points by which an installed package offers losses of its own."""
KINDS: tuple[LabelKind, ...] = ("ids", "soft", "multi")
WEIGHTS = "class_weights"
"""Name of the block that holds the weights of the classes."""


@dataclass(frozen=True)
class LabelLoss:
    """What class scores are trained by."""

    name: str = option(
        "cross-entropy",
        "loss of class scores: cross-entropy, focal (a softmax's), or bce (a sigmoid for each class, also for "
        "multi-label targets)",
        choices=tuple(LOSSES),
    )
    smoothing: float = option(0.0, "share of every label that is spread over all classes, below 1", low=0)
    weights: tuple[float, ...] = option((), "how much each class counts: one number for each, from 0 on")
    gamma: float = option(2.0, "of focal: how fast a class counts less as it becomes probable", low=0)

    @property
    def told(self) -> dict[str, Any]:
        """Name and options, without those that are at their defaults and do nothing."""
        kept = {item.name: getattr(self, item.name) for item in fields(self)}
        idle = ("gamma",) if self.name != "focal" else ()
        return {k: v for k, v in kept.items() if k not in idle and (k in ("name", "gamma") or v)}


def create(
    asked: str | Mapping[str, Any] | Callable[..., Any] | LabelLoss | None, own: Sequence[str] = ()
) -> LabelLoss:
    """Make the loss of labels that was asked for, by its name or as name and options.

    Args:
        asked: the name, of the packaged ones or ``FILE.py:NAME``, ``module:NAME``; a mapping with ``name`` and options;
            a function of yours; or the loss itself. None is the plain cross-entropy.
        own: values of the method's own option ``loss``, for the message.

    Raises:
        OptionError: no such loss or option, or a value that it cannot have. ``option`` is the key, or empty.
    """
    if isinstance(asked, LabelLoss):
        asked = {k: v for k, v in asdict(asked).items() if v != getattr(LabelLoss(), k)}
    if callable(asked) and not isinstance(asked, type):
        importable(asked)
        asked = outside.spelled(asked)
    if isinstance(asked, str):
        asked = {"name": asked}
    if not isinstance(asked, Mapping | None):
        raise OptionError(
            f"loss cannot be {asked!r}.",
            facts=f"it is one of {', '.join(LOSSES)}, a function, FILE.py:NAME, or a mapping with name and options.",
            help=Advice('loss={"name": "cross-entropy", "smoothing": 0.1}', "--loss cross-entropy --smoothing 0.1"),
        )
    given = dict(asked or {})
    weights = given.pop("weights", ())
    outer = given["name"] if is_outer(given.get("name")) else None
    try:
        made: LabelLoss = build(LabelLoss, given | ({"name": "cross-entropy"} if outer else {}), "the loss of labels")
        made = replace(made, name=outer or made.name)
    except OptionError as error:
        also = [f"values of the method's own option are {', '.join(own)}."] if own and error.option == "name" else []
        raise OptionError(error.problem, facts=[*error.facts, *also], help=error.help, option=error.option) from error
    if made.smoothing >= 1:
        raise OptionError(
            f"smoothing cannot be {made.smoothing:g}.",
            facts="it is the share of a label that is spread over all classes: at 1 nothing of the label is left.",
            help=Advice("smoothing=0.1", "--smoothing 0.1"),
            option="smoothing",
        )
    if "gamma" in given and made.name != "focal":
        raise OptionError(
            f"the loss {made.name!r} has no gamma.",
            facts="gamma is an option of focal.",
            help=Advice('loss={"name": "focal", "gamma": ...}', "--loss focal --focal-gamma ..."),
            option="gamma",
        )
    return replace(made, weights=_checked_weights(weights))


def is_outer(name: Any) -> bool:
    """Tell whether a loss is one of the user's, or of an installed package; nothing is imported."""
    if not isinstance(name, str) or name in LOSSES:
        return False
    return outside.is_spelled(name) or any(one.name == name for one in outside.offers(GROUP))


def _dotted(asked: LabelLoss) -> str:
    """Return the importable name of the function of a loss.

    Raises:
        UnknownNameError: there is no such function of the user's.
        CodeError: it cannot be imported.
        MethodError: it has no name that text can call it by.
        OptionError: it does not take the options that it is given.
    """
    if asked.name in LOSSES:
        return LOSSES[asked.name]
    offer = outside.offered(GROUP, asked.name)
    found = offer.load() if offer is not None else outside.load(asked.name, like="LOSS", fits=callable)
    if not callable(found):
        raise OptionError(
            f"loss {asked.name!r} is {type(found).__name__}, not a function of class scores and labels.",
            help="def my_loss(scores, labels): return ...",
            option="name",
        )
    needed = {"label_smoothing": asked.smoothing, "weight": asked.weights}
    taken = inspect.signature(found).parameters
    for keyword in (keyword for keyword, value in needed.items() if value and keyword not in taken):
        raise OptionError(
            f"loss {asked.name!r} takes no {keyword}.",
            facts=f"its arguments are {', '.join(taken)}.",
            help=f"def {found.__name__}(scores, labels, {keyword}=...)",
            option="smoothing" if keyword == "label_smoothing" else "weights",
        )
    return importable(found)


def own(method: str) -> tuple[str, ...]:
    """Return the values of a method's own option ``loss``, as infopro has one; nothing if it has no such option."""
    return next((one.choices for one in options.of(methods.get(method)) if one.name == "loss"), ())


def _checked_weights(weights: Any) -> tuple[float, ...]:
    weights = weights.tolist() if hasattr(weights, "tolist") else weights  # a tensor, or an array of numpy's
    listed = isinstance(weights, list | tuple)
    numbers = listed and all(isinstance(w, int | float) and not isinstance(w, bool) for w in weights)
    if not numbers or not all(math.isfinite(w) and w >= 0 for w in weights) or (weights and not any(weights)):
        raise OptionError(
            f"the weights of the classes cannot be {weights!r}.",
            facts="they are a list of finite numbers from 0 on, one for each class, not all of them 0.",
            help=Advice('"weights": [1.0, 2.0, ...]', "--class-weights 1,2,..., or a file of them"),
            option="weights",
        )
    return tuple(float(w) for w in weights)


# ------------------------------------------------------------------------------------------------------------ the loss


def supervise(plan: Plan, asked: LabelLoss) -> Plan:
    """Return the plan with this loss in the place of each cross-entropy of class scores and labels.

    Raises:
        OptionError: another number of weights than of classes.
        MethodError: the plan has no such cross-entropy, feeds back its error, or adds up parts of the batch, which the
            loss does not add up over.
    """
    if asked == LabelLoss():
        return plan
    trunk = plan.segments.trunk
    if asked.weights and len(asked.weights) != trunk.num_classes:
        raise OptionError(
            f"{len(asked.weights)} weights of classes were given, and {trunk.name} has {trunk.num_classes} classes.",
            help="one weight for each class, in the order of the class ids",
            option="weights",
        )
    changed = [term for loss in plan.losses for term in loss.terms if _is_of_labels(term)]
    if plan.waits or not changed:
        why = "it feeds back the error of the output, which is that of the plain cross-entropy." if plan.waits else (
            "none of its losses compares class scores with labels by a cross-entropy."
        )  # fmt: skip
        raise MethodError(
            f"{plan.method} cannot be trained by another loss of labels.",
            facts=why,
            help=f"leave loss out; or a method whose losses are all of that kind: {', '.join(methods.taking('multi'))}",
        )
    dotted = _dotted(asked)
    if asked.weights and about(dotted).weights != "mean" and any(loss.part for loss in plan.losses):
        raise MethodError(
            f"{plan.method} cannot weigh classes in {asked.name}.",
            facts=[
                "it adds up the losses of parts of the batch by their numbers of images.",
                f"{asked.name} with class weights is divided by the weights of the classes in the batch.",
            ],
            help="the loss bce, which is not; or another method",
        )
    losses = tuple(
        replace(loss, terms=tuple(_changed(term, asked, dotted) for term in loss.terms)) for loss in plan.losses
    )
    made = replace(plan, losses=losses, loss=asked.told, deviations=(*plan.deviations, *_stated(plan, asked)))
    if not asked.weights:
        return made
    block = blocks.of_module(WEIGHTS, ClassWeights(asked.weights), role="shared", facts={"weights": asked.weights})
    return replace(made, blocks=(*plan.blocks, block))


def _is_of_labels(term: Term) -> bool:
    return term.loss == blocks.CROSS_ENTROPY and term.target == Target()


def _changed(term: Term, asked: LabelLoss, dotted: str) -> Term:
    if not _is_of_labels(term):
        return term
    options = {"label_smoothing": float(asked.smoothing)} if asked.smoothing else {}
    if asked.name == "focal":
        options["gamma"] = float(asked.gamma)
    return replace(
        term,
        loss=dotted,
        options=(*term.options, *sorted(options.items())),
        weights=WEIGHTS if asked.weights else None,
    )


def _stated(plan: Plan, asked: LabelLoss) -> Iterator[str]:
    """Say what the sources do not: what takes the place of the cross-entropy, and what it leaves as it was."""
    options = {k: (f"of {len(v)} classes" if k == "weights" else v) for k, v in asked.told.items() if k != "name"}
    told = ", ".join(f"{key} {value}" for key, value in options.items())
    yield (
        f"Class scores are trained by {asked.name}{f' ({told})' if told else ''}; the sources have the plain "
        "cross-entropy."
    )
    kept = {
        term.loss.rpartition(".")[2]: loss.name
        for loss in reversed(plan.losses)
        for term in loss.terms
        if not _is_of_labels(term) and term.target.of == "labels"
    }
    if kept:
        named = ", ".join(f"{function} (e.g. {loss})" for function, loss in kept.items())
        yield f"What else compares with labels stays as in the sources: {named}."


# ---------------------------------------------------------------------------------------------- which labels it takes


def declare_labels(plan: Plan) -> Plan:
    """Return the plan with the kinds of labels that its step takes: those that all who read labels take."""
    readers = list(_readers(plan))
    kinds = tuple(kind for kind in KINDS if all(kind in one.takes for one in readers))
    why = next((one.told for one in readers if "soft" not in one.takes), "")
    counted = next((one.told for one in readers if not one.ignores), "")
    return replace(plan, labels=Labels(kinds, why, counted, methods.taking("soft")))


@dataclass(frozen=True)
class _Reader:
    """What reads labels: the kinds that it takes, what it reads, in words, and whether it leaves out those of -100."""

    takes: tuple[str, ...]
    told: str
    ignores: bool = False


def _readers(plan: Plan) -> Iterator[_Reader]:
    """Yield everything that reads labels."""
    if plan.segments.trunk.output_size:
        yield _Reader(("ids",), "the model classifies pixels, which have one class each.", ignores=True)
    if plan.input is not None:
        yield _of_block(plan, plan.input.block, "what enters the first segment")
    for loss in plan.losses:
        for term in loss.terms:
            yield from _of_term(plan, loss, term)


def _of_term(plan: Plan, loss: LocalLoss, term: Term) -> Iterator[_Reader]:
    if term.labels:
        yield _of_block(plan, term.head or "", loss.name)
    if term.target.of == "error":
        yield _Reader(("ids", "soft"), f"{loss.name} reads the error of the output for each image.")
    elif term.target.of == "labels" and term.target.block is not None:
        yield _of_block(plan, term.target.block, loss.name)
    elif term.target.of == "labels":
        known = about(term.loss)
        told = f"{loss.name} is {term.loss}, which reads {known.reads or 'class ids'}."
        yield _Reader(known.labels, told, known.ignores)


def _of_block(plan: Plan, name: str, whose: str) -> _Reader:
    module = plan.block(name).module
    reads = getattr(module, "reads_of_labels", "class ids")
    return _Reader(getattr(module, "takes_labels", ("ids",)), f"{whose}: {name} reads {reads}.")
