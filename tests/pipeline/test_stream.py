"""Tensors arrive with the strides they were sent with; what describes them is put into numbers and back."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from localize.pipeline.rank import seed_of
from localize.pipeline.stream import TYPES, PointToPoint, form_of, is_dense, read_form


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(2, 3, 4),
        torch.zeros(2, 3, 4).transpose(1, 2),
        torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        torch.zeros(4, 1, 3).permute(2, 1, 0),
    ],
)
def test_what_fills_its_memory_keeps_its_strides(value: torch.Tensor) -> None:
    assert is_dense(value)
    assert read_form(form_of(value)) == (torch.float32, tuple(value.shape), value.stride())


@pytest.mark.parametrize("value", [torch.zeros(2, 6)[:, ::2], torch.zeros(1, 3).expand(2, 3), torch.zeros(4, 6)[:, :3]])
def test_what_does_not_fill_its_memory_is_copied_first(value: torch.Tensor) -> None:
    assert not is_dense(value)


@pytest.mark.parametrize("dtype", TYPES)
def test_every_type_that_can_cross_is_told(dtype: torch.dtype) -> None:
    assert read_form(form_of(torch.zeros(3, dtype=dtype)))[0] == dtype


def test_seeds_differ_by_run_batch_and_loss() -> None:
    seeds = {seed_of(run, batch, what) for run in (0, 1) for batch in (0, 1) for what in ("step_0/1", "step_1/1")}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)


class Wire:
    """Stands for a process that has asked for values, or has sent them: nothing is under way for long."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.value, self.alive, self.most = torch.zeros(4), 0, 0
        monkeypatch.setattr(torch.distributed, "irecv", self.receive)
        monkeypatch.setattr(torch.distributed, "isend", lambda flat, to, group: self)

    def receive(self, flat: torch.Tensor, source: int, group: object) -> Wire:
        describes = flat.dtype == torch.int64
        flat.copy_(form_of(self.value) if describes else self.value.view(torch.uint8))
        if not describes:
            self.alive += 1
            self.most = max(self.most, self.alive)
            weakref.finalize(flat.untyped_storage(), self.died)
        return self

    def died(self) -> None:
        self.alive -= 1

    def wait(self) -> None:
        pass


@pytest.mark.parametrize("buffers", [2, 3])
def test_no_more_batches_are_held_than_there_are_buffers(buffers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire(monkeypatch)
    stream = PointToPoint(None, torch.device("cpu"), lambda rank, error: error, buffers=buffers)
    stream.begin([("train", 4)] * 8, [(0, "x_1")])
    for _ in range(8):
        stream.batch(("train", 4))
        value = stream.receive("x_1", source=0)
        assert torch.equal(value, wire.value)
        stream.send("x_2", value.clone(), to=2)
        del value  # as a step does when it returns

    assert wire.most == buffers
    assert wire.alive == 0


SCRIPT = """
import copy
import torch, localize
from torch import distributed
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from localize.pipeline import partition
from localize.pipeline.partition import undivided
from localize.pipeline.rank import RankModel
from localize.pipeline.texts import texts
from tests.nets import ALL

BATCHES, SIZE = 4, 6
torch.set_num_threads(1)
torch.manual_seed(0)
X = torch.randn(BATCHES, SIZE, 3, 8, 8)
Y = torch.arange(BATCHES * SIZE).view(BATCHES, SIZE) % 5
local = localize.transform(ALL["ResNet"](), "dcl-s", example_input=X[0])
whole = RankModel(copy.deepcopy(local), undivided(local), 0, local.source, seed=0).train()

def sgd(model):
    return torch.optim.SGD(model.param_groups(), lr=0.05, momentum=0.9)

optimizer = sgd(whole)
losses = [whole.step(x, y, optimizer).losses for x, y in zip(X, Y)]

distributed.init_process_group("gloo")
rank, parts = distributed.get_rank(), partition(local, 2)
(message,) = parts.messages
assert not parts.stages[1].images

class Stage(torch.nn.Module):
    def __init__(self):
        super().__init__()
        model = RankModel(local, parts, rank, texts(local, parts)[rank], seed=0).train()
        model.stream = self
        self.held, self.count = (model, sgd(model)), 0

    def batch(self, key):
        pass

    def receive(self, name, *, source):
        return self.value

    def send(self, name, value, *, to):
        self.value = value

    def forward(self, value):
        model, optimizer = self.held
        self.value, y = value.detach(), Y[self.count]
        self.count += 1
        with torch.enable_grad():
            found = model.step(self.value, y, optimizer).losses
        expected = losses[self.count - 1]
        assert all(torch.equal(one, expected[name]) for name, one in found.items()), self.count
        return self.value.clone()

stage = Stage()
boundary = torch.empty(SIZE * message.rows, *message.shape, dtype=message.dtype)
engine = PipelineStage(
    stage, rank, 2, torch.device("cpu"), input_args=(X[0] if rank == 0 else boundary,), output_args=(boundary,)
)
schedule = ScheduleGPipe(engine, n_microbatches=BATCHES)
schedule.step(X.flatten(0, 1)) if rank == 0 else schedule.step()
assert stage.count == BATCHES
expected = whole.state_dict()
for name, value in stage.held[0].own_state().items():
    assert torch.equal(value, expected[name]), name
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_the_engine_of_pytorch_for_pipelines_gives_the_same_bits(tmp_path: Path) -> None:
    """Losses and weights of two ranks, whose messages ``PipelineStage`` carries, are those of one process."""
    (tmp_path / "script.py").write_text(SCRIPT)
    root = Path(__file__).resolve().parents[2]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, str(tmp_path / "script.py")],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
