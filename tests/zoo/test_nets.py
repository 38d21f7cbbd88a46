"""The networks of the papers have the papers' parameters, shapes and names."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from localize import zoo
from localize.errors import OptionError
from localize.zoo.cifar_resnet import BasicBlock


def on_meta(name: str, **options: object) -> nn.Module:
    with torch.device("meta"):
        return zoo.create_model(name, **options)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# resnet32, resnet110: ChenxiangMA/AugLocal @98c90d6. vgg8b: anokland/local-loss @7b3b40b. fc, conv, vgg8b:
# schoi828/DCL @ef169c8. The others are the arithmetic of their papers' tables.
TOTALS = {
    "resnet20": 272_474,
    "resnet32": 466_906,
    "resnet44": 661_338,
    "resnet56": 855_770,
    "resnet110": 1_730_714,
    "resnet1202": 19_424_026,
    "resnet32_w": 7_427_914,
    "vgg8b": 8_903_434,
    "vgg8b_mnist": 7_328_266,
    "vgg8b_cifar100": 8_995_684,
    "vgg8b_stl10": 11_540_234,
    "vgg19": 20_040_522,
    "fc_mnist": 1_867_786,
    "fc_cifar10": 18_923_530,
    "fc_cifar100": 19_200_100,
    "conv256": 152_714,
    "conv256_mnist": 151_562,
    "conv256_cifar100": 175_844,
    "conv512": 1_336_458,
    "conv512_mnist": 1_335_306,
    "conv512_cifar100": 1_382_628,
    "vit": 9_532_938,
    "mixer": 1_819_530,
}


def test_every_net_of_the_package_has_a_total_to_be_checked():
    assert sorted(zoo.list_models("cifar/*")) == sorted(f"cifar/{name}" for name in TOTALS)


@pytest.mark.parametrize("name", TOTALS)
def test_a_net_has_the_parameters_of_its_paper(name: str):
    assert parameters(on_meta(f"cifar/{name}")) == TOTALS[name]


# CFL, Table 1: convolutions without bias, LayerNorm on the raw input.
@pytest.mark.parametrize(
    ("name", "options", "total"),
    [
        ("conv256_mnist", {"bias": False}, 151_242),
        ("conv256", {"bias": False}, 152_394),
        ("conv256_cifar100", {"bias": False}, 175_524),
        ("conv512_mnist", {"bias": False}, 1_334_474),
        ("conv512", {"bias": False}, 1_335_626),
        ("conv512_cifar100", {"bias": False}, 1_381_796),
        ("fc_mnist", {"input_norm": True}, 1_869_354),
        ("fc_cifar10", {"input_norm": True}, 18_929_674),
        ("fc_cifar100", {"input_norm": True}, 19_206_244),
    ],
)
def test_an_option_gives_the_parameters_of_the_cfl_networks(name: str, options: dict[str, bool], total: int):
    assert parameters(on_meta(f"cifar/{name}", **options)) == total


@pytest.mark.parametrize("name", TOTALS)
def test_a_net_maps_its_own_input_to_its_own_classes(name: str):
    source = zoo.resolve(f"cifar/{name}")
    logits = on_meta(source.name)(torch.empty(2, *source.input_shape, device="meta"))
    assert logits.shape == (2, source.num_classes)


# Multiply-adds of convolutions and linear layers for one 32x32 image: ChenxiangMA/AugLocal @98c90d6 under fvcore 0.1.5.
@pytest.mark.parametrize(("name", "multiply_adds"), [("resnet32", 69_124_736), ("resnet110", 253_149_824)])
def test_a_resnet_costs_the_multiply_adds_of_the_reference(name: str, multiply_adds: int):
    model = on_meta(f"cifar/{name}")
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 32, 32, device="meta"))
    assert counter.get_total_flops() == 2 * multiply_adds


@pytest.mark.parametrize(("name", "blocks"), [("resnet20", 9), ("resnet32", 15), ("resnet110", 54)])
def test_a_resnet_of_depth_6n_plus_2_has_3n_blocks(name: str, blocks: int):
    assert sum(isinstance(module, BasicBlock) for module in on_meta(f"cifar/{name}").modules()) == blocks


def test_walking_a_block_meets_conv1_conv2_and_the_shortcut_in_this_order():
    names = [name for name, module in BasicBlock(16, 32, 2).named_modules() if isinstance(module, nn.Conv2d)]
    assert names == ["conv1", "conv2", "shortcut.0"]


@pytest.mark.parametrize(
    ("in_channels", "out_channels", "stride", "shortcut"),
    [(16, 16, 1, nn.Identity), (16, 16, 2, nn.Sequential), (16, 32, 1, nn.Sequential), (16, 32, 2, nn.Sequential)],
)
def test_a_shortcut_projects_where_stride_or_width_changes(
    in_channels: int, out_channels: int, stride: int, shortcut: type[nn.Module]
):
    assert type(BasicBlock(in_channels, out_channels, stride).shortcut) is shortcut


def test_resnet_convolutions_are_drawn_with_variance_two_over_fan_out():
    torch.manual_seed(0)
    weight = zoo.create_model("cifar/resnet32").layer3[0].conv1.weight  # 32 -> 64 channels
    # 18,432 draws: the standard error of their standard deviation is 0.5 %, four of them are allowed.
    assert weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.021)


# schoi828/DCL @ef169c8: features behind pooling and dropout, two images of 28, 32 and 96 pixels.
VGG8B_FEATURES = {
    "vgg8b_mnist": [(128, 28, 28), (256, 14, 14), (256, 14, 14), (512, 7, 7), (512, 3, 3), (512, 1, 1), (1024,)],
    "vgg8b": [(128, 32, 32), (256, 16, 16), (256, 16, 16), (512, 8, 8), (512, 4, 4), (512, 2, 2), (1024,)],
    "vgg8b_stl10": [(128, 48, 48), (256, 24, 24), (256, 24, 24), (512, 12, 12), (512, 6, 6), (512, 3, 3), (1024,)],
}


@pytest.mark.parametrize("name", VGG8B_FEATURES)
def test_vgg8b_layers_give_the_feature_shapes_of_the_reference(name: str):
    model = on_meta(f"cifar/{name}")
    shapes: list[tuple[int, ...]] = []

    def record(module: nn.Module, args: tuple[Tensor], features: Tensor) -> None:
        shapes.append(tuple(features.shape[1:]))

    for layer in ("layer1", "layer2", "layer3", "layer4", "layer5", "layer6", "layer7"):
        model.get_submodule(layer).register_forward_hook(record)
    model(torch.empty(2, *zoo.resolve(f"cifar/{name}").input_shape, device="meta"))

    assert shapes == VGG8B_FEATURES[name]


def test_a_vgg8b_layer_pools_before_it_drops_out_and_shows_both():
    layer = on_meta("cifar/vgg8b", dropout=0.05).layer2
    assert [name for name, _ in layer.named_children()] == ["conv", "bn", "act", "pool", "dropout"]
    assert isinstance(layer.dropout, nn.Dropout2d) and layer.dropout.p == 0.05


def test_vgg8b_fits_its_fc_layer_to_images_of_any_size():
    assert on_meta("cifar/vgg8b", input_shape=(3, 159, 80)).layer7.fc.in_features == 512 * 5 * 2


def test_vgg19_leaves_each_pool_outside_the_local_layers():
    features = on_meta("cifar/vgg19").features
    assert len([name for name, _ in features.named_children() if name.startswith("layer")]) == 16
    assert not any(isinstance(m, nn.MaxPool2d) for name, m in features.named_modules() if name.startswith("layer"))


def test_the_first_layer_of_a_conv_net_keeps_the_resolution_and_all_others_halve_it():
    model = on_meta("cifar/conv512")
    x = torch.empty(2, 3, 32, 32, device="meta")
    shapes = [tuple((x := layer(x)).shape[1:]) for layer in model.layers]
    assert shapes == [(64, 32, 32), (256, 16, 16), (512, 8, 8)]


def test_fc_nets_normalise_before_the_next_layer_and_not_the_image():
    model = on_meta("cifar/fc_mnist")
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
    assert norms == ["layer2.norm", "norm"]


def test_fc_cifar100_drops_out_as_its_table_says():
    assert on_meta("cifar/fc_cifar100").layer1.dropout.p == 0.3


@pytest.mark.parametrize(("name", "tokens"), [("vit", 65), ("mixer", 64)])
def test_a_token_net_keeps_its_tokens_in_six_blocks(name: str, tokens: int):
    model = on_meta(f"cifar/{name}")
    shapes: list[tuple[int, ...]] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
    model(torch.empty(2, 3, 32, 32, device="meta"))
    assert shapes == [(2, tokens, 512)] * 6


def test_attention_equals_pytorchs_own_multi_head_attention():
    torch.manual_seed(0)
    ours = zoo.create_model("cifar/vit").blocks[0].attn.double()
    theirs = nn.MultiheadAttention(512, 8, batch_first=True).double()
    theirs.in_proj_weight.data.copy_(ours.qkv.weight)
    theirs.in_proj_bias.data.copy_(ours.qkv.bias)
    theirs.out_proj.load_state_dict(ours.proj.state_dict())
    x = torch.randn(2, 5, 512, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("name", ["resnet20", "vgg8b", "fc_mnist", "conv256", "vit", "mixer"])
def test_two_forwards_agree_and_leave_no_new_state(name: str):
    torch.manual_seed(0)
    model = zoo.create_model(f"cifar/{name}")
    x = torch.randn(2, *zoo.resolve(f"cifar/{name}").input_shape)
    keys = list(model.state_dict())

    first, second = model(x), model(x)

    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("name", ["resnet20", "vgg8b_cifar100", "vgg19", "fc_cifar100", "conv512", "vit", "mixer"])
def test_a_net_takes_other_classes_and_channels(name: str):
    model = on_meta(f"cifar/{name}", num_classes=7, input_shape=(2, 64, 64))
    assert model(torch.empty(2, 2, 64, 64, device="meta")).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vgg8b", {"input_shape": (3, 15, 32)}, r"vgg8b cannot take 15x32 images\."),
        ("vgg19", {"input_shape": (3, 31, 32)}, r"vgg19 cannot take 31x32 images\."),
        ("vgg8b", {"activation": "gelu"}, r"vgg8b has no activation 'gelu'\.\n  activations: relu, leaky"),
        ("vit", {"patch": 5}, r"vit cannot cut 32x32 images into 5x5 patches\.\n  .*: 1, 2, 4, 8, 16, 32\n"),
        ("mixer", {"input_shape": (3, 30, 32)}, r"mixer cannot cut 30x32 images into 4x4 patches"),
    ],
)
def test_a_net_refuses_what_it_cannot_be(name: str, options: dict[str, object], message: str):
    with pytest.raises(OptionError, match=message):
        on_meta(f"cifar/{name}", **options)
