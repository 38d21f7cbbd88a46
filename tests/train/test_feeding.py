"""What belongs to the model travels with it: a run and its export say how to feed it, and nothing is measured again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from PIL import Image

from localize import recipes
from localize.errors import MissingError
from localize.train import TrainConfig, data, evaluation, export, pretrained_cfg, resume, run, runs
from localize.train.feeding import feed
from tests import daily
from tests.train import image_folders

SETTINGS = {"epochs": 2, "batch_size": 15, "lr": 0.02, "device": "cpu", "data": "data", "output": "run"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    image_folders.write(tmp_path / "data", "RGB", 10, 6)
    return tmp_path


def train(model: str = "timm/test_resnet", **settings: Any) -> float:
    given = SETTINGS | {"input_shape": (3, 32, 32)} | settings
    return run(TrainConfig(model, **given)).metrics[-1]["test_accuracy"]


def asked_again(**options: Any) -> float:
    opened = evaluation.open_run("run", device="cpu", **options)
    return evaluation.evaluate_run(opened, evaluation.Questions())["accuracy"]


def brighten(folder: Path) -> None:
    for path in folder.rglob("*.png"):
        pixels = np.asarray(Image.open(path)).astype(int)
        Image.fromarray((pixels // 3 + 170).astype(np.uint8)).save(path)


def test_a_test_is_fed_as_training_was_whatever_the_training_images_are_now(here: Path) -> None:
    accuracy = train()
    written = recipes.load("run").preprocessing
    brighten(here / "data" / "train")
    assert asked_again() == accuracy
    assert evaluation.open_run("run", device="cpu").splits.preprocessing == written
    shutil.rmtree("data/train")  # a folder with test images only
    assert asked_again() == accuracy


def test_a_run_that_goes_on_is_fed_as_it_was(here: Path) -> None:
    train(pixel_mean=(0.25,), pixel_std=(0.5, 0.25, 0.125))
    before = recipes.load("run").preprocessing
    assert (before.mean, before.std) == ((0.25, 0.25, 0.25), (0.5, 0.25, 0.125))
    assert resume("run", epochs=3).metrics[-1]["epoch"] == 3
    assert recipes.load("run").preprocessing == before


PLAIN = """
import json, sys
from pathlib import Path
import torch
from PIL import Image
config = json.loads(Path("export/config.json").read_text())
cfg = config["pretrained_cfg"]
if sys.argv[1] == "timm":
    import timm
    from timm.data import create_transform, resolve_data_config
    model = timm.create_model(
        config["architecture"], checkpoint_path=sys.argv[2], pretrained_cfg=cfg, **config["model_args"]
    )
    transform = create_transform(**resolve_data_config(model=model))
else:
    import safetensors.torch, torchvision
    from torchvision.transforms import v2 as T
    model = torchvision.models.get_model(config["architecture"], num_classes=config["num_classes"])
    model.load_state_dict(safetensors.torch.load_file(sys.argv[2]), strict=True)
    size = cfg["input_size"][1:]
    assert (cfg["crop_mode"], cfg["crop_pct"], cfg["interpolation"]) == ("squash", 1.0, "bilinear")
    transform = T.Compose(
        [T.Resize(size), T.ToImage(), T.ToDtype(torch.float32, scale=True), T.Normalize(cfg["mean"], cfg["std"])]
    )
assert config["localize"]["image_mode"] == "RGB"
model.eval()
right = images = 0
for path in sorted(Path("data/val").rglob("*.png")):
    with torch.no_grad():
        logits = model(transform(Image.open(path).convert("RGB"))[None])
    right += config["label_names"][int(logits.argmax())] == path.parent.name
    images += 1
