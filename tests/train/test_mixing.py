"""Mixup and CutMix: the batches of timm, mixed anew in every pass, and the same after a resume, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.data import Mixup
from torch import Tensor

from localize import recipes
from localize.errors import MethodError, OptionError
from localize.train import TrainConfig, data, passes, run
from tests.train.image_folders import write

X, Y = torch.rand(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 4, 0])
EITHER = {"mixup": 0.4, "cutmix": 1.0}


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixed(mixing: data.Mixing, seed: int = 3, rank: int = 0, batches: int = 4) -> list[tuple[Tensor, Tensor]]:
    mix = mixing.begun(generator(seed), rank)
    return [mix(X.clone(), Y) for _ in range(batches)]


@pytest.mark.parametrize("alphas", [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)])
def test_batches_are_mixed_as_timm_mixes_them(alphas: tuple[float, float]) -> None:
    found = mixed(data.Mixing(*alphas, classes=5), batches=8)

    seed = torch.randint(2**32, (1,), generator=generator()).item()
    np.random.set_state(np.random.RandomState([seed, 0]).get_state())
    timm = Mixup(*alphas, label_smoothing=0.0, num_classes=5)
    for images, labels in found:
        expected, targets = timm(X.clone(), Y)
        assert torch.equal(images, expected)
        assert torch.equal(labels, targets)
        torch.testing.assert_close(labels.sum(1), torch.ones(6))


def test_mixing_draws_from_numpy_and_leaves_it_as_it_was() -> None:
    np.random.seed(1)
    expected = np.random.rand(3)
    np.random.seed(1)
    state = generator().get_state()
    order = generator()

    data.Mixing(0.4, 0.0, classes=5).begun(order, 0)(X.clone(), Y)

    assert np.array_equal(np.random.rand(3), expected)
    assert torch.equal(order.get_state(), state)


def test_passes_and_processes_mix_differently_and_the_same_pass_the_same() -> None:
    mixing = data.Mixing(0.4, 1.0, classes=5)
    first = mixed(mixing)

    for (images, labels), (same, alike) in zip(first, mixed(mixing), strict=True):
        assert torch.equal(images, same) and torch.equal(labels, alike)
    assert not torch.equal(first[0][1], mixed(mixing, seed=4)[0][1])
    assert not torch.equal(first[0][1], mixed(mixing, rank=1)[0][1])


def test_how_images_of_a_folder_are_mixed_does_not_depend_on_the_workers(tmp_path: Path) -> None:
    write(tmp_path, train=8, test=2)
    splits = data.load("folder", (3, 12, 12), data_dir=str(tmp_path), augment="flip")
    found = []
    for count in (0, 2):
        batches = data.training_batches(
            splits.train, 4, generator=generator(), workers=count, mixing=data.Mixing(0.4, 1.0, splits.num_classes)
        )
        found.append(list(batches))

    assert len(found[0]) > 1
    for (x, y), (images, labels) in zip(*found, strict=True):
        assert torch.equal(x, images) and torch.equal(y, labels)


def test_an_odd_batch_is_not_mixed() -> None:
    with pytest.raises(OptionError, match="batch_size cannot be 5 if images are mixed(.|\n)*--batch-size 6"):
        run(TrainConfig("cifar/fc_mnist", batch_size=5, mixup=0.2))


def test_a_method_that_needs_class_ids_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    config = TrainConfig("cifar/fc_mnist", recipe="cfl", mixup=0.2, output=str(tmp_path / "run"))

    with pytest.raises(MethodError, match="cfl cannot be trained on mixed images(.|\n)*one class(.|\n)*auglocal"):
        run(config)

    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------------- accuracy


def test_of_a_mixed_image_the_class_of_the_larger_share_is_right() -> None:
    labels = torch.tensor([[0.7, 0.3, 0.0], [0.5, 0.5, 0.0], [0.2, 0.0, 0.8], [0.0, 0.0, 0.0]])
    scores = torch.tensor([[1.0, 2.0, 0.0], [0.0, 3.0, 1.0], [0.0, 1.0, 2.0], [1.0, 0.0, 0.0]])

    assert passes.is_right(scores.argmax(1), labels).tolist() == [False, True, True, False]
    assert passes.is_right(scores.argmax(1), torch.tensor([1, 0, 2, 0])).tolist() == [True, False, True, True]


# ------------------------------------------------------------------------------------------------------------- training


def settings(**more: Any) -> dict[str, Any]:
    recipe = {"method": "dcl", "cut": {"segments": 3}, "loss": {"smoothing": 0.1}}
    return {
        "model": "cifar/fc_mnist", "recipe": recipes.load(recipe), "opt": "adamw", "lr": 0.0005, "epochs": 2,
        "batch_size": 128, "checkpoint_every": 3, **EITHER, **more,
    }  # fmt: skip


def test_the_images_of_a_run_are_mixed(tmp_path: Path) -> None:
    whole = run(TrainConfig(**settings(output=str(tmp_path / "whole"))))
    plain = run(TrainConfig(**settings(mixup=0.0, cutmix=0.0, output=str(tmp_path / "plain"))))
    assert plain.metrics[0]["train_loss"] != whole.metrics[0]["train_loss"]
    assert plain.metrics[0]["train_accuracy"] > whole.metrics[0]["train_accuracy"]


def test_the_recipe_of_a_run_says_how_it_mixes_and_what_it_trains_by(tmp_path: Path) -> None:
    made = run(TrainConfig(**settings(max_steps=2, output=str(tmp_path / "run"))))

    recipe = recipes.load(made.output / "recipe.yaml")

    assert recipe.train["mixup"] == 0.4 and recipe.train["cutmix"] == 1.0
    assert recipe.loss == {"name": "cross-entropy", "smoothing": 0.1}
    lines = [json.loads(line) for line in (made.output / "metrics.jsonl").read_text().splitlines()]
    assert 0 <= lines[-1]["test_accuracy"] <= 1
    shutil.rmtree(made.output)


def test_class_weights_say_what_they_are_divided_by_where_batches_are_joined(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipes.load({"method": "dcl", "cut": {"segments": 2}, "loss": {"weights": [1.0] * 9 + [2.0]}})

    run(TrainConfig(**settings(recipe=recipe, max_steps=1, grad_accum_steps=2, output=str(tmp_path / "run"))))

    assert (
        "class weights: each process divides its batch loss by the sum of the weights of its own"
        in capsys.readouterr().out
    )
