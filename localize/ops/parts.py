"""Train on a batch in parts, with the gradients, statistics and draws of the whole batch, BatchNorm included.

Only one segment is differentiated at a time, so its parts can be swept several times:

- *forward levels*: a BatchNorm whose input waits for no unknown statistic gives its count, mean and sum of squared
  differences on every part; they are merged (Chan, Golub and LeVeque, *Updating formulae and a pairwise algorithm for
  computing sample variances*, 1979), and from then on the norm normalises by the whole batch;
- *backward levels*, counted from the loss: with n values per channel, normalised values z, and the gradient dy of the
  output, that of the input is ``dx = w / std * (dy - sum(dy) / n - z * sum(dy * z) / n)``. Both sums are over the whole
  batch, and are the gradients of the norm's own bias and weight (Ioffe and Szegedy, *Batch Normalization*, 2015,
  section 3). A sweep adds them up for all norms of a level; from then on their backward is exact;
- *the last sweep*: loss and backward of each part, whose output takes the place of its input.

A value that is kept for the whole batch divides a function into links: sweeps of what comes after it start from it, and
leave its gradient, from which sweeps of what comes before it go on. Which operation waits for which is recorded on the
first part, by the storages that each reads and writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from localize.errors import MethodError
from localize.ops.recomputation import still_statistics
from localize.ops.sweeps import Backward, Calls, Enough, First, Forward, Kept, Norm, Sums, Sweep, another_way
from localize.torch_names import BATCH_NORMS, is_fake, storage_of


def in_parts(
    function: Callable[..., Any], size: int, trunk: nn.Module, heads: nn.Module, batch: Sequence[Any], keep: str
) -> Any:
    """Differentiate the loss of a batch in parts: :func:`localize.ops.exact_parts`."""
    values = [value for value in batch if isinstance(value, Tensor | list)]
    scale = batch[len(values)].scale if len(batch) > len(values) else _as_it_is
    job = _Job(function, trunk, heads, values, size)
    calls = Calls(job.count, function.__name__, _named(trunk, keep) if keep else {})
    if len(job.bounds) == 1:
        return _last_sweep(job, calls, scale)
    ends = _forward_levels(job, calls)
    *links, last = _links(calls, ends)
    returned = _Returned(job)
    for link in links:
        _backward_levels(job, calls, scale, link)
        _differentiate(job, calls, scale, link, returned)
    _backward_levels(job, calls, scale, last)
    if last.target is not None:
        return _last_link(job, calls, ends, last, returned)
    calls.kept.clear()
    return _last_sweep(job, calls, scale)


def _as_it_is(loss: Tensor) -> Tensor:
    return loss


def _named(trunk: nn.Module, keep: str) -> dict[int, str]:
    """Return the names of the norms whose inputs are kept, by the identities of their parameters and statistics."""
    found = {}
    for name, module in trunk.named_modules():
        if isinstance(module, BATCH_NORMS) and is_kept(name, keep):
            for value in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if value.dim():  # not the counter
                    found[id(value)] = name
    return found


def is_kept(name: str, keep: str) -> bool:
    """Return whether a norm of this name is kept; what is kept is a text of last names with + between them."""
    return any(f".{name}".endswith(f".{word}") for word in keep.split("+"))


REPEATED: ContextVar[int] = ContextVar("REPEATED", default=1)
"""How many parts the one at hand stands for, where tensors have no values; costs are counted that many times."""


class _Job:
    """A function, and the parts that it is called on."""

    def __init__(
        self, function: Callable[..., Any], trunk: nn.Module, heads: nn.Module, values: list[Any], size: int
    ) -> None:
        self.function, self.trunk, self.heads = function, trunk, heads
        self.count = len(values[-1])
        self.bounds = divide(values, size)
        self.values = values

    def shown(self, *, keeps: bool = False) -> list[tuple[int, int]]:
        """Return the parts to be run, and how many each stands for.

        Without values, parts of the size of the second need what the second needs, and are left out. The first is not:
        it makes what the others add to. Nor is the last, unless ``keeps`` says that what the function is called on is
        there until the end.
        """
        sizes = [stop - start for start, stop in self.bounds]
        alike = sizes.count(sizes[0])
        stop = alike if keeps else alike - 1
        if stop < 3 or not is_fake(self.values[-1]):
            return [(number, 1) for number in range(len(sizes))]
        return [(0, 1), (1, stop - 1), *((number, 1) for number in range(stop, len(sizes)))]

    def run(self, number: int, sweep: Sweep | None = None) -> tuple[tuple[Any, ...], int]:
        """Call the function on a part, in a sweep; return what it returns, and at which place the loss is."""
        start, stop = self.bounds[number]
        part = [self.part(value, number) for value in self.values]
        try:
            made = self.function(self.trunk, self.heads, *part, (stop - start) / self.count)
        finally:
            if sweep is not None:
                sweep.over = True
        results = made if isinstance(made, tuple) else (made,)
        return results, next(i for i, result in enumerate(results) if result.dim() == 0)

    def part(self, value: Any, number: int) -> Tensor:
        """Return a part of a value."""
        if isinstance(value, list):
            return value[number]
        start, stop = self.bounds[number]
        fold = len(value) // self.count
        return value[start * fold : stop * fold]

    def source_of(self, result: Tensor, number: int) -> Any:
        """Return the value that a result is a part of, if it is passed on; None if it is computed."""
        parts = ((value, self.part(value, number)) for value in self.values)
        return next((value for value, part in parts if storage_of(part) == storage_of(result)), None)

    def let_go(self, number: int) -> None:
        """Drop a part of what other segments have passed on."""
        for value in self.values:
            if isinstance(value, list):
                value[number] = None
                if number + 1 == len(self.bounds):
                    value.clear()


def divide(values: Sequence[Any], size: int) -> list[tuple[int, int]]:
    """Divide a batch into parts: return the first image of each, and the one after its last.

    Args:
        values: tensors, or lists of parts, which become lists of these parts, in place; labels (N,) are last.
        size: number of images in a part; 0 is the whole batch.
    """
    count = len(values[-1])
    size = size or count
    bounds = [(start, min(start + size, count)) for start in range(0, count, size)]
    for value in values:
        if isinstance(value, list):
            _regroup(value, [(stop - start) / count for start, stop in bounds])
    return bounds


def _regroup(parts: list[Any], shares: Sequence[float]) -> None:
    """Divide a list of parts again, in place: into parts of these shares of the whole."""
    total = sum(map(len, parts))
    sizes = [round(share * total) for share in shares]
    if [len(part) for part in parts] == sizes:
        return
    made = []
    for size in sizes:
        taken: list[Tensor] = []
        while size:
            first = parts.pop(0)
            taken.append(first[:size])
            if len(first) > size:
                parts.insert(0, first[size:])
            size -= len(taken[-1])
        made.append(taken[0] if len(taken) == 1 else torch.cat(taken))
    parts[:] = made


# ------------------------------------------------------------------------------------------------------- sweeps


@dataclass
class _Ends:
    """What a function returns."""

    makers: list[frozenset[int]]
    """Operations that each result is made by."""
    at: int
    """Place of the loss; before it is what is passed on, after it are scores."""


@dataclass
class _Link:
    """A part of a function: from what enters it, or from what is kept, to a value that is kept, or to the loss."""

    target: int | None
    """The operation at its end; None is the loss."""
    wanted: frozenset[int]
    """Operations that it needs."""
    begins_at: tuple[int, ...]
    """Operations whose results are kept, and from which it starts."""
    ends_of: tuple[int, ...] = ()
    """The same, of which no later link needs the results."""


def _forward_levels(job: _Job, calls: Calls) -> _Ends:
    """Make the statistics of all norms those of the whole batch, and keep what is to be kept."""
    with still_statistics():
        without_values = any(is_fake(job.part(value, 0)) for value in job.values)
        devices = None if without_values else tuple(job.part(value, 0) for value in job.values)
        with torch.enable_grad(), First(calls, job.bounds[0], devices) as first:
            results, at = job.run(0, first)
            first.check_draws()
            ends = _Ends([first.makers([result]) for result in results], at)
        del devices, first, results
        for level in _levels(calls.norms(), "forward"):
            known = {number for number, kept in calls.kept.items() if len(kept.values) == len(job.bounds)}
            wanted = calls.needed(level, known)
            waits = any(norm.waits_for for number, norm in calls.norms() if number in level)
            for part, times in job.shown(keeps=True)[0 if waits else 1 :]:
                values = {number: calls.kept[number].values[part] for number in known & wanted}
                with (
                    _repeated(times),
                    torch.no_grad(),
                    Forward(calls, job.bounds[part], wanted, values, level) as sweep,
                ):
                    for number in calls.settled() & wanted - known:
                        if waits or 0 in calls.kept[number].values:
                            sweep.reached[number] = partial(calls.kept[number].hold, part, times)
                    _until_enough(job, part, sweep)
            for number, norm in calls.norms():
                if number in level:
                    norm.finish()
    calls.kept = {number: kept for number, kept in calls.kept.items() if len(kept.values) == len(job.bounds)}
    return ends


@contextmanager
def _repeated(times: int) -> Iterator[None]:
    token = REPEATED.set(times)
    try:
        yield
    finally:
        REPEATED.reset(token)


def _until_enough(job: _Job, part: int, sweep: Sweep) -> None:
    try:
        job.run(part, sweep)
    except Enough:
        return
    raise another_way(job.function.__name__)


def _links(calls: Calls, ends: _Ends) -> list[_Link]:
    """Return the links of a function, the one with the loss first."""
    kept = calls.kept
    loss = frozenset().union(*ends.makers[ends.at :])
    links: list[_Link] = []
    for target in (None, *sorted(kept, reverse=True)):
        if target is None or (kept[target].passes and any(target in link.begins_at for link in links)):
            others = set(kept) - {target}
            wanted = calls.needed(loss if target is None else (target,), others)
            links.append(_Link(target, wanted, tuple(sorted(wanted & others))))
    twice = [n for n, _ in calls.norms() if sum(n in link.wanted and n not in link.begins_at for link in links) > 1]
    over = [n for n, operation in enumerate(calls.operations) if any(k in kept and k < n for k in operation.over)]
    if twice or over:
        names = ", ".join(dict.fromkeys(one.norm for one in kept.values()))
        raise MethodError(
            f"{calls.function} cannot keep these inputs of norms: {names}.",
            facts="they are written over, or what comes after them also reads what comes after a norm before them.",
            help="leave keep_at out, or keep the inputs of other norms",
        )
    left = set(kept)
    for link in reversed(links):
        link.ends_of = tuple(left.intersection(link.begins_at))
        left -= set(link.ends_of)
    return links


def _backward_levels(job: _Job, calls: Calls, scale: Callable[[Tensor], Tensor], link: _Link) -> None:
    """Make the two sums of all norms of a link that a gradient passes those of the whole batch."""
    norms = [(n, norm) for n, norm in calls.norms() if n in link.wanted and n not in link.begins_at]
    for number, norm in reversed(norms):
        if norm.passes:
            above = (other.backward for _, other in norms if number in other.waits_for and other.passes)
            norm.backward = 1 + max(above, default=0)
    with still_statistics():
        for level in _levels(norms, "backward"):
            totals: dict[int, Sums] = {number: Sums() for number in level}
            for part, times in job.shown(keeps=True):
                values = {number: calls.kept[number].values[part] for number in link.begins_at}
                sweep = Backward(calls, job.bounds[part], link.wanted, values, level)
                with _repeated(times), torch.no_grad(), sweep:
                    end = _end(job, part, sweep, link)
                    numbers = list(sweep.probes)
                    probes = [probe for number in numbers for probe in sweep.probes[number]]
                    at_end = None if link.target is None else calls.kept[link.target].gradients[part]
                    found = _gradients(end, probes, at_end, scale)
                    del end
                for number, by_weight, by_bias in zip(numbers, found[::2], found[1::2], strict=True):
                    totals[number].add(by_weight, by_bias)
            for number, norm in norms:
                if number in level:
                    norm.sums = totals[number].of


def _end(job: _Job, part: int, sweep: Sweep, link: _Link) -> Tensor:
    """Run a link on a part; return what it ends with."""
    if link.target is None:
        results, at = job.run(part, sweep)
        return results[at]
    found: list[Tensor] = []

    def enough(value: Tensor) -> Tensor:
        found.append(value)
        raise Enough

    sweep.reached[link.target] = enough
    _until_enough(job, part, sweep)
    return found.pop()


def _gradients(
    end: Tensor, values: list[Tensor], at_end: Tensor | None, scale: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Return the gradients for these values, of a scaled loss or from that at the end; zero where it is not reached."""
    found: Sequence[Tensor | None] = [None] * len(values)
    if end.requires_grad:
        with torch.enable_grad():
            end = scale(end) if at_end is None else end
            found = torch.autograd.grad(end, values, at_end, allow_unused=True)
    pairs = zip(values, found, strict=True)
    return [torch.zeros_like(value) if gradient is None else gradient for value, gradient in pairs]


