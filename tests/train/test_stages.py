"""Blocks are frozen after an epoch, and segments trained one at a time, as in a loop written by hand; bit for bit."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import localize
from localize.errors import LocalizeError, MethodError, OptionError, UnknownNameError
from localize.runtime.model import LocalModel
from localize.train import TrainConfig, checkpoints, loop, resume, run, runs
from localize.train.schedules import learning_rate

WIDTHS = (64, 16, 12, 8)


class Net(nn.Sequential):
    """Three layers with a BatchNorm each, and a classifier."""

    input_shape = (1, 8, 8)

    def __init__(self, num_classes: int = 10) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in zip(WIDTHS, WIDTHS[1:], strict=False):
            layers += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU()]
        super().__init__(*layers, nn.Linear(WIDTHS[-1], num_classes))


SEGMENTS = (slice(0, 4), slice(4, 7), slice(7, 10), slice(10, 11))
SETTINGS: dict[str, Any] = {"batch_size": 256, "lr": 0.05, "weight_decay": 0.1, "momentum": 0.9, "opt": "momentum"}
SHARED = SETTINGS | {"recipe": "dcl", "epochs": 3, "freeze_after": ("segment_0:1", "segment_2:2")}
"""Several losses train one dictionary, each with its own moments."""
HEADS = SETTINGS | {"recipe": "ll-pred", "epochs": 3, "freeze_after": ("segment_0:1", "head_1:2")}
STAGES = SETTINGS | {"recipe": "dcl", "epochs": 8, "stage_epochs": 2, "warmup_epochs": 1}
EVERYTHING = STAGES | {"opt": "adamw", "amp": True, "model_ema": True, "clip_grad": 0.5, "lr": 0.005}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def config(output: str, settings: dict[str, Any]) -> TrainConfig:
    return TrainConfig(f"{__file__}:Net", output=output, device="cpu", **settings)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / runs.METRICS).read_text().splitlines()]


def without_speed(folder: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines(folder)]


def states(folder: Path) -> list[dict[str, Tensor]]:
    return [checkpoints.read(path)["model"] for path in checkpoints.files(folder)]


def by_hand(settings: dict[str, Any], trained: Callable[[int], Sequence[str]]) -> dict[str, Tensor]:
    """Train a fresh model in a loop without any of the generated text; return its state and that of its heads.

    ``trained`` says which segments and heads an epoch trains.
    """
    training = loop.prepare(config("by-hand", settings))
    net, heads = training.local.trunk.train(), training.local.heads.train()
    segments = [nn.Sequential(*list(net)[part]) for part in SEGMENTS]
    blocks = {f"segment_{k}": list(segment.parameters()) for k, segment in enumerate(segments)}
    blocks |= {f"head_{k}": list(heads[f"head_{k}"].parameters()) for k in range(3)}
    dictionary = dict(heads).get("dictionary")
    optimizers = []
    for k in range(4):
        groups = [blocks[f"segment_{k}"], blocks.get(f"head_{k}", [])]
        groups += [] if dictionary is None or k == 3 else [list(dictionary.parameters())]
        optimizers.append(torch.optim.SGD(sum(groups, []), lr=0.05, momentum=0.9, weight_decay=0.1))
    for epoch in range(1, training.config.epochs + 1):
        now = set(trained(epoch))
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate(training.config, epoch)
        for name, parameters in blocks.items():
            for parameter in parameters:
                parameter.requires_grad_(name in now)
                parameter.grad = None
        last = max(k for k in range(4) if f"segment_{k}" in now)
        for x, y in training.batches:
            h = x
            for k, segment in enumerate(segments[: last + 1]):
                h = segment(h.detach())
                if f"segment_{k}" in now:
                    read = (h,) if dictionary is None else (h, dictionary())
                    optimizers[k].zero_grad()
                    F.cross_entropy(h if k == 3 else heads[f"head_{k}"](*read), y).backward()
                    optimizers[k].step()
    found = {"trunk": net.state_dict(), "heads": heads.state_dict()}
    return {f"{part}.{name}": value for part, state in found.items() for name, value in state.items()}


def all_but(*frozen: tuple[str, int]) -> Callable[[int], list[str]]:
    names = [*(f"segment_{k}" for k in range(4)), *(f"head_{k}" for k in range(3))]
    return lambda epoch: [name for name in names if not any(name == one and epoch > last for one, last in frozen)]


def one_at_a_time(epoch: int) -> list[str]:
    stage = (epoch - 1) // 2
    return [f"segment_{stage}", f"head_{stage}"]


@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        (SHARED, all_but(("segment_0", 1), ("head_0", 1), ("segment_2", 2), ("head_2", 2))),
        (HEADS, all_but(("segment_0", 1), ("head_0", 1), ("head_1", 2))),
        (STAGES, one_at_a_time),
    ],
    ids=["shared", "heads", "stages"],
)
def test_a_run_trains_to_the_weights_of_a_loop_by_hand(
    settings: dict[str, Any], trained: Callable[[int], Sequence[str]]
) -> None:
    folder = run(config("run", settings)).output

    for name, value in by_hand(settings, trained).items():
        assert torch.equal(states(folder)[-1][name], value), name


def test_what_is_frozen_does_not_move_and_its_norms_go_on_counting(capsys: pytest.CaptureFixture[str]) -> None:
    settings = HEADS | {"freeze_after": ("segment_0:1",), "epochs": 2}
    folder = run(config("run", settings)).output

    first, last = states(folder)
    same = {name for name, value in first.items() if torch.equal(value, last[name])}
    assert same == {"trunk.1.weight", "trunk.1.bias", "trunk.2.weight", "trunk.2.bias", *_head(first, 0)}
    assert last["trunk.2.num_batches_tracked"] == 2 * first["trunk.2.num_batches_tracked"] > 0
    told = "from epoch 2 on: segment_1, segment_2, segment_3, head_1, head_2 trained; segment_0 frozen"
    assert told in capsys.readouterr().out
    losses = [[one["train_loss"] is None for one in line["segments"]] for line in lines(folder)]
    assert losses == [[False] * 4, [True, False, False, False]]
    assert all(one["test_accuracy"] is not None for line in lines(folder) for one in line["segments"])
    assert ",loss_0,0,0,,," in (folder / runs.SEGMENTS).read_text()


def _head(state: dict[str, Tensor], k: int) -> set[str]:
    return {name for name in state if name.startswith(f"heads.head_{k}.")}


def test_segments_that_come_later_are_not_run_and_one_that_was_trained_stays() -> None:
    stages = STAGES | {"epochs": 4, "stage_epochs": 1, "warmup_epochs": 0, "max_steps": 15}
    folder = run(config("run", stages)).output

    second, third = states(folder)  # the last two checkpoints, after the stages of segments 1 and 2
    assert [int(second[f"trunk.{k}.num_batches_tracked"]) for k in (2, 5, 8)] == [10, 5, 0]
    assert [int(third[f"trunk.{k}.num_batches_tracked"]) for k in (2, 5, 8)] == [15, 10, 5]
    moved = {name for name, value in second.items() if not torch.equal(value, third[name])}
    weights = {name for name in moved if name.endswith((".weight", ".bias"))}
    assert weights == {
        "trunk.7.weight", "trunk.7.bias", "trunk.8.weight", "trunk.8.bias", "heads.dictionary.weight",
    }  # fmt: skip


def test_each_stage_goes_through_the_learning_rates() -> None:
    asked = config("run", STAGES)
    one, two = learning_rate(asked, 1), learning_rate(asked, 2)
    assert [learning_rate(asked, epoch) for epoch in range(1, 9)] == [one, two] * 4
    assert one == 1e-5 < two


@pytest.mark.parametrize("settings", [SHARED, EVERYTHING], ids=["shared", "everything"])
@pytest.mark.parametrize("step", [8, 15])
def test_a_run_that_is_interrupted_goes_on_bit_for_bit(
    settings: dict[str, Any], step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(config("whole", settings)).output
    calls, original = [0], LocalModel.step

    def interrupting(self: LocalModel, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == step:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LocalModel, "step", interrupting)
        run(config("again", settings))
    again = resume("again").output

    assert without_speed(again) == without_speed(whole)
    for name in (runs.HEADS, str(runs.BACKBONE)):
        assert (again / name).read_bytes() == (whole / name).read_bytes()


def test_stages_are_compiled_as_they_come(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs, options: graph)  # operation by operation
    monkeypatch.setattr(localize.runtime.compiled, "FORMS", {})

    plain, fast = (run(config(name, SHARED | {"compile": name == "fast"})).output for name in ("plain", "fast"))

    found = [line.split(" in ")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("compiled")]
    assert found == [f"compiled: {n} graphs for {n} functions" for n in (4, 3, 2)]
    for name, value in states(plain)[-1].items():
        torch.testing.assert_close(states(fast)[-1][name], value, msg=name)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"freeze_after": ("segment_0",)},
            OptionError,
            r"freeze_after cannot be segment_0.\n.*\n  help: --freeze-after",
        ),
        ({"freeze_after": ("head_0:1", "head_0:2")}, OptionError, "each once"),
        ({"freeze_after": ("segment_0:3",), "epochs": 3}, OptionError, "after epoch 3, and the run has 3"),
        ({"freeze_after": ("segment_0:1",), "stage_epochs": 2}, OptionError, "were both given"),
        ({"freeze_after": ("segment_9:1",)}, UnknownNameError, "no block 'segment_9' is trained.\n  trained are seg"),
        ({"freeze_after": ("*:1",)}, OptionError, "nothing is left to train"),
        ({"stage_epochs": 3}, OptionError, "4 segments of 3 epochs each are 12 epochs, not 10.\n  help: --epochs 12"),
        ({"stage_epochs": 2, "warmup_epochs": 2, "epochs": 8}, OptionError, "counted in --stage-epochs"),
        ({"stage_epochs": 1, "recipe": "deep-supervision"}, MethodError, "does not train one segment at a time"),
    ],
)
def test_what_cannot_be_frozen_is_refused_before_anything_is_trained(
    settings: dict[str, Any], error: type[LocalizeError], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(config("run", SETTINGS | {"recipe": "dcl", "epochs": 10} | settings))
    assert not Path("run").exists()


def test_another_number_of_epochs_is_refused_where_they_are_those_of_stages() -> None:
    folder = run(config("run", STAGES | {"batch_size": 1024})).output
    with pytest.raises(OptionError, match="4 segments of 2 epochs each are 8 epochs, not 12"):
        resume(folder, epochs=12)


def test_a_recipe_says_it_and_the_command_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    from typer.testing import CliRunner

    from localize.cli import app

    Path("recipe.yaml").write_text(
        f"method: dcl\nmodel: {__file__}:Net\ntrain: {{epochs: 2, batch_size: 512, freeze_after: ['segment_0:1']}}\n"
    )
    answer = CliRunner().invoke(app, ["train", "--recipe", "recipe.yaml", "-o", "one"])
    assert answer.exit_code == 0, answer.output
    told = ["train", f"{__file__}:Net", "--method", "dcl", "--batch-size", "512", "-o", "two"]
    answer = CliRunner().invoke(app, [*told, "--epochs", "2", "--freeze-after", "segment_0:1"])
    assert answer.exit_code == 0, answer.output
    assert without_speed(Path("one")) == without_speed(Path("two"))
    answer = CliRunner().invoke(app, ["report", "one", "-o", "page.html"])
    assert answer.exit_code == 0, answer.output


def test_a_run_whose_recipe_freezes_parameters_is_tested_and_resumed_as_others_are() -> None:
    from typer.testing import CliRunner

    from localize.cli import app

    words = ["train", f"{__file__}:Net", "--method", "dcl", "--freeze", "1.*", "--batch-size", "512", "-o", "run"]
    answer = CliRunner().invoke(app, [*words, "--epochs", "1", "--weight-decay", "0.1"])
    assert answer.exit_code == 0, answer.output
    first = states(Path("run"))[-1]
    answer = CliRunner().invoke(app, ["train", "--resume", "run", "--epochs", "2"])
    assert answer.exit_code == 0, answer.output
    last = states(Path("run"))[-1]
    assert torch.equal(first["trunk.1.weight"], last["trunk.1.weight"])
    assert not torch.equal(first["trunk.2.weight"], last["trunk.2.weight"])
    assert "freeze: [1.*]" in (Path("run") / "recipe.yaml").read_text()
    answer = CliRunner().invoke(app, ["eval", "run", "--at", "all"])
    assert answer.exit_code == 0, answer.output
