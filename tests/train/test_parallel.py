"""Two processes on halves of a batch learn what one learns on the whole, also when the gradients of one overflow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from localize.errors import MissingError
from localize.train import parallel, runs

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

folder = f"{sys.argv[1]}/run-{team.size}"
settings = dict(data="digits", augment="crop2-flip", epochs=1, max_steps=8, checkpoint_every=3, clip_grad=1.0, lr=0.01)
run(TrainConfig("fc_mnist", recipe="dcl", batch_size=64 // team.size, output=folder, device="cpu", **settings))
before = open(folder + "/metrics.jsonl").read()
resume(folder)
assert open(folder + "/metrics.jsonl").read() == before
"""


def test_two_processes_have_the_weights_of_one_on_the_joined_batch(tmp_path: Path) -> None:
    """With updates after each segment and a shared dictionary, and with one update at the end."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]):
        command = [sys.executable, *launcher, str(script), str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]

        assert done.stdout.count("epoch 1/1") == 1, "one process prints"

    for name in ("dcl-False", "auglocal-False", "dcl-True", "auglocal-True"):
        alone, first, second = (torch.load(tmp_path / f"{name}-{team}.pt") for team in ("1-0", "2-0", "2-1"))
        for name, tensor in alone.items():
            assert torch.equal(first[name], second[name]), name
            torch.testing.assert_close(first[name], tensor, rtol=1e-9, atol=1e-9)

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
