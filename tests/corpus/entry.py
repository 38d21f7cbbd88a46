"""What the corpus of honest nets holds: nets as people write them, each with what is expected of its conversion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

CLASSES = 5


def images(batch: int) -> Tensor:
    """Return a batch of random images (N, 3, 16, 16)."""
    return torch.randn(batch, 3, 16, 16)


@dataclass(frozen=True)
class Entry:
    """One honest net.

    Attributes:
        name: Name of the net in the tests.
        make: Builds the net, freshly drawn.
        inputs: Makes a random batch of a size.
        layers: Fewest local layers that it has.
        refused: Pattern of the message with which ``transform`` refuses the net; empty if it converts.
        refused_by: The same of single methods.
        options: Further arguments of ``transform``.
        warns: Pattern of the warning that the conversion gives; empty if there is none.
        draws: Its forward draws random numbers in train mode.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], Any] = images
    layers: int = 4
    refused: str = ""
    refused_by: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    warns: str = ""
    draws: bool = False
