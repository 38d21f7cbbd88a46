"""Which of several outputs holds the class scores."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import localize
from localize.errors import OptionError
from localize.runtime.model import LocalModel
from tests.corpus.experts import MultiExit, WithFeatures


def converted(model: nn.Module, **options: Any) -> tuple[LocalModel, list[str]]:
    """Return a net as a local model, and the warnings of the conversion."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        local = localize.transform(model.train(), "dcl", example_input=torch.randn(2, 3, 16, 16), **options)
    return local, [str(warning.message) for warning in caught]


@pytest.mark.parametrize(("form", "name"), [("list", "output_3"), ("reversed", "output_0"), ("dict", "exit3")])
def test_the_deepest_of_several_exits_is_taken_and_a_line_says_so(form: str, name: str) -> None:
    local, told = converted(MultiExit(form))

    trunk = local.plan.segments.trunk
    assert trunk.output == name and len(trunk.sides) == 3
    assert f"{name}, the deepest, is taken for the class scores" in told[0]
    x, y = torch.randn(4, 3, 16, 16), torch.arange(4)
    result = local.step(x, y, torch.optim.SGD(local.param_groups(lr=0.0), lr=0.0))
    assert result.logits.shape == (4, 5)


def test_an_output_that_is_asked_for_is_taken_without_a_word() -> None:
    local, told = converted(MultiExit("list"), output="output_2")

    assert local.plan.segments.trunk.output == "output_2"
    assert {side.name for side in local.plan.segments.trunk.sides} == {"output_0", "output_1", "output_3"}
    assert not told


def test_an_output_can_be_asked_for_in_a_recipe() -> None:
    recipe = {"method": "dcl", "output": "exit2"}
    local = localize.transform(MultiExit("dict").train(), recipe, example_input=torch.randn(2, 3, 16, 16))

    assert local.plan.segments.trunk.output == "exit2"
    assert localize.recipes.load(recipe).output == "exit2"


def test_an_unknown_output_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(OptionError, match=r"(?s)has no output 'exit9'.*exit0 \(3, 5\).*exit3"):
        converted(MultiExit("dict"), output="exit9")


def test_features_that_are_returned_before_the_scores_are_not_taken_for_them() -> None:
    local, told = converted(WithFeatures())

    assert local.plan.segments.trunk.num_classes == 5 and not told


def test_an_embedding_of_which_the_scores_are_made_is_not_taken_for_them() -> None:
    class Embedding(WithFeatures):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            embedding = self.body(x).mean((2, 3))
            return embedding, self.fc(embedding)

    local, _ = converted(Embedding())

    assert local.plan.segments.trunk.output == "output_1"
