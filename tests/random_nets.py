"""Random networks: what they compute is drawn as data, a :class:`Net`, from which a module is built.

A net is a list of steps. Each reads values that were made before (0 is what enters) and makes one or two new ones; the
head reads all values that nothing else has read. The module's forward is ordinary Python: it calls its submodules, and
functions, in the order of the steps. A failing example prints as the text that makes it again::

    Net((Step("conv", (0,), 4), Step("relu_", (1,)))).build()
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

Shape = tuple[int, ...]

IMAGE = (3, 8, 8)
CLASSES = 5
WIDEST = 32
"""Concatenations have at most so many channels."""


@dataclass(frozen=True, repr=False)
class Step:
    """One operation: its kind, a key of :data:`PARTS` or :data:`FUNCTIONS` or one of those beside them."""

    kind: str
    reads: tuple[int, ...] = (0,)
    size: int = 0
    """Number of output channels, where it changes."""
    like: int = -1
    """Number of the step whose module is called ``again``, or has the same weight (``tied``, ``borrowed``)."""
    inner: tuple[Step, ...] = ()
    """Steps of a ``block``."""
    frozen: bool = False

    def __repr__(self) -> str:
        given = [f for f in dataclasses.fields(self)[2:] if getattr(self, f.name) != f.default]
        more = [f", {field.name}={getattr(self, field.name)!r}" for field in given]
        return f"Step({self.kind!r}, {self.reads}{''.join(more)})"


@dataclass(frozen=True, repr=False)
class Net:
    """Steps from images (N, 3, 8, 8) to the values that the classifier reads, each averaged over its places."""

    steps: tuple[Step, ...]

    def __repr__(self) -> str:
        return f"Net({self.steps!r})"

    def build(self) -> Classifier:
        """Return a module of this net, always with the same weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Classifier(self.steps)

    @property
    def trains(self) -> bool:
        """Tell whether the plain training step of the net runs: autograd refuses some writes in place."""
        model = self.build()
        try:
            with torch.random.fork_rng(devices=[]):
                for mode in (True, True, False):
                    F.cross_entropy(model.train(mode)(torch.randn(3, *IMAGE)), torch.tensor([0, 1, 2])).backward()
        except RuntimeError as error:
            if "in-place" in str(error) or "inplace" in str(error):
                return False
            raise
        return all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


# -------------------------------------------------------------------------------------------------------------- modules


