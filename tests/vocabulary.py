"""One small plan for every word of the vocabulary that few methods use."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localize.compiler import assemble
from localize.cutting.cuts import place
from localize.cutting.split import split
from localize.graph.trace import trace
from localize.heads import blocks
from localize.ir import Block, Copy, CutSpec, Grain, Input, LocalLoss, Plan, Route, Segments, Target, Term
from localize.passes import schedule
from localize.passes.freeze import freeze
from localize.passes.labels import LabelLoss, supervise
from localize.passes.sides import attach
from localize.runtime.model import LocalModel
from tests.nets import TwoInputs

CE = blocks.CROSS_ENTROPY
MSE = "torch.nn.functional.mse_loss"


def build(model: nn.Module, word: str) -> LocalModel:
    """Return a local model over ``model`` whose plan uses the word."""
    make, cut = WORDS[word]
    images = torch.empty(2, 3, 8, 8)
    several = (images, torch.empty(2, 6), torch.empty(2, 6, dtype=torch.long))
    trunk = trace(model, several if isinstance(model, TwoInputs) else images, name=type(model).__name__)
    return assemble(make(split(place(trunk, cut, grain=Grain()))))


class Scores(nn.Module):
    """Class scores from all values at a cut."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, 5, device="meta")

    def forward(self, *values: Tensor) -> Tensor:
        return self.linear(torch.cat([value.flatten(1) for value in values], 1))


class Fixed(nn.Module):
    """A fixed random map from class ids or a vector over the classes to the shape of features."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.weight = nn.Parameter(torch.empty(5, _size(shape), device="meta"), requires_grad=False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)

    def forward(self, values: Tensor) -> Tensor:
        values = values if values.is_floating_point() else F.one_hot(values, 5)
        return (values.to(self.weight.dtype) @ self.weight).unflatten(1, self.shape)


class Below(nn.Module):
    """A guess of the mean of what entered a segment, from what left it and the labels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1, device="meta")

    def forward(self, value: Tensor, labels: Tensor) -> Tensor:
        return self.linear(value.flatten(1))[:, 0] + labels


class Mean(nn.Module):
    """The mean of each image or feature."""

    def forward(self, value: Tensor) -> Tensor:
        return value.flatten(1).mean(1)


class Streams(nn.Module):
    """The images with their label added, and as they are."""

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return torch.cat([images + 0.1 * labels.to(images.dtype)[:, None, None, None], images])


