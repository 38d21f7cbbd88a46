"""Bytes that autograd holds for the backward passes of one training step, at the highest point of the step.

What is counted: every tensor that a forward operation saves for its backward, from when it is saved until autograd lets
go of it, in bytes of its whole storage, each storage once however many operations saved it. What is not: parameters and
buffers of the model and its heads, gradients, optimizer state, values that only Python holds, temporary workspace
inside an operation, and what an allocator adds. The images are counted where the first layer saves them::

    python benchmarks/saved_bytes.py --model cifar/resnet110 --batch-size 16
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import localize
from localize.zoo import create_model, input_shape_of, resolve

METHODS: Mapping[str, Mapping[str, Any]] = {"backprop": {}, "auglocal": {"d": 2}, "dcl": {}}
MIB = 2**20


class Meter:
    """Follows what autograd saves: ``held`` bytes now, and the ``peak`` so far."""

    def __init__(self, ignored: frozenset[int]) -> None:
        self.ignored = ignored
        self.uses: Counter[int] = Counter()
        self.held = 0
        self.peak = 0

    def pack(self, tensor: Tensor) -> Saved:
        """Take in a tensor that is saved."""
        return Saved(self, tensor.detach())


class Saved:
    """A tensor that autograd holds; it is let go of when this object dies."""

    def __init__(self, meter: Meter, tensor: Tensor) -> None:
        self.meter = meter
        self.tensor = tensor
        storage = tensor.untyped_storage()
        # An address names one storage only while that storage lives: this object keeps it alive.
        self.address, self.size = storage.data_ptr(), storage.nbytes()
        if self.address not in meter.ignored:
            meter.uses[self.address] += 1
            if meter.uses[self.address] == 1:
                meter.held += self.size
                meter.peak = max(meter.peak, meter.held)

    def __del__(self) -> None:
        if self.address not in self.meter.ignored:
            self.meter.uses[self.address] -= 1
            if self.meter.uses[self.address] == 0:
                self.meter.held -= self.size


def saved_bytes(local: localize.LocalModel, x: Tensor, y: Tensor) -> int:
    """Return the peak of the bytes saved for backward in one ``local.step``."""
    ignored = frozenset(t.untyped_storage().data_ptr() for t in (*local.parameters(), *local.buffers()))
    meter = Meter(ignored)
    optimizer = torch.optim.SGD(local.param_groups(lr=0.01), lr=0.01)
    with torch.autograd.graph.saved_tensors_hooks(meter.pack, lambda saved: saved.tensor):
        local.step(x, y, optimizer)
    assert meter.held == 0, f"{meter.held} bytes are still held after the step"
    return meter.peak


def main() -> None:
    """Measure every method on the same batch and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="cifar/resnet110")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args()

    torch.manual_seed(0)
    peaks: dict[str, tuple[int, int]] = {}
    for method in args.methods:
        model = create_model(args.model)
        shape = input_shape_of(resolve(args.model), model)
        x, y = torch.randn(args.batch_size, *shape), torch.randint(0, 10, (args.batch_size,))
        local = localize.transform(model, method, example_input=x, **METHODS[method])
        peaks[method] = len(local.plan.segments), saved_bytes(local, x, y)

    print(f"{args.model}, batch {args.batch_size}, float32\n")
    print("| method | options | segments | MiB saved at the peak | share of backprop |\n|---|---|---|---|---|")
    for method, (segments, peak) in peaks.items():
        options = " ".join(f"--{name} {value}" for name, value in METHODS[method].items())
        share = f"{peak / peaks['backprop'][1]:.3f}" if "backprop" in peaks else ""
        print(f"| {method} | {options} | {segments} | {peak / MIB:.2f} | {share} |")


if __name__ == "__main__":
    main()
