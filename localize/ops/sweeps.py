"""Run a function on a part of the batch, with BatchNorms that know the whole, and without what a sweep does not need.

The operations of a function are numbered in order. The first run records which operation reads what another makes, by
the storages that each reads and writes; from then on a sweep computes what leads to what it is for, and nothing else.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from contextvars import Token
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import get_device_states

from localize.errors import MethodError
from localize.ops.recomputation import COUNTED, Counted
from localize.torch_names import norm_gradients, version_of

# ----------------------------------------------------------------------------------------------- norms and draws


@dataclass
class Norm:
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


class Sums:
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


class Given(torch.autograd.Function):
    """BatchNorm with given statistics, whose backward is that of the whole batch once the sums are known."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: Norm, eps: float) -> Tensor:
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
            assert norm.sums is not None, "the norms after this one have been swept"
            by_z, alone = (-total / norm.count for total in norm.sums)
            scale = (norm.var + eps).rsqrt() * (1 if weight is None else weight)
            wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
            dx = F.batch_norm(wide, norm.mean, norm.var, by_z.to(norm.mean), alone.to(norm.mean), False, 0.0, eps)
            dx = dx.add_(dy).mul_(scale.view(-1, *(1 for _ in x.shape[2:]))).to(x.dtype)
        return dx, by_weight if needs[1] else None, by_bias if needs[2] else None, None, None


@dataclass
class Draw:
    """One call that draws: for every image, and every value or channel of it, whether it is kept."""

    mask: Tensor
    """One byte each, of the whole batch."""


@dataclass
class Kept:
    """A value that is kept for the whole batch, so that sweeps start from it."""

    norm: str
    """The norm that reads it."""
    passes: bool
    """A gradient goes on to what it is made of."""
    values: dict[int, Tensor] = field(default_factory=dict)
    """By the number of the part."""
    gradients: dict[int, Tensor] = field(default_factory=dict)
    """The same, as far as they are known."""

    def hold(self, part: int, times: int, value: Tensor) -> Tensor:
        """Keep the value of a part, and room for the parts that it stands for; return it."""
        self.values[part] = value.detach()
        self.values |= {number: torch.empty_like(value) for number in range(part + 1, part + times)}
        return value

    def add(self, part: int, times: int, gradient: Tensor) -> None:
        """Add to the gradient of a part, and of the parts that it stands for."""
        for number in range(part, part + times):
            if number in self.gradients:
                self.gradients[number] += gradient
            else:
                self.gradients[number] = gradient if number == part else torch.empty_like(gradient)

    @staticmethod
    def let_go(of: dict[int, Tensor], part: int, times: int) -> None:
        """Drop the values or gradients of a part, and of the parts that it stands for."""
        for number in range(part, part + times):
            of.pop(number, None)


@dataclass
class Operation:
    """One operation of a function, as its first run recorded it."""

    function: Any
    reads: frozenset[int]
    """Numbers of the operations that have made, or written, what it reads."""
    norms: frozenset[int]
    """Numbers of the norms that it depends on."""
    operands: tuple[int, ...] = ()
    """Of a concatenation: what has made each value that it puts together, -1 for what enters the function."""
    over: frozenset[int] = frozenset()
    """Numbers of the operations whose results it writes over."""
    passes: bool = False
    """A gradient goes on to what it reads."""
    same: int | None = None
    """Which of the tensors that it reads it returns."""
    made: Any = None
    """What it returns: tensors without memory, where it returns tensors."""


