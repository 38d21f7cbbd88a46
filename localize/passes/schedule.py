"""Run a plan in less memory: recomputation in the backward, parts of the batch, and losses scaled for float16.

A pass from a plan to a plan; what the losses train, and what they learn, stays the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeVar

from torch import fx, nn

from localize.errors import Advice, MethodError, OptionError
from localize.ir import Plan, Segment, facts
from localize.losses import about
from localize.ops.parts import is_kept
from localize.options import build, option
from localize.passes.chains import divided_at
from localize.torch_names import BATCH_NORMS, RUNNING_NORMS

T = TypeVar("T")
RECOMPUTED = ("none", "head", "body", "all")
"""What of a segment is computed again."""


@dataclass(frozen=True)
class Schedule:
    """How the training step spends memory and arithmetic.

    ``recompute`` keeps of a segment (``body``), of its head (``head``) or of both (``all``) only what enters, and runs
    them again in the backward: the same gradients, bit for bit, for up to one more forward. ``micro_batch`` takes so
    many images at a time through a segment, its head and its backward: the same gradients up to rounding, where no loss
    looks at several images. ``recompute_at`` and ``micro_batch_at`` set these for single segments, by name. With
    BatchNorms, whose statistics are those of the whole batch, a segment is swept several times, see
    :func:`localize.ops.exact_parts`; dropout and stochastic depth then draw for the whole batch too. Sweeps begin at
    the inputs of norms that ``keep_at`` names, which are kept for the whole batch: less arithmetic for more memory. A
    dense block keeps what it concatenates, unless ``keep_at`` says otherwise (``none@features.denseblock*``).
    ``scores`` is what a step returns of the class scores (N, Z) after each loss: all of them, which live as long as the
    step's result; their ``argmax``, the classes (N,) that they predict; or none. If the model answers by the sum over
    all losses, all scores are returned even if ``argmax`` is asked for.
    ``loss_scaling`` multiplies every loss by the scale of the gradient scaler that the step is given, see
    :meth:`localize.LocalModel.step`.
    """

    recompute: str = option("none", "what is computed again in the backward instead of kept", choices=RECOMPUTED)
    recompute_at: str = option(
        "", "the same for segments by the names of their ends: all@layer1.*,none@layer2.0; the others as above"
    )
    micro_batch: int = option(0, "number of images that a segment takes at a time; 0: the whole batch", low=0)
    micro_batch_at: str = option(
        "", "number of images for segments by the names of their ends: 16@layer1.*,4@layer2.0; the others as above"
    )
    keep_at: str = option(
        "",
        "norms whose inputs parts keep for the whole batch, by their last names and those of ends of segments: "
        "bn2@layer1.*,bn1+bn2@layer2.0",
    )
    ghost_norm: bool = option(False, "let BatchNorm normalise every micro-batch by its own statistics: inexact")
    scores: Literal["all", "argmax", "none"] = option(
        "all", "what a step returns of the class scores after each loss", choices=("all", "argmax", "none")
    )
    loss_scaling: bool = option(False, "let the step take a gradient scaler, which float16 needs")


def create(**options: Any) -> Schedule:
    """Make a schedule.

    Raises:
        OptionError: an unknown option, or a value that it cannot have.
    """
    return build(Schedule, options, "the schedule")


def names() -> tuple[str, ...]:
    """Return the names of the options of a schedule."""
    return tuple(item.name for item in dataclasses.fields(Schedule))


def apply(plan: Plan, options: Mapping[str, Any]) -> Plan:
    """Return the plan as these options of a :class:`Schedule` say.

    Raises:
        OptionError: an unknown option, or a value that it cannot have.
        MethodError: the plan does not run on a part of the batch, or its BatchNorms would see other statistics.
    """
    asked = create(**options)
    again = tuple(_recomputed(plan, asked))
    if again:
        plan = _without_writers(replace(plan, recompute=tuple(dict.fromkeys((*plan.recompute, *again)))))
    sizes = _sizes(plan, asked)
    if any(sizes):
        plan = _in_micro_batches(replace(plan, part_sizes=sizes if len(set(sizes)) > 1 else ()), asked, max(sizes))
    if not (asked.scores == "argmax" and plan.answer == "softmax_sum"):
        plan = replace(plan, scores=asked.scores)
    if asked.keep_at and not plan.exact:
        raise OptionError(
            "option 'keep_at' of the schedule is for segments with BatchNorm that are swept in parts.",
            facts="no segment is: nothing would be kept.",
            help=Advice("micro_batch=16, or keep_at left out", "--micro-batch 16, or --keep-at left out"),
            option="keep_at",
        )
    return replace(plan, scaled=True) if asked.loss_scaling else plan


def _recomputed(plan: Plan, asked: Schedule) -> Iterator[str]:
    """Yield the segments and heads that losses train, and that are computed again."""
    what = _of_segments(plan, asked.recompute, "recompute_at", asked.recompute_at, _one_of_recomputed)
    for segment in plan.segments.segments:
        if what[segment.index] in ("body", "all") and segment.name not in plan.frozen:
            yield segment.name
    for loss in plan.losses:
        if what[loss.route.stop] in ("head", "all"):
            yield from (term.head for term in loss.terms if term.head is not None)


def _one_of_recomputed(word: str) -> str | None:
    return word if word in RECOMPUTED else None


def _without_writers(plan: Plan) -> Plan:
    """Return the plan without the recomputation of what writes into the model's own tensors: it would write again."""
    writers = {segment.name for segment in plan.segments.segments if _writes(segment.graph)}
    writers |= {b.name for b in plan.blocks if isinstance(b.module, nn.Module) and _holds_writer(b.module)}
    left = [name for name in plan.recompute if name in writers]
    if not left:
        return plan
    told = (
        f"{', '.join(left)} {'is' if len(left) == 1 else 'are'} not computed again in the backward, since the forward "
    )
    told += "writes into tensors of the model there, and would write twice."
    kept = tuple(name for name in plan.recompute if name not in writers)
    return replace(plan, recompute=kept, deviations=(*plan.deviations, told))


