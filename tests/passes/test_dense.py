"""Models that classify pixels: the output is compared with every pixel, local heads with the shares of the classes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import localize
from localize import build
from localize.errors import InputError, MethodError, ModelError
from localize.heads.shares import ClassShares
from localize.ir import CutSpec
from localize.passes.dense import SHARES

SIZE = (3, 8, 12)


class Segmenter(nn.Module):
    """Residual blocks, a 1x1 classifier, and scores for every pixel; further scores in train mode with ``aux``."""

    def __init__(self, *, aux: bool = False, scale: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.blocks = nn.ModuleList([Residual(6), Residual(6), Residual(6)])
        self.classifier = nn.Conv2d(6, 4, 1)
        self.aux = nn.Conv2d(6, 4, 1) if aux else None
        self.scale = scale

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x, between = self.stem(x), None
        for number, block in enumerate(self.blocks):
            x = block(x)
            between = x if number == 0 else between
        result = {"out": F.interpolate(self.classifier(x), scale_factor=self.scale, mode="bilinear")}
        if self.aux is not None:
            result["aux"] = F.interpolate(self.aux(between), scale_factor=self.scale, mode="bilinear")
        return result


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x)).relu()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    labels = torch.randint(0, 4, (4, *SIZE[1:]))
    labels[:, :3] = 255
    return torch.randn(4, *SIZE), labels


def made(method: str, x: Tensor, **options: object) -> localize.LocalModel:
    return localize.transform(Segmenter(), method, example_input=x, cut=CutSpec(segments=3), **options)


def test_shares_count_the_labelled_pixels() -> None:
    labels = torch.tensor([[[0, 0], [2, 255]], [[255, 255], [255, 255]], [[1, 1], [1, 1]]])

    shares = ClassShares(3, 255)(labels)

    torch.testing.assert_close(shares, torch.tensor([[2 / 3, 0, 1 / 3], [0, 0, 0], [0, 1, 0]]))


@pytest.mark.parametrize("method", ["auglocal", "dcl"])
def test_losses_are_those_of_pixels_and_of_shares(method: str, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    local = made(method, x)
    heads = {loss.name: loss.terms[0] for loss in local.plan.losses[:-1]}

    result = local.step(x, y, torch.optim.SGD(local.param_groups(lr=0.0)))

    shares = F.one_hot(y[:, 3:].flatten(1), 4).double().mean(1).float()
    torch.testing.assert_close(result.losses["loss_2"], F.cross_entropy(result.scores["loss_2"], y, ignore_index=255))
    for name, term in heads.items():
        assert term.target.block == SHARES
        torch.testing.assert_close(result.losses[name], F.cross_entropy(result.scores[name], shares))
    assert result.logits.shape == (4, 4, *SIZE[1:])
    assert result.scores["loss_0"].shape == (4, 4)


@pytest.mark.parametrize("method", ["auglocal", "dcl"])
def test_the_audit_holds(method: str, batch: tuple[Tensor, Tensor]) -> None:
    report = localize.audit(made(method, batch[0]), batch).raise_if_failed()

    assert any("share of every class among the labelled pixels" in line for line in report.deviations)


def test_auxiliary_nets_classify_images_though_the_classifier_does_not(batch: tuple[Tensor, Tensor]) -> None:
    local = made("auglocal", batch[0])

    assert {scores.shape for name, scores in local.scores(batch[0]).items() if name != "loss_2"} == {(4, 4)}


def test_a_further_output_is_compared_with_every_pixel_too(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    local = localize.transform(Segmenter(aux=True), "dcl", example_input=x, cut=CutSpec(segments=3))
    term = next(term for loss in local.plan.losses for term in loss.terms if term.side == "aux")

    assert term.options == (("ignore_index", 255),)
    before = local.trunk.aux.weight.detach().clone()
    local.step(x, y, torch.optim.SGD(local.param_groups(lr=0.1)))
    assert not torch.equal(local.trunk.aux.weight, before)


def test_random_labels_have_the_size_of_the_output(batch: tuple[Tensor, Tensor]) -> None:
    x, y = build.random_batch(made("dcl", batch[0]))

    assert x.shape[1:] == SIZE
    assert y.shape == (4, *SIZE[1:])
    assert set(y.unique().tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("method", "why"),
    [
        ("predsim", "it maps them by one_hot"),
        ("feat", "it compares with supervised_contrastive"),
        ("dfa", "it feeds back the error of the output"),
        ("accumulate", "it adds up parts of the batch by their numbers of images"),
        ("cfl-b", "it lets .* read them"),
    ],
)
def test_a_method_that_needs_labels_of_images_is_refused(method: str, why: str, batch: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(MethodError, match=f"Segmenter classifies pixels, and .* needs one label .*: {why}"):
        localize.transform(Segmenter(), method, example_input=batch[0])


def test_labels_of_another_size_are_refused(batch: tuple[Tensor, Tensor]) -> None:
    local = made("dcl", batch[0])

    with pytest.raises(InputError, match=r"labels are of shape \(4,\)\.\n  .* class ids, int64, of shape \(4, 8, 12\)"):
        local.step(batch[0], torch.zeros(4, dtype=torch.long), torch.optim.SGD(local.param_groups(lr=0.1)))


def test_scores_of_another_size_than_the_images_are_none(batch: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ModelError, match=r"shape \(N, 4, 4, 6\), not class scores .*\n.*\(N, classes, 8, 12\)"):
        localize.transform(Segmenter(scale=1), "dcl", example_input=batch[0])
