"""AugLocal reproduces the numbers of the reference code (ChenxiangMA/AugLocal at 98c90d6) and of the paper's tables."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import nn

import localize
from localize import methods, zoo
from localize.errors import MethodError
from localize.ir import CutSpec
from tests.golden import det, fill
from tests.plans import gradient_norm, heads, plan, trunk

IMAGES, TARGET = det((4, 3, 32, 32), 2), torch.tensor([0, 3, 7, 9])


# Measured by running the reference code's models: number of auxiliary nets, their parameters, multiply-adds of a
# training forward (trunk and auxiliary nets), and fvcore's count of the same.
@pytest.mark.parametrize(
    ("net", "d", "expected"),
    [
        ("resnet32", 2, (14, 806412, 173991296, 175520896)),
        ("resnet32", 3, (13, 1341058, 173990656, 175407872)),
        ("resnet32", 5, (11, 1705390, 221175296, 222944768)),
        ("resnet110", 2, (53, 3166354, 623855360, 629010816)),
        ("resnet110", 4, (51, 7240702, 793723392, 799228416)),
        ("resnet110", 6, (49, 10279466, 1119304960, 1126800640)),
    ],
)
def test_auxiliary_nets_have_the_reference_size(net: str, d: int, expected: tuple[int, ...]) -> None:
    made = plan(f"cifar/{net}", "auglocal", d=d)

    found = (
        len(heads(made)),
        sum(head.size for head in heads(made)),
        sum(block.macs for block in made.blocks),
        sum(block.fvcore_flops for block in made.blocks),
    )

    assert found == expected


# P-Table 11 of the paper prints 0.79, 1.11 and 1.49 G: parameters and fvcore count of the auxiliary nets, in the form
# of the code, and in that of the paper's equation (3) taken literally.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("d", "tau", "code", "paper"),
    [
        (5, 1.0, (6621940, 534790528), (7253532, 582192000)),
        (7, 0.8, (9913568, 852629504), (11563804, 961578880)),
        (9, 0.6, (13669196, 1232286464), (16638556, 1426507648)),
    ],
)
def test_pyramidal_depth_gives_table_11(d: int, tau: float, code: tuple[int, int], paper: tuple[int, int]) -> None:
    for options, expected in (({}, code), ({"tail": "isolated", "rounding": "half_up"}, paper)):
        made = heads(plan("cifar/resnet110", "auglocal", d=d, tau=tau, **options))

        assert (sum(head.size for head in made), sum(head.fvcore_flops for head in made)) == expected


# The depth of the last auxiliary net is 1.5 copies, which the code's floats put at 1.4999999999999998: one copy, where
# exact fractions give two. The paper prints 1.06 G.
def test_a_depth_is_rounded_as_the_code_s_floats_are() -> None:
    made = plan("cifar/resnet110", "auglocal", d=7, tau=0.9)

    assert sum(head.size for head in heads(made)) == 9210720
    assert round(sum(block.fvcore_flops for block in made.blocks) / 1e9, 6) == 1.055788
    depths = [len(head.facts["sampled"]) for head in heads(made)]
    assert depths[-1] == 1 and methods.create("auglocal", d=7, tau=0.9, rounding="half_up").copies(47, 49, 47, 55) == 2


# Depths d - 1 on L layers where the code's floats fall below an exact half, from the code's formula.
@pytest.mark.parametrize(("layers", "d", "tau"), [(17, 9, 0.5), (17, 9, 0.9), (34, 7, 0.9), (55, 7, 0.9)])
def test_floats_and_fractions_differ_where_the_code_s_do(layers: int, d: int, tau: float) -> None:
    segments = layers - d + 1
    code = methods.create("auglocal", d=d, tau=tau)
    found = [code.copies(i, segments, i, layers) for i in range(segments - 1)]
    a, last = d - 1, segments - 2
    expected = [max(1, round(a * (1 - i * tau / last) + i * tau / last)) for i in range(segments - 1)]
    exact = [
        max(1, round(a * (1 - Fraction(i, last) * Fraction(str(tau))) + Fraction(i, last) * Fraction(str(tau))))
        for i in range(segments - 1)
    ]

    assert found == expected
    assert found != exact


@pytest.mark.parametrize(
    ("layer", "sampled", "size", "macs"),
    [
        (0, [4, 8, 11, 15], 151562, 16777856),
        (3, [6, 9, 12, 15], 165450, 16777856),
        (4, [8, 11, 15], 146890, 12059264),
        (9, [11, 13, 15], 206346, 13107840),
        (10, [12, 15], 132362, 8389248),
    ],
)
def test_layers_of_resnet32_are_sampled_as_the_code_does(layer: int, sampled: list, size: int, macs: int) -> None:
    head = heads(plan("cifar/resnet32", "auglocal", d=5))[layer]

    assert (head.facts["sampled"], head.size, head.macs) == (sampled, size, macs)


# The code rounds half to even with the layer's index inside; adding the index to a half-up rounding differs here.
@pytest.mark.parametrize(("layer", "even", "up"), [(2, (8, 15), (9, 15)), (6, (10, 15), (11, 15))])
def test_rounding_is_half_to_even_unless_asked_otherwise(layer: int, even: tuple, up: tuple) -> None:
    assert methods.create("auglocal").sampled(layer, 2, 16) == even
    assert methods.create("auglocal", rounding="half_up").sampled(layer, 2, 16) == up


@pytest.mark.parametrize(("layer", "even", "up"), [(3, (28, 54), (29, 54)), (7, (30, 54), (31, 54))])
def test_rounding_on_fifty_five_layers(layer: int, even: tuple, up: tuple) -> None:
    assert methods.create("auglocal").sampled(layer, 2, 55) == even
    assert methods.create("auglocal", rounding="half_up").sampled(layer, 2, 55) == up


def test_sequential_and_repetitive_selection() -> None:
    assert methods.create("auglocal", selection="sequential").sampled(13, 3, 16) == (14, 15)
    assert methods.create("auglocal", selection="repetitive").sampled(3, 2, 16) == (3, 3)


# exp_imagenet of the reference: every layer has an auxiliary net, of constant depth, without a BatchNorm1d.
@pytest.mark.parametrize(
    ("net", "d", "nets", "total"),
    [("tv/resnet34", 5, 16, 154359936), ("tv/resnet101", 4, 33, 363376872), ("tv/vgg13_bn", 3, 9, 36814632)],
)
def test_imagenet_auxiliary_nets_have_the_reference_size(net: str, d: int, nets: int, total: int) -> None:
    made = heads(plan(net, "auglocal", (3, 224, 224), d=d, tau=0.0, tail="isolated", head_norm=False))

    assert (len(made), sum(head.size for head in made)) == (nets, total)


# One iteration of the reference code on ResNet-32, float64, weights and images of tests.golden.
FINAL = 3.629341714422564
GOLDEN = {
    2: (
        202,
        [3.588706061885274, 3.2795305392725407, 4.116630429576713, 2.747188816141585, 3.3495862366990936,
         3.796569347982251, 3.2066636812175, 4.14356187547548, 2.7312750404804613, 3.8784125340945796,
         2.9105016017484298, 4.031458862854675, 2.959402938915944, 1.8514379127601233],
        [16.386710653050674, 18.419616934361418, 17.289841766886045, 14.234180484872018, 10.527940778797694,
         9.830050811824806, 21.968417772427756, 28.585187041461573, 17.72964011837219, 18.486293189138046,
         16.379958334925085, 30.833404672959116, 23.92001164022424, 22.649894729251432, 2.1070709296889256,
         1.705953957885233],
    ),
    6: (
        251,
        [2.565782347845951, 3.5112277033679784, 3.862768776242504, 2.4732966944965216, 2.6087812516126805,
         2.6668555489000507, 2.438029791282953, 2.8692557568293244, 2.6103553732163425, 4.266477707092157],
        [2.868072807029845, 3.0353503723507655, 2.868768256808272, 1.9980322355655622, 1.7839605814921389,
         1.457931468610478, 3.059818662944764, 2.426558542025059, 1.998541887876229, 2.3477955549642098,
         2.862681016537422, 4.4286399416296724, 3.3496262834464927, 2.6479836236092713, 2.1070709296889256,
         1.705953957885233],
    ),
}  # fmt: skip


@pytest.mark.parametrize("d", GOLDEN)
def test_one_step_equals_the_reference(d: int) -> None:
    tensors, losses, norms = GOLDEN[d]
    model = zoo.create_model("cifar/resnet32").double()
    local = localize.transform(model, "auglocal", example_input=IMAGES, d=d).train()
    assert fill([local]) == tensors

    result = local.step(IMAGES, TARGET, torch.optim.SGD(local.param_groups(lr=0.0), lr=0.0))

    found = torch.stack(list(result.losses.values()))
    torch.testing.assert_close(found, torch.tensor([*losses, FINAL], dtype=torch.float64), rtol=1e-6, atol=0)
    stem = nn.ModuleList([model.conv1, model.bn1])
    blocks = [stem, *model.layer1, *model.layer2, *model.layer3]
    found = torch.tensor([gradient_norm(block) for block in blocks], dtype=torch.float64)
    torch.testing.assert_close(found, torch.tensor(norms, dtype=torch.float64), rtol=1e-6, atol=0)


def test_the_last_d_layers_are_trained_together_unless_isolated() -> None:
    joint, isolated = plan("cifar/resnet20", "auglocal", d=3), plan("cifar/resnet20", "auglocal", d=3, tail="isolated")

    assert joint.segments.segments[-1].layers == (7, 9)
    assert isolated.segments.segments[-1].layers == (9, 9)


def test_a_bottleneck_keeps_its_inner_width_and_an_inverted_residual_its_ratio() -> None:
    bottleneck = heads(plan("tv/resnet50", "auglocal", (3, 64, 64)))[0].module
    inverted = heads(plan("tv/mobilenet_v2", "auglocal", (3, 64, 64), selection="sequential"))[3].module

    def convolutions(module: nn.Module) -> list[tuple[int, int, int]]:
        return [(m.in_channels, m.out_channels, m.groups) for m in module.modules() if isinstance(m, nn.Conv2d)]

    assert convolutions(bottleneck)[:3] == [(64, 512, 1), (512, 512, 1), (512, 2048, 1)]
    assert convolutions(inverted)[:3] == [(24, 144, 1), (144, 144, 144), (144, 32, 1)]


def test_heads_do_not_share_weights_with_the_trunk() -> None:
    model = zoo.create_model("timm/vit_tiny_patch16_224", img_size=32)
    local = localize.transform(model, "auglocal", example_input=torch.randn(2, 3, 32, 32))

    theirs = {p.data_ptr() for p in local.trunk.parameters()}
    assert not theirs & {p.data_ptr() for p in local.heads.parameters()}
    copied = local.heads.head_0.get_submodule("0.blocks.11.attn.qkv")
    assert not torch.equal(model.blocks[11].attn.qkv.weight, copied.weight)


def test_a_model_that_is_too_short_is_refused_with_what_would_do() -> None:
    with pytest.raises(MethodError, match="needs at least two segments.*\n.*10 local layers.*\n.*d=9 or less"):
        plan("cifar/resnet20", "auglocal", d=10)


def test_fewer_segments_leave_the_joint_tail_whole() -> None:
    local = localize.transform(
        trunk("cifar/resnet20").model, "auglocal", example_input=IMAGES.float(), d=3, cut=CutSpec(segments=4)
    )

    assert len(local.plan.segments) == 4
    assert local.plan.segments.segments[-1].layers[0] <= 7


# Table 10, d = 6, ResNet-110: "32Rs2-32R-32R-32R-32R-AP-10FC" in stage 2, "16R ... " in stage 1; R is a residual block.
@pytest.mark.parametrize(
    ("selection", "stage", "widths", "strides"),
    [
        ("uniform,repetitive-ds,uniform", 1, [32] * 5, [2, 1, 1, 1, 1]),
        ("uniform,repetitive,uniform", 1, [32] * 5, [1, 1, 1, 1, 1]),
        ("repetitive-ds,repetitive-ds,uniform", 0, [16] * 5, [2, 1, 1, 1, 1]),
    ],
)
def test_a_stage_repeats_its_own_blocks_as_table_10_prints(
    selection: str, stage: int, widths: list[int], strides: list[int]
) -> None:
    made = plan("cifar/resnet110", "auglocal", d=6, selection=selection)
    of_stage = [head for head, s in zip(heads(made), made.segments.segments, strict=False)
                if s.features[0].width == (16, 32, 64)[stage]]  # fmt: skip

    for head in of_stage:
        convs = [m for m in head.module.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
        assert [m.out_channels for m in convs[::2]] == widths
        assert [m.stride[0] for m in convs[::2]] == strides
    assert len(of_stage) > 10


def test_the_last_step_of_table_10_has_3x3_convolutions_of_the_layer_s_width() -> None:
    made = plan("cifar/resnet110", "auglocal", d=6, tau=0.0, construction="conv3x3", width="own")

    for head, segment in zip(heads(made), made.segments.segments, strict=False):
        width = segment.features[0].width
        convs = [m for m in head.module.modules() if isinstance(m, nn.Conv2d)]
        assert [(m.in_channels, m.out_channels, m.kernel_size) for m in convs] == [(width, width, (3, 3))] * 5
        assert head.module[0].output_size == tuple(-(-size // 4) for size in segment.features[0].shape[1:])


# Table 5: "maintaining the same network depth while increasing the channel numbers ... comparable FLOPs".
@pytest.mark.parametrize("construction", ["conv1x1", "conv3x3"])
@pytest.mark.parametrize("d", [2, 5])
def test_nets_of_convolutions_cost_what_the_sampled_layers_cost(construction: str, d: int) -> None:
    trunk_nets = heads(plan("cifar/resnet32", "auglocal", d=d))
    convs = heads(plan("cifar/resnet32", "auglocal", d=d, construction=construction))

    for ours, theirs in zip(convs, trunk_nets, strict=True):
        assert abs(ours.macs / theirs.macs - 1) < 0.02
    assert abs(sum(head.macs for head in convs) / sum(head.macs for head in trunk_nets) - 1) < 0.005


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"selection": "uniformly"}, "cannot be 'uniformly'.*\n.*uniform, sequential.*\n.*did you mean 'uniform'"),
        ({"selection": "uniform,repetitive"}, "for 2 stages.*\n.*3 stages of equal width"),
    ],
)
def test_a_selection_that_does_not_fit_is_refused(options: dict, told: str) -> None:
    with pytest.raises(localize.errors.OptionError, match=told):
        plan("cifar/resnet32", "auglocal", d=3, **options)
