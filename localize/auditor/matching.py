"""Match the text of a training step with its plan, statement by statement.

A statement is accepted if it is an operation of the recorded graph of its segment, or a word of the plan, each once, on
the same values, and in the same order where one may draw by chance or write. All else is a :class:`Departure`. Nothing
of the text is run, and nothing that it names is imported.
"""

from __future__ import annotations

import ast
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from localize.auditor.names import Vocabulary
from localize.auditor.operations import (
    Group,
    Operation,
    attributes_in,
    is_free,
    is_pure,
    may_write,
    reforms,
    show,
    words_of,
)
from localize.auditor.planned import step_operations
from localize.auditor.reading import Problem
from localize.auditor.recorded import Wanted, segment_operations
from localize.auditor.statements import DRIVER, Body, Interpreter, text_of
from localize.ir import Plan

NEAR = 64
"""Among so many of the next operations the one is searched that stands where an unknown statement is."""
STRUCTURAL = ("part", "gathered", "share")


@dataclass(frozen=True)
class Departure:
    """Something that is not in the plan, or that the plan has and the text has not."""

    line: int
    what: str
    losses: tuple[str, ...] = ()
    """Losses that it touches."""
    segment: int | None = None


@dataclass
class Match:
    """What departs from the plan, in the order of the text."""

    departures: list[Departure] = field(default_factory=list)
    matched: int = 0
    """Operations that the text and the plan share."""


@dataclass(frozen=True)
class Wishes:
    """All that a text is to do: the operations of each segment by its name, and those of the step."""

    segments: dict[str, Wanted]
    step: Wanted

    @classmethod
    def of(cls, plan: Plan, words: Vocabulary) -> Wishes:
        """Write down what a plan and its recorded graphs say."""
        segments = {segment.name: segment_operations(segment, plan, words) for segment in plan.segments.segments}
        step = step_operations(plan, words)
        for operation in step.operations:
            for word in words_of(operation):
                words.functions.add_word(word)
        if any(operation.kind == "operator" for wanted in segments.values() for operation in wanted.operations):
            words.functions.modules.add("operator")
        return cls(segments, step)

    def __len__(self) -> int:
        return len(self.step.operations) + sum(len(one.operations) for one in self.segments.values())


def match(tree: ast.Module | Problem, plan: Plan, words: Vocabulary, wishes: Wishes) -> Match:
    """Compare a text with the plan whose step it is said to be.

    Args:
        tree: the text taken apart, or why it is not.
        plan: the plan.
        words: what the text may name.
        wishes: what the plan says.
    """
    if isinstance(tree, Problem):
        return Match([Departure(tree.line, tree.what)])
    return _matched(tree, plan, words, wishes.segments, wishes.step)


def _matched(tree: ast.Module, plan: Plan, words: Vocabulary, wanted: dict[str, Wanted], step: Wanted) -> Match:
    text, found = text_of(tree, words), Match()
    touched: dict[int, tuple[str, ...]] = defaultdict(tuple)
    for loss in plan.losses:
        for k in range(loss.route.start, loss.route.stop + 1):
            touched[k] += (loss.name,)
    for segment in plan.segments.segments:
        definition = text.functions.get(segment.name)
        if definition is None:
            found.departures.append(Departure(0, f"there is no function {segment.name}", (), segment.index))
            continue
        losses = touched.get(segment.index, ())
        before = len(text.problems)
        of = wanted[segment.name]
        body = Interpreter(text, words).segment(definition, of.inputs, heads=bool(plan.feedback))
        found.departures += [
            Departure(problem.line, problem.what, losses, segment.index) for problem in text.problems[before:]
        ]
        del text.problems[before:]
        comparison = _Comparison(words, of, f"the recorded graph of {segment.name}", within=True)
        found.departures += [Departure(line, what, losses, segment.index) for line, what, _ in comparison.compare(body)]
        found.matched += comparison.matched
    driver = text.functions.get(DRIVER)
    if driver is None:
        text.problem(0, f"there is no function {DRIVER}")
    else:
        body = Interpreter(text, words).driver(driver, step.inputs)
        comparison = _Comparison(words, step, "the plan", within=False)
        for line, what, name in comparison.compare(body):
            found.departures.append(Departure(line, what, (name,) if name else ()))
        found.matched += comparison.matched
        for name, definition in text.functions.items():
            if name not in text.called:
                text.problem(definition.lineno, f"nothing calls {name}")
    found.departures += [Departure(problem.line, problem.what) for problem in text.problems]
    found.departures = sorted(dict.fromkeys(found.departures), key=lambda one: one.line)
    return found


