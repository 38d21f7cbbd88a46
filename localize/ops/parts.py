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

Which norms wait for which is followed on the first part, by the storages that each operation reads and writes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import get_device_states

from localize.errors import MethodError
from localize.ops.recomputation import COUNTED, Counted, still_statistics
from localize.torch_names import is_fake, norm_gradients, storage_of, tree_leaves, version_of


def in_parts(function: Callable[..., Any], size: int, trunk: nn.Module, heads: nn.Module, batch: Sequence[Any]) -> Any:
    """Differentiate the loss of a batch in parts: :func:`localize.ops.exact_parts`."""
    values = [value for value in batch if isinstance(value, Tensor | list)]
    scale = batch[len(values)].scale if len(batch) > len(values) else _as_it_is
    job = _Job(function, trunk, heads, values, size)
    calls = _Calls(job.count, function.__name__)
    if len(job.bounds) > 1:
        _forward_levels(job, calls)
        _backward_levels(job, calls, scale)
    return _last_sweep(job, calls, scale)


def _as_it_is(loss: Tensor) -> Tensor:
    return loss


REPEATED: ContextVar[int] = ContextVar("REPEATED", default=1)
"""How many parts the one at hand stands for, where tensors have no values; costs are counted so often."""


class _Job:
    """A function, and the parts that it is called on."""

    def __init__(
        self, function: Callable[..., Any], trunk: nn.Module, heads: nn.Module, values: list[Any], size: int
    ) -> None:
        self.function, self.trunk, self.heads = function, trunk, heads
        self.count = len(values[-1])
        size = size or self.count
        self.bounds = [(start, min(start + size, self.count)) for start in range(0, self.count, size)]
        self.values = values
        for value in values:
            if isinstance(value, list):
                _regroup(value, [(stop - start) / self.count for start, stop in self.bounds])

    def shown(self) -> list[tuple[int, int]]:
        """Return the parts to be run, and how many each stands for.

        Without values, parts between the second and the last of the same size need what the second needs; only they are
        left out. The first makes what the others add to.
        """
        sizes = [stop - start for start, stop in self.bounds]
        last = max(number for number, size in enumerate(sizes) if size == sizes[0])
        if last < 4 or not is_fake(self.values[-1]):
            return [(number, 1) for number in range(len(sizes))]
        return [(0, 1), (1, last - 1), *((number, 1) for number in range(last, len(sizes)))]

    def run(self, number: int) -> tuple[tuple[Any, ...], int]:
        """Call the function on a part; return what it returns, and at which place the loss is."""
        start, stop = self.bounds[number]
        part = [self.part(value, number) for value in self.values]
        made = self.function(self.trunk, self.heads, *part, (stop - start) / self.count)
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
        """Return the value whose part a result is, where it is handed on; None where it is computed."""
        parts = ((value, self.part(value, number)) for value in self.values)
        return next((value for value, part in parts if storage_of(part) == storage_of(result)), None)

    def let_go(self, number: int) -> None:
        """Drop a part of what other segments have passed on."""
        for value in self.values:
            if isinstance(value, list):
                value[number] = None
                if number + 1 == len(self.bounds):
                    value.clear()


def _regroup(parts: list[Any], shares: Sequence[float]) -> None:
    """Divide a list of parts anew, in place: into parts of these shares of the whole."""
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


# ----------------------------------------------------------------------------------------------- norms and draws


