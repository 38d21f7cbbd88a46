"""Whether models convert: a sample of all kinds, a few of the day, and the runner that checks them one by one."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from packaging.version import Version
from torch import nn
from typer.testing import CliRunner, Result

import localize
from localize import check, zoo
from localize.check import one, rows
from localize.check.report import markdown
from localize.cli import app
from localize.cutting.cuts import candidates
from localize.errors import OptionError
from localize.graph.trace import trace
from tests import daily
from tests.zoo.families import FAMILIES, LISTED

HERE = {**os.environ, "PYTHONPATH": str(Path(localize.__file__).parents[1])}

SAMPLE = (
    "cifar/mixer",  # tokens
    "cifar/vgg8b",
    "tv/googlenet",  # other outputs, other operations in eval mode
    "tv/mobilenet_v3_small",  # squeeze and excitation, in-place activations
    "tv/regnet_y_400mf",  # cannot be built on the meta device
    "tv/shufflenet_v2_x0_5",  # split and shuffled channels
    "tv/squeezenet1_0",  # a convolution as its classifier
    "timm/convnext_zepto_rms",
    "timm/crossvit_tiny_240",  # two streams
    "timm/efficientformer_l1",  # a module that is taken whole
    "timm/ese_vovnet19b_slim_dw",  # concatenated layers
    "timm/mixer_s32_224",
    "timm/pvt_v2_b0",  # tokens become maps and tokens again
    "timm/resnest14d",  # split attention
    "timm/resnet10t",
    "timm/selecsls42",  # long skips
    "timm/starnet_s050",
    "timm/swin_tiny_patch4_window7_224",  # channels last, shifted windows
    "timm/test_byobnet",
    "timm/test_efficientnet",
    "timm/test_nfnet",  # no norm, standardised weights
    "timm/test_vit",
    "timm/test_vit3",  # pooled by attention
    "timm/vit_srelpos_small_patch16_224",  # parameters that all blocks share
)

NETS = """
import os, time
from torch import nn

def net():
    hidden = [nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(12, 10))

def crashing():
    print("about to end", flush=True)
    os._exit(3)

def sleeping():
    time.sleep(600)

for factory in (net, crashing, sleeping):
    factory.input_shape = (3, 2, 2)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(row: dict[str, Any]) -> list[str]:
    return [f"{f['stage']}: {f['error']}: {f['message']} {f.get('at', '')}" for f in row["failures"]]


# ------------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("name", daily.in_turn(SAMPLE, 3))
def test_a_model_of_every_kind_converts(name: str) -> None:
    row = one.static(name)
    assert row["ok"], told(row)


def of_the_day() -> list[str]:
    """Return three of timm's families, drawn anew every day, by their smallest model."""
    return random.Random(date.today().isoformat()).sample(sorted(FAMILIES.values()), 3)


@pytest.mark.parametrize("number", range(3))
def test_models_that_are_drawn_every_day_convert(number: int) -> None:
    name = of_the_day()[number]
    row = one.static(f"timm/{name}")
    assert row["ok"], f"{name}, of those of {date.today()}, {', '.join(of_the_day())}: {told(row)}"


def test_the_families_are_those_of_timm() -> None:
    known = {name: zoo.family(f"timm/{name}") for name in FAMILIES.values()}
    assert known == {name: family for family, name in FAMILIES.items()}
    assert FAMILIES == LISTED or Version(timm.__version__) < Version("1.0.31")


@pytest.mark.parametrize("name", ["cifar/conv256_mnist", pytest.param("timm/test_vit", marks=pytest.mark.slow)])
def test_a_model_trains_for_a_step(name: str) -> None:
    row = one.run(name)
    assert row["ok"], told(row)
    assert row["checks"] > 20


def test_a_row_holds_what_the_stages_found() -> None:
    row = one.static("cifar/resnet20")

    model = zoo.create_model("cifar/resnet20")
    cuts = candidates(trace(model, torch.empty(2, 3, 32, 32)))
    assert row["parameters"] == sum(p.numel() for p in model.parameters())
    assert (row["cuts"], row["live"], row["classes"]) == (len(cuts), 1, 10)
    assert row["leaves"] == []
    piece = row["largest"]["parameters"]
    before = {"input": 0, **{cut.name: cut.parameters_before for cut in cuts}, "output": row["parameters"]}
    assert piece["share"] == round((before[piece["to"]] - before[piece["from"]]) / row["parameters"], 4)
    assert row["largest"]["layer"] == {"name": "layer3.0.conv2", "share": round(36864 / row["parameters"], 4)}
    assert set(row["methods"]) == {"auglocal", "dcl"}
    assert row["methods"]["dcl"]["segments"] == 10
    assert {"build", "trace", "cuts", "dcl: split", "dcl: run"} <= set(row["seconds"])
    json.dumps(row)


