"""The table of costs: which rows there are, what they say, and what is said of them in words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import localize
from localize import build
from localize.cli.app import app
from localize.estimate import compare, rivals
from localize.estimate.compare import Row, verdict
from localize.recipes import Recipe, load
from tests.nets import ALL

MODEL = "cifar/resnet20"


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    local = {"auglocal": load({"method": "auglocal", "model": MODEL}), "ff": load({"method": "ff", "model": MODEL})}
    local["again"] = load({"method": "auglocal", "model": MODEL, "schedule": {"recompute": "all"}})
    local["pff"] = load({"method": "pff", "model": MODEL})
    return {row.method: row for row in compare.compare(local, Recipe("backprop", model=MODEL), 64)}


@pytest.mark.zoo
def test_backprop_and_its_rivals_come_first(rows: dict[str, Row]) -> None:
    names = list(rows)

    assert names[0] == "backprop" and names[1].startswith("checkpoint -K ")
    assert names[2:4] == [f"{names[1]}, optimizer in the backward", "accumulate, 4 parts"]
    assert names[4] == f"{names[1]}, 4 parts"
    assert names[5:] == ["auglocal", "auglocal, losses summed", "ff", "again", "pff"]


@pytest.mark.zoo
def test_rows_say_what_their_steps_need(rows: dict[str, Row]) -> None:
    base, checkpoint, auglocal = rows["backprop"], rows[list(rows)[1]], rows["auglocal"]

    assert base.parameters == 272_474
    assert checkpoint.peak_bytes < base.peak_bytes and base.macs < checkpoint.macs < 1.34 * base.macs
    parts, both = rows["accumulate, 4 parts"], rows[list(rows)[4]]
    assert parts.macs == base.macs and parts.peak_bytes < base.peak_bytes
    assert both.combined and both.peak_bytes < min(parts.peak_bytes, checkpoint.peak_bytes)
    assert rows[list(rows)[2]].peak_bytes <= checkpoint.peak_bytes
    assert checkpoint.keeps_gradients and not parts.keeps_gradients and parts.changes_statistics
    assert auglocal.peak_bytes < 0.6 * base.peak_bytes
    assert rows["auglocal, losses summed"].peak_bytes > base.peak_bytes
    assert rows["auglocal, losses summed"].macs == auglocal.macs
    assert rows["again"].peak_bytes < auglocal.peak_bytes and rows["again"].macs > auglocal.macs
    assert all(row.seconds is None for row in rows.values())


@pytest.mark.zoo
def test_checkpointing_is_the_best_of_its_schedules(rows: dict[str, Row]) -> None:
    model = Recipe("backprop", model=MODEL)
    tried = rivals.schedules(model, rivals.recorded(model))
    found = [rivals.cost(entry, 64) for entry in tried]

    assert len(found) > 2
    assert rows[list(rows)[1]].peak_bytes == min(row.peak_bytes or 0 for row in found)


@pytest.mark.zoo
def test_a_method_that_does_not_take_the_model_says_why(rows: dict[str, Row]) -> None:
    assert rows["pff"].peak_bytes is None
    assert "fully connected" in rows["pff"].refused


@pytest.mark.parametrize(
    ("model", "method", "batch", "told"),
    [
        pytest.param("tv/resnet50", "mlaan", 2, "heads: ", marks=pytest.mark.zoo),
        ("cifar/fc_cifar10", "dcl", 4, "the optimizer's states for the model"),
        ("cifar/resnet20", "dcl", 64, "values that one segment computes"),
        pytest.param("cifar/resnet20", "mlaan", 2, "heads: ", marks=pytest.mark.zoo),
    ],
)
def test_the_reason_for_more_memory_is_what_is_largest(model: str, method: str, batch: int, told: str) -> None:
    entry = rivals.Entry(method, load({"method": method, "model": model}))

    assert rivals.cost(entry, batch).remark.startswith(told)


def row(method: str, peak: int, time: float, remark: str = "heads", **more: bool) -> Row:
    return Row(method, 1, 100, peak, peak, remark=remark, predicted_seconds=time, **more)


RIVALS = [
    row("backprop", 100, 100, keeps_gradients=True),
    row("checkpoint -K 5", 30, 130, keeps_gradients=True),
    row("accumulate, 8 parts", 20, 100, changes_statistics=True),
    row("checkpoint -K 5, 8 parts", 8, 130, changes_statistics=True, combined=True),
]


def test_the_better_choice_is_named() -> None:
    local = [
        row("large", 120, 200, "losses run several segments", local=True),
        row("small", 10, 90, local=True),
    ]
    told = "\n".join(verdict([*RIVALS, *local]))

    assert "same gradients as backprop: checkpoint -K 5." in told
    assert "other BatchNorm statistics, and so other gradients: accumulate, 8 parts, checkpoint" in told
    assert (
        "leanest with one way to save memory: accumulate, 8 parts (20.0% of backprop's memory, 1.00 times its time)"
        in told
    )
    assert "leanest with two ways: checkpoint -K 5, 8 parts (8.0%" in told
    assert "less memory than accumulate, 8 parts: small." in told
    assert "in no more predicted time: small." in told
    assert "large needs more than accumulate, 8 parts: losses run several segments." in told


def test_where_local_learning_is_the_wrong_tool_it_is_said() -> None:
    told = "\n".join(verdict([*RIVALS, row("middle", 40, 200, local=True)]))

    assert "local learning is the wrong tool" in told
    assert "middle needs more than accumulate, 8 parts: heads." in told


def test_without_a_rival_nothing_is_said() -> None:
    assert verdict([RIVALS[0], row("dcl", 10, 10, local=True)]) == []


def test_accumulation_takes_as_many_parts_as_leave_batch_norm_sixteen_images() -> None:
    assert [rivals.most_parts(n, norms=True) for n in (16, 64, 100, 4096)] == [1, 4, 6, 64]
    assert [rivals.most_parts(n, norms=False) for n in (1, 16, 64)] == [1, 16, 64]


def test_no_part_is_smaller_than_what_is_said(tmp_path: Path) -> None:
    file = tmp_path / "nets.py"
    file.write_text(NETS)
    found = {}
    for net, batch in (("with_norm", 20), ("without", 100), ("without", 1)):
        rows = rivals.rivals(Recipe("backprop", model=f"{file}:{net}"), batch, lambda name: None)
        found[net, batch] = [(entry.recipe, row) for entry, row in rows if row.refused or "parts" in row.method]

    (_, said), (_, single) = found["with_norm", 20][0], found["without", 1][0]
    assert said.refused == "with BatchNorm a part has at least 16 images, and the batch has 20"
    assert single.refused == "one image is not taken in parts"
    (accumulation, row), (combined, both) = found["without", 100]
    assert accumulation.options == {"parts": 64} and row.method == "accumulate, 64 parts"
    assert combined.schedule["micro_batch"] == 2 and both.method.endswith(", 50 parts")


NETS = """
from torch import nn

