"""Find the class scores in what a model returns, and name its other outputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from localize.errors import ModelError, OptionError, did_you_mean

_LOGITS = ("logits", "out")
"""Fields of a result that hold the class scores wherever they stand."""


@dataclass(frozen=True)
class Outputs:
    """The tensors that a model returns, by their names: the class scores, and all others."""

    name: str
    scores: Tensor
    others: dict[str, Tensor]
    alike: tuple[str, ...] = ()
    """Names of the others that look like class scores as well, where the deepest was taken."""


def find_outputs(result: Any, made_of: Callable[[Tensor], frozenset[int]], output: str | None = None) -> Outputs:
    """Find the class scores in what a model returns.

    They are the output that is asked for, or the field called ``logits`` or ``out``. Without them they are the first
    vector for each image of which no other is made; of several of one shape, the one that most operations make: the
    deepest.

    Args:
        result: what the forward returned: a tensor, or any nesting of tuples, lists, dicts and records of them. A field
            has its own name, an item of a tuple or list is ``output_i``.
        made_of: returns the numbers of the operations that a tensor is made of.
        output: name of the output that is asked for; None leaves it to these rules.

    Raises:
        ModelError: there is no tensor in the result.
        OptionError: there is no output of the name that is asked for.
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
        )
    named = output or next((name for name in _LOGITS if name in found), None)
    alike: tuple[str, ...] = ()
    if named is None:
        named, alike = _deepest(found, made_of)
    return Outputs(named, found[named], {name: found[name] for name in found if name != named}, alike)


def _deepest(found: dict[str, Tensor], made_of: Callable[[Tensor], frozenset[int]]) -> tuple[str, tuple[str, ...]]:
    """Return the name of the class scores, and those of the other outputs of the same shape that might be."""
    vectors = [name for name, t in found.items() if t.dim() == 2 and t.is_floating_point()]
    names = vectors or list(found)
    made = {name: made_of(found[name]) for name in names}
    last = [name for name in names if not any(made[name] < made[other] for other in names)]
    first = found[last[0]]
    alike = [name for name in last if (found[name].shape, found[name].dtype) == (first.shape, first.dtype)]
    deepest = max(alike, key=lambda name: len(made[name]))
    others = tuple(name for name in alike if name != deepest)
    even = any(len(made[name]) == len(made[deepest]) for name in others)  # two classifiers side by side: the first
    return deepest, () if even else others


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
