"""Find the places of a recorded graph where training can be cut.

A place is a position in the recorded order; live there are the values that are still needed after it. Places between
which no trainable parameter lies are one possibility, a group: the best of them is taken (after an activation, before
a reshape, past an in-place operation). Where a single value is live, a cut detaches one tensor. Where so few of these
exist that a segment would hold most of the model, the region between two of them is refined: places with two, then with
three live values count there as well.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect, bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from operator import itemgetter
from typing import Literal

from torch import fx, nn

from localize.graph.operations import has_activation, is_whole, operation_kind, parameters_of
from localize.ir import Cut, Trunk, dtype_of, facts

MOST_LIVE = 3
"""At most so many tensors cross a cut."""
FEWEST_CUTS = 8
"""Regions are refined until there are so many cuts."""
LARGEST_SHARE = 0.5
"""Regions are refined until no segment holds more of the multiply-adds, or of the parameters."""


@dataclass(frozen=True)
class Place:
    """The place after node number ``index``, and the values that are still needed there."""

    index: int
    live: tuple[fx.Node, ...]
    overwritten: tuple[fx.Node, ...]
    handed_on: tuple[fx.Node, ...] = ()
    """Inputs, and what is made of them alone, that are needed after it too."""


@dataclass(frozen=True)
class Region:
    """The nodes after number ``first``, up to number ``last``, where cuts go through ``live`` tensors."""

    first: int
    last: int
    live: int
    share: float
    """Of the multiply-adds of the model, or of its parameters, whichever is more."""
    heavy: bool
    """It was refined because of its share, and not only because there were few cuts."""


class Places:
    """Everything that is known about the places of one recorded graph."""

    def __init__(self, trunk: Trunk) -> None:
        self.trunk = trunk
        self.nodes = list(trunk.graph.nodes)
        self.index = {node: i for i, node in enumerate(self.nodes)}
        modules = dict(trunk.twin.named_modules())
        self.module = {n: modules[n.target] for n in self.nodes if n.op == "call_module"}
        self.parameters = _parameters(self.nodes, trunk.twin)

    def order(self, cut: Cut) -> int:
        """Return the number of the node that the cut comes after."""
        return self._by_name[cut.after]

    @cached_property
    def _by_name(self) -> dict[str, int]:
        return {node.name: i for i, node in enumerate(self.nodes)}

    # -- parameters

    def is_weighted(self, i: int) -> bool:
        """Tell whether a node is a module with a matrix of weights, or multiplies by one of the model's."""
        node = self.nodes[i]
        multiplies = node.op == "call_module" or facts(node).macs > 0
        return multiplies and any(p.dim() > 1 for p in self.parameters[i].values())

    def _is_trained(self, i: int) -> bool:
        return any(p.requires_grad for p in self.parameters[i].values())

    def trains_between(self, first: Cut, last: Cut) -> bool:
        """Tell whether there is something to train between two cuts."""
        return any(map(self._is_trained, range(self.order(first) + 1, self.order(last) + 1)))

    # -- sizes

    @cached_property
    def _macs(self) -> list[int]:
        return _sums(facts(node).macs for node in self.nodes)

    @cached_property
    def bytes(self) -> list[int]:
        """Bytes for one image of the values that the first 0, 1, 2, ... nodes compute; each storage counts once."""
        seen: set[int] = set()
        made: list[int] = []
        for node in self.nodes:
            storage = facts(node).storage
            fold = facts(node).fold
            counts = bool(fold) and node.op != "placeholder" and storage is not None and storage not in seen
            shape = (facts(node).shape or ())[fold > 1 :]  # where the batch is folded, the first dimension is it
            made.append(fold * math.prod(shape) * dtype_of(node).itemsize if counts else 0)
            if storage is not None:
                seen.add(storage)
        return _sums(made)

    def size(self, first: int, last: int) -> int:
        """Return the number of elements of the distinct parameters after node ``first``, up to node ``last``."""
        last = min(last, len(self.nodes) - 1)
        again = self._read_again[bisect(self._read_again, first, key=_position) :]
        inside = itertools.takewhile(lambda entry: entry[0] <= last, again)
        counted_twice = sum(size for _, before, size in inside if before > first)
        return self._read[last + 1] - self._read[first + 1] - counted_twice

    @cached_property
    def _read(self) -> list[int]:
        """Number of elements that the first 0, 1, 2, ... nodes read, each time that they do."""
        return _sums(sum(p.numel() for p in owned.values()) for owned in self.parameters)

    @cached_property
    def _read_again(self) -> list[tuple[int, int, int]]:
        """For parameters that have been read before: number of the node, of the one before it, number of elements."""
        found: list[tuple[int, int, int]] = []
        before: dict[int, int] = {}
        for i, owned in enumerate(self.parameters):
            for parameter in owned.values():
                if id(parameter) in before:
                    found.append((i, before[id(parameter)], parameter.numel()))
                before[id(parameter)] = i
        return found

    @cached_property
    def _sizes(self) -> list[int]:
        """Number of elements of the distinct parameters that the first 0, 1, 2, ... nodes read."""
        seen: set[int] = set()
        made: list[int] = []
        for owned in self.parameters:
            fresh = {id(p): p.numel() for p in owned.values() if id(p) not in seen}
            seen.update(fresh)
            made.append(sum(fresh.values()))
        return _sums(made)

    @cached_property
    def tied(self) -> list[bool]:
        """For every node, whether a trained parameter is read up to it and after it."""
        spans: dict[int, list[int]] = {}
        for i, owned in enumerate(self.parameters):
            for parameter in owned.values():
                if parameter.requires_grad:
                    spans.setdefault(id(parameter), [i, i])[1] = i
        changes = [0] * (len(self.nodes) + 1)
        for first, last in spans.values():
            changes[first] += 1
            changes[last] -= 1
        return [count > 0 for count in _sums(changes)[1:]]

    def share(self, first: int, last: int) -> float:
        """Return the share of the multiply-adds after node ``first``, up to node ``last``; or of the parameters."""
        macs = (self._macs[last + 1] - self._macs[first + 1]) / max(1, self._macs[-1])
        return max(macs, self.size(first, last) / max(1, self._sizes[-1]))

    def largest_share(self, first: int, last: int) -> float:
        """Return the largest share of a single node after ``first``, up to ``last``: no cut makes it smaller."""
        return max((self.share(i - 1, i) for i in range(first + 1, last + 1) if self.parameters[i]), default=0.0)

    # -- liveness

    @cached_property
    def live(self) -> list[tuple[fx.Node, ...]]:
        """For every node, the values that depend on the input and are needed after it, but for those handed on."""
        return [tuple(value for value in needed if value not in self._inputs) for needed in self._needed]

    @cached_property
    def _inputs(self) -> set[fx.Node]:
        """Inputs of the model, and what is made of them without parameters; images, and what is made of them, are none.

        The images are the first input, if its values are numbers and not ids. What is made by chance and of parameters
        alone (a table of positions after a dropout) is the same for all images, and is handed on as well.
        """
        found: set[fx.Node] = set()
        of_images: set[fx.Node] = set()
        for i, node in enumerate(self.nodes):
            parents = [parent for parent in node.all_input_nodes if facts(parent).depends]
            if node.op == "placeholder":
                own = i > 0 or not dtype_of(node).is_floating_point
            else:
                own = bool(parents) and found.issuperset(parents) and not self.parameters[i]
            if node.op == "placeholder" or not of_images.isdisjoint(parents):
                of_images.add(node)
            elif facts(node).depends and facts(node).fold == 0:
                own = True
            if own:
                found.add(node)
        return found

    @cached_property
    def _needed(self) -> list[tuple[fx.Node, ...]]:
        """For every node, the values that depend on the input and are needed after it."""
        last = {node: max(users, default=-1) for node, users in self._users.items() if facts(node).depends}
        live: list[tuple[fx.Node, ...]] = []
        current: list[fx.Node] = []
        for i, node in enumerate(self.nodes):
            current = [value for value in [*current, *([node] if node in last else [])] if last[value] > i]
            live.append(tuple(current))
        return live

    @cached_property
    def _last_write(self) -> dict[int, int]:
        """For every storage that is written in place, the number of the last node that does."""
        return {storage: i for i, node in enumerate(self.nodes) for storage in facts(node).mutates}

    def _written_after(self, value: fx.Node, i: int) -> bool:
        """Whether the storage of a value is written in place after node ``i``."""
        storage = facts(value).storage
        return storage is not None and self._last_write.get(storage, -1) > i

    def _place(self, i: int) -> Place | None:
        """Return the place after node ``i`` if it is one where training can be cut."""
        live = self.live[i]
        most = max(3, len(self.trunk.input_shape))
        if not live or any(v.op == "placeholder" or not _is_cuttable(v, most) for v in live):
            return None
        handed_on = tuple(value for value in self._needed[i] if value in self._inputs)
        overwritten = tuple(v for v in (*live, *handed_on) if self._written_after(v, i))
        return Place(i, live, overwritten, handed_on)

    # -- groups of places

    @cached_property
    def groups(self) -> list[list[Place]]:
        """Places between which no trainable parameter lies, in order."""
        return self._refinement[0]

    @cached_property
    def regions(self) -> tuple[Region, ...]:
        """Where cuts go through several tensors, in order."""
        return tuple(sorted(self._refinement[1], key=lambda region: region.first))

    @cached_property
    def _refinement(self) -> tuple[list[list[Place]], list[Region]]:
        groups = self._groups(-1, len(self.nodes), 1)
        regions: list[Region] = []
        left = dict.fromkeys(self._between(groups), 2)
        while left:
            heavy = {bounds for bounds in left if self._is_divisible(*bounds)}
            if not heavy and len(groups) >= FEWEST_CUTS:
                break
            first, last = max(heavy or left, key=lambda bounds: self.share(*bounds))
            live = left.pop((first, last))
            found = self._groups(first, last, live)
            if found:
                share = self.share(first, last)
                regions.append(Region(first, last, live, share, (first, last) in heavy))
                groups = sorted([*groups, *found], key=lambda group: group[0].index)
                left |= {b: live for b in self._between(groups) if first <= b[0] and b[1] <= last}
            elif live < MOST_LIVE:
                left[first, last] = live + 1
        return groups, regions

    def _is_divisible(self, first: int, last: int) -> bool:
        """Tell whether a region holds too much, but no single node of it does."""
        return self.share(first, last) > LARGEST_SHARE and self.largest_share(first, last) < self.share(first, last)

    def _between(self, groups: Sequence[Sequence[Place]]) -> list[tuple[int, int]]:
        """Return the regions between groups, and those before the first and after the last."""
        bounds = [-1, *(group[0].index for group in groups), len(self.nodes) - 1]
        return list(pairwise(bounds))

    def _groups(self, first: int, last: int, live: int) -> list[list[Place]]:
        """Return the groups after node ``first`` and before node ``last`` with at most ``live`` values."""
        trained = [i for i, _ in enumerate(self.nodes) if self._is_trained(i)]
        groups: list[list[Place]] = []
        fresh = first < 0
        for i in range(first + 1, min(last, len(self.nodes))):
            fresh = fresh or self._is_trained(i)
            if not trained or not trained[0] <= i < trained[-1] or not facts(self.nodes[i]).depends:
                continue
            if len(self.live[i]) > live or (place := self._place(i)) is None:
                continue
            if fresh:
                groups.append([])
            if groups:
                groups[-1].append(place)
            fresh = False
        behind = range(groups[-1][0].index + 1, last + 1) if groups else ()
        if groups and last < len(self.nodes) - 1 and not any(map(self._is_trained, behind)):
            groups.pop()  # it is a part of the group that ends the region
        return groups

    def representative(self, group: Sequence[Place], pool: Literal["next", "same"]) -> Place:
        """Choose the place of a group: the end of a block, or past its activation (and pooling) and not further.

        A place whose value is overwritten later is left for one past that operation, but not for one inside a block.
        """
        safe = [place for place in group if not place.overwritten]
        for place in safe:
            if self._is_end(place.index):
                return place
        chosen, activation = group[0], self._activation_of(group)
        for place in group[1:]:
            passed = [n for n in self.nodes[chosen.index + 1 : place.index + 1] if facts(n).depends]
            if not all(self._extends(node, pool, place.index) or self._leads_to(node, activation) for node in passed):
                break
            chosen = place
        if chosen.overwritten:
            chosen = next((place for place in safe if place.index > chosen.index), chosen)
        block_end = next((place for place in group if self._is_end(place.index)), None)
        if block_end is not None and self._is_in_block(chosen):
            return block_end
        fewest = min(len(place.live) for place in group)
        return chosen if len(chosen.live) == fewest else next(p for p in group if len(p.live) == fewest)

    def _is_in_block(self, place: Place) -> bool:
        block = self.block_around(place.index)
        return block is not None and place.index < block[1]

    def _activation_of(self, group: Sequence[Place]) -> int:
        """Return the number of the activation that the layer before a group ends with, wherever it stands in it."""
        for i in range(group[0].index, group[-1].index + 1):
            if has_activation(self.nodes[i], self.module.get(self.nodes[i])):
                return -1 if self.block_around(i) is not None else i
        return -1

    def _extends(self, node: fx.Node, pool: str, index: int) -> bool:
        """Tell whether an operation without parameters belongs to the layer before it."""
        kind = operation_kind(node, self.module.get(node))
        if kind == "pool":
            return pool == "same" or self._block_follows(index)
        return kind in ("activation", "dropout", "elementwise")

    def _leads_to(self, node: fx.Node, activation: int) -> bool:
        """Tell whether an operation pools or parts what a layer computes before its activation."""
        kind = operation_kind(node, self.module.get(node))
        return self.index[node] < activation and (
            kind == "pool" or getattr(node.target, "__name__", node.target) in _PARTS
        )

    def _block_follows(self, index: int) -> bool:
        """Tell whether the next parameter after a place is inside a block."""
        following = next((i for i in range(index + 1, len(self.nodes)) if self.parameters[i]), None)
        return following is not None and self.block_around(following) is not None

    # -- blocks

    @cached_property
    def instances(self) -> dict[str, tuple[str, int, int]]:
        """Modules with children that run once, without a break: path -> (class, first node, last node)."""
        spans: dict[str, list] = {}
        for i, node in enumerate(self.nodes):
            if not facts(node).depends:
                continue
            for path, kind in facts(node).scope:
                span = spans.setdefault(path, [kind, i, i, 0])
                span[2] = i
                span[3] += 1
        dependent = _sums(bool(facts(node).depends) for node in self.nodes)
        return {
            path: (kind, first, last)
            for path, (kind, first, last, count) in spans.items()
            if path and count == dependent[last + 1] - dependent[first]
        }

    @cached_property
    def blocks(self) -> list[tuple[int, int]]:
        """First and last node of the outermost blocks, in order."""
        kinds = self._kinds_of_blocks()
        found = [(path, *span) for path, span in self.instances.items() if span[0] in kinds]
        found += _outside(self._blocks_beside_others(), found)
        stages = _stages(found)
        found = [block for block in found if block[0] not in stages and not self._is_taken_apart(block)]
        found += _outside(self._called_whole(), found)
        spans = sorted({(first, last) for _, _, first, last in found}, key=lambda span: (span[0], -span[1]))
        outermost: list[tuple[int, int]] = []
        for first, last in spans:
            if not outermost or first > outermost[-1][1]:
                outermost.append((first, last))
        return outermost

    def _called_whole(self) -> list[tuple[str, str, int, int]]:
        """Modules that are layers by themselves and are called whole."""
        whole = [(i, node) for i, node in enumerate(self.nodes) if is_whole(node, self.module.get(node))]
        return [(node.target, type(self.module[node]).__name__, i, i) for i, node in whole if facts(node).depends]

    def block_around(self, i: int) -> tuple[int, int] | None:
        """Return the block that node ``i`` is in."""
        found = bisect(self.blocks, i, key=_position) - 1
        return self.blocks[found] if found >= 0 and i <= self.blocks[found][1] else None

    def _is_end(self, i: int) -> bool:
        block = self.block_around(i)
        return block is not None and block[1] == i

    def has_block(self, first: int, last: int) -> bool:
        """Tell whether a block lies between two nodes, these included."""
        found = bisect_left(self.blocks, first, key=_position)
        return found < len(self.blocks) and self.blocks[found][1] <= last

    def _kinds_of_blocks(self) -> set[str]:
        """Classes in whose own forward a region with parameters, that no single value crosses, is closed."""
        single = [i for i, live in enumerate(self.live) if len(live) == 1]
        kinds = set()
        for before, after in pairwise([-1, *single]):
            if not self._is_closed(before, after) or not facts(self.nodes[after]).scope:
                continue
            path = facts(self.nodes[after]).scope[-1][0]
            inside = next(i for i in range(before + 1, after + 1) if facts(self.nodes[i]).depends)
            if path in self.instances and self.instances[path][1] <= inside:
                kinds.add(self.instances[path][0])
        return kinds

    def _blocks_beside_others(self) -> list[tuple[str, str, int, int]]:
        """Instances of classes that close such a region, while values bypass them, where cuts go through several."""
        inner = [
            path
            for path, (_, first, last) in self.instances.items()
            if any(region.first < first and last <= region.last for region in self.regions)
        ]
        kinds = {self.instances[path][0] for path in inner if self._closes(path)}
        return [(path, *span) for path, span in self.instances.items() if span[0] in kinds]

    def _is_closed(self, before: int, after: int) -> bool:
        """Tell whether there are two operations on the input, and parameters, after one place up to another."""
        inside = [i for i in range(before + 1, after + 1) if facts(self.nodes[i]).depends]
        return len(inside) > 1 and any(self.parameters[i] for i in inside)

    def _closes(self, path: str) -> bool:
        """Tell whether a module's own forward closes such a region, where other values bypass the module.

        Counted are the values that the rest of the module needs, and those that it has made for others.
        """
        _, first, last = self.instances[path]
        counts = []
        for i in range(first, last + 1):
            own = [v for v in self.live[i] if self.index[v] >= first]
            entered = [v for v in self.live[i] if self.index[v] < first and any(i < u <= last for u in self._users[v])]
            counts.append(len(own) + len(entered))
        fewest = [first - 1, *(first + i for i, count in enumerate(counts) if count <= counts[-1])]
        return any(
            self._is_closed(before, after) and [p for p, _ in facts(self.nodes[after]).scope][-1:] == [path]
            for before, after in pairwise(fewest)
        )

    @cached_property
    def _users(self) -> dict[fx.Node, list[int]]:
        """Numbers of the nodes that read a value; its batch size and device are those of any other value."""
        return {n: [self.index[user] for user in n.users if not facts(user).support] for n in self.nodes}

    def _is_taken_apart(self, block: tuple[str, str, int, int]) -> bool:
        """Tell whether a block holds so much of the model that cuts go through it."""
        _, _, first, last = block
        return self._is_divisible(first - 1, last) and any(first <= group[0].index < last for group in self.groups)

    # -- what a reader wants to know

    def described(self, region: Region) -> str:
        """Say why cuts in a region go through several tensors."""
        first = "the input" if region.first < 0 else self.nodes[region.first].name
        last = "the output" if region.last == len(self.nodes) - 1 else self.nodes[region.last].name
        why = "" if region.heavy else ", where there are few cuts"
        return (
            f"from {first} to {last} ({region.share:.0%} of the model{why}) no place is passed by fewer tensors: "
            f"cuts go through {region.live} of them"
        )

    @property
    def indivisible(self) -> tuple[str, ...]:
        """Single operations that hold more than half of the multiply-adds or of the parameters."""
        heavy = [i for i, owned in enumerate(self.parameters) if owned and self.share(i - 1, i) > LARGEST_SHARE]
        names = {i: self.nodes[i].target if self.nodes[i].op == "call_module" else self.nodes[i].name for i in heavy}
        return tuple(
            f"{names[i]} alone holds {self.share(i - 1, i):.0%} of the model: no cut makes it smaller" for i in heavy
        )

    # -- making cuts

    def cut(self, place: Place) -> Cut:
        """Return the cut at a place."""
        before = self._sizes[place.index + 1]
        return Cut(
            name=self._name(place),
            after=self.nodes[place.index].name,
            values=tuple(node.name for node in (*place.live, *place.handed_on)),
            features=tuple(layout for node in place.live if (layout := facts(node).features) is not None),
            cloned=tuple(node.name for node in place.overwritten),
            parameters_before=before,
            parameters_after=self._sizes[-1] - before,
            macs_before=self._macs[place.index + 1],
            bytes_before=self.bytes[place.index + 1],
        )

    def _name(self, place: Place) -> str:
        """Name a place by the block or the module that ends there."""
        node = self.nodes[place.index]
        for path, first in self._ending.get(place.index, ()):
            if self.block_around(first) == (first, place.index) or self._weights(first, place.index) == 1:
                return path
        return node.target if node.op == "call_module" and self._calls[node.target] == 1 else node.name

    @cached_property
    def _ending(self) -> dict[int, list[tuple[str, int]]]:
        """For every last node of a module, the modules that end there, outermost first: path, first node."""
        found: dict[int, list[tuple[str, int]]] = {}
        for path, (_, first, last) in self.instances.items():
            found.setdefault(last, []).append((path, first))
        return found

    def _weights(self, first: int, last: int) -> int:
        return self._weighted[last + 1] - self._weighted[first]

    @cached_property
    def _weighted(self) -> list[int]:
        """How many of the first 0, 1, 2, ... nodes are weighted."""
        return _sums(self.is_weighted(i) for i, _ in enumerate(self.nodes))

    @cached_property
    def _calls(self) -> Counter[str]:
        """How many times each module is called."""
        return Counter(node.target for node in self.nodes if node.op == "call_module")


