"""The average of the weights warms up; both models are tested, and the better, or the one asked for, is exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from localize.train import TrainConfig, evaluation, metrics, resume, run, runs
from localize.train.loop import AVERAGE, WEIGHTS, Run, chosen
from localize.train.passes import Outcome

SETTINGS = {"input_shape": (1, 8, 8), "device": "cpu", "epochs": 2, "batch_size": 128, "model_ema": True, "lr": 0.02}


def train(output: Path, **settings: Any) -> Run:
    return run(TrainConfig("cifar/fc_mnist", output=str(output), **SETTINGS | settings))


def test_at_its_default_a_short_run_is_exported_with_an_average_that_has_learned(tmp_path: Path) -> None:
    last = train(tmp_path / "run").metrics[-1]
    assert last["test_accuracy_average"] > 0.6
    assert last["test_accuracy"] == max(last["test_accuracy_average"], last["test_accuracy_weights"])
    assert last["test_accuracy"] == last[f"test_accuracy_{last['exported']}"]
    assert metrics.read(tmp_path / "run")[-1].test_accuracy == last["test_accuracy"]
    opened = evaluation.open_run(tmp_path / "run", device="cpu")
    assert evaluation.evaluate_run(opened, evaluation.Questions())["accuracy"] == last["test_accuracy"]


@pytest.mark.parametrize("asked", [AVERAGE, WEIGHTS])
def test_the_model_that_is_asked_for_is_exported(tmp_path: Path, asked: str) -> None:
    trained = train(tmp_path / "run", epochs=1, model_ema_export=asked)
    assert trained.metrics[-1]["exported"] == asked
    assert trained.metrics[-1]["test_accuracy"] == trained.metrics[-1][f"test_accuracy_{asked}"]
    resume(tmp_path / "run")
    state = safetensors.torch.load_file(tmp_path / "run" / runs.BACKBONE)
    plain = run(
        TrainConfig("cifar/fc_mnist", output=str(tmp_path / "plain"), **SETTINGS | {"epochs": 1, "model_ema": False})
    )
    same = all(torch.equal(value, state[key]) for key, value in plain.local.export().state_dict().items())
    assert same == (asked == WEIGHTS)


def test_an_average_that_cannot_have_moved_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "a", epochs=1)
    assert "warning" not in capsys.readouterr().out
    train(tmp_path / "b", epochs=1, model_ema_warmup=False)
    told = "warning: after 11 steps, 99.8 % of the average are still the initial weights; use a lower --model-ema-decay"
    assert told in capsys.readouterr().out
    train(tmp_path / "c", epochs=1, model_ema_warmup=False, model_ema_decay=0.5)
    assert "warning" not in capsys.readouterr().out


def test_the_better_one_is_that_of_the_higher_test_accuracy() -> None:
    config = TrainConfig("x", model_ema=True)
    tested = {AVERAGE: Outcome({}, {}, 0.5, 10), WEIGHTS: Outcome({}, {}, 0.6, 10)}
    assert chosen(config, tested) == WEIGHTS
    assert chosen(config, tested | {AVERAGE: Outcome({}, {}, 0.6, 10)}) == AVERAGE
    assert chosen(config, {WEIGHTS: tested[WEIGHTS]}) == WEIGHTS
