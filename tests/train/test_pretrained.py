"""Runs that begin with published weights: fetched once, and never asked for again."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from localize.cli import app
from localize.train import checkpoints, runs

SETTINGS = "--method backprop --pretrained --epochs 1 --max-steps 2 --checkpoint-every 1 --batch-size 32 --device cpu"
STILL = "--lr 1e-30 --weight-decay 0"
"""Parameters stay where they begin: those of the published weights are seen in what is exported."""


def localize(*arguments: str) -> str:
    answer = CliRunner().invoke(app, arguments)
    assert answer.exit_code == 0, answer.output
    return answer.stdout


def check(folder: Path, published: Mapping[str, Tensor]) -> None:
    """Take the run up again from its first step, and export it; no weights are to be had by now."""
    first, last = checkpoints.files(folder)
    last.unlink()
    weights = (folder / runs.BACKBONE).read_bytes()
    assert "1 steps done" in localize("train", "--resume", str(folder))
    assert (folder / runs.BACKBONE).read_bytes() == weights
    path = folder.parent / "exported.safetensors"
    assert "verified: a fresh" in localize("export", str(folder), "-o", str(path), "--verify")
    exported = load_file(path)
    parameters = dict(runs.restore(folder).named_parameters())
    kept = [name for name in parameters if name in published and exported[name].shape == published[name].shape]
    assert len(parameters) - len(kept) == 2, "the classifier alone is another"
    for name in kept:
        torch.testing.assert_close(exported[name], published[name], rtol=0, atol=1e-20, msg=name)


@pytest.mark.slow
def test_a_run_of_torchvision_weights_that_need_another_net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What googlenet's weights need is no auxiliary classifier, and images on another scale."""
    published = torchvision.models.googlenet(weights=None, init_weights=False).state_dict()
    cached = tmp_path / "torch" / "hub" / "checkpoints" / "googlenet-1378be20.pth"
    cached.parent.mkdir(parents=True)
    torch.save(published, cached)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "run"
    size = ["--input-shape", "3,16,16", "--output", str(folder)]
    told = localize("train", "tv/googlenet", *SETTINGS.split(), *STILL.split(), *size)
    assert "weights: as published for tv/googlenet" in told
    cached.unlink()
    monkeypatch.setenv("TORCH_HOME", "/nowhere")
    check(folder, published)
    assert runs.restore(folder).transform_input


def test_a_run_of_timm_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = timm.create_model("test_resnet")
    torch.save(source.state_dict(), tmp_path / "published.pth")
    file = {"file": str(tmp_path / "published.pth")}
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, pretrained_cfg_overlay=file))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: backprop\nmodel: timm/test_resnet\nnum_classes: 10\ninput_shape: [3, 32, 32]\n")
    folder = tmp_path / "run"
    settings = SETTINGS.partition("backprop")[2].split()
    localize("train", "--recipe", str(recipe), *settings, *STILL.split(), "--output", str(folder))
    (tmp_path / "published.pth").unlink()
    check(folder, source.state_dict())
