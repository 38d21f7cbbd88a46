"""A name means one model, and a name that means none or several is answered with what to type."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import WeightsEnum

from localize import zoo
from localize.errors import MissingError, ModelError, OptionError, UnknownNameError
from localize.outside import CodeError

NET = """
from torch import nn


def net(num_classes=4, width=3):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, width), nn.Linear(width, num_classes))


net.input_shape = (3, 2, 2)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(5, 2)
        self.input_shape = (5, 1, 1)

    def forward(self, x):
        return self.fc(x.flatten(1))


def broken():
    return 1 / 0


def number():
    return 3


built = Plain()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nets.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("localize_file_")]:
        del sys.modules[name]


def on_meta(name: str, num_classes: int | None = None, **options: object) -> nn.Module:
    with torch.device("meta"):
        return zoo.create_model(name, num_classes, **options)


@pytest.mark.parametrize(
    ("name", "source", "input_shape", "num_classes"),
    [
        ("cifar/resnet110", "cifar", (3, 32, 32), 10),
        ("cifar/vgg8b_mnist", "cifar", (1, 28, 28), 10),
        ("tv/resnet18", "tv", (3, 224, 224), 1000),
        ("tv/inception_v3", "tv", (3, 299, 299), 1000),
        ("tv/vit_h_14", "tv", (3, 224, 224), 1000),
        ("timm/resnet18", "timm", (3, 224, 224), 1000),
        ("timm/resnet50.a1_in1k", "timm", (3, 224, 224), 1000),
        ("timm/efficientnet_b0", "timm", (3, 224, 224), 1000),
        ("timm/aimv2_1b_patch14_224", "timm", (3, 224, 224), 1000),  # timm says 0 classes
    ],
)
def test_a_canonical_name_resolves_to_itself(name: str, source: str, input_shape: tuple[int, ...], num_classes: int):
    assert zoo.resolve(name) == zoo.ModelSource(name, source, input_shape, num_classes)


@pytest.mark.parametrize(
    ("name", "library", "family"),
    [
        ("cifar/resnet110", "cifar", "cifar_resnet"),
        ("tv/swin_t", "tv", "swin_transformer"),
        ("timm/deit_tiny_patch16_224", "timm", "deit"),  # its class is of another file
        ("timm/resnet50.a1_in1k", "timm", "resnet"),
        ("some/nets.py:net", "file", "nets"),
    ],
)
def test_a_family_is_the_file_that_defines_a_model(name: str, library: str, family: str):
    assert (zoo.library(name), zoo.family(name)) == (library, family)


@pytest.mark.parametrize(
    ("bare", "canonical"),
    [
        ("resnet110", "cifar/resnet110"),
        ("mobilenet_v2", "tv/mobilenet_v2"),
        ("deit_tiny_patch16_224", "timm/deit_tiny_patch16_224"),
    ],
)
def test_a_bare_name_is_taken_where_one_library_has_it(bare: str, canonical: str):
    assert zoo.resolve(bare).name == canonical


@pytest.mark.parametrize(
    ("bare", "text"),
    [
        ("resnet50", "model 'resnet50' is in two libraries.\n  help: write tv/resnet50 or timm/resnet50"),
        ("vgg19", "model 'vgg19' is in three libraries.\n  help: write cifar/vgg19, tv/vgg19 or timm/vgg19"),
    ],
)
def test_a_bare_name_of_several_libraries_is_refused(bare: str, text: str):
    with pytest.raises(UnknownNameError) as caught:
        zoo.resolve(bare)
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "resnet111",
            r"there is no model 'resnet111'\.\n  did you mean .*'resnet110'.*\n  help: .* models '\*resnet\*'",
        ),
        (
            "cifar/vgg8",
            r"there is no model 'cifar/vgg8'\.\n  did you mean 'vgg8b'.*\n  help: localize models '\*vgg\*'",
        ),
        ("tv/resnet110", r"there is no model 'tv/resnet110'\.\n  did you mean 'resnet101'"),
        ("torchvision/resnet18", r"there is no model library 'torchvision'\.\n  libraries: cifar, tv, timm"),
        ("timm/resnet18.nope", r"there is no model 'timm/resnet18.nope'\.\n  weights of resnet18: .*resnet18\.a1_in1k"),
    ],
)
def test_an_unknown_name_is_answered_with_known_ones(name: str, message: str):
    with pytest.raises(UnknownNameError, match=message):
        zoo.resolve(name)


