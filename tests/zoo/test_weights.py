"""Weights from a file are those of the model, all of them, or are refused; only a classifier may differ."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from localize import zoo
from localize.errors import MissingError
from localize.zoo import weights


class Executed:
    def __reduce__(self):
        return eval, ("1 + 1",)


def net(classes: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, classes))


def saved(path: Path, value: object) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(value, path)
    else:
        torch.save(value, path)
    return path


def wrapped(state: dict[str, torch.Tensor]) -> dict[str, object]:
    return {"epoch": 3, "model": {f"module.{key}": value for key, value in state.items()}}


@pytest.mark.parametrize(("name", "put"), [("x.safetensors", dict), ("x.pt", dict), ("x.pth", wrapped)])
def test_weights_are_loaded_from_what_people_save(tmp_path: Path, name: str, put: type) -> None:
    source, model = net(), net()
    found = weights.load_file(model, saved(tmp_path / name, put(source.state_dict())), 4)
    assert (found.tensors, found.drawn, str(found)) == (9, (), "9 tensors loaded")
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in source.state_dict().items())


def test_a_classifier_of_another_size_is_left_out_and_told(tmp_path: Path) -> None:
    source, model = net(7), net(4)
    drawn = model[2].weight.clone()
    found = weights.load_file(model, saved(tmp_path / "x.pt", source.state_dict()), 4)
    assert str(found) == "7 tensors loaded; the classifier of 7 classes left out, 2.weight, 2.bias drawn again"
    assert torch.equal(model[0].weight, source[0].weight) and torch.equal(model[2].weight, drawn)


def test_weights_of_another_model_are_refused_and_change_nothing(tmp_path: Path) -> None:
    model = net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = net().state_dict()
    wide = {**state, "0.weight": torch.zeros(4, 5), "extra": torch.zeros(1)}
    del wide["1.bias"]
    message = (
        r"1 missing there: 1.bias\n  1 not in the model: extra\n  1 of another shape: 0.weight \(4, 5\), here \(4, 4\)"
    )
    with pytest.raises(MissingError, match=message):
        weights.load_file(model, saved(tmp_path / "x.pt", wide), 4)
    # Two tensors have the model's number of classes in front, and disagree on how many there are in the file.
    with pytest.raises(MissingError, match="3 of another shape: 0.bias"):
        weights.load_state(net(), {**net(7).state_dict(), "0.bias": torch.zeros(9)}, 4, told="it")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x.pt", Executed(), r"cannot be read as weights.\n  RuntimeError: weights_only=True blocked"),
        ("x.pt", [1, 2], "cannot be read as weights"),
        ("x.pt", {"epoch": 3}, "holds no state dict.\n  epoch is a int, not a tensor"),
        ("x.pt", {}, "holds no state dict.\n  it is empty"),
        ("x.safetensors", b"torn", "cannot be read as weights.\n  SafetensorError"),
        ("y/export/backbone.safetensors", b"", "is a folder.\n  help: .*y/export/backbone.safetensors"),
        ("z.pt", b"", "there is no file of weights .*y.\n  help: --initial-checkpoint FILE"),
    ],
)
def test_what_holds_no_weights_is_refused(tmp_path: Path, name: str, value: object, message: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(value) if isinstance(value, bytes) else torch.save(value, path)
    with pytest.raises(MissingError, match=message):
        weights.read(path if name.startswith("x") else tmp_path / "y")


def test_timm_resizes_position_embeddings() -> None:
    source = zoo.create_model("timm/test_vit", 5, input_shape=(3, 64, 64))
    model = zoo.create_model("timm/test_vit", 10, input_shape=(3, 32, 32))
    found = weights.load_state(model, source.state_dict(), 10, told="it")
    assert found.converted and found.drawn == ("head.weight", "head.bias")
    assert torch.equal(model.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)
    assert not torch.equal(model.pos_embed, zoo.create_model("timm/test_vit", 10, input_shape=(3, 32, 32)).pos_embed)
