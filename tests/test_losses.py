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
