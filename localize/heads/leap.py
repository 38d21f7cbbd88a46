"""Leap augmented modules: copies of later blocks of the trunk between a segment and its auxiliary head.

A copy has exactly the parameters of the block it copies, so that it can be pulled towards it: no width and no stride is
adapted. A chain of copies therefore has to begin with a block that takes what the segment returns, and each block has
to take what the one before it returns.

Source: Y. Zhang, S. Zhang, P. Wang, F. Zhu, D. Guan, J. Su, J. Liu, C. Cai, "MLAAN: scaling supervised local learning
with multilaminar leap augmented auxiliary network", AAAI 2025, sec. "Leap Augmented Modules" and eq. 10.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from localize.cutting import cuts
from localize.cutting.split import Pieces
from localize.heads.recreate import Part, copied
from localize.ir import Copy, Features, Grain, Segment, Trunk
from localize.reserved import path_in_head
from localize.torch_names import own_buffers, own_children, own_parameters, unsaved_buffers_of


@dataclass(frozen=True)
class LaterBlock:
    """A block of the trunk that can be copied.

    ``sources`` are pairs of paths, a module inside the copy and that of the trunk with the same parameters, which
    together hold every parameter: one pair for a block that is a module, the first path of which is empty.
    """

    index: int
    """Its number among the local layers."""
    part: Part
    sources: tuple[tuple[str, str], ...]

    @property
    def name(self) -> str:
        """Name of the block, as cuts are called."""
        return self.part.name

    @property
    def changes(self) -> bool:
        """It begins a stage: what it returns has another shape than what it takes."""
        return not fit(self.part.inputs, self.part.outputs)


def later_blocks(trunk: Trunk, grain: Grain) -> tuple[LaterBlock, ...]:
    """Return all local layers but the first and the classifier, in order, that a copy can be pulled towards.

    Args:
        trunk: the recorded model.
        grain: what the method takes as its local layers.
    """
    found = []
    pieces = Pieces(trunk)
    for layer in cuts.local_layers(trunk, replace(grain, classifier="own")):
        if layer.start is None or layer.end is None:
            continue
        graph = pieces.alone(layer.start, layer.end)
        if graph is None:
            continue
        part = Part(layer.name, graph, layer.start.features, layer.end.features)
        if sources := _sources(part, trunk):
            found.append(LaterBlock(layer.index, part, sources))
    return tuple(found)


def fit(given: Sequence[Features], wanted: Sequence[Features]) -> bool:
    """Tell whether values of the first layout are values of the second: as many, of the same shapes."""
    return [(f.kind, f.shape, f.channels) for f in given] == [(f.kind, f.shape, f.channels) for f in wanted]


def leap(blocks: Sequence[LaterBlock], segment: Segment, most: int) -> tuple[LaterBlock, ...]:
    """Choose the blocks behind a segment that are copied: those that begin a stage, then the last of the last stage.

    Args:
        blocks: all that can be copied, in order.
        segment: only blocks behind its last local layer are taken.
        most: number of blocks at which the chain ends, even if stages follow.

    Returns:
        The chain; empty where no later block takes what the segment returns.
    """
    chain: list[LaterBlock] = []
    features = segment.features
    behind = [block for block in blocks if block.index > segment.layers[1]]
    for block in behind:
        if block.changes and len(chain) < most and fit(features, block.part.inputs):
            chain.append(block)
            features = block.part.outputs
    start = chain[-1].index if chain else segment.layers[1]
    rest = [b for b in behind if b.index > start and not b.changes and fit(features, b.part.inputs)]
    return (*chain, *rest[max(0, len(rest) - (most - len(chain))) :])


# ------------------------------------------------------------------------------------------------------------- copies


def copy_of(part: Part, trunk: Trunk) -> fx.GraphModule:
    """Build a block again (on the meta device), its parameters named and ordered as in the trunk's own module."""
    copy = copied(part, trunk)
    path = _common(part)
    if path:
        graph = fx.Graph()
        graph.output(graph.graph_copy(copy.graph, {}), None)
        for node in graph.nodes:
            if node.op in ("call_module", "get_attr"):
                node.target = node.target.removeprefix(f"{path_in_head(path)}.")
        copy = fx.GraphModule(copy.get_submodule(path_in_head(path)), graph, class_name="Copied")
    _arrange(copy, trunk.model.get_submodule(path))
    return copy


