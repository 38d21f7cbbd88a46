"""The examples in docstrings run, and print what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
import torch

import localize

PACKAGE = Path(localize.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs, options: graph)  # it takes minutes
    module = importlib.import_module(name)
    x, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    model = localize.zoo.create_model("cifar/resnet20")
    local = localize.transform(model, "dgl", example_input=x, cut=3)
    optimizer = torch.optim.SGD(local.param_groups(lr=0.1), lr=0.1)
    names = {"localize": localize, "torch": torch, "x": x, "y": y, "model": model, "local": local}

    runner, count = doctest.DocTestRunner(), 0
    for example in doctest.DocTestFinder().find(module, globs={**vars(module), **names, "optimizer": optimizer}):
        if example.examples:
            runner.run(example)
            count += 1

    assert count > 0
    assert runner.failures == 0