def test_a_module_that_is_taken_whole_is_told_with_its_share(folder: Path) -> None:
    (folder / "own.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Same(torch.autograd.Function):\n"
        "    forward = staticmethod(lambda ctx, x: x.clone())\n"
        "    backward = staticmethod(lambda ctx, g: g)\n"
        "class Whole(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.inner = nn.Linear(4, 4)\n"
        "    def forward(self, x):\n"
        "        return Same.apply(self.inner(x))\n"
        "def net():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), Whole(), nn.ReLU(), nn.Linear(4, 4))\n"
        "net.input_shape = (1, 2, 2)\n"
    )
    assert one.static("own.py:net")["leaves"] == [{"name": "3", "kind": "Whole", "share": 0.3333}]


def test_a_small_image_has_half_the_side_in_multiples_of_32() -> None:
    assert one._half((3, 224, 224)) == (3, 96, 96)
    assert one._half((3, 16, 112, 112)) == (3, 16, 32, 32)
    assert one._half((1, 28, 28)) is None
    assert one._takes("timm/test_resnet", (3, 64, 64))
    assert not one._takes("tv/inception_v3", (3, 64, 64))


# --------------------------------------------------------------------------------------------- what a check has to see


def test_scores_of_another_shape_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    assemble = one.assemble

    def wrong(plan: Any) -> Any:
        local = assemble(plan)
        ending = "return losses, {name: values[1:] for name, values in scores.items()}"
        return local.with_source(local.source.replace("return losses, scores", ending))

    monkeypatch.setattr(one, "assemble", wrong)
    row = one.static("cifar/resnet20")
    assert {failure["error"] for failure in row["failures"]} == {"Wrong"}
    assert "(5, 10), not (6, 10)" in row["failures"][0]["message"]
    assert not row["ok"]


def test_an_error_of_our_own_is_told_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def place(*args: Any, **options: Any) -> None:
        return {}["missing"]

    monkeypatch.setattr(one, "place", place)
    row = one.static("cifar/fc_mnist")
    assert [failure["stage"] for failure in row["failures"]] == ["auglocal: place", "dcl: place"]
    assert row["failures"][0]["error"] == "KeyError"
    assert re.match(r"one\.py:\d+ in _convert, test_check\.py:\d+ in place", row["failures"][0]["at"])


def test_a_model_that_cannot_be_recorded_stops_there(folder: Path) -> None:
    (folder / "deciding.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Linear):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x if x.sum() > 0 else -x)\n"
        "def net():\n"
        "    return Net(4, 2)\n"
        "net.input_shape = (1, 1, 4)\n"
    )
    row = one.static("deciding.py:net")
    assert [(f["stage"], f["error"]) for f in row["failures"]] == [("trace", "TraceError")]
    assert "at" not in row["failures"][0]
    assert row["parameters"] == 10


@pytest.mark.parametrize(
    ("change", "stage", "message"),
    [
        (lambda local: _moved(local), "compare", "logits in eval mode have changed"),
        (lambda local: _keyed(local), "compare", "keys of the model have changed"),
        (lambda local: _leaking(local), "audit", "measured.reach"),
        (lambda local: _steep(local), "step", "loss_0 is inf"),
    ],
)
def test_what_is_wrong_with_a_run_is_seen(monkeypatch: pytest.MonkeyPatch, change: Any, stage: str, message: str):
    transform = one.transform
    monkeypatch.setattr(one, "transform", lambda *args, **options: change(transform(*args, **options)))
    row = one.run("cifar/fc_mnist")
    assert [failure["stage"] for failure in row["failures"]] == [stage]
    assert message in row["failures"][0]["message"]


def _moved(local: nn.Module) -> nn.Module:
    with torch.no_grad():
        next(local.trunk.parameters()).mul_(2)
    return local


