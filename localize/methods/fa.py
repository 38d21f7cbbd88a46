"""Feedback alignment: backpropagation, with fixed random matrices in place of the transposed weights.

T. P. Lillicrap, D. Cownden, D. B. Tweed, C. J. Akerman. Random synaptic feedback weights support error backpropagation
for deep learning. Nature Communications 7, 2016.

    dL/dx = B^T dL/dy  instead of  W^T dL/dy                      at every linear and convolutional layer
    dL/dW = dL/dy x^T                                             as in backpropagation
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

from torch import fx, nn

from localize.errors import Advice, MethodError
from localize.graph.operations import parameters_of
from localize.heads import blocks
from localize.heads.feedback import feedback_module
from localize.ir import Block, LabelKind, Plan, Segments, Trunk
from localize.methods.base import ANY_LABELS, Uncut


@dataclass(frozen=True)
class FeedbackAlignment(Uncut):
    """One loss at the output, whose error runs back through fixed random matrices."""

    name: ClassVar[str] = "fa"
    reference: ClassVar[str] = (
        "T. P. Lillicrap, D. Cownden, D. B. Tweed, C. J. Akerman. Random synaptic feedback weights support error "
        "backpropagation for deep learning. Nature Communications 7, 2016."
    )
    labels: ClassVar[tuple[LabelKind, ...]] = ANY_LABELS
    deviations: ClassVar[tuple[str, ...]] = (
        "Feedback matrices are drawn as torch draws new weights of the layer, U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)); "
        "the paper chooses a range for every network.",
        "Modules that are nn.Linear or nn.Conv2d get random feedback. Weights that are used by other modules "
        "(attention, recurrent and transposed layers, one-dimensional convolutions) or by functions keep their true "
        "backward, and so do norms.",
        "The first layer has no feedback matrix: nothing trains what enters it.",
        "There is no cut: the error runs back through all layers, and all activations are kept, as in backpropagation.",
    )

    def plan(self, segments: Segments) -> Plan:
        """Put the cross-entropy on the model's own output, and random feedback into its layers.

        Raises:
            MethodError: the error passes no linear or convolutional layer on its way back, or one that cannot have
                random feedback.
        """
        replaced = {
            path: _block(f"feedback_{i}", path, module)
            for i, (path, module) in enumerate(_replacements(segments.trunk))
        }
        if not replaced:
            raise MethodError(
                f"no error is passed back through a linear or convolutional layer of {segments.trunk.name}.",
                facts="feedback alignment replaces the backward of nn.Linear and nn.Conv2d after the first layer.",
                help=Advice("method backprop", "--method backprop"),
            )
        return Plan(
            method=self.name,
            options=asdict(self),
            segments=segments,
            blocks=(*blocks.of_segments(segments), *replaced.values()),
            losses=(blocks.output_loss(segments, start=0),),
            update="end",
            feedback=tuple((path, block.name) for path, block in replaced.items()),
            reference=self.reference,
            deviations=self.deviations,
        )


def _block(name: str, path: str, module: nn.Module) -> Block:
    return replace(blocks.of_module(name, module, role="shared", facts={"of": path}), feedback=True)


def _replacements(trunk: Trunk) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers whose input gets a gradient, each with the module that takes its place."""
    trained: set[fx.Node] = set()
    found = set()
    for node in trunk.graph.nodes:
        behind = trained.intersection(node.all_input_nodes)
        if behind or any(p.requires_grad for p in parameters_of(node, trunk.twin).values()):
            trained.add(node)
        if behind and node.op == "call_module" and node.target not in found:
            module = feedback_module(trunk.twin.get_submodule(node.target), node.target)
            if module is not None:
                found.add(node.target)
                yield node.target, module
