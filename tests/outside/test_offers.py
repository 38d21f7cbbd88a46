"""Methods of installed packages: really installed ones, and packages that are broken."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from typer.testing import CliRunner

import localize
from localize import methods, recipes
from localize.cli import app
from localize.errors import LocalizeError, UnknownNameError
from localize.methods.dcl import DCL
from localize.outside import CodeError
from localize.testing.nets import IMAGE, NETS

NET = """
from torch import nn

def net(num_classes=10):
    layers = nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, num_classes)
    return nn.Sequential(nn.Flatten(), *layers)

net.input_shape, net.num_classes = (1, 8, 8), 10
"""
EXAMPLE = Path(__file__).parents[2] / "examples" / "outside"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder into which pip has installed the example."""
    folder = tmp_path_factory.mktemp("site")
    source = shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("source") / "outside")
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet")
    subprocess.run([sys.executable, "-m", "pip", "install", *offline, "--target", folder, source], check=True)
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: Path) -> Path:
    """Be in an empty folder, where the example is installed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(installed))
    return tmp_path


def offer(folder: Path, package: str, name: str, value: str) -> None:
    """Install nothing but the metadata of a package that offers a method."""
    info = folder / f"{package.replace('-', '_')}-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 2.0\n")
    (info / "entry_points.txt").write_text(f"[localize.methods]\n{name} = {value}\n")


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_the_example_is_short() -> None:
    assert len((EXAMPLE / "outside.py").read_text().splitlines()) <= 60


@pytest.mark.parametrize("name", ["prototype", "outside:Prototype"])
def test_an_installed_method_converts_trains_and_resumes(here: Path, name: str) -> None:
    code, listed = run("methods", name, "--json")
    assert code == 0
    assert [one["name"] for one in json.loads(listed)[0]["options"]] == ["scale"]

    (here / "net.py").write_text(NET)
    assert run("convert", "net.py:net", "--method", name, "--scale", "5", "-o", "step")[0] == 0
    assert recipes.load(here / "step").method == name
    assert run("audit", "step")[0] == 0

    settings = ("--data", "digits", "--batch-size", "360")
    assert run("train", "net.py:net", "--method", name, *settings, "--epochs", "2", "-o", "whole")[0] == 0
    assert run("train", "net.py:net", "--method", name, *settings, "--epochs", "1", "-o", "part")[0] == 0
    code, told = run("train", "--resume", "part", "--epochs", "2")
    assert code == 0, told
    assert "epoch 2/2" in told
    assert run("eval", "part")[0] == 0


def test_an_installed_method_is_listed_with_its_origin(here: Path) -> None:
    code, told = run("methods")
    (line,) = [line for line in told.splitlines() if line.startswith("prototype ")]
    assert code == 0
    assert line.endswith("localize-outside 0.1")
    assert "--scale F" in run("train", "--method", "prototype", "--help")[1]


def test_an_installed_method_is_transformed_by_name_class_and_object(here: Path) -> None:
    from outside import Prototype

    model, x = NETS["ResNet"](), torch.randn(4, *IMAGE)
    made = [
        localize.transform(model, "prototype", example_input=x, scale=5.0),
        localize.transform(model, "outside:Prototype", example_input=x, scale=5.0),
        localize.transform(model, Prototype, example_input=x, scale=5.0),
        localize.transform(model, Prototype(scale=5.0), example_input=x),
    ]
    assert {local.source for local in made} == {made[0].source}
    assert {local.plan.options["scale"] for local in made} == {5.0}
    localize.audit(made[-1], (x, torch.arange(4))).raise_if_failed()


def test_a_package_that_cannot_be_imported_is_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(here, "worn-out", "old", "worn_out.methods:Old")
    monkeypatch.syspath_prepend(str(here))

    code, told = run("methods")
    assert code == 1
    assert "'old' of package worn-out cannot be loaded" in told
    assert "there is no module 'worn_out'" in told
    assert "backprop" in told, "the others are listed all the same"
    with pytest.raises(CodeError, match="package worn-out"):
        methods.get("old")
    assert "package worn-out" in run("train", "resnet20", "--method", "old")[1]


def test_a_package_cannot_take_the_name_of_a_packaged_method(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(here, "pushy", "dcl", "outside:Prototype")
    monkeypatch.syspath_prepend(str(here))

    code, told = run("methods", "dcl")
    assert code == 1
    assert "'dcl' of package pushy is not used" in told
    assert methods.get("dcl") is methods.METHODS["dcl"]


def test_two_packages_with_one_name_are_both_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("first", "second"):
        offer(here, package, "same", "outside:Prototype")
    monkeypatch.syspath_prepend(str(here))

    with pytest.raises(UnknownNameError, match="offered by first and by second"):
        methods.get("same")
    assert run("methods")[0] == 1


def test_the_name_of_a_packaged_method_is_refused_for_a_class_of_ones_own() -> None:
    class Mine(methods.METHODS["dcl"]):  # type: ignore[misc]
        pass

    with pytest.raises(LocalizeError, match="calls itself 'dcl'"):
        localize.transform(NETS["MLP"](), Mine(), example_input=torch.randn(2, *IMAGE))


@dataclass(frozen=True)
class Louder(DCL):
    name: ClassVar[str] = "louder"
    extra: int = 3


@dataclass(frozen=True)
class Nameless(DCL):
    name: str = "an option, by mistake"


def test_a_packaged_method_can_be_subclassed_from_where_it_is() -> None:
    x = torch.randn(4, *IMAGE)
    local = localize.transform(NETS["ResNet"](), Louder(extra=5), example_input=x)
    assert (local.plan.method, local.plan.options["extra"]) == ("louder", 5)
    localize.audit(local, (x, torch.arange(4)), numeric=False).raise_if_failed()


def test_a_name_that_is_an_option_by_mistake_is_refused() -> None:
    with pytest.raises(LocalizeError, match="an option 'name', which belongs to the class"):
        localize.transform(NETS["MLP"](), Nameless, example_input=torch.randn(2, *IMAGE))
