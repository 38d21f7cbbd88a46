"""Data sets, augmentations, optimizers, schedules and callbacks of the user's, in runs and resumed runs."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.scheduler import create_scheduler_v2

from localize import train
from localize.errors import LocalizeError
from localize.recipes import trust
from localize.recipes.settings import TrainConfig
from localize.train import data, runs
from localize.train.data import transforms
from localize.train.schedules import learning_rate

CODE = """
import numpy, random, torch
from torch import nn
from torch.utils.data import Dataset
from PIL import Image
from torchvision.transforms import v2

def net(num_classes=3):
    hidden = [nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(8, num_classes))
net.input_shape, net.num_classes = (3, 4, 4), 3

def tensors():
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(24, 3, 4, 4, generator=g), torch.arange(24) % 3
    x[:, 0] += y[:, None, None]
    return (x / 3, y), (x[:6] / 3, y[:6])
tensors.classes = ("cat", "dog", "cow")

def arrays(folder):
    x = numpy.fromfile(folder / "x.bin", dtype=numpy.uint8).reshape(12, 3, 4, 4)
    return (x, numpy.arange(12) % 3), (x[:6], numpy.arange(6) % 3)

class Pictures(Dataset):
    classes = ["a", "b", "c"]
    def __init__(self, count, sizes=((4, 4),)):
        self.count, self.sizes = count, sizes
    def __len__(self):
        return self.count
    def __getitem__(self, index):
        return Image.new("RGB", self.sizes[index % len(self.sizes)], (index * 9, 5 + index, 80 - index)), index % 3

def pictures():
    return Pictures(12), Pictures(6)

def ragged():
    return Pictures(12, ((4, 4), (5, 4))), Pictures(6)

def broken():
    raise KeyError("no such file")

def one_part():
    return tensors()[0]

def floats():
    (x, y), test = tensors()
    return (x * 255, y), test

def negative():
    (x, y), test = tensors()
    return (x, y - 1), test

def labels_as_floats():
    (x, y), test = tensors()
    return (x, y.float()), test

def not_a_number():
    (x, y), test = tensors()
    return (x / 0 * 0, y), test

def channels_last():
    (x, y), test = tensors()
    return (x.permute(0, 2, 3, 1).repeat(1, 2, 1, 1), y), test

def listed():
    return tuple((x.numpy(), y.tolist()) for x, y in tensors())

def items(image=None, label=1):
    image = torch.rand(3, 4, 4) if image is None else image
    return [(image, label)] * 4, [(image, label)] * 2

def names(): return items(label="cat")
def soft(): return items(label=torch.rand(3))
def fractions(): return items(label=1.7)
def texts(): return items("a.png")
def dicts(): return [{"image": torch.rand(3, 4, 4), "label": 1}], [{"image": torch.rand(3, 4, 4), "label": 1}]
def splits(): return {"train": Pictures(12), "test": Pictures(6)}
def three(): return Pictures(12), Pictures(6), Pictures(6)
def nothing_at_all(): return None
def in_arrays(): return items(label=numpy.array([1]))

class Lost(Pictures):
    def __getitem__(self, index):
        raise OSError("gone")
def lost(): return Lost(3), Lost(3)

number = 3

def shake(image):
    assert image.shape[0] == 3
    if random.random() + numpy.random.rand() < 1:
        image = image.flip(-1)
    return image[:, :, torch.randperm(image.shape[-1])]

crop = v2.RandomResizedCrop(4)
Flip = v2.RandomHorizontalFlip

def wrong(image):
    return image.float().mean(0)

class Needs:
    def __init__(self, p): pass

def opt(params, lr, momentum):
    return torch.optim.SGD(params, lr=lr / 2, momentum=momentum)

def opt_strict(params, betas):
    return torch.optim.Adam(params, betas=betas)

def not_opt(params):
    return 3

def sched(epoch, epochs, lr):
    return lr * 0.5 ** (epoch - 1)

def sched_text(epoch, epochs, lr):
    return "fast"

def sched_raises(epoch, epochs, lr):
    return lr / (epoch - 1)