def _levels(norms: Sequence[tuple[int, Norm]], which: str) -> Iterator[list[int]]:
    """Yield the numbers of the norms of each level, the first one first."""
    level = {number: getattr(norm, which) for number, norm in norms}
    for height in range(1, max(level.values(), default=0) + 1):
        yield [number for number, its in level.items() if its == height]


class _Returned:
    """What a function returns for every part, put together."""

    def __init__(self, job: _Job) -> None:
        self.job = job
        self.passed: list[list[Tensor]] = []
        self.loss: Tensor | None = None
        self.scores: list[Tensor] = []

    def add_loss(self, results: tuple[Any, ...], at: int, part: int) -> None:
        """Add the loss of a part, and put its scores in their place."""
        job = self.job
        if self.loss is None:
            self.scores = [enlarged(made, job.count) if len(job.bounds) > 1 else made for made in results[at + 1 :]]
            self.loss = torch.zeros_like(results[at])
        self.loss += results[at].detach()
        for whole, made in zip(self.scores, results[at + 1 :], strict=True):
            if whole is not made:
                whole[slice(*job.bounds[part])] = made

    def pass_on(self, results: list[Tensor], part: int, times: int) -> None:
        """Add what a part passes on, in the place of what has entered; ``results`` is emptied."""
        job = self.job
        if not part:
            self.passed = [[] for _ in results]
        for gathered, made in zip(self.passed, results, strict=True):
            gathered.append(made)
            del made
        sources = [job.source_of(result, part) for result in results]
        results.clear()
        job.let_go(part)
        for number in range(part + 1, part + times):  # the parts that this one stands for
            for gathered, source in zip(self.passed, sources, strict=True):
                gathered.append(torch.empty_like(gathered[-1]) if source is None else job.part(source, number))
            job.let_go(number)

    def all(self) -> Any:
        """Return it as the function does."""
        returned = (*self.passed, self.loss, *self.scores)
        return returned if len(returned) > 1 else self.loss


