"""Peak memory of a training step: what is predicted without running it, what is measured, what the allocator gave.

``predicted`` and ``measured`` count the bytes of live tensors (:mod:`localize.estimate.memory`), on tensors without
values and with them; the second of two steps, SGD with momentum. ``allocated`` is what torch's profiler saw of the CPU
allocator in a further step, with workspaces that operations take and give back. One model of each of 12 families, by
backprop and by two local methods::

    python benchmarks/predicted_memory.py --threads 1
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from measuring import allocated

from localize import build
from localize.errors import LocalizeError
from localize.estimate import memory
from localize.recipes import Recipe

MODELS = (
    "cifar/resnet32", "cifar/vgg8b", "cifar/vit", "cifar/mixer", "tv/resnet18", "tv/mobilenet_v3_small",
    "tv/efficientnet_b0", "tv/densenet121", "timm/vit_tiny_patch16_224", "timm/convnext_atto", "timm/regnety_002",
    "timm/swin_tiny_patch4_window7_224",
)  # fmt: skip
METHODS = {"backprop": {}, "dcl": {}, "auglocal": {"d": 2}}
MIB = 2**20


def main() -> None:
    """Print the table, one line after the other."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("| model | method | predicted, MiB | measured, MiB | difference | allocated, MiB | of it workspaces |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for model in arguments.models:
        for line in rows(model, arguments.batch_size):
            print(line, flush=True)


def rows(model: str, batch_size: int) -> Iterator[str]:
    """Yield a line for each method that takes the model."""
    for method, options in METHODS.items():
        try:
            local = build.build(Recipe(method, options, model=model)).train()
        except LocalizeError as error:
            yield f"| {model} | {method} | {error.problem} | | | | |"
            continue
        predicted = memory.predict(local, batch_size)
        x, y = build.random_batch(local, batch_size)
        optimizer = memory.sgd(local.param_groups(lr=0.01))
        found = memory.measure(local, x, y, optimizer)
        taken = allocated(local, x, y, optimizer) + found.resident
        apart = predicted.peak / found.peak - 1
        yield (
            f"| {model} | {method} | {predicted.peak / MIB:.2f} | {found.peak / MIB:.2f} | {apart:+.2%} | "
            f"{taken / MIB:.2f} | {taken / found.peak - 1:.1%} |"
        )


if __name__ == "__main__":
    main()
