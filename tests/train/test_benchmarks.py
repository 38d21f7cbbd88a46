"""The commands that measure the README's memory tables measure what they say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

import localize
from localize import zoo
from localize.estimate.memory import measure, sgd

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