def test_names_are_listed_by_library_and_found_by_either_part():
    assert zoo.list_models("cifar/vgg8*") == [
        f"cifar/vgg8b{variant}" for variant in ("", "_cifar100", "_mnist", "_stl10")
    ]
    assert [name for name in zoo.list_models("resnet18") if not name.startswith("cifar")] == [
        "tv/resnet18",
        "timm/resnet18",
    ]
    assert zoo.list_models("no such model") == []


def test_every_torchvision_name_says_what_goes_in():
    sizes = {name: zoo.resolve(name).input_shape[1] for name in zoo.list_models("tv/*", task="classification")}
    assert len(sizes) >= 80
    assert {name: size for name, size in sizes.items() if size != 224} == {
        "tv/efficientnet_b1": 240,
        "tv/efficientnet_b2": 288,
        "tv/efficientnet_b3": 300,
        "tv/efficientnet_b4": 380,
        "tv/efficientnet_b5": 456,
        "tv/efficientnet_b6": 528,
        "tv/efficientnet_b7": 600,
        "tv/efficientnet_v2_l": 480,
        "tv/efficientnet_v2_m": 480,
        "tv/efficientnet_v2_s": 384,
        "tv/inception_v3": 299,
        "tv/swin_v2_b": 256,
        "tv/swin_v2_s": 256,
        "tv/swin_v2_t": 256,
    }


@pytest.mark.parametrize(
    ("task", "count", "name", "input_shape", "num_classes"),
    [
        ("video", 9, "tv/r3d_18", (3, 16, 112, 112), 400),
        ("video", 9, "tv/mvit_v1_b", (3, 16, 224, 224), 400),
        ("segmentation", 6, "tv/lraspp_mobilenet_v3_large", (3, 520, 520), 21),
        ("detection", 12, "tv/ssd300_vgg16", (3, 320, 320), 1000),
    ],
)
def test_names_of_other_tasks(task: str, count: int, name: str, input_shape: tuple[int, ...], num_classes: int):
    names = zoo.list_models(task=task)

    assert len(names) >= count
    assert zoo.resolve(name) == zoo.ModelSource(name, "tv", input_shape, num_classes, task)
    assert zoo.resolve(name.removeprefix("tv/")).name == name
    assert name in names
    assert name in zoo.list_models("tv/*")
    assert name not in zoo.list_models("tv/*", task="classification")


@pytest.mark.parametrize(("name", "part"), [("raft_small", "optical_flow"), ("quantized_resnet18", "quantization")])
def test_a_model_to_which_local_losses_do_not_apply_is_refused(name: str, part: str):
    with pytest.raises(ModelError, match=rf"tv/{name} is a model of {part}, to which local losses do not apply"):
        zoo.resolve(f"tv/{name}")
    assert zoo.list_models(f"tv/{name}") == []


def test_a_backbone_gives_its_weights_back_to_the_detection_model():
    from torchvision.models import get_model

    model = zoo.create_model("tv/fasterrcnn_mobilenet_v3_large_320_fpn", 5)
    detector = get_model("fasterrcnn_mobilenet_v3_large_320_fpn", weights=None, weights_backbone=None)
    scores, state = model(torch.zeros(2, 3, 32, 32)), model.state_dict()
    backbone = {key for key in detector.state_dict() if key.startswith("backbone.body.")}

    keys = detector.load_state_dict(state, strict=False)

    assert scores.shape == (2, 5)
    assert keys.unexpected_keys == ["classifier.weight", "classifier.bias"]
    assert backbone and backbone == set(state) - set(keys.unexpected_keys)
    assert all(torch.equal(detector.state_dict()[key], state[key]) for key in backbone)


