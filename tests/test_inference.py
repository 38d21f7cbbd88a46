"""Inference as in the papers: numbers of the formulas, agreement with the parts of a model, and modes left alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import localize
from localize import inference, zoo
from localize.errors import InputError, MissingError, OptionError, UnknownNameError
from localize.heads.dictionary import DictionaryScores
from localize.ir import CutSpec, Features
from tests.golden import det

RTOL = 1e-9
"""Expected numbers were computed in float64 from the formulas of Choi et al. (2024), with det tensors."""


def close(found: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=RTOL, atol=1e-15)


def pass_through(classes: int) -> localize.LocalModel:
    """Return a model in float64 whose only local layer hands its input (8, 2, 2) on unchanged."""
    layer, after, last = nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(8, 8, 1), nn.Linear(32, classes)
    model = nn.Sequential(layer, nn.Sequential(after, nn.Flatten(), last)).double()
    with torch.no_grad():
        layer.weight.copy_(torch.eye(8)[:, :, None, None])
    example = torch.zeros(2, 8, 2, 2, dtype=torch.float64)
    return localize.transform(model, "dcl", example_input=example, cut=CutSpec(at=("0",)))


@pytest.fixture(scope="module")
def conv() -> localize.LocalModel:
    torch.manual_seed(0)
    model = zoo.create_model("cifar/conv256", num_classes=10)
    return localize.transform(model, "dcl", example_input=torch.zeros(2, 3, 32, 32))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("p", "first", "predictions"),
    [
        (0, [0.1832449867144142, 0.10474508485660813, 0.5350384212806316], [2, 2, 0, 1, 0, 1]),
        (1, [0.4301488631772633, 0.15003545011376798, 0.9893983557896444], [2, 2, 0, 1, 0, 1]),
        (3, [1.911572121954358, 0.42177764165672704, 3.715557962843721], [2, 2, 0, 1, 0, 1]),
        (10, [252.76591060820905, 46.436788742931135, 465.3452514240007], [2, 2, 0, 1, 0, 1]),
    ],
)
def test_the_weighted_sum_is_that_of_the_formula(p: float, first: list[float], predictions: list[int]) -> None:
    features = [Features("map", (4, 2, 3), 1)], [Features("map", (8, 2, 2), 1)]
    layers = [
        DictionaryScores(layout, 8)(values, det((3, 8), 30))
        for layout, values in zip(features, (det((6, 4, 2, 3), 31), det((6, 8, 2, 2), 38)), strict=True)
    ]

    found = inference.weighted_sum(layers, p)

    close(found[0], first)
    assert found.argmax(1).tolist() == predictions


def test_weights_are_powers_of_the_layer_or_the_layers_power() -> None:
    layers = [torch.tensor([[1.0, 0, 0]]), torch.tensor([[0, 1.0, 0]]), torch.tensor([[0, 0, 1.0]])]
    assert inference.weighted_sum(layers, 2).tolist() == [[1, 4, 9]]
    assert inference.weighted_sum(layers, 2, "p**l").tolist() == [[2, 4, 8]]
    assert inference.weighted_sum(layers, 1, "p**l").tolist() == [[1, 1, 1]]  # all layers equally
    many = [torch.ones(1, 1)] * 60
    assert inference.weighted_sum(many, 10, "p**l").isfinite().all()  # more than float32 holds


@pytest.mark.parametrize(
    ("layers", "p", "form", "message"),
    [
        ([torch.ones(1, 2)], 1, "l^p", r"form cannot be 'l\^p'.\n  its values are l\*\*p, p\*\*l"),
        ([], 1, "l**p", "no scores to add up"),
        ([torch.ones(1, 2)], float("nan"), "l**p", "p cannot be nan"),
        ([torch.ones(1, 2)], 0, "p**l", "p cannot be 0.\n.*above 0"),
        ([torch.ones(1, 2)] * 400, 10, "p**l", "too large a number at layer 400"),
    ],
)
def test_weights_that_are_none_are_refused(layers: list[Tensor], p: float, form: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        inference.weighted_sum(layers, p, form)


def test_super_labels_are_those_of_the_formula() -> None:
    local = pass_through(6)
    local.heads["dictionary"].weight.data.copy_(det((6, 8), 39))
    x, groups = det((6, 8, 2, 2), 38), (0, 1, 2, 0, 1, 2)

    rows = inference.averaged(det((6, 8), 39), inference.coarse_ids(groups, 6))
    means = DictionaryScores([Features("map", (8, 2, 2), 1)], 8)(x, rows)

    close(means[0], [-0.03764025813973937, -0.23294257505061222, 0.38649870241756606])
    close(means[5], [-0.03463115015260283, -0.4553020885849462, 0.2860381662267879])
    close(inference.without_classifier(local, x)[2, :2], [-0.09600450003833404, 0.706133445657171])
    assert inference.superlabels(local, x, groups, "mean").tolist() == [2, 1, 2, 0, 0, 2]
    assert inference.superlabels(local, x, groups, "super").tolist() == [2, 1, 2, 1, 1, 2]
    classifier = local.export()(x).argmax(1).tolist()
    assert inference.superlabels(local, x, groups, "naive").tolist() == [groups[fine] for fine in classifier]
    assert inference.superlabels(local, x, dict(enumerate(groups)), "mean").tolist() == [2, 1, 2, 0, 0, 2]


def test_saliency_is_that_of_the_formula() -> None:
    local = pass_through(3)
    local.heads["dictionary"].weight.data.copy_(det((3, 8), 30))
    x, label = det((6, 8, 2, 2), 38), torch.ones(6, dtype=torch.long)

    head = local.heads["head_0"]
    close(
        head.similarities(x, det((3, 8), 30))[0, 1],
        [-1.1087799848573767, 1.492807094076554, -0.2582139303265933, 0.05534828213605503],
    )
    close(
        inference.saliency(local, x, label, size=(2, 2))[0],
        [0.0, 1.0, 0.32694122038741263, 0.44746849967845936],
    )


def test_saliency_is_resized_bilinearly_to_the_image() -> None:
    maps = inference.resized(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), (2, 2), (4, 4))
    assert maps[0, 0].tolist() == [0, 0.25, 0.75, 1]  # linear between the centres of pixels, flat outside of them
    assert maps[0, :, 0].tolist() == [0, 0.5, 1.5, 2]


def test_a_map_of_equal_values_is_zero() -> None:
    assert inference.unit_range(torch.tensor([[3.0, 3.0], [1.0, 2.0]])).tolist() == [[0, 0], [0, 1]]


def test_similarities_are_without_noise_in_eval_mode_and_with_it_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """CFL, eq. 6, with the noise det((3, 4), 41) / 4."""
    head = DictionaryScores([Features("map", (4, 2, 3), 1)], 8, noise=True)
    x, dictionary, y = det((6, 4, 2, 3), 31), det((3, 8), 30), torch.tensor([0, 1, 2, 0, 1, 2])
    monkeypatch.setattr(torch, "randn_like", lambda _: det((3, 4), 41))
    losses = {mode: nn.functional.cross_entropy(head.train(mode)(x, dictionary), y).item() for mode in (True, False)}
    assert losses == pytest.approx({True: 1.1498588924625939, False: 1.1313126440994121}, rel=RTOL)


# ------------------------------------------------------------------------------------------ super-classes of CIFAR-100


def test_the_map_of_cifar100_has_twenty_super_classes_of_five() -> None:
    coarse = inference.CIFAR100_COARSE
    assert len(coarse) == 100
    assert [coarse.count(one) for one in range(20)] == [5] * 20
    assert list(inference.CIFAR100_SUPERCLASSES) == sorted(inference.CIFAR100_SUPERCLASSES)
    # Coarse labels of apple, aquarium_fish, baby, bear, beaver, ..., worm in the data set's own files.
    assert coarse[:20] == (4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11)
    assert coarse[-10:] == (18, 1, 2, 15, 6, 0, 17, 8, 14, 13)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ((0, 1), "has 2 classes, and the model tells 3.\n  classes without a super-class: 2."),
        ((0, 1, 1, 0), "has 4 classes, and the model tells 3."),
        ({0: 0, 1: 1, 3: 0}, "classes without a super-class: 2"),
        ((0, 2, 2), "super-class ids cannot be 0, 2.\n.*\n  help: 0 to 1"),
        ((0, 1, 1.5), "super-class ids cannot be 0, 1, 1.5"),
        ((0, -1, 0), "super-class ids cannot be 0, -1"),
    ],
)
def test_a_map_that_leaves_something_out_is_refused(groups: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        inference.coarse_ids(groups, 3)


# ------------------------------------------------------------------------------------------------------------ a model


def test_scores_are_those_of_eval_mode_and_modes_stay(conv: localize.LocalModel, images: Tensor) -> None:
    conv.train()
    conv.trunk.get_submodule(next(n for n, m in conv.trunk.named_modules() if isinstance(m, nn.BatchNorm2d))).eval()
    before = [module.training for module in conv.modules()]
    state = {key: value.clone() for key, value in conv.state_dict().items()}

    found = inference.scores(conv, images)
    answers = inference.answer(conv, images)
    inference.saliency(conv, images)

    assert [module.training for module in conv.modules()] == before
    assert True in before  # the modes are mixed: a function that set all of them would be seen
    assert False in before
    assert all(torch.equal(state[key], value) for key, value in conv.state_dict().items())
    conv.eval()
    expected = conv.scores(images)
    assert list(found) == list(expected) == [one.name for one in inference.depths(conv)]
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert torch.equal(answers, conv(images))
    assert not answers.requires_grad


def test_modes_come_back_after_an_error(conv: localize.LocalModel) -> None:
    conv.train()
    with pytest.raises(InputError):
        inference.scores(conv, torch.randn(2, 5, 32, 32))
    assert all(module.training for module in conv.modules())


@pytest.mark.parametrize("method", ["dcl", "auglocal", "backprop"])
def test_depths_are_named_as_the_scores_are(method: str) -> None:
    example = torch.zeros(2, 3, 32, 32)
    options = {"d": 2} if method == "auglocal" else {}
    local = localize.transform(zoo.create_model("cifar/resnet20"), method, example_input=example, **options)
    assert [one.name for one in inference.depths(local)] == list(inference.scores(local, example))
    assert [one.output for one in inference.depths(local)] == [False] * (len(local.plan.losses) - 1) + [True]


def test_a_layer_is_found_by_loss_by_segment_and_by_where_it_ends(conv: localize.LocalModel, images: Tensor) -> None:
    second = inference.depths(conv)[1]
    for name in (second.name, "segment_1", second.ends_at):
        assert inference.depth(conv, name) == second
    expected = inference.scores(conv, images)[second.name].argmax(1)
    assert torch.equal(inference.predict(conv, images, second.name), expected)
    assert torch.equal(inference.predict(conv, images), conv.eval()(images).argmax(1))
    with pytest.raises(UnknownNameError, match=r"no layer 'loss_9'.*\n  layers are loss_0 \(.*\n  help: did you mean"):
        inference.predict(conv, images, "loss_9")


def test_without_the_classifier_the_last_local_loss_answers(conv: localize.LocalModel, images: Tensor) -> None:
    found = inference.local_scores(conv, images)
    assert list(found) == [loss.name for loss in conv.plan.losses[:-1]]
    assert torch.equal(inference.without_classifier(conv, images), found[conv.plan.losses[-2].name])


def test_where_no_loss_trains_the_output_the_last_local_loss_answers(conv: localize.LocalModel, images: Tensor) -> None:
    plan = dataclasses.replace(conv.plan, losses=conv.plan.losses[:-1])
    local = localize.LocalModel(conv.trunk, conv.heads, plan, conv.program, conv.source)
    assert torch.equal(inference.answer(local, images), inference.scores(conv, images)["loss_1"])
    assert not torch.equal(inference.answer(local, images), inference.answer(conv, images))
    assert [one.name for one in inference.depths(local)] == ["loss_0", "loss_1"]


def test_averages_reach_the_scores_through_the_head(conv: localize.LocalModel, images: Tensor) -> None:
    groups = [fine % 3 for fine in range(10)]
    last = inference.local_scores(conv, images)["loss_1"]
    means = torch.stack([last[:, one::3].mean(1) for one in range(3)], 1)  # the mean is linear, and so are the scores
    assert torch.equal(inference.superlabels(conv, images, groups), means.argmax(1))


def test_saliency_is_of_the_label_that_is_asked_for(conv: localize.LocalModel, images: Tensor) -> None:
    order = conv.eval()(images).argsort(1, descending=True)
    for top in (1, 2):
        expected = inference.saliency(conv, images, order[:, top - 1])
        assert torch.equal(inference.saliency(conv, images, top=top), expected)
        assert expected.shape == (5, 32, 32)
        assert 0 <= expected.min() < expected.max() <= 1
    assert not torch.equal(inference.saliency(conv, images, at="loss_0"), inference.saliency(conv, images, at="loss_1"))


def test_where_there_are_no_label_embeddings_the_error_says_why(images: Tensor) -> None:
    local = localize.transform(zoo.create_model("cifar/resnet20"), "auglocal", example_input=images[:2], d=2)
    for call in (
        lambda: inference.superlabels(local, images, [0] * 5 + [1] * 5, "mean"),
        lambda: inference.superlabels(local, images, [0] * 5 + [1] * 5, "super"),
        lambda: inference.saliency(local, images),
    ):
        with pytest.raises(OptionError, match="auglocal have no label embeddings.\n  the scores of loss_"):
            call()
    assert inference.superlabels(local, images, [0] * 5 + [1] * 5, "naive").max() <= 1


def test_where_there_is_no_local_loss_the_error_says_so(images: Tensor) -> None:
    local = localize.transform(zoo.create_model("cifar/resnet20"), "backprop", example_input=images[:2])
    with pytest.raises(OptionError, match="no local loss of backprop makes class scores"):
        inference.without_classifier(local, images)
    with pytest.raises(OptionError, match="backprop does not show labels with the images"):
        inference.goodness(local, images)
    assert torch.equal(inference.answer(local, images), local.eval()(images))


def test_flat_features_have_no_saliency() -> None:
    x = torch.randn(2, 1, 28, 28)
    local = localize.transform(zoo.create_model("cifar/fc_mnist"), "dcl", example_input=x)
    with pytest.raises(OptionError, match="no layer has feature maps.*\n  layers that have: none"):
        inference.saliency(local, x)
    with pytest.raises(OptionError, match="loss_0 has no feature maps"):
        inference.saliency(local, x, at="loss_0")


def test_a_way_that_does_not_exist_is_answered_with_those_that_do(conv: localize.LocalModel, images: Tensor) -> None:
    with pytest.raises(OptionError, match="'maen'.*\n  ways are mean, super, naive.\n  help: did you mean 'mean'"):
        inference.superlabels(conv, images, [0] * 10, "maen")
    with pytest.raises(OptionError, match="top cannot be 11"):
        inference.saliency(conv, images, top=11)


class Doubling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x.flatten(1)).relu()
        return self.b(h) if self.training else self.b(h) * 2


def test_a_model_that_computes_something_else_in_eval_mode_is_not_looked_into() -> None:
    x = torch.randn(2, 3, 2, 2)
    local = localize.transform(Doubling(), "dcl", example_input=x)
    with pytest.raises(InputError, match="Doubling computes other operations in eval mode"):
        inference.scores(local, x)
    assert torch.equal(inference.answer(local, x), local.eval()(x))


# ------------------------------------------------------------------------------------------------------------ pictures


def test_a_picture_shows_the_image_and_beside_it_each_map(tmp_path: Path) -> None:
    image = torch.zeros(1, 2, 2)
    maps = torch.tensor([[[0.0, 1.0], [1.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]])
    inference.save_saliency(tmp_path / "a.png", image, maps, mean=0.5, std=0.1, opacity=1.0)

    pixels = np.asarray(Image.open(tmp_path / "a.png"))

    assert pixels.shape == (128, 3 * 128, 3)
    assert set(map(tuple, pixels[:, :128].reshape(-1, 3).tolist())) == {(128, 128, 128)}  # normalisation undone
    blue, red = (0, 0, 128), (128, 0, 0)
    assert tuple(pixels[0, 128].tolist()) == blue
    assert tuple(pixels[0, 255].tolist()) == red
    assert tuple(pixels[127, 128].tolist()) == red
    assert set(map(tuple, pixels[:, 256:].reshape(-1, 3).tolist())) == {red}
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_colour_images_are_normalised_channel_by_channel(tmp_path: Path) -> None:
    image = torch.zeros(3, 128, 130)
    inference.save_saliency(tmp_path / "a.png", image, torch.zeros(0, 128, 130), mean=(0.0, 0.2, 1.0), std=(1, 1, 1))
    pixels = np.asarray(Image.open(tmp_path / "a.png"))
    assert pixels.shape == (128, 130, 3)
    assert tuple(pixels[5, 5].tolist()) == (0, 51, 255)


def test_a_picture_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MissingError, match="cannot be written"):
        inference.save_saliency(tmp_path / "file" / "a.png", torch.zeros(1, 2, 2), torch.zeros(1, 2, 2))
    with pytest.raises(InputError, match="has 2 channels"):
        inference.save_saliency(tmp_path / "a.png", torch.zeros(2, 2, 2), torch.zeros(1, 2, 2))


# ------------------------------------------------------------------------------------------------------------ goodness


@pytest.fixture(scope="module")
def shown() -> localize.LocalModel:
    torch.manual_seed(0)
    model = zoo.create_model("cifar/fc_mnist", input_shape=(1, 8, 8))
    return localize.transform(model, "ff", example_input=torch.zeros(2, 1, 8, 8), images="raw")


def test_goodness_is_the_sum_over_layers_at_every_label(shown: localize.LocalModel) -> None:
    x = torch.randn(4, 1, 8, 8)
    found, later = inference.goodness(shown, x, skip_first=False), inference.goodness(shown, x)
    assert found.shape == later.shape == (4, 10)
    shown.eval()
    with torch.no_grad():
        for label in (0, 7):
            marked = x.clone()
            low, high = x.amin((1, 2, 3)), x.amax((1, 2, 3))
            marked.view(4, -1)[:, :10] = low[:, None]
            marked.view(4, -1)[:, label] = high
            squares = [h[0].flatten(1).square().mean(1) for h in shown.features(marked)[:-1]]
            assert len(squares) == 2
            torch.testing.assert_close(found[:, label], sum(squares))
            torch.testing.assert_close(later[:, label], squares[1])


def test_goodness_behind_the_only_layer_is_refused() -> None:
    x = torch.randn(2, 1, 8, 8)
    model = zoo.create_model("cifar/fc_mnist", input_shape=(1, 8, 8))
    local = localize.transform(model, "ff", example_input=x, cut=CutSpec(segments=2))
    assert inference.goodness(local, x, skip_first=False).shape == (2, 10)
    with pytest.raises(OptionError, match="has no goodness after its first layer"):
        inference.goodness(local, x)
