"""A pipeline of processes leaves what one process leaves, bit for bit; what stops it is named, and it goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from localize import transform
from localize.errors import MethodError, MissingError, OptionError
from localize.pipeline import partition
from localize.pipeline.rank import RankModel
from localize.pipeline.texts import texts
from localize.recipes import Recipe
from localize.recipes.settings import TrainConfig
from localize.runtime.model import LocalModel
from localize.train import piped, resuming, run, runs, sharded
from localize.train.parallel import Team
from tests.nets import ALL

ROOT = Path(__file__).resolve().parents[2]
NETS = """
import torch
from tests.nets import TwoStreams as Two, ViT

def vit(num_classes=10):
    net = ViT()
    net.head = torch.nn.Linear(8, num_classes)
    return net

def two(num_classes=10):
    net = Two()
    net.fc = torch.nn.Linear(10, num_classes)
    return net

vit.input_shape = two.input_shape = (3, 8, 8)
vit.num_classes = two.num_classes = 10
"""
TINY = (
    *("train", "fc_mnist", "--method", "dcl-ld", "--data", "digits", "--epochs", "2", "--max-steps", "50"),
    *("--batch-size", "32", "--lr", "0.005", "--device", "cpu"),
)


@contextmanager
def started(
    folder: Path, *words: str, processes: int, launcher: tuple[str, ...] = ()
) -> Iterator[subprocess.Popen[str]]:
    """Start ``localize`` in a group of its own, all of which is killed in the end."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    count = () if launcher else ("--processes", str(processes))
    command = [sys.executable, *launcher, "-m", *(["--"] if launcher else []), "localize", *words, *count]
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    ranks: set[int] = set()
    try:
        yield process
    finally:
        ranks |= set(children(process.pid))
        for one in (*ranks, process.pid):
            if os.path.exists(f"/proc/{one}"):
                os.kill(one, signal.SIGKILL)
        process.wait()


def localize(folder: Path, *words: str, processes: int) -> str:
    with started(folder, *words, processes=processes) as process:
        out, errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]
    return out


def children(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    try:
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def same(one: Path, other: Path) -> None:
    """Compare two runs: losses and accuracies, exported files, weights and optimizer states of the last checkpoint."""
    lines = [
        [{**json.loads(line), "images_per_second": 0} for line in (run / runs.METRICS).read_text().splitlines()]
        for run in (one, other)
    ]
    assert lines[0] == lines[1]
    for name in (runs.BACKBONE, runs.HEADS):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    states = [sharded.read(path, sharded.keys(path)) for path in (sharded.folders(run)[-1] for run in (one, other))]
    assert states[0].keys() == states[1].keys()
    assert any(key.startswith("optimizer.") for key in states[0])
    for key, value in states[0].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][key])), key