def test_a_backbone_without_a_body_is_taken_whole():
    with torch.device("meta"):
        model = zoo.create_model("tv/ssd300_vgg16")
        assert model(torch.zeros(2, 3, 320, 320)).shape == (2, 1000)
    assert {key.split(".")[0] for key in model.state_dict()} == {"backbone", "classifier"}


@pytest.mark.parametrize(
    ("name", "input_shape", "message"),
    [
        ("tv/r3d_18", (3, 64, 64), r"takes inputs of 4 dimensions, not 3"),
        ("cifar/resnet20", (3, 4, 32, 32), r"takes inputs of 3 dimensions, not 4"),
        ("tv/mvit_v1_b", (3, 8, 64, 64), "takes 16 frames of 224x224 only"),
    ],
)
def test_an_input_of_another_kind_is_refused(name: str, input_shape: tuple[int, ...], message: str):
    with pytest.raises(OptionError, match=message):
        on_meta(name, input_shape=input_shape)


@pytest.mark.parametrize(
    "input_shape", [(3, 9_999_999, 9_999_999), (2**31, 1, 1), (3, 0, 32), (-3, 32, 32), (3, 32.0, 32), (True, 8, 8), 32]
)
@pytest.mark.parametrize("name", ["cifar/resnet20", "cifar/vgg8b", "timm/resnet18"])
def test_an_image_that_cannot_be_is_refused_in_words(name: str, input_shape: object):
    with pytest.raises(OptionError, match=r"input_shape is .*\n  .*\n  help: input_shape=") as caught:
        zoo.create_model(name, input_shape=input_shape)

    assert caught.value.option == "input_shape"


def test_every_timm_name_resolves():
    names = zoo.list_models("timm/*")
    assert len(names) > 1000
    assert all(zoo.resolve(name).num_classes > 0 for name in names)


@pytest.mark.parametrize("name", ["tv/resnet18", "tv/vit_b_16", "tv/maxvit_t", "timm/resnet18", "timm/mixer_s32_224"])
def test_a_librarys_model_is_built_for_the_classes_and_size_asked_for(name: str):
    size = 64 if name != "tv/maxvit_t" else 224 * 2
    model = on_meta(name, 7, input_shape=(3, size, size)).eval()
    assert model(torch.empty(2, 3, size, size, device="meta")).shape == (2, 7)


def test_a_librarys_model_is_the_one_the_library_builds():
    import timm
    import torchvision

    with torch.device("meta"):
        expected = [torchvision.models.resnet18().state_dict(), timm.create_model("resnet18").state_dict()]
    for name, state in zip(("tv/resnet18", "timm/resnet18"), expected, strict=True):
        built = on_meta(name).state_dict()
        assert {key: value.shape for key, value in built.items()} == {key: value.shape for key, value in state.items()}


def test_a_timm_model_takes_other_channels():
    assert on_meta("timm/resnet18", input_shape=(1, 32, 32)).conv1.in_channels == 1


def test_a_timm_feature_extractor_gets_a_classifier():
    name = "timm/resnet50_clip_gap"
    assert on_meta(name).num_classes == 1000
    assert on_meta(name, 0).num_classes == 0