assert "localize" not in sys.modules
print(json.dumps([right, images]))
"""


@pytest.mark.parametrize(
    ("library", "model"),
    daily.in_turn([("timm", "timm/test_resnet"), ("tv", "tv/squeezenet1_1"), ("timm", "timm/test_vit")], 3),
)
def test_a_plain_library_reaches_the_accuracy_of_the_run_from_the_exported_file(
    here: Path, library: str, model: str
) -> None:
    settings = {"augment": "imagenet"} if model == "timm/test_vit" else {}
    accuracy = train(model, epochs=1, input_shape=(3, 64, 64), **settings)
    path = export("run", "export/net.safetensors")
    command = [sys.executable, "-W", "ignore", "-c", PLAIN, library, str(path)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    answer = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert answer.returncode == 0, answer.stderr
    right, images = json.loads(answer.stdout)
    assert right / images == accuracy


def test_the_file_says_what_lies_beside_it(here: Path) -> None:
    train(epochs=1)
    text = Path("run/export/config.json").read_text()
    for path in (Path("run/export/backbone.safetensors"), export("run", "out/deep/net.safetensors")):
        with safetensors.safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt", "config": text}
        assert path.with_name("config.json").read_text() == text
    found = json.loads(text)
    assert found["label_names"] == found["pretrained_cfg"]["label_names"] == list(image_folders.CLASSES)
    assert found["localize"]["dataset"]["test"]["images"] == 18
    export("run", "out/deep/net.pt")  # the same words beside it
    Path("out/deep/config.json").write_text("{}")
    with pytest.raises(MissingError, match="config.json exists, and describes another model"):
        export("run", "out/deep/more.pt")
    export("run", "out/deep/more.pt", force=True)
    assert Path("out/deep/config.json").read_text() == text


def test_the_same_weights_are_the_same_bytes(here: Path) -> None:
    train(epochs=1)
    whole = Path("run/export/backbone.safetensors").read_bytes()
    assert all(export("run", f"again{i}/x.safetensors").read_bytes() == whole for i in range(3))


def test_weights_bring_their_own_normalisation(here: Path) -> None:
    train(epochs=1, pixel_mean=(0.1, 0.2, 0.3), pixel_std=(0.4, 0.5, 0.6))
    file = Path("run/export/backbone.safetensors")
    own = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert pretrained_cfg.normalisation_of(file) == own
    shutil.copy(runs.Path("run/export/config.json"), "config.json")
    state = torch.nn.Linear(1, 1).state_dict()
    torch.save(state, "plain.pt")
    assert pretrained_cfg.normalisation_of(Path("plain.pt")) == own  # by the file beside it
    os.remove("config.json")
    assert pretrained_cfg.normalisation_of(Path("plain.pt")) is None
    train(epochs=1, output="next", initial_checkpoint=str(file))
    how = recipes.load("next").preprocessing
    assert (how.mean, how.std) == own


@pytest.mark.parametrize(
    ("model", "settings", "mean", "source"),
    [
        ("timm/test_resnet", {}, None, "measured on the training images"),
        ("timm/resnet18", {"pretrained": True}, (0.485, 0.456, 0.406), "of the published weights of timm/resnet18"),
        ("tv/resnet18", {"pretrained": True}, (0.485, 0.456, 0.406), "of the published weights of tv/resnet18"),
        ("tv/resnet18", {"initial_checkpoint": "x.pt"}, (0.485, 0.456, 0.406), "of the published weights of"),
        ("cifar/resnet20", {"initial_checkpoint": "x.pt"}, None, "measured on the training images"),
        ("tv/resnet18", {"pretrained": True, "pixel_mean": (0.5,), "pixel_std": (0.5,)}, (0.5,), "as given"),
    ],
)
def test_where_a_normalisation_comes_from_is_said(
    model: str, settings: dict[str, Any], mean: tuple[float, ...] | None, source: str
) -> None:
    config = TrainConfig(model, **settings)
    found = feed(recipes.Recipe(method="backprop", model=model), config)
    assert (found.mean, found.source.startswith(source)) == (mean, True)


def test_grey_images_are_normalised_by_the_channels_of_the_weights() -> None:
    splits = data.load("digits", (3, 8, 8), mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 4.0])
    image = splits.test[0][0]
    grey = image[0] + 0.1
    torch.testing.assert_close(image, torch.stack([grey - 0.1, (grey - 0.2) / 2, (grey - 0.3) / 4]))
