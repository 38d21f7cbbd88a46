"""Every example runs, prints what its header says, and trains as a plain loop does, bit for bit."""

from __future__ import annotations

import copy
import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import localize
from localize import LocalModel, zoo
from localize.train import data

EXAMPLES = Path(__file__).parent.parent / "examples"
Start = Callable[..., str]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Start:
    """Run an example as a program; return what it prints."""

    def call(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return call


def losses(printed: str) -> list[float]:
    return [float(found) for found in re.findall(r"(?i)loss:? (\d+\.\d+)", printed)]


@pytest.fixture
def loader() -> DataLoader:
    """Six batches of 16 images of digits, in a fixed order."""
    return DataLoader(TensorDataset(*data.load("digits", (3, 8, 8)).train[:96]), batch_size=16)


def small(method: str, **options: Any) -> LocalModel:
    torch.manual_seed(0)
    model = zoo.create_model("cifar/resnet20")
    cut = localize.CutSpec(segments=3)
    return localize.transform(model, method, example_input=torch.zeros(2, 3, 8, 8), cut=cut, **options)


def plain_loop(local: LocalModel, loader: DataLoader, epochs: int = 1) -> dict[str, torch.Tensor]:
    """Train a copy in a plain loop; return its state."""
    local = copy.deepcopy(local)
    optimizer = torch.optim.SGD(local.param_groups(weight_decay=1e-4), lr=0.05, momentum=0.9)
    local.train()
    for _ in range(epochs):
        for x, y in loader:
            local.step(x, y, optimizer)
    return local.state_dict()


def assert_same(local: LocalModel, expected: dict[str, torch.Tensor]) -> None:
    for name, value in local.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_a_plain_loop_trains_audits_and_exports(start: Start) -> None:
    printed = start("01_train_digits.py", "--smoke")

    assert "epoch 0: loss" in printed
    assert "audit: all checks hold" in printed
    assert "exported: CifarResNet with 272474 parameters, original keys" in printed


def test_the_smallest_loop_trains_the_model_itself(start: Start) -> None:
    printed = start("02_plain_loop.py", "--epochs", "1")

    (last,) = losses(printed)
    assert last < 1  # from ln 10
    assert "the model itself is trained: CifarResNet, test accuracy" in printed


def test_a_checkpoint_is_fine_tuned_under_its_own_keys(start: Start, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = zoo.create_model("timm/test_resnet", 5)
    local = localize.transform(model, "dcl", example_input=torch.zeros(2, 3, 16, 16))
    images, labels = data.load("digits", (3, 16, 16)).train[:64]
    local.step(images, labels // 2, torch.optim.SGD(local.param_groups(), lr=0.1))
    torch.save({"state_dict": model.state_dict()}, tmp_path / "trained.pt")

    arguments = ("--size", "16", "--segments", "2", "--epochs", "2", "-o", str(tmp_path / "tuned.pt"))
    printed = start(
        "03_finetune_pretrained.py", "timm/test_resnet", "--initial-checkpoint", f"{tmp_path}/trained.pt", *arguments
    )

    assert "the classifier of 5 classes left out, fc.weight, fc.bias drawn again" in printed
    first, second = losses(printed)
    assert second < first
    tuned = zoo.create_model("timm/test_resnet", 10)
    tuned.load_state_dict(torch.load(tmp_path / "tuned.pt", weights_only=True), strict=True)
    before, after = model.conv1[0].weight, tuned.conv1[0].weight
    assert 0 < (after - before).norm() < 0.5 * before.norm()  # not drawn again: tuned


def test_timms_loop_trains_as_a_plain_one(loader: DataLoader) -> None:
    timm_loop = runpy.run_path(str(EXAMPLES / "04_timm_loop.py"))
    local = small("dcl")
    expected = plain_loop(local, loader, 2)
    optimizer = timm_loop["create_optimizer_v2"](
        local.param_groups(weight_decay=1e-4), opt="momentum", lr=0.05, momentum=0.9
    )

    first, second = (timm_loop["train_one_epoch"](local, loader, optimizer) for _ in range(2))

    assert_same(local, expected)
    assert second < first


@pytest.mark.parametrize("mixes", [True, False], ids=["mixup", "smoothing"])
def test_timms_recipe_trains_to_the_weights_of_a_loop_that_has_no_step(loader: DataLoader, mixes: bool) -> None:
    """Mixup and CutMix with smoothing, or smoothing alone; bfloat16, EMA, AdamW without decay of norms, clipping."""
    timm_loop = runpy.run_path(str(EXAMPLES / "04_timm_loop.py"))
    local = small("auglocal", loss={} if mixes else {"smoothing": 0.1})
    other = copy.deepcopy(local)
    names = [segment.name for segment in other.plan.segments.segments]
    losses: list[float] = []
    averages = [timm_loop["ModelEmaV3"](one.export(), decay=0.9) for one in (local, other)]
    settings = {"opt": "adamw", "lr": 0.01, "weight_decay": 0.05}
    optimizers = [timm_loop["create_optimizer_v2"](one, **settings) for one in (local, other)]

    def clip(*given: object) -> None:
        nn.utils.clip_grad_norm_(local.parameters(), 1.0)

    def mixup() -> Any:
        np.random.seed(0)
        return timm_loop["Mixup"](0.2, 1.0, label_smoothing=0.1, num_classes=10) if mixes else None

    optimizers[0].register_step_pre_hook(clip)
    mean = timm_loop["train_one_epoch"](
        local, loader, optimizers[0], mixup_fn=mixup(), model_ema=averages[0], amp_dtype=torch.bfloat16
    )
    mixup_fn = mixup()
    other.train()
    for x, y in loader:
        x, y = mixup_fn(x, y) if mixes else (x, y)
        optimizers[1].zero_grad()
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            h = x
            for k, name in enumerate(names):
                h = other.functions_of_text[name](other.trunk, h.detach())
                scores = other.heads[f"head_{k}"](h) if k < len(names) - 1 else h
                loss = nn.functional.cross_entropy(scores, y, label_smoothing=0.0 if mixes else 0.1)
                theirs = SoftTargetCrossEntropy() if mixes else LabelSmoothingCrossEntropy(0.1)
                torch.testing.assert_close(loss, theirs(scores.float(), y), rtol=1e-5, atol=1e-5)
                loss.backward()
        losses.append(loss.item())
        nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        optimizers[1].step()
        averages[1].update(other.export())

    assert_same(local, other.state_dict())
    for name, value in averages[0].module.state_dict().items():
        assert torch.equal(value, averages[1].module.state_dict()[name]), name
        assert value.dim() == 0 or not torch.equal(value, local.export().state_dict()[name]), name
    assert mean == pytest.approx(sum(losses) / len(losses))
    assert {group["weight_decay"] for group in optimizers[0].param_groups} == {0.0, 0.05}


def test_timms_loop_sets_learning_rates_by_timms_scheduler(start: Start) -> None:
    printed = start("04_timm_loop.py", "--epochs", "1", "--clip-grad", "1")
    assert re.search(r"Train: 0 Loss: \d.\d+  Test: Loss: \d.\d+ Acc@1: \d+.\d+  Test \(EMA\): Acc@1: \d+", printed)


@pytest.mark.filterwarnings("ignore")  # of Lightning, about loaders, and of what it imports
@pytest.mark.parametrize("method", ["dcl", "ll-pred"])  # one update behind all losses, and one behind each
def test_lightning_trains_as_a_plain_loop(loader: DataLoader, method: str) -> None:
    pytest.importorskip("lightning")
    fit = runpy.run_path(str(EXAMPLES / "05_lightning.py"))["fit"]
    local = small(method)
    expected = plain_loop(local, loader, 2)

    quiet = {"accelerator": "cpu", "enable_progress_bar": False}
    trainer = fit(local, loader, max_epochs=2, **quiet)

    assert_same(local, expected)
    assert trainer.global_step == 12 * (1 if local.plan.update == "end" else len(local.plan.losses))
    assert set(trainer.callback_metrics) == {loss.name for loss in local.plan.losses}


@pytest.mark.filterwarnings("ignore")
def test_lightning_hands_a_step_several_optimizers(loader: DataLoader) -> None:
    lightning = pytest.importorskip("lightning")
    module = runpy.run_path(str(EXAMPLES / "05_lightning.py"))["LocalModule"]
    local = small("dcl")
    expected = plain_loop(local, loader, 2)

    class Several(module):
        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            groups = self.local.param_groups(by="block", weight_decay=1e-4)
            return [torch.optim.SGD([group], lr=self.lr, momentum=0.9) for group in groups]

    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    lightning.Trainer(max_epochs=2, accelerator="cpu", **quiet).fit(Several(local, lr=0.05), loader)

    assert_same(local, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["dcl", "ll-pred"])
def test_accelerate_trains_as_a_plain_loop(loader: DataLoader, method: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    train = runpy.run_path(str(EXAMPLES / "06_accelerate.py"))["train"]
    local = small(method)
    expected = plain_loop(local, loader, 2)

    first, second = train(local, loader, 2, accelerate.Accelerator(cpu=True))

    assert_same(local, expected)
    assert second < first


def linear(
    local: LocalModel, loader: DataLoader, epochs: int, *, norm: float = 0.0, several: int = 1
) -> dict[str, Any]:
    """Train a copy in a plain loop with a learning rate that falls to 0; return its state."""
    local = copy.deepcopy(local)
    optimizer = torch.optim.SGD(local.param_groups(weight_decay=1e-4), lr=0.05, momentum=0.9)
    if norm:
        optimizer.register_step_pre_hook(lambda *given: nn.utils.clip_grad_norm_(local.parameters(), norm) and None)
    total = epochs * (len(loader) // several)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (total - step) / total)
    local.train()
    for _ in range(epochs):
        for i, (x, y) in enumerate(loader):
            local.step(x, y, optimizer, batch=(i % several, several))
            if (i + 1) % several == 0:
                scheduler.step()
    return local.state_dict()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("method", "norm", "several"), [("dcl", 0.0, 1), ("ll-pred", 0.1, 1), ("auglocal", 0.1, 2), ("dcl", 0.0, 3)]
)
def test_hugging_face_s_trainer_trains_as_a_plain_loop(
    loader: DataLoader, tmp_path: Path, method: str, norm: float, several: int
) -> None:
    pytest.importorskip("transformers")
    example = runpy.run_path(str(EXAMPLES / "07_hugging_face_trainer.py"))
    local = small(method)
    expected = linear(local, loader, 2, norm=norm, several=several)

    trainer = example["trainer"](
        local, loader.dataset, loader.dataset, output_dir=str(tmp_path), num_train_epochs=2, learning_rate=0.05,
        per_device_train_batch_size=16, train_sampling_strategy="sequential", use_cpu=True, disable_tqdm=True,
        max_grad_norm=norm, gradient_accumulation_steps=several,
    )  # fmt: skip
    trainer.train()

    assert_same(local, expected)
    assert trainer.state.global_step == 12 // several
    assert 0 < trainer.evaluate()["eval_accuracy"] <= 1


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_s_trainer_goes_on_from_its_checkpoints(loader: DataLoader, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    example = runpy.run_path(str(EXAMPLES / "07_hugging_face_trainer.py"))
    options = {
        "output_dir": str(tmp_path), "num_train_epochs": 2, "learning_rate": 0.05, "per_device_train_batch_size": 16,
        "train_sampling_strategy": "sequential", "use_cpu": True, "disable_tqdm": True, "save_strategy": "epoch",
    }  # fmt: skip
    local, again = small("dcl"), small("dcl")
    example["trainer"](local, loader.dataset, **options).train()

    example["trainer"](again, loader.dataset, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))

    assert_same(again, local.state_dict())


def coco(folder: Path) -> Path:
    """Write two images of squares, and a file of annotations in COCO's format with a polygon for each; return it."""
    annotations, images = [], []
    for number in (7, 9):
        picture = Image.new("RGB", (64, 48), (20, 30, 40))
        ImageDraw.Draw(picture).rectangle((10, 12, 33, 35), fill=(200, 180, 90))
        picture.save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": 48, "width": 64})
        square = [10, 12, 33, 12, 33, 35, 10, 35]
        one = {"image_id": number, "category_id": 3 if number == 7 else 44, "bbox": [10, 12, 24, 24], "iscrowd": 0}
        annotations.append({"id": number, "segmentation": [square], "area": 576, **one})
    annotations.append({**annotations[0], "id": 1, "iscrowd": 1, "segmentation": {"counts": [1], "size": [48, 64]}})
    categories = [{"id": 3, "name": "square"}, {"id": 44, "name": "other square"}]
    told = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(told))
    return folder / "instances.json"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_backbone_that_was_trained_locally_is_taken_into_mask_r_cnn(start: Start, tmp_path: Path) -> None:
    from localize import train

    run, annotations = tmp_path / "run", coco(tmp_path)
    train.run(
        train.TrainConfig(
            "tv/resnet18", recipe="dgl", cut=localize.CutSpec(4), input_shape=(3, 32, 32), data="digits", epochs=1,
            max_steps=1, batch_size=4, device="cpu", output=str(run),
        )
    )  # fmt: skip

    words = (str(run), "--images", str(tmp_path), "--annotations", str(annotations), "-o", str(tmp_path / "net.pt"))
    printed = start("08_mask_rcnn.py", *words, "--epochs", "1", "-b", "2", "--size", "64")

    (loss,) = map(float, re.findall(r"^epoch 1: loss (\S+)$", printed, re.M))
    assert 0 < loss < 100
    assert "backbone: ResNet, 11176512 parameters" in printed
    before = localize.load(run).model.state_dict()
    after = torch.load(tmp_path / "net.pt", weights_only=True)
    kept = {name.removeprefix("backbone.body."): value for name, value in after.items() if "body" in name}
    assert len(kept) > 100
    for name, value in kept.items():
        assert value.shape == before[name].shape
    moved = before["layer4.1.conv2.weight"] - kept["layer4.1.conv2.weight"]
    assert 0 < float(moved.norm()) < 0.5 * float(before["layer4.1.conv2.weight"].norm())


def test_objects_are_read_from_cocos_format(tmp_path: Path) -> None:
    example = runpy.run_path(str(EXAMPLES / "08_mask_rcnn.py"))
    data = example["CocoInstances"](tmp_path, coco(tmp_path))
    (_, first), (_, second) = data[0], data[1]
    assert len(data) == 2
    assert first["boxes"].tolist() == [[10.0, 12.0, 34.0, 36.0]]
    assert (first["labels"].tolist(), second["labels"].tolist()) == ([1], [2])
    assert first["masks"].shape == (1, 48, 64)
    assert int(first["masks"].sum()) == 24 * 24
    assert first["masks"][0, 12, 10] == 1
    assert first["masks"][0, 11, 10] == 0