def _writes(graph: fx.Graph) -> tuple[str, ...]:
    """Return the model's own tensors that a graph writes."""
    return tuple(dict.fromkeys(name for node in graph.nodes for name in facts(node).writes))


def _holds_writer(module: nn.Module) -> bool:
    """Tell whether a head holds a recorded graph that writes."""
    return any(isinstance(part, fx.GraphModule) and _writes(part.graph) for part in module.modules())


def _sizes(plan: Plan, asked: Schedule) -> tuple[int, ...]:
    """Return how many images each loss takes at a time; 0 is the whole batch."""
    size_of = _of_segments(plan, asked.micro_batch, "micro_batch_at", asked.micro_batch_at, _whole_number)
    return tuple(size_of[loss.route.stop] for loss in plan.losses)


def _whole_number(word: str) -> int | None:
    return int(word) if word.isdecimal() else None


NOTHING = "none"
"""What ``keep_at`` says of segments in which no inputs of norms are kept, not even those of a dense block."""
_AT = {
    "micro_batch_at": ("SIZE", "16@layer1.*,4@layer2.0"),
    "recompute_at": ("WHAT", "all@layer1.*,none@layer2.0"),
    "keep_at": ("NORM", "bn2@layer1.*,bn1+bn2@layer2.0"),
}
"""What stands before the @ of an option, and an example of it."""


