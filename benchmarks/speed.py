"""Measure what one CPU thread does in a second, and print the line for ``localize/estimate/speed.py``::

    python benchmarks/speed.py

Four numbers, each the best of some rounds of CPU time, forward and backward: multiply-adds of a convolution of 32
channels; of a depthwise one; bytes of a norm and an activation one after another, as they are counted of a step; and
seconds of a call of these on values so few that nothing else counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from measuring import keep_pages

from localize.estimate.memory import Meter
from localize.estimate.speed import Speed

ROUNDS = 7


def main() -> None:
    """Measure, and print."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    moved, _, seconds = normed(32, 32)
    _, calls, little = normed(2, 1)
    bytes_of, call = moved / seconds, little / calls
    convolution = convolved(32, 1)
    depthwise = convolved(32, 32)
    speed = Speed(round(convolution, -8), round(bytes_of, -7), round(call, 7), grouped=round(depthwise, -7), name="cpu")
    print(speed)


def convolved(channels: int, groups: int) -> float:
    """Return multiply-adds in a second of a 3x3 convolution on 32 maps of 32x32, forward and backward."""
    x = torch.randn(32, channels, 32, 32, requires_grad=True)
    weight = torch.randn(channels, channels // groups, 3, 3, requires_grad=True)

    def run() -> None:
        F.conv2d(x, weight, padding=1, groups=groups).sum().backward()

    return 3 * 32 * 32 * 32 * channels * (channels // groups) * 9 / best(run)


def normed(count: int, width: int) -> tuple[int, int, float]:
    """Return bytes, calls and seconds of a norm and a ReLU on so many maps of so many channels."""
    x = torch.randn(count, width, width, width, requires_grad=True)
    weight, bias = (torch.ones(width, requires_grad=True) for _ in range(2))

    def run() -> None:
        value = F.relu(F.batch_norm(x, None, None, weight, bias, True))
        torch.autograd.grad(value, [x, weight, bias], torch.ones_like(value))

    with Meter() as meter:
        run()
    return meter.moved, meter.calls, best(lambda: [run() for _ in range(20)]) / 20


def best(run: Callable[[], object]) -> float:
    """Return the least seconds of CPU time of a round."""
    found = []
    for _ in range(ROUNDS):
        started = time.process_time()
        run()
        found.append(time.process_time() - started)
    return min(found)


if __name__ == "__main__":
    keep_pages()
    main()