class Feedback(nn.Module):
    """A linear layer whose error goes back through a fixed random matrix."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(layer.weight.shape, device="meta"), requires_grad=False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        true = F.linear(x.detach(), weight, bias)
        fed_back = F.linear(x, self.weight)
        return true + (fed_back - fed_back.detach())


class WithCopy(nn.Module):
    """A copy of a later part of the trunk, and class scores."""

    def __init__(self, copied: nn.Module, features: int) -> None:
        super().__init__()
        self.copied = copied
        self.scores = Scores(features)

    def forward(self, value: Tensor) -> Tensor:
        return self.scores(self.copied(value))


def _size(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _scores(segments: Segments, k: int, name: str) -> Block:
    shapes = [features.shape for features in segments.segments[k].features]
    return blocks.of_module(name, Scores(sum(map(_size, shapes))), *shapes)


def _plan(segments: Segments, losses: list[LocalLoss], extra: list[Block], **more: object) -> Plan:
    return Plan("test", {}, segments, (*blocks.of_segments(segments), *extra), tuple(losses), "end", **more)


def _isolated(k: int, *terms: Term, own: tuple[str, ...] = ()) -> LocalLoss:
    return LocalLoss(f"loss_{k}", Route(k, k), terms, (f"segment_{k}", *own))


def windows(segments: Segments) -> Plan:
    """Every loss runs two segments, and has a term behind each."""
    n = len(segments)
    own = [_scores(segments, k, f"own_{k}") for k in range(n - 1)]
    leaps = [_scores(segments, k, f"leap_{k}") for k in range(1, n - 1)]
    losses = []
    for k in range(n - 1):
        terms, reach = [Term(CE, own[k].name, weight=0.3, at=k)], [f"segment_{k}", f"segment_{k + 1}", own[k].name]
        terms.append(Term(CE, leaps[k].name, weight=0.7) if k < n - 2 else Term(CE))
        reach += [leaps[k].name] if k < n - 2 else []
        losses.append(LocalLoss(f"loss_{k}", Route(k, k + 1), tuple(terms), tuple(reach)))
    return _plan(segments, losses, [*own, *leaps])


def depths(segments: Segments) -> Plan:
    """One loss runs everything, with a term behind every segment."""
    n = len(segments)
    heads = [_scores(segments, k, f"head_{k}") for k in range(n - 1)]
    terms = (*(Term(CE, head.name, at=k) for k, head in enumerate(heads)), Term(CE))
    reach = (*(segment.name for segment in segments.segments), *(head.name for head in heads))
    return _plan(segments, [LocalLoss("loss_0", Route(0, n - 1), terms, reach)], heads)


def recomputed(segments: Segments) -> Plan:
    """One loss runs everything; all segments but the last are computed again."""
    whole = dataclasses.replace(blocks.output_loss(segments, start=0), name="loss_0")
    return _plan(segments, [whole], [], recompute=tuple(segment.name for segment in segments.segments[:-1]))


def parts(segments: Segments) -> Plan:
    """The batch is taken in two parts."""
    whole = blocks.output_loss(segments, start=0, weight=0.5)
    losses = [dataclasses.replace(whole, name=f"loss_{i}", part=(i, 2)) for i in range(2)]
    return _plan(segments, losses, [])


def errors(segments: Segments) -> Plan:
    """Losses compare features with a fixed random map of the error of the output."""
    n = len(segments)
    maps = [
        blocks.of_module(f"map_{k}", Fixed(segments.segments[k].features[0].shape), role="shared") for k in range(n - 1)
    ]
    local = [_isolated(k, Term(MSE, target=Target("error", maps[k].name), scores=False)) for k in range(n - 1)]
    return _plan(segments, [*local, blocks.output_loss(segments)], maps)


def streams(segments: Segments) -> Plan:
    """Two streams enter; one trains the segments, and from both a detached head guesses what entered."""
    n = len(segments)
    local, extra = [], [blocks.of_module("streams", Streams(), role="shared")]
    for k in range(n - 1):
        shape = segments.segments[k].features[0].shape
        own = _scores(segments, k, f"own_{k}")
        guess = blocks.of_module(f"guess_{k}", nn.Sequential(nn.Flatten(), nn.Linear(_size(shape), 1, device="meta")))
        mean = blocks.of_module(f"mean_{k}", _Column(), role="shared")
        below = Term(MSE, guess.name, target=Target("input", mean.name), detached=True, scores=False, weight=0.25)
        local.append(_isolated(k, Term(CE, own.name, stream=0), below, own=(own.name, guess.name)))
        extra += [own, guess, mean]
    last = _isolated(n - 1, Term(CE, stream=1))
    return _plan(segments, [*local, last], extra, input=Input("streams", 2))


class _Column(Mean):
    def forward(self, *values: Tensor) -> Tensor:
        return super().forward(values[0])[:, None]


def frozen(segments: Segments) -> Plan:
    """Segments are left as they are; heads on detached features are trained."""
    n = len(segments)
    heads = [_scores(segments, k, f"head_{k}") for k in range(n - 1)]
    local = [
        LocalLoss(f"loss_{k}", Route(k, k), (Term(CE, head.name, detached=True),), (head.name,))
        for k, head in enumerate(heads)
    ]
    names = tuple(f"segment_{k}" for k in range(n - 1))
    return _plan(segments, [*local, blocks.output_loss(segments)], heads, frozen=names)


def headless(segments: Segments) -> Plan:
    """The last segment is neither run nor trained."""
    n = len(segments)
    heads = [_scores(segments, k, f"head_{k}") for k in range(n - 1)]
    local = [_isolated(k, Term(CE, head.name), own=(head.name,)) for k, head in enumerate(heads)]
    return _plan(segments, local, heads, frozen=(f"segment_{n - 1}",))


def frozen_between(segments: Segments) -> Plan:
    """Some segments are left as they are, and run for those after them; their losses are left out."""
    n = len(segments)
    heads = [_scores(segments, k, f"head_{k}") for k in range(n - 1)]
    local = [_isolated(k, Term(CE, head.name), own=(head.name,)) for k, head in enumerate(heads)]
    plan = _plan(segments, [*local, blocks.output_loss(segments)], heads)
    return _without_gradients(freeze(plan, ["segment_0"] if n < 3 else ["segment_[!1]"]))


def _without_gradients(plan: Plan) -> Plan:
    """Let what a plan does not train require no gradient, as :func:`localize.freeze` does."""
    trained = {name for block in plan.blocks for name in block.parameters}
    for name, parameter in plan.segments.trunk.model.named_parameters():
        parameter.requires_grad_(f"trunk.{name}" in trained)
    modules = ((block.name, block.module) for block in plan.blocks if block.module is not None)
    for name, parameter in (
        (f"heads.{block}.{n}", p) for block, module in modules for n, p in module.named_parameters()
    ):
        parameter.requires_grad_(name in trained)
    return plan


def targets(segments: Segments) -> Plan:
    """Losses compare with the images, and heads read the labels; a loss takes an option."""
    n = len(segments)
    local, extra = [], []
    for k in range(n - 1):
        shape = segments.segments[k].features[0].shape
        guess = blocks.of_module(f"guess_{k}", Below(_size(shape)))
        mean = blocks.of_module(f"mean_{k}", Mean(), role="shared")
        image = Term(
            "torch.nn.functional.smooth_l1_loss",
            guess.name,
            target=Target("images", mean.name),
            labels=True,
            scores=False,
            options=(("beta", 0.5),),
        )
        local.append(_isolated(k, image, own=(guess.name,)))
        extra += [guess, mean]
    return _plan(segments, [*local, blocks.output_loss(segments)], extra)


def feedback(segments: Segments) -> Plan:
    """The classifier's error goes back through a fixed random matrix."""
    model = segments.trunk.model
    block = blocks.of_module("feedback_fc", Feedback(model.get_submodule("fc")), role="shared")
    whole = dataclasses.replace(blocks.output_loss(segments, start=0), name="loss_0")
    return _plan(segments, [whole], [block], feedback=(("fc", "feedback_fc"),))


