"""The model of a run names the classes of files, folders and patterns; what cannot be used is named and passed over."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from localize.cli import app
from localize.train import TrainConfig, evaluation, run
from tests.train import image_folders


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    image_folders.write(folder / "data", "RGB", 10, 3)
    settings = {"epochs": 2, "batch_size": 15, "input_shape": (3, 12, 12), "device": "cpu", "lr": 0.02}
    run(TrainConfig("cifar/fc_cifar10", data=str(folder / "data"), output=str(folder / "run"), **settings))
    return folder


def predict(here: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["predict", str(here / "run"), *arguments, "--device", "cpu"])


def test_a_folder_a_pattern_and_a_file_are_predicted_as_they_are_tested(here: Path) -> None:
    val = here / "data" / "val"
    answer = predict(here, str(val), "--json", "--top", "3")
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)
    assert len(found) == 9
    right = sum(one["classes"][0] == Path(one["file"]).parent.name for one in found)
    opened = evaluation.open_run(here / "run", device="cpu")
    assert right / 9 == pytest.approx(evaluation.evaluate_run(opened, evaluation.Questions())["accuracy"])
    assert all(sum(one["scores"]) == pytest.approx(1, abs=1e-5) for one in found)
    several = json.loads(predict(here, str(val / "ant" / "*.png"), str(val / "bee" / "10.png"), "--json").stdout)
    assert [Path(one["file"]).name for one in several] == ["10.png", "11.png", "12.png", "10.png"]


def test_csv_has_a_line_for_each_image_and_class(here: Path) -> None:
    answer = predict(here, str(here / "data" / "val" / "ant"), "--csv", "--top", "2")
    rows = list(csv.reader(answer.stdout.splitlines()))
    assert rows[0] == ["file", "class", "score"]
    assert len(rows) == 1 + 3 * 2 and {row[1] for row in rows[1:]} <= set(image_folders.CLASSES)


def test_what_cannot_be_used_is_named_and_passed_over(here: Path, tmp_path: Path) -> None:
    for name, (damage, _) in image_folders.DAMAGED.items():
        damage(tmp_path / f"{name}.png")
    image_folders.png(tmp_path / "whole.png")
    answer = predict(here, str(tmp_path))
    assert answer.exit_code == 0, answer.output
    assert answer.stderr.count("skipped: ") == len(image_folders.DAMAGED)
    assert "whole.png" in answer.stdout
    (tmp_path / "whole.png").unlink()
    answer = predict(here, str(tmp_path))
    assert answer.exit_code == 4
    assert "no image can be used" in answer.stderr


@pytest.mark.parametrize("path", ["nowhere.png", "no*where", "."])
def test_a_path_that_names_no_image_is_refused(here: Path, tmp_path: Path, path: str) -> None:
    answer = predict(here, str(tmp_path / path))
    assert answer.exit_code == 4
    assert "matches no image" in answer.stderr