def _of_segments(plan: Plan, default: T, option: str, text: str, read: Callable[[str], T | None]) -> dict[int, T]:
    """Return what an option says of each segment, by the segment's number; of several entries the last wins.

    Raises:
        OptionError: an entry cannot be read, or matches no segment.
    """
    ends = {segment.index: segment.ends_at for segment in plan.segments.segments}
    found = dict.fromkeys(ends, default)
    for said in filter(None, (part.strip() for part in text.split(","))):
        word, _, pattern = said.partition("@")
        value, numbers = read(word.strip()), [k for k, end in ends.items() if fnmatchcase(end, pattern)]
        if value is None or not numbers:
            name, example = _AT[option]
            what = f", and WHAT one of {', '.join(RECOMPUTED)}" if option == "recompute_at" else ""
            raise OptionError(
                f"option {option!r} of the schedule cannot hold {said!r}.",
                facts=f"it is {name}@NAME{what}; segments end at {_some(ends.values())}, and * matches anything.",
                help=Advice(f"{option}={example!r}", f"--{option.replace('_', '-')} {example!r}"),
                option=option,
            )
        found |= dict.fromkeys(numbers, value)
    return found


def _some(names: Iterable[str]) -> str:
    shown = list(names)
    return ", ".join(shown if len(shown) < 7 else [*shown[:3], "...", *shown[-2:]])


def _in_micro_batches(plan: Plan, asked: Schedule, size: int) -> Plan:
    why = _whole_only(plan)
    if why:
        raise MethodError(
            f"{plan.method} cannot train on micro-batches.", facts=why, help="leave micro_batch out, or another method"
        )
    if not any(batch_norms(plan)):
        return replace(plan, micro_batch=size)
    if not asked.ghost_norm:
        return _in_exact_parts(plan, asked, size)
    told = "BatchNorm normalises every micro-batch by its own statistics (ghost batch normalisation; Hoffer, Hubara, "
    told += "Soudry, NeurIPS 2017), and its running statistics move once for each."
    return replace(plan, micro_batch=size, deviations=(*plan.deviations, told))


def _in_exact_parts(plan: Plan, asked: Schedule, size: int) -> Plan:
    """Let BatchNorms see the whole batch, while segments take it in parts."""
    starts = [loss.route.start for loss in plan.losses if loss.route.start > 0]
    why = [f"{path} ({what})" for path, what in _unknown(plan)]
    if len(set(starts)) < len(starts):
        why = ["several losses start after the same cut; the first of them would take over what the others read."]
    if why:
        raise MethodError(
            f"{plan.method} cannot train on parts of the batch with the BatchNorm of the whole.",
            facts=[*why[:3], *([f"and {len(why) - 3} more"] if len(why) > 3 else [])],
            help=Advice(
                "leave micro_batch out, recompute='all' instead; or ghost_norm=True, where each part has statistics of "
                "its own",
                "leave --micro-batch out, --recompute all instead; or --ghost-norm, where each part has statistics of "
                "its own",
            ),
        )
    return replace(plan, micro_batch=size, exact=True, kept=tuple(_kept(plan, asked)))


def _kept(plan: Plan, asked: Schedule) -> Iterator[tuple[str, str]]:
    """Yield the losses in parts, with what they keep.

    Raises:
        OptionError: something is to be kept, and no such norm is in these segments.
    """
    words = _of_segments(plan, None, "keep_at", asked.keep_at, lambda word: word or None)
    norms: list[str] = []
    missing = any(word not in (None, NOTHING) for word in words.values())
    for number, loss in enumerate(plan.losses):
        word, route = words[loss.route.stop], plan.segments.segments[loss.route.start : loss.route.stop + 1]
        if word is None:
            word = divided_at(route[0].graph, plan.segments.trunk.twin) if len(route) == 1 else ""
        elif word == NOTHING:
            word = ""
        else:
            own = [path for path, part in _modules_of(plan, route) if isinstance(part, BATCH_NORMS)]
            norms += own
            word = word if any(is_kept(path, word) for path in own) else ""
            missing = missing and not word
        if word and (plan.part_sizes[number] if plan.part_sizes else True):
            yield loss.name, word
    if missing:
        raise OptionError(
            f"option 'keep_at' of the schedule cannot hold {asked.keep_at!r}.",
            facts=f"it is NORM@NAME; norms of these segments are {_some(norms) or 'none'}.",
            help=Advice(f"keep_at={_AT['keep_at'][1]!r}", f"--keep-at {_AT['keep_at'][1]!r}"),
            option="keep_at",
        )