def pulled(segments: Segments, source: str = "convs.2", pull: str = "after") -> Plan:
    """A head starts as a copy of a later part of the trunk, and is pulled towards it."""
    n = len(segments)
    width = _size(segments.segments[0].features[0].shape)
    twin = segments.trunk.twin.get_submodule(source)
    head = blocks.of_module("head_0", WithCopy(_on_meta(twin), width))
    others = [_scores(segments, k, f"head_{k}") for k in range(1, n - 1)]
    local = [_isolated(k, Term(CE, h.name), own=(h.name,)) for k, h in enumerate([head, *others])]
    copies = (Copy("head_0", "copied", source, 0.9),)
    return _plan(segments, [*local, blocks.output_loss(segments)], [head, *others], copies=copies, pull=pull)


def pulled_before(segments: Segments) -> Plan:
    """The same, before the update."""
    return pulled(segments, pull="before")


def sides(segments: Segments) -> Plan:
    """Every segment has a loss of its own, which trains the model's further outputs too."""
    n = len(segments)
    heads = [_scores(segments, k, f"head_{k}") for k in range(n - 1)]
    local = [_isolated(k, Term(CE, head.name), own=(head.name,)) for k, head in enumerate(heads)]
    return attach(_plan(segments, [*local, blocks.output_loss(segments)], heads), {"aux_logits2": 0.25})


def sides_of_one(segments: Segments) -> Plan:
    """Several losses run a segment that makes a further output, and one of them trains it."""
    return attach(windows(segments), {})


