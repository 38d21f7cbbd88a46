"""The command that measures one GPU: at toy size every part gives rows, and what fails is a row beside the others."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the command."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec = importlib.util.spec_from_file_location("cuda", BENCHMARKS / "cuda.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "cuda", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Profiler clears events:UserWarning")
@pytest.mark.parametrize("part", ["convert", "train", "audit", "resume", "compile", "steps", "half", "plans"])
def test_every_part_runs_at_toy_size(
    part: str, cuda: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs, options: graph)
    monkeypatch.setattr(cuda, "SOFT", 1e9)  # the test's machine may be busy

    code = cuda.write(part, cuda.TOY, CPU)

    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows
    assert [row for row in rows if not row["ok"]] == []
    assert code == 0
    assert all(row["torch"] == torch.__version__.partition("+")[0] and row["toy"] for row in rows)
    if part in ("steps", "half", "plans"):
        assert {row["step"] for row in rows if "predicted" in row} == {row["step"] for row in rows if "ms" in row}
        assert all(row["allocated"] > 0 for row in rows if "predicted" in row)


def test_a_case_that_fails_is_a_row_and_the_rest_goes_on(cuda: ModuleType) -> None:
    def broken() -> Iterator[dict[str, Any]]:
        yield {"seen": 1}
        raise RuntimeError("out of memory")

    def cases(size: Any, device: torch.device) -> Iterator[Any]:
        yield cuda.Case("broken", broken)
        yield cuda.Case("whole", lambda: iter([{"seen": 2}]))

    rows = list(cuda.rows(cuda.Part(cases, 100.0), cuda.TOY, CPU))

    assert [(row["case"], row["ok"]) for row in rows] == [("broken", True), ("broken", False), ("whole", True)]
    assert rows[1]["error"] == "RuntimeError: out of memory"
    assert rows[1]["at"].startswith("test_cuda_benchmark.py:")


def test_a_case_that_there_is_no_time_for_is_a_row(cuda: ModuleType) -> None:
    def cases(size: Any, device: torch.device) -> Iterator[Any]:
        yield cuda.Case("late", lambda: iter([{}]))

    (row,) = cuda.rows(cuda.Part(cases, -1.0), cuda.TOY, CPU)

    assert row["case"] == "late"
    assert "skipped" in row
    assert not row["ok"]


def test_a_step_that_does_not_fit_leaves_the_other_steps_their_rows(
    cuda: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    peak = cuda.peak

    def without_room(local: Any, *given: Any) -> Any:
        if local.plan.method == "backprop":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return peak(local, *given)

    monkeypatch.setattr(cuda, "peak", without_room)

    rows = list(cuda.measured(cuda.TOY.half, 1, CPU))

    assert "out of memory" in rows[0]["error"]
    timed = {row["step"]: row for row in rows if "ms" in row}
    assert list(timed) == ["checkpoint", "dcl"]
    assert timed["dcl"]["to_backprop"] is None
    assert timed["dcl"]["to_checkpoint"] > 0


def test_a_part_that_hangs_is_stopped_and_reported(cuda: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert not cuda.in_process("train", 0.0, ["--toy"])

    assert json.loads(capsys.readouterr().out) == {
        "part": "train",
        "ok": False,
        "error": "stopped at its limit of 0 s",
    }


def test_it_ends_within_eight_minutes_and_measures_ten_local_steps(cuda: ModuleType) -> None:
    assert sum(part.limit for part in cuda.PARTS.values()) <= 470
    steps = [name for net in cuda.FULL.nets for name in net.steps if name not in ("backprop", "checkpoint")]
    assert len(steps) == 10
