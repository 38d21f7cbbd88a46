"""Record a function of the generated text as one graph of tensor operations: forward, losses and backward together.

The function runs once on fake tensors (:class:`torch._subclasses.fake_tensor.FakeTensorMode`) with its backward, below
autograd, so the graph has no history, no modules and no Python: parameters, buffers and the batch go in; what the
function returns and the gradients come out; running statistics are moved in place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx

from localize.torch_names import fake_mode, is_fake, own_buffers, own_parameters, pytree

Place = tuple[dict[str, Any], str]
"""Where a module keeps a tensor: its ``_parameters`` or ``_buffers``, and the name there."""
Call = tuple[int | None, str]
"""What the text asks of the optimizer: for which loss (None: for all), and the name of the method."""


class CaptureError(RuntimeError):
    """The function is no fixed graph of operations; the message says why."""


@dataclass(frozen=True)
class Capture:
    """One function of the generated text as a graph."""

    graph: fx.GraphModule
    """Takes the tensors at ``places``, then the tensor arguments ``arguments``, then the scale of the losses if it
    ``scales`` them; returns a list: results, gradients."""
    places: tuple[Place, ...]
    arguments: tuple[int, ...]
    """Which of the function's tensor arguments the graph takes."""
    scales: bool
    """Whether it takes, after them, the scale that the optimizer multiplies a loss by."""
    results: pytree.TreeSpec
    """How the function's results are put together."""
    trained: tuple[Place, ...]
    """The parameters whose gradients the graph returns after the results."""
    before: tuple[Call, ...]
    """What the text asks of the optimizer before it computes."""
    after: tuple[Call, ...]
    """And after it."""

    @property
    def signature(self) -> str:
        """A digest of the graph: two captures have the same if the same compiled code serves both."""
        return _signature(self.graph)