@dataclass
class Calls:
    """What a function computes, in order."""

    count: int
    """Number of images."""
    function: str
    keep: Mapping[int, str]
    """Names of the norms whose inputs are kept, by the identities of their parameters and statistics."""
    operations: list[Operation] = field(default_factory=list)
    made: dict[int, Norm | Draw] = field(default_factory=dict)
    """Operations that look at the whole batch, by number."""
    always: set[int] = field(default_factory=set)
    """Operations that Python takes a number from: every sweep needs them."""
    kept: dict[int, Kept] = field(default_factory=dict)
    """Values that are kept, by the number of the operation that makes them."""
    _scalars: dict[Any, Tensor] = field(default_factory=dict)

    def norms(self) -> list[tuple[int, Norm]]:
        """Return the norms with their numbers."""
        return [(number, call) for number, call in self.made.items() if isinstance(call, Norm)]

    def draw(self, number: int, like: Tensor, shape: Sequence[int], chance: float) -> None:
        """Draw for the whole batch, as a call on all of it would: in torch, double has draws of its own."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.bool
        made = torch.empty(self.count, *shape[1:], dtype=dtype, device=like.device).bernoulli_(chance)
        self.made[number] = Draw(made.bool())

    def needed(self, numbers: Iterable[int], given: Iterable[int] = ()) -> frozenset[int]:
        """Return these operations and all that they read, back to those of ``given``, which are included."""
        given, found, pending = frozenset(given), set[int](), [*numbers, *self.always]
        while pending:
            number = pending.pop()
            if number not in found:
                found.add(number)
                pending += () if number in given else self.operations[number].reads
        return frozenset(found)

    def is_operation(self, number: int, function: Any) -> bool:
        """Say whether an operation calls a function, as it did in the first run."""
        return number < len(self.operations) and self.operations[number].function == function

    def settled(self) -> set[int]:
        """Return the operations whose results are kept, and of the whole batch: no statistic that they need is open."""
        means = {number: norm.mean for number, norm in self.norms()}
        return {number for number in self.kept if all(means[i] is not None for i in self.operations[number].norms)}

    def stand_in(self, number: int, read: Sequence[Tensor]) -> Any:
        """Return what stands for the result of an operation that is left out: it has a shape, and one value."""
        operation = self.operations[number]
        return operation.made if operation.same is None else read[operation.same]

    def without_memory(self, value: Any) -> Any:
        """Return tensors like these that have no memory of their own."""
        if isinstance(value, tuple | list):
            return type(value)([self.without_memory(one) for one in value])
        if not isinstance(value, Tensor):
            return value
        kind = (value.dtype, value.device)
        if kind not in self._scalars:
            self._scalars[kind] = torch.empty((), dtype=value.dtype, device=value.device)
        return self._scalars[kind].expand(value.shape)


# ------------------------------------------------------------------------------------------------------- sweeps


class Enough(Exception):
    """The sweep has what it wants of this part."""


class Sweep(TorchFunctionMode):
    """Run a function on a part: every norm with the statistics of the batch, and draws made for all of it.

    Args:
        calls: what the function computes.
        bounds: the first image of the part, and the one after its last.
        wanted: the operations to run; None is all.
        values: results that are known, by the numbers of their operations.
        moves: running statistics are moved as the function asks for.
    """

    def __init__(
        self,
        calls: Calls,
        bounds: tuple[int, int],
        wanted: frozenset[int] | None = None,
        values: Mapping[int, Tensor] | None = None,
        *,
        moves: bool = False,
    ) -> None:
        super().__init__()
        self.calls, self.bounds, self.wanted, self.values, self.moves = calls, bounds, wanted, values or {}, moves
        self.counted = Counted(self)
        self.number = -1
        """Of the operation at hand."""
        self.reached: dict[int, Callable[[Tensor], Tensor]] = {}
        """What is done with the results of some operations."""
        self.over = False
        """The function has returned; what is called is its backward."""
        self._inside = False
        self._tokens: list[Token] = []

    def __enter__(self) -> Any:
        self._tokens.append(COUNTED.set(self.counted))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        COUNTED.reset(self._tokens.pop())
        if not self._tokens:
            self.counted.within = nullcontext()  # nothing refers to itself, so everything is freed with its last reader

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        again = len(self._tokens) > 1  # a part of the function is computed again in the backward
        if self._inside or name in _OF_SHAPE or (self.over and not again):
            return func(*args, **kwargs)
        read = list(_tensors(args, kwargs))
        if not read:
            return func(*args, **kwargs)
        if name in _NUMBERS:
            self.asked(read)
            return func(*args, **kwargs)
        number, self.counted.next = self.counted.next, self.counted.next + 1
        if self.wanted is not None and not self.calls.is_operation(number, func):
            raise another_way(self.calls.function)
        if number in self.values:
            return self.values[number]
        if self.wanted is not None and number not in self.wanted:
            return self.calls.stand_in(number, read)
        self.number, self._inside = number, True
        try:
            result = self.computed(func, args, kwargs, read)
        finally:
            self._inside = False
        return self.reached[number](result) if number in self.reached and not again else result

    def asked(self, read: Sequence[Tensor]) -> None:
        """Record that Python takes a number from tensors."""

    def computed(self, func: Any, args: Any, kwargs: Any, read: Sequence[Tensor]) -> Any:
        """Return the result of an operation."""
        known = _HANDLED.get(func)
        made = NotImplemented if known is None else known(self, *args, **kwargs)
        return func(*args, **kwargs) if made is NotImplemented else made

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
        norm = self.norm_of(x, (weight, bias, running_mean, running_var))
        dtype = _type_of_statistics(x)
        weight, bias = (value if value is None else value.to(dtype) for value in (weight, bias))
        made = self.normalised(norm, x, weight, bias, eps)
        norm.move(running_mean, running_var, momentum if self.moves else 0.0)
        return made

    def norm_of(self, x: Tensor, of: Sequence[Tensor | None]) -> Norm:
        """Return what is known of the norm at hand, which is called with this input, parameters and statistics."""
        norm = self.calls.made.get(self.number)
        if not isinstance(norm, Norm):
            raise another_way(self.calls.function)
        return norm

    def normalised(self, norm: Norm, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        """Return the output of a norm: by the statistics of the batch, with the backward of the batch."""
        return Given.apply(x, weight, bias, norm, eps)

    # -- draws

    def dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        """Stand for ``torch.nn.functional.dropout``."""
        return self._dropped(x, x.shape, p, training, inplace)

    def feature_dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        """Stand for ``dropout1d``, ``dropout2d`` and ``dropout3d``."""
        if x.dim() < 3 and training and p:
            raise another_way(self.calls.function)
        return self._dropped(x, (*x.shape[:2], *(1 for _ in x.shape[2:])), p, training, inplace)

    def _dropped(self, x: Tensor, shape: Sequence[int], p: float, training: bool, inplace: bool) -> Any:
        if not training or p in (0, 1):
            return NotImplemented
        mask = self.mask(x, shape, 1 - p).to(x.dtype).div_(1 - p)
        return x.mul_(mask) if inplace else x * mask

    def bernoulli(self, x: Tensor, p: float = 0.5, **more: Any) -> Any:
        """Stand for ``torch.Tensor.bernoulli_``, which stochastic depth calls on a value for each image."""
        if more or not isinstance(p, float | int) or len(x) != self.bounds[1] - self.bounds[0]:
            raise another_way(self.calls.function)
        with torch.no_grad():
            return x.copy_(self.mask(x, x.shape, p))

    def mask(self, like: Tensor, shape: Sequence[int], chance: float) -> Tensor:
        """Return what the operation at hand keeps of this part."""
        draw = self.calls.made.get(self.number)
        if not isinstance(draw, Draw):
            raise another_way(self.calls.function)
        return draw.mask[slice(*self.bounds)]


_HANDLED: dict[Any, Callable[..., Any]] = {
    F.batch_norm: Sweep.norm,
    F.dropout: Sweep.dropout,
    F.dropout1d: Sweep.feature_dropout,
    F.dropout2d: Sweep.feature_dropout,
    F.dropout3d: Sweep.feature_dropout,
    torch.Tensor.bernoulli_: Sweep.bernoulli,
}


def another_way(function: str) -> MethodError:
    """Return the error about a function that normalises, or draws, in an unknown way."""
    return MethodError(
        f"{function} cannot take the batch in parts.",
        facts="it normalises by the batch, or draws random numbers, in a way that is not known: known are BatchNorm, "
        "dropout of values and of channels, and stochastic depth of images.",
        help="leave micro_batch out",
    )


def _tensors(*values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(*value)
        elif isinstance(value, dict):
            yield from _tensors(*value.values())


class First(Sweep):
    """Record the operations, what each reads, and the moments of norms that wait for no other."""

    def __init__(self, calls: Calls, bounds: tuple[int, int], devices: tuple[Tensor, ...] | None) -> None:
        super().__init__(calls, bounds)
        self.behind: dict[int, frozenset[int]] = {}
        """Operations that have made or written values, by the storage that holds them."""
        self.everything: frozenset[int] = frozenset()
        """Operations that numbers of Python come from, on which whatever comes next may depend."""
        self.results: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        """Which operation has returned a tensor, by its identity."""
        self.devices = devices
        self.random: list[Tensor] = []
        """States of the generators as they are when only known functions have drawn from them."""

    def __enter__(self) -> Any:
        self.random = self._states()
        return super().__enter__()

    def _states(self) -> list[Tensor]:
        """Return the states of the generators; nothing if tensors have no values."""
        if self.devices is None:
            return []
        return [torch.get_rng_state(), *get_device_states(*self.devices)[1]]

    def mask(self, like: Tensor, shape: Sequence[int], chance: float) -> Tensor:
        """Draw for the whole batch, and return what is kept of this part."""
        self.check_draws()
        self.calls.draw(self.number, like, shape, chance)
        self.random = self._states()
        return super().mask(like, shape, chance)

    def check_draws(self) -> None:
        """Refuse a function that draws in another way than those that are known.

        Raises:
            MethodError: it does.
        """
        if not all(map(torch.equal, self._states(), self.random)):
            raise another_way(self.calls.function)

    def computed(self, func: Any, args: Any, kwargs: Any, read: Sequence[Tensor]) -> Any:
        """Return the result of an operation, and record what it reads, writes and makes."""
        versions = [version_of(value) for value in read]
        known = self.calls.operations
        reads = self.makers(read)
        norms = frozenset().union(*(known[i].norms for i in reads), (i for i in reads if i in self.calls.made))
        operation = Operation(func, reads, frozenset(i for i in norms if isinstance(self.calls.made[i], Norm)))
        known.append(operation)
        if func in (torch.cat, torch.concat):
            operation.operands = tuple(map(self.maker, read))
        result = super().computed(func, args, kwargs, read)
        made = list(_tensors(result))
        written = [value for value, before in zip(read, versions, strict=True) if version_of(value) != before]
        operation.over = self.makers(written) - self.everything
        for value in (*made, *written):
            self._mark(value)
        self.results |= {id(value): (weakref.ref(value), self.number) for value in made}
        operation.passes = any(value.requires_grad for value in made)
        if not made and not written:
            self.calls.always.add(self.number)
            self.everything |= {self.number}
        operation.same = next((i for i, value in enumerate(read) if value is result), None)
        if operation.same is None:
            operation.made = self.calls.without_memory(result)
        return result

    def asked(self, read: Sequence[Tensor]) -> None:
        """Record that Python takes a number from tensors: whatever comes next may depend on it."""
        found = self.makers(read)
        self.calls.always |= found
        self.everything |= found

    def makers(self, values: Iterable[Tensor]) -> frozenset[int]:
        """Return the operations that have made or written values, and those that all depends on."""
        return self.everything.union(*(self.behind.get(id(v.untyped_storage()), frozenset()) for v in values))

    def maker(self, value: Tensor) -> int:
        """Return the operation that has returned this very tensor; -1 if none has."""
        found, number = self.results.get(id(value), (None, -1))
        return number if found is not None and found() is value else -1

    def _mark(self, value: Tensor) -> None:
        storage = value.untyped_storage()
        if id(storage) not in self.behind:
            weakref.finalize(storage, self.behind.pop, id(storage), None)
        self.behind[id(storage)] = self.behind.get(id(storage), frozenset()) | {self.number}

    def norm_of(self, x: Tensor, of: Sequence[Tensor | None]) -> Norm:
        """Add a norm, and what is kept of its input."""
        waits = self.calls.operations[self.number].norms
        levels = [self.calls.made[i].forward for i in waits]  # type: ignore[union-attr]
        norm = Norm(waits, x.requires_grad, 1 + max(levels, default=0), _type_of_statistics(x))
        self.calls.made[self.number] = norm
        names = [self.calls.keep[id(value)] for value in of if id(value) in self.calls.keep]
        if names:
            number = self.maker(x)
            self._keep(number, names[0])
            if number in self.calls.kept and not waits:
                self.calls.kept[number].hold(0, 1, x)
        return norm

    def _keep(self, number: int, norm: str) -> None:
        """Keep what an operation makes; of a concatenation, what it puts together."""
        if number < 0 or number in self.calls.kept:
            return
        operation = self.calls.operations[number]
        if operation.operands:
            for operand in operation.operands:
                self._keep(operand, norm)
        else:
            self.calls.kept[number] = Kept(norm, operation.passes)

    def normalised(self, norm: Norm, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        """Normalise by the part: what comes of it is not used."""
        if not norm.waits_for:
            norm.gather(x)
        return _by_itself(x, weight, bias, eps)


_OF_SHAPE = frozenset({
    "__get__", "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "is_contiguous",
    "is_floating_point", "is_complex", "is_signed", "__len__", "element_size", "get_device", "untyped_storage",
})  # fmt: skip
"""Functions of tensors whose answers do not depend on values."""
_NUMBERS = frozenset({"item", "tolist", "__float__", "__int__", "__bool__", "__index__", "__complex__"})
"""Functions of tensors that return numbers of Python, made of their values."""


def _by_itself(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    ones = torch.ones(x.shape[1], dtype=_type_of_statistics(x), device=x.device)
    return F.batch_norm(x, torch.zeros_like(ones), ones, weight, bias, False, 0.0, eps)


class _OfLevel(Sweep):
    """A sweep that is about the norms of one level."""

    def __init__(
        self,
        calls: Calls,
        bounds: tuple[int, int],
        wanted: frozenset[int],
        values: Mapping[int, Tensor],
        level: Sequence[int],
    ) -> None:
        super().__init__(calls, bounds, wanted, values)
        self.level = frozenset(level)


class Forward(_OfLevel):
    """Gather the moments of some norms; end after the last of them."""

    def normalised(self, norm: Norm, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        """Gather the moments of a norm of the level: what it returns is read by none of the others."""
        if self.number in self.level:
            norm.gather(x)
            if self.number == max(self.level):
                raise Enough
            return self.calls.stand_in(self.number, [x])
        return F.batch_norm(x, norm.mean, norm.var, weight, bias, False, 0.0, eps)


class Backward(_OfLevel):
    """Run with gradient from the first norm of a level on, and only to the norms of that level."""

    def __init__(
        self,
        calls: Calls,
        bounds: tuple[int, int],
        wanted: frozenset[int],
        values: Mapping[int, Tensor],
        level: Sequence[int],
    ) -> None:
        super().__init__(calls, bounds, wanted, values, level)
        self.probes: dict[int, tuple[Tensor, Tensor]] = {}

    def normalised(self, norm: Norm, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        """Give a norm of the level a weight and a bias of its own, whose gradients are its sums."""
        assert norm.mean is not None
        weight, bias = (None if value is None else value.detach() for value in (weight, bias))
        if self.number == min(self.level):
            torch.set_grad_enabled(True)
        if self.number in self.level:
            if self.number not in self.probes:  # or it is computed again
                ones = torch.ones_like(norm.mean)
                self.probes[self.number] = (
                    (ones if weight is None else weight.clone()).requires_grad_(),
                    (torch.zeros_like(ones) if bias is None else bias.clone()).requires_grad_(),
                )
            return Given.apply(x.detach(), *self.probes[self.number], norm, eps)
        exact = norm.sums is not None
        return Given.apply(x if exact else x.detach(), weight, bias, norm, eps)
