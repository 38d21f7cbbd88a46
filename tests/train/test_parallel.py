"""Two processes on halves of a batch learn what one learns on the whole, also when the gradients of one overflow."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from localize.errors import MissingError, ReportedError
from localize.train import parallel, places, runs

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys, torch, localize
from localize.train import TrainConfig, parallel, resume, run
from localize.train.optimizers import create_optimizer
from tests.nets import ALL

torch.set_num_threads(1)
team = parallel.joined(torch.device("cpu"))
METHODS = (("dcl", {}), ("auglocal", {"d": 2, "head_norm": False}))
for method, options, scaled in [(*one, scaled) for scaled in (False, True) for one in METHODS]:
    torch.manual_seed(0)
    model = ALL["MLP"]().double()
    example = torch.empty(2, 3, 8, 8).double()
    local = localize.transform(model, method, example_input=example, loss_scaling=scaled, **options)
    torch.manual_seed(1)
    for parameter in local.heads.parameters():
        torch.nn.init.normal_(parameter, std=0.1 + 0.1 * team.rank)
    team.same_start(local)
    amp = {"amp": True, "amp_dtype": "float16"} if scaled else {}
    optimizer = create_optimizer(local.train(), TrainConfig("MLP", opt="adam", lr=0.01, clip_grad=0.5, **amp), team)
    scaler = parallel.Scaler(torch.device("cpu"), team) if scaled else None
    torch.manual_seed(2)
    for number in range(4):
        x, y = torch.randn(6, 3, 8, 8).double(), torch.randint(5, (6,))
        overflows = scaled and number == 1 and team.rank == team.size - 1
        first = local.get_parameter(local.plan.block("segment_1").parameters[0])
        hook = first.register_hook(lambda gradient: gradient / 0 if overflows else gradient)
        local.step(team.part(x), team.part(y), optimizer, scaler=scaler)
        hook.remove()
    assert scaler is None or scaler.get_scale() == 2.0**15
    torch.save(local.state_dict(), f"{sys.argv[1]}/{method}-{scaled}-{team.size}-{team.rank}.pt")
assert team.any(team.rank == team.size - 1, torch.device("cpu"))
assert not team.any(False, torch.device("cpu"))
assert team.total(torch.tensor(1 + team.rank)) == team.size * (team.size + 1) / 2
assert team.gathered(team.rank) == list(range(team.size))

mixed = f"{sys.argv[1]}/mixed-{team.size}"
how = dict(data="digits", epochs=1, max_steps=4, mixup=0.4, cutmix=1.0, lr=0.01, output=mixed, device="cpu")
done = run(TrainConfig("fc_mnist", recipe="dcl", batch_size=32, **how))
torch.save(done.local.state_dict(), f"{mixed}-{team.rank}.pt")

folder = f"{sys.argv[1]}/run-{team.size}"
settings = dict(data="digits", augment="crop2-flip", epochs=1, max_steps=8, checkpoint_every=3, clip_grad=1.0, lr=0.01)
run(TrainConfig("fc_mnist", recipe="dcl", batch_size=64 // team.size, output=folder, device="cpu", **settings))
before = open(folder + "/metrics.jsonl").read()
resume(folder)
assert open(folder + "/metrics.jsonl").read() == before
"""