def _last_sweep(job: _Job, calls: Calls, scale: Callable[[Tensor], Tensor]) -> Any:
    """Differentiate every part, and put together what the function returns."""
    returned = _Returned(job)
    for part, times in job.shown():
        sweep = None if len(job.bounds) == 1 else Sweep(calls, job.bounds[part], moves=part == 0)
        with _repeated(times), still_statistics() if part else nullcontext(), sweep or nullcontext():
            results, at = job.run(part, sweep)
            scale(results[at]).backward()
        returned.add_loss(results, at, part)
        passed = list(results[:at])
        del results
        returned.pass_on(passed, part, times)
    return returned.all()


def _differentiate(
    job: _Job, calls: Calls, scale: Callable[[Tensor], Tensor], link: _Link, returned: _Returned
) -> None:
    """Differentiate a link on every part; of what it starts from, gradients take the place of values."""
    for part, times in job.shown():
        values = {n: calls.kept[n].values[part].detach().requires_grad_(calls.kept[n].passes) for n in link.begins_at}
        with _repeated(times), still_statistics(), Sweep(calls, job.bounds[part], link.wanted, values) as sweep:
            if link.target is None:
                results, at = job.run(part, sweep)
                scale(results[at]).backward()
                returned.add_loss(results, at, part)
                del results
            else:
                end = calls.kept[link.target]
                _end(job, part, sweep, link).backward(end.gradients[part])
                end.let_go(end.gradients, part, times)
        del sweep
        for number in link.begins_at:
            kept, gradient = calls.kept[number], values.pop(number).grad
            if number in link.ends_of:
                kept.let_go(kept.values, part, times)
            if gradient is not None:
                kept.add(part, times, gradient)
            del gradient