_position = itemgetter(0)
_PARTS = {"chunk", "split", "tensor_split", "unbind", "getitem"}


def _parameters(nodes: Iterable[fx.Node], root: nn.Module) -> list[dict[str, nn.Parameter]]:
    """Return for every node the parameters that it reads, itself or through what does not depend on the input.

    What does not depend on the input has none: it is computed again in every segment that needs it. Parameters that are
    read without their gradient are not trained there.
    """
    found: list[dict[str, nn.Parameter]] = []
    through: dict[fx.Node, dict[str, nn.Parameter]] = {}
    for node in nodes:
        read = [through[parent] for parent in node.all_input_nodes if parent in through]
        owned = {name: p for parameters in (*read, parameters_of(node, root)) for name, p in parameters.items()}
        if not facts(node).differentiable:
            owned = {name: p for name, p in owned.items() if not p.requires_grad}
        if not facts(node).depends:
            through[node], owned = owned, {}
        found.append(owned)
    return found


def _sums(values: Iterable[int]) -> list[int]:
    """Return the sums of the first 0, 1, 2, ... values."""
    sums = [0]
    for value in values:
        sums.append(sums[-1] + value)
    return sums


def _stages(found: Sequence[tuple[str, str, int, int]]) -> set[str]:
    """Return the paths of the blocks that are stages: they hold two or more blocks of one class."""
    spans = {path: (first, last) for path, _, first, last in found}
    held: Counter[tuple[str, str]] = Counter()
    for path, kind, first, last in found:
        parts = path.split(".")
        for outer in (".".join(parts[:depth]) for depth in range(1, len(parts))):
            if outer in spans and spans[outer][0] <= first and last <= spans[outer][1]:
                held[outer, kind] += 1
    return {outer for (outer, _), count in held.items() if count > 1}


def _outside(
    blocks: Iterable[tuple[str, str, int, int]], found: Iterable[tuple[str, str, int, int]]
) -> list[tuple[str, str, int, int]]:
    """Return those of ``blocks`` that are not inside one of ``found``."""
    spans = sorted((first, last) for _, _, first, last in found)
    reached = [-1]
    for _, last in spans:
        reached.append(max(reached[-1], last))
    return [block for block in blocks if reached[bisect(spans, block[2], key=_position)] < block[3]]


def _is_cuttable(node: fx.Node, most: int) -> bool:
    """Tell whether a value is one that heads can read: (N, ...) with at most ``most`` further dimensions."""
    layout = facts(node).features
    return layout is not None and dtype_of(node).is_floating_point and len(layout.shape) <= most
