"""The list of all tables and figures of the papers: complete, and each command is one that works."""

from __future__ import annotations

import re
import shlex
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from localize import recipes, train
from localize.cli import app
from localize.train import TrainConfig
from tests.recipes.numbers import TABLES
from tests.train import image_folders

ROOT = Path(__file__).parents[2]
PAPERS = yaml.safe_load((ROOT / "benchmarks" / "papers.yaml").read_text(encoding="utf-8"))
ITEMS = [pytest.param(one, id=f"{p['paper']}, {one['item']}") for p in PAPERS for one in p["items"]]
FIGURES = {
    "Ma et al. 2024": tuple(map(str, range(1, 7))),
    "Choi et al. 2024": (*map(str, range(1, 8)), "I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X"),
    "anonymous 2023": tuple(map(str, range(1, 11))),
    "Zhang et al. 2025": tuple(map(str, range(1, 7))),
}
RUNS = {"BP": "backprop", "BP1": "backprop", "LOCAL": "dgl", "DGL": "dgl", "DCL": "dcl", "MLAAN": "mlaan"}
TOY = {
    "cifar/resnet110": "cifar/resnet20", "cifar/resnet32": "cifar/resnet20", "cifar/vgg8b": "cifar/conv256_mnist",
    "cifar/conv256": "cifar/conv256_mnist", "cifar/conv512": "cifar/conv256_mnist",
    "cifar/fc_cifar10": "cifar/fc_mnist", "1024": "8", "128": "8", "cifar10": "digits", "160": "1", "300": "1",
}  # fmt: skip
"""What stands at toy size for words of a command."""


def test_every_table_and_figure_is_listed_once() -> None:
    for paper in PAPERS:
        name = paper["paper"]
        wanted = [*(f"Figure {n}" for n in FIGURES[name]), *(f"Table {n}" for n in TABLES[name])]
        assert sorted(one["item"] for one in paper["items"]) == sorted(wanted)
    assert [paper["paper"] for paper in PAPERS] == list(TABLES)


@pytest.mark.parametrize("one", ITEMS)
def test_every_item_has_a_command_that_is_understood_or_a_reason(one: dict[str, Any]) -> None:
    assert ("command" in one) != ("why" in one)
    assert set(one) <= {"item", "shows", "command", "recipes", "note", "why"}
    assert ("RECIPE..." in one.get("command", "")) == ("recipes" in one)
    for pattern in one.get("recipes", ()):
        assert any(fnmatch(name, pattern) for name in recipes.names()), pattern
    words = shlex.split(one.get("command", ""))
    if words[:1] == ["python"]:
        assert (ROOT / words[1]).is_file()
    elif words:
        group = typer.main.get_command(app)
        with group.make_context("localize", words[1:], resilient_parsing=True) as context:
            name, command, rest = group.resolve_command(context, words[1:])
            command.make_context(name, rest, parent=context)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, made = tmp_path_factory.mktemp("runs"), {}
    for name, method in RUNS.items():
        made[name] = root / name
        train.run(
            TrainConfig(
                "timm/test_resnet", recipe=method, input_shape=(3, 16, 16), data="digits", epochs=1, max_steps=2,
                batch_size=16, lr=0.01, seed=int(name == "BP1"), device="cpu", output=str(made[name]),
            )
        )  # fmt: skip
    return made


def toy(one: dict[str, Any], folders: dict[str, Path], here: Path) -> list[str]:
    """Return an item's command at toy size: other nets, data and numbers, and the same command."""
    words: list[str] = []
    for word in shlex.split(one["command"])[1:]:
        if word in folders:
            words.append(str(folders[word]))
        elif word == "FILE":
            (here / word).write_text(str([i // 2 for i in range(10)]))
            words.append(str(here / word))
        elif word == "DIR":
            words.append(str(image_folders.write(here / word, train=12, test=6)))
        elif word == "RECIPE...":
            words += tiny_recipes(one, here)
        elif words[-1:] == ["--seeds"]:
            words.append("1")
        else:
            words.append(TOY.get(word, re.sub(r"d=[569]", "d=3", word).replace("k=12", "k=8").replace("k=48", "k=16")))
    return [*words, "--max-steps", "1"] if "--train" in words else words


def tiny_recipes(one: dict[str, Any], here: Path) -> list[str]:
    """Write a recipe of a tiny net for the first method that each pattern of an item finds; return their files."""
    own = "--data-dir" in one["command"]
    data = "folder" if own else "digits"
    train_on = {"data": data, "epochs": 1, "batch_size": 16, "lr": 0.01, "device": "cpu"}
    files = []
    for number, pattern in enumerate(one["recipes"]):
        recipe = recipes.load(next(name for name in recipes.names() if fnmatch(name, pattern)))
        connected, method = "fc_" in str(recipe.model), recipe.method
        text = {
            "model": "cifar/fc_mnist" if connected else "timm/test_resnet", "method": method, "train": train_on,
            "input_shape": [1, 8, 8] if connected and not own else [3, 16, 16],
        }  # fmt: skip
        files.append(f"{number}-{method}.yaml")
        (here / files[-1]).write_text(yaml.safe_dump(text | ({"num_classes": 3} if own else {})))
    return files


COMMANDS: dict[str, Any] = {}
"""Items by their commands, each command once."""
for _paper in PAPERS:
    for _one in _paper["items"]:
        if _one.get("command", "").startswith("localize"):
            COMMANDS.setdefault(_one["command"], _one)


@pytest.mark.zoo
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_works_at_toy_size(
    command: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "--what" in command:
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    words = toy(COMMANDS[command], folders, tmp_path)

    done = CliRunner().invoke(app, words)

    assert done.exit_code == 0, f"{words}\n{done.output}"
    assert done.output
    wanted = re.findall(r"-o (\S+)", command)
    assert all(any(Path(name).iterdir()) if name == "figures" else Path(name).stat().st_size for name in wanted)