def _last_link(job: _Job, calls: Calls, ends: _Ends, link: _Link, returned: _Returned) -> Any:
    """Differentiate the first link of a function on every part, and then run the rest for what it passes on."""
    assert link.target is not None
    end = calls.kept[link.target]
    wanted = calls.needed((link.target, *frozenset().union(*ends.makers[: ends.at])))
    for part, times in job.shown():
        all_of_it = part == 0  # running statistics move
        sweep = Sweep(calls, job.bounds[part], None if all_of_it else wanted, moves=all_of_it)
        sweep.reached[link.target] = partial(_go_back, end, part, times, goes_on=bool(ends.at) or all_of_it)
        passed: list[Tensor] = []
        with _repeated(times), nullcontext() if all_of_it else still_statistics(), torch.enable_grad(), sweep:
            if ends.at or all_of_it:
                passed += job.run(part, sweep)[0][: ends.at]
            else:
                _until_enough(job, part, sweep)
        del sweep
        returned.pass_on(passed, part, times)
    return returned.all()


def _go_back(end: Kept, part: int, times: int, value: Tensor, *, goes_on: bool) -> Tensor:
    """Differentiate what has made a value, and go on from it without gradient."""
    value.backward(end.gradients[part])
    end.let_go(end.gradients, part, times)
    if not goes_on:
        raise Enough
    torch.set_grad_enabled(False)
    return value.detach()


def enlarged(part: Tensor, count: int) -> Tensor:
    """Return an empty tensor like ``part`` for ``count`` images, in the same memory format."""
    channels_last = part.dim() == 4 and part.is_contiguous(memory_format=torch.channels_last)
    form = torch.channels_last if channels_last and not part.is_contiguous() else torch.contiguous_format
    return torch.empty((count, *part.shape[1:]), dtype=part.dtype, device=part.device, memory_format=form)
