"""DGL reproduces the auxiliary nets of the reference code (eugenium/DGL at 4cc7c17), and of AugLocal's form of them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import localize
from localize import recipes
from localize.errors import MethodError, OptionError
from localize.heads.dgl import SmallCNN, SpatialMLP, auxiliary
from localize.ir import Features
from tests.golden import det, fill
from tests.nets import MLP, ResNet
from tests.plans import heads, plan, trunk

AUGLOCAL = dict(recipes.load("dgl-auglocal").options)
TARGET = torch.tensor([0, 3, 7, 9])


def aux(kind: str, channels: int, size: int) -> torch.nn.Module:
    features = [Features("map", (channels, size, size), 1)]
    if kind == "cnn":
        return SmallCNN(features, 10)
    return SpatialMLP(features, 10, n_conv=3 if kind == "mlp-sr" else 0, n_hidden=3, bias=True)


# Measured by building the reference code's nets, less the BatchNorm2d of 2C parameters that it never calls.
@pytest.mark.parametrize(
    ("kind", "channels", "size", "parameters"),
    [
        ("mlp-sr", 16, 32, 14378),
        ("mlp", 16, 32, 13546 - 32),
        ("cnn", 16, 32, 5354),
        ("mlp-sr", 32, 16, 54858),
        ("mlp", 32, 16, 51658 - 64),
        ("cnn", 32, 16, 19914),
        ("mlp-sr", 64, 8, 214154),
        ("mlp", 64, 8, 201610 - 128),
        ("cnn", 64, 8, 76682),
        ("mlp-sr", 128, 32, 846090),
        ("mlp", 128, 32, 796426 - 256),
        ("cnn", 128, 32, 300810),
        ("mlp-sr", 256, 16, 3363850 - 512),
        ("mlp", 256, 16, 3165706 - 512),
        ("cnn", 256, 16, 1191434),
        ("mlp-sr", 512, 8, 13411338),
        ("mlp", 512, 8, 12622858 - 1024),
        ("cnn", 512, 8, 4742154),
    ],
)
def test_auxiliary_nets_have_the_reference_size(kind: str, channels: int, size: int, parameters: int) -> None:
    assert sum(p.numel() for p in aux(kind, channels, size).parameters()) == parameters


@pytest.mark.parametrize("kind", ["mlp-sr", "mlp", "cnn"])
def test_the_option_chooses_the_net(kind: str) -> None:
    made = plan("cifar/resnet32", "dgl", kind=kind)

    assert heads(made)[6].size == sum(p.numel() for p in aux(kind, 32, 16).parameters())


# Measured by building the nets of ChenxiangMA/AugLocal at 98c90d6: number of auxiliary nets, their parameters,
# multiply-adds and fvcore's count, and the same two of a training forward of trunk and auxiliary nets.
@pytest.mark.parametrize(
    ("net", "expected", "training"),
    [
        ("resnet32", (15, 838294, 1495040, 1726976), (70619776, 71486592)),
        ("resnet110", (54, 3375036, 5706624, 6497664), (258856448, 261773312)),
    ],
)
def test_the_auglocal_form_has_the_size_of_its_code(net: str, expected: tuple, training: tuple) -> None:
    made = plan(f"cifar/{net}", "dgl", **AUGLOCAL)
    nets = heads(made)

    sizes = (sum(n.size for n in nets), sum(n.macs for n in nets), sum(n.fvcore_flops for n in nets))
    assert (len(nets), *sizes) == expected
    assert (sum(b.macs for b in made.blocks), sum(b.fvcore_flops for b in made.blocks)) == training


@pytest.mark.parametrize(
    ("layer", "expected"), [(0, (9962, 57984, 81792)), (6, (37834, 83200, 95488)), (11, (147338, 182784, 189696))]
)
def test_each_width_has_the_size_of_the_auglocal_code(layer: int, expected: tuple) -> None:
    net = heads(plan("cifar/resnet32", "dgl", **AUGLOCAL))[layer]

    assert (net.size, net.macs, net.fvcore_flops) == expected


def test_the_imagenet_vgg13_has_the_auxiliary_nets_of_the_auglocal_code() -> None:
    nets = heads(plan("tv/vgg13_bn", "dgl", (3, 224, 224), **AUGLOCAL))

    assert [n.size for n in nets] == [401768] * 2 + [1089256] * 2 + [3324392] * 2 + [11235304] * 3
    assert sum(n.size for n in nets) == 43336744


# One auxiliary net of AugLocal's code in isolation, float64, on relu(det((4, C, H, H), 1)), weights from seed 100.
GOLDEN = [
    (16, 32, 2.2125812112570746, 5.970880198890389, 10.166231225020312,
     [-1.1442673720931364, -1.3394319914279165, -2.0804157054429826, 0.30380645691774477, 1.385994760617339,
      0.22304638571288748, 0.5463146839722397, -0.44562482387217695, 0.44232221614312506, 0.09480903533797452]),
    (32, 16, 3.142070594429013, 8.699554062229625, 18.797100420012086,
     [-2.330612789950745, -0.8966203480171736, -0.13370167482017303, -0.5973977401135461, 1.1010352900476825,
      0.9019351583660281, 1.1405699169339103, -2.96658638545047, 0.7997516473815682, 0.0832352452742226]),
    (64, 8, 3.765315350605272, 8.684215013537639, 26.824931470792773,
     [-1.0755158353018646, 1.517092403178586, 3.97797712652022, 0.39162117831554355, 2.4988530876904433,
      -1.926108758439861, 0.2629391444666976, 0.001317337110473743, 0.10449128834257118, 0.014476277317646176]),
]  # fmt: skip


@pytest.mark.parametrize(("channels", "size", "loss", "entering", "own", "logits"), GOLDEN, ids=["16", "32", "64"])
def test_an_auxiliary_net_computes_what_the_auglocal_code_computes(
    channels: int, size: int, loss: float, entering: float, own: float, logits: list
) -> None:
    features = [Features("map", (channels, size, size), 1)]
    net = SpatialMLP(features, 10, n_conv=3, n_hidden=2, bias=False).double()
    fill([net])
    h = det((4, channels, size, size), 1).relu().requires_grad_()

    scores = net(h)
    found = F.cross_entropy(scores, TARGET)
    found.backward()

    norm = torch.cat([p.grad.flatten() for p in net.parameters()]).norm()
    values = torch.stack([found, h.grad.norm(), norm, *scores[0]])
    expected = torch.tensor([loss, entering, own, *logits], dtype=torch.float64)
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=0)


def test_updating_at_once_and_at_the_end_are_the_same() -> None:
    model = ResNet().double()
    images, labels = det((6, 3, 8, 8), 2), torch.tensor([0, 1, 2, 3, 4, 0])
    trained = []
    for update in ("immediate", "end"):
        local = localize.transform(copy.deepcopy(model), "dgl", example_input=images, update=update).train()
        fill([local])
        optimizer = torch.optim.SGD(local.param_groups(lr=0.1, momentum=0.9), lr=0.1)
        for _ in range(2):
            local.step(images, labels, optimizer)
        trained.append(local.state_dict())

    for name, value in trained[0].items():
        assert torch.equal(value, trained[1][name]), name
    assert not torch.equal(trained[0]["trunk.conv.weight"], model.conv.weight)


def test_flat_features_meet_linear_layers_of_their_own_width() -> None:
    local = localize.transform(MLP(), "dgl", example_input=torch.empty(2, 3, 8, 8))

    linear = [m for m in local.heads.head_0.modules() if isinstance(m, torch.nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(16, 16)] * 3 + [(16, 5)]


def test_an_unknown_net_is_refused() -> None:
    segment = plan("cifar/resnet20", "dgl").segments.segments[0]

    with pytest.raises(OptionError, match="kind cannot be 'mlp-rs'.*\n.*mlp-sr, mlp, cnn"):
        auxiliary(segment, trunk("cifar/resnet20"), "head_0", kind="mlp-rs")


def test_a_model_without_a_cut_is_refused() -> None:
    with pytest.raises(MethodError, match="dgl needs at least two segments"):
        localize.transform(MLP(), "dgl", example_input=torch.empty(2, 3, 8, 8), cut=localize.ir.CutSpec(segments=1))
