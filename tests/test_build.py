"""A model made from a recipe has as many class scores as the recipe says."""

from __future__ import annotations

from pathlib import Path

import pytest

import localize
from localize.build import build
from localize.errors import ModelError

NET = """
from torch import nn

def make():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5))
    net.input_shape = (3, 2, 2)
    return net
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nets.py").write_text(NET)
    monkeypatch.chdir(tmp_path)


def recipe(classes: int) -> localize.Recipe:
    return localize.recipes.load({"method": "dcl", "model": "nets.py:make", "num_classes": classes})


def test_a_factory_without_num_classes_is_taken_if_its_scores_fit(here: None) -> None:
    assert build(recipe(5)).plan.segments.trunk.num_classes == 5


def test_a_factory_whose_scores_do_not_fit_is_refused(here: None) -> None:
    with pytest.raises(ModelError, match="nets.py:make returns 5 class scores, and 4 are needed"):
        build(recipe(4))
