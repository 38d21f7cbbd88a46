"""Which of several outputs holds the class scores."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import localize
from localize.errors import OptionError
from localize.graph.trace import trace
from localize.runtime.model import LocalModel
from tests.corpus.experts import MultiExit, WithFeatures


def converted(model: nn.Module, recipe: Any = "dcl", **options: Any) -> tuple[LocalModel, list[str]]:
    """Return a net as a local model, and the warnings of the conversion."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        local = localize.transform(model.train(), recipe, example_input=torch.randn(2, 3, 16, 16), **options)
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


class Helped(nn.Module):
    """Blocks and a classifier, and a second one of more layers; ``form`` says how the two are returned."""

    def __init__(self, form: str, after: int = 3, name: str = "second") -> None:
        super().__init__()
        self.form, self.after, self.name = form, after, name
        widths = (3, 8, 8, 8)
        for i in range(3):
            setattr(self, f"stage{i + 1}", nn.Sequential(nn.Conv2d(widths[i], 8, 3, padding=1), nn.ReLU()))
        self.fc = nn.Linear(8, 5)
        tall = [layer for _ in range(4) for layer in (nn.Conv2d(8, 8, 1), nn.ReLU())]
        setattr(
            self,
            name,
            nn.Sequential(*tall, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5)),
        )

    def forward(self, x: Tensor) -> Any:
        for i in range(3):
            x = getattr(self, f"stage{i + 1}")(x)
            if i + 1 == self.after:
                second = getattr(self, self.name)(x)
        first = self.fc(x.mean((2, 3)))
        if self.form == "dict":
            return {"scores": first, "helper": second}
        return (first, second) if self.form == "main first" else [second, first]


@pytest.mark.parametrize("form", ["main first", "main last", "dict"])
def test_a_second_classifier_of_more_layers_is_not_the_deepest(form: str) -> None:
    local, told = converted(Helped(form, after=2))

    name = {"main first": "output_0", "main last": "output_1", "dict": "scores"}[form]
    assert local.plan.segments.trunk.output == name
    assert f"{name}, the deepest, is taken" in told[0]


@pytest.mark.parametrize(("name", "scores"), [("aux_head", "output_1"), ("second", "output_0")])
def test_of_two_classifiers_on_the_same_features_an_auxiliary_one_is_not_the_scores(name: str, scores: str) -> None:
    local, _ = converted(Helped("main last", after=3, name=name))

    assert local.plan.segments.trunk.output == scores


class TwoHeads(nn.Module):
    """One classifier of a single layer and one of three, on the same vector."""

    def __init__(self, tall_first: bool) -> None:
        super().__init__()
        self.tall_first = tall_first
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        self.low = nn.Linear(8, 5)
        self.tall = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x).mean((2, 3))
        return (self.tall(h), self.low(h)) if self.tall_first else (self.low(h), self.tall(h))


@pytest.mark.parametrize("tall_first", [True, False])
def test_of_two_classifiers_on_one_vector_the_first_is_taken_and_a_line_says_so(tall_first: bool) -> None:
    local, told = converted(TwoHeads(tall_first))

    assert local.plan.segments.trunk.output == "output_0"
    assert "output_0, the first of the deepest, is taken" in told[0]


class Perceptron(nn.Module):
    """Layers on vectors, with a classifier after each; ``wide`` exits have more layers than the last one."""

    def __init__(self, wide: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(768 if i == 0 else 16, 16), nn.ReLU()) for i in range(3)])
        self.exits = nn.ModuleList()
        for i in range(3):
            more = [layer for _ in range(4) for layer in (nn.Linear(16, 16), nn.ReLU())] if wide and i < 2 else []
            self.exits.append(nn.Sequential(*more, nn.Linear(16, 5)))

    def forward(self, x: Tensor) -> list[Tensor]:
        x, scores = x.flatten(1), []
        for layer, leave in zip(self.layers, self.exits, strict=True):
            x = layer(x)
            scores.append(leave(x))
        return scores


@pytest.mark.parametrize("wide", [True, False])
def test_exits_of_a_net_of_vectors_are_compared_by_its_layers(wide: bool) -> None:
    local, _ = converted(Perceptron(wide))

    assert local.plan.segments.trunk.output == "output_2"


class Blocks(nn.Module):
    """Blocks whose names say nothing, and an exit of convolutions after the first of them."""

    class Block(nn.Module):
        def __init__(self, inputs: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(inputs, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).relu()

    def __init__(self) -> None:
        super().__init__()
        self.low, self.middle, self.high = self.Block(3), self.Block(8), self.Block(8)
        self.early = nn.Sequential(*[nn.Conv2d(8, 8, 1) for _ in range(6)])
        self.fc, self.early_fc = nn.Linear(8, 5), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.low(x)
        early = self.early_fc(self.early(x).mean((2, 3)))
        return early, self.fc(self.high(self.middle(x)).mean((2, 3)))


def test_a_block_of_the_trunk_counts_more_than_the_layers_of_an_exit() -> None:
    local, _ = converted(Blocks())

    assert local.plan.segments.trunk.output == "output_1"


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_scores_of_torchvision_models_are_the_main_ones_whatever_they_are_called(name: str) -> None:
    class Unnamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = getattr(torchvision.models, name)(num_classes=5, init_weights=False)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return tuple(self.net(x))[::-1]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trunk = trace(Unnamed().train(), torch.empty(2, 3, 299, 299, device="meta"))

    assert trunk.output == f"output_{len(trunk.sides)}"


@pytest.mark.parametrize("name", ["out", "main"])
def test_scores_of_a_segmentation_model_are_the_main_ones(name: str) -> None:
    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = torchvision.models.segmentation.fcn_resnet50(num_classes=5, weights_backbone=None, aux_loss=True)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            scores = self.net(x)
            return {"helper" if name == "main" else "aux": scores["aux"], name: scores["out"]}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trunk = trace(Renamed().train(), torch.empty(2, 3, 32, 32, device="meta"))

    assert trunk.output == name and len(trunk.sides) == 1


def test_an_output_with_a_weight_in_the_recipe_is_never_the_scores() -> None:
    recipe = {"method": "dcl", "outputs": {"output_3": 0.5, "output_0": 0.1}}
    local, told = converted(MultiExit("list"), recipe)

    assert local.plan.segments.trunk.output == "output_2"
    assert {loss.side for term in local.plan.losses for loss in term.terms if loss.side} == {
        "output_0", "output_1", "output_3",
    }  # fmt: skip
    assert "returns 2 outputs" in told[0]


def test_a_field_called_logits_with_a_weight_in_the_recipe_is_not_the_scores() -> None:
    class Named(MultiExit):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return dict(zip(("logits", "a", "b", "c"), super().forward(x), strict=True))

    local, _ = converted(Named("list"), {"method": "dcl", "outputs": {"logits": 0.5}})

    assert local.plan.segments.trunk.output == "c"


def test_no_output_is_both_a_further_one_and_the_scores() -> None:
    with pytest.raises(OptionError, match=r"(?s)'output_1' cannot be the class scores.*help: leave 'output_1' out"):
        converted(MultiExit("list"), {"method": "dcl", "output": "output_1", "outputs": {"output_1": 0.5}})
    with pytest.raises(OptionError, match=r"'output_0' cannot be the class scores") as caught:
        converted(MultiExit("list"), {"method": "dcl", "outputs": {f"output_{i}": 0.5 for i in range(4)}})
    assert caught.value.option == "outputs"
