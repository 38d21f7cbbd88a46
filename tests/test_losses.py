"""Losses reproduce values that were measured with the authors' code, or computed from a paper's formula in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from localize import losses
from tests.golden import det

Y6, UNMATCHED, UNBALANCED = (torch.tensor(y) for y in ([0, 1, 2, 0, 1, 2], [0, 1, 2, 0, 1, 3], [0, 0, 0, 1, 1, 2]))
UNIT = F.normalize(det((6, 5), 20), dim=1)


def close(found: Tensor, expected: float, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype), rtol=rtol, atol=0)


# InfoPro's code (blackfeather-wang/InfoPro-Pytorch at a38362a), and eq. 1 of DCL evaluated as it is written.
@pytest.mark.parametrize(
    ("loss", "features", "labels", "expected"),
    [
        (losses.supervised_contrastive, UNIT, Y6, 9.030545742146797),
        (losses.supervised_contrastive, UNIT, UNMATCHED, 8.29531021554132),
        (losses.supervised_contrastive, UNIT, UNBALANCED, 10.328476430689287),
        (losses.pair_contrastive, UNIT, Y6, 9.030545742146796),
        (losses.pair_contrastive, UNIT, UNBALANCED, 11.387982095717977),
        (losses.pair_contrastive, det((6, 5), 20), Y6, 15.775340506878209),
    ],
    ids=["supcon", "supcon-alone", "supcon-unbalanced", "pairs", "pairs-unbalanced", "pairs-not-normalised"],
)
def test_contrastive_losses_equal_their_sources(
    loss: Callable, features: Tensor, labels: Tensor, expected: float
) -> None:
    close(loss(features, labels), expected)


def test_the_ratio_of_eq_9_of_cfl() -> None:
    features = F.normalize(det((6, 5, 2, 2), 21).mean((2, 3)), dim=1)

    close(losses.feature_ratio(features, Y6), -3.4027101614706314)


# The formula of CFL's eq. 4, and the form of its code; with h = det((6, 4, 2, 3), 31) averaged, T = det((3, 8), 30).
@pytest.mark.parametrize(
    ("loss", "noise", "expected"),
    [
        (losses.batch_ratio, 0.0, 1.4330890238903102),
        (losses.batch_ratio, 0.25, 1.447229382553908),
        (losses.batch_contrastive, 0.0, 1.6479490855488497),
        (losses.batch_contrastive, 0.25, 1.654586717493135),
    ],
)
def test_both_forms_of_the_batch_loss_of_cfl(loss: Callable, noise: float, expected: float) -> None:
    h = det((6, 4, 2, 3), 31).mean((2, 3))
    embeddings = F.adaptive_avg_pool1d(det((3, 8), 30), 4)[Y6] + noise * det((6, 4), 40)

    close(loss(h @ embeddings.T, Y6), expected)


ALL = [losses.supervised_contrastive, losses.pair_contrastive, losses.feature_ratio]
SQUARE = [losses.batch_contrastive, losses.batch_ratio]


@pytest.mark.parametrize("loss", [*ALL, *SQUARE])
@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 1, 2, 3], [0, 0, 1, 2]], ids=["one-class", "alone", "mixed"])
def test_a_batch_without_partners_or_without_others_has_a_finite_gradient(loss: Callable, labels: list[int]) -> None:
    values = (10 * det((4, 4), 5)).requires_grad_()

    loss(values, torch.tensor(labels)).backward()

    assert values.grad.isfinite().all()


@pytest.mark.parametrize("loss", [*ALL, *SQUARE])
def test_the_gradient_is_that_of_the_loss(loss: Callable) -> None:
    assert torch.autograd.gradcheck(lambda values: loss(values, UNBALANCED), det((6, 6), 9).requires_grad_())


@pytest.mark.parametrize("loss", [*ALL, *SQUARE])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_half_precision_are_computed_in_float32(loss: Callable, dtype: torch.dtype) -> None:
    values = det((6, 6), 9).to(dtype)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(values, UNBALANCED)

    assert found.dtype is torch.float32
    torch.testing.assert_close(found, loss(values.float(), UNBALANCED))


def test_a_batch_without_any_pair_has_no_pair_loss() -> None:
    assert losses.pair_contrastive(UNIT, torch.arange(6)) == 0
    assert losses.supervised_contrastive(UNIT, torch.arange(6)) == 0


def test_reconstruction_in_half_precision_is_computed_in_float32() -> None:
    image, target = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = losses.reconstruction(image.bfloat16(), target)

    close(found, F.binary_cross_entropy(image.bfloat16().float(), target).item(), rtol=1e-6)


@pytest.mark.parametrize("loss", [*ALL, *SQUARE])
def test_shapes_are_known_without_data(loss: Callable) -> None:
    found = loss(torch.empty(6, 6, device="meta"), torch.empty(6, dtype=torch.int64, device="meta"))

    assert found.shape == ()


# ------------------------------------------------------------------------------------------------- losses of labels

SCORES = 3 * det((6, 5), 11)
SOFT = det((6, 5), 12).softmax(1)
WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 0.0, 3.0], dtype=torch.float64)
ID5 = torch.tensor([0, 1, 2, 4, 4, 0])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weight", [None, WEIGHTS], ids=["equal", "weighted"])
@pytest.mark.parametrize("labels", [ID5, SOFT, torch.tensor([0, 1, -100, 4, -100, 0])], ids=["ids", "soft", "ignored"])
def test_focal_without_gamma_is_the_cross_entropy_of_torch(
    labels: Tensor, weight: Tensor | None, smoothing: float
) -> None:
    found = losses.focal(SCORES, labels, 0.0, weight=weight, label_smoothing=smoothing)

    close(found, F.cross_entropy(SCORES, labels, weight, label_smoothing=smoothing).item(), rtol=1e-12)


def test_focal_counts_a_class_by_how_improbable_it_is() -> None:
    p = SCORES.softmax(1)
    each = [(1 - p[n, y]) ** 2 * -p[n, y].log() for n, y in enumerate(ID5)]

    close(losses.focal(SCORES, ID5), sum(each).item() / 6, rtol=1e-12)
    assert losses.focal(SCORES, ID5) < F.cross_entropy(SCORES, ID5)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_has_a_gradient_where_a_class_is_certain(gamma: float) -> None:
    scores = torch.tensor([[200.0, 0.0], [0.0, 200.0]]).requires_grad_()

    losses.focal(scores, torch.tensor([0, 0]), gamma).backward()

    assert scores.grad.isfinite().all()
    torch.testing.assert_close(scores.grad[1], torch.tensor([-0.5, 0.5]))


@pytest.mark.parametrize("weight", [None, WEIGHTS], ids=["equal", "weighted"])
def test_bce_is_that_of_torch_with_class_ids_as_one_hot(weight: Tensor | None) -> None:
    hot = F.one_hot(ID5, 5).double()
    expected = F.binary_cross_entropy_with_logits(SCORES, 0.8 * hot + 0.2 / 5, weight).item()

    close(losses.binary_cross_entropy(SCORES, ID5, weight=weight, label_smoothing=0.2), expected, rtol=1e-12)
    close(losses.binary_cross_entropy(SCORES, hot, weight=weight, label_smoothing=0.2), expected, rtol=1e-12)


def test_bce_with_class_ids_is_that_of_timm() -> None:
    from timm.loss import BinaryCrossEntropy

    close(losses.binary_cross_entropy(SCORES, ID5, label_smoothing=0.1), BinaryCrossEntropy(0.1)(SCORES, ID5).item())


def test_bce_leaves_out_images_of_class_minus_100() -> None:
    labels = torch.tensor([0, -100, 2, 4, 4, -100])
    kept = labels >= 0

    expected = losses.binary_cross_entropy(SCORES[kept], labels[kept]).item()

    close(losses.binary_cross_entropy(SCORES, labels), expected, rtol=1e-12)


def test_squared_error_takes_one_hot_labels_as_they_are() -> None:
    hot = F.one_hot(ID5, 5).double()

    assert torch.equal(losses.squared_error(SCORES, ID5), losses.squared_error(SCORES, hot))


@pytest.mark.parametrize("name", ["focal", "binary_cross_entropy", "squared_error"])
@pytest.mark.parametrize("labels", [ID5, SOFT], ids=["ids", "soft"])
def test_a_loss_that_is_declared_a_mean_is_one_over_any_parts(name: str, labels: Tensor) -> None:
    loss = getattr(losses, name)
    assert losses.about(f"localize.losses.{name}").mean

    close(loss(SCORES[:2], labels[:2]) / 3 + loss(SCORES[2:], labels[2:]) * 2 / 3, loss(SCORES, labels).item(), 1e-12)


@pytest.mark.parametrize(("name", "kept"), [("focal", False), ("binary_cross_entropy", True)])
def test_what_class_weights_make_of_the_mean_is_as_declared(name: str, kept: bool) -> None:
    loss = getattr(losses, name)
    parts = loss(SCORES[:2], ID5[:2], weight=WEIGHTS) / 3 + loss(SCORES[2:], ID5[2:], weight=WEIGHTS) * 2 / 3

    assert (losses.about(f"localize.losses.{name}").weights == "mean") is kept
    assert torch.isclose(parts, loss(SCORES, ID5, weight=WEIGHTS)).item() is kept


def test_of_a_function_that_declares_nothing_the_least_is_assumed() -> None:
    assert losses.about("torch.nn.functional.mse_loss") == losses.Loss(("ids",), mean=False)


def test_a_function_from_outside_declares_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    @losses.declared(labels=("ids", "soft"), mean=True)
    def mine(scores: Tensor, labels: Tensor) -> Tensor:
        return scores.sum()

    monkeypatch.setattr("tests.golden.mine", mine, raising=False)

    assert losses.about("tests.golden.mine") == losses.Loss(("ids", "soft"), mean=True)
