"""Find the class scores in what a model returns, and name its other outputs."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from localize.errors import ModelError, OptionError, did_you_mean
from localize.graph.depth import Operation, deepest

_LOGITS = ("logits", "out")
"""Fields of a result that hold the class scores wherever they stand."""


@dataclass(frozen=True)
class Outputs:
    """The tensors that a model returns, by their names: the class scores, and all others."""

    name: str
    scores: Tensor
    others: dict[str, Tensor]
    alike: tuple[str, ...] = ()
    """Names of the others that look like class scores as well, where one of them had to be chosen."""
    even: bool = False
    """Another of them lies as deep: the first was chosen."""


class Forward(Protocol):
    """What is known of the forward that made the outputs."""

    def made_of(self, tensor: Tensor) -> frozenset[int]:
        """Return the numbers of the operations that a tensor is made of."""

    def operations(self) -> Sequence[Operation]:
        """Return all operations by their numbers."""


def find_outputs(result: Any, forward: Forward, output: str | None = None, further: Collection[str] = ()) -> Outputs:
    """Find the class scores in what a model returns.

    They are the output that is asked for, or the field called ``logits`` or ``out``. Without them they are the first
    vector for each image of which no other is made; of several of one shape, the deepest, see
    :func:`localize.graph.depth.deepest`.

    Args:
        result: what the forward returned: a tensor, or any nesting of tuples, lists, dicts and records of them. A field
            has its own name, an item of a tuple or list is ``output_i``.
        forward: the forward that returned it.
        output: name of the output that is asked for; None leaves it to these rules.
        further: names of outputs that are not the class scores.

    Raises:
        ModelError: there is not a tensor in the result.
        OptionError: there is no output of the name that is asked for, or none besides the further ones.
    """
    found = dict(_named_tensors(result, ""))
    if not found:
        raise ModelError(
            f"the model returns {type(result).__name__}, which holds no tensor.", help="return logits (N, classes)"
        )
    if output is not None and output not in found:
        raise OptionError(
            f"the model has no output {output!r}.",
            facts=f"it returns {', '.join(f'{name} {tuple(tensor.shape)}' for name, tensor in found.items())}.",
            help=did_you_mean(output, found) or "leave it out: the class scores are found by their shape and depth",
            option="output",
        )
    left = {name: tensor for name, tensor in found.items() if name not in further}
    if not left or output in further:
        name = output or next(iter(found))
        raise OptionError(
            f"output {name!r} cannot be the class scores: outputs gives it a weight, as a further output.",
            facts=f"the model returns {', '.join(found)}.",
            help=f"leave {name!r} out of outputs",
            option="outputs",
        )
    named = output or next((name for name in _LOGITS if name in left), None)
    alike: tuple[str, ...] = ()
    even = False
    if named is None:
        named, alike, even = _deepest(left, forward)
    return Outputs(named, found[named], {name: found[name] for name in found if name != named}, alike, even)


def output_called(result: Any, name: str) -> Tensor:
    """Return the output of a name, as :func:`find_outputs` gives it, from what a model returns.

    Raises:
        KeyError: there is none.
    """
    return dict(_named_tensors(result, ""))[name]


def _deepest(found: dict[str, Tensor], forward: Forward) -> tuple[str, tuple[str, ...], bool]:
    """Return the name of the class scores, those of other outputs of their shape, and whether one lies as deep."""
    vectors = [name for name, t in found.items() if t.dim() == 2 and t.is_floating_point()]
    names = vectors or list(found)
    made = {name: forward.made_of(found[name]) for name in names}
    last = [name for name in names if not any(made[name] < made[other] for other in names)]
    first = found[last[0]]
    alike = [name for name in last if (found[name].shape, found[name].dtype) == (first.shape, first.dtype)]
    if len({len(made[name]) for name in alike}) == 1:  # one alone, or classifiers side by side
        return alike[0], (), len(alike) > 1
    name, even = deepest(alike, made, forward.operations())
    return name, tuple(other for other in alike if other != name), even


def _named_tensors(result: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(result, Tensor):
        yield name or "output", result
        return
    if isinstance(result, dict):
        items = [(str(key), value) for key, value in result.items()]
    elif isinstance(result, list | tuple):
        fields = getattr(result, "_fields", None)
        items = [(fields[i] if fields else f"{name or 'output'}_{i}", value) for i, value in enumerate(result)]
    else:
        items = [(key, value) for key, value in getattr(result, "__dict__", {}).items() if isinstance(value, Tensor)]
    for key, value in sorted(items, key=lambda item: not isinstance(item[1], Tensor)):
        yield from _named_tensors(value, re.sub(r"\W", "_", key))
