"""A branch: the blocks that are attached behind a segment, and the term of its local loss that they compute."""

from __future__ import annotations

from dataclasses import dataclass, replace

from localize.ir import Block, Term


@dataclass(frozen=True)
class Branch:
    """One term of a local loss, with the blocks that are its own.

    Blocks without trainable parameters (targets, fixed projections) are in ``blocks`` as well: a loss declares to train
    those that have some.
    """

    term: Term
    blocks: tuple[Block, ...]

    def weighted(self, weight: float) -> Branch:
        """Return the same branch with its term multiplied by ``weight``."""
        return replace(self, term=replace(self.term, weight=self.term.weight * weight))
