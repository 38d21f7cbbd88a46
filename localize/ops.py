"""Operations that generated text calls and that Python can only write as a statement."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def set_item(x: Tensor, index: Any, value: Any) -> Tensor:
    """Write ``x[index] = value`` in place and return ``x``."""
    x[index] = value
    return x


def by_mode(training: bool, train: Any, eval: Any) -> Any:
    """Return ``train`` in train mode and ``eval`` in eval mode."""
    return train if training else eval