class DropPath(nn.Module):
    """Leave out whole images in training."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(0.8)
        return x * kept.div_(0.8)


class Attention(nn.Module):
    """Self-attention of two heads over tokens (N, T, C), with dropout in training."""

    def __init__(self, width: int, _: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0.0)
        return self.out(h.transpose(1, 2).reshape(n, t, c))


class Gate(nn.Module):
    """Add to a map, in place, what a layer makes of its mean."""

    def __init__(self, width: int, _: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x.add_(self.fc(x.mean((2, 3)))[:, :, None, None])


class Folded(nn.Module):
    """A convolution of the halves of the channels, each as an image of its own: (2 N, C / 2, H, W)."""

    def __init__(self, width: int, _: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width // 2, width // 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return self.conv(x.reshape(n * 2, c // 2, h, w)).relu().view(n, c, h, w)


class Parts(nn.Module):
    """Two layers on the halves of the channels, each as tokens of its own: (2 N, T, C / 2)."""

    def __init__(self, width: int, _: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width // 2, width // 2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        x = x.reshape(n, t, 2, c // 2).transpose(1, 2).reshape(2 * n, t, c // 2)
        for layer in self.layers:
            x = layer(x).relu()
        return x.unflatten(0, (n, 2)).transpose(1, 2).reshape(n, t, c)


class Standardised(nn.Module):
    """A convolution whose weight is normalised in every forward."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, width, 3, 3))
        self.gain = nn.Parameter(torch.ones(size, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        x = x.relu()
        return F.conv2d(x, weight * self.gain / 3, padding=1)


class Token(nn.Module):
    """Put a token before the others."""

    def __init__(self, width: int, _: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.linspace(-1, 1, width).reshape(1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)


class Centred(nn.Module):
    """Subtract a running mean that training writes in place, by turns with or without gradients switched off."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.switched = bool(size % 2)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.set_grad_enabled(False) if self.switched else torch.enable_grad():
                self.mean.mul_(0.9).add_(0.1 * _by_channel(x if self.switched else x.detach()))
                self.calls += 1
        return x - _like_channels(self.mean, x)


class Written(nn.Module):
    """Normalise by the batch in training, and by what was written then in eval mode."""

    def __init__(self, width: int, _: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        mean = _by_channel(x)
        if self.training:
            self.mean.copy_(mean.detach())
        else:
            mean = self.mean
        return x - _like_channels(mean, x)


class Scaled(nn.Module):
    """A factor for each channel."""

    def __init__(self, width: int, _: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, x: Tensor) -> Tensor:
        return x * _like_channels(self.weight, x)


class Offset(nn.Module):
    """A constant for each channel."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.register_buffer("offset", torch.linspace(-0.1, 0.1, width), persistent=bool(size % 2))

    def forward(self, x: Tensor) -> Tensor:
        return x + _like_channels(self.offset, x)


class Recurrent(nn.Module):
    """A recurrent layer over tokens, from a first state that is made for the size of the batch."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.gru = nn.GRU(width, size, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.gru(x, torch.zeros(1, x.shape[0], self.gru.hidden_size))
        return h


def _channel_axis(x: Tensor) -> int:
    return 2 if x.dim() == 3 else 1


def _by_channel(x: Tensor) -> Tensor:
    """Return the mean of every channel."""
    return x.mean([axis for axis in range(x.dim()) if axis != _channel_axis(x)])


def _like_channels(vector: Tensor, x: Tensor) -> Tensor:
    """Return a vector (C,) in a shape that goes with ``x``."""
    return vector.view(-1, 1, 1) if x.dim() == 4 else vector


def _conv_bn_relu(width: int, size: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(width, size, 3, padding=1, bias=False), nn.BatchNorm2d(size), nn.ReLU(inplace=True))


MAP, TOKENS, FLAT = 3, 2, 1
"""Number of dimensions of a value, without the batch."""

WEIGHTS: dict[str, tuple[int, Callable[[int, int], nn.Module]]] = {
    "conv": (MAP, lambda width, size: nn.Conv2d(width, size, 3, padding=1)),
    "conv_stride": (MAP, lambda width, size: nn.Conv2d(width, size, 3, 2, 1)),
    "conv1x1": (MAP, lambda width, size: nn.Conv2d(width, size, 1, bias=False)),
    "conv_bn_relu": (MAP, _conv_bn_relu),
    "standardised": (MAP, Standardised),
    "depthwise": (MAP, lambda width, _: nn.Conv2d(width, width, 3, padding=1, groups=width)),
    "gate": (MAP, Gate),
    "folded": (MAP, Folded),
    "linear": (TOKENS, nn.Linear),
    "attention": (TOKENS, Attention),
    "recurrent": (TOKENS, Recurrent),
    "parts": (TOKENS, Parts),
    "fc": (FLAT, nn.Linear),
    "fc_bn": (FLAT, lambda width, size: nn.Sequential(nn.Linear(width, size, bias=False), nn.BatchNorm1d(size))),
}
"""Layers with weights: the layout they read, and what makes them from the numbers of channels before and behind."""

KEEPS_WIDTH = ("depthwise", "gate", "folded", "attention", "parts")
TIED = ("conv", "conv1x1", "linear", "fc")
"""Kinds whose weight other steps use."""

PARTS: dict[str, tuple[tuple[int, ...], Callable[[int, int], nn.Module]]] = {
    "ReLU": ((MAP, TOKENS, FLAT), lambda *_: nn.ReLU()),
    "ReLU(inplace)": ((MAP, TOKENS, FLAT), lambda *_: nn.ReLU(inplace=True)),
    "GELU": ((MAP, TOKENS, FLAT), lambda *_: nn.GELU()),
    "PReLU": ((MAP, FLAT), lambda width, _: nn.PReLU(width)),
    "BatchNorm2d": ((MAP,), lambda width, _: nn.BatchNorm2d(width)),
    "GroupNorm": ((MAP,), lambda width, _: nn.GroupNorm(2, width)),
    "BatchNorm1d": ((FLAT,), lambda width, _: nn.BatchNorm1d(width)),
    "LayerNorm": ((TOKENS, FLAT), lambda width, _: nn.LayerNorm(width)),
    "Dropout": ((MAP, TOKENS, FLAT), lambda *_: nn.Dropout(0.3)),
    "Dropout(inplace)": ((MAP, TOKENS, FLAT), lambda *_: nn.Dropout(0.3, inplace=True)),
    "Dropout2d": ((MAP,), lambda *_: nn.Dropout2d(0.3)),
    "drop_path": ((MAP, TOKENS, FLAT), lambda *_: DropPath()),
    "token": ((TOKENS,), Token),
    "scaled": ((MAP, TOKENS, FLAT), Scaled),
    "offset": ((MAP, TOKENS, FLAT), Offset),
    "centred": ((MAP, TOKENS, FLAT), Centred),
    "written": ((MAP, TOKENS, FLAT), Written),
}
"""Other modules: the layouts they read, and what makes them."""

VARIANTS = ("offset", "centred")
"""Kinds of which an odd size makes another variant."""
MODULES = {*WEIGHTS, *PARTS, "block"}
FROZEN = (*(False,) * 7, True)


def _shuffled(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


FUNCTIONS: dict[str, tuple[tuple[int, ...], Callable[[Tensor, bool], Tensor]]] = {
    "relu": ((MAP, TOKENS, FLAT), lambda x, _: torch.relu(x)),
    "relu_": ((MAP, TOKENS, FLAT), lambda x, _: x.relu_()),
    "F.relu(inplace)": ((MAP, TOKENS, FLAT), lambda x, _: F.relu(x, inplace=True)),
    "silu_": ((MAP, TOKENS, FLAT), lambda x, _: F.silu(x, inplace=True)),
    "gelu": ((MAP, TOKENS, FLAT), lambda x, _: F.gelu(x)),
    "tanh": ((MAP, TOKENS, FLAT), lambda x, _: x.tanh()),
    "dropout": ((MAP, TOKENS, FLAT), lambda x, training: F.dropout(x, 0.2, training)),
    "noise": ((MAP, TOKENS, FLAT), lambda x, training: x + 0.1 * torch.randn_like(x) if training else x),
    "by_batch": ((MAP, TOKENS, FLAT), lambda x, _: x + torch.ones(x.shape[0], *(1,) * (x.dim() - 1)) / x.shape[0]),
    "less_mean": ((MAP, TOKENS, FLAT), lambda x, _: x - x.mean(0, keepdim=True)),
    "first_half": ((MAP, TOKENS, FLAT), lambda x, _: _halved(x)),
    "shuffled": ((MAP,), lambda x, _: _shuffled(x)),
    "rolled": ((MAP,), lambda x, _: torch.roll(x, 1, 2)),
    "max_pool": ((MAP,), lambda x, _: F.max_pool2d(x, 2)),
    "avg_pool": ((MAP,), lambda x, _: F.avg_pool2d(x, 2)),
    "to_tokens": ((MAP,), lambda x, _: x.flatten(2).transpose(1, 2)),
    "to_flat": ((MAP, TOKENS), lambda x, _: x.flatten(2).mean(2) if x.dim() == 4 else x[:, 0]),
}
"""Functions of a value and the mode: the layouts they read."""


ACTIVATIONS = ("relu", "ReLU", "ReLU(inplace)", "F.relu(inplace)", "relu_", "GELU")


def _halved(x: Tensor) -> Tensor:
    """Overwrite the first half of the channels of a copy, through a slice."""
    x = x + 0
    half = x.shape[_channel_axis(x)] // 2
    if _channel_axis(x) == 1:
        x[:, :half] = 0.5 * x[:, :half]
    else:
        x[..., :half].mul_(0.5)
    return x


JOINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda a, b: a + b,
    "add_": lambda a, b: a.add_(b),
    "mul": lambda a, b: a * b.sigmoid(),
}
"""Functions of two values of one shape."""


class Steps(nn.Module):
    """A module that runs steps, and returns the values that no step has read."""

    def __init__(self, steps: Sequence[Step], entering: Shape) -> None:
        super().__init__()
        self.steps, self.shapes = tuple(steps), [entering]
        self.parts = nn.ModuleDict()
        for number, step in enumerate(self.steps):
            part = self._part(step)
            if part is not None and step.kind != "again":
                self.parts[f"part{number}"] = part.requires_grad_(not step.frozen)
            self.shapes += shapes_behind(step, self.shapes, self.steps)
        self.left = unread(self.steps, len(self.shapes))

    def _part(self, step: Step) -> nn.Module | None:
        shape = self.shapes[step.reads[0]]
        if step.kind == "block":
            return Steps(step.inner, shape)
        if step.kind == "tied":
            part = self._made(self.steps[step.like], shape)
            part.weight = self.parts[f"part{step.like}"].weight
            return part
        return self._made(step, shape)

    def _made(self, step: Step, shape: Shape) -> nn.Module | None:
        entry = WEIGHTS.get(step.kind) or PARTS.get(step.kind)
        return entry[1](width_of(shape), step.size) if entry else None

    def forward(self, x: Tensor) -> Any:
        values = [x]
        for number, step in enumerate(self.steps):
            result = self._run(number, step, [values[i] for i in step.reads])
            values += result if isinstance(result, tuple) else (result,)
        left = [values[i] for i in self.left]
        return left[0] if len(left) == 1 else tuple(left)

    def _run(self, number: int, step: Step, read: list[Tensor]) -> Any:
        if step.kind == "again":
            return self.parts[f"part{step.like}"](*read)
        if f"part{number}" in self.parts:
            return self.parts[f"part{number}"](*read)
        if step.kind == "borrowed":
            borrowed = self.parts[f"part{step.like}"].weight
            return F.conv2d(*read, borrowed, padding="same") if read[0].dim() == 4 else F.linear(*read, borrowed)
        if step.kind == "cat":
            return torch.cat(read, _channel_axis(read[0]))
        if step.kind == "chunk":
            return tuple(read[0].chunk(2, _channel_axis(read[0])))
        if step.kind == "+=":
            read[0] += read[1]
            return read[0]
        if step.kind in JOINS:
            return JOINS[step.kind](*read)
        return FUNCTIONS[step.kind][1](read[0], self.training)


class Classifier(nn.Module):
    """Steps, and one linear layer on the mean over the places of all that they leave."""

    def __init__(self, steps: Sequence[Step]) -> None:
        super().__init__()
        self.body = Steps(steps, IMAGE)
        self.fc = nn.Linear(sum(width_of(self.body.shapes[i]) for i in self.body.left), CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        left = self.body(x)
        pooled = [_pooled(value) for value in (left if isinstance(left, tuple) else (left,))]
        return self.fc(torch.cat(pooled, 1) if len(pooled) > 1 else pooled[0])


def _pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3)) if x.dim() == 4 else x.mean(1) if x.dim() == 3 else x


# --------------------------------------------------------------------------------------------------------------- shapes


def width_of(shape: Shape) -> int:
    """Return the number of channels of a shape without the batch: (C, H, W), (T, C) or (F,)."""
    return shape[1] if len(shape) == TOKENS else shape[0]


def _with_width(shape: Shape, width: int) -> Shape:
    return (shape[0], width) if len(shape) == TOKENS else (width, *shape[1:])


def unread(steps: Sequence[Step], count: int) -> list[int]:
    """Return the values among ``count`` that no step reads."""
    read = {i for step in steps for i in step.reads}
    return [i for i in range(count) if i not in read]


def shapes_behind(step: Step, shapes: Sequence[Shape], steps: Sequence[Step]) -> list[Shape]:
    """Return the shapes of what a step makes, without the batch."""
    shape, kind = shapes[step.reads[0]], step.kind
    if kind == "block":
        inner = [shape]
        for one in step.inner:
            inner += shapes_behind(one, inner, step.inner)
        return [inner[i] for i in unread(step.inner, len(inner))]
    if kind in ("again", "tied", "borrowed"):
        step = steps[step.like]
        if step.kind == "block":
            return shapes_behind(replace(step, reads=(0,)), [shape], steps)
    if kind == "cat":
        return [_with_width(shape, sum(width_of(shapes[i]) for i in step.reads))]
    if kind == "chunk":
        return [_with_width(shape, width_of(shape) // 2)] * 2
    if step.kind in WEIGHTS and step.size:
        shape = _with_width(shape, step.size)
    if step.kind in ("conv_stride", "max_pool", "avg_pool"):
        return [(shape[0], *((n + 1) // 2 if step.kind == "conv_stride" else n // 2 for n in shape[1:]))]
    if step.kind == "token":
        return [(shape[0] + 1, shape[1])]
    if kind == "to_tokens":
        return [(shape[1] * shape[2], shape[0])]
    if kind == "to_flat":
        return [(width_of(shape),)]
    return [shape]


# ----------------------------------------------------------------------------------------------------------- strategies

STEMS = {
    "conv": (Step("conv", (0,), 4),),
    "conv_bn_relu": (Step("conv_bn_relu", (0,), 8),),
    "tokens": (Step("conv_stride", (0,), 6), Step("to_tokens", (1,))),
    "flat": (Step("conv_stride", (0,), 8), Step("to_flat", (1,))),
    "streams": (Step("conv", (0,), 8), Step("conv_stride", (0,), 4)),
}


@st.composite
def nets(draw: st.DrawFn, most: int = 10) -> Net:
    """Draw a net of 4 operations or more behind the first layer; autograd may refuse its writes in place."""
    stem = STEMS[draw(st.sampled_from(sorted(STEMS)))]
    return Net(draw(_behind(stem, IMAGE, st.integers(4, most))))


@st.composite
def _behind(draw: st.DrawFn, first: tuple[Step, ...], entering: Shape, count: st.SearchStrategy[int]) -> Any:
    """Draw steps behind the ``first``, or, if there are none, those of a block."""
    steps, shapes = list(first), [entering]
    for step in first:
        shapes += shapes_behind(step, shapes, steps)
    wanted = len(steps) + draw(count)
    while len(steps) < wanted:
        step = draw(_step(tuple(steps), tuple(shapes), inside=not first))
        made = shapes_behind(step, shapes, steps)
        repeated = step.kind == "block" and made == [shapes[step.reads[0]]] and draw(st.booleans())
        for _ in range(1 + repeated):
            steps.append(step)
            shapes += made
            step = replace(step, reads=(len(shapes) - 1,))
        if step.kind in WEIGHTS and draw(st.booleans()):
            steps.append(Step(draw(st.sampled_from(ACTIVATIONS)), (len(shapes) - 1,)))
            shapes.append(shapes[-1])
    if not first and shapes[-1] == entering and draw(st.booleans()):
        steps.append(Step("add", (len(shapes) - 1, 0)))
    return tuple(steps)


@st.composite
def _step(draw: st.DrawFn, steps: tuple[Step, ...], shapes: tuple[Shape, ...], *, inside: bool) -> Step:
    """Draw one further step. It most often reads what nothing has read yet; only the stem reads the images."""
    values = range(0 if inside else 1, len(shapes))
    left = [i for i in unread(steps, len(shapes)) if i in values]
    read = draw(st.sampled_from([*reversed(left), *left, *reversed(values)]))
    possible = _possible(read, values, steps, shapes, many=len(left) > 3)
    if not inside:
        possible["block"] = [Step("block", (read,))]
    joins = [kind for kind in ("join", "cat") if possible[kind]]
    often = joins if len(left) > 3 and joins else [*("weights", "plain", "tied") * 2, *joins, "chunk", "again", "block"]
    found = possible[draw(st.sampled_from([kind for kind in often if possible.get(kind)]))]
    step = draw(st.sampled_from(found))
    if step.kind == "block":
        return replace(step, inner=draw(_behind((), shapes[read], st.integers(1, 4))))
    sized = step.kind in WEIGHTS and step.kind not in KEEPS_WIDTH
    size = draw(st.sampled_from((8, 4, 6))) if sized else draw(st.integers(0, 1)) if step.kind in VARIANTS else 0
    return replace(step, size=size, frozen=step.kind in WEIGHTS and draw(st.sampled_from(FROZEN)))


def _possible(
    read: int, values: Sequence[int], steps: Sequence[Step], shapes: Sequence[Shape], *, many: bool
) -> dict[str, list[Step]]:
    """Return the steps that a value can be read by, by what they do."""
    shape = shapes[read]
    width, even = width_of(shape), width_of(shape) % 2 == 0
    weights = [kind for kind, (layout, _) in WEIGHTS.items() if layout == len(shape)]
    plain = [kind for kind, (layouts, _) in (PARTS | FUNCTIONS).items() if len(shape) in layouts]
    odd = () if even else ("folded", "attention", "parts", "GroupNorm", "shuffled")
    small = () if min(shape) > 1 else ("max_pool", "avg_pool", "BatchNorm1d")
    same = [i for i in values if shapes[i] == shape and i != read]
    beside = [i for i in values if i != read and _with_width(shapes[i], width) == shape]
    beside = [i for i in beside if width + width_of(shapes[i]) <= WIDEST]
    alike = [i for i, step in enumerate(steps) if shapes[step.reads[0]] == shape]
    return {
        "weights": [Step(kind, (read,)) for kind in weights if kind not in odd],
        "plain": [Step(kind, (read,)) for kind in plain if kind not in (*odd, *small)],
        "join": [Step(kind, (read, other)) for other in reversed(same) for kind in ("add", "add_", "+=", "mul")],
        "cat": [Step("cat", (other, read)) for other in reversed(beside)] + _all_of(beside, read, shapes),
        "chunk": [Step("chunk", (read,))] if even and width >= 4 and not many else [],
        "again": [Step("again", (read,), like=i) for i in alike if steps[i].kind in MODULES],
        "tied": [Step(kind, (read,), like=i) for i in alike for kind in ("tied", "borrowed") if steps[i].kind in TIED],
    }


def _all_of(beside: Sequence[int], read: int, shapes: Sequence[Shape]) -> list[Step]:
    """Return the concatenation of all earlier values, as in DenseNet."""
    reads = (*beside, read)
    wide = sum(width_of(shapes[i]) for i in reads)
    return [Step("cat", reads)] if len(beside) > 1 and wide <= WIDEST else []