def _keyed(local: nn.Module) -> nn.Module:
    local.trunk.register_buffer("further", torch.zeros(1))
    return local


def _leaking(local: Any) -> Any:
    *_, last = local.trunk.parameters()
    local.heads.get_submodule("head_0").register_forward_hook(lambda head, inputs, output: output + last.sum())
    return local


def _steep(local: Any) -> Any:
    return local.with_source(local.source.replace("loss_0.backward()", "loss_0 = loss_0 / 0\n    loss_0.backward()"))


def test_a_large_model_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one, "LARGEST", 1000)
    row = one.run("cifar/fc_mnist")
    assert row["ok"]
    assert row["left_out"] == "more than 1,000 parameters"
    assert list(row["seconds"]) == ["build"]


# --------------------------------------------------------------------------------------------------------- the runner


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(app, ["models", "--check", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.slow
def test_what_is_in_the_file_is_not_checked_again(folder: Path) -> None:
    first = run("nets.py:net", "--run", "--write", "page.md")
    kept = (folder / "models.jsonl").read_text()
    again = run("nets.py:net", "--run")

    assert first.exit_code == again.exit_code == 0, first.output
    assert "1 of 1 models convert" in first.stdout
    assert "1 of 1 models train" in first.stdout
    assert (folder / "models.jsonl").read_text() == kept
    found = [json.loads(line) for line in kept.splitlines()]
    assert sorted((row["check"], row["name"], row["family"]) for row in found) == [
        ("run", "nets.py:net", "nets"),
        ("static", "nets.py:net", "nets"),
    ]
    assert set(found[0]["versions"]) == {"localize", "torch", "torchvision", "timm"}
    assert (folder / "page.md").read_text() == markdown(found)


def test_a_row_of_other_versions_does_not_count(folder: Path) -> None:
    run("nets.py:net")
    file = folder / "models.jsonl"
    file.write_text(file.read_text().replace('"timm": "', '"timm": "0.'))
    assert run("nets.py:net").exit_code == 0
    assert len(rows.read(file)) == 2


def test_a_line_that_was_not_written_whole_is_dropped(folder: Path) -> None:
    run("nets.py:net")
    file = folder / "models.jsonl"
    whole = file.read_text()
    file.write_text(whole + '{"check": "static", "na')
    assert len(rows.read(file)) == 1
    assert run("nets.py:net", "--run").exit_code == 0
    assert file.read_text().startswith(whole + '{"check": "run"')


def test_a_file_of_something_else_is_refused_and_left_alone(folder: Path) -> None:
    file = folder / "models.jsonl"
    file.write_text('{"epoch": 1}\n')
    with pytest.raises(OptionError, match="line 1 of models.jsonl is not a row"):
        check.known([("static", "nets.py:net")], Path("models.jsonl"))
    assert run("nets.py:net").exit_code == 2
    assert file.read_text() == '{"epoch": 1}\n'


def test_a_crash_is_a_row_and_is_retried_when_asked(folder: Path) -> None:
    result = run("nets.py:crashing")
    (row,) = rows.read(folder / "models.jsonl")
    message = "the process ended with exit code 3: about to end"
    assert result.exit_code == 1
    assert f"nets.py:crashing: build: Crash: {message}" in result.stdout
    assert row["failures"] == [{"stage": "build", "error": "Crash", "message": message}]

    assert run("nets.py:crashing").exit_code == 1
    assert len(rows.read(folder / "models.jsonl")) == 1
    (folder / "nets.py").write_text(NETS.replace("os._exit(3)", "return net()"))
    assert run("nets.py:crashing", "--retry").exit_code == 0
    assert len(rows.read(folder / "models.jsonl")) == 2


@pytest.mark.parametrize(
    ("limit", "error", "message"),
    [
        (("--timeout", "1"), "Timeout", "not done after 1 s"),
        (("--memory", "0.01"), "Memory", "more than 0.01"),
    ],
)
def test_what_takes_too_much_is_a_row(folder: Path, limit: tuple[str, str], error: str, message: str) -> None:
    result = run("nets.py:sleeping", *limit)
    (row,) = rows.read(folder / "models.jsonl")
    assert result.exit_code == 1
    assert row["failures"][0]["error"] == error
    assert row["failures"][0]["stage"] in ("start", "build")  # memory is looked at before the process tells its stage
    assert message in row["failures"][0]["message"]


def test_json_is_alone_on_stdout(folder: Path) -> None:
    result = run("nets.py:net", "cifar/fc_m*", "nets.py:net", "--json")
    assert [row["name"] for row in json.loads(result.stdout)] == ["nets.py:net", "cifar/fc_mnist"]
    assert "nets.py:net" in result.stderr


def test_how_to_check_needs_a_check() -> None:
    result = CliRunner().invoke(app, ["models", "cifar/*", "--run"])
    assert result.exit_code == 2
    assert "help: --check" in result.stderr


@pytest.mark.slow
def test_an_interrupted_check_keeps_its_rows(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "localize", "models", "--check", "cifar/*", "--jobs", "1"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=HERE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr.readline().startswith("ok")
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stdout == ""
    assert stderr.rstrip().endswith("interrupted")
    assert "Traceback" not in stderr
    found = rows.read(tmp_path / "models.jsonl")
    assert 1 <= len(found) < len(zoo.list_models("cifar/*"))
    assert all(row["ok"] for row in found)


# ----------------------------------------------------------------------------------------------------------- the page


def a_row(name: str, family: str, check: str = "static", **found: Any) -> dict[str, Any]:
    return {
        "check": check,
        "name": name,
        "library": name.partition("/")[0],
        "family": family,
        "versions": {"localize": "0.1.0", "timm": "1.0.31"},
        "ok": "failures" not in found,
        "failures": [],
        **found,
    }


def cut(share: float, layer: float = 0.1, **found: Any) -> dict[str, Any]:
    largest = {
        "macs": {"share": share, "from": "input", "to": "a"},
        "parameters": {"share": share / 2, "from": "input", "to": "a"},
        "layer": {"name": "fc", "share": layer},
    }
    segments = {"auglocal": {"segments": 3, "shared": False}, "dcl": {"segments": 4, "shared": False}}
    return {"cuts": 5, "live": 1, "largest": largest, "methods": segments, **found}


PAGE = [
    a_row("tv/big", "vgg", **cut(0.2, layer=0.72)),
    a_row("timm/a", "net", **cut(0.6)),
    a_row(
        "timm/b",
        "net",
        **cut(0.3, cuts=9, live=2, notes=["two streams"], eval_differs=True),
        leaves=[{"kind": "Attention", "share": 0.25}],
    ),
    a_row(
        "timm/c", "net", failures=[{"stage": "trace", "error": "KeyError", "message": "no timm/c|d", "at": "x.py:3"}]
    ),
    a_row("timm/a", "net", "run"),
    a_row("timm/b", "net", "run", failures=[{"stage": "step", "error": "Wrong", "message": "loss_0 is nan"}]),
    a_row("tv/big", "vgg", "run", left_out="more than 60,000,000 parameters"),
]


def test_a_page_begins_with_its_numbers() -> None:
    page = markdown(PAGE)
    lines = page.splitlines()
    assert lines[2] == ("**3 of 4 models convert.** **1 of 2 that were run train for a step and pass its audit.**")
    assert "| torchvision | 1 | 1 | 0 | 0 |" in lines
    assert "| timm | 3 | 2 | 2 | 1 |" in lines
    assert "with localize 0.1.0, timm 1.0.31." in page
    assert "in 2 of 3 models, and at most a quarter in 1." in page


def test_a_page_sums_up_families_and_tells_every_failure() -> None:
    lines = markdown(PAGE).splitlines()
    assert (
        "| net | 2 of 3 | 5–9 | 1–2 | 3 | 4 | 30–60 | 15–30 | `Attention` taken whole, up to 25 % of the parameters "
        "(1); other operations in eval mode (1) |" in lines
    )
    assert "| `timm/c` | static | trace | KeyError: no MODEL\\|d (x.py:3) |" in lines
    assert "| `timm/b` | run | step | Wrong: loss_0 is nan |" in lines
    assert "- net (1 model, up to 2 tensors). `timm/b`: two streams" in lines
    assert "- vgg: `fc`, 72 % (tv/big)" in lines


def test_a_page_does_not_depend_on_the_order_of_rows() -> None:
    assert markdown(PAGE[::-1]) == markdown(PAGE)
