"""A run is exported as a program: the whole model, or the model up to a local head."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from localize.cli import app
from localize.errors import MissingError, OptionError, UnknownNameError
from localize.train import TrainConfig, run, runs
from localize.train.exits import export_program
from localize.train.loop import Run

SETTINGS = {"epochs": 1, "max_steps": 2, "batch_size": 32, "input_shape": (1, 8, 8), "device": "cpu"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    output = tmp_path_factory.mktemp("runs") / "run"
    return run(TrainConfig("cifar/fc_mnist", recipe="dgl", output=str(output), **SETTINGS))


@pytest.mark.parametrize("at", [None, "loss_1"])
def test_a_program_computes_what_the_run_does(trained: Run, tmp_path: Path, at: str | None) -> None:
    path = tmp_path / "deep" / "net.pt2"
    told = export_program(trained.output, path, format="pt2", at=at)
    assert "equal those of the run" in told
    x = torch.randn(5, 1, 8, 8)
    local, _ = runs.load(trained.output)
    local.eval()
    expected = local(x) if at is None else local.scores(x)[at]
    torch.testing.assert_close(torch.export.load(path).module()(x), expected)
    assert json.loads((path.parent / "config.json").read_text())["num_classes"] == 10


def test_the_command_writes_an_early_exit(trained: Run, tmp_path: Path) -> None:
    answer = CliRunner().invoke(app, ["export", str(trained.output), "-o", str(tmp_path / "x.pt2"), "--at", "loss_0"])
    assert answer.exit_code == 0, answer.output
    assert "the model up to loss_0; outputs on 2 random images equal those of the run within" in answer.stdout


def test_what_cannot_be_written_is_refused(trained: Run, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot be written as 'pt2'.*\n.*\n  help: --format pt2 -o x.pt2"):
        export_program(trained.output, tmp_path / "x.pt", format="pt2")
    with pytest.raises(OptionError, match="cannot be written as 'tflite'"):
        export_program(trained.output, tmp_path / "x.tflite", format="tflite")
    with pytest.raises(UnknownNameError, match="no layer 'loss_9' with class scores"):
        export_program(trained.output, tmp_path / "x.pt2", format="pt2", at="loss_9")
    (tmp_path / "x.pt2").write_text("mine")
    with pytest.raises(MissingError, match="x.pt2 exists"):
        export_program(trained.output, tmp_path / "x.pt2", format="pt2")


def test_onnx_is_checked_against_the_run(trained: Run, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    assert "equal those of the run" in export_program(trained.output, tmp_path / "x.onnx", format="onnx")