class Watch:
    def after_step(self, step):
        with open("told.txt", "a") as file:
            print("step", step.epoch, step.step, round(sum(float(v) for v in step.losses.values()), 4), file=file)
    def after_epoch(self, metrics, local):
        with open("told.txt", "a") as file:
            print("epoch", metrics["epoch"], type(local).__name__, file=file)
    def after_run(self, folder, metrics, local):
        with open("told.txt", "a") as file:
            print("run", folder.name, len(metrics), file=file)

class Mute:
    pass
"""


@pytest.fixture(autouse=True)
def _code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(CODE)
    sys.modules.pop("localize_file_own", None)


def config(**settings: object) -> TrainConfig:
    given = {"recipe": "dcl", "data": "own.py:tensors", "batch_size": 8, "epochs": 2, "lr": 0.1, "device": "cpu"}
    return TrainConfig("own.py:net", **(given | settings))  # type: ignore[arg-type]


def weights(folder: str) -> bytes:
    return (Path(folder) / runs.BACKBONE).read_bytes()


# -------------------------------------------------------------------------------------------------------------- data


def test_a_run_on_tensors_of_ones_own_knows_its_classes_and_goes_on_from_its_folder() -> None:
    done = train.run(config(output="run"))

    recipe = runs.recipe_of(Path("run"), trust_code=False)
    assert recipe.dataset is not None
    assert recipe.dataset.classes == ("cat", "dog", "cow")
    assert recipe.num_classes == 3
    assert [line["epoch"] for line in done.metrics] == [1, 2]
    assert len(train.resume("run", epochs=3).metrics) == 3


@pytest.mark.parametrize("name", ["arrays", "pictures"])
def test_arrays_and_data_sets_of_pictures_are_read(name: str) -> None:
    Path("set").mkdir()
    Path("set/x.bin").write_bytes(bytes(range(192)) * 3)
    folder = "set" if name == "arrays" else None

    splits = data.load(f"own.py:{name}", (3, 4, 4), data_dir=folder)

    assert (len(splits.train), len(splits.test), splits.num_classes) == (12, 6, 3)
    assert splits.classes == (("a", "b", "c") if name == "pictures" else ("0", "1", "2"))
    x, y = splits.train[[1]]
    raw = torch.tensor([9.0, 6.0, 79.0]) / 255
    if name == "pictures":
        assert torch.allclose(x[0, :, 0, 0], (raw - torch.tensor(splits.mean)) / torch.tensor(splits.std), atol=1e-5)
    assert y.tolist() == [1]


def test_a_folder_is_taken_before_code_of_its_name(tmp_path: Path) -> None:
    for part, label in [(part, label) for part in ("train", "val") for label in ("a", "b")]:
        folder = tmp_path / "own.py:tensors" / part / label
        folder.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(folder / "0.png")
    assert data.place("own.py:tensors") == ("folder", "own.py:tensors")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("own.py:nothing", "defines no 'nothing'"),
        ("own.py:number", "is of type int, not a function that returns images"),
        ("own.py:broken", "cannot be read.*KeyError: 'no such file'"),
        ("own.py:one_part", "training part .* is of type Tensor"),
        ("own.py:ragged", "differ in size.*starts with 3x4x4, but image 1 is 3x4x5"),
        ("own.py:floats", "floats must be 0..1"),
        ("own.py:negative", "a class id is -1, but class ids start at 0"),
        ("own.py:labels_as_floats", "class ids are float32"),
        ("own.py:not_a_number", "pixels range from nan to nan"),
        ("own.py:channels_last", "with channels last, not"),
        ("own.py:names", "item 0 of the training part .*'str' object.*class id, which is a whole number"),
        ("own.py:soft", "item 0 of the training part .*class id, which is a whole number"),
        ("own.py:fractions", "item 0 of the training part .*'float' object"),
        ("own.py:texts", "item 0 of the training part .*each item must be a pair"),
        ("own.py:dicts", "item 0 of the training part .*each item must be a pair"),
        ("own.py:lost", "item 0 of the training part .*OSError: gone"),
        ("own.py:splits", "returns dict, not two parts"),
        ("own.py:three", "returns 3 parts, not two parts"),
        ("own.py:nothing_at_all", "returns NoneType, not two parts"),
        ("own.py:Pictures", "cannot be read.*count"),
        ("own.py:number", "is of type int, not a function"),
    ],
)
def test_what_is_no_data_set_is_refused(name: str, words: str) -> None:
    with pytest.raises(LocalizeError) as caught:
        data.load(name, (3, 4, 4))
    told = " ".join(str(caught.value).split())
    assert re.search(words, told), told


@pytest.mark.parametrize("name", ["own.py:listed", "own.py:in_arrays"])
def test_class_ids_may_be_a_list_or_arrays_of_one(name: str) -> None:
    splits = data.load(name, (3, 4, 4))
    assert splits.train[[1]][1].tolist() == [1]


def test_a_folder_that_no_argument_takes_is_refused() -> None:
    with pytest.raises(LocalizeError, match="takes no folder"):
        data.load("own.py:tensors", (3, 4, 4), data_dir="set")


# ----------------------------------------------------------------------------------------------------- augmentations


@pytest.mark.parametrize("name", ["own.py:shake", "own.py:crop", "own.py:Flip"])
def test_a_transform_of_ones_own_is_drawn_from_the_generator_alone(name: str) -> None:
    how, images = transforms.named(name), torch.rand(6, 3, 4, 4)
    before = torch.get_rng_state()

    first, again, other = (transforms.augment(images, how, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))

    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, images)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("augment", ["own.py:shake", "timm", "timm:rand-m7-inc1"])
def test_images_in_files_are_augmented_alike_by_any_number_of_workers(tmp_path: Path, augment: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for part, label in [(part, label) for part in ("train", "val") for label in ("a", "b")]:
        folder = tmp_path / "set" / part / label
        folder.mkdir(parents=True)
        for number in range(4):
            pixels = torch.randint(256, (8, 8, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    splits = data.load("folder", (3, 6, 6), data_dir=str(tmp_path / "set"), augment=augment)
    plain = data.load("folder", (3, 6, 6), data_dir=str(tmp_path / "set"), augment="none")

    def epoch(splits: data.DataSplits, workers: int) -> torch.Tensor:
        batches = data.training_batches(splits.train, 4, generator=torch.Generator().manual_seed(3), workers=workers)
        return torch.cat([x for x, _ in batches])

    assert epoch(splits, 0).shape == (8, 3, 6, 6)
    assert torch.equal(epoch(splits, 0), epoch(splits, 2))
    assert not torch.equal(epoch(splits, 0), epoch(plain, 0))


@pytest.mark.parametrize(
    ("augment", "words"),
    [
        ("own.py:wrong", "into .4, 4., torch.float32"),
        ("own.py:Needs", "cannot be made without arguments"),
        ("own.py:number", "is of type int, not a transform"),
        ("timm:nonsense-m9", "timm has no augmentation 'nonsense-m9'"),
        ("timm", "is for images in files"),
    ],
)
def test_what_is_no_augmentation_is_refused(augment: str, words: str) -> None:
    with pytest.raises(LocalizeError, match=words):
        train.run(config(augment=augment, output="run"))


# ---------------------------------------------------------------------------------------- optimizers and schedules


def test_an_optimizer_of_ones_own_takes_the_settings_that_it_has_arguments_for() -> None:
    train.run(config(opt="own.py:opt", momentum=0.5, weight_decay=0.0, output="own"))
    train.run(config(opt="momentum", momentum=0.5, weight_decay=0.0, lr=0.05, output="timms"))
    train.run(config(opt="torch.optim:SGD", momentum=0.5, weight_decay=0.0, lr=0.05, output="torchs"))
    assert weights("own") == weights("timms") == weights("torchs")


@pytest.mark.parametrize(
    ("opt", "words"),
    [
        ("own.py:opt_strict", "cannot be made here.*betas"),
        ("own.py:not_opt", "returns int, not a torch.optim.Optimizer"),
        ("own.py:missing", "defines no 'missing'"),
    ],
)
def test_what_makes_no_optimizer_is_refused(opt: str, words: str) -> None:
    with pytest.raises(LocalizeError) as caught:
        train.run(config(opt=opt, output="run"))
    assert re.search(words, " ".join(str(caught.value).split()))


@pytest.mark.parametrize("name", ["tanh", "poly"])
def test_timms_schedules_are_those_of_timm(name: str) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduler, _ = create_scheduler_v2(optimizer, sched=name, num_epochs=7, warmup_epochs=0)
    found = []
    for epoch in range(7):
        scheduler.step(epoch)
        found.append(optimizer.param_groups[0]["lr"])
    asked = TrainConfig("any", sched=name, epochs=7, lr=0.3)
    assert [learning_rate(asked, epoch) for epoch in range(1, 8)] == found
    assert len(set(found)) == 7


def test_a_schedule_of_ones_own_sets_the_learning_rate() -> None:
    done = train.run(config(sched="own.py:sched", epochs=3, output="run"))
    assert [line["lr"] for line in done.metrics] == [0.1, 0.05, 0.025]


@pytest.mark.parametrize(
    ("sched", "words"), [("sched_text", "it returns 'fast' in epoch 1"), ("sched_raises", "ZeroDivisionError")]
)
def test_what_is_no_schedule_is_refused(sched: str, words: str) -> None:
    with pytest.raises(LocalizeError, match=words):
        train.run(config(sched=f"own.py:{sched}", output="run"))


# ---------------------------------------------------------------------------------------------------------- callbacks


def test_a_callback_is_called_after_steps_epochs_and_the_run_and_again_when_the_run_goes_on() -> None:
    train.run(config(callback="own.py:Watch", output="run"))
    told = Path("told.txt").read_text().splitlines()
    kinds = [line.split()[0] for line in told]
    assert kinds == ["step"] * 3 + ["epoch"] + ["step"] * 3 + ["epoch", "run"]
    assert [line.split()[2] for line in told if line.startswith("step")] == list("123456")
    assert told[-1] == "run run 2"
    assert all(float(line.split()[3]) > 0 for line in told if line.startswith("step"))

    train.resume("run", epochs=3)
    assert [line.split()[0] for line in Path("told.txt").read_text().splitlines()[9:]] == [
        *["step"] * 3,
        "epoch",
        "run",
    ]


def test_an_object_is_called_too_and_changes_nothing_that_is_learned() -> None:
    class Count:
        steps = 0

        def after_step(self, step: train.Step) -> None:
            self.steps += 1

    count = Count()
    train.run(config(output="watched"), callback=count)
    train.run(config(output="alone"))
    assert count.steps == 6
    assert weights("watched") == weights("alone")


def test_what_is_no_callback_is_refused_before_anything_is_written() -> None:
    for name, words in (("own.py:Mute", "has no after_step"), ("Watch", "callback cannot be 'Watch'")):
        with pytest.raises(LocalizeError, match=words):
            train.run(config(callback=name, output="run"))
    assert not Path("run").exists()


# -------------------------------------------------------------------------------------------------------------- trust


@pytest.mark.parametrize("key", ["data", "opt", "sched", "augment", "callback"])
def test_code_that_the_recipe_of_a_run_names_is_run_only_if_it_is_as_it_was(key: str) -> None:
    Path("net.py").write_text(CODE)
    own = {"data": "tensors", "opt": "opt", "sched": "sched", "augment": "shake", "callback": "Watch"}[key]
    settings = {"data": "net.py:tensors", "epochs": 1, key: f"own.py:{own}"}
    train.run(dataclasses.replace(config(output="run", **settings), model="net.py:net"))

    recipe = runs.recipe_of(Path("run"), trust_code=False)
    assert f"own.py:{own}" in trust.code_of(recipe)
    Path("own.py").write_text(CODE + "\n# another file\n")
    with pytest.raises(trust.UntrustedCodeError, match="own.py"):
        runs.recipe_of(Path("run"), trust_code=False)


def test_metrics_of_a_run_with_everything_of_ones_own_are_those_of_the_run_that_was_interrupted() -> None:
    own = {"opt": "own.py:opt", "sched": "own.py:sched", "augment": "own.py:shake", "callback": "own.py:Watch"}
    train.run(config(**own, epochs=4, output="whole"))
    train.run(config(**own, epochs=4, max_steps=None, output="part", checkpoint_every=2))
    for path in sorted(Path("part/checkpoints").glob("*"))[2:]:
        path.unlink()
    train.resume("part")
    assert weights("whole") == weights("part")
    lines = [json.loads(line) for line in Path("part/metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