@pytest.mark.parametrize("name", ["tv/googlenet", "tv/inception_v3"])
def test_a_torchvision_model_with_a_deprecated_default_is_built_without_a_warning(name: str, recwarn):
    on_meta(name)
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cifar/vgg8b", {"dropuot": 0.1}, r"cifar/vgg8b has no option 'dropuot'\.\n  .*\n  did you mean 'dropout'"),
        ("tv/resnet18", {"dropuot": 0.1}, r"tv/resnet18 has no option 'dropuot'"),
        ("timm/resnet18", {"dropuot": 0.1}, r"timm/resnet18 has no option 'dropuot'"),
        ("cifar/vgg8b", {"dropout": 2}, r"cifar/vgg8b cannot be built with dropout=2\.\n  ValueError: "),
        ("tv/vit_b_16", {"input_shape": (3, 30, 30)}, r"tv/vit_b_16 cannot be built with input_shape=\(3, 30, 30\)"),
        ("tv/vit_b_16", {"input_shape": (3, 32, 64)}, r"tv/vit_b_16 takes square images, not 32x64"),
        ("tv/resnet18", {"input_shape": (1, 32, 32)}, r"tv/resnet18 takes images of 3 channels, not 1"),
        ("cifar/resnet20", {"input_shape": (32, 0)}, r"input_shape is \(32, 0\), not \(channels, height, width\)"),
        ("cifar/resnet20", {"num_classes": 0}, r"cifar/resnet20 cannot have 0 classes"),
        ("cifar/resnet20", {"num_classes": "ten"}, r"num_classes is 'ten', not a number of classes"),
        (
            "cifar/resnet20",
            {"pretrained": True},
            r"no published weights\.\n  help: leave out pretrained=True",
        ),
        ("timm/test_vit4", {"pretrained": True}, r"no published weights\.\n  help: leave out pretrained=True, or "),
        ("timm/test_vit", {"pretrained": True, "nope": 1}, r"timm/test_vit has no option 'nope'"),
    ],
)
def test_an_option_that_cannot_be_is_named(name: str, options: dict[str, object], message: str):
    with pytest.raises(OptionError, match=message):
        on_meta(name, **options)


def test_weights_that_cannot_be_fetched_are_an_error_of_the_environment(monkeypatch: pytest.MonkeyPatch):
    from torchvision.models import ResNet18_Weights

    def offline(self: ResNet18_Weights, *args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", offline)
    fetched = r"the weights of tv/resnet18 could not be fetched\.\n  tried https://.*resnet18.*\n  OSError: no route"
    with pytest.raises(MissingError, match=f"{fetched}.*\n  help: .*pretrained=False"):
        on_meta("tv/resnet18", pretrained=True)
    with pytest.raises(MissingError, match=fetched):
        on_meta("tv/resnet18", 9, pretrained=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MissingError, match=r"timm/test_vit could not be fetched\.\n  tried https://.*/timm/test_vit"):
        on_meta("timm/test_vit", pretrained=True)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3", "fcn_resnet50", "deeplabv3_mobilenet_v3_large"])
def test_the_net_of_published_weights_is_that_of_its_library_also_without_them(
    monkeypatch: pytest.MonkeyPatch, name: str
):
    net = zoo.create_empty(f"tv/{name}", pretrained=True, fetch=False)
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, **given: {})
    with monkeypatch.context() as patch, torch.device("meta"):
        patch.setattr(nn.Module, "load_state_dict", lambda self, state: None)
        theirs = torchvision.models.get_model(name, weights="DEFAULT")
    assert list(net.state_dict()) == list(theirs.state_dict())
    assert getattr(net, "transform_input", None) == getattr(theirs, "transform_input", None)
    assert list(net.state_dict()) != list(on_meta(f"tv/{name}").state_dict()) or name == "inception_v3"


def test_timm_has_a_net_for_published_weights_too():
    assert zoo.create_empty("timm/fbnetc_100", pretrained=True, fetch=False).bn1.eps == 1e-3
    assert zoo.create_empty("timm/fbnetc_100").bn1.eps == 1e-5


def test_the_backbone_of_a_detection_model_is_the_same_net_with_published_weights(monkeypatch: pytest.MonkeyPatch):
    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    state = torchvision.models.get_model(name, weights=None, weights_backbone=None).state_dict()
    frozen = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, **given: frozen)
    model = zoo.create_model(f"tv/{name}", 9, pretrained=True)
    assert str(model) == str(on_meta(f"tv/{name}", 9)) and all(p.requires_grad for p in model.parameters())
    assert torch.equal(model.backbone.body["0"][0].weight, frozen["backbone.body.0.0.weight"])


def test_a_missing_library_is_an_error_of_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingError, match=r"timm cannot be imported\.\n.*\n  help: pip install timm"):
        zoo.resolve("timm/resnet18")


