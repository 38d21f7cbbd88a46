"""The shape of timm's train.py around ``local.step``: its optimizers, schedulers, meters and accuracy.

``timm.optim.create_optimizer_v2`` takes the local model as it takes any (and leaves biases and norms without weight
decay), ``timm.scheduler`` sets the learning rates, ``timm.utils`` counts. What changes in timm's ``train_one_epoch`` is
one call: ``output = model(input); loss = loss_fn(output, target); ... optimizer.step()`` becomes ``local.step``.

What does not carry over: ``loss_fn`` (the method's losses are in the text of the step), mixup (targets are class ids),
and timm's ``NativeScaler``, which calls backward; ``local.step`` does its backwards itself, and takes ``batch=`` for
``--grad-accum-steps`` and ``scaler=`` for fp16 (a ``torch.amp.GradScaler``). Run it with
``python examples/04_timm_loop.py``; it prints a line for every epoch, as timm does.
"""

from __future__ import annotations

import argparse

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, accuracy, random_seed
from torch.utils.data import DataLoader

import localize
from localize import LocalModel
from localize.train import data


def train_one_epoch(local: LocalModel, loader: DataLoader, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Train on every batch; return the means of the loss at the output and of the top-1 accuracy (percent)."""
    losses, top1 = AverageMeter(), AverageMeter()
    local.train()
    for x, y in loader:
        result = local.step(x, y, optimizer)
        (acc1,) = accuracy(result.logits, y, topk=(1,))
        losses.update(list(result.losses.values())[-1].item(), len(x))
        top1.update(acc1.item(), len(x))
    return {"loss": losses.avg, "top1": top1.avg}


@torch.no_grad()
def validate(model: torch.nn.Module, loader: DataLoader) -> dict[str, float]:
    """Return the means of cross-entropy and of the top-1 accuracy (percent) of the plain model."""
    losses, top1 = AverageMeter(), AverageMeter()
    model.eval()
    for x, y in loader:
        output = model(x)
        (acc1,) = accuracy(output, y, topk=(1,))
        losses.update(torch.nn.functional.cross_entropy(output, y).item(), len(x))
        top1.update(acc1.item(), len(x))
    return {"loss": losses.avg, "top1": top1.avg}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="timm/test_resnet")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--opt", default="adamw")
    parser.add_argument("--lr", type=float, default=2e-3)
    arguments = parser.parse_args()

    random_seed(0)
    digits = data.load("digits", (3, 16, 16))
    loader = DataLoader(digits.train, batch_size=64, shuffle=True, drop_last=True)
    model = localize.zoo.create_model(arguments.model, digits.num_classes, input_shape=(3, 16, 16))
    local = localize.transform(model, "dcl", example_input=digits.train[:2][0])

    optimizer = create_optimizer_v2(local, opt=arguments.opt, lr=arguments.lr, weight_decay=0.05)
    scheduler, epochs = create_scheduler_v2(optimizer, sched="cosine", num_epochs=arguments.epochs, min_lr=1e-5)
    for epoch in range(epochs):
        trained = train_one_epoch(local, loader, optimizer)
        tested = validate(local.export(), DataLoader(digits.test, batch_size=128))
        scheduler.step(epoch + 1, tested["top1"])
        print(f"Train: {epoch} Loss: {trained['loss']:.3f} Acc@1: {trained['top1']:.2f}", end="  ")
        print(f"Test: Loss: {tested['loss']:.3f} Acc@1: {tested['top1']:.2f}")


if __name__ == "__main__":
    main()
