"""Run folders: never written over, written whole, and exported under the model's own keys."""

from __future__ import annotations

import copy
import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from localize import recipes, zoo
from localize.errors import MissingError, ModelError, OptionError
from localize.recipes import Recipe
from localize.recipes.preprocessing import DataRecord, PartRecord, Preprocessing
from localize.train import ExportError, export, pretrained_cfg, runs, verify

FED = {
    "preprocessing": Preprocessing((3, 32, 32), (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)),
    "dataset": DataRecord("digits", tuple("0123456789"), PartRecord(10, (1,) * 10, "0" * 64)),
}
RECIPE = Recipe(method="backprop", model="cifar/resnet20", num_classes=10, input_shape=(3, 32, 32), **FED)

FORGETFUL = """
import torch
from torch import nn

class Net(nn.Module):
    input_shape, num_classes = (1, 2, 2), 3
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.scale = torch.rand(4)
    def forward(self, x):
        return self.fc(x.flatten(1) * self.scale)
"""


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    folder = tmp_path / "run"
    runs.start(folder, RECIPE)
    runs.write_state(zoo.create_model("cifar/resnet20"), folder / runs.BACKBONE)
    return folder


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 3)
        self.two = nn.Linear(3, 3)
        self.two.weight = self.one.weight


def test_a_named_folder_that_is_absent_or_empty_is_taken(tmp_path: Path) -> None:
    assert runs.named(str(tmp_path)) == tmp_path
    assert runs.named(str(tmp_path / "new")) == tmp_path / "new"
    assert not (tmp_path / "new").exists()


def test_a_named_folder_with_something_in_it_is_refused_unless_forced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(
        MissingError, match=r"exists and is not empty.\n  it contains thesis.tex.\n  help: .*--force"
    ) as caught:
        runs.named(str(tmp_path))
    assert caught.value.exit_code == 4
    assert runs.named(str(tmp_path), force=True) == tmp_path


def test_a_file_is_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(MissingError, match="is a file"):
        runs.named(str(tmp_path / "file"), force=True)


def test_without_a_name_every_run_gets_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = []
    for _ in range(3):
        found.append(runs.numbered("my/net.py:make-dcl-digits-seed0"))
        runs.start(found[-1], RECIPE)
    assert [path.as_posix() for path in found] == [
        "runs/my-net.py-make-dcl-digits-seed0",
        "runs/my-net.py-make-dcl-digits-seed0-2",
        "runs/my-net.py-make-dcl-digits-seed0-3",
    ]


def test_a_name_cannot_leave_the_folder_of_runs() -> None:
    assert runs.numbered("../../etc/net.py:f-dcl").parent == Path("runs")


def test_replacing_a_run_removes_what_it_left_and_nothing_else(finished: Path) -> None:
    runs.append_metrics(finished, {"epoch": 1})
    (finished / runs.SEGMENTS).write_text("epoch\n1\n")
    (finished / "notes.txt").write_text("mine")
    runs.start(finished, RECIPE)
    assert not (finished / runs.METRICS).exists()
    assert not (finished / runs.SEGMENTS).exists()
    assert not (finished / runs.BACKBONE).exists()
    assert (finished / "notes.txt").read_text() == "mine"


def test_the_recipe_of_a_run_reads_back(finished: Path) -> None:
    assert recipes.load(finished) == RECIPE


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(MissingError, match="cannot be written"):
        runs.start(tmp_path / "run", RECIPE)


def test_a_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(MissingError, match="cannot be written"):
        runs.start(tmp_path / "file" / "run", RECIPE)


def test_metrics_are_whole_lines_of_json(tmp_path: Path) -> None:
    runs.append_metrics(tmp_path, {"epoch": 1, "train_loss": 0.5})
    runs.append_metrics(tmp_path, {"epoch": 2, "train_loss": 0.25})
    text = (tmp_path / runs.METRICS).read_text()
    assert text.endswith("\n")
    assert [json.loads(line)["epoch"] for line in text.splitlines()] == [1, 2]


