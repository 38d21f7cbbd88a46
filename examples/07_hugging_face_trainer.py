"""A local model in Hugging Face's Trainer: ``training_step`` is ``local.step``; loops, logs, checkpoints are its own.

``pip install "torch-localize[loops]"``, then ``python examples/07_hugging_face_trainer.py``. The Trainer steps its
optimizer after ``training_step``, where a local step has done so already: gradients are cleared in between, and what
has no gradient is not moved.

What works: one device, bf16, ``gradient_accumulation_steps``, ``max_grad_norm`` (of all gradients, or of each loss's
where a method updates after each segment), the Trainer's schedules, evaluation, and checkpoints, from which it goes on
(``resume_from_checkpoint``). What does not: several processes, and fp16, whose scaler the Trainer steps itself.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import localize
from localize import LocalModel
from localize.train import data


class LocalTrainer(Trainer):
    """Trains a local model on batches of ``images`` and ``labels``."""

    def __init__(
        self, local: LocalModel, args: TrainingArguments, optimizer: torch.optim.Optimizer, **more: Any
    ) -> None:
        if args.world_size > 1 or args.fp16:
            raise SystemExit("a local step runs in one process, in float32 or bfloat16")
        super().__init__(local, args, optimizers=(optimizer, None), data_collator=collate, **more)
        self.local, self.taken = local, 0
        if args.max_grad_norm:
            optimizer.register_step_pre_hook(self.clip)

    def clip(self, optimizer: torch.optim.Optimizer, *given: Any) -> None:
        clip_grad_norm_(self.local.parameters(), self.args.max_grad_norm)

    def training_step(self, model: LocalModel, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        inputs, several = self._prepare_inputs(inputs), self.current_gradient_accumulation_steps
        model.train()
        with self.compute_loss_context_manager():
            batch = (self.taken, several)
            result = model.step(inputs["images"], inputs["labels"], self.optimizer.optimizer, batch=batch)
        self.taken = (self.taken + 1) % several
        if self.taken == 0:
            model.zero_grad()  # what the Trainer steps next finds no gradient
        return torch.stack([loss.float() for loss in result.losses.values()]).mean() / several

    def prediction_step(
        self, model: LocalModel, inputs: dict[str, Tensor], *given: Any, **more: Any
    ) -> tuple[Tensor, ...]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            scores = model(inputs["images"])
        return F.cross_entropy(scores.float(), inputs["labels"]), scores, inputs["labels"]


def collate(items: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Return a batch: images (N, C, H, W) and class ids (N,)."""
    images, labels = zip(*items, strict=True)
    return {"images": torch.stack(images), "labels": torch.stack([torch.as_tensor(label) for label in labels])}


def accuracy(found: Any) -> dict[str, float]:
    """Return the share of right predictions."""
    return {"accuracy": float((found.predictions.argmax(1) == found.label_ids).mean())}


def trainer(local: LocalModel, train: Dataset, test: Dataset | None = None, **options: Any) -> LocalTrainer:
    """Return a Trainer of a local model; options are those of :class:`transformers.TrainingArguments`."""
    quiet = {"report_to": "none", "save_strategy": "no", "label_names": ["labels"], "remove_unused_columns": False}
    args = TrainingArguments(**{**quiet, **options})
    optimizer = torch.optim.SGD(local.param_groups(weight_decay=1e-4), lr=args.learning_rate, momentum=0.9)
    return LocalTrainer(local, args, optimizer, train_dataset=train, eval_dataset=test, compute_metrics=accuracy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    epochs = parser.parse_args().epochs

    torch.manual_seed(0)
    digits = data.load("digits", (3, 8, 8))
    model = localize.zoo.create_model("cifar/resnet20", digits.num_classes)
    local = localize.transform(model, "dcl", example_input=digits.train[:2][0])
    with tempfile.TemporaryDirectory() as folder:
        settings = {"learning_rate": 0.05, "per_device_train_batch_size": 64, "logging_strategy": "epoch"}
        trained = trainer(local, digits.train, digits.test, output_dir=folder, num_train_epochs=epochs, **settings)
        trained.train()
        print(f"after {epochs} epochs: {trained.evaluate()['eval_accuracy']:.3f}")


if __name__ == "__main__":
    main()
