"""Several processes are started by one command, and go on by the same one; their errors are said once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from localize.cli.app import app
from localize.errors import MissingError, OptionError, RecipeError, ReportedError
from localize.train import TrainConfig, launch, resuming

ROOT = Path(__file__).resolve().parents[2]
RUN = [
    "train",
    "fc_mnist",
    "--method",
    "dcl",
    "--d",
    "2",
    "--data",
    "digits",
    "--epochs",
    "1",
    "--max-steps",
    "4",
    "--device",
    "cpu",
    "--output",
    "run",
]


def localize(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "localize", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def config(folder: Path, **changed: object) -> TrainConfig:
    settings = {"data": "digits", "epochs": 1, "max_steps": 3, "device": "cpu", **changed}
    return TrainConfig("fc_mnist", recipe="dcl", output=str(folder), **settings)  # type: ignore[arg-type]


def test_the_same_command_begins_a_run_and_goes_on_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = resuming.begin_or_go_on(config(tmp_path / "run"))
    again = resuming.begin_or_go_on(config(tmp_path / "run"))

    assert capsys.readouterr().out.count("going on from") == 1
    assert again.metrics == first.metrics


def test_a_run_that_was_asked_for_something_else_is_not_gone_on_with(tmp_path: Path) -> None:
    resuming.begin_or_go_on(config(tmp_path / "run"))

    with pytest.raises(RecipeError, match=r"was: lr: 0.05\n  is:  lr: 0.01\n  help: .*--recipe .*run --output NEW"):
        resuming.begin_or_go_on(config(tmp_path / "run", lr=0.01))

    assert resuming.begin_or_go_on(config(tmp_path / "run", lr=0.01), force=True).metrics[0]["lr"] == 0.01


def test_a_folder_is_needed_to_look_into() -> None:
    with pytest.raises(OptionError, match="needs a folder"):
        resuming.begin_or_go_on(TrainConfig("fc_mnist", recipe="dcl"))


def test_starting_again_needs_something_to_go_on_with() -> None:
    done = CliRunner().invoke(app, [*RUN, "--processes", "2", "--max-restarts", "1"])

    assert done.exit_code == 2
    assert "--processes N --output DIR --resume-if-there" in done.output


def test_a_number_of_processes_that_was_not_started_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    assert launch.started()
    with pytest.raises(OptionError, match="--processes is 2, and 4 were started"):
        launch.check_count(2)


def test_what_has_ended_a_process_is_named() -> None:
    assert isinstance(launch.told(1, 2), ReportedError)
    assert launch.told(1, 2).exit_code == 2
    error = launch.told(3, -signal.SIGKILL)
    assert isinstance(error, MissingError)
    assert str(error).startswith("process 3 of this run was ended by SIGKILL.\n")


@pytest.mark.zoo
def test_one_command_trains_in_two_processes_and_an_error_of_both_is_said_once(tmp_path: Path) -> None:
    words = [*(word for word in RUN if word not in ("--d", "2")), "--processes", "2", "--resume-if-there"]
    done = localize(tmp_path, *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes on cpu" in done.stdout
    assert localize(tmp_path, *words).stdout.count("going on from") == 1

    refused = localize(tmp_path, *words, "--lr", "0.01", "--max-restarts", "1")
    assert refused.returncode == 2
    assert refused.stderr.count("error: the recipe has changed") == 1, refused.stderr
    assert "started again" not in refused.stderr


@pytest.mark.zoo
def test_an_option_that_torchrun_has_too_is_ours(tmp_path: Path) -> None:
    done = localize(tmp_path, *RUN, "--processes", "2")

    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert "'d'" in done.stderr
