"""A run knows its data: what has changed since is refused with both sides, and accepted only if that is asked for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from localize import recipes
from localize.cli.app import app
from localize.errors import LocalizeError, MissingError, OptionError
from localize.train import TrainConfig, checkpoints, evaluation, resume, run, runs
from localize.train.data import loaders
from localize.train.data.decoding import DamagedImageError
from tests.train import image_folders

NET = """
from torch import nn

class Net(nn.Sequential):
    input_shape = (3, 12, 12)

    def __init__(self, num_classes=3):
        super().__init__(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, num_classes))
"""
SETTINGS = {"epochs": 2, "batch_size": 6, "lr": 0.02, "device": "cpu", "checkpoint_every": 1}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder, and a run on it, as they lie in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    image_folders.write(tmp_path / "data", "RGB", 6, 3)
    train()
    return tmp_path


def train(**settings: Any) -> None:
    run(TrainConfig("net.py:Net", **SETTINGS | {"data": "data", "output": "run"} | settings))


def swap_names() -> None:
    for part in ("train", "val"):
        os.rename(f"data/{part}/ant", f"data/{part}/zebra")


def add() -> None:
    shutil.copy("data/train/ant/0.png", "data/train/ant/new.png")


def remove() -> None:
    os.remove("data/train/bee/1.png")


def change() -> None:
    Image.new("RGB", (12, 12), "red").save("data/train/cow/1.png")


def add_test() -> None:
    shutil.copy("data/val/ant/6.png", "data/val/ant/new.png")


CHANGES: dict[str, tuple[Callable[[], None], str]] = {
    "renamed": (swap_names, "classes of the run: ant, bee, cow\n  classes now: bee, cow, zebra"),
    "added": (
        add,
        r"train, in the run: 18 images .ant 6, .*\n  train, now: 19 images .ant 7, .*\n  added: train/ant/new.png",
    ),
    "removed": (remove, r"train, now: 17 images .ant 6, bee 5, .*\n  removed: train/bee/1.png"),
    "changed": (change, r"changed: train/cow/1.png \(\d+ bytes \w{8}, now \d+ bytes \w{8}\)"),
    "test": (add_test, r"test, in the run: 9 images .*\n  test, now: 10 images .*\n  added: val/ant/new.png"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_run_does_not_go_on_with_other_data_unless_they_are_accepted(here: Path, kind: str) -> None:
    act, told = CHANGES[kind]
    act()
    with pytest.raises(MissingError, match=f"(?s)have changed since the run was started.\n.*{told}.*--accept-data$"):
        resume("run", epochs=3)
    assert recipes.load("run").train["epochs"] == 2
    assert resume("run", epochs=3, accept_data=True).metrics[-1]["epoch"] == 3
    resume("run")  # what was accepted is now the data of the run
    assert evaluation.open_run("run", device="cpu").recipe.dataset == recipes.load("run").dataset


@pytest.mark.parametrize(("kind", "refused"), [("renamed", True), ("added", False), ("removed", False), ("test", True)])
def test_a_test_looks_at_class_names_and_test_images_only(here: Path, kind: str, refused: bool) -> None:
    act, told = CHANGES[kind]
    act()
    if refused:
        with pytest.raises(MissingError, match=f"(?s){told}.*--accept-data"):
            evaluation.open_run("run", device="cpu")
    opened = evaluation.open_run("run", device="cpu", accept_data=refused)
    assert len(opened.splits.test) == (10 if kind == "test" else 9)


@pytest.mark.parametrize("asked", [False, True])
def test_an_image_of_the_same_size_is_found_out_in_small_data_and_where_it_is_asked_for(
    here: Path, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    monkeypatch.setattr(loaders, "HASHED", 0 if asked else 2**20)
    train(hash_files=asked, output="again")
    path = Path("data/train/cow/1.png")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(MissingError, match=r"changed: train/cow/1.png \(\d+ bytes \w{8}, now \d+ bytes \w{8}\)"):
        resume("again", epochs=3)


def test_contents_of_large_data_are_not_read_unless_asked_for(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "HASHED", 0)
    train(output="again")
    assert not recipes.load("again").dataset.hashed
    path = Path("data/train/cow/1.png")
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(DamagedImageError, match="cow/1.png cannot be used"):
        resume("again", epochs=3)


def test_another_folder_of_the_same_classes_is_tested(here: Path) -> None:
    image_folders.write(here / "other", "RGB", 1, 5)
    assert len(evaluation.open_run("run", data_dir="other", device="cpu").splits.test) == 15
    assert len(evaluation.open_run("run", data_name="other", device="cpu").splits.test) == 15
    shutil.move("other/val", "flat")
    assert len(evaluation.open_run("run", data_name="./flat", device="cpu").splits.test) == 15
    os.rename("flat/ant", "flat/asp")
    with pytest.raises(MissingError, match="classes of the run: ant, bee, cow\n  classes now: asp, bee, cow"):
        evaluation.open_run("run", data_name="./flat", device="cpu")
    shutil.rmtree("flat/asp")
    with pytest.raises(OptionError, match="has 2 classes, but the model has 3"):
        evaluation.open_run("run", data_name="./flat", device="cpu", accept_data=True)


def test_an_epoch_that_was_interrupted_begins_again_with_accepted_data(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(output="begun", max_steps=5, epochs=2)
    for path in checkpoints.files(Path("begun"))[-1:]:
        path.unlink()  # as if it had been killed in its second epoch
    for path in ("metrics.jsonl", "export/backbone.safetensors"):
        (Path("begun") / path).unlink()
    add()
    add_test()
    capsys.readouterr()
    metrics = resume("begun", accept_data=True).metrics
    assert "1 batches into epoch 2, which is trained again from its first batch" in capsys.readouterr().out
    assert [line["epoch"] for line in metrics] == [1, 2]


def test_files_that_are_new_in_a_split_are_trained_on(here: Path) -> None:
    shutil.move("data/train", "flat")
    train(data="flat", split=0.5, output="split")
    before = runs.listing_of(Path("split"))
    for number in range(6):
        shutil.copy(f"flat/ant/{number}.png", f"flat/ant/new{number}.png")
    with pytest.raises(MissingError, match="added: ant/new0.png"):
        resume("split", epochs=3)
    resume("split", epochs=3, accept_data=True)
    now = runs.listing_of(Path("split"))
    assert now.test == before.test
    assert set(now.train) - set(before.train) == {f"ant/new{number}.png" for number in range(6)}


def test_a_relative_folder_is_found_from_elsewhere(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "away").mkdir()
    monkeypatch.chdir(here / "away")
    shutil.copy("../net.py", "net.py")
    assert len(evaluation.open_run("../run", device="cpu", trust_code=True).splits.test) == 9
    os.rename("../data", "../moved")
    with pytest.raises(MissingError, match=rf"is not in data \(in {here}/away\)"):
        resume("../run", epochs=3, trust_code=True)
    assert resume("../run", epochs=3, data_dir="../moved", trust_code=True).metrics[-1]["epoch"] == 3


@pytest.mark.parametrize(
    ("epochs", "error", "message"),
    [
        (1, OptionError, "--epochs cannot be 1: the run in run has done 2.\n  help: --epochs 3 or more"),
        (0, LocalizeError, "epochs cannot be 0"),
    ],
)
def test_a_run_cannot_be_shortened(here: Path, epochs: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        resume("run", epochs=epochs)


def test_a_finished_run_is_extended_by_the_schedule_of_a_longer_one(here: Path) -> None:
    answer = CliRunner().invoke(app, ["train", "--resume", "run", "--epochs", "4"])
    assert answer.exit_code == 0, answer.output
    told = "extended from 2 to 4 epochs: from epoch 3 on, sched 'cosine' follows 4 epochs; its learning rate is 0.01"
    assert told in answer.stderr
    train(epochs=4, output="whole")
    rates = [[line.lr for line in runs_metrics(folder)] for folder in ("run", "whole")]
    assert rates[0][2:] == rates[1][2:]
    assert recipes.load("run").train["epochs"] == 4
    resume("run")


def runs_metrics(folder: str) -> Any:
    from localize.train import metrics

    return metrics.read(Path(folder))


def test_a_run_that_ends_by_steps_is_not_extended_by_epochs(here: Path) -> None:
    train(output="steps", max_steps=2)
    with pytest.raises(OptionError, match="--epochs cannot be 5: this run ends after 2 steps"):
        resume("steps", epochs=5)
