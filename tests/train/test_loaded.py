"""A finished run as one object: what it answers is what the run has measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import localize
from localize import train
from localize.errors import MissingError
from localize.train import TrainConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "digits"
    train.run(
        TrainConfig(
            "cifar/fc_mnist", recipe="dcl-s", input_shape=(1, 8, 8), data="digits", epochs=2, lr=0.005, batch_size=64,
            device="cpu", output=str(output),
        )
    )  # fmt: skip
    return output


def test_accuracies_are_those_that_the_run_has_written(folder: Path) -> None:
    run = localize.load(folder)
    right, by_loss, images = 0, dict.fromkeys(run.local.scores(torch.zeros(2, 1, 8, 8)), 0), 0
    with torch.no_grad():
        for x, y in DataLoader(run.test.test, 100):
            right += int((run.model(x).argmax(1) == y).sum())
            for name, scores in run.local.scores(x).items():
                by_loss[name] += int((scores.argmax(1) == y).sum())
            images += len(y)

    last = run.metrics[-1]
    assert (images, right / images) == (360, last.test_accuracy)
    assert {one.name: one.test_accuracy for one in last.segments} == {n: c / images for n, c in by_loss.items()}
    assert run.classes == tuple("0123456789")
    assert run.recipe.method == "dcl"
    assert [epoch.epoch for epoch in run.metrics] == [1, 2]
    assert set(run.heads) == set(run.local.heads)
    assert not run.model.training


def test_an_image_is_transformed_as_the_test_images_were(folder: Path, tmp_path: Path) -> None:
    run = localize.load(folder)
    x, _ = run.test.test[3]
    how = run.preprocessing
    pixels = (x[0] * how.std[0] + how.mean[0]).mul(255).round().to(torch.uint8)
    image = Image.fromarray(pixels.numpy())
    image.save(tmp_path / "digit.png")

    assert torch.allclose(run.transform(image), x, atol=0.5 / 255 / how.std[0] + 1e-6)
    assert torch.equal(run.transform(tmp_path / "digit.png"), run.transform(image))
    assert torch.equal(run.transform(str(tmp_path / "digit.png")), run.transform(image))


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=str(tmp_path)):
        localize.load(tmp_path)
