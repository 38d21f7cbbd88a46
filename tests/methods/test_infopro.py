"""InfoPro reproduces the numbers of the reference code (blackfeather-wang/InfoPro-Pytorch at a38362a)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import localize
from localize import losses, methods, recipes, zoo
from localize.cutting.cuts import place
from localize.cutting.split import split
from localize.errors import MethodError, OptionError
from localize.heads.decoder import Decoder, DeepDecoder, Enlarge, Pixels
from localize.heads.maps import GlobalAverage
from localize.heads.projection import ConvolutionalProjection, DeepProjection
from localize.ir import CutSpec, Features, Plan
from tests.golden import det, fill
from tests.plans import gradient_norm, plan, trunk

TARGET = torch.tensor([0, 3, 7, 9])
MEAN = (0.4913725490196078, 0.4823529411764706, 0.4466666666666667)
STD = (0.24705882352941178, 0.24352941176470588, 0.2615686274509804)
CIFAR = {"mean": ",".join(map(str, MEAN)), "std": ",".join(map(str, STD))}


def close(found: object, expected: object, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(
        torch.as_tensor(found, dtype=torch.float64), torch.as_tensor(expected, dtype=torch.float64), rtol=rtol, atol=0
    )


def cut_at(net: str, at: tuple[str, ...], **options: object) -> Plan:
    made = methods.create("infopro", **options)
    return made.plan(split(place(trunk(f"cifar/{net}"), CutSpec(at=at), grain=made.grain)))


def sizes(made: Plan) -> tuple[int, int]:
    """Return the parameters of all projections (or classifiers), and of all decoders."""
    heads = [block for block in made.blocks if block.role == "head"]
    return tuple(sum(b.size for b in heads if b.name.startswith(kind)) for kind in ("head", "decoder"))


# ------------------------------------------------------------------------------------------------------------- sizes

# Measured by running the reference code's models: where modules end (stage, block), and the parameters of all
# projections, classifiers and decoders.
ENDS = {
    ("resnet32", 2): ("layer2.1",),
    ("resnet32", 4): ("layer1.2", "layer2.1", "layer3.0"),
    ("resnet32", 8): ("layer1.0", "layer1.2", "layer1.4", "layer2.1", "layer2.3", "layer3.0", "layer3.2"),
    ("resnet110", 2): ("layer2.8",),
    ("resnet110", 4): ("layer1.11", "layer2.7", "layer3.3"),
    ("resnet110", 16): (
        "layer1.1", "layer1.4", "layer1.7", "layer1.10", "layer1.13", "layer1.16", "layer2.1", "layer2.4", "layer2.7",
        "layer2.11", "layer2.15", "layer3.1", "layer3.5", "layer3.9", "layer3.13",
    ),
}  # fmt: skip
SIZES = {2: (43392, 28170, 3819), 4: (130624, 84958, 13185), 8: (286656, 180102, 28461), 16: (616704, 388374, 60741)}


@pytest.mark.parametrize(("net", "k"), ENDS)
def test_heads_of_the_published_modules_have_the_reference_size(net: str, k: int) -> None:
    contrast, softmax, decoder = SIZES[k]

    assert sizes(cut_at(net, ENDS[net, k])) == (contrast, decoder)
    assert sizes(cut_at(net, ENDS[net, k], loss="softmax")) == (softmax, decoder)


# Known for ResNet-32 (see ENDS), inferred for ResNet-110.
def test_split_points_of_eight_modules_are_every_second_of_sixteen() -> None:
    for net in ("resnet32", "resnet110"):
        eight, sixteen = (recipes.load(f"infopro-{net}-cifar10-k{k}").cut.at for k in (8, 16))

        assert eight == sixteen[1::2]


def test_one_module_for_each_layer_of_resnet32_is_the_published_sixteen() -> None:
    made = plan("cifar/resnet32", "infopro")

    assert [segment.ends_at for segment in made.segments.segments[:2]] == ["relu", "layer1.0"]
    assert (len(made.segments), *sizes(made)) == (16, SIZES[16][0], SIZES[16][2])


@pytest.mark.parametrize(
    "name", [name for name in recipes.names() if name.startswith("infopro-resnet") and "imagenet" not in name]
)
def test_published_recipes_cut_where_the_reference_does(name: str) -> None:
    recipe = recipes.load(name)
    net, k = recipe.model.removeprefix("cifar/"), int(name.rpartition("-k")[2])

    if (net, k) in ENDS:
        assert recipe.cut.at == ENDS[net, k]
    else:
        assert recipe.cut is None or len(recipe.cut.at) == k - 1
    assert len(place(trunk(recipe.model), recipe.cut or CutSpec(), grain=methods.create("infopro").grain).cuts) == k - 1


# Measured by running the re-implementation in AugLocal's code (ChenxiangMA/AugLocal at 98c90d6), softmax, one module
# for each layer: parameters of classifiers and decoders, multiply-adds of both together, and fvcore's count of the
# classifiers with the trunk, of which Table 7 of the AugLocal paper prints 0.34 G for ResNet-110.
@pytest.mark.parametrize(
    ("net", "expected"),
    [
        ("resnet32", (388374, 60741, 84130560, 92548480)),
        ("resnet110", (1492828, 232146, 319749632, 340361344)),
    ],
)
def test_heads_cost_what_the_reference_s_do(net: str, expected: tuple[int, ...]) -> None:
    made = plan(f"cifar/{net}", "infopro", loss="softmax")

    heads = [block for block in made.blocks if block.role == "head"]
    counted = sum(block.fvcore_flops for block in made.blocks if not block.name.startswith("decoder"))
    assert (*sizes(made), sum(b.macs for b in heads), counted) == expected


@pytest.mark.parametrize(
    ("configuration", "layers"),
    [
        ("0c1f", ["pool", (16, 10)]),
        ("0c2f", ["pool", (16, 128), (128, 10)]),
        ("1c1f", [(16, 32, 2), "pool", (32, 10)]),
        ("1c2f", [(16, 32, 2), "pool", (32, 128), (128, 10)]),
        ("1c3f", [(16, 32, 2), "pool", (32, 128), (128, 128), (128, 10)]),
        ("2c2f", [(16, 32, 2), (32, 32, 1), "pool", (32, 128), (128, 10)]),
    ],
)
def test_heads_are_called_by_their_layers(configuration: str, layers: list) -> None:
    features = [Features("map", (16, 8, 8), 1)]

    head = ConvolutionalProjection(features, 10, configuration=configuration, widest=64, unit=False)

    found = []
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            found.append((module.in_channels, module.out_channels, module.stride[0]))
        elif isinstance(module, nn.Linear):
            found.append((module.in_features, module.out_features))
        elif isinstance(module, GlobalAverage):
            found.append("pool")
    assert found == layers


# ------------------------------------------------------------------------------------------------------------- values


def test_maps_are_enlarged_with_corners_on_corners() -> None:
    found = Enlarge(8, 8)(det((2, 4, 4, 4), 50))

    close(found.sum(), -21.837020236837485)
    close(found.square().sum(), 91.17265623925294)
    close(found[0, 0, 0, :3], [0.010793523885668599, 0.07915250849490305, 0.1475114931041375])


def test_the_reconstruction_and_its_gradient_equal_the_reference() -> None:
    decoder = Decoder([Features("map", (4, 4, 4), 1)], (3, 8, 8)).double()
    first, second = (module for module in decoder.modules() if isinstance(module, nn.Conv2d))
    with torch.no_grad():
        first.weight.copy_(0.2 * det((12, 4, 3, 3), 51))
        first.bias.copy_(0.1 * det((12,), 52))
        second.weight.copy_(0.2 * det((3, 12, 3, 3), 53))
        second.bias.copy_(0.1 * det((3,), 54))
    features = det((2, 4, 4, 4), 50).requires_grad_()

    loss = losses.reconstruction(decoder(features), 0.5 + 0.5 * det((2, 3, 8, 8), 55))
    loss.backward()

    close(loss.detach(), 0.7738561387298869)
    close(features.grad.norm(), 0.023367888380966737)


# The formula of the reference code, for K = 16 and ResNet-32 on CIFAR-10: (5, 0.05) to (0.2, 0.5).
def test_weights_run_linearly_from_the_first_module_to_the_last_but_one() -> None:
    method = methods.create("infopro")

    found = [method.weights(i, 15) for i in range(15)]

    close([w for w, _ in found][:4], [5.0, 4.6571428571428575, 4.314285714285715, 3.971428571428571])
    close([w for w, _ in found][11:], [1.2285714285714289, 0.885714285714286, 0.5428571428571427, 0.2])
    close([w for _, w in found][:4], [0.05, 0.08214285714285714, 0.1142857142857143, 0.1464285714285714])
    close([w for _, w in found][11:], [0.4035714285714286, 0.4357142857142857, 0.46785714285714286, 0.5])
    assert method.weights(0, 1) == (5.0, 0.05)


def test_weights_of_the_plan_are_those_of_the_schedule() -> None:
    made = plan("cifar/resnet20", "infopro")

    weights = [[term.weight for term in loss.terms] for loss in made.losses]
    assert weights == [*(list(methods.create("infopro").weights(i, 9)) for i in range(9)), [1.0]]


# Heads of the re-implementation in AugLocal's code, in isolation, float64, weights of tests.golden from 100 on; input
# relu(det((4, C, H, H), 1)): loss, norm of the gradient at the input, and of the parameters' gradients.
@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((16, 32, 32), (2.3106444337329726, 0.08037757326147277, 1.9956432563635131)),
        ((32, 16, 16), (2.7745017953815845, 0.22873630737221803, 3.675090832254602)),
        ((64, 8, 8), (2.808089261599418, 0.23966286188208455, 3.567443732754194)),
    ],
)
def test_one_classifier_equals_the_reference(shape: tuple[int, int, int], expected: tuple[float, ...]) -> None:
    head = ConvolutionalProjection([Features("map", shape, 1)], 10, widest=64, unit=False).double()
    fill([head])
    features = det((4, *shape), 1).relu().requires_grad_()

    loss = F.cross_entropy(head(features), TARGET)
    loss.backward()

    close((loss.item(), features.grad.norm().item(), gradient_norm(head)), expected, rtol=1e-6)


# One iteration of the same code on ResNet-32, float64: cross-entropies, reconstructions, the last loss, and the norm of
# the gradient of each block, which has the weights in it.
TASK = [
    2.480145996650449, 2.410380627799777, 2.268253848283816, 2.442996517711504, 2.483663810943747, 2.7269873322914178,
    2.50686045322884, 2.6361203826564683, 2.2132459008926597, 2.4110068312582893, 2.6011242343065706,
    2.2452906476504735, 2.3894631187720288, 2.5567240178198305, 2.144669916244432,
]  # fmt: skip
PICTURE = [
    0.9641331581421144, 0.952507428500013, 1.0424943455763136, 1.2277607355369413, 1.1336006195837938,
    1.0413613549279654, 1.159817677681428, 1.1800026898940148, 0.9695713682185971, 1.0312004876797967,
    1.0189036386234036, 1.126049126918243, 1.0563199959209266, 0.9883339267545009, 1.087791104135956,
]  # fmt: skip
FINAL = 3.7024830255842733
NORMS = [
    1.4363458488535819, 0.9863928925528406, 0.7589623759695865, 0.5429736326600099, 0.41143781937090335,
    0.3119549974008338, 0.674687140860507, 0.5122745295156474, 0.4658060446669447, 0.4322390425879217,
    0.33304258705187145, 0.8084059971610087, 0.7961091731025359, 0.7178014186081076, 0.7035429567057359,
    1.7193958639391433,
]  # fmt: skip


def test_one_step_equals_the_reference() -> None:
    mean, std = (torch.tensor(values, dtype=torch.float64).reshape(3, 1, 1) for values in (MEAN, STD))
    images = (0.5 + 0.5 * det((4, 3, 32, 32), 2) - mean) / std
    model = zoo.create_model("cifar/resnet32").double()
    local = localize.transform(model, "infopro", example_input=images, loss="softmax", **CIFAR).train()
    order = [local.heads[f"{kind}_{i}"] for kind in ("head", "decoder") for i in range(15)]
    assert fill([model, *order]) == 270

    result = local.step(images, TARGET, torch.optim.SGD(local.param_groups(lr=0.0), lr=0.0))

    weights = [methods.create("infopro").weights(i, 15) for i in range(15)]
    expected = [rec * p + task * t for (rec, task), p, t in zip(weights, PICTURE, TASK, strict=True)]
    close(torch.stack(list(result.losses.values())), [*expected, FINAL], rtol=1e-6)
    close([F.cross_entropy(result.scores[f"loss_{i}"], TARGET).item() for i in range(15)], TASK, rtol=1e-6)
    stem = nn.ModuleList([model.conv1, model.bn1])
    blocks = [stem, *model.layer1, *model.layer2, *model.layer3]
    close([gradient_norm(block) for block in blocks], NORMS, rtol=1e-6)
    close(gradient_norm(model.fc), 6.460961788600447, rtol=1e-6)


# ------------------------------------------------------------------------------------------------------------- images


def test_images_are_restored_from_what_they_were_normalised_with() -> None:
    images = torch.rand(2, 3, 4, 4)
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (MEAN, STD))

    torch.testing.assert_close(Pixels(MEAN, STD).float()((images - mean) / std), images, rtol=0, atol=1e-6)


@pytest.mark.parametrize("images", [torch.randn(3, 1, 4, 4), torch.zeros(3, 1, 4, 4)], ids=["random", "constant"])
def test_without_them_images_are_scaled_to_their_own_range(images: Tensor) -> None:
    found = Pixels()(images)

    assert (found.min(), found.max()) == (0, 1 if images.any() else 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": "0.5,0.5"}, "mean has 2 numbers.*\n.*3 channels"),
        ({"mean": "0.5"}, "mean was given, but std was not"),
        ({"mean": "a", "std": "b"}, "mean cannot be 'a'"),
        ({"mean": "0.5", "std": "0"}, "std cannot be '0'"),
        ({"ixx_1": 0.0, "ixy_1": 0.0}, "nothing to train segment_0 by: both weights are 0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        plan("cifar/resnet20", "infopro", **options)


def test_a_loss_of_weight_0_is_left_out_with_its_head() -> None:
    made = plan("cifar/resnet20", "infopro", ixy_1=0.0)

    assert [term.head for term in made.losses[0].terms] == ["decoder_0"]
    assert [term.head for term in made.losses[1].terms] == ["decoder_1", "head_1"]
    assert "head_0" not in [block.name for block in made.blocks]


def test_flat_features_have_nothing_to_reconstruct_an_image_from() -> None:
    with pytest.raises(MethodError, match="features with positions; those after layer1 have none.*\n.*1024 values"):
        plan("cifar/fc_mnist", "infopro", (1, 28, 28))


@pytest.mark.parametrize("loss", ["contrast", "softmax"])
def test_tokens_are_read_as_the_grid_that_they_are(loss: str) -> None:
    made = plan("cifar/vit", "infopro", loss=loss)

    assert made.block("decoder_0").module.map.shape == (512, 8, 8)


def test_a_network_for_large_images_gets_the_deep_heads() -> None:
    made = plan("tv/resnet50", "infopro", (3, 64, 64), head="deep", decoder="deep", loss="softmax")

    convolutions = [m.out_channels for m in made.block("head_3").module.modules() if isinstance(m, nn.Conv2d)]
    narrowing = [m.out_channels for m in made.block("decoder_3").module.modules() if isinstance(m, nn.Conv2d)]
    assert convolutions == [128, 256, 512, 2048]
    assert narrowing == [128, 32, 12, 3]


def test_the_deep_heads_have_the_parameters_of_the_code() -> None:
    features = (Features("map", (512, 28, 28), 1),)

    head, decoder = DeepProjection(features, 1000, unit=False), DeepDecoder(features, (3, 224, 224))

    assert sum(p.numel() for module in (head, decoder) for p in module.parameters()) == 4_750_259
