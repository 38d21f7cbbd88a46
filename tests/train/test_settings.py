"""What real training needs beside the plain loop: each setting against the same thing written by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor
from typer.testing import CliRunner

import localize
from localize import recipes, zoo
from localize.cli import app
from localize.errors import OptionError
from localize.runtime.model import LocalModel
from localize.train import (
    TrainConfig,
    checkpoints,
    data,
    evaluation,
    export,
    loop,
    optimizers,
    parallel,
    resume,
    run,
    runs,
    verify,
)
from tests.nets import ResNet

SHAPE = (1, 12, 12)


def config(folder: Path, **settings: Any) -> TrainConfig:
    return TrainConfig("cifar/fc_mnist", input_shape=SHAPE, device="cpu", output=str(folder), **settings)


def exported(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / runs.BACKBONE)


def test_clipping_autocast_accumulation_and_averaging_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    settings = {"clip_grad": 0.5, "amp": True, "grad_accum_steps": 2, "model_ema": True, "model_ema_decay": 0.75}
    settings |= {"model_ema_warmup": False, "model_ema_export": "average"}
    result = run(config(tmp_path, epochs=2, batch_size=256, lr=0.05, seed=7, **settings))

    torch.manual_seed(7)
    model = zoo.create_model("cifar/fc_mnist", input_shape=SHAPE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    order = torch.Generator().manual_seed(7)
    loader = data.training_batches(data.load("digits", SHAPE).train, 256, generator=order)
    norms = []
    for epoch in range(2):
        optimizer.param_groups[0]["lr"] = 0.5 * 0.05 * (1 + math.cos(math.pi * epoch / 2))
        batches = list(loader)
        assert len(batches) == 5  # the last one stands alone
        for pair in (batches[0:2], batches[2:4], batches[4:5]):
            optimizer.zero_grad()
            for x, y in pair:
                with torch.autocast("cpu", torch.bfloat16):
                    loss = F.cross_entropy(model(x), y)
                loss.backward()
            for parameter in model.parameters():
                parameter.grad /= len(pair)
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5))
            optimizer.step()
            for name, value in model.state_dict().items():
                average[name].lerp_(value, 0.25)
    assert max(norms) > 0.5
    found = exported(result.output)
    for name, value in average.items():
        assert torch.equal(found[name], value), name
    assert [line["step"] for line in result.metrics] == [3, 6]
    images, labels = data.load("digits", SHAPE).test[list(range(360))]
    model.load_state_dict(average)
    assert result.metrics[-1]["test_accuracy"] == int((model.eval()(images).argmax(1) == labels).sum()) / 360


@pytest.mark.parametrize(("method", "clipped"), [("dcl", 3), ("backprop", 1)])
def test_gradients_are_clipped_by_loss_or_as_a_whole(method: str, clipped: int) -> None:
    model = zoo.create_model("cifar/fc_mnist", input_shape=SHAPE)
    x, y = torch.randn(8, *SHAPE), torch.arange(8)
    local = localize.transform(model, method, example_input=x)
    optimizer = optimizers.create_optimizer(local, TrainConfig("cifar/fc_mnist", clip_grad=0.01))
    norms: list[list[float]] = []

    def look(seen: torch.optim.Optimizer, *given: Any) -> None:
        gradients = [p.grad for group in seen.param_groups for p in group["params"] if p.grad is not None]
        norms.append([float(torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients])))])

    optimizer.register_step_pre_hook(look)
    local.step(x, y, optimizer)
    assert norms == [pytest.approx([0.01], rel=1e-4)] * clipped


def in_double(method: str, **options: Any) -> tuple[LocalModel, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = zoo.create_model("cifar/fc_mnist", input_shape=SHAPE)
    local = localize.transform(model, method, example_input=torch.randn(2, *SHAPE), **options).double()
    return local, torch.optim.SGD(local.param_groups(lr=0.1), lr=0.1, momentum=0.9)


@pytest.mark.parametrize(
    ("method", "options", "update"), [("auglocal", {"tail": "isolated"}, "end"), ("dcl-ld", {}, "immediate")]
)
def test_several_batches_make_the_update_of_one_large_one(method: str, options: dict[str, Any], update: str) -> None:
    (whole, one), (parts, several) = in_double(method, **options), in_double(method, **options)
    assert whole.plan.update == update
    for _ in range(2):
        x, y = torch.randn(12, *SHAPE, dtype=torch.float64), torch.arange(12) % 10
        whole.step(x, y, one)
        before = parts.state_dict()["trunk.fc.weight"].clone()
        for i, (a, b) in enumerate(zip(x.split(4), y.split(4), strict=True)):
            assert torch.equal(parts.state_dict()["trunk.fc.weight"], before)
            parts.step(a, b, several, batch=(i, 3))
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-9, atol=1e-9, msg=name)
    assert not torch.equal(whole.state_dict()["trunk.fc.weight"], before)


def test_gradients_of_several_batches_are_kept_by_loss() -> None:
    """Behind the first update losses see another dictionary; before it, two batches are one large one."""
    (whole, one), (parts, several) = in_double("dcl"), in_double("dcl")
    x, y = torch.randn(8, *SHAPE, dtype=torch.float64), torch.arange(8)
    whole.step(x, y, one)
    for i in range(2):
        parts.step(x[4 * i : 4 * i + 4], y[4 * i : 4 * i + 4], several, batch=(i, 2))
    key = "loss_0/heads.dictionary.weight"
    moments = [optimizer.state[key]["momentum_buffer"] for optimizer in (one, several)]
    torch.testing.assert_close(*moments, rtol=1e-9, atol=1e-9)


def test_copies_that_are_pulled_with_every_batch_are_not_accumulated(tmp_path: Path) -> None:
    asked = TrainConfig("cifar/resnet20", recipe="mlaan", grad_accum_steps=2, output=str(tmp_path / "run"))
    with pytest.raises(OptionError, match=r"pulls \d+ copies once per batch.*\n  2 batches are to make one update"):
        run(asked)
    assert not list(tmp_path.iterdir())


def test_compiled_segments_train_as_the_text_does_and_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs, options: graph)  # operation by operation
    monkeypatch.setattr(localize.runtime.compiled, "FORMS", {})  # and in the memory format of the text
    settings = {
        "recipe": "dcl",
        "epochs": 1,
        "max_steps": 4,
        "batch_size": 64,
        "grad_accum_steps": 2,
        "model_ema": True,
    }
    plain, fast = run(config(tmp_path / "a", **settings)), run(config(tmp_path / "b", **settings, compile=True))
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("compiled")]
    assert len(told) == 1
    assert told[0].startswith("compiled: 3 graphs for 3 functions in ")
    assert (plain.output / runs.BACKBONE).read_bytes() == (fast.output / runs.BACKBONE).read_bytes()
    assert (plain.output / runs.HEADS).read_bytes() == (fast.output / runs.HEADS).read_bytes()


def test_what_runs_uncompiled_is_named_with_its_reason() -> None:
    local = localize.transform(ResNet(), "backprop", example_input=torch.randn(2, 3, 8, 8))
    fast = localize.compile(local)
    fast.functions = [
        localize.runtime.compiled.Compiled("step_0", "x"),
        localize.runtime.compiled.Compiled("step_1", reason="it is odd"),
    ]
    assert loop.compiled_line(fast) == "compiled: 0 graphs for 2 functions in 0.0 s; not compiled: step_1 (it is odd)"


def test_synchronized_norms_of_one_process_are_ordinary_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the trunk (with an activation inside, as timm has them) and in heads; resumed, exported and compiled too."""
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs, options: graph)  # operation by operation
    monkeypatch.setattr(localize.runtime.compiled, "FORMS", {})  # and in the memory format of the text
    settings = {
        "input_shape": (3, 16, 16),
        "recipe": "dgl",
        "cut": localize.CutSpec(segments=2),
        "epochs": 1,
        "max_steps": 2,
        "batch_size": 8,
        "checkpoint_every": 1,
        "device": "cpu",
    }
    several = {"a": {}, "b": {"sync_bn": True}, "c": {"sync_bn": True, "compile": True}}
    plain, synchronized, fast = (
        run(TrainConfig("timm/test_efficientnet", output=str(tmp_path / name), **settings, **more))
        for name, more in several.items()
    )
    for part in (synchronized.local.trunk, synchronized.local.heads):
        norms = [module for module in part.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
        assert norms and all(isinstance(norm, torch.nn.SyncBatchNorm) for norm in norms)
    resumed = tmp_path / "b"
    checkpoints.files(resumed)[-1].unlink()
    before = (plain.output / runs.METRICS).read_text().partition("images_per_second")[0]
    for folder in (synchronized.output, resume(resumed).output, fast.output):
        for file in (runs.BACKBONE, runs.HEADS):
            assert (folder / file).read_bytes() == (plain.output / file).read_bytes(), folder
        assert (folder / runs.METRICS).read_text().startswith(before)
    export(resumed, tmp_path / "exported.safetensors")
    assert verify(resumed, tmp_path / "exported.safetensors").startswith("verified")
    accuracy = evaluation.evaluate_run(evaluation.open_run(resumed), evaluation.Questions(at="all"))["accuracy"]
    assert accuracy == synchronized.metrics[-1]["test_accuracy"]


def test_norms_that_cannot_be_synchronized_are_refused() -> None:
    class Own(torch.nn.BatchNorm2d):
        pass

    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    net = torch.nn.Sequential(torch.nn.BatchNorm1d(2), Own(2))
    with pytest.raises(OptionError, match=r"in 2 processes on cpu.\n  .*on CUDA only.\n  help: --device cuda"):
        parallel.synchronize_norms(net, parallel.Team(0, 2), cpu)
    with pytest.raises(OptionError, match="--sync-bn and --compile were both given to 2 processes"):
        parallel.synchronize_norms(net, parallel.Team(0, 2), cuda, compiled=True)
    with pytest.raises(OptionError, match="cannot replace 1.\n  it is a Own"):
        parallel.synchronize_norms(net, parallel.ALONE, cpu)
    assert type(net[0]) is torch.nn.BatchNorm1d


def test_channels_last_is_a_matter_of_memory_only(tmp_path: Path) -> None:
    settings = {
        "input_shape": (3, 8, 8),
        "recipe": "dcl",
        "max_steps": 2,
        "batch_size": 64,
        "epochs": 1,
        "device": "cpu",
    }
    plain = run(TrainConfig("cifar/resnet20", output=str(tmp_path / "a"), **settings))
    last = run(TrainConfig("cifar/resnet20", output=str(tmp_path / "b"), channels_last=True, **settings))
    weight = last.local.trunk.layer1[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    for name, value in exported(plain.output).items():
        torch.testing.assert_close(exported(last.output)[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_settings_of_the_command_line_reach_the_recipe(tmp_path: Path) -> None:
    given = "--amp --no-model-ema --clip-grad 2 --grad-accum-steps 3 --checkpoint-every 9 --max-steps 1 --device cpu"
    arguments = ["train", "cifar/fc_mnist", "-m", "dcl", "--input-shape", "1,12,12", "--batch-size", "8"]
    answer = CliRunner().invoke(app, [*arguments, *given.split(), "--output", str(tmp_path / "run")])
    assert answer.exit_code == 0, answer.output
    written = recipes.load(tmp_path / "run").train
    expected = {"amp": True, "model_ema": False, "clip_grad": 2.0, "grad_accum_steps": 3, "checkpoint_every": 9}
    assert {name: written[name] for name in expected} == expected