def sides_of_parts(segments: Segments) -> Plan:
    """Further outputs are trained on parts of the batch."""
    return attach(parts(segments), {"aux_logits1": 1.0})


def sides_recomputed(segments: Segments) -> Plan:
    """Segments that make further outputs are computed again."""
    return attach(recomputed(segments), {})


def heads_recomputed(segments: Segments) -> Plan:
    """Segments and heads are computed again, the latter member by member."""
    return schedule.apply(windows(segments), {"recompute": "all"})


def micro_batches(segments: Segments) -> Plan:
    """Every loss takes the batch in parts, with one update at the end."""
    return schedule.apply(windows(segments), {"micro_batch": 4, "ghost_norm": True})


def micro_batches_immediate(segments: Segments) -> Plan:
    """Every loss takes the batch in parts, with an update behind each."""
    return schedule.apply(_immediate(segments), {"micro_batch": 4, "ghost_norm": True})


def _immediate(segments: Segments) -> Plan:
    """Return a plan of one loss for each segment, with an update behind each."""
    n = len(segments)
    heads = [_scores(segments, k, f"head_{k}") for k in range(n - 1)]
    losses = [_isolated(k, Term(CE, head.name), own=(head.name,)) for k, head in enumerate(heads)]
    plan = _plan(segments, [*losses, _isolated(n - 1, Term(CE))], heads)
    return dataclasses.replace(plan, update="immediate")


def exact_parts(segments: Segments) -> Plan:
    """Every loss takes the batch in parts with the BatchNorm of the whole, with one update at the end."""
    return schedule.apply(windows(segments), {"micro_batch": 4})


def exact_parts_apart(segments: Segments) -> Plan:
    """The first loss takes the batch whole, the others in exact parts, with an update behind each."""
    first = segments.segments[0].ends_at
    return schedule.apply(_immediate(segments), {"micro_batch": 4, "micro_batch_at": f"0@{first}"})


def scaled_exact_parts_immediate(segments: Segments) -> Plan:
    """Every loss is scaled on exact parts of the batch, with an update behind each loss."""
    return schedule.apply(_immediate(segments), {"micro_batch": 4, "loss_scaling": True})


def scaled(segments: Segments) -> Plan:
    """Every loss is scaled, with one update at the end."""
    return schedule.apply(windows(segments), {"loss_scaling": True})


def scaled_micro_batches_immediate(segments: Segments) -> Plan:
    """Every loss is scaled on parts of the batch, with an update behind each loss."""
    return schedule.apply(micro_batches_immediate(segments), {"loss_scaling": True})


def labels_smoothed_and_weighted(segments: Segments) -> Plan:
    """Class scores are compared with smoothed labels, and classes are weighed."""
    return supervise(windows(segments), LabelLoss(smoothing=0.1, weights=(0.5, 1.0, 2.0, 0.0, 3.0)))


def labels_focal(segments: Segments) -> Plan:
    """Class scores are trained by the focal loss, further outputs of the model as well."""
    return supervise(sides(segments), LabelLoss("focal", weights=(0.5, 1.0, 2.0, 0.0, 3.0), gamma=1.5))


def _on_meta(module: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(module).to("meta")


WORDS: dict[str, tuple[Callable[[Segments], Plan], CutSpec]] = {
    make.__name__: (make, CutSpec(1) if make in (feedback, parts, sides_of_parts) else CutSpec())
    for make in (
        windows,
        depths,
        recomputed,
        parts,
        errors,
        streams,
        frozen,
        headless,
        frozen_between,
        targets,
        feedback,
        pulled,
        pulled_before,
        sides,
        sides_of_one,
        sides_of_parts,
        sides_recomputed,
        heads_recomputed,
        micro_batches,
        micro_batches_immediate,
        scaled,
        scaled_micro_batches_immediate,
        labels_smoothed_and_weighted,
        labels_focal,
        exact_parts,
        exact_parts_apart,
        scaled_exact_parts_immediate,
    )
}
