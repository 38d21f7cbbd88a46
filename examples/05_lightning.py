"""A local model in PyTorch Lightning: a LightningModule with manual optimization.

``pip install "torch-localize[loops]"``, then ``python examples/05_lightning.py``. ``local.step`` does its own
backwards, so ``automatic_optimization`` is off, and ``training_step`` is that call; devices, loops, logging,
checkpoints and callbacks are Lightning's.

What works: one device, ``precision="32-true"`` and ``"bf16-mixed"``, learning rate schedulers stepped by hand, several
optimizers, and any method. Where a method updates after each segment, ``global_step`` counts each of those updates.
Clipping and accumulation are options of automatic optimization; here a hook of the optimizer clips (docs/loops.md), and
``batch=`` of ``local.step`` accumulates. What does not work: DDP and FSDP (gradients are synchronised around
Lightning's own backward), and fp16 (its scaler would divide gradients that the step has not multiplied).
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import localize
from localize import LocalModel
from localize.train import data


class LocalModule(lightning.LightningModule):
    """Trains a local model; its losses are logged by their names."""

    def __init__(self, local: LocalModel, lr: float) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.local, self.lr = local, lr

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.trainer.world_size > 1 or self.trainer.precision == "16-mixed":
            raise SystemExit("a local step runs on one device, in float32 or bfloat16")
        return torch.optim.SGD(self.local.param_groups(weight_decay=1e-4), lr=self.lr, momentum=0.9)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        x, y = batch
        result = self.local.step(x, y, self.optimizers())
        self.log_dict(result.losses, on_step=False, on_epoch=True)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        x, y = batch
        self.log("accuracy", (self.local(x).argmax(1) == y).float().mean(), prog_bar=True)


def fit(local: LocalModel, loader: DataLoader, test: DataLoader | None = None, **options: Any) -> lightning.Trainer:
    """Train a local model with a Trainer of these options."""
    trainer = lightning.Trainer(logger=False, enable_checkpointing=False, enable_model_summary=False, **options)
    trainer.fit(LocalModule(local, lr=0.05), loader, test)
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    epochs = parser.parse_args().epochs

    lightning.seed_everything(0)
    digits = data.load("digits", (3, 8, 8))
    model = localize.zoo.create_model("cifar/resnet20", digits.num_classes)
    local = localize.transform(model, "dcl", example_input=digits.train[:2][0])
    loader = DataLoader(digits.train, batch_size=64, shuffle=True, drop_last=True)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    trainer = fit(local, loader, DataLoader(digits.test, batch_size=128), max_epochs=epochs)
    metrics = {name: round(float(value), 3) for name, value in trainer.callback_metrics.items()}
    print(f"after {epochs} epochs: {metrics}")


if __name__ == "__main__":
    main()