def net(norm):
    layers = [layer for i in (3, 4, 4) for layer in (nn.Conv2d(i, 4, 3, padding=1), norm(4), nn.ReLU())]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))

def with_norm(num_classes=5):
    return net(nn.BatchNorm2d)

def without(num_classes=5):
    return net(lambda channels: nn.GroupNorm(2, channels))

with_norm.input_shape = without.input_shape = (3, 8, 8)
with_norm.num_classes = without.num_classes = 5
"""


def test_steps_are_timed_on_as_many_images_as_are_asked_for() -> None:
    local = localize.transform(ALL["ResNet"](), "accumulate", parts=4, example_input=torch.empty(2, 3, 8, 8))

    assert [len(build.random_batch(local, *size)[1]) for size in ((), (4,), (5,))] == [8, 4, 5]


@pytest.mark.zoo
def test_the_command_prints_a_table_or_one_object() -> None:
    arguments = ["compare", "cifar/vgg8b", "--methods", "dcl,auglocal:d=3", "--batch-size", "32"]

    table = CliRunner().invoke(app, arguments)
    assert table.exit_code == 0, table.output
    assert "auglocal:d=3" in table.output and "checkpoint -K" in table.output

    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert [one["method"] for one in found["rows"]][-2:] == ["dcl, losses summed", "auglocal:d=3"]
    assert {"method", "parameters", "macs", "saved_bytes", "peak_bytes", "seconds"} <= set(found["rows"][0])


def test_compiling_is_for_steps_that_are_timed() -> None:
    found = CliRunner().invoke(app, ["compare", "cifar/fc_cifar10", "--compile"])

    assert found.exit_code == 2
    assert "--compile needs --measure" in found.stderr


@pytest.mark.zoo
def test_the_command_times_interleaved_steps() -> None:
    found = CliRunner().invoke(
        app, ["compare", "cifar/fc_cifar10", "--methods", "dcl", "-b", "8", "--measure", "--json"]
    )

    rows = json.loads(found.stdout)["rows"]
    runs = [one for one in rows if not one["refused"] and "optimizer in the backward" not in one["method"]]
    assert all(one["seconds"] > 0 for one in runs)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ("nothing", "there is no method 'nothing'"),
        ("auglocal:e=2", "has no option --e"),
        ("dcl:k=x", "cannot be 'x'"),
        (",", "help: --methods auglocal,dcl"),
        ("", "--methods cannot be ''"),
    ],
)
def test_wrong_methods_are_refused(methods: str, message: str) -> None:
    found = CliRunner().invoke(app, ["compare", "cifar/resnet20", "--methods", methods])

    assert found.exit_code == 2
    assert message in found.output


def test_steps_are_compared_under_the_optimizer_and_the_autocast_that_were_asked_for() -> None:
    import torch

    from localize import build
    from localize.estimate import memory

    words = ["compare", "cifar/fc_cifar10", "--methods", "dcl", "-b", "64"]

    plain = CliRunner().invoke(app, [*words, "--json"])
    found = CliRunner().invoke(app, [*words, "--opt", "adamw", "--amp", "--json"])
    shown = CliRunner().invoke(app, [*words, "--opt", "adamw", "--amp"])

    rows, others = (
        {row["method"]: row["peak_bytes"] for row in json.loads(one.stdout)["rows"]} for one in (found, plain)
    )
    local = build.build(Recipe("dcl", model="cifar/fc_cifar10"), data=False)
    assert rows["dcl"] == memory.predict(local, 64, optimizer=torch.optim.AdamW, autocast=torch.bfloat16).peak
    assert others["dcl"] == memory.predict(local, 64).peak < rows["dcl"], "AdamW keeps two values for each parameter"
    assert all(rows[name] > others[name] for name in ("backprop", "accumulate, 64 parts"))
    assert "all steps with adamw, under autocast to bfloat16" in shown.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--opt", "adamm"], "there is no optimizer 'adamm'."),
        (["--amp-dtype", "float16"], "--amp-dtype is the type of --amp"),
        (["--amp", "--amp-dtype", "int8"], "--amp-dtype cannot be 'int8'"),
    ],
)
def test_conditions_that_cannot_be_are_refused(words: list[str], told: str) -> None:
    answer = CliRunner().invoke(app, ["compare", "cifar/fc_cifar10", "--methods", "dcl", *words])
    assert answer.exit_code == 2
    assert told in answer.stderr