class _Named:
    """A value that a free operation gives; equal only to itself."""


class _Comparison:
    """The operations of a function beside those that it is to have."""

    def __init__(self, words: Vocabulary, wanted: Wanted, whose: str, *, within: bool) -> None:
        self.words, self.wanted, self.whose, self.within = words, wanted, whose, within
        self.matched = 0
        self.value_of: dict[Operation, Any] = {}
        """What each operation's value is, in terms of the wanted operations."""
        self.named: dict[Any, _Named] = {}
        """Values that free operations give, by what they are."""
        self.free: set[Any] = set()
        self.places: dict[Any, deque[int]] = defaultdict(deque)
        """Numbers of the wanted operations by what they are, first ones first."""
        self.keys: list[Any] = []
        self.taken: list[bool] = []
        self.writes: list[bool] = []
        self.ordered: list[bool] = []
        self.next = 0
        self.last_line = 0
        self.forms = 0
        """How often a tensor has got another shape in place so far."""
        self._index()
        self.forms = 0

    def _index(self) -> None:
        epoch, marked = 0, set()
        for operation in self.wanted.inputs:
            self.value_of[operation] = operation
        for number, operation in enumerate(self.wanted.operations):
            free, pure = is_free(operation), is_pure(operation)
            reads_state = any(one in marked for one in operation.reads()) or any(map(self._is_state, operation.args))
            if reads_state:
                marked.add(operation)
            writes = may_write(operation, self.words.model.modules) if self.within else False
            key = None
            if free:
                self.value_of[operation] = self._free(operation)
                self.free.add(self.value_of[operation])
            else:
                self.value_of[operation] = operation
                key = self._key(operation, epoch if pure else None)
                self.places[key].append(number)
            self.forms += reforms(operation)
            self.keys.append(key)
            self.taken.append(free)
            self.writes.append(writes)
            self.ordered.append(not free and (not pure or reads_state or self._is_copy(operation)))
            epoch += writes

    def _is_state(self, value: Any) -> bool:
        """Tell whether a value is, or holds, a buffer of the model."""
        for attribute in attributes_in(value):
            owner, _, name = attribute.path.rpartition(".")
            module = self.words.model.modules.get(owner)
            if module is not None and name in module._buffers:
                return True
        return False

    def _is_copy(self, operation: Operation) -> bool:
        return not self.within and operation.target == "clone"

    # -- values

    def _canonical(self, value: Any) -> Any:
        """Return a value in terms of the wanted operations, so that equal values are equal."""
        if isinstance(value, Operation):
            known = self.value_of.get(value)
            if known is None and value.kind in STRUCTURAL:
                known = self.value_of[value] = self._free(value)
            return value if known is None else known
        if isinstance(value, Group):
            return (value.kind, *map(self._canonical, value.items))
        return value

    def _free(self, operation: Operation) -> Any:
        form = 0 if operation.kind in STRUCTURAL else self.forms
        what = (operation.kind, operation.target, form, tuple(map(self._canonical, operation.args)))
        return self.named.setdefault(what, _Named())

    def _key(self, operation: Operation, epoch: int | None) -> Any:
        args = tuple(map(self._canonical, operation.args))
        kwargs = tuple((name, self._canonical(value)) for name, value in operation.kwargs)
        return (operation.kind, operation.target, operation.how, args, kwargs, epoch)

    # -- comparing

    def compare(self, body: Body) -> Iterator[tuple[int, str, str]]:
        """Yield line, what is wrong, and the loss that it is about, where that is known."""
        for attribute, line in body.attributes:
            if attribute.path not in self.wanted.attributes:
                yield line, f"reads {attribute.path}, which {self.whose} does not read", ""
        epoch, furthest = 0, -1
        self.last_line = body.line
        for operation in body.operations:
            if operation.kind == "unknown":
                continue
            if is_free(operation):
                value = self.value_of[operation] = self._free(operation)
                if value not in self.free and self._is_known(operation):
                    yield operation.line, f"`{show(operation)}` is not in {self.whose}", self._loss()
                    self.free.add(value)
                continue
            key = self._key(operation, epoch if is_pure(operation) else None)
            places = self.places.get(key)
            while places and self.taken[places[0]]:
                places.popleft()
            if places:
                number = places.popleft()
                if self.ordered[number]:
                    if number < furthest:
                        told = show(self.wanted.operations[furthest])
                        yield (
                            operation.line,
                            f"`{show(operation)}` stands after `{told}`, and not before",
                            self._loss(),
                        )
                    furthest = max(furthest, number)
                self._take(operation, number)
                self.forms += reforms(operation)
                self.matched += 1
                epoch += self.writes[number]
            else:
                instead, told = self._instead(operation, key)
                yield operation.line, told, self._loss(instead)
                if instead is not None:
                    epoch += self.writes[instead]
            self.last_line = operation.line
        yield from self._missing(body)
        if self._canonical(body.returned) != self._canonical(self.wanted.returned):
            yield body.end, self._returned(body.returned), ""

    def _take(self, operation: Operation, number: int) -> None:
        self.taken[number] = True
        self.value_of[operation] = self.wanted.operations[number]
        while self.next < len(self.taken) and self.taken[self.next]:
            self.next += 1

    def _loss(self, number: int | None = None) -> str:
        """Return the loss that an operation is for, or the one that comes next."""
        number = min(self.next, len(self.taken) - 1) if number is None else number
        return self.wanted.operations[number].loss if self.taken else ""

    def _is_known(self, operation: Operation) -> bool:
        """Tell whether an operation reads nothing that was reported already."""
        return all(one in self.value_of or one.kind in STRUCTURAL for one in operation.reads())

    def _instead(self, operation: Operation, key: Any) -> tuple[int | None, str]:
        """Find what the plan has in the place of an operation, and let its value be that; return its number."""
        shown = show(operation)
        near = [i for i in range(self.next, min(self.next + NEAR, len(self.taken))) if not self.taken[i]]
        others = [i for i in near if self.keys[i][:5] == key[:5]]
        told = f"`{shown}` is not in {self.whose}"
        if others:
            self._take(operation, others[0])
            return others[0], f"`{shown}` stands before or after a write that {self.whose} has on its other side"
        ready = [i for i in near if all(self._is_done(one) for one in self.wanted.operations[i].reads())]
        for same in (
            lambda wanted: wanted[:2] == key[:2],
            lambda wanted: wanted[0] == key[0] and wanted[3] == key[3] and wanted[3],
            lambda wanted: wanted[3] == key[3] and wanted[3],
        ):
            found = next((i for i in ready if same(self.keys[i])), None)
            if found is not None:
                self._take(operation, found)
                return found, f"{told}, which has `{show(self.wanted.operations[found])}` in its place"
        first = next((value for value in operation.args if isinstance(value, Operation)), None)
        if first is not None:
            self.value_of[operation] = self._canonical(first)
        following = next((self.wanted.operations[i] for i in near), None)
        needed = f"; it goes on with `{show(following)}`" if following is not None else ", which ends here"
        return None, told + needed

    def _is_done(self, operation: Operation) -> bool:
        return operation.kind != "unknown"

    def _missing(self, body: Body) -> Iterator[tuple[int, str, str]]:
        """Yield what the plan has, and the text has not."""
        left = [i for i, taken in enumerate(self.taken) if not taken]
        for i in left[:8]:
            wanted = self.wanted.operations[i]
            yield body.end, f"`{show(wanted)}` of {self.whose} is missing", wanted.loss
        if len(left) > 8:
            yield body.end, f"{len(left) - 8} more operations of {self.whose} are missing", ""

    def _returned(self, value: Any) -> str:
        wanted = self.wanted.returned
        for pair in _differing(value, wanted, self._canonical):
            return f"returns `{show(pair[0])}` where {self.whose} returns `{show(pair[1])}`"
        return f"does not return what {self.whose} returns"


def _differing(found: Any, wanted: Any, canonical: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the first parts of two values that differ."""
    if isinstance(found, Group) and isinstance(wanted, Group) and len(found.items) == len(wanted.items):
        for one, other in zip(found.items, wanted.items, strict=True):
            yield from _differing(one, other, canonical)
    elif canonical(found) != canonical(wanted):
        yield found, wanted
