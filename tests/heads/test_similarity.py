"""Local error signals are those of the reference code (anokland/local-loss at 7b3b40b), in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localize.heads.initial import materialize
from localize.heads.similarity import Mixed, OneHot, Pooled, Prediction, SignPrediction, pooling
from localize.ir import Features
from localize.losses import sign_cross_entropy, similarity, similarity_matching
from tests.golden import det

Y6 = torch.tensor([0, 1, 2, 0, 1, 2])
MAP = Features("map", (4, 4, 4), 1)


def close(found: Any, expected: Any) -> None:
    found, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (found, expected))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def one_hot() -> Tensor:
    return OneHot(3)(Y6)


def feature_map() -> Tensor:
    return det((6, 4, 4, 4), 5).relu().requires_grad_()


# ---------------------------------------------------------------------------------------------------------- similarity

MATRICES = {
    "flat": (
        det((6, 5), 1),
        [0.9999998101181544, 0.987650847989598, 0.9821833428137758, -0.624406302422371, 0.9779946170315951,
         0.97698288987349, 0.9999999358890816, 0.9994965829583752, -0.6962255863354231, 0.9986034444963221,
         0.998338614670941, 0.9999999615497421, -0.7086772272123241, 0.9997768483089657, 0.999664057523652,
         0.9999999875839666, -0.7165721947385136, -0.718320006999889, 0.9999999786566983, 0.9999884821171028,
         0.9999999825417187],
    ),
    "map": (
        det((6, 4, 3, 3), 2),
        [0.999999941061187, 0.1271652914825517, -0.3780450022243338, -0.6215677712486217, 0.9837131342891285,
         -0.04976961506530969, 0.9999997718045486, -0.9499888155741432, -0.772547885204662, 0.1457497329454378,
         -0.9349200090903301, 0.9999996892386193, 0.8092917603563385, -0.42188097357356436, 0.9306191567409675,
         0.9999999477732768, -0.5629342050714953, 0.5625852923482296, 0.9999999394843618, -0.13057576052561784,
         0.9999997292423942],
    ),
    "three-channels": (
        det((6, 3, 3, 3), 3),
        [0.9999999932555886, 0.02515950050726461, -0.1849586823880146, 0.07914228016199207, 0.016631501854824954,
         0.527801905196746, 0.9999999933412206, -0.008038125902943272, 0.22565727332269517, 0.08137737166583561,
         0.04701805288011187, 0.9999999933784312, 0.06526937067795888, -0.2300076982888406, -0.20981274087397847,
         0.9999999932651757, 0.10652251430534862, -0.12110273560036694, 0.9999999924942186, 0.019510612866276478,
         0.999999992525336],
    ),
    "one-row": (
        det((6, 8, 1, 4), 4),
        [0.999999993779692, -0.016293465708166407, -0.34420867674206257, -0.017138609576969638, -0.5319044873684304,
         -0.164218093493104, 0.9999999939465312, -0.2742064974927374, -0.04908360925956054, -0.08277559196534275,
         -0.407065028516977, 0.9999999938875922, 0.27970671201489483, -0.10708811682010183, 0.1743258544700998,
         0.9999999940576902, -0.25785567075901505, -0.26575693829719854, 0.999999993994195, 0.1969632061413838,
         0.9999999938855842],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("x", "upper"), MATRICES.values(), ids=MATRICES)
def test_similarity_equals_the_reference(x: Tensor, upper: list) -> None:
    found = similarity(x)

    close(found[tuple(torch.triu_indices(6, 6))], upper)
    torch.testing.assert_close(found, found.T, rtol=0, atol=1e-15)


def test_one_hot_labels_are_similar_by_class() -> None:
    found = similarity(one_hot().double())

    same = Y6[:, None] == Y6[None, :]
    close(found[same], [0.9999999755051031] * 12)
    close(found[~same], [-0.4999999877525515] * 24)


def test_equal_entries_are_similar_to_nothing_and_get_no_gradient() -> None:
    h = torch.tensor([[0.0, 0, 0], [1, 2, 4]], dtype=torch.float64, requires_grad=True)

    found = similarity(h)
    (found - 1).square().sum().backward()

    close(found.detach()[1, 1], 0.9999999907417992)
    assert found.detach()[0].tolist() == [0, 0] and found[1, 0] == 0
    assert h.grad[0].tolist() == [0, 0, 0]
    assert h.grad.isfinite().all()


def test_a_constant_channel_leaves_the_gradient_finite() -> None:
    h = det((6, 4, 3, 3), 2)
    h[0, 1] = 0
    h[1] = 0
    h.requires_grad_()

    similarity_matching(h, one_hot()).backward()

    assert h.grad.isfinite().all()
    assert h.grad[0, 0].abs().sum() > 0
    assert h.grad[1].abs().sum() == 0


def test_similarity_of_half_precision_is_computed_in_float32() -> None:
    x = det((6, 5), 1)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = similarity(x.bfloat16())

    assert found.dtype == torch.float32
    torch.testing.assert_close(found, similarity(x.bfloat16().float()), rtol=0, atol=1e-6)


# -------------------------------------------------------------------------------------------------------------- losses


def test_the_similarity_loss_of_a_map_equals_the_reference() -> None:
    head, h = Mixed([MAP]).double(), feature_map()
    head.mix.weight.data = 0.3 * det((4, 4, 3, 3), 6)

    loss = similarity_matching(head(h), one_hot())
    loss.backward()

    close(loss.detach(), 0.7167174605297897)
    close(h.grad.norm(), 1.419206735344355)
    close(head.mix.weight.grad.norm(), 3.1477534981173623)


def test_the_similarity_loss_of_a_flat_vector_equals_the_reference() -> None:
    head, h = Mixed([Features("flat", (7,), 1)]).double(), (det((6, 7), 7) + 0.5).relu().requires_grad_()
    head.mix.weight.data = 0.3 * det((7, 7), 8)

    loss = similarity_matching(head(h), one_hot())
    loss.backward()

    close(loss.detach(), 0.8583778120370751)
    close(h.grad.norm(), 2.832830810117642)
    close(head.mix.weight.grad.norm(), 1.3377401661549517)


def test_the_prediction_loss_equals_the_reference() -> None:
    head = Prediction([MAP], 16, 3, zero_init=True).double()
    head.linear.weight.data, head.linear.bias.data = 0.2 * det((3, 16), 9), 0.1 * det((3,), 10)
    mixed = Mixed([MAP]).double()
    mixed.mix.weight.data = 0.3 * det((4, 4, 3, 3), 6)

    loss = F.cross_entropy(head(feature_map()), Y6)

    assert head.pooled.kernel == (2, 2)
    close(loss.detach(), 1.1044752671042541)
    both = 0.01 * loss + 0.99 * similarity_matching(mixed(feature_map()), one_hot())
    close(both.detach(), 0.7205950385955343)


# ------------------------------------------------------------------------------------------------- without backprop

P = det((5, 3), 11)  # five random projections of three classes


def test_the_targets_without_backprop_equal_the_reference() -> None:
    assert (P.T[Y6] > 0).int().tolist() == [
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 1, 1, 0],
    ]


def test_the_losses_without_backprop_equal_the_reference() -> None:
    head = SignPrediction([MAP], 16, 5).double()
    head.linear.weight.data, head.linear.bias.data = 0.2 * det((5, 16), 12), torch.zeros(5).double()
    pooled = Pooled([MAP], 16)

    similar = similarity_matching(pooled(feature_map()), P.T[Y6])
    signs = sign_cross_entropy(head(feature_map()), P.T[Y6])

    close(similar.detach(), 0.9990643245069815)
    close(signs.detach(), 0.6801564293098158)
    close((0.01 * similar + 0.99 * signs).detach(), 0.6833455082617874)


GRADIENTS = {
    "x": [0.4480438660649303, 0.18353840783676906, -0.1255655161770018, 0.5913967509959744, 0.33721769736479124,
          0.235212700083328, 0.11229760244992323, 0.24033646971521266],
    "weight": [0.6704858156463308, 0.5779647941796586, 0.46031186005566366, 0.31752701327434596, 0.5741739845159464,
               0.5030480013011581, 0.41113512983555056, 0.2984353701191238, 0.449118256409736, 0.4041292993542272,
               0.34384622075046, 0.26826902059843444],
}  # fmt: skip


def test_feedback_hands_back_the_error_through_a_fixed_matrix() -> None:
    head = SignPrediction([Features("flat", (4,), 1)], 4, 3).double()
    head.linear.weight.data, head.linear.back.feedback.data = det((3, 4), 14), det((3, 4), 15)
    x = det((2, 4), 13).requires_grad_()

    y = head(x)
    y.backward(det((2, 3), 16))

    close(y.detach(), x.detach() @ head.linear.weight.detach().T + head.linear.bias.detach())
    close(x.grad.flatten(), GRADIENTS["x"])
    close(head.linear.weight.grad.flatten(), GRADIENTS["weight"])
    assert head.linear.back.feedback.grad is None
    assert not head.linear.back.feedback.requires_grad


# --------------------------------------------------------------------------------------------------- sizes and values


# The reference's kernels on square maps are in the tests of the method; these are the ends of the rule.
@pytest.mark.parametrize(
    ("shape", "limit", "expected"),
    [
        ((8, 4, 4), 128, ((1, 1), (0, 0), (4, 4))),
        ((8, 4, 4), 127, ((2, 1), (0, 0), (2, 4))),
        ((4096, 4, 4), 1024, ((4, 4), (0, 0), (1, 1))),
        ((4096, 1, 1), 1024, ((1, 1), (0, 0), (1, 1))),
        ((64, 49, 1), 1024, ((4, 1), (2, 0), (13, 1))),
        ((64, 1, 49), 1024, ((1, 4), (0, 2), (1, 13))),
    ],
)
def test_an_axis_is_pooled_only_as_far_as_it_reaches(shape: tuple, limit: int, expected: tuple) -> None:
    assert pooling(*shape, limit) == expected
    pooled = Pooled([Features("map", shape, 1)], limit)
    assert pooled(torch.randn(2, *shape)).shape[1:] == (shape[0], *expected[2])
    assert pooled.width == shape[0] * expected[2][0] * expected[2][1]


@pytest.mark.parametrize("zero", [True, False])
def test_prediction_starts_at_zero_if_asked(zero: bool) -> None:
    head = Prediction([MAP], 16, 3, zero_init=zero).to("meta")

    real = materialize(head, device=torch.device("cpu"), dtype=torch.float32)

    assert bool((real.linear.weight == 0).all()) is zero
    assert (real.linear.bias != 0).any()


def test_sign_prediction_starts_at_zero_with_a_random_feedback() -> None:
    head = SignPrediction([MAP], 16, 5).to("meta")

    real = materialize(head, device=torch.device("cpu"), dtype=torch.float32)

    assert not real.linear.weight.any() and not real.linear.bias.any()
    assert real.linear.back.feedback.abs().max() <= 16**-0.5
    assert real.linear.back.feedback.std() > 0.1
    assert isinstance(real.linear, nn.Linear)
