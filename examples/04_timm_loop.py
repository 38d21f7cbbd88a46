"""timm's train.py around ``local.step``: its optimizers, schedulers, mixup, smoothing, EMA, AMP, clipping and meters.

``timm.optim.create_optimizer_v2`` takes the local model as it takes any (and leaves biases and norms without weight
decay), ``timm.scheduler`` sets the learning rates, ``timm.data.Mixup`` mixes images and makes soft labels (with the
smoothing in them), ``timm.utils.ModelEmaV3`` averages the weights. What changes in timm's ``train_one_epoch`` is one
call: ``output = model(input); loss = loss_fn(output, target); ... optimizer.step()`` becomes ``local.step``.

What does not carry over: ``loss_fn``, since the losses are in the text of the step (without mixup, smoothing is said to
``localize.transform``), and timm's ``NativeScaler``, which calls backward. ``local.step`` does its backwards itself: it
takes ``scaler=`` (a ``torch.amp.GradScaler``) for fp16 and ``batch=`` for ``--grad-accum-steps``, and a hook of the
optimizer clips. Run it with ``python examples/04_timm_loop.py``; it prints a line for every epoch, as timm does.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3, accuracy, random_seed
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader

import localize
from localize import LocalModel
from localize.train import data


def train_one_epoch(
    local: LocalModel,
    loader: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    *,
    mixup_fn: Mixup | None = None,
    model_ema: ModelEmaV3 | None = None,
    amp_dtype: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> float:
    """Train on every batch; return the mean of the loss at the output."""
    losses = AverageMeter()
    local.train()
    for x, y in loader:
        if mixup_fn is not None:
            x, y = mixup_fn(x, y)  # y: soft labels (N, Z)
        with torch.autocast(x.device.type, amp_dtype) if amp_dtype else nullcontext():
            result = local.step(x, y, optimizer, scaler=scaler)
        if model_ema is not None:
            model_ema.update(local.export())
        losses.update(list(result.losses.values())[-1].item(), len(x))
    return losses.avg


@torch.no_grad()
def validate(model: nn.Module, loader: DataLoader) -> dict[str, float]:
    """Return the means of cross-entropy and of the top-1 accuracy (percent) of the plain model."""
    losses, top1 = AverageMeter(), AverageMeter()
    model.eval()
    for x, y in loader:
        output = model(x)
        (acc1,) = accuracy(output, y, topk=(1,))
        losses.update(F.cross_entropy(output, y).item(), len(x))
        top1.update(acc1.item(), len(x))
    return {"loss": losses.avg, "top1": top1.avg}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="timm/test_resnet")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--opt", default="adamw")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--mixup", type=float, default=0.2)
    parser.add_argument("--cutmix", type=float, default=0.0)
    parser.add_argument("--smoothing", type=float, default=0.1)
    parser.add_argument("--clip-grad", type=float)
    parser.add_argument("--model-ema-decay", type=float, default=0.95)
    parser.add_argument("--amp", action="store_true")
    parser.add_argument("--amp-dtype", choices=("bfloat16", "float16"), default="bfloat16")
    arguments = parser.parse_args()

    random_seed(0)
    digits = data.load("digits", (3, 16, 16))
    loader = DataLoader(digits.train, batch_size=64, shuffle=True, drop_last=True)
    model = localize.zoo.create_model(arguments.model, digits.num_classes, input_shape=(3, 16, 16))
    mixes = arguments.mixup > 0 or arguments.cutmix > 0
    mixup_fn, loss = None, {"smoothing": arguments.smoothing}
    if mixes:
        smoothing = {"label_smoothing": arguments.smoothing, "num_classes": digits.num_classes}
        mixup_fn, loss = Mixup(arguments.mixup, arguments.cutmix, **smoothing), {}
    scales = arguments.amp and arguments.amp_dtype == "float16"
    example = digits.train[:2][0]
    local = localize.transform(model, "dcl", example_input=example, loss=loss, loss_scaling=scales)

    optimizer = create_optimizer_v2(local, opt=arguments.opt, lr=arguments.lr, weight_decay=0.05)
    if arguments.clip_grad is not None:

        def clip(*given: object) -> None:
            clip_grad_norm_(local.parameters(), arguments.clip_grad)

        optimizer.register_step_pre_hook(clip)
    scheduler, epochs = create_scheduler_v2(optimizer, sched="cosine", num_epochs=arguments.epochs, min_lr=1e-5)
    model_ema = ModelEmaV3(model, decay=arguments.model_ema_decay)
    settings = {
        "mixup_fn": mixup_fn,
        "model_ema": model_ema,
        "amp_dtype": getattr(torch, arguments.amp_dtype) if arguments.amp else None,
        "scaler": torch.amp.GradScaler("cpu") if scales else None,
    }
    tests = DataLoader(digits.test, batch_size=128)
    for epoch in range(epochs):
        trained = train_one_epoch(local, loader, optimizer, **settings)
        tested, averaged = validate(local.export(), tests), validate(model_ema.module, tests)
        scheduler.step(epoch + 1, tested["top1"])
        print(f"Train: {epoch} Loss: {trained:.3f}  Test: Loss: {tested['loss']:.3f}", end=" ")
        print(f"Acc@1: {tested['top1']:.2f}  Test (EMA): Acc@1: {averaged['top1']:.2f}")


if __name__ == "__main__":
    main()