def test_a_users_factory_says_its_input_and_classes(folder: Path):
    source = zoo.resolve("nets.py:net")
    assert source == zoo.ModelSource("nets.py:net", "file", (3, 2, 2), 4)
    assert zoo.create_model("nets.py:net", 6, width=2)(torch.zeros(1, 3, 2, 2)).shape == (1, 6)
    assert zoo.resolve(f"{folder}/nets.py:net").name == f"{folder.as_posix()}/nets.py:net"


def test_a_users_class_that_says_nothing_is_asked_for_its_input_once_built(folder: Path):
    source = zoo.resolve("nets.py:Plain")
    assert (source.input_shape, source.num_classes) == (None, None)
    model = zoo.create_model("nets.py:Plain")
    assert zoo.input_shape_of(source, model) == (5, 1, 1)
    assert zoo.input_shape_of(source, model, (5, 2, 2)) == (5, 2, 2)
    del model.input_shape
    with pytest.raises(OptionError, match=r"nets.py:Plain does not say what input it takes"):
        zoo.input_shape_of(source, model)


def test_a_users_file_imports_what_lies_beside_it(folder: Path):
    (folder / "parts_beside.py").write_text("from torch import nn\n\ndef part():\n    return nn.Linear(2, 2)\n")
    (folder / "whole.py").write_text("from parts_beside import part\n\ndef make():\n    return part()\n")
    assert isinstance(zoo.create_model("whole.py:make"), nn.Linear)
    assert str(folder) not in sys.path
    del sys.modules["parts_beside"]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("netz.py:net", UnknownNameError, r"there is no file 'netz.py'\.\n  did you mean 'nets.py'"),
        ("nets.py:met", UnknownNameError, r"'nets.py' defines no 'met'\.\n  .*: Plain, broken, net, number"),
        ("nets.py", UnknownNameError, r"'nets.py' names a file, not a factory\.\n  .*: Plain, broken, net, number"),
        ("nets.py:built", ModelError, r"'nets.py:built' is a Plain, not a function or class that builds a model"),
        ("nets.py:number", ModelError, r"nets.py:number returned an int, not an nn.Module"),
        ("nets.py:broken", ModelError, r"nets.py:broken raised ZeroDivisionError\.\n  ZeroDivisionError: division"),
    ],
)
def test_a_users_file_that_gives_no_model_is_refused(folder: Path, name: str, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        zoo.create_model(name)


@pytest.mark.parametrize("option", ["pretrained", "depth"])
def test_a_users_factory_is_not_given_options_it_does_not_take(folder: Path, option: str):
    with pytest.raises(OptionError, match=rf"nets.py:Plain has no option '{option}'"):
        zoo.create_model("nets.py:Plain", **{option: 5})


def test_a_users_factory_without_num_classes_gives_its_own_scores(folder: Path):
    """Whether they fit the data is found when it is converted: ``tests/test_build.py``."""
    assert zoo.create_model("nets.py:Plain", num_classes=5)(torch.zeros(1, 5)).shape == (1, 2)


def test_what_a_users_file_raises_is_chained(folder: Path):
    (folder / "bad.py").write_text("import no_such_module_here\n")
    with pytest.raises(CodeError, match=r"'bad.py' could not be imported\.\n  ModuleNotFoundError: ") as caught:
        zoo.resolve("bad.py:net")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_naming_a_cifar_net_imports_no_library():
    script = (
        "import sys, localize.zoo.names as names; names.resolve('cifar/resnet110'); names.list_models('cifar/*');"
        "assert not {'timm', 'torchvision'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])


def test_a_users_file_is_compiled_at_every_start_and_leaves_nothing_beside_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    (folder / "mine.py").write_text("from torch import nn\ndef net(): return nn.Linear(3, 4)\n")
    there = sorted(folder.iterdir())
    for width in (4, 5):  # an edit within the second of the last, which leaves time and size as they were
        (folder / "mine.py").write_text(f"from torch import nn\ndef net(): return nn.Linear(3, {width})\n")
        sys.modules.pop("localize_file_mine", None)
        assert zoo.create_model("mine.py:net").out_features == width
    assert sorted(folder.iterdir()) == there
