"""Leap augmented modules: copies of later blocks of the trunk between a segment and its auxiliary head.

A copy has exactly the parameters of its block, so that it can be pulled towards it; no width or stride is adapted. A
chain of copies must therefore start with a block that takes the segment's output, and each block must take the output
of the previous one.

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

    ``sources`` are pairs of paths: a module inside the copy, and the trunk's module with the same parameters. Together
    they cover every parameter. A block that is a module has one pair, whose first path is empty.
    """

    index: int
    """Its number among the local layers."""
    part: Part
    sources: tuple[tuple[str, str], ...]

    @property
    def name(self) -> str:
        """Name of the block, as for cuts."""
        return self.part.name

    @property
    def changes(self) -> bool:
        """Whether it starts a stage, that is: its output has a different shape than its input."""
        return not fit(self.part.inputs, self.part.outputs)


def later_blocks(trunk: Trunk, grain: Grain) -> tuple[LaterBlock, ...]:
    """Return, in order, all local layers towards which a copy can be pulled, except the first and the classifier.

    Args:
        trunk: the recorded model.
        grain: the method's definition of a local layer.
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
    """Return whether two layouts have the same number of values with the same shapes."""
    return [(f.kind, f.shape, f.channels) for f in given] == [(f.kind, f.shape, f.channels) for f in wanted]


def leap(blocks: Sequence[LaterBlock], segment: Segment, most: int) -> tuple[LaterBlock, ...]:
    """Choose the blocks after a segment to copy: those that start a stage, then the last block of the last stage.

    Args:
        blocks: all blocks that can be copied, in order.
        segment: the segment; only blocks after its last local layer are used.
        most: largest number of blocks in the chain, even if more stages follow.

    Returns:
        The chain; empty if no later block takes the segment's output.
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
    """Build a block again (on the meta device), with parameters named and ordered as in the trunk's own module."""
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
    """Return the sources of a copy; none if it has no parameters, or if a module also has parameters outside it."""
    copy = copy_of(part, trunk)
    pairs = tuple(_alike(copy, "", _common(part), trunk.model))
    held = {_join(inner, name) for inner, _ in pairs for name, _ in copy.get_submodule(inner).named_parameters()}
    return pairs if held == {name for name, _ in copy.named_parameters()} else ()


def _alike(copy: nn.Module, part: str, path: str, model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the outermost modules of a copy with the same content as the trunk's module at the same path."""
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
    """Return the longest common path of all modules and values of a block."""
    targets = [node.target.split(".")[:-1] for node in part.graph.nodes if node.op in ("call_module", "get_attr")]
    return ".".join(os.path.commonprefix(targets)) if targets else ""


def _arrange(copy: nn.Module, original: nn.Module) -> None:
    """Give the members of a copy the order of the original (graphs order by use), and the same persistent buffers."""
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
    """A head that follows copies of later blocks (eq. 10).

    Args:
        chain: the blocks to copy, at least one.
        head: the module that reads the output of the last copy.
        trunk: the recorded model.
        twice: copy the first block twice, and use the sum of both copies; the second copy is not trained.

    Shape:
        the inputs (N, ...) of the first block, then further inputs of the head; returns the output of the head.
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
        name: name of the head's block.
        chain: the copied blocks.
        twice: whether the first block is copied twice; then only its second copy, which is not trained, is pulled.
        decay: decay of the pull; None: nothing is pulled.
    """
    trained = [
        Copy(name, _join("chain", str(i), part), source, None if twice else decay)
        for i, block in enumerate(chain)
        for part, source in block.sources
    ]
    average = [Copy(name, _join("average", part), source, decay) for part, source in chain[0].sources]
    return (*trained, *(average if twice else ()))
