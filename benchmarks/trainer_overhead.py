"""Images per second of the trainer's loop beside a bare loop of PyTorch: the same net, batches and optimizer, backprop.

Two copies of one net are trained in turn, a block of steps by the bare loop and a block by ``train_epoch``, in an order
that changes from pair to pair; printed is the median of the ratios of the pairs. On a CPU, an allocator that keeps its
memory makes times comparable::

    MALLOC_MMAP_THRESHOLD_=34359738368 MALLOC_TRIM_THRESHOLD_=34359738368 MALLOC_ARENA_MAX=1 \\
        python benchmarks/trainer_overhead.py --threads 1
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

import localize
from localize import zoo
from localize.runtime.devices import choose_device
from localize.train import TrainConfig, data, optimizers, passes

BAR = 0.97
"""The least share of the bare loop's speed that is wanted."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cifar/resnet20", metavar="NAME", help="default cifar/resnet20")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="default 64")
    parser.add_argument("--size", type=int, default=32, metavar="N", help="pixels on a side (default 32)")
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="steps in a block (default 8)")
    parser.add_argument("--pairs", type=int, default=15, metavar="N", help="pairs of blocks (default 15)")
    parser.add_argument("--threads", type=int, default=None, metavar="N", help="threads of torch")
    parser.add_argument("--device", default="auto", help="default auto")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = choose_device(arguments.device)
    shape = (3, arguments.size, arguments.size)
    config = TrainConfig(arguments.model, batch_size=arguments.batch_size)
    splits = data.load("digits", shape)
    model = zoo.create_model(arguments.model, input_shape=shape)
    local = localize.transform(copy.deepcopy(model), "backprop", example_input=splits.train[[0, 1]][0]).to(device)
    blocks = {
        "bare": bare(model.to(device), splits, config, device, arguments.steps),
        "trainer": trainer(local, splits, config, device, arguments.steps),
    }
    ratios, speeds = [], {name: [] for name in blocks}
    for pair in range(arguments.pairs + 1):
        seconds = {}
        for name in sorted(blocks, reverse=pair % 2 == 1):
            started = time.perf_counter()
            blocks[name]()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name] = time.perf_counter() - started
        if pair > 0:  # the first one warms up
            ratios.append(seconds["bare"] / seconds["trainer"])
            for name, value in seconds.items():
                speeds[name].append(arguments.steps * arguments.batch_size / value)
    print(
        f"{arguments.model}, {shape}, batch {arguments.batch_size}, {device}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, {os.cpu_count()} cores, {arguments.pairs} pairs of {arguments.steps} steps"
    )
    for name, values in speeds.items():
        print(f"{name:<8} {statistics.median(values):>9.1f} images/s")
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"trainer / bare: median {middle:.3f}, quartiles {low:.3f} and {high:.3f}; wanted {BAR}")


def bare(
    model: torch.nn.Module, splits: data.DataSplits, config: TrainConfig, device: torch.device, steps: int
) -> Callable[[], None]:
    """Return a block of steps as a user would write them; the loss is read at the end of the block."""
    optimizer = torch.optim.SGD(
        model.parameters(), lr=config.lr, momentum=config.momentum, nesterov=True, weight_decay=config.weight_decay
    )
    batches = endless(splits, config, device)

    def block() -> None:
        model.train()
        total = torch.zeros((), device=device)
        for _ in range(steps):
            x, y = next(batches)
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            total += loss.detach()
        total.item()

    return block


def trainer(
    local: localize.LocalModel, splits: data.DataSplits, config: TrainConfig, device: torch.device, steps: int
) -> Callable[[], None]:
    """Return a block of steps by the trainer, as an epoch."""
    optimizer = optimizers.create_optimizer(local, config)
    batches = endless(splits, config, device)

    def block() -> None:
        few = (next(batches) for _ in range(steps))
        passes.train_epoch(local, optimizer, few, device, config, total=steps)

    return block


def endless(splits: data.DataSplits, config: TrainConfig, device: torch.device):
    """Yield training batches, pass after pass."""
    order = torch.Generator().manual_seed(0)
    loader = data.training_batches(splits.train, config.batch_size, generator=order, device=device)
    while True:
        yield from loader


if __name__ == "__main__":
    main()
