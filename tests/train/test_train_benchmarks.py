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

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_autograd_holds_is_counted_by_storage_and_until_it_lets_go() -> None:
    meter = benchmark("saved_bytes").Meter(frozenset())
    x = torch.randn(1000, requires_grad=True)  # 4000 bytes
    with torch.autograd.graph.saved_tensors_hooks(meter.pack, lambda saved: saved.tensor):
        y = x.exp()  # saves its result
        z = y * y[:]  # saves y twice: the same storage, as a whole and as a view
        assert meter.held == 4000
        total = z.exp().sum()  # saves its result
    assert (meter.held, meter.peak) == (8000, 8000)
    total.backward()
    assert (meter.held, meter.peak) == (0, 8000)


def test_a_view_keeps_its_whole_storage() -> None:
    meter = benchmark("saved_bytes").Meter(frozenset())
    x, constant = torch.randn(500, requires_grad=True), torch.randn(1000)
    with torch.autograd.graph.saved_tensors_hooks(meter.pack, lambda saved: saved.tensor):
        product = x * constant[:500]
    assert meter.held == 4000
    product.sum().backward()


def test_ignored_storages_are_not_counted() -> None:
    saved_bytes = benchmark("saved_bytes")
    weight = torch.randn(1000, requires_grad=True)
    meter = saved_bytes.Meter(frozenset({weight.untyped_storage().data_ptr()}))
    with torch.autograd.graph.saved_tensors_hooks(meter.pack, lambda saved: saved.tensor):
        total = (weight * weight).sum()
    assert meter.peak == 0
    total.backward()


def test_auglocal_saves_at_most_a_fifth_of_the_bytes_of_backprop_on_resnet110() -> None:
    saved_bytes = benchmark("saved_bytes")
    x, y = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    peaks = {}
    for method, options in (("backprop", {}), ("auglocal", {"d": 2})):
        local = localize.transform(zoo.create_model("cifar/resnet110"), method, example_input=x, **options)
        peaks[method] = saved_bytes.saved_bytes(local, x, y)
    assert peaks["auglocal"] <= 0.20 * peaks["backprop"]
    # By hand: stem input, then conv, bn, relu inputs of 54 blocks in three stages; 8.1 MiB an image, two images.
    assert peaks["backprop"] == pytest.approx(2 * 8.1 * 2**20, rel=0.02)


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
