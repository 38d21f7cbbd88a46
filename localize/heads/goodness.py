"""The goodness of activities, and which segments may be trained by it.

Source: G. Hinton, "The forward-forward algorithm: some preliminary investigations", 2022, sec. 2: the goodness of a
layer is the sum of the squares of its activities, and its length is removed before the next layer sees them.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from localize.errors import Advice, MethodError
from localize.heads import blocks
from localize.heads.branch import Branch
from localize.ir import Segment, Segments, Term, Trunk


class Goodness(nn.Module):
    """Goodness of every image: the squares of all its activities, summed (G = sum_j h_j^2) or averaged.

    Args:
        form: ``sum``, as in the paper, or ``mean``, which does not depend on the width of the layer.

    Shape:
        one tensor (N, ...) for each value that crosses the cut; returns (N,).
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
        segment: what is trained.
        trunk: the model that it is a part of.
        form: ``sum`` or ``mean``.
        loss: dotted name of a function of (goodness, labels, **options).
        options: of the loss.
    """
    facts = {"length_of_input": length_of_input(segment, trunk)} if segment.index else {}
    head = blocks.of_module(
        f"goodness_{segment.index}", Goodness(form), *(f.shape for f in segment.features), facts=facts
    )
    return Branch(Term(loss, head.name, scores=False, options=options), (head,))


# ---------------------------------------------------------------------------------------------------- normalisation

_EACH_IMAGE = ("layernorm", "groupnorm", "instancenorm", "rmsnorm")
"""In names of modules and functions that normalise every image by itself."""


def length_of_input(segment: Segment, trunk: Trunk) -> str:
    """Tell what a segment's output keeps of how long the activities of one image were that entered it.

    Returns:
        ``removed``: every path from what enters to what leaves passes a normalisation of each image by itself (layer,
        group, instance, RMS norm). ``partly kept``: there is a normalisation, but a path avoids it (a shortcut), or it
        is a BatchNorm, which scales all images alike and so keeps how much longer one is than another. ``kept``: there
        is none.
    """
    nodes = list(segment.graph.nodes)
    reached = {node for node in nodes if node.op == "placeholder"}
    normed = False
    for node in nodes:
        normed = normed or _normalises(node, trunk, each_image=False)
        if reached.intersection(node.all_input_nodes) and not _normalises(node, trunk, each_image=True):
            reached.add(node)
    if not any(node.op == "output" and node in reached for node in nodes):
        return "removed"
    return "partly kept" if normed else "kept"


def _normalises(node: fx.Node, trunk: Trunk, *, each_image: bool) -> bool:
    """Tell whether an operation is a normalisation (and of each image by itself)."""
    words = _EACH_IMAGE if each_image else (*_EACH_IMAGE, "batchnorm")
    if node.op == "call_module":
        module = trunk.twin.get_submodule(node.target)
        parts = [module] if each_image else module.modules()  # inside a module taken whole, a path may avoid the norm
        names = {kind.__name__ for part in parts for kind in type(part).__mro__}
    elif node.op in ("call_function", "call_method"):
        names = {getattr(node.target, "__name__", str(node.target))}
    else:
        names = set()
    return any(word in name.lower().replace("_", "") for name in names for word in words)


def require_normalised(method: str, segments: Segments, *, strictly: bool) -> None:
    """Refuse a model in which the goodness of a segment is handed on to the next.

    Args:
        method: its name, for the message.
        segments: the trunk, cut.
        strictly: every path has to pass a normalisation of each image by itself; otherwise any normalisation will do.

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
                facts="otherwise a segment finds the goodness of the one before in its input and has nothing to learn.",
                help="a LayerNorm at the beginning of every layer but the first, as in cifar/fc_mnist"
                if found == "kept"
                else Advice("length='any'"),
            )