def _sources(part: Part, trunk: Trunk) -> tuple[tuple[str, str], ...]:
    """Return the sources of a copy; none for a block without parameters, or with some whose module holds others."""
    copy = copy_of(part, trunk)
    pairs = tuple(_alike(copy, "", _common(part), trunk.model))
    held = {_join(inner, name) for inner, _ in pairs for name, _ in copy.get_submodule(inner).named_parameters()}
    return pairs if held == {name for name, _ in copy.named_parameters()} else ()


def _alike(copy: nn.Module, part: str, path: str, model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the outermost modules inside a copy that hold what the trunk's module at the same path holds."""
    mine, theirs = (
        {name: value.shape for name, value in module.state_dict().items()}
        for module in (copy, model.get_submodule(path))
    )
    if path and mine == theirs:
        if any(True for _ in copy.parameters()):
            yield part, path
        return
    originals = {path_in_head(name): name for name, _ in model.get_submodule(path).named_children()}
    for name, child in copy.named_children():
        yield from _alike(child, _join(part, name), _join(path, originals[name]), model)


def _common(part: Part) -> str:
    """Return the longest path that all modules and values of a block have in common."""
    targets = [node.target.split(".")[:-1] for node in part.graph.nodes if node.op in ("call_module", "get_attr")]
    return ".".join(os.path.commonprefix(targets)) if targets else ""


def _arrange(copy: nn.Module, original: nn.Module) -> None:
    """Order what a copy holds as the original does, where graphs order it by its use, and save the same buffers."""
    members: tuple[tuple[Any, Any], ...] = (
        (own_parameters(copy), own_parameters(original)),
        (own_children(copy), own_children(original)),
    )
    for mine, theirs in members:
        ordered = {name: mine[name] for name in map(path_in_head, theirs) if name in mine}
        mine.clear()
        mine.update(ordered)
    unsaved = unsaved_buffers_of(original)
    for name, buffer in list(own_buffers(copy).items()):
        copy.register_buffer(name, buffer, persistent=name not in unsaved)
    originals = {path_in_head(name): child for name, child in own_children(original).items()}
    for name, child in own_children(copy).items():
        theirs = originals[name]
        if child is not None and theirs is not None:
            _arrange(child, theirs)


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)


# --------------------------------------------------------------------------------------------------------------- heads


class Augmented(nn.Module):
    """A head behind copies of later blocks.

    Args:
        chain: blocks that are copied, at least one.
        head: what reads the values behind the last copy.
        trunk: the recorded model.
        twice: the first block is copied a second time, and the sum of both copies goes on; the second is not trained.

    Shape:
        what enters the first block, and whatever else the head takes; returns what the head returns.
    """

    def __init__(self, chain: Sequence[LaterBlock], head: nn.Module, trunk: Trunk, *, twice: bool) -> None:
        super().__init__()
        self.entering = len(chain[0].part.inputs)
        self.chain = nn.ModuleList([copy_of(block.part, trunk) for block in chain])
        self.average = copy_of(chain[0].part, trunk).requires_grad_(False) if twice else None
        self.head = head

    def forward(self, *inputs: Tensor) -> Tensor:
        values, others = inputs[: self.entering], inputs[self.entering :]
        first, *rest = self.chain
        if self.average is None:
            values = _tuple(first(*values))
        else:
            pairs = zip(_tuple(first(*values)), _tuple(self.average(*values)), strict=True)
            values = tuple(torch.add(*pair) for pair in pairs)
        for block in rest:
            values = _tuple(block(*values))
        return self.head(*values, *others)


def _tuple(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def copies(name: str, chain: Sequence[LaterBlock], *, twice: bool, decay: float | None) -> tuple[Copy, ...]:
    """Return the declarations of the copies in an :class:`Augmented` head.

    Args:
        name: of the head's block.
        chain: blocks that are copied.
        twice: the first block is copied twice: then only its second copy, which is not trained, is pulled.
        decay: of the pull; None: nothing is pulled.
    """
    trained = [
        Copy(name, _join("chain", str(i), part), source, None if twice else decay)
        for i, block in enumerate(chain)
        for part, source in block.sources
    ]
    average = [Copy(name, _join("average", part), source, decay) for part, source in chain[0].sources]
    return (*trained, *(average if twice else ()))