@pytest.mark.slow
def test_two_processes_leave_what_one_leaves_and_one_without_a_pipeline(tmp_path: Path) -> None:
    """With another order of steps: one process trains all segments on a batch before it takes the next."""
    localize(tmp_path, *TINY, "--parallel", "pipe", "--output", "two", processes=2)
    settings = {"data": "digits", "epochs": 2, "max_steps": 50, "batch_size": 32, "device": "cpu", "lr": 0.005}
    run(TrainConfig("fc_mnist", recipe="dcl-ld", parallel="pipe", output=str(tmp_path / "one"), **settings))
    run(TrainConfig("fc_mnist", recipe="dcl-ld", output=str(tmp_path / "plain"), **settings))

    same(tmp_path / "two", tmp_path / "one")
    assert (tmp_path / "two" / runs.BACKBONE).read_bytes() == (tmp_path / "plain" / runs.BACKBONE).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "counts"),
    [
        ("nets.py:vit --method dgl --opt adamw --lr 0.003", (2, 3)),
        ("nets.py:two --method infopro --augment crop2-flip", (2, 4)),
        ("nets.py:vit --method dcl-o --delay 1", (2, 3)),
        ("cifar/resnet20 --method dgl -K 5 --input-shape 3,8,8 --clip-grad 1 --grad-accum-steps 2", (2, 3, 4)),
    ],
)
def test_any_number_of_processes_leaves_what_one_leaves(words: str, counts: tuple[int, ...], tmp_path: Path) -> None:
    """With dropout, with two tensors at a cut and images that later ranks read, with updates of several batches, and
    with a dictionary that reaches earlier ranks a batch late."""
    (tmp_path / "nets.py").write_text(NETS)
    rest = "--data digits --epochs 2 --max-steps 50 --batch-size 32 --device cpu --parallel pipe --trust-code"
    for count in (1, *counts):
        localize(tmp_path, "train", *f"{words} {rest}".split(), "--output", f"of-{count}", processes=count)

    for count in counts:
        same(tmp_path / "of-1", tmp_path / f"of-{count}")


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_in_any_number_of_processes(tmp_path: Path) -> None:
    words = [*TINY, "--parallel", "pipe", "--checkpoint-every", "5", "--output"]
    localize(tmp_path, *words, "whole", processes=1)

    with started(tmp_path, *words, "killed", processes=3) as process:
        wait_for(lambda: len(sharded.folders(tmp_path / "killed")) > 0)
        os.kill(children(process.pid)[1], signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert re.search(r"error: process 1.*, which trains segments \d.*SIGKILL|error: process 1, which", errors), errors

    resumed = ["train", "--resume", "killed"]
    with started(tmp_path, *resumed, processes=2) as process:
        before = sharded.folders(tmp_path / "killed")[-1]
        wait_for(lambda: process.poll() is not None or sharded.folders(tmp_path / "killed")[-1] != before)
        os.kill(children(process.pid)[0], signal.SIGKILL)
        process.communicate(timeout=60)
    localize(tmp_path, *resumed, processes=1)

    same(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
def test_a_process_that_is_stopped_ends_the_others_and_is_named(tmp_path: Path) -> None:
    words = [*TINY, "--parallel", "pipe", "--checkpoint-every", "5", "--output", "run", "--timeout", "8"]
    with started(tmp_path, *words, processes=3) as process:
        wait_for(lambda: len(sharded.folders(tmp_path / "run")) > 0)
        stopped = children(process.pid)[1]
        os.kill(stopped, signal.SIGSTOP)
        _, errors = process.communicate(timeout=100)

    assert process.returncode == 4, errors[-2000:]
    assert errors.count("error: ") == 1, errors[-2000:]
    assert "process 1, which trains segments" in errors
    assert "does not answer" in errors
    assert not os.path.exists(f"/proc/{stopped}")


@pytest.mark.slow
def test_a_process_that_is_stopped_is_named_where_batches_are_shared_out(tmp_path: Path) -> None:
    words = [word for word in TINY if word not in ("--max-steps", "50")]
    words += ["--checkpoint-every", "5", "--output", "run", "--timeout", "8"]
    words[words.index("--epochs") + 1] = "200"
    with started(tmp_path, *words, processes=2) as process:
        wait_for(lambda: any((tmp_path / "run" / "checkpoints").glob("*")))
        os.kill(children(process.pid)[1], signal.SIGSTOP)
        _, errors = process.communicate(timeout=100)

    assert process.returncode == 4, errors[-2000:]
    assert "error: process 1 of this run does not answer.\n  it is stopped." in errors


@pytest.mark.slow
def test_torchrun_starts_a_killed_process_again_and_the_run_ends_as_if_nothing_had_been(tmp_path: Path) -> None:
    words = [*TINY, "--parallel", "pipe", "--checkpoint-every", "5", "--resume-if-there", "--output"]
    localize(tmp_path, *words, "whole", processes=1)

    count = ("--nproc-per-node", "2", "--max-restarts", "1")
    launcher = ("-m", "torch.distributed.run", "--standalone", *count)
    with started(tmp_path, *words, "run", processes=2, launcher=launcher) as process:
        wait_for(lambda: len(sharded.folders(tmp_path / "run")) > 0)
        os.kill(children(process.pid)[1], signal.SIGKILL)
        out, errors = process.communicate(timeout=400)

    assert process.returncode == 0, errors[-2000:]
    assert "resuming from" in out
    same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_a_killed_process_is_started_again_and_the_run_ends_as_if_nothing_had_been(tmp_path: Path) -> None:
    words = [*TINY, "--parallel", "pipe", "--checkpoint-every", "5", "--resume-if-there", "--output"]
    localize(tmp_path, *words, "whole", processes=1)

    with started(tmp_path, *words, "run", "--max-restarts", "1", processes=2) as process:
        wait_for(lambda: len(sharded.folders(tmp_path / "run")) > 0)
        os.kill(children(process.pid)[1], signal.SIGKILL)
        out, errors = process.communicate(timeout=400)

    assert process.returncode == 0, errors[-2000:]
    assert "restarting: 1 of 1" in errors
    assert "resuming from" in out
    same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    ("what", "said"),
    [("is stopped", "does not answer.\n  it is stopped.\n"), ("has ended", "has ended.\n")],
)
def test_a_process_that_is_missed_while_a_checkpoint_is_written_is_named(
    what: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No value has been asked of it, so that it follows from where it is."""
    local = transform(ALL["ResNet"](), "dgl", example_input=torch.zeros(2, 3, 8, 8))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(Team, "troubled", lambda team: (1, what))

    error = piped.Ended(Team(0, 3), partition(local, 3), local.plan).somewhere(RuntimeError("Connection closed"))

    assert str(error).startswith(f"process 1, which trains segments 1, {said}")


def wait_for(condition: object, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.02)


class Fails:
    """Stands for a checkpoint that is being written."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def result(self) -> None:
        raise self.error


def test_who_cannot_write_a_checkpoint_is_named(tmp_path: Path) -> None:
    writer = sharded.Writer(tmp_path, None, MissingError)
    full = OSError(28, "No space left on device")
    writer._last = Fails(CheckpointException("of a rank", {2: (full, None)}))  # type: ignore[dict-item]
    with pytest.raises(
        MissingError, match=r"process 2 cannot write a checkpoint to .*\n.*No space left on device\n  .* MiB are free"
    ):
        writer.wait()


def test_a_process_that_ends_while_a_checkpoint_is_written_is_not_called_a_full_disk(tmp_path: Path) -> None:
    writer = sharded.Writer(tmp_path, None, lambda error: MissingError(f"ended: {error}"))
    writer._last = Fails(RuntimeError("Connection closed by peer"))
    with pytest.raises(MissingError, match="ended: Connection closed by peer"):
        writer.wait()


def test_a_pipeline_may_go_on_with_another_timeout_and_other_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    written = Recipe("dgl", train={"parallel": "pipe", "stages": (0, 2), "timeout": 120.0})
    assert resuming.changed(written, timeout=300.0).train == {**written.train, "timeout": 300.0}
    assert resuming.changed(written, stages=(0, 1)).train["stages"] == (0, 1)

    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "stages" not in resuming.changed(written).train
    with pytest.raises(OptionError, match="this run is not a pipeline"):
        resuming.changed(Recipe("dgl"), stages=(0, 1))


@pytest.mark.parametrize("net", ["ResNet", "ViT"])
def test_a_rank_without_data_takes_the_part_that_it_is_sent(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(device: str) -> LocalModel:
        torch.manual_seed(0)
        with torch.device(device):
            model = ALL[net]()
        return transform(model, "dgl", example_input=torch.zeros(2, 3, 8, 8, device=device))

    def rank(local: LocalModel, number: int) -> RankModel:
        return RankModel(local, parts, number, sources[number], seed=0)

    whole, empty = made("cpu"), made("meta")
    parts = partition(whole, 2)
    sources = texts(whole, parts)
    assert texts(empty, parts) == sources
    wire: list[torch.Tensor] = []
    monkeypatch.setattr(torch.distributed, "send", lambda value, to: wire.append(value.clone()))
    monkeypatch.setattr(torch.distributed, "recv", lambda value, source: value.copy_(wire.pop(0)))
    expected = dict(piped.tensors_by_name(whole))

    first = rank(whole, 0)
    piped.hand_out(expected, first, torch.device("cpu"))
    second = rank(empty, 1)
    piped.hand_out(dict(piped.tensors_by_name(empty)), second, torch.device("cpu"))

    assert not wire
    held = {name for name, value in piped.tensors_by_name(second) if not value.is_meta}
    assert set(parts.stages[1].tensors) <= held
    for name, value in piped.tensors_by_name(second):
        if name in held:
            assert torch.equal(value, expected[name]), name
            assert value.requires_grad == expected[name].requires_grad


def asked(**settings: object) -> TrainConfig:
    return TrainConfig("fc_mnist", recipe="dcl-ld", data="digits", device="cpu", parallel="pipe", **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"amp": True, "amp_dtype": "float16"}, "--amp-dtype"),
        ({"model_ema": True}, "--model-ema"),
        ({"channels_last": True}, "--channels-last"),
        ({"compile": True}, "--compile"),
        ({"opt": "lamb"}, "optimizer 'lamb'"),
    ],
)
def test_what_is_not_exact_from_process_to_process_is_refused(
    settings: dict[str, object], named: str, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=f"{named} does not work with --parallel pipe"):
        run(asked(output=str(tmp_path / "run"), **settings))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_an_optimizer_that_takes_each_parameter_by_itself_is_taken(opt: str) -> None:
    piped.refuse_coupling(asked(opt=opt, clip_grad=1.0))


def test_gradients_are_not_clipped_by_a_norm_that_no_process_knows(tmp_path: Path) -> None:
    config = TrainConfig("fc_mnist", recipe="drtp", device="cpu", parallel="pipe", clip_grad=1.0, output="run")
    with pytest.raises(OptionError, match="so the norm would cover the gradients of all processes"):
        run(config)


def test_a_method_with_one_loss_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="one loss, whose gradient flows back"):
        run(TrainConfig("fc_mnist", device="cpu", parallel="pipe", output=str(tmp_path / "run")))


def test_stages_without_a_pipeline_are_refused() -> None:
    with pytest.raises(OptionError, match="says what each process of a pipeline trains"):
        TrainConfig("fc_mnist", stages=(0, 1))
