"""Predict the seconds of an operation from its multiply-adds, the bytes that it reads and writes, and its call.

This is a roofline for each operation: the longer of arithmetic and traffic, plus a constant for the call (Williams,
Waterman, Patterson, *Roofline*, Communications of the ACM 52, 2009). Multiply-adds alone rank methods wrongly: norms,
activations, heads and updates have almost none, but take most of the time of a MobileNet.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from localize.errors import OptionError
from localize.torch_names import writes_arguments


@dataclass(frozen=True)
class Speed:
    """The speed of a device."""

    macs: float
    """Multiply-adds per second of matrix products and convolutions."""
    bytes: float
    """Bytes per second that operations read and write."""
    call: float
    """Seconds of a call that does nothing."""
    grouped: float = 0.0
    """Multiply-adds per second of convolutions in groups of few channels (depthwise ones); 0: as for the others."""
    name: str = ""

    def seconds(self, macs: float, moved: float, *, grouped: bool = False) -> float:
        """Return the predicted seconds of an operation."""
        rate = self.grouped if grouped and self.grouped else self.macs
        return self.call + max(macs / rate, moved / self.bytes)


SPEEDS = {
    speed.name: speed
    for speed in (
        Speed(23.2e9, 7.55e9, 3.2e-5, grouped=3.2e9, name="cpu"),
        Speed(150e12, 3.8e12, 6e-6, name="h200"),
        Speed(78e12, 1.6e12, 6e-6, name="a100"),
    )
}
"""Devices by name. ``cpu`` is one thread of the CPU on which ``python benchmarks/speed.py`` was last run (it prints the
line to put here). For GPUs: half the TF32 FLOP/s of the data sheet, 0.8 times the memory bandwidth, and the
microseconds that a kernel launch takes; nothing was measured on them."""


def speed_of(text: str) -> Speed:
    """Return the speed for a text: ``cpu``, ``h200``; or ``FLOPS,BYTES,SECONDS``, such as ``60e12,2e12,6e-6``.

    Raises:
        OptionError: the text is neither.
    """
    if text in SPEEDS:
        return SPEEDS[text]
    parts = [part for part in re.split(r"[,\s]+", text) if part]
    try:
        flops, moved, call = (float(part) for part in parts)
    except ValueError:
        flops = moved = call = 0.0
    if flops <= 0 or moved <= 0 or call < 0:
        raise OptionError(
            f"--device-model cannot be {text!r}.",
            facts=f"it must be {', '.join(SPEEDS)}, or three numbers: FLOP/s, bytes/s, seconds per call.",
            help="--device-model h200, or --device-model 60e12,2e12,6e-6",
        )
    return Speed(flops / 2, moved, call, name=text)


def traffic(func: Any, tensors_in: list[Tensor], tensors_out: list[Tensor]) -> int:
    """Return the bytes that an operation reads and writes; -1 for one that only returns a view."""
    name = func.overloadpacket.__name__
    if name in _MAKES:
        return -1
    read = {id(t.untyped_storage()): _size(t) for t in tensors_in}
    if not writes_arguments(func) and tensors_out and all(id(t.untyped_storage()) in read for t in tensors_out):
        return -1
    return sum(_size(t) for t in tensors_in) + sum(_size(t) for t in tensors_out)


def is_grouped(func: Any, args: Any) -> bool:
    """Return whether a call is a grouped convolution or its backward."""
    if "convolution" not in func.overloadpacket.__name__:
        return False
    numbers = [value for value in args if isinstance(value, int) and not isinstance(value, bool)]
    return any(number > 1 for number in numbers)


def _size(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


_MAKES = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias"})