def test_metrics_are_never_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        runs.append_metrics(tmp_path, {"train_loss": float("nan")})
    assert not (tmp_path / runs.METRICS).exists()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="disk"), runs.replacing(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError("disk")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_tied_weights_are_written_under_each_of_their_keys(tmp_path: Path) -> None:
    model = Tied()
    runs.write_state(model, tmp_path / "tied.safetensors")
    state = safetensors.torch.load_file(tmp_path / "tied.safetensors")
    assert sorted(state) == ["one.bias", "one.weight", "two.bias", "two.weight"]
    fresh = Tied()
    fresh.load_state_dict(state, strict=True)
    assert torch.equal(fresh.two.weight, model.one.weight)


class Mixed(nn.Module):
    """Weights of several types, one of them tied, a number, and a tensor without elements."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.half = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Tied()), nn.Linear(3, 5).bfloat16()
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("none", torch.empty(0, 3))


@pytest.mark.parametrize("config", ["", "of the run"])
def test_a_file_written_in_pieces_has_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str
) -> None:
    monkeypatch.setattr(runs, "PIECE", 200)
    model, whole, pieces, read = Mixed(), tmp_path / "whole.safetensors", tmp_path / "pieces.safetensors", []

    def some(keys: Sequence[str]) -> dict[str, torch.Tensor]:
        read.append(list(keys))
        return {key: model.state_dict()[key] for key in keys}

    text = pretrained_cfg.dump(pretrained_cfg.config(RECIPE)) if config else ""
    runs.write_state(model, whole, text)
    runs.write_in_pieces(copy.deepcopy(model).to("meta"), pieces, text, some)

    assert pieces.read_bytes() == whole.read_bytes()
    state = model.state_dict()
    assert len(read) > 3 and sorted(sum(read, [])) == sorted(state)
    assert all(len(keys) == 1 or sum(state[key].nbytes for key in keys) <= 200 for keys in read)


@pytest.mark.skipif(os.name == "nt", reason="files have no modes")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_weights_may_be_read_by_whom_the_umask_allows(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        runs.write_state(Tied(), tmp_path / "x.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode) == mode


def test_the_same_weights_are_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        torch.manual_seed(0)
        runs.write_state(zoo.create_model("cifar/resnet20"), tmp_path / f"{name}.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_state_that_is_not_a_tensor_is_refused_by_its_key(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"calls": 3}

    with pytest.raises(ModelError, match="not a tensor: _extra_state"):
        runs.write_state(Extra(2, 2), tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ending", [".safetensors", ".pt", ".pth"])
def test_an_exported_file_loads_strictly_and_gives_the_same_logits(finished: Path, tmp_path: Path, ending: str) -> None:
    path = export(finished, tmp_path / "new" / f"backbone{ending}")
    state = safetensors.torch.load_file(path) if ending == ".safetensors" else torch.load(path, weights_only=True)
    fresh = zoo.create_model("cifar/resnet20")
    fresh.load_state_dict(state, strict=True)
    torch.manual_seed(0)
    original = zoo.create_model("cifar/resnet20")
    x = torch.randn(2, 3, 32, 32)
    assert list(state) == list(original.state_dict()) or ending == ".safetensors"  # safetensors sorts its keys
    assert torch.equal(fresh.eval()(x), original.eval()(x))


def test_export_does_not_replace_a_file_unless_forced(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.pt"
    path.write_bytes(b"mine")
    with pytest.raises(MissingError, match="mine.pt exists.\n  help: .*--force"):
        export(finished, path)
    assert path.read_bytes() == b"mine"
    export(finished, path, force=True)
    assert torch.load(path, weights_only=True)


def test_export_refuses_an_ending_that_names_no_format(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="does not say which format.*\n.*\n  help: -o .*model.safetensors"):
        export(finished, tmp_path / "model.bin")


def test_export_of_what_is_no_run_says_what_is_missing(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="is not the folder of a run.\n  there is no such folder"):
        export(tmp_path / "nowhere", tmp_path / "x.pt")
    with pytest.raises(MissingError, match=r"is not the folder of a run.\n  it has no recipe.yaml"):
        export(tmp_path, tmp_path / "x.pt")
    (finished / runs.BACKBONE).unlink()
    with pytest.raises(MissingError, match="has not finished.\n  it has no export/backbone.safetensors"):
        export(finished, tmp_path / "x.pt")


def test_weights_of_another_model_are_refused(finished: Path, tmp_path: Path) -> None:
    runs.write_state(zoo.create_model("cifar/resnet32"), finished / runs.BACKBONE)
    with pytest.raises(MissingError, match="does not contain the weights of cifar/resnet20"):
        export(finished, tmp_path / "x.pt")
    assert not (tmp_path / "x.pt").exists()


def test_a_torn_file_of_weights_is_refused(finished: Path, tmp_path: Path) -> None:
    path = finished / runs.BACKBONE
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(MissingError, match="does not contain the weights of cifar/resnet20"):
        export(finished, tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_an_exported_file_is_verified_bit_for_bit(finished: Path, tmp_path: Path, name: str) -> None:
    path = export(finished, tmp_path / name)
    assert "bit for bit" in verify(finished, path)

    changed = runs.restore(finished)
    with torch.no_grad():  # by less than shows in the logits
        weight = changed.fc.weight
        weight[0, 0] = torch.nextafter(weight[0, 0], weight.new_tensor(torch.inf))
    runs.write_state(changed, path)
    with pytest.raises(
        ExportError, match="does not contain the weights of .*\n  1 tensors differ: fc.weight"
    ) as caught:
        verify(finished, path)
    assert caught.value.exit_code == 1
    runs.write_state(nn.Linear(3, 3), path)
    with pytest.raises(ExportError, match="does not load into a fresh cifar/resnet20"):
        verify(finished, path)


def test_a_model_that_computes_with_what_it_does_not_keep_is_found_out(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(FORGETFUL)
    model = f"{tmp_path}/net.py:Net"
    runs.start(tmp_path / "run", Recipe(method="backprop", model=model, **FED))
    runs.write_state(zoo.create_model(model), tmp_path / "run" / runs.BACKBONE)
    path = export(tmp_path / "run", tmp_path / "x.pt")
    with pytest.raises(ExportError, match="the outputs differ by up to .*\n  .* not in its state dict.\n  help: .*"):
        verify(tmp_path / "run", path)
