"""The goodness of activities, and the segments that it can train.

Source: G. Hinton, "The forward-forward algorithm: some preliminary investigations", 2022, sec. 2: the goodness of a
layer is the sum of the squares of its activities; their length is removed before the next layer sees them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from localize.errors import Advice, MethodError
from localize.heads import blocks
from localize.heads.branch import Branch
from localize.heads.lengths import length_of_input
from localize.ir import Segment, Segments, Term, Trunk


class Goodness(nn.Module):
    """Goodness of every image: the sum (G = sum_j h_j^2) or the mean of the squares of all its activities.

    Args:
        form: ``sum``, as in the paper, or ``mean``, which does not depend on the width of the layer.

    Shape:
        one tensor (N, ...) for each value at the cut; returns (N,).
    """

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, *values: Tensor) -> Tensor:
        activities = torch.cat([value.flatten(1) for value in values], 1)
        squares = activities.to(torch.promote_types(activities.dtype, torch.float32)).square()  # half would overflow
        return squares.sum(1) if self.form == "sum" else squares.mean(1)

    def extra_repr(self) -> str:
        """Show the form."""
        return self.form


def goodness_branch(
    segment: Segment, trunk: Trunk, *, form: str, loss: str, options: tuple[tuple[str, float], ...]
) -> Branch:
    """Return the goodness of a segment as a term of its loss.

    Args:
        segment: the segment to train.
        trunk: its model.
        form: ``sum`` or ``mean``.
        loss: dotted name of a function of (goodness (N,), labels (N,), **options).
        options: options of the loss.
    """
    facts = {"length_of_input": length_of_input(segment, trunk)} if segment.index else {}
    head = blocks.of_module(
        f"goodness_{segment.index}", Goodness(form), *(f.shape for f in segment.features), facts=facts
    )
    return Branch(Term(loss, head.name, scores=False, options=options), (head,))


# ---------------------------------------------------------------------------------------------------- normalisation


def require_normalised(method: str, segments: Segments, *, strictly: bool) -> None:
    """Refuse a model in which a segment passes its goodness on to the next.

    Args:
        method: name of the method, for the message.
        segments: the cut trunk.
        strictly: require a normalisation of each image by itself on every path; otherwise any normalisation will do.

    Raises:
        MethodError: a segment between the first and the last has no such normalisation.
    """
    for segment in segments.segments[1:-1]:
        found = length_of_input(segment, segments.trunk)
        if found == "kept" or (strictly and found != "removed"):
            has = "no normalisation" if found == "kept" else "a path around the normalisation, or a BatchNorm"
            raise MethodError(
                f"{method} needs the length of activities removed between layers, and {segment.name} of "
                f"{segments.trunk.name} (up to {segment.ends_at}) has {has}.",
                facts="otherwise a segment reads the goodness of the previous one in its input, and learns nothing.",
                help="start every layer except the first with a LayerNorm, as in cifar/fc_mnist, or with a division "
                "by the length of its input: x / (x.norm(2, 1, keepdim=True) + 1e-4)"
                if found == "kept"
                else Advice("length='any'"),
            )