@pytest.mark.slow
def test_two_processes_have_the_weights_of_one_on_the_joined_batch(tmp_path: Path) -> None:
    """With updates after each segment and a shared dictionary, and with one update at the end."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]):
        command = [sys.executable, *launcher, str(script), str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]

        assert done.stdout.count("epoch 1/1") == 2, "one process prints, of two runs"

    for name in ("dcl-False", "auglocal-False", "dcl-True", "auglocal-True"):
        alone, first, second = (torch.load(tmp_path / f"{name}-{team}.pt") for team in ("1-0", "2-0", "2-1"))
        for name, tensor in alone.items():
            assert torch.equal(first[name], second[name]), name
            torch.testing.assert_close(first[name], tensor, rtol=1e-9, atol=1e-9)

    first, second = (torch.load(tmp_path / f"mixed-2-{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first), "each mixes its own part, and all learn alike"

    one, two = (load_file(tmp_path / f"run-{n}" / runs.BACKBONE) for n in (1, 2))
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-4)
    one, two = (
        [json.loads(line) for line in (tmp_path / f"run-{n}" / runs.METRICS).read_text().splitlines()] for n in (1, 2)
    )
    for alone, both in zip(one, two, strict=True):
        assert alone["train_loss"] == pytest.approx(both["train_loss"], rel=1e-3)
        assert alone["train_accuracy"] == pytest.approx(both["train_accuracy"], abs=0.005)
        assert alone["step"] == both["step"]


def test_what_waits_for_a_process_that_has_ended_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: object) -> None:
        raise RuntimeError("Connection closed by peer [127.0.0.1]:4711\nException raised from ...")

    monkeypatch.setattr(torch.distributed, "all_reduce", fails)
    with pytest.raises(
        MissingError, match="another process of this run has ended.\n  Connection closed by peer .*4711\n"
    ):
        parallel.Team(1, 2).any(False, torch.device("cpu"))


def test_what_waits_for_a_process_that_is_late_says_that_it_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: object) -> None:
        raise RuntimeError("[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 2000ms for recv operation")

    monkeypatch.setattr(torch.distributed, "all_reduce", fails)
    with pytest.raises(MissingError, match=r"does not answer.\n.*2000ms.*\n  help: .*longer --timeout"):
        parallel.Team(1, 2).any(False, torch.device("cpu"))


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGSTOP, r"process 1 of this run does not answer.\n  it is stopped.\n  Connection closed"),
        (signal.SIGKILL, r"process 1 of this run has ended.\n  Connection closed"),
    ],
)
def test_a_process_of_this_host_that_is_stopped_or_has_ended_is_named(
    number: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*given: object) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(torch.distributed, "all_reduce", fails)
    with subprocess.Popen(["sleep", "60"]) as other:
        host = places.here().host
        started = Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[19]
        there = places.Place(host, other.pid, started)
        team = parallel.Team(0, 3, (places.here(), there, dataclasses.replace(there, host="elsewhere")))
        assert team.troubled() is None

        other.send_signal(number)
        end = time.monotonic() + 10
        while team.troubled() is None and time.monotonic() < end:
            time.sleep(0.01)
        with pytest.raises(MissingError, match=said):
            team.any(False, torch.device("cpu"))
        other.kill()


@pytest.mark.parametrize(("rank", "error"), [(0, MissingError), (1, ReportedError)])
def test_processes_that_were_asked_for_different_things_are_refused(
    rank: int, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    same, other = {"a recipe": "lr: 0.1\nopt: sgd"}, {"a recipe": "lr: 0.2\nopt: sgd"}
    monkeypatch.setattr(parallel.Team, "gathered", lambda team, value: [same, same])
    parallel.Team(rank, 2).refuse_unlike(same)

    monkeypatch.setattr(parallel.Team, "gathered", lambda team, value: [same, other])
    with pytest.raises(
        error, match=r"process 1 differs from process 0 in a recipe.\n  process 0: lr: 0.1\n.*1: lr: 0.2"
    ):
        parallel.Team(rank, 2).refuse_unlike(same)


def test_every_process_has_its_gpu_as_the_current_one_before_they_join(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[object] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "set_device", done.append)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(parallel.Team, "gathered", lambda team, value: [])
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda backend, **options: done.append((backend, options))
    )
    device = torch.device("cuda", 1)

    assert parallel.joined(device) == parallel.Team(1, 2)

    start = datetime.timedelta(seconds=parallel.START)
    assert done == [device, ("nccl", {"timeout": start, "device_id": device})]


def test_one_process_on_cuda_keeps_the_current_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert parallel.joined(torch.device("cuda")) is parallel.ALONE


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert parallel.own_device(torch.device("cuda")) == torch.device("cuda", 1)
    assert parallel.own_device(torch.device("cpu")) == torch.device("cpu")

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(
        MissingError, match=r"4 processes on this machine, but 2 GPUs.\n.*\n  help: .*--nproc-per-node 2"
    ):
        parallel.own_device(torch.device("cuda"))


TOGETHER = """
import sys, time
import torch, localize
from localize.errors import MissingError, ReportedError, OptionError
from localize.train import data, parallel, passes
from localize.train.data import sources
from tests.nets import ALL