@dataclass
class _Norm:
    """One call of a BatchNorm."""

    waits_for: frozenset[int]
    """Numbers of the calls whose statistics its input depends on."""
    passes: bool
    """A gradient goes on to its input."""
    forward: int
    """Its level, from the input on."""
    dtype: torch.dtype
    """Of the statistics that it normalises by."""
    backward: int = 0
    """Its level, from the loss on; 0 where no gradient goes on."""
    count: int = 0
    """Values for each channel."""
    center: Tensor | float = 0.0
    """Their mean so far, in float64."""
    squares: Tensor | float = 0.0
    """Sum of the squared differences from it so far, in float64."""
    mean: Tensor | None = None
    var: Tensor | None = None
    """The biased variance."""
    sums: tuple[Tensor, Tensor] | None = None
    """Over the whole batch, of dy * z, and of dy."""

    def gather(self, x: Tensor) -> None:
        """Merge the moments of a part."""
        x = x.detach()
        x = x if x.dtype in (torch.float32, torch.float64) else x.float()
        var, mean = torch.var_mean(x, dim=[0, *range(2, x.dim())], correction=0)
        mean, var = _precise(mean), _precise(var)
        count = x.numel() // x.shape[1]
        total = self.count + count
        difference = mean - self.center
        self.squares = self.squares + var * count + difference.square() * (self.count * count / total)
        self.center = self.center + difference * (count / total)
        self.count = total

    def finish(self) -> None:
        """Let the moments be those of the whole batch."""
        assert isinstance(self.center, Tensor) and isinstance(self.squares, Tensor)
        self.mean, self.var = self.center.to(self.dtype), (self.squares / self.count).to(self.dtype)

    def move(self, running_mean: Tensor | None, running_var: Tensor | None, factor: float) -> None:
        """Move running statistics towards those of the batch; the variance unbiased, as torch does."""
        if running_mean is None or running_var is None or not factor:
            return
        unbiased = self.squares / (self.count - 1)
        assert isinstance(self.center, Tensor) and isinstance(unbiased, Tensor)
        with torch.no_grad():
            for running, value in ((running_mean, self.center), (running_var, unbiased)):
                running.mul_(1 - factor).add_(value.to(running.dtype), alpha=factor)


class _Sums:
    """The gradients of a norm's weight and bias, added up over parts."""

    def __init__(self) -> None:
        self.of: tuple[Tensor, Tensor] | None = None

    def add(self, by_weight: Tensor, by_bias: Tensor) -> None:
        """Add those of a part."""
        both = (_precise(by_weight), _precise(by_bias))
        self.of = both if self.of is None else (self.of[0] + both[0], self.of[1] + both[1])


def _precise(value: Tensor) -> Tensor:
    return value if value.device.type == "mps" else value.double()


