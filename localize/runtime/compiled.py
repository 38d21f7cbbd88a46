"""Run the generated text with every segment's training step compiled: one graph of forward, loss and backward.

Each function of the text that trains (``step_0``, ``step_1``, ...) is recorded as one graph
(:mod:`localize.runtime.capture`) and compiled by Inductor, without guards and without autograd. Equal graphs are
compiled once. The rest of the text, and the optimizer, run as they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from localize.runtime.capture import Call, Capture, CaptureError, Place, State, capture, draws, forms
from localize.runtime.model import LocalModel, autocast_dtype, load
from localize.torch_names import compile_graph, pytree

OPTIONS = {"fallback_random": True}
"""Of Inductor: random numbers are those that the text draws when it is not compiled."""
FORMS = {"cpu": torch.channels_last}
"""By kind of device, the memory format that Inductor computes convolutions in, whatever that of its inputs. Recorded in
another one, a graph would convert what enters and leaves every backward of a convolution."""


@dataclass(frozen=True)
class Compiled:
    """What became of one function of the text."""

    name: str
    signature: str = ""
    """Equal for functions that share a compiled graph; empty where the function runs as it is."""
    reason: str = ""
    """Why it runs as it is."""


class CompiledModel(LocalModel):
    """A local model over the modules of another, whose segments train compiled; made by :func:`localize.compile`.

    The first :meth:`step` compiles, for the sizes, modes and types that it sees. A step on others (a smaller last
    batch, say) runs the text as it is. Hooks, and attributes of modules that are neither parameters nor buffers, count
    as they were in the first step. :func:`localize.audit` audits the text.
    """

    def __init__(self, local: LocalModel, tell: Callable[[Compiled], None] = lambda function: None) -> None:
        super().__init__(local.trunk, local.heads, local.plan, local.program, local.source, local.filename)
        self.training = local.training
        self._tell = tell
        self._prepare()

    def _prepare(self) -> None:
        """Load the text a second time, with functions that compile themselves in the place of those that train."""
        self.functions: list[Compiled] = []
        self.compile_seconds = 0.0
        self._graphs: dict[str, Callable[..., Any]] = {}
        self._state: State | None = None
        self._conditions: tuple[Any, ...] | None = None
        self._fast = load(self.source, self.filename, partial(_Function, self))

    @property
    def graphs(self) -> int:
        """Number of graphs that were compiled: of distinct segments."""
        return len(self._graphs)

    def _functions_for(self, inputs: tuple[Tensor, ...], y: Tensor) -> dict[str, Callable[..., Any]]:
        conditions = (*forms((*inputs, y)), *self._conditions_now())
        if self._conditions is None:
            self._conditions = conditions
        return self._fast if conditions == self._conditions else self.functions_of_text

    def _conditions_now(self) -> tuple[Any, ...]:
        """Return what graphs depend on beside the batch and values: modes of modules, forms of parameters, autocast."""
        autocast = autocast_dtype(next(self.parameters()).device.type)
        modes = [module.training for module in self.modules()]
        return autocast, modes, [(p.requires_grad, p.dtype, p.device, p.stride()) for p in self.parameters()]

    def _compile(self, name: str, function: Callable[..., Any], values: Sequence[Any]) -> _Graph | None:
        """Record and compile a function of the text, or note why it runs as it is."""
        started = time.perf_counter()
        graph = None
        try:
            graph, signature = self._graph(function, values)
            told = Compiled(name, signature)
        except CaptureError as error:
            told = Compiled(name, reason=str(error))
        self.compile_seconds += time.perf_counter() - started
        self.functions.append(told)
        self._tell(told)
        return graph

    def _graph(self, function: Callable[..., Any], values: Sequence[Any]) -> tuple[_Graph, str]:
        if self.plan.exact:
            raise CaptureError("with the BatchNorm of the whole batch, parts of it are swept several times.")
        self._state = self._state or State(self.trunk, self.heads)
        form = FORMS.get(next(self.parameters()).device.type, torch.preserve_format)
        recorded = capture(function, (self.trunk, self.heads), values, self._state, form)
        if self.plan.recompute and draws(recorded.graph):
            raise CaptureError("it draws random numbers, and would draw others when it computes again.")
        signature = recorded.signature
        if signature not in self._graphs:
            inputs = [*_at(recorded.places), *_chosen(values, recorded)]
            try:
                with torch.no_grad(), _no_autocast(inputs):
                    self._graphs[signature] = compile_graph(recorded.graph, inputs, OPTIONS)
            except Exception as error:  # no C++ compiler, or an operation that Inductor does not know
                raise CaptureError(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}") from error
        return _Graph(recorded, self._graphs[signature]), signature

    def __getstate__(self) -> dict[str, Any]:
        own = ("functions", "compile_seconds", "_tell", "_graphs", "_state", "_conditions", "_fast")
        return {key: value for key, value in super().__getstate__().items() if key not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._tell = lambda function: None
        self._prepare()

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledModel:
        return CompiledModel(super().__deepcopy__(memo))


def compile(local: LocalModel, *, tell: Callable[[Compiled], None] = lambda function: None) -> CompiledModel:
    """Return a local model over the same modules whose segments train compiled.

    Forward, loss and backward of a segment become one graph, in the first step. That needs a C++ compiler (on CUDA:
    Triton) and seconds for each distinct segment; Inductor keeps the results on disk for later runs (in
    ``TORCHINDUCTOR_CACHE_DIR``). Numbers are those of the plain step up to rounding. On a CPU convolutions run in
    channels_last, whatever the memory format of weights and images. A segment that cannot be recorded runs as it is;
    ``functions`` of the result says which, and why.

    Args:
        local: is left as it was; its parameters are those of the result.
        tell: is called with every function of the text when it is compiled, or found not to be.

    Example:
        >>> local = localize.compile(localize.transform(model, "dcl", example_input=x))
        >>> optimizer = torch.optim.SGD(local.param_groups(lr=0.1), lr=0.1)
        >>> result = local.step(x, y, optimizer)
    """
    return CompiledModel(local, tell)


class _Function:
    """A function of the text that compiles itself when it is first called."""

    def __init__(self, local: CompiledModel, name: str, function: Callable[..., Any]) -> None:
        self.local, self.name, self.function = local, name, function
        self.forms: tuple[Any, ...] | None = None
        self.graph: _Graph | None = None

    def __call__(self, trunk: Any, heads: Any, *values: Any) -> Any:
        found = forms(values)
        if self.forms is None:
            self.forms = found
            self.graph = self.local._compile(self.name, self.function, values)
        if self.graph is None or found != self.forms:
            return self.function(trunk, heads, *values)
        return self.graph(values)


@dataclass(frozen=True)
class _Graph:
    """A compiled function and what it was recorded from."""

    recorded: Capture
    run: Callable[..., Sequence[Any]]

    def __call__(self, values: Sequence[Any]) -> Any:
        recorded = self.recorded
        _ask(values[-1], recorded.before)
        inputs = [*_at(recorded.places), *_chosen(values, recorded)]
        with torch.no_grad(), _no_autocast(inputs):
            made = self.run(*inputs)
            count = recorded.results.num_leaves
            for (kept, name), gradient in zip(recorded.trained, made[count:], strict=True):
                parameter = kept[name]
                if parameter.grad is None:
                    parameter.grad = gradient
                else:
                    parameter.grad += gradient
        _ask(values[-1], recorded.after)
        return pytree.tree_unflatten(made[:count], recorded.results)


def _no_autocast(tensors: Sequence[Tensor]) -> AbstractContextManager[Any]:
    """Let operations take their inputs as they are: a graph holds the casts of the text already."""
    return torch.autocast(tensors[0].device.type, enabled=False)


def _ask(optimizer: Any, calls: Sequence[Call]) -> None:
    """Ask of the optimizer what the text asks of it."""
    for loss, call in calls:
        getattr(optimizer if loss is None else optimizer[loss], call)()


def _at(places: Sequence[Place]) -> list[Tensor]:
    """Return the tensors that are in these places now."""
    return [kept[name] for kept, name in places]


def _chosen(values: Sequence[Any], recorded: Capture) -> list[Tensor]:
    """Return the tensors among a function's arguments that its graph takes, and the scale of the losses, if it does."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    chosen = [tensors[i] for i in recorded.arguments]
    if recorded.scales:
        chosen.append(values[-1].scale(torch.ones((), device=tensors[0].device)))
    return chosen
