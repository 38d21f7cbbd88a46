"""A branch: the blocks attached to a segment's output, and the term of its local loss that they compute."""

from __future__ import annotations

from dataclasses import dataclass, replace

from localize.ir import Block, Term


@dataclass(frozen=True)
class Branch:
    """One term of a local loss, with its own blocks.

    ``blocks`` also contains blocks without trainable parameters (targets, fixed projections). A loss declares that it
    trains only those that have some.
    """

    term: Term
    blocks: tuple[Block, ...]

    def weighted(self, weight: float) -> Branch:
        """Return the same branch with its term multiplied by ``weight``."""
        return replace(self, term=replace(self.term, weight=self.term.weight * weight))
