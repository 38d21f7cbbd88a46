"""Local error signals reproduce the reference code (anokland/local-loss at 7b3b40b), and AugLocal's form of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import localize
from localize import recipes, zoo
from localize.cutting.cuts import place
from localize.cutting.split import split
from localize.errors import OptionError
from localize.heads.similarity import Prediction
from localize.ir import CutSpec, Features, Plan
from localize.methods import create
from localize.runtime.model import LocalModel
from tests.golden import det, fill
from tests.nets import ALL, MLP, ResNet
from tests.plans import gradient_norm, heads, plan, trunk

AUGLOCAL = dict(recipes.load("predsim-auglocal").options)
IMAGES, TARGET = det((4, 3, 32, 32), 2), torch.tensor([0, 3, 7, 9])


def close(found: Any, expected: Any, rtol: float = 1e-6) -> None:
    found, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (found, expected))
    torch.testing.assert_close(found, expected, rtol=rtol, atol=0)


# --------------------------------------------------------------------------------------------------------- parameters

NETS = {
    "MNIST": ("cifar/vgg8b_mnist", (1, 28, 28)),
    "CIFAR10": ("cifar/vgg8b", (3, 32, 32)),
    "CIFAR100": ("cifar/vgg8b_cifar100", (3, 32, 32)),
    "STL10": ("cifar/vgg8b_stl10", (3, 96, 96)),
}

# Measured by building VGG8B with the reference code: values that enter each prediction, kernel and padding of the
# pooling before it, and the parameters that the prediction and the similarity loss add. SVHN has those of CIFAR-10.
SIZES = {
    ("MNIST", 1024): (
        [1024] * 7,
        [((16, 8), (8, 4)), ((16, 16), (8, 8)), ((8, 8), (4, 4)), ((16, 8), (8, 4)), ((8, 4), (4, 2)),
         ((4, 2), (2, 1))],
        (71750, 9453568),
    ),
    ("MNIST", 4096): (
        [3584, 4096, 4096, 4096, 4096, 3072, 1024],
        [((8, 4), (4, 0)), ((8, 8), (4, 4)), ((4, 4), (2, 2)), ((8, 4), (4, 2)), ((4, 2), (2, 1)), ((2, 1), (1, 0))],
        (240710, 9453568),
    ),
    ("CIFAR10", 2048): (
        [2048] * 6 + [1024],
        [((a, b), (0, 0)) for a, b in ((8, 8), (16, 8), (8, 4), (8, 8), (4, 4), (2, 2))],
        (133190, 9453568),
    ),
    ("CIFAR10", 4096): (
        [4096] * 6 + [1024],
        [((a, b), (0, 0)) for a, b in ((8, 4), (8, 8), (4, 4), (8, 4), (4, 2), (2, 1))],
        (256070, 9453568),
    ),
    ("CIFAR100", 2048): (
        [2048] * 6 + [1024],
        [((a, b), (0, 0)) for a, b in ((8, 8), (16, 8), (8, 4), (8, 8), (4, 4), (2, 2))],
        (1331900, 9453568),
    ),
    ("CIFAR100", 4096): (
        [4096] * 6 + [1024],
        [((a, b), (0, 0)) for a, b in ((8, 4), (8, 8), (4, 4), (8, 4), (4, 2), (2, 1))],
        (2560700, 9453568),
    ),
    ("STL10", 2048): (
        [1152, 1536, 1536, 2048, 2048, 2048, 1024],
        [((16, 16), (0, 0)), ((32, 16), (16, 0)), ((16, 8), (8, 0)), ((16, 16), (8, 8)), ((8, 8), (4, 4)),
         ((4, 4), (2, 2))],
        (113990, 9453568),
    ),
    ("STL10", 4096): (
        [2304, 2304, 2304, 3072, 3072, 3072, 1024],
        [((16, 8), (0, 0)), ((16, 16), (0, 0)), ((8, 8), (0, 0)), ((16, 8), (8, 0)), ((8, 4), (4, 0)),
         ((4, 2), (2, 0))],
        (171590, 9453568),
    ),
}  # fmt: skip
DEFAULTS = {"MNIST": 1024, "CIFAR10": 2048, "CIFAR100": 4096, "STL10": 2048}


def planned(data: str, method: str, **options: Any) -> Plan:
    net, shape = NETS[data]
    made = create(method, **options)
    layout = place(trunk(net, shape), CutSpec(), grain=made.grain, together=made.together)
    return made.plan(split(layout))


@pytest.mark.parametrize(("data", "width"), SIZES, ids=lambda value: str(value))
def test_heads_on_vgg8b_have_the_reference_size(data: str, width: int) -> None:
    values, windows, (pred, sim) = SIZES[data, width]

    made = heads(planned(data, "predsim", dim_in=width))

    predictions = [head for head in made if head.name.startswith("head_")]
    assert [head.facts["values"] for head in predictions] == values
    found = [(tuple(head.facts["kernel"]), tuple(head.facts["padding"])) for head in predictions]
    assert found == [*windows, ((1, 1), (0, 0))]
    assert sum(head.size for head in predictions) == pred
    assert sum(head.size for head in made if head not in predictions) == sim


@pytest.mark.parametrize(("data", "width"), DEFAULTS.items())
def test_the_width_of_the_predictions_follows_the_data(data: str, width: int) -> None:
    for terms, (pred, sim) in {"pred": (1, 0), "sim": (0, 1), "predsim": (1, 1)}.items():
        sizes = SIZES[data, width][2]

        assert (
            sum(head.size for head in heads(planned(data, "predsim", terms=terms))) == pred * sizes[0] + sim * sizes[1]
        )


@pytest.mark.parametrize(
    ("data", "width", "decoder", "feedback", "projections"),
    [
        ("MNIST", 1024, 918400, 917504, 8960),
        ("MNIST", 4096, 3081088, 3080192, 8960),
        ("CIFAR10", 2048, 1704832, 1703936, 8960),
        ("CIFAR10", 4096, 3277696, 3276800, 8960),
        ("CIFAR100", 2048, 1704832, 1703936, 89600),
        ("CIFAR100", 4096, 3277696, 3276800, 89600),
        ("STL10", 2048, 1459072, 1458176, 8960),
        ("STL10", 4096, 2196352, 2195456, 8960),
    ],
)
def test_heads_without_backprop_have_the_reference_size(
    data: str, width: int, decoder: int, feedback: int, projections: int
) -> None:
    made = planned(data, "ll-bpf", dim_in=width)

    trained = sum(p.numel() for head in heads(made) for p in head.module.parameters() if p.requires_grad)
    fixed = sum(p.numel() for head in heads(made) for p in head.module.parameters() if not p.requires_grad)
    assert (trained, fixed) == (decoder, feedback)
    assert sum(block.size for block in made.blocks if block.role == "shared") == projections


# Measured by building the heads of ChenxiangMA/AugLocal at 98c90d6: number of layers with heads, parameters of the
# predictions and of the similarity losses, multiply-adds, and both counts of a training forward.
@pytest.mark.parametrize(
    ("net", "layers", "pred", "sim", "macs", "training"),
    [
        ("resnet32", 15, 76950, 207360, 35466240, (104590976, 105225856)),
        ("resnet110", 54, 277020, 836352, 127678464, (380828288, 382954112)),
    ],
)
def test_the_auglocal_form_has_the_size_of_its_code(
    net: str, layers: int, pred: int, sim: int, macs: int, training: tuple
) -> None:
    made = plan(f"cifar/{net}", "predsim", **AUGLOCAL)
    predictions = [head for head in heads(made) if head.name.startswith("head_")]
    similarities = [head for head in heads(made) if head.name.startswith("similarity_")]

    assert (len(predictions), len(similarities)) == (layers, layers)
    assert (sum(head.size for head in predictions), sum(head.size for head in similarities)) == (pred, sim)
    assert sum(head.macs for head in heads(made)) == sum(head.fvcore_flops for head in heads(made)) == macs
    assert (sum(b.macs for b in made.blocks), sum(b.fvcore_flops for b in made.blocks)) == training


@pytest.mark.parametrize(("layer", "sim", "kernel"), [(0, 2304, [8, 4]), (6, 9216, [4, 4]), (11, 36864, [4, 2])])
def test_each_width_has_the_size_of_the_auglocal_code(layer: int, sim: int, kernel: list) -> None:
    made = plan("cifar/resnet32", "predsim", **AUGLOCAL)
    head, similar = made.block(f"head_{layer}"), made.block(f"similarity_{layer}")

    assert (head.size, head.macs, head.facts["kernel"]) == (5130, 5120, kernel)
    assert (similar.size, similar.macs) == (sim, 2359296)


# ------------------------------------------------------------------------------------------------------------ one head

# Heads of AugLocal's code in isolation, float64, on relu(det((4, C, H, H), 1)), weights from seed 100, the prediction
# first. The recorded loss is the cross-entropy; the recorded gradients are those of 0.01 of it and 0.99 of the
# similarity loss.
GOLDEN_HEADS = [
    (16, 32, 3.277202179326783, 0.3728099461004279, 3.867624930865868,
     [-0.6176709935711566, -0.6672613218247342, -0.5774070773905832, 0.18034001031521663, -2.1158491069909307,
      -1.1412718438045713, 1.5152362335347143, 0.8003218521615392, 2.4139499726358467, -1.3824837755252106]),
    (32, 16, 3.3235760956566303, 0.5249129121737383, 3.8773664626756026,
     [-1.0370454621091034, -0.13864126706866176, -0.6848508933816203, -0.4886203898788052, -1.2639527379414863,
      -0.6290538584105183, 2.30787783900717, 0.5310078416771642, 2.235675897829282, -1.2597770762387661]),
    (64, 8, 3.146423090293999, 0.727380278970288, 3.733078777506181,
     [-0.7175921755561487, -1.140389778225809, -0.19299369758516632, 0.008209280907569907, -2.025446495045208,
      -0.40831390781761256, 1.8839798859041565, 1.1964923938900691, 2.2905379114126574, -0.7190958965496176]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("channels", "size", "loss", "entering", "own", "logits"), GOLDEN_HEADS, ids=["16", "32", "64"]
)
def test_a_head_computes_what_the_auglocal_code_computes(
    channels: int, size: int, loss: float, entering: float, own: float, logits: list
) -> None:
    net = Prediction([Features("map", (channels, size, size), 1)], 512, 10, zero_init=False).double()
    fill([net])
    h = det((4, channels, size, size), 1).relu().requires_grad_()

    scores = net(h)
    found = F.cross_entropy(scores, TARGET)
    found.backward()

    close(
        torch.stack([found, h.grad.norm(), torch.tensor(gradient_norm(net)), *scores[0]]),
        [loss, entering, own, *logits],
    )


# ------------------------------------------------------------------------------------------------------------ one step


def stepped(
    net: str, images: torch.Tensor = IMAGES, *, activation: str = "relu", **options: Any
) -> tuple[LocalModel, int]:
    model = zoo.create_model(net, **({"activation": activation} if "vgg" in net else {})).double()
    local = localize.transform(model, "predsim", example_input=images, **options).train()
    made = heads(local.plan)
    ordered = [
        local.heads.get_submodule(h.name)
        for prefix in ("head_", "similarity_")
        for h in made
        if h.name.startswith(prefix)
    ]
    return local, fill([local.trunk, *ordered])


# VGG8B on CIFAR-10 by the reference code: local losses, norms of the gradients of each layer's weight and of all that
# the layer's loss trains, the loss of the output before its weight, and the first row of the logits.
VGG8B = {
    "pred": (
        "relu",
        [3.7713920436352097, 4.621866957948365, 5.677721772207211, 4.6708333769397825, 5.9506171224368485,
         5.569066068884341, 4.45807909194826],
        [9.288389713008733, 9.041790619782974, 20.799618818555967, 20.05956556383102, 44.224430283963855,
         98.09327706836434, 16.411038449229117],
        [15.307396632725085, 14.271214362770479, 23.334588720836592, 22.918629365374418, 46.592121410374716,
         99.25400757508967, 20.428438298748077],
        7.296055201368857,
        [-1.2882379494037384, -3.5419417929487174, -1.5999576364199495, 5.331219595925092, -3.687337994589644,
         0.8163862336059304, 3.155426894747025, -5.033314664016751, 0.5842238553976555, 2.2964608728390283],
    ),
    "predsim": (
        "leaky",
        [0.8394437198097515, 0.6904333422907815, 0.2651496880941554, 0.12507550629634986, 0.11703324937361423,
         0.15090078183264446, 0.10269280210000617],
        [0.7486214601984695, 1.5917853195389542, 2.435229636932833, 1.332929778941388, 1.1443175441924427,
         1.9328949850480805, 0.17401843072982573],
        [1.0381272076128343, 2.2149142382814286, 3.2501544104556945, 1.8553018026738568, 1.5790214492969308,
         2.3068616209399044, 0.2184292133106777],
        7.3398894094949405,
        [-1.5100554685837295, -3.488929441221271, -1.6849104700192872, 5.00102515036487, -3.3350634954096536,
         1.3181863320441944, 3.342893286174949, -5.400498927187974, 0.7884518801918974, 2.255517693562333],
    ),
}  # fmt: skip


@pytest.mark.parametrize("terms", VGG8B)
def test_one_step_of_vgg8b_equals_the_reference(terms: str) -> None:
    activation, losses, weights, everything, final, logits = VGG8B[terms]
    local, _ = stepped("cifar/vgg8b", activation=activation, terms=terms, update="end")

    result = local.step(IMAGES, TARGET, torch.optim.SGD(local.param_groups(lr=0.0), lr=0.0))

    share = 1.0 if terms == "pred" else 0.01
    close(torch.stack(list(result.losses.values())), [*losses, share * final])
    close(result.logits[0].detach(), logits)
    layers = [local.trunk.get_submodule(f"layer{i + 1}") for i in range(7)]
    close([(layer.conv if i < 6 else layer.fc).weight.grad.norm() for i, layer in enumerate(layers)], weights)
    own = [[m for name, m in local.heads.named_children() if name.endswith(f"_{i}")] for i in range(7)]
    close([gradient_norm(layer, *mine) for layer, mine in zip(layers, own, strict=True)], everything)


def test_the_loss_of_both_is_the_weighted_sum_of_each() -> None:
    """What is passed on does not depend on the loss, so that all three see the same features at lr 0."""
    found = {}
    for terms in ("pred", "sim", "predsim"):
        torch.manual_seed(0)
        model = ResNet().double()
        local = localize.transform(
            model, "predsim", example_input=torch.empty(2, 3, 8, 8).double(), terms=terms, zero_init=False
        ).train()
        for block in heads(local.plan):
            fill([local.heads.get_submodule(block.name)])
        optimizer = torch.optim.SGD(local.param_groups(lr=0.0), lr=0.0)
        result = local.step(det((6, 3, 8, 8), 2), torch.tensor([0, 1, 2, 3, 4, 0]), optimizer)
        found[terms] = torch.stack(list(result.losses.values())[:-1])

    close(found["predsim"], 0.99 * found["sim"] + 0.01 * found["pred"], rtol=1e-12)


# ResNet-32 by AugLocal's code: cross-entropy and similarity loss of every layer, loss and first row of the output, and
# norms of the gradients of the stem and of every block.
RESNET_CE = [
    4.005158291945714, 3.330699291960586, 6.959692171122304, 5.353212716962915, 9.809182210935179, 10.306307452738377,
    3.112791451707558, 7.072762827754138, 4.020277029661406, 5.699307379176351, 8.158286833834845, 3.9028037673595026,
    6.280892677413853, 6.719051099845595, 10.841654366018783,
]  # fmt: skip
RESNET_SIM = [
    0.821790428380027, 0.5361825349921855, 0.5480608999672182, 0.6873371355752775, 0.6281063711471312,
    0.691147309088012, 0.21213989179612225, 0.21794227131284918, 0.30509079808544337, 0.16023078745355587,
    0.3297321455727369, 0.10371958302620674, 0.2238122831489369, 0.10032325105655815, 0.2549615874214103,
]  # fmt: skip
RESNET_FINAL = 3.629341714422564
RESNET_LOGITS = [
    -1.8608064756259883, 0.7860058708296345, -2.3581218562601096, 0.43538998379270233, 1.3485896925524739,
    1.808197217424251, 1.5917531897893318, 0.7533689468989229, -0.8106437387068965, -1.597537549064699,
]  # fmt: skip
RESNET_NORMS = [
    0.9234857498692464, 2.9078534502746165, 1.9091909546491468, 1.1965382177450272, 1.166592041480107,
    0.8683135464327406, 2.053936995707157, 1.8054699609701408, 1.8998716140625738, 1.3710882892929952,
    1.629978765274082, 1.4293566131387012, 1.4889127566418336, 1.1520505388260405, 1.4539496534963172,
    1.705953957885233,
]  # fmt: skip


def test_one_step_of_resnet32_equals_the_auglocal_code() -> None:
    local, tensors = stepped("cifar/resnet32", **AUGLOCAL)
    assert tensors == 180

    result = local.step(IMAGES, TARGET, torch.optim.SGD(local.param_groups(lr=0.0), lr=0.0))

    expected = [0.01 * ce + 0.99 * sim for ce, sim in zip(RESNET_CE, RESNET_SIM, strict=True)]
    close(torch.stack(list(result.losses.values())), [*expected, RESNET_FINAL])
    cross_entropies = [F.cross_entropy(scores, TARGET) for scores in list(result.scores.values())[:-1]]
    close(torch.stack(cross_entropies), RESNET_CE)
    close(result.logits[0], RESNET_LOGITS)
    model = local.trunk
    stem = nn.ModuleList([model.conv1, model.bn1])
    close([gradient_norm(block) for block in (stem, *model.layer1, *model.layer2, *model.layer3)], RESNET_NORMS)
    close(gradient_norm(model.fc), 6.44846244811558)


# ------------------------------------------------------------------------------------------------------------ the plan


def test_every_layer_but_the_output_has_a_local_loss() -> None:
    made = planned("CIFAR10", "predsim")

    assert len(made.losses) == 7 + 1
    assert [term.weight for term in made.losses[0].terms] == [0.99, 0.01]
    assert made.losses[-1].terms[0].weight == 0.01
    assert made.losses[0].reach == ("segment_0", "similarity_0", "head_0")
    assert made.losses[-1].reach == ("segment_7",)
    assert made.update == "immediate"


@pytest.mark.parametrize(
    ("terms", "weight", "expected"), [("pred", 0.0, 1.0), ("sim", 0.0, 1.0), ("predsim", 0.5, 0.5)]
)
def test_the_loss_of_the_output_has_the_weight_of_the_code_unless_given(
    terms: str, weight: float, expected: float
) -> None:
    made = planned("CIFAR10", "predsim", terms=terms, output_weight=weight)

    assert made.losses[-1].terms[0].weight == expected


def test_features_are_pooled_to_4096_values_where_the_published_command_says_nothing() -> None:
    made = planned("CIFAR10", "ll-bpf")

    assert sum(p.numel() for h in heads(made) for p in h.module.parameters() if p.requires_grad) == 3277696


def test_the_terms_of_a_layer_without_backprop() -> None:
    made = planned("CIFAR10", "ll-bpf")

    similar, signs = made.losses[2].terms
    assert (similar.weight, signs.weight) == (0.01, 0.99)
    assert similar.target == signs.target
    assert made.block(signs.head).feedback and not made.block(similar.head).feedback
    assert made.losses[2].reach == ("segment_2", "head_2")
    assert made.losses[2].scored is None
    assert made.losses[-1].terms[0].weight == 0.99


def test_a_layer_without_backprop_is_taught_through_the_fixed_matrix() -> None:
    """The weights of the head are zero: what its prediction teaches the layer is proportional to the feedback."""
    taught = {}
    for scale in (0, 1, 2):
        torch.manual_seed(0)
        local = localize.transform(MLP().double(), "ll-bpf", example_input=torch.empty(2, 3, 8, 8).double()).train()
        fixed = [local.heads.head_0.linear.back.feedback, local.heads.targets_0.weight]
        fixed[0].data *= scale
        before = [p.clone() for p in fixed]
        start = local.trunk.layers[1].weight.detach().clone()
        optimizer = torch.optim.SGD(local.param_groups(lr=1.0), lr=1.0)

        local.step(det((6, 3, 8, 8), 2), torch.tensor([0, 1, 2, 3, 4, 0]), optimizer)

        taught[scale] = local.trunk.layers[1].weight.detach() - start
        assert all(torch.equal(p, was) for p, was in zip(fixed, before, strict=True))
        assert local.heads.head_0.linear.weight.abs().sum() > 0
    by_feedback = taught[1] - taught[0]
    assert by_feedback.norm() > 1e-3
    torch.testing.assert_close(taught[2] - taught[0], 2 * by_feedback, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["predsim", "ll-bpf"])
@pytest.mark.parametrize("beta", [0.0, 1.0, 1.5])
def test_a_weight_that_leaves_a_loss_out_is_refused(method: str, beta: float) -> None:
    with pytest.raises(OptionError, match=f"beta={beta:g} leaves one of the two losses out"):
        planned("CIFAR10", method, beta=beta)


@pytest.mark.parametrize("terms", ["pred", "sim", "predsim"])
@pytest.mark.parametrize("net", ["ResNet", "TwoStreams", "MLP"])
def test_a_small_step_of_what_a_loss_trains_lowers_it(net: str, terms: str) -> None:
    """Nothing else moves: a step of all layers changes what enters a layer, which may outweigh its own progress."""
    batch = det((6, 3, 8, 8), 2), torch.tensor([0, 1, 2, 3, 4, 0])
    local = localize.transform(
        ALL[net]().double(), "predsim", example_input=batch[0], terms=terms, zero_init=False, update="end"
    ).train()
    still = torch.optim.SGD(local.param_groups(lr=0.0), lr=0.0)
    first = local.step(*batch, still).losses
    gradients = {name: p.grad.clone() for name, p in local.named_parameters() if p.grad is not None}

    for loss in local.plan.losses:
        reached = {name: p for name, p in local.named_parameters() if name in local.plan.reach(loss)}
        norm = torch.cat([gradients[name].flatten() for name in reached]).norm()
        assert norm > 0
        before = {name: p.detach().clone() for name, p in reached.items()}
        with torch.no_grad():
            for name, p in reached.items():
                p -= 1e-5 / norm * gradients[name]
        assert local.step(*batch, still).losses[loss.name] < first[loss.name], loss.name
        with torch.no_grad():
            for name, p in reached.items():
                p.copy_(before[name])
