"""Choose for each segment how it runs (whole, recomputed, in parts) so that a step fits a budget.

The peak of a local step is the largest peak of its segments, and its time is the sum of theirs. The peak and time of a
segment depend only on its own schedule. For given cuts, the quickest step within a budget therefore uses the quickest
fitting schedule for each segment; no joint search is needed. Segments that compute the same are followed only once
(:mod:`localize.estimate.repeats`), each with a few sizes of parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from localize.compiler import assemble, planned, unaudited
from localize.errors import MethodError
from localize.estimate import memory
from localize.estimate.memory import Conditions, Following, Footprint
from localize.estimate.repeats import Called, Known
from localize.graph.operations import is_batch_norm
from localize.ir import Segment, Trunk, facts, path_of
from localize.ops.parts import is_kept
from localize.passes import chains
from localize.passes.schedule import apply
from localize.recipes import Recipe
from localize.runtime.model import LocalModel
from localize.torch_names import fake_mode


class Option(NamedTuple):
    """How a segment runs."""

    again: str = "none"
    """What the backward computes again."""
    size: int = 0
    """Number of images at a time; 0 for the whole batch."""
    keep: str = ""
    """Last names, joined with ``+``, of the norms whose inputs are kept for the whole batch."""


WHOLE, AGAIN = Option(), Option("all")
LITTLE = 0.4
"""Recomputing a segment is tried only if the budget leaves at least this share of what it needs."""
FEWEST = 256
"""The smallest part is the batch divided by this."""
NEARLY = 1.2
"""Parts of twice the size are tried if they should need at most this multiple of what the budget leaves."""
MANY = 8
"""Parts are tried only for segments with at most this many BatchNorms in series: each adds 0.6 times the work."""


@dataclass(frozen=True)
class Need:
    """Costs of a segment with one option: bytes above those at its start, and seconds."""

    rise: int
    seconds: float


@dataclass(frozen=True)
class Chosen:
    """A schedule of a step, with costs (bytes and seconds) predicted from its segments."""

    recipe: Recipe
    peak: int
    seconds: float
    whole: Footprint
    """Costs of the step without a schedule."""


def sizes(batch_size: int) -> list[int]:
    """Return the sizes of parts that are tried, from half the batch down."""
    found = [batch_size]
    while found[-1] > max(1, batch_size // FEWEST):
        found.append(-(-found[-1] // 2))
    return found[1:]


class Kinds:
    """The segments of a step by kind, that is by what they compute, and the costs of each kind with the options tried.

    Args:
        trunk: the recorded model.
        recipe: method and cuts; its schedule is that of the step with which options are compared.
        batch_size: N, the number of images.
        under: optimizer, autocast, and speed of the device.
        known: see :func:`localize.estimate.memory.predict`.

    Raises:
        LocalizeError: the method does not train this model, with these cuts.
    """

    def __init__(self, trunk: Trunk, recipe: Recipe, batch_size: int, under: Conditions, known: Known) -> None:
        self.trunk, self.recipe, self.batch_size, self.under, self.known = trunk, recipe, batch_size, under, known
        self.plan = planned(trunk, recipe)
        self.local = assemble(apply(self.plan, recipe.schedule), audited=False)
        self.mode = fake_mode()
        with self.mode:
            self.fake = memory.without_values(self.local)
            self.optimizer = under.optimizer(self.fake.param_groups(lr=0.1))
            memory.make_states(self.fake, self.optimizer)
            self.updates = self.fake.updates(self.optimizer)
        self.whole = self._predicted(self.fake)
        self.members: dict[Any, list[Called]] = {}
        for called in self.whole.calls:
            self.members.setdefault(called.key, []).append(called)
        self.needs: dict[Any, dict[Option, Need]] = {
            key: {WHOLE: Need(calls[0].peak - calls[0].before, calls[0].seconds)} for key, calls in self.members.items()
        }
        self._texts: dict[str, Following | MethodError] = {}
        self.between = 0
        """Bytes by which a step exceeded the prediction from its segments, which lacks values between segments."""

    def _predicted(self, fake: LocalModel) -> Footprint:
        with self.mode:
            x, y = memory.empty_batch(self.trunk, self.batch_size)
            followed = Following(fake, x, y, [self.optimizer], self.under.speed, self.known)
            with followed.metered(self.under.autocast):
                result = followed.step(x, y, self.optimizer)
            self.fake.zero_grad(set_to_none=True)
            return followed.footprint(result)

    def _scheduled(self, schedule: Mapping[str, Any]) -> LocalModel:
        """Return the step with another schedule, over the same modules without values.

        Raises:
            MethodError: the step cannot run so.
        """
        return unaudited(apply(self.plan, schedule), self.fake.trunk, self.fake.heads).train()

    def predicted(self, schedule: Mapping[str, Any]) -> tuple[LocalModel, Footprint]:
        """Return the step with another schedule, without values, and its costs.

        Raises:
            MethodError: the step cannot run so.
        """
        local = self._scheduled(schedule)
        return local, self._predicted(local)

    @property
    def least(self) -> int:
        """Bytes that a step needs with any schedule: those that are live when a segment starts, at the most."""
        return max(map(self._before, self.members))

    def roughly(self, budget: int) -> float:
        """Return roughly the seconds of a step with a schedule that fits a budget."""
        return self.whole.seconds + sum(self._at_least(key, budget, for_norm=0.6) for key in self.members)

    # -- what is chosen

    def choose(
        self, budget: int, quicker_than: float = math.inf, *, keeping: bool = False, each: bool = False
    ) -> Chosen | None:
        """Return the quickest schedule within a budget or, if none fits, the leanest one found (the quickest of those).

        Args:
            budget: number of bytes.
            quicker_than: number of seconds; None is returned if nothing within the budget is quicker.
            keeping: keep inputs of norms in segments that are swept in parts; None is returned if there are none.
            each: if not all fit, those that can fit do so, and the others are the leanest; otherwise all are as lean as
                the largest.
        """
        missing = {key: self._at_least(key, budget) for key in self.members}
        seconds = self.whole.seconds + sum(missing.values())
        if seconds >= quicker_than:
            return None
        for key in sorted(self.members, key=missing.__getitem__):
            self._try(key, budget)
            fits = self._least(key) <= budget
            if fits:
                seconds += self._extra(key, self._quickest(key, budget)) - missing[key]
            if quicker_than < math.inf and (not fits or seconds >= quicker_than):
                return None
        within = budget if each else max(budget, *map(self._least, self.members))
        if keeping:
            for key in self.members:
                self._try_keeping(key, within)
        options = {key: self._quickest(key, within) for key in self.members}
        if keeping and not any(option.keep for chosen in options.values() for option in chosen):
            return None
        peak = max(
            called.before + self.needs[key][option].rise
            for key, chosen in options.items()
            for called, option in zip(self.members[key], chosen, strict=True)
        )
        seconds = sum((self._extra(key, chosen) for key, chosen in options.items()), self.whole.seconds)
        return Chosen(self._written(options), peak, seconds, self.whole)

    def _extra(self, key: Any, options: Sequence[Option]) -> float:
        """Return the seconds that the segments of a kind take longer with these options, one for each."""
        needs = self.needs[key]
        return sum(needs[option].seconds - needs[WHOLE].seconds for option in options)

    def _at_least(self, key: Any, budget: int, *, for_norm: float = 0.2) -> float:
        """Return a rough lower bound of the extra seconds of all segments of a kind, if they do not fit a budget.

        They are recomputed, which adds a third of the work, or swept in parts: with one norm this doubles the work, and
        each further norm in series adds 0.6 times the work (``for_norm``); kept values save part of that.
        """
        number = number_of(self.members[key][0].function)
        room, whole = budget - self._before(key), self.needs[key][WHOLE]
        if number is None or whole.rise <= room:
            return 0.0
        again = 0.25 if room >= LITTLE * whole.rise else math.inf
        norms = self._swept_norms(number)
        too_large = sum(called.before + whole.rise > budget for called in self.members[key])
        return too_large * whole.seconds * min(again, max(0.5, for_norm * norms) if norms else 0.0)

    def _swept_norms(self, number: int) -> int:
        """Return the largest number of BatchNorms in series in the segments of a loss, if parts are swept for them.

        A norm whose input is kept begins a series.
        """
        count = 0
        if self.recipe.schedule.get("ghost_norm"):
            return count
        for segment in self._segments(number):
            keep, passed = chains.divided_at(segment.graph, self.trunk.twin), dict[fx.Node, int]()
            for node in segment.graph.nodes:
                passed[node] = max((passed[other] for other in node.all_input_nodes), default=0)
                if is_batch_norm(node, self.trunk.twin):
                    passed[node] = 1 if is_kept(path_of(node), keep) else passed[node] + 1
            count += max(passed.values(), default=0)
        return count

    def _segments(self, number: int) -> Sequence[Segment]:
        """Return the segments that a loss trains."""
        route = self.local.plan.losses[number].route
        return self.local.plan.segments.segments[route.start : route.stop + 1]

    def _before(self, key: Any) -> int:
        return max(called.before for called in self.members[key])

    def _least(self, key: Any) -> int:
        return self._before(key) + min(need.rise for need in self.needs[key].values())

    def _quickest(self, key: Any, within: int) -> list[Option]:
        """Return the quickest option that fits for each segment of a kind (less is live when some of them start), or
        the leanest one if none fits."""
        needs = sorted(self.needs[key].items(), key=lambda pair: (pair[1].seconds, pair[1].rise))
        leanest, _ = min(needs, key=lambda pair: pair[1].rise)
        return [
            next((option for option, need in needs if called.before + need.rise <= within), leanest)
            for called in self.members[key]
        ]

    def _written(self, options: Mapping[Any, Sequence[Option]]) -> Recipe:
        """Return the recipe with the options, one for each segment of a kind."""
        losses = self.local.plan.losses
        ends = [segment.ends_at for segment in self.local.plan.segments.segments]
        again, parts, keep = dict.fromkeys(ends, "none"), dict.fromkeys(ends, 0), dict.fromkeys(ends, "")
        for key, calls in self.members.items():
            for called, option in zip(calls, options[key], strict=True):
                if (number := number_of(called.function)) is not None:
                    end = ends[losses[number].route.stop]
                    again[end], parts[end], keep[end] = option
        schedule = dict(self.recipe.schedule)
        for name, whole, values in (("recompute", "none", again), ("micro_batch", 0, parts)):
            if set(values.values()) == {whole}:
                continue
            schedule.pop(name, None)
            schedule.pop(f"{name}_at", None)
            if len(set(values.values())) == 1:
                schedule[name] = values[ends[0]]
            else:
                schedule[f"{name}_at"] = ",".join(_said(values, whole))
        if any(keep.values()):
            schedule["keep_at"] = ",".join(_said(keep, ""))
        return replace(self.recipe, schedule=schedule)

    # -- what is tried

    def _try(self, key: Any, budget: int) -> None:
        """Follow a kind of segment with the options that may make it fit a budget."""
        room = budget - self._before(key)
        whole, number = self.needs[key][WHOLE], number_of(self.members[key][0].function)
        if whole.rise <= room or number is None:
            return
        norms, tried = self._swept_norms(number), sizes(self.batch_size)
        again = self._need(key, AGAIN) if room >= LITTLE * whole.rise else None
        if not tried or norms > MANY or (norms and again is not None and again.rise <= room):
            return  # parts take longer
        at = next((i for i, size in enumerate(tried) if whole.rise * size <= room * self.batch_size), len(tried) - 1)
        need = self._need(key, Option(size=tried[at]))
        if need is None:
            return
        if need.rise <= room:
            gradients = sum(form.stored for _, form in self.known[key].gradients if form is not None)
            while at > 0 and need is not None and 2 * need.rise - gradients <= NEARLY * room:
                at -= 1
                need = self._need(key, Option(size=tried[at]))
            return
        while need is not None and need.rise > room and at + 1 < len(tried):
            at = min(len(tried) - 1, at + (1 if room > 0 and need.rise < 2 * room else 2))
            need = self._need(key, Option(size=tried[at]))

    def _try_keeping(self, key: Any, budget: int) -> None:
        """Follow a kind of segment that is swept in parts while the smallest input of its norms is kept."""
        calls = zip(self.members[key], self._quickest(key, budget), strict=True)
        _, option = max(calls, key=lambda pair: pair[0].before)
        number = number_of(self.members[key][0].function)
        text = self._text(option)
        if number is None or not option.size or isinstance(text, MethodError) or not text.local.plan.exact:
            return
        keep = self._thinnest(number)
        need = self._need(key, Option(size=option.size, keep=keep)) if keep else None
        if need is not None and need.rise > budget - self._before(key):
            self._need(key, Option(size=-(-option.size // 2), keep=keep))

    def _thinnest(self, number: int) -> str:
        """Return the norm with the smallest input in the segments of a loss, if there are several; otherwise ``""``.

        Among equals it is the last one, which saves the longest computation.
        """
        read: dict[str, int] = {}
        for segment in self._segments(number):
            for node in segment.graph.nodes:
                if is_batch_norm(node, self.trunk.twin):
                    name = str(node.target).rpartition(".")[2]
                    read[name] = read.get(name, 0) + math.prod(facts(node.all_input_nodes[0]).shape or ())
        return min(reversed(read), key=read.__getitem__) if len(read) > 1 else ""

    def _need(self, key: Any, option: Option) -> Need | None:
        """Follow one segment of a kind with an option; None if the option does not work for it."""
        if option not in self.needs[key]:
            text = self._text(option)
            if isinstance(text, MethodError):
                return None
            try:
                with self.mode:
                    self.needs[key][option] = self._follow(text, self.members[key][0], option)
            except MethodError as error:
                if not option.keep:
                    self._texts[_kind(option)] = error
                return None
        return self.needs[key][option]

    def _text(self, option: Option) -> Following | MethodError:
        """Return the text in which every segment has an option, on tensors without values."""
        kind = _kind(option)
        if kind not in self._texts:
            schedule = {**self.recipe.schedule, "recompute": option.again, "micro_batch": option.size}
            try:
                local = self._scheduled(schedule)
            except MethodError as error:
                self._texts[kind] = error
            else:
                with self.mode:
                    x, y = memory.empty_batch(self.trunk, self.batch_size)
                    self._texts[kind] = Following(local, x, y, [], self.under.speed, self.known)
        return self._texts[kind]

    def _follow(self, text: Following, called: Called, option: Option) -> Need:
        """Follow one call of a function of a text, on arguments of the same forms as in the step."""
        size = option.size
        number, plan, meter = number_of(called.function), text.local.plan, text.meter
        assert number is not None
        route = plan.losses[number].route
        entering = len(plan.segments.segments[route.start].inputs) if route.start > 0 and plan.exact else 0
        starts = range(0, self.batch_size, size or self.batch_size)
        shares = [(min(start + size, self.batch_size) - start) / self.batch_size for start in starts]
        with self._graded(called), text.metered(self.under.autocast):
            values: list[Any] = []
            for place, form in enumerate(called.forms):
                if form is None:
                    values += [self.updates] if plan.scaled or not size else []
                elif size and place < entering:
                    values.append([_empty(form, round(share * form[0][0])) for share in shares])
                else:
                    values.append(_empty(form, form[0][0]))
            before, seconds, meter.peak = meter.held, meter.seconds, meter.held
            name = f"{'part' if plan.exact else 'step'}_{number}"
            call, roots = text.text[name], (self.fake.trunk, self.fake.heads)
            if size and plan.exact:
                keep = option.keep or dict(plan.kept).get(plan.losses[number].name, "")
                text.text["exact_parts"](call, size, *roots, *values, keep=keep)
            elif size:
                text.text["micro_batches"](call, size, *roots, *values)
            else:
                call(*roots, *values)
        return Need(meter.peak - before, meter.seconds - seconds)

    @contextmanager
    def _graded(self, called: Called) -> Iterator[None]:
        """Give empty gradients to the parameters that had gradients before a call."""
        graded = set(called.graded)
        for parameter in self.fake.parameters():
            if id(parameter) in graded:
                parameter.grad = torch.empty_like(parameter)
        try:
            yield
        finally:
            self.fake.zero_grad(set_to_none=True)


def _kind(option: Option) -> str:
    return f"{option.again}, {'parts' if option.size else 'whole'}"


def _empty(form: Any, count: int) -> Tensor:
    shape, stride, dtype = form
    return torch.empty_strided((count, *shape[1:]), stride, dtype=dtype)


def number_of(function: str) -> int | None:
    """Return the number of the loss of a function of the text; None for the whole step."""
    last = function.rpartition("_")[2]
    return int(last) if last.isdecimal() else None


def _said(values: Mapping[str, Any], whole: Any) -> Iterator[str]:
    """Yield ``VALUE@NAME`` for values other than ``whole``; ``*`` abbreviates names with one value and one prefix."""
    done: set[str] = set()
    for end, value in values.items():
        if value == whole or end in done:
            continue
        group = f"{end.rpartition('.')[0]}.*" if "." in end else end
        if group != end and all(values[name] == value for name in _matching(values, group)):
            done |= set(_matching(values, group))
            yield f"{value}@{group}"
        else:
            done.add(end)
            yield f"{value}@{end}"


def _matching(names: Mapping[str, Any], pattern: str) -> Sequence[str]:
    return [name for name in names if fnmatchcase(name, pattern)]
