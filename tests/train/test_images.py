"""Images as people have them: every format trains to the same accuracy, and what cannot be used is named."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from localize.cli.app import app
from localize.errors import MissingError, OptionError
from localize.train import TrainConfig, data, evaluation, run, runs
from localize.train.data import decoding, folders, inspection, loaders, sources
from tests.train import image_folders
from tests.train.image_folders import CLASSES, DAMAGED, FORMATS, SIDE

NET = """
from torch import nn

class Net(nn.Sequential):
    input_shape = ({channels}, {side}, {side})

    def __init__(self, num_classes=3):
        super().__init__(nn.Conv2d({channels}, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, num_classes))
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small net for colour images and one for grey ones, as the current one."""
    for name, channels in (("colour", 3), ("grey", 1)):
        (tmp_path / f"{name}.py").write_text(NET.format(channels=channels, side=SIDE))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(model: str = "colour.py:Net", **settings: Any) -> float:
    """Train for a second, and return the test accuracy."""
    usual = {"epochs": 6, "batch_size": 15, "lr": 0.02, "device": "cpu", "data": "data", "output": "run"}
    return run(TrainConfig(model, **usual | settings)).metrics[-1]["test_accuracy"]


# ------------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "one bit"])
def test_a_folder_of_any_format_trains_to_the_same_accuracy(here: Path, kind: str) -> None:
    image_folders.write(here / "data", kind)
    assert train() >= 0.95
    opened = evaluation.open_run("run", device="cpu")
    assert evaluation.evaluate_run(opened, evaluation.Questions())["accuracy"] >= 0.95


@pytest.mark.parametrize("kind", ["grey", "16-bit PNG", "RGB"])
def test_a_model_of_one_channel_reads_folders(here: Path, kind: str) -> None:
    image_folders.write(here / "data", kind)
    assert train("grey.py:Net") >= 0.95


@pytest.mark.parametrize("kind", FORMATS)
def test_values_are_scaled_by_the_mode_of_the_file(tmp_path: Path, kind: str) -> None:
    ending, save = FORMATS[kind]
    path = tmp_path / f"a.{ending}"
    pixels = image_folders.scene(1, 3)
    save(pixels, path)
    image = decoding.decode(path, "RGB")
    found = np.asarray(image, dtype=np.float64) / (1 if image.mode == "F" else 255)
    red = found if found.ndim == 2 else found[..., 0]
    expected = {"12-bit values": pixels / 16, "one bit": (pixels > 0.5)}.get(kind, pixels)
    lossy = {"CMYK": 0.1, "rotated": 0.12, "palette": 0.06, "one bit": 1.0}
    assert np.abs(red - expected).max() <= lossy.get(kind, 1 / 254)
    assert np.abs(red - expected).mean() < 0.03 or kind == "one bit"


def test_values_of_16_bits_are_not_rounded_to_8(tmp_path: Path) -> None:
    values = np.arange(144, dtype=np.uint16).reshape(12, 12)
    folder = tmp_path / "data"
    image_folders.write(folder, "16-bit PNG", 1, 1)
    Image.fromarray(values).save(folder / "val" / "ant" / "1.png")
    splits = data.load("folder", (1, 12, 12), data_dir=str(folder), mean=[0.0], std=[1.0])
    torch.testing.assert_close(splits.test[0][0][0], torch.from_numpy(values / 65535).float())
    assert splits.preprocessing.bits == 16
    assert "16-bit grey values: 6 files" in "\n".join(inspection.oddities(splits.inspection))


def test_what_is_odd_is_told_before_training(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image_folders.write(here / "data", "animated")
    image_folders.rotated(image_folders.scene(0, 0), here / "data" / "train" / "ant" / "turned.jpg")
    shutil.copy(here / "data" / "train" / "bee" / "0.gif", here / "data" / "val" / "bee" / "same.gif")
    (here / "data" / "train" / ".ipynb_checkpoints").mkdir()
    (here / "data" / "train" / "ant" / "notes.txt").write_text("mine")
    train(epochs=1)
    told = capsys.readouterr().out
    assert "classes: 3 (ant, bee, cow)" in told
    assert re.search(r"several images in one file; only the first is used: 121 \(", told)
    assert "rotated or mirrored as their EXIF data say: 1 files" in told
    assert re.search(r"in both parts: 1 \(\S*val/bee/same.gif = \S*train/bee/0.gif\)", told)
    assert re.search(r"skipped or followed: \S*\.ipynb_checkpoints is hidden", told)
    assert re.search(r"skipped or followed: \S*notes.txt: not the name of an image file", told)


# ------------------------------------------------------------------------------------------------------------- damaged


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_named_with_the_reason_before_training(here: Path, kind: str) -> None:
    image_folders.write(here / "data", "RGB", 6, 2)
    damage, reason = DAMAGED[kind]
    damage(here / "data" / "train" / "bee" / "x.png")
    with pytest.raises(MissingError, match=rf"cannot be used.\n  \S*x.png: .*({reason}).*\n  help: .*--skip-damaged"):
        train()
    assert not (here / "run").exists()


def test_damaged_files_are_left_out_if_asked_for_and_stay_out(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image_folders.write(here / "data")
    for name, (damage, _) in DAMAGED.items():
        damage(here / "data" / "train" / "bee" / f"{name}.png")
    image_folders.truncated(here / "data" / "val" / "cow" / "half.png")
    assert train(skip_damaged=True) >= 0.95
    told = capsys.readouterr().out
    assert told.count("left out: ") == len(DAMAGED) + 1
    opened = evaluation.open_run("run", device="cpu")
    assert len(opened.splits.test) == 30
    assert len(runs.listing_of(Path("run")).left_out) == len(DAMAGED) + 1


def test_every_damaged_file_is_named_by_data_check(here: Path) -> None:
    image_folders.write(here / "data", "RGB", 2, 2)
    for name, (damage, _) in DAMAGED.items():
        damage(here / "data" / "train" / "bee" / f"{name}.png")
    answer = CliRunner().invoke(app, ["data", "check", "data"])
    assert answer.exit_code == 1
    for name, (_, reason) in DAMAGED.items():
        assert re.search(rf"{name}.png: .*({reason})", answer.stdout), name
    assert "train: 16 images in 3 classes: ant 2, bee 12, cow 2" in answer.stdout.replace("train: 15", "train: 16")


def test_data_check_finds_nothing_wrong_with_whole_images(here: Path) -> None:
    image_folders.write(here / "data", "RGB", 2, 1)
    answer = CliRunner().invoke(app, ["data", "check", "data", "--json"])
    assert answer.exit_code == 0, answer.output
    assert '"ant": 2' in answer.stdout


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_is_damaged_after_the_start_is_named(here: Path, workers: int) -> None:
    image_folders.write(here / "data", "RGB", 3, 2)
    splits = data.load("folder", (3, SIDE, SIDE), data_dir="data")
    image_folders.truncated(here / "data" / "val" / "bee" / "4.png")
    batches = data.evaluation_batches(splits.test, 2, workers=workers)
    with pytest.raises(decoding.DamagedImageError, match=r"val/bee/4.png cannot be used.*\n  it is damaged"):
        list(batches)


# -------------------------------------------------------------------------------------------------------------- folders


def refused(error: type[Exception], message: str, **settings: Any) -> None:
    with pytest.raises(error, match=message):
        data.load("folder", (3, SIDE, SIDE), data_dir="data", **settings)


def test_a_link_to_a_folder_that_holds_it_is_refused(here: Path) -> None:
    image_folders.write(here / "data", "RGB", 2, 1)
    for target in ("data/train/bee", "data/train", "data", "."):
        link = here / "data" / "train" / "bee" / "loop"
        link.symlink_to(here / target)
        refused(MissingError, r"loop \(in .*\) is a link to a folder that contains it")
        link.unlink()


def test_a_link_to_another_folder_is_followed_and_told(here: Path) -> None:
    image_folders.write(here / "data", "RGB", 2, 1)
    (here / "elsewhere").mkdir()
    shutil.copy("data/train/bee/0.png", "elsewhere/more.png")
    (here / "data" / "train" / "bee" / "more").symlink_to(here / "elsewhere")
    found = sources.every_part("data")["train"]
    assert found.per_class == (2, 3, 2)
    assert any("which was followed" in line for line in found.passed_over)


def test_one_class_is_refused(here: Path) -> None:
    image_folders.write(here / "data", "RGB", 2, 1)
    for part in ("train", "val"):
        for name in CLASSES[1:]:
            shutil.rmtree(here / "data" / part / name)
    refused(MissingError, "there is only one class in .*: ant.\n  any answer of a model would then be right")


def test_a_constant_channel_is_refused_with_what_to_type(here: Path) -> None:
    for path in image_folders.write(here / "data", "RGB", 2, 1).rglob("*.png"):
        pixels = np.asarray(Image.open(path)).copy()
        pixels[..., 2] = 51
        Image.fromarray(pixels).save(path)
    refused(
        OptionError, r"channel 2 .* is constant.\n.*0.2000 there.*\n  help: --pixel-mean .*,0.2000 --pixel-std .*,1$"
    )


def test_a_folder_whose_name_is_not_text_is_refused(here: Path) -> None:
    image_folders.write(here / "data", "RGB", 2, 1)
    os.mkdir(b"data/train/\xff")
    refused(MissingError, r"is not UTF-8.\n  it is b'\\xff'")


def test_class_folders_without_test_images_are_split_class_by_class(here: Path) -> None:
    image_folders.write(here / "all", "RGB", 10, 1)
    shutil.move("all/train", "data")
    refused(MissingError, "there are no test images.*\n  classes are ant, bee, cow.\n.*\n  help: --split 0.2")
    splits = data.load("folder", (3, SIDE, SIDE), data_dir="data", split=0.2, seed=1)
    assert (splits.record.train.per_class, splits.record.test.per_class) == ((8, 8, 8), (2, 2, 2))
    assert not set(splits.listing.train) & set(splits.listing.test)
    again = data.load("folder", (3, SIDE, SIDE), data_dir="data", split=0.2, seed=1)
    assert again.record == splits.record
    other = data.load("folder", (3, SIDE, SIDE), data_dir="data", split=0.2, seed=2)
    assert other.record.test.sha256 != splits.record.test.sha256


def test_a_split_is_the_same_when_it_is_tested_again(here: Path) -> None:
    image_folders.write(here / "all")
    shutil.move("all/train", "data")
    accuracy = train(split=0.25, seed=3)
    opened = evaluation.open_run("run", device="cpu")
    assert evaluation.evaluate_run(opened, evaluation.Questions())["accuracy"] == accuracy
    assert len(opened.splits.test) == 24
    os.remove("run/data.json")  # it can be drawn again
    assert evaluation.open_run("run", device="cpu").splits.record == opened.splits.record


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": 0.2}, "contains test images, but --split was given"),
        ({"data": "digits", "split": 0.2}, "'digits' has test images of its own"),
        ({"data_dir": "data"}, "two data folders were given"),
        ({"split": 1.0}, "split cannot be 1.0"),
    ],
)
def test_options_that_do_not_fit_a_folder_are_refused(here: Path, settings: dict[str, Any], message: str) -> None:
    image_folders.write(here / "data", "RGB", 2, 1)
    with pytest.raises(OptionError, match=message):
        train(**settings)


def test_a_folder_may_be_called_like_a_data_set_only_by_its_path(here: Path) -> None:
    image_folders.write(here / "digits", "RGB", 2, 1)
    assert sources.place("digits") == ("digits", None)
    assert sources.place("./digits") == ("folder", "./digits")


def test_names_of_files_are_read_as_before(here: Path) -> None:
    """Deeper folders come after the files of a class, by the name of the folder, as torchvision lists them."""
    image_folders.write(here / "data", "RGB", 3, 1)
    (here / "data" / "train" / "bee" / "deep").mkdir()
    shutil.copy("data/train/bee/0.png", "data/train/bee/deep/9.PNG")
    from torchvision.datasets import ImageFolder

    files = folders.list_files(Path("data"), Path("data/train"), "")
    assert list(zip(files.paths, files.labels, strict=True)) == ImageFolder("data/train").samples


def test_an_image_fills_a_batch_of_16_bits_beside_others(here: Path) -> None:
    image_folders.write(here / "data", "16-bit PNG", 3, 1)
    save: Callable[..., None] = FORMATS["RGB"][1]
    save(image_folders.scene(0, 0), here / "data" / "train" / "ant" / "colour.png")
    images = data.load("folder", (3, SIDE, SIDE), data_dir="data", mean=[0.0], std=[1.0]).train[:][0]
    assert images.shape == (10, 3, SIDE, SIDE)
    assert float(images.max()) <= 1


# ------------------------------------------------------------------------------------------------------ kept in memory


def passes(splits: data.DataSplits, *, workers: int = 0) -> list[torch.Tensor]:
    """Return the images of two augmented passes over the training images, and of a test."""
    generator = torch.Generator().manual_seed(3)
    batches = data.training_batches(splits.train, 4, generator=generator, workers=workers)
    tests = data.evaluation_batches(splits.test, 4, workers=workers)
    return [images for one in (batches, batches, tests) for images, _ in one]


@pytest.mark.parametrize(("files_kept", "read"), [(None, 8 + 3), (5, 5 + 3 + 3 + 3), (0, 8 + 8 + 3)])
def test_a_small_file_is_decoded_once_and_not_in_every_epoch(
    here: Path, monkeypatch: pytest.MonkeyPatch, files_kept: int | None, read: int
) -> None:
    image_folders.write(here / "data", "RGB", 3, 1)
    (here / "data" / "train" / "ant" / "0.png").unlink()
    if files_kept is not None:
        monkeypatch.setattr(loaders, "KEPT", files_kept * SIDE * SIDE * 4)
    splits = data.load("folder", (3, SIDE, SIDE), data_dir="data", augment="crop2-flip", mean=[0.5], std=[0.5])
    decoded: list[str] = []

    def counted(path: str, mode: str) -> Image.Image:
        decoded.append(path)
        return decoding.decode(path, mode)

    monkeypatch.setattr(loaders, "decode", counted)
    found = passes(splits)

    assert len(decoded) == read
    assert all(torch.equal(a, b) for a, b in zip(found, passes(splits, workers=1), strict=True))
