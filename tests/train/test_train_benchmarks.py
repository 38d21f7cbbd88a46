"""The commands that print the README's accuracy and memory tables measure what they say."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import localize
from localize import zoo
from localize.memory import measure, sgd

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_study_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    digits = benchmark("digits_accuracy")
    results = tmp_path / "results.jsonl"
    started: list[tuple[str, int]] = []

    def run(config: Any) -> Any:
        if len(started) == 4:
            raise RuntimeError("power cut")
        started.append((config.recipe, config.seed))
        accuracy = {"backprop": 0.99, "dcl": 0.5}[config.recipe] - 0.01 * config.seed
        return SimpleNamespace(metrics=[{"test_accuracy": accuracy, "train_loss": 0.1}])

    monkeypatch.setattr(digits, "run", run)
    command = ["digits_accuracy.py", "--methods", "backprop", "dcl", "--seeds", "3", "--results", str(results)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(RuntimeError, match="power cut"):
        digits.main()
    assert started == [("backprop", 0), ("dcl", 0), ("backprop", 1), ("dcl", 1)]
    started.clear()
    digits.main()
    assert started == [("backprop", 2), ("dcl", 2)]
    assert len(results.read_text().splitlines()) == 6
    assert json.loads(results.read_text().splitlines()[0])["key"]["epochs"] == 10
    rows = [line.split("|")[1:7] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["backprop", "", "98.00", "1.00", "3", "99.00, 98.00, 97.00"],
        ["dcl", "", "49.00", "1.00", "3", "50.00, 49.00, 48.00"],
    ]


@pytest.mark.parametrize("method", ["backprop", "dcl"])
def test_the_allocator_agrees(method: str) -> None:
    """torch's profiler sees every allocation of the CPU, those inside of operations too."""
    local = localize.transform(
        zoo.create_model("cifar/resnet20").train(), method, example_input=torch.empty(2, 3, 32, 32)
    )
    x, y, optimizer = torch.randn(32, 3, 32, 32), torch.arange(32) % 10, sgd(local.param_groups(lr=0.1))
    found = measure(local, x, y, optimizer)
    peak = benchmark("measuring").allocated(local, x, y, optimizer)
    workspace = 2 * 32 * 16 * 32 * 32 * 4  # what the backward of a convolution takes and gives back: its largest maps
    assert 0 <= peak - (found.peak - found.resident) <= workspace