torch.set_num_threads(1)
team = parallel.joined(torch.device("cpu"))
team.answer_within(float(sys.argv[2]))
first = team.rank == 0

def raised(error):
    try:
        with team.agreeing():
            if error:
                raise error
    except Exception as found:
        return type(found).__name__, str(found), getattr(found, "exit_code", None)

def fetch(folder, download):
    if not (folder / "images").exists():
        time.sleep(0.5)
        with open(folder / "fetched", "a") as log:
            log.write("once\\n")
        (folder / "images").touch()
    return "images"

if sys.argv[1] == "agree":
    assert raised(None) is None
    assert raised(MissingError("gone.")) == ("MissingError" if first else "ReportedError", "gone.", 4)
    own = raised(None if first else OptionError("only here."))
    assert own == (("ReportedError", "only here.", 2) if first else ("OptionError", "only here.", 2)), own
    own = raised(OptionError(f"in {team.rank}."))
    assert own == ("OptionError", f"in {team.rank}.", 2), own

    sources.DATASETS = {"digits": sources.get("digits"), "mine": sources.Downloaded(fetch, 2, ("images",))}
    assert sources.read("mine", sys.argv[3], download=True) == "images"

    splits = data.load("digits", (3, 8, 8))
    torch.manual_seed(0)
    local = localize.transform(ALL["ResNet"](), "dcl", example_input=torch.empty(2, 3, 8, 8))
    for buffer in local.buffers():
        if buffer.is_floating_point():
            buffer += team.rank  # as statistics of other images
    team.same_buffers(local)
    batches = data.evaluation_batches(splits.test, 50, team=team)
    assert len(list(batches)) == 4
    mine = passes.evaluate(local, batches, torch.device("cpu"), team)
    alone = passes.evaluate(local, data.evaluation_batches(splits.test, 50), torch.device("cpu"))
    assert mine == alone and alone.images == 360, (mine, alone)
    assert passes.evaluate(local, [], torch.device("cpu"), team).images == 0
else:
    if first:
        try:
            team.wait()
        except MissingError as error:
            print(f"error: {error}", flush=True)
            sys.exit(1)  # torchrun then ends the other one
    else:
        time.sleep(120)
"""


def together(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script in two processes."""
    script = tmp_path / "together.py"
    script.write_text(TOGETHER)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, str(script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_processes_agree_on_errors_fetch_once_and_test_together(tmp_path: Path) -> None:
    done = together(tmp_path, "agree", "600", str(tmp_path))

    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "fetched").read_text() == "once\n"


@pytest.mark.slow
def test_a_process_that_does_not_answer_ends_the_wait_of_the_others(tmp_path: Path) -> None:
    done = together(tmp_path, "wait", "10")

    assert "error: another process of this run does not answer.\n" in done.stdout, done.stderr[-3000:]
    assert "a longer --timeout" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train cifar/resnet2O --method dcl --data digits", "error: there is no model"),
        ("train cifar/resnet20 --method dcl --data cifar10 --data-dir nowhere", "error: data set 'cifar10' is not in"),
        ("train cifar/resnet20 --bogus", "No such option"),
    ],
)
def test_an_error_that_all_processes_have_is_printed_once(words: str, said: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--", "localize"]
    command = [sys.executable, *launcher, *words.split()]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    assert done.returncode != 0
    assert done.stderr.count(said) == 1, done.stderr[-3000:]
    assert f'File "{ROOT}' not in done.stderr, "torchrun's own traceback alone"