class State:
    """Parameters and buffers of a model with heads, each once, and fake tensors for them."""

    def __init__(self, *roots: nn.Module, mode: Any = None) -> None:
        self.mode = mode or fake_mode()
        self.places: dict[int, tuple[Tensor, list[Place]]] = {}
        self._leaves: list[Tensor] = []
        for root in roots:
            for module in root.modules():
                for kept in (own_parameters(module), own_buffers(module)):
                    for name, tensor in kept.items():
                        if tensor is not None:
                            self.places.setdefault(id(tensor), (tensor, []))[1].append((kept, name))

    def fake(self, tensor: Tensor) -> Tensor:
        """Return a tensor without values for one with values, always the same; or itself, if it has none."""
        return tensor if is_fake(tensor) else self.mode.from_tensor(tensor, static_shapes=True)

    def leaves(self) -> list[Tensor]:
        """Return tensors without values, for parameters and buffers: always the same ones."""
        if not self._leaves:
            for tensor, _ in self.places.values():
                made = self.fake(tensor).detach()
                self._leaves.append(made.requires_grad_(tensor.requires_grad))
        return self._leaves

    @contextmanager
    def replaced(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Put other tensors in the places, in the order of ``self.places``."""
        try:
            for tensor, (_, places) in zip(tensors, self.places.values(), strict=True):
                for kept, name in places:
                    kept[name] = tensor
            yield
        finally:
            for original, places in self.places.values():
                for kept, name in places:
                    kept[name] = original


def capture(
    function: Callable[..., Any],
    roots: Sequence[nn.Module],
    values: Sequence[Any],
    state: State,
    form: torch.memory_format = torch.preserve_format,
) -> Capture:
    """Record ``function(*roots, *values)``.

    Args:
        function: of the generated text; it runs forward and backward, and asks an optimizer for updates at its
            beginning or at its end.
        roots: the model and its heads. They are left as they were.
        values: tensors and numbers; in the place of the optimizer is anything else.
        state: the tensors of ``roots``.
        form: memory format in which the graph computes with parameters and arguments of four dimensions.

    Raises:
        CaptureError: the function is no fixed graph of operations.
    """
    leaves = state.leaves()
    tensors = [value for value in values if isinstance(value, Tensor)]
    factor = torch.ones((), device=tensors[0].device)
    calls = _Calls()
    spec: list[pytree.TreeSpec] = []
    trained: list[int] = []

    def flat(*inputs: Tensor) -> list[Tensor]:
        held = inputs[: len(leaves)]
        given = iter([_formed(tensor, form) for tensor in inputs[len(leaves) : -1]])
        calls.factor = inputs[-1]
        arguments = [
            next(given) if isinstance(value, Tensor) else value if isinstance(value, int | float) else calls
            for value in values
        ]
        with torch.enable_grad():
            placed = [
                _formed(tensor, form) if isinstance(original, nn.Parameter) else tensor
                for tensor, (original, _) in zip(held, state.places.values(), strict=True)
            ]
            with state.replaced(placed):
                returned = function(*roots, *arguments)
        results, found = pytree.tree_flatten(returned)
        spec.append(found)
        if any(isinstance(result, Tensor) and result.requires_grad for result in results):
            raise CaptureError("what it returns is differentiated elsewhere.")
        trained.extend(i for i, tensor in enumerate(held) if tensor.grad is not None)
        return [*results, *(held[i].grad for i in trained)]

    if any(tensor.requires_grad for tensor in tensors):
        raise CaptureError("it takes values that carry a history.")
    try:
        graph = make_fx(flat)(*leaves, *map(state.fake, (*tensors, factor)))
    except CaptureError:
        raise
    except Exception as error:  # whatever the user's modules do that needs values
        raise CaptureError(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}") from error
    finally:
        for leaf in leaves:
            leaf.grad = None

    before, after = calls.around(graph.graph)
    graph.graph.eliminate_dead_code()
    used: list[int] = []
    for i, node in enumerate(graph.graph.find_nodes(op="placeholder")):
        if node.users:
            used.append(i)
        else:
            graph.graph.erase_node(node)
    graph.recompile()
    places = [places[0] for _, places in state.places.values()]
    return Capture(
        graph,
        tuple(places[i] for i in used if i < len(places)),
        tuple(i - len(places) for i in used if 0 <= i - len(places) < len(tensors)),
        len(places) + len(tensors) in used,
        spec[-1],
        tuple(places[i] for i in trained),
        before,
        after,
    )


def _formed(tensor: Tensor, form: torch.memory_format) -> Tensor:
    if tensor.dim() != 4 or form is torch.preserve_format:
        return tensor
    return tensor.contiguous(memory_format=form)


def draws(graph: fx.GraphModule) -> bool:
    """Say whether a graph draws random numbers."""
    return any(torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) for node in graph.graph.nodes)


def forms(values: Sequence[Any]) -> tuple[Any, ...]:
    """Return what a graph depends on of a function's arguments: forms of tensors, and numbers."""
    return tuple(
        (value.shape, value.stride(), value.dtype, value.device) if isinstance(value, Tensor) else value
        for value in values
        if isinstance(value, Tensor | int | float)
    )


class _Calls:
    """Stands for the optimizer while a function is recorded: notes what is asked of it, and when."""

    def __init__(self, notes: list[tuple[frozenset[str], Call]] | None = None, loss: int | None = None) -> None:
        self.notes = [] if notes is None else notes
        self.loss = loss
        self.factor: Tensor | None = None
        """What stands for the scale of the losses."""

    def __getitem__(self, loss: int) -> _Calls:
        return _Calls(self.notes, loss)

    def scale(self, loss: Tensor) -> Tensor:
        assert self.factor is not None, "what records a scaled loss says what stands for the scale"
        return loss * self.factor

    def step(self) -> None:
        self._note("step")

    def zero_grad(self) -> None:
        self._note("zero_grad")

    def _note(self, call: str) -> None:
        mode = get_proxy_mode()
        assert mode is not None, "the function is being recorded"
        self.notes.append((frozenset(node.name for node in mode.tracer.graph.nodes), (self.loss, call)))

    def around(self, graph: fx.Graph) -> tuple[tuple[Call, ...], tuple[Call, ...]]:
        """Return the calls before the first operation of a graph, and those after the last."""
        computing = {node.name for node in graph.nodes if _computes(node)}
        before = tuple(call for known, call in self.notes if not computing & known)
        after = tuple(call for known, call in self.notes if computing <= known)
        between = [call for _, call in self.notes if call not in before + after]
        if between:
            raise CaptureError(f"it computes on after {between[0][1]} of the optimizer.")
        return before, after


def _computes(node: fx.Node) -> bool:
    views = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
    return node.op == "call_function" and node.target not in views


def _signature(module: fx.GraphModule) -> str:
    numbers: dict[fx.Node, int] = {}
    lines: list[str] = []
    for node in module.graph.nodes:
        arguments = fx.map_arg((node.args, node.kwargs), lambda n: f"%{numbers[n]}")
        told = str(node.target) if node.op == "call_function" else ""
        if node.op == "placeholder":
            told = _form(node.meta["val"])
        elif node.op == "get_attr":
            constant = getattr(module, node.target)
            told = f"{_form(constant)} {constant.tolist() if isinstance(constant, Tensor) else constant}"
        numbers[node] = len(numbers)
        lines.append(f"{node.op} {told} {arguments}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def _form(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return f"{value.dtype} {value.device} {tuple(value.shape)} {value.stride()}"
