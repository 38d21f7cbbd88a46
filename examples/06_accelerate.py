"""A local model with Hugging Face Accelerate: devices, loaders and mixed precision, around ``local.step``.

``pip install "torch-localize[loops]"``, then ``python examples/06_accelerate.py``. ``accelerator.prepare`` takes the
loader and the optimizer, and may take the local model; ``local.step`` stands where forward, ``accelerator.backward``
and ``optimizer.step`` would.

What works: one device, and bf16, if the step runs under ``accelerator.autocast()`` (what ``prepare`` wraps is the
model's forward, which a step does not call). A hook of the optimizer clips (docs/loops.md), instead of
``accelerator.clip_grad_norm_``, and ``batch=`` of ``local.step`` accumulates, instead of ``accelerator.accumulate``.
What does not work: several processes (a prepared model is wrapped in DistributedDataParallel, which has no ``step`` and
would not see its backwards), and fp16 (its scaler would divide gradients that the step has not multiplied).
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

import localize
from localize import LocalModel
from localize.train import data


def train(local: LocalModel, loader: DataLoader, epochs: int, accelerator: Accelerator) -> list[float]:
    """Train, and return the mean of the local losses of every epoch."""
    if accelerator.num_processes > 1 or accelerator.mixed_precision == "fp16":
        raise SystemExit("a local step runs in one process, in float32 or bfloat16")
    local.to(accelerator.device)
    optimizer = torch.optim.SGD(local.param_groups(weight_decay=1e-4), lr=0.05, momentum=0.9)
    optimizer, loader = accelerator.prepare(optimizer, loader)
    means = []
    for _ in range(epochs):
        local.train()
        losses = []
        for x, y in loader:
            with accelerator.autocast():
                result = local.step(x, y, optimizer)
            losses.append(torch.stack(list(result.losses.values())).mean())
        means.append(float(torch.stack(losses).mean()))
        accelerator.print(f"loss {means[-1]:.3f}")
    return means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="no")
    arguments = parser.parse_args()

    accelerator = Accelerator(mixed_precision=arguments.mixed_precision)
    torch.manual_seed(0)
    digits = data.load("digits", (3, 8, 8))
    model = localize.zoo.create_model("cifar/resnet20", digits.num_classes)
    local = localize.transform(model, "dcl", example_input=digits.train[:2][0])
    loader = DataLoader(digits.train, batch_size=64, shuffle=True, drop_last=True)
    train(local, loader, arguments.epochs, accelerator)

    images, labels = (tensor.to(accelerator.device) for tensor in digits.test[:])
    with torch.no_grad():
        accuracy = (local.eval()(images).argmax(1) == labels).float().mean()
    accelerator.print(f"test accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
