"""Several processes are started by one command, and go on by the same one; their errors are said once."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed
from typer.testing import CliRunner

from localize import train
from localize.cli.app import app
from localize.errors import MissingError, OptionError, RecipeError, ReportedError
from localize.train import TrainConfig, launch, piped, resuming
from localize.train.parallel import Team

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


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
PIPE = (
    *("train", "fc_mnist", "--method", "dcl-ld", "--data", "digits", "--epochs", "1", "--max-steps", "20"),
    *("--lr", "0.005", "--device", "cpu", "--parallel", "pipe"),
)
TASK = {
    "SLURM_JOB_ID": "7000001",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "node[07-08],gpu1",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_PROCID": "1",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "0",
}
"""What srun sets for the second of two tasks on two nodes."""


def localize(folder: Path, *words: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launcher, "-m", "localize", *words]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False)


def config(folder: Path, **changed: object) -> TrainConfig:
    settings = {"data": "digits", "epochs": 1, "max_steps": 3, "device": "cpu", **changed}
    return TrainConfig("fc_mnist", recipe="dcl", output=str(folder), **settings)  # type: ignore[arg-type]


def test_the_same_command_begins_a_run_and_goes_on_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = resuming.begin_or_go_on(config(tmp_path / "run"))
    again = resuming.begin_or_go_on(config(tmp_path / "run"))

    assert capsys.readouterr().out.count("resuming from") == 1
    assert again.metrics == first.metrics


def test_a_run_that_was_asked_for_something_else_is_not_gone_on_with(tmp_path: Path) -> None:
    resuming.begin_or_go_on(config(tmp_path / "run"))

    with pytest.raises(RecipeError, match=r"was: lr: 0.05\n  is:  lr: 0.01\n  help: .*--recipe .*run --output NEW"):
        resuming.begin_or_go_on(config(tmp_path / "run", lr=0.01))

    assert resuming.begin_or_go_on(config(tmp_path / "run", lr=0.01), force=True).metrics[0]["lr"] == 0.01


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["data", "pipe"])
def test_a_changed_number_of_epochs_is_taken_over_as_by_resume(parallel: str, tmp_path: Path) -> None:
    def asked(folder: str, epochs: int) -> TrainConfig:
        recipe = "dcl-ld" if parallel == "pipe" else "dcl"
        settings = {"batch_size": 512, "device": "cpu", "data": "digits", "parallel": parallel}
        return TrainConfig("fc_mnist", recipe=recipe, output=str(tmp_path / folder), epochs=epochs, **settings)  # type: ignore[arg-type]

    for folder in ("run", "resumed"):
        train.run(asked(folder, 1))
    found = resuming.begin_or_go_on(asked("run", 2))

    expected = train.resume(tmp_path / "resumed", epochs=2)
    assert [line["epoch"] for line in found.metrics] == [1, 2]
    assert [{**line, "images_per_second": 0} for line in found.metrics] == [
        {**line, "images_per_second": 0} for line in expected.metrics
    ]
    with pytest.raises(OptionError, match="--epochs cannot be 1: the run in .* has done 2"):
        resuming.begin_or_go_on(asked("run", 1))


def test_epochs_that_do_not_end_a_run_are_refused_when_they_change(tmp_path: Path) -> None:
    resuming.begin_or_go_on(config(tmp_path / "run"))

    with pytest.raises(OptionError, match="this run ends after 3 steps"):
        resuming.begin_or_go_on(config(tmp_path / "run", epochs=2))


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
    with pytest.raises(OptionError, match="--processes is 2, but 4 were started"):
        launch.check_count(2)


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in TASK.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_a_task_of_slurm_is_a_process_of_the_run(task: pytest.MonkeyPatch) -> None:
    expected = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert launch.slurm(2) == {**expected, "MASTER_ADDR": "node07", "MASTER_PORT": "20033"}

    task.setenv("MASTER_ADDR", "other")
    task.setenv("MASTER_PORT", "29500")
    assert launch.slurm(2) == {**expected, "MASTER_ADDR": "other", "MASTER_PORT": "29500"}


def test_tasks_of_slurm_that_are_not_the_processes_asked_for_are_refused(task: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="--processes is 4, but srun started 2 tasks"):
        launch.slurm(4)


def test_a_batch_script_of_slurm_starts_its_processes_itself(task: pytest.MonkeyPatch) -> None:
    """It is one process, and has the number of tasks that srun would start."""
    task.delenv("SLURM_STEP_NUM_TASKS")
    task.setenv("SLURM_NTASKS", "2")
    assert launch.slurm(2) == {}


@pytest.mark.parametrize(
    ("nodes", "first"), [("a", "a"), ("a,b", "a"), ("a-1,b", "a-1"), ("n[3,5-7]-ib,b", "n3-ib"), ("n[01-10]", "n01")]
)
def test_the_first_node_of_slurm_is_where_the_processes_meet(nodes: str, first: str) -> None:
    assert launch.first_node(nodes) == first


@pytest.mark.slow
def test_tasks_of_slurm_and_processes_of_torchrun_train_what_one_process_trains(tmp_path: Path) -> None:
    port = _free_port()
    tasks = [
        subprocess.Popen(
            [sys.executable, "-m", "localize", *PIPE, "--output", "slurm", "--processes", "2"], cwd=tmp_path,
            env=ENVIRONMENT | TASK | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0",
                "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": "2", "MASTER_PORT": str(port)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        said = [task.communicate(timeout=900) for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    assert [task.returncode for task in tasks] == [0, 0], said
    assert "pipeline: 0: segments" in said[0][0]

    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = localize(tmp_path, *PIPE, "--output", "torchrun", launcher=launcher)
    assert done.returncode == 0, done.stderr[-3000:]

    settings = {"data": "digits", "epochs": 1, "max_steps": 20, "lr": 0.005, "device": "cpu"}
    train.run(TrainConfig("fc_mnist", recipe="dcl-ld", output=str(tmp_path / "one"), **settings))  # type: ignore[arg-type]
    one, *others = [(tmp_path / name / train.runs.BACKBONE).read_bytes() for name in ("one", "slurm", "torchrun")]
    assert others == [one, one]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def test_a_process_that_a_signal_has_ended_is_named_if_no_process_has_said_why() -> None:
    assert launch.culprit({0: 4, 2: -signal.SIGKILL}, 2) == 0
    assert launch.culprit({0: 4, 1: 4}, 1) == 1
    assert launch.culprit({0: -signal.SIGKILL, 2: -signal.SIGSEGV}, 2) == 2
    assert launch.culprit({0: -signal.SIGTERM, 1: 2}, 0) == 1
    assert launch.culprit({0: -signal.SIGTERM, 2: -signal.SIGKILL}, 0) == 2
    assert launch.culprit({0: -signal.SIGTERM}, 0) == 0


def test_segments_of_a_process_are_known_to_the_one_that_has_started_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(launch.STAGES, str(tmp_path / "stages.json"))
    assert launch.segments_of(1) == ""

    launch.say_stages(["0-2", "3"])

    error = launch.told(1, -signal.SIGKILL, launch.segments_of(1))
    assert str(error).startswith("process 1 of this run, which trains segments 3, was ended by SIGKILL.\n")
    assert launch.segments_of(2) == ""


def test_what_has_ended_a_process_is_named() -> None:
    assert isinstance(launch.told(1, 2), ReportedError)
    assert launch.told(1, 2).exit_code == 2
    error = launch.told(3, -signal.SIGKILL)
    assert isinstance(error, MissingError)
    assert str(error).startswith("process 3 of this run was ended by SIGKILL.\n")


@pytest.mark.slow
def test_one_command_trains_in_two_processes_and_an_error_of_both_is_said_once(tmp_path: Path) -> None:
    words = [*(word for word in RUN if word not in ("--d", "2")), "--processes", "2", "--resume-if-there"]
    done = localize(tmp_path, *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes on cpu" in done.stdout
    assert localize(tmp_path, *words).stdout.count("resuming from") == 1

    refused = localize(tmp_path, *words, "--lr", "0.01", "--max-restarts", "1")
    assert refused.returncode == 2
    assert refused.stderr.count("error: the recipe has changed") == 1, refused.stderr
    assert "restarting" not in refused.stderr


@pytest.mark.slow
def test_an_option_that_torchrun_has_too_is_ours(tmp_path: Path) -> None:
    done = localize(tmp_path, *RUN, "--processes", "2")

    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert "method 'dcl' has no option --d." in done.stderr


def test_all_processes_return_what_the_first_one_that_failed_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    store = distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    ranks = [piped.Ended(Team(rank, 3), None, None) for rank in range(3)]  # type: ignore[arg-type]
    own, same = OptionError("it does not learn."), MissingError("process 1 has ended.")

    assert ranks[1].first(own) is own
    for rank in (0, 2):
        reported = ranks[rank].first(same)
        assert isinstance(reported, ReportedError)
        assert (reported.problem, reported.exit_code) == ("it does not learn.", own.exit_code)
    assert ranks[1].first(same) is same, "it may say more"