def _unknown(plan: Plan) -> Iterator[tuple[str, str]]:
    """Yield what normalises by the batch, or draws, in a way that parts of it cannot: its path, and what it is."""
    for path, part in _modules(plan):
        drawn = getattr(part, "one_draw", "")
        if isinstance(drawn, str) and drawn:
            yield path, f"draws {drawn} once for a batch"
        elif isinstance(part, nn.SyncBatchNorm):
            yield path, "SyncBatchNorm"
        elif isinstance(part, RUNNING_NORMS) and not isinstance(part, BATCH_NORMS) and part.track_running_stats:
            yield path, f"running statistics of {type(part).__name__}"
        elif isinstance(part, nn.MultiheadAttention) and part.dropout:
            yield path, f"dropout {part.dropout:g} inside of attention"
        elif isinstance(part, (nn.AlphaDropout, nn.FeatureAlphaDropout, nn.RReLU, nn.FractionalMaxPool2d)):
            yield path, f"{type(part).__name__} draws"
        elif getattr(part, "mode", None) == "batch" and "drop" in type(part).__name__.lower():
            yield path, "one draw for the whole batch"
    for segment in plan.segments.segments:
        for node in segment.graph.nodes:
            name = str(getattr(node.target, "__name__", node.target))
            known = name in _DRAWS or (name == "bernoulli_" and facts(node).batched)
            if facts(node).draws and not known:
                yield f"{segment.name}: {node.name}", f"{name} draws"


_DRAWS = frozenset({"dropout", "dropout1d", "dropout2d", "dropout3d", "stochastic_depth", "drop_path"})
"""Functions that draw for each image by itself."""


def _whole_only(plan: Plan) -> str:
    """Say why the losses of a plan need the whole batch; nothing if they do not."""
    if plan.waits or plan.input is not None or plan.feedback:
        return "its losses wait for the whole forward, or what enters the model is made of the whole batch."
    if any(loss.part for loss in plan.losses):
        return "it takes the batch in parts already."
    written = dict.fromkeys(name for segment in plan.segments.segments for name in _writes(segment.graph))
    if written:
        return f"its forward writes {', '.join(list(written)[:3])}, once for each time it runs."
    terms = [term for loss in plan.losses for term in loss.terms]
    pairwise = {term.loss for term in terms if not about(term.loss).mean}
    if pairwise:
        return f"{', '.join(sorted(pairwise))} is not known as a mean over images: it may compare them with each other."
    weighted = {term.loss for term in terms if term.weights and about(term.loss).weights != "mean"}
    if weighted:
        return (
            f"{', '.join(sorted(weighted))} with class weights is divided by the weights of the classes in the batch: "
            "the loss of a part does not say what it is a share of."
        )
    for path, part in _modules(plan):
        why = getattr(part, "whole_batch", "")
        if isinstance(why, str) and why:
            return f"heads.{path} {why}."
    if plan.segments.trunk.output_size:
        return "the loss of an image that has pixels without a label is not a mean over images."
    return ""


def batch_norms(plan: Plan) -> Iterator[str]:
    """Yield the BatchNorms that a step runs."""
    return (path for path, part in _modules(plan) if isinstance(part, BATCH_NORMS))


def _modules(plan: Plan) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that a step runs, and what is inside of them, with their paths."""
    yield from _modules_of(plan, plan.segments.segments)
    for block in plan.blocks:
        if block.module is not None:
            yield from _inside(block.module, block.name)


def _modules_of(plan: Plan, segments: Iterable[Segment]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of the model that segments run, and what is inside of them, with their paths."""
    twin = plan.segments.trunk.twin
    for segment in segments:
        for node in segment.graph.nodes:
            if node.op == "call_module":
                yield from _inside(twin.get_submodule(node.target), node.target)


def _inside(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    for name, part in module.named_modules():
        yield f"{path}.{name}" if name else path, part
