"""Find which of several outputs of a model lies deepest in its trunk.

An auxiliary classifier may have more layers than the one it helps: of two outputs, the one that more operations make is
not always the main one. What counts is how far each goes on with the trunk after it has left the other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Operation:
    """An operation of a forward.

    Attributes:
        modules: Path and class of every module that it runs in, from the outermost to the innermost. The class is empty
            for those of torch.
        weighted: It multiplies with parameters.
        spatial: It makes maps or tokens, not one vector for each image.
    """

    modules: tuple[tuple[str, str], ...]
    weighted: bool
    spatial: bool


def deepest(
    names: Sequence[str], made: Mapping[str, frozenset[int]], operations: Sequence[Operation]
) -> tuple[str, bool]:
    """Return the output that lies deepest, and whether another lies as deep: the first of those.

    An output lies deeper than another if more weighted operations that only it is made of (in this order)

    1. are in modules that follow those of both by their names, such as ``layer4`` after ``layer3``;
    2. are in modules of a class that both are made of, such as another ``Block``;
    3. make maps or tokens; or make anything, in a model that only makes vectors.

    An output that is called auxiliary (``aux...``), or whose own modules are, is not the deepest if there is another.

    Args:
        names: names of the outputs.
        made: indices of the operations that an output is made of.
        operations: all operations of the forward.
    """

    def depth(name: str, other: str) -> tuple[int, int, int]:
        own = [operations[i] for i in sorted(made[name] - made[other])]
        return _beyond(own, [operations[i] for i in made[name] & made[other]])

    def auxiliary(name: str) -> bool:
        others = frozenset[int]().union(*(made[other] for other in names if other != name))
        own = (operations[i] for i in made[name] - others)
        return _is_auxiliary(name) or any(_is_auxiliary(path) for operation in own for path, _ in operation.modules)

    main = [name for name in names if not auxiliary(name)] or list(names)
    best = main[0]
    for name in main[1:]:
        if depth(name, best) > depth(best, name):
            best = name
    return best, any(depth(name, best) == depth(best, name) for name in main if name != best)


def _is_auxiliary(name: str) -> bool:
    return re.search(r"(^|[._])aux", name) is not None


def _beyond(own: Sequence[Operation], shared: Sequence[Operation]) -> tuple[int, int, int]:
    """Count the weighted operations with which an output goes on from what it shares with another."""
    weighted = [operation for operation in own if operation.weighted]
    modules = [module for operation in shared for module in operation.modules]
    paths = {path for path, _ in modules}
    series, classes = {_series(path) for path in paths}, {kind for _, kind in modules} - {""}
    left = [next((m for m in operation.modules if m[0] not in paths), None) for operation in weighted]
    following = sum(module is not None and _series(module[0]) in series for module in left)
    alike = sum(module is not None and module[1] in classes for module in left)
    vectors = not any(operation.spatial and operation.weighted for operation in (*own, *shared))
    return following, alike, sum(operation.spatial or vectors for operation in weighted)


def _series(path: str) -> str:
    """Return a path without its numbers: modules of one series differ by them only."""
    return re.sub(r"\d+", "#", path)
