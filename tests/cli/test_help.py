"""What an error tells a caller to type: Python to a caller from Python, flags to one from the command line."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

import localize
from localize import recipes
from localize.cli import app
from localize.errors import Advice, LocalizeError, Notice
from localize.zoo import create_model

NETS = """
import torch
import torch.nn as nn
import torch.nn.functional as F


class Convolutions(nn.Sequential):
    def __init__(self, norm=True):
        layers = []
        for i in range(4):
            layers.append(nn.Sequential(
                nn.Conv2d(3 if i == 0 else 4, 4, 3, padding=1), nn.BatchNorm2d(4) if norm else nn.Identity(), nn.ReLU()
            ))
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))


class Vectors(nn.Sequential):
    def __init__(self):
        widths = (192, 6, 6, 6)
        layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in zip(widths, widths[1:])]
        super().__init__(nn.Flatten(), *layers, nn.Linear(6, 5))


class Single(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(192, 5))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        for _ in range(3):
            x = self.body(x).relu()
        return self.fc(x.mean((2, 3)))


class Reads(Convolutions):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else 2 * x)


class Decides(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.net = Part(), Convolutions()

    def forward(self, x):
        return self.net(self.first(x))


class Part(nn.Module):
    def forward(self, x):
        return x if x.shape[0] > 4 else 2 * x


class Exits(nn.Module):
    def __init__(self, num_classes=5):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.early, self.late = nn.Linear(4, num_classes), nn.Linear(4, num_classes)

    def forward(self, x):
        x = self.stem(x).relu()
        early = self.early(x.mean((2, 3)))
        return early, self.late(self.body(x).relu().mean((2, 3)))


for net in (Convolutions, Vectors, Single, Tied, Reads, Decides, Exits):
    net.input_shape, net.num_classes = (3, 8, 8), 5
"""


@pytest.fixture(autouse=True)
def _in_a_folder_of_nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(NETS)


@dataclass(frozen=True)
class Wrong:
    """A conversion that is refused.

    Attributes:
        net: Class of the net.
        method: Name of the method.
        options: Arguments of ``transform``.
        python: What the message tells a caller from Python.
        flags: What it tells a caller from the command line.
        typed: Flags that say the same as ``options``; default are those of their names.
    """

    net: str
    method: str
    options: dict[str, Any]
    python: str
    flags: str
    typed: str | None = None

    @property
    def arguments(self) -> list[str]:
        typed = self.typed
        if typed is None:
            typed = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in self.options.items())
        return ["convert", f"nets.py:{self.net}", "--method", self.method, *typed.split()]


WRONG = [
    Wrong("Convolutions", "auglocal", {"d": 2, "d_min": 3}, "d_min=2 or less", "--d-min 2 or less"),
    Wrong("Convolutions", "auglocal", {"d": 9}, "d=3 or less, or tail='isolated'", "--d 3 or less, or --tail isolated"),
    Wrong("Vectors", "auglocal", {"construction": "conv1x1"}, "construction='trunk'", "--construction trunk"),
    Wrong("Convolutions", "dcl", {"cut": 99}, "cut=5", "-K 5, -K max", "-K 99"),
    Wrong("Convolutions", "infopro", {"ixx_1": 0, "ixy_1": 0, "ixx_2": 0, "ixy_2": 0}, "ixx_1=5", "--ixx-1 5"),
    Wrong("Convolutions", "predsim", {"beta": 0.0}, "terms='pred'", "--terms pred"),
    Wrong("Convolutions", "cfl", {"total": "feat", "classifier": False}, "total='D'", "--total D",
          "--total feat --classifier false"),
    Wrong("Convolutions", "mlaan", {"window": 9}, "window=3 or less", "--window 3 or less"),
    Wrong("Convolutions", "mlaan", {"ema": 2.0, "window": 2}, "ema=0.995", "--ema 0.995"),
    Wrong("Convolutions", "mlaan", {"window": 1, "lam": "cascade"}, "lam='independent'", "--lam independent"),
    Wrong("Convolutions", "mlaan", {"window": 1, "w_indep": 0.0}, "w_indep=1", "--w-indep 1"),
    Wrong("Convolutions", "mlaan", {"window": 2, "w_indep": 0.0, "lam": "independent"}, "lam='none'", "--lam none"),
    Wrong("Convolutions", "ll-bpf", {"beta": 0.0}, "beta=0.01", "--beta 0.01"),
    Wrong("Single", "fa", {}, "method backprop", "--method backprop"),
    Wrong("Single", "dcl", {}, "backprop", "backprop"),
    Wrong("Convolutions", "dcl", {"leaf": ("zzzz",)}, "leaf=('0',)", "--leaf 0", "--leaf zzzz"),
    Wrong("Convolutions", "cfl", {"micro_batch": 2, "total": "dict"}, "ghost_norm=True", "--ghost-norm"),
    Wrong("Convolutions", "dcl", {"micro_batch_at": "2@no"}, "micro_batch_at='16@", "--micro-batch-at '16@"),
    Wrong("Convolutions", "dcl", {"recompute_at": "all@no"}, "recompute_at='all@", "--recompute-at 'all@"),
    Wrong("Convolutions", "dcl", {"keep_at": "bn2@no", "micro_batch": 2}, "keep_at='bn2@", "--keep-at 'bn2@"),
    Wrong("Tied", "dcl", {}, "shared=True", "--shared"),
    Wrong("Vectors", "infopro", {}, "cut=localize.CutSpec(at=(...))", "--cut-at"),
    Wrong("Vectors", "dcl", {"k": 5}, "k=... with a divisor of 6", "--k with a divisor of 6"),
    Wrong("Convolutions", "ff", {"length": "removed"}, "length='any'", "--length any"),
    Wrong("Reads", "dcl", {}, "leaf=(PATH,)", "--leaf PATH"),
    Wrong("Decides", "dcl", {}, "leaf=('first',)", "--leaf first"),
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: f"{wrong.net}-{wrong.method}-{'-'.join(wrong.options)}")
def test_help_is_python_in_python_and_flags_on_the_command_line(wrong: Wrong) -> None:
    net = create_model(f"nets.py:{wrong.net}")
    with pytest.raises(LocalizeError) as caught:
        localize.transform(net.train(), wrong.method, example_input=torch.randn(2, 3, 8, 8), **wrong.options)
    message = str(caught.value)
    result = CliRunner().invoke(app, wrong.arguments)

    assert wrong.python in caught.value.help
    assert not re.search(r"(^|\W)--?[a-zA-Z]", message), message
    assert result.exit_code == caught.value.exit_code, result.output
    assert wrong.flags in result.stderr.splitlines()[-1]


def test_flags_are_made_of_what_is_typed_in_python() -> None:
    told = Advice("d_min=4 or less, tail='isolated', shared=True, or classifier=False; beta=0.5.")

    assert told.flags == "--d-min 4 or less, --tail isolated, --shared, or --no-classifier; --beta 0.5."


@pytest.mark.filterwarnings("default")
def test_a_warning_is_python_in_python_and_a_line_with_flags_on_the_command_line() -> None:
    with pytest.warns(Notice, match=r"output='output_0' takes another") as caught:
        localize.transform(create_model("nets.py:Exits"), "dcl", example_input=torch.randn(2, 3, 8, 8))
    assert "--" not in str(caught[0].message)

    result = CliRunner().invoke(app, ["convert", "nets.py:Exits", "--method", "dcl"])

    assert result.exit_code == 0
    (line,) = result.stderr.splitlines()
    assert line.startswith("warning: Exits returns 2 outputs") and "--output-field output_0 takes another" in line


TRAIN = "train --data digits --epochs 1 --max-steps 1 --batch-size 8 --device cpu"


@pytest.mark.parametrize("command", ["convert", TRAIN], ids=["convert", "train"])
@pytest.mark.parametrize(("name", "further"), [("output_0", "output_1"), ("output_1", "output_0")])
def test_an_output_is_chosen_on_the_command_line(command: str, name: str, further: str) -> None:
    asked = f"{command} nets.py:Exits --method dcl --output-field {name} --output out"
    result = CliRunner().invoke(app, asked.split())

    assert result.exit_code == 0, result.output
    assert recipes.load(Path("out/recipe.yaml")).output == name
    if command == TRAIN:
        assert "test_accuracy" in json.loads(Path("out/metrics.jsonl").read_text())
        program = ["export", "out", "-o", "scores.pt2", "--format", "pt2", "--trust-code"]
        assert CliRunner().invoke(app, program).exit_code == 0
        expected = create_model("nets.py:Exits", num_classes=10)
        expected.load_state_dict(safetensors.torch.load_file("out/export/backbone.safetensors"))
        x = torch.randn(2, 3, 8, 8)
        scores = torch.export.load("scores.pt2").module()(x)
        torch.testing.assert_close(scores, expected.eval()(x)[int(name[-1])])
    else:
        (found,) = json.loads(Path("out/plan.json").read_text())["outputs"]
        assert found["name"] == further


def test_an_unknown_output_is_refused_with_those_that_there_are() -> None:
    result = CliRunner().invoke(app, ["convert", "nets.py:Exits", "--method", "dcl", "--output-field", "output_7"])

    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        "error: the model has no output 'output_7'.",
        "  it returns output_0 (3, 5), output_1 (3, 5).",
        "  help: did you mean 'output_1' or 'output_0'?",
    ]
