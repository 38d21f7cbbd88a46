"""Decoupled greedy learning: every layer is trained by a small auxiliary net of its own.

E. Belilovsky, M. Eickenberg, E. Oyallon. Decoupled greedy learning of CNNs. ICML 2020.
https://arxiv.org/abs/1901.08164. Reference code: eugenium/DGL at 4cc7c17.

    L_l = cross-entropy(aux_l(h_l), y),  h_l = f_l(sg[h_(l-1)])        at every layer but the last (alg. 1)

The gradient reaches f_l and aux_l, nothing else. aux_l is a net whose cost is a few percent of the layer's own:
MLP-SR-aux works on a map whose height and width are reduced to a quarter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from localize.heads import narrow
from localize.heads.branch import Branch
from localize.heads.dgl import KINDS, auxiliary
from localize.ir import LabelKind, Plan, Segment, Segments
from localize.methods.base import ANY_LABELS, Local, isolated, option


@dataclass(frozen=True)
class DGL(Local):
    """Auxiliary nets made of 1x1 convolutions and linear layers."""

    name: ClassVar[str] = "dgl"
    reference: ClassVar[str] = (
        "E. Belilovsky, M. Eickenberg, E. Oyallon. Decoupled greedy learning of CNNs. ICML 2020. "
        "Code: eugenium/DGL at 4cc7c17."
    )
    labels: ClassVar[tuple[LabelKind, ...]] = ANY_LABELS
    deviations: ClassVar[tuple[str, ...]] = (
        "The last layer is trained with the model's own classifier, as the code for ImageNet does; the six-layer CIFAR "
        "net of the code has a classifier with two hidden layers there.",
        "A layer is updated as soon as its backward has run, as the code does (update=immediate); no two layers share "
        "a parameter, so update=end gives the same weights.",
        "The BatchNorm2d that the code builds into auxiliary nets with linear layers, and never calls, is left out.",
        "An axis of length 1 is not stretched to 2 by the pooling; the code would repeat its values.",
        "Layers wait for each other: the paper's asynchronous variant with replay buffers is not here.",
    )

    kind: str = option(
        "mlp-sr",
        "auxiliary net: 1x1 convolutions on a reduced map and linear layers (mlp-sr), linear layers only (mlp), or two "
        "3x3 convolutions at full size (cnn)",
        choices=KINDS,
    )
    n_conv: int = option(3, "number of 1x1 convolutions of mlp-sr", low=1)
    n_hidden: int = option(3, "number of hidden linear layers of mlp-sr and mlp", low=0)
    bias: bool = option(True, "whether the hidden linear layers of mlp-sr and mlp have a bias")
    head_width: int = option(0, narrow.MEANING, low=0)
    update: str = option(
        "immediate",
        "parameters move after each layer's backward (immediate) or once after all",
        choices=("immediate", "end"),
    )

    def plan(self, segments: Segments) -> Plan:
        """Give every segment but the last an auxiliary net.

        Raises:
            MethodError: there is no cut.
        """

        def supervise(segment: Segment) -> list[Branch]:
            options: dict[str, Any] = {
                "kind": self.kind,
                "n_conv": self.n_conv,
                "n_hidden": self.n_hidden,
                "bias": self.bias,
            }
            name = f"head_{segment.index}"
            return [
                narrow.narrowed(segment, self.head_width, lambda read: auxiliary(read, segments.trunk, name, **options))
            ]

        told = (*self.deviations, *narrow.told(self.head_width))
        return isolated(self, segments, supervise, update=self.update, deviations=told)
