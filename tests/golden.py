"""Deterministic tensors and weights, by which a step of this package is compared with one of the authors' code.

The reference values in the tests were recorded offline with these same tensors; no test runs foreign code.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod, sqrt

import torch
from torch import Tensor, nn


def det(shape: tuple[int, ...], s: int) -> Tensor:
    """Return a float64 tensor of the given shape with values in [-1, 1], a function of the seed ``s`` alone."""
    i = torch.arange(prod(shape), dtype=torch.int64)
    k = (i * i * (31 + 2 * s) + i * (17 + 13 * s) + 101 * s + 7) % 10007
    return ((2 * k - 10006).double() / 10006).reshape(shape)


@torch.no_grad()
def fill(modules: Iterable[nn.Module], start: int = 100) -> int:
    """Overwrite weights and biases in the order in which the modules are given and hold their own modules.

    A convolution's weight becomes ``sqrt(6 / (kh * kw * C_out)) * det``, a linear weight ``0.3 * det``, a bias
    ``0.1 * det``; each tensor takes the next seed, weight before bias. BatchNorm weights become 1, biases 0.

    Returns:
        The next free seed: ``start`` plus the number of tensors filled, which checks the traversal.
    """
    s = start
    for module in (inner for outer in modules for inner in outer.modules()):
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            shape = tuple(module.weight.shape)
            scale = 0.3 if isinstance(module, nn.Linear) else sqrt(6 / (shape[2] * shape[3] * shape[0]))
            module.weight.copy_(scale * det(shape, s))
            s += 1
            if module.bias is not None:
                module.bias.copy_(0.1 * det(tuple(module.bias.shape), s))
                s += 1
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.weight.fill_(1)
            module.bias.fill_(0)
    return s