def _type_of_statistics(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class _Given(torch.autograd.Function):
    """BatchNorm with given statistics, whose backward is that of the whole batch once the sums are known."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: _Norm, eps: float) -> Tensor:
        ctx.norm, ctx.eps = norm, eps
        ctx.save_for_backward(x, weight)
        return F.batch_norm(x, norm.mean, norm.var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        norm, eps, needs = ctx.norm, ctx.eps, ctx.needs_input_grad
        by_weight = by_bias = dx = None
        if needs[1] or needs[2]:
            by_weight, by_bias = norm_gradients(dy, x, norm.mean, norm.var, eps)
        if needs[0]:
            assert norm.sums is not None, "the norms behind this one have been swept"
            by_z, alone = (-total / norm.count for total in norm.sums)
            scale = (norm.var + eps).rsqrt() * (1 if weight is None else weight)
            wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
            dx = F.batch_norm(wide, norm.mean, norm.var, by_z.to(norm.mean), alone.to(norm.mean), False, 0.0, eps)
            dx = dx.add_(dy).mul_(scale.view(-1, *(1 for _ in x.shape[2:]))).to(x.dtype)
        return dx, by_weight if needs[1] else None, by_bias if needs[2] else None, None, None


@dataclass
class _Draw:
    """One call that draws: for every image, and every value or channel of it, whether it is kept."""

    kept: Tensor
    """One byte each, of the whole batch."""


@dataclass
class _Calls:
    """What a function calls that looks at the whole batch, in order."""

    count: int
    """Number of images."""
    function: str
    made: list[_Norm | _Draw] = field(default_factory=list)

    def norms(self) -> list[tuple[int, _Norm]]:
        """Return the norms with their numbers."""
        return [(number, call) for number, call in enumerate(self.made) if isinstance(call, _Norm)]

    def draw(self, like: Tensor, shape: Sequence[int], chance: float) -> None:
        """Draw for the whole batch, as a call on all of it would: in torch, double has draws of its own."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.bool
        made = torch.empty(self.count, *shape[1:], dtype=dtype, device=like.device).bernoulli_(chance)
        self.made.append(_Draw(made.bool()))


# ------------------------------------------------------------------------------------------------------- sweeps


class _Enough(Exception):
    """The sweep has what it wants of this part."""


class _Sweep(TorchFunctionMode):
    """Run a function on a part; calls of BatchNorms and of what draws are numbered, and treated in another way."""

    def __init__(self, calls: _Calls, bounds: tuple[int, int]) -> None:
        super().__init__()
        self.calls, self.bounds = calls, bounds
        self.counted = Counted(self)
        self._tokens: list[Token] = []

    def __enter__(self) -> Any:
        self._tokens.append(COUNTED.set(self.counted))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        COUNTED.reset(self._tokens.pop())
        if not self._tokens:
            self.counted.within = nullcontext()  # nothing refers to itself, so that all dies with its last reader

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = _HANDLED.get(func)
        kwargs = kwargs or {}
        made = NotImplemented if known is None else known(self, *args, **kwargs)
        return func(*args, **kwargs) if made is NotImplemented else made

    def _next(self) -> int:
        self.counted.next += 1
        return self.counted.next - 1

    # -- norms

    def norm(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Any:
        """Stand for ``torch.nn.functional.batch_norm``."""
        if not training:
            return NotImplemented
        number, dtype = self._next(), _type_of_statistics(x)
        weight, bias = (value if value is None else value.to(dtype) for value in (weight, bias))
        norm = self._norm_of(number, x)
        made = self.normalised(number, norm, x, weight, bias, eps)
        norm.move(running_mean, running_var, momentum if self.moves else 0.0)
        return made

    moves = False
    """Whether running statistics are moved as the call asks for."""

    def _norm_of(self, number: int, x: Tensor) -> _Norm:
        norm = self.calls.made[number] if number < len(self.calls.made) else None
        if not isinstance(norm, _Norm):
            raise _another_way(self.calls.function)
        return norm

    def normalised(
        self, number: int, norm: _Norm, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        """Return the output of a norm."""
        raise NotImplementedError

    # -- draws

    def dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        """Stand for ``torch.nn.functional.dropout``."""
        return self._dropped(x, x.shape, p, training, inplace)

    def feature_dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        """Stand for ``dropout1d``, ``dropout2d`` and ``dropout3d``."""
        if x.dim() < 3 and training and p:
            raise _another_way(self.calls.function)
        return self._dropped(x, (*x.shape[:2], *(1 for _ in x.shape[2:])), p, training, inplace)

    def _dropped(self, x: Tensor, shape: Sequence[int], p: float, training: bool, inplace: bool) -> Any:
        if not training or p in (0, 1):
            return NotImplemented
        kept = self._kept(x, shape, 1 - p).to(x.dtype).div_(1 - p)
        return x.mul_(kept) if inplace else x * kept

    def bernoulli(self, x: Tensor, p: float = 0.5, **more: Any) -> Any:
        """Stand for ``torch.Tensor.bernoulli_``, which stochastic depth calls on a value for each image."""
        if more or not isinstance(p, float | int) or len(x) != self.bounds[1] - self.bounds[0]:
            raise _another_way(self.calls.function)
        with torch.no_grad():
            return x.copy_(self._kept(x, x.shape, p))

    def _kept(self, like: Tensor, shape: Sequence[int], chance: float) -> Tensor:
        number = self._next()
        if number == len(self.calls.made):
            self.calls.draw(like, shape, chance)
        draw = self.calls.made[number] if number < len(self.calls.made) else None
        if not isinstance(draw, _Draw):
            raise _another_way(self.calls.function)
        return draw.kept[slice(*self.bounds)]


_HANDLED: dict[Any, Callable[..., Any]] = {
    F.batch_norm: _Sweep.norm,
    F.dropout: _Sweep.dropout,
    F.dropout1d: _Sweep.feature_dropout,
    F.dropout2d: _Sweep.feature_dropout,
    F.dropout3d: _Sweep.feature_dropout,
    torch.Tensor.bernoulli_: _Sweep.bernoulli,
}


def _another_way(function: str) -> MethodError:
    return MethodError(
        f"{function} cannot take the batch in parts.",
        facts="it normalises by the batch, or draws random numbers, in a way that is not known: known are BatchNorm, "
        "dropout of values and of channels, and stochastic depth of images.",
        help="leave micro_batch out",
    )


class _First(_Sweep):
    """Find the calls, which of them wait for which, and the moments of those that wait for none."""

    def __init__(self, calls: _Calls, bounds: tuple[int, int], devices: tuple[Tensor, ...] | None) -> None:
        super().__init__(calls, bounds)
        self.behind: dict[int, frozenset[int]] = {}
        """Norms that values depend on, by the storage that holds them."""
        self.everything: frozenset[int] = frozenset()
        """Norms that numbers of Python depend on, and so whatever comes next."""
        self.devices = devices
        self.random: list[Tensor] = []
        """States of the generators when nothing but what is known has drawn from them."""

    def __enter__(self) -> Any:
        self.random = self._states()
        return super().__enter__()

    def _states(self) -> list[Tensor]:
        """Return the states of the generators; none where tensors have no values."""
        if self.devices is None:
            return []
        return [torch.get_rng_state(), *get_device_states(*self.devices)[1]]

    def _kept(self, like: Tensor, shape: Sequence[int], chance: float) -> Tensor:
        self.check_draws()
        kept = super()._kept(like, shape, chance)
        self.random = self._states()
        return kept

    def check_draws(self) -> None:
        """Refuse a function that draws in another way than those that are known.

        Raises:
            MethodError: it does.
        """
        if not all(map(torch.equal, self._states(), self.random)):
            raise _another_way(self.calls.function)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        versions = [version_of(value) for value in read]
        self.found = self.depends(read)
        result = super().__torch_function__(func, types, args, kwargs)
        found = self.found
        if found:
            made = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
            written = [value for value, before in zip(read, versions, strict=True) if version_of(value) != before]
            for value in (*made, *written):
                self._mark(value, found)
            if not made and not written and getattr(func, "__name__", "") not in _OF_SHAPE:
                self.everything |= found
        return result

    def depends(self, values: Iterable[Tensor]) -> frozenset[int]:
        """Return the norms that values depend on."""
        return self.everything.union(*(self.behind.get(id(v.untyped_storage()), frozenset()) for v in values))

    def _mark(self, value: Tensor, found: frozenset[int]) -> None:
        storage = value.untyped_storage()
        if id(storage) not in self.behind:
            weakref.finalize(storage, self.behind.pop, id(storage), None)
        self.behind[id(storage)] = self.behind.get(id(storage), frozenset()) | found

    def _norm_of(self, number: int, x: Tensor) -> _Norm:
        waits = self.found
        levels = [self.calls.made[i].forward for i in waits]  # type: ignore[union-attr]
        level = 1 + max(levels, default=0)
        self.calls.made.append(_Norm(waits, x.requires_grad, level, _type_of_statistics(x)))
        return super()._norm_of(number, x)

    def normalised(
        self, number: int, norm: _Norm, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        """Normalise by the part: what comes of it is not used."""
        if not norm.waits_for:
            norm.gather(x)
        self.found = norm.waits_for | {number}
        return _by_itself(x, weight, bias, eps)


_OF_SHAPE = frozenset({
    "__get__", "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "is_contiguous",
    "is_floating_point", "is_complex", "is_signed", "__len__", "element_size", "get_device", "untyped_storage",
})  # fmt: skip
"""Functions of tensors whose answers do not depend on values."""


def _by_itself(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    ones = torch.ones(x.shape[1], dtype=_type_of_statistics(x), device=x.device)
    return F.batch_norm(x, torch.zeros_like(ones), ones, weight, bias, False, 0.0, eps)


class _Forward(_Sweep):
    """Gather the moments of some norms; end behind the last of them."""

    def __init__(self, calls: _Calls, bounds: tuple[int, int], level: Sequence[int]) -> None:
        super().__init__(calls, bounds)
        self.level, self.last = frozenset(level), max(level)

    def normalised(
        self, number: int, norm: _Norm, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        """Normalise by the batch where its statistics are known."""
        if number in self.level:
            norm.gather(x)
        if number == self.last:
            raise _Enough
        if norm.mean is None:
            return _by_itself(x, weight, bias, eps)
        return F.batch_norm(x, norm.mean, norm.var, weight, bias, False, 0.0, eps)


class _Backward(_Sweep):
    """Run with gradient from the first norm of a level on, and only to the norms of that level."""

    def __init__(self, calls: _Calls, bounds: tuple[int, int], level: Sequence[int]) -> None:
        super().__init__(calls, bounds)
        self.level, self.first = frozenset(level), min(level)
        self.probes: dict[int, tuple[Tensor, Tensor]] = {}

    def normalised(
        self, number: int, norm: _Norm, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        """Give a norm of the level a weight and a bias of its own, whose gradients are its sums."""
        assert norm.mean is not None
        weight, bias = (None if value is None else value.detach() for value in (weight, bias))
        if number == self.first:
            torch.set_grad_enabled(True)
        if number in self.level:
            if number not in self.probes:  # or it is computed again
                ones = torch.ones_like(norm.mean)
                self.probes[number] = (
                    (ones if weight is None else weight.clone()).requires_grad_(),
                    (torch.zeros_like(ones) if bias is None else bias.clone()).requires_grad_(),
                )
            return _Given.apply(x.detach(), *self.probes[number], norm, eps)
        exact = norm.sums is not None
        return _Given.apply(x if exact else x.detach(), weight, bias, norm, eps)


class _Last(_Sweep):
    """Run with the backward of the whole batch."""

    def __init__(self, calls: _Calls, bounds: tuple[int, int], *, moves: bool) -> None:
        super().__init__(calls, bounds)
        self.moves = moves

    def normalised(
        self, number: int, norm: _Norm, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        """Normalise by the batch."""
        return _Given.apply(x, weight, bias, norm, eps)


def _forward_levels(job: _Job, calls: _Calls) -> None:
    """Make the statistics of all norms those of the whole batch."""
    with still_statistics():
        without_values = any(is_fake(job.part(value, 0)) for value in job.values)
        devices = None if without_values else tuple(job.part(value, 0) for value in job.values)
        with torch.enable_grad(), _First(calls, job.bounds[0], devices) as first:
            job.run(0)
            first.check_draws()
        del devices, first
        for level in _levels(calls, "forward"):
            waits = any(norm.waits_for for number, norm in calls.norms() if number in level)
            for part, times in job.shown()[0 if waits else 1 :]:
                with _repeated(times), torch.no_grad(), _Forward(calls, job.bounds[part], level):
                    _until_enough(job, part)
            for number, norm in calls.norms():
                if number in level:
                    norm.finish()


@contextmanager
def _repeated(times: int) -> Iterator[None]:
    token = REPEATED.set(times)
    try:
        yield
    finally:
        REPEATED.reset(token)


def _until_enough(job: _Job, part: int) -> None:
    try:
        job.run(part)
    except _Enough:
        return
    raise _another_way(job.function.__name__)


def _backward_levels(job: _Job, calls: _Calls, scale: Callable[[Tensor], Tensor]) -> None:
    """Make the two sums of all norms that a gradient passes those of the whole batch."""
    norms = calls.norms()
    for number, norm in reversed(norms):
        if norm.passes:
            above = (other.backward for _, other in norms if number in other.waits_for and other.passes)
            norm.backward = 1 + max(above, default=0)
    with still_statistics():
        for level in _levels(calls, "backward"):
            totals: dict[int, _Sums] = {number: _Sums() for number in level}
            for part, times in job.shown():
                with _repeated(times), torch.no_grad(), _Backward(calls, job.bounds[part], level) as sweep:
                    results, at = job.run(part)
                    loss, results = results[at], ()
                    numbers = list(sweep.probes)
                    probes = [probe for number in numbers for probe in sweep.probes[number]]
                    found = _gradients(loss, probes, scale)
                    del loss
                for number, by_weight, by_bias in zip(numbers, found[::2], found[1::2], strict=True):
                    totals[number].add(by_weight, by_bias)
            for number, norm in norms:
                if number in level:
                    norm.sums = totals[number].of


def _gradients(loss: Tensor, values: list[Tensor], scale: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Return the gradients of a scaled loss for these values, zero where it does not depend on them."""
    with torch.enable_grad():
        found: Sequence[Tensor | None] = [None] * len(values)
        if loss.requires_grad:
            found = torch.autograd.grad(scale(loss), values, allow_unused=True)
    pairs = zip(values, found, strict=True)
    return [torch.zeros_like(value) if gradient is None else gradient for value, gradient in pairs]


def _levels(calls: _Calls, which: str) -> Iterator[list[int]]:
    """Yield the numbers of the norms of each level, the first one first."""
    level = {number: getattr(norm, which) for number, norm in calls.norms()}
    for height in range(1, max(level.values(), default=0) + 1):
        yield [number for number, its in level.items() if its == height]


def _last_sweep(job: _Job, calls: _Calls, scale: Callable[[Tensor], Tensor]) -> Any:
    """Differentiate every part, and put together what the function returns."""
    passed: list[list[Tensor]] = []
    loss: Tensor | None = None
    scores: list[Tensor] = []
    for part, times in job.shown():
        bounds = job.bounds[part]
        alone = nullcontext() if len(job.bounds) == 1 else _Last(calls, bounds, moves=part == 0)
        with _repeated(times), still_statistics() if part else nullcontext(), alone:
            results, at = job.run(part)
            scale(results[at]).backward()
        if loss is None:
            passed = [[] for _ in results[:at]]
            scores = [enlarged(result, job.count) if len(job.bounds) > 1 else result for result in results[at + 1 :]]
            loss = torch.zeros_like(results[at])
        loss += results[at].detach()
        for gathered, made in zip(passed, results, strict=False):
            gathered.append(made)
        for whole, made in zip(scores, results[at + 1 :], strict=True):
            if whole is not made:
                whole[slice(*bounds)] = made
        sources = [job.source_of(result, part) for result in results[:at]]
        made = None
        del results
        job.let_go(part)
        for number in range(part + 1, part + times):  # the parts that this one stands for
            for gathered, source in zip(passed, sources, strict=True):
                gathered.append(torch.empty_like(gathered[-1]) if source is None else job.part(source, number))
            job.let_go(number)
    returned = (*passed, loss, *scores)
    return returned if len(returned) > 1 else loss


def enlarged(part: Tensor, count: int) -> Tensor:
    """Return an empty tensor like ``part`` for ``count`` images, in the same memory format."""
    channels_last = part.dim() == 4 and part.is_contiguous(memory_format=torch.channels_last)
    form = torch.channels_last if channels_last and not part.is_contiguous() else torch.contiguous_format
    return torch.empty((count, *part.shape[1:]), dtype=part.dtype, device=part.device, memory_format=form)
