"""What is frozen stays as it is, by weight decay and momentum too; the rest trains as before, and the audit holds."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

import localize
from localize import LocalModel
from localize.cli import app
from localize.errors import LocalizeError, MethodError, OptionError, UnknownNameError
from localize.testing.nets import IMAGE, NETS
from tests.nets import MLP, ResNet

X, Y = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 4, 0])


def made(method: str, **options: Any) -> LocalModel:
    return localize.transform(ResNet().train(), method, example_input=X, **options)


def sgd(local: LocalModel) -> torch.optim.Optimizer:
    return torch.optim.SGD(local.param_groups(lr=0.1), momentum=0.9, weight_decay=0.1)


def moved(local: LocalModel, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in local.named_parameters() if not torch.equal(value, before[name])}


def kept(local: LocalModel) -> dict[str, torch.Tensor]:
    return copy.deepcopy(local.state_dict())


DAILY = [
    ("dcl", {"loss_scaling": True}, ["segment_1", "segment_2"]),
    ("dfa", {}, ["segment_1"]),
    ("ff", {}, ["segment_0"]),
]
SLOW = [
    ("auglocal", {"recompute": "all"}, ["segment_1"]),
    ("dcl", {}, ["dictionary"]),
    ("dgl", {"micro_batch": 3, "ghost_norm": True}, ["segment_0"]),
    ("dgl", {"micro_batch": 3}, ["segment_0", "head_1"]),
    ("predsim", {}, ["segment_0", "head_1*"]),
    ("infopro", {}, ["segment_1"]),
    ("cafo", {}, ["predictor_1"]),
    ("cfl", {}, ["segment_0", "segment_2"]),
    ("mlaan", {"window": 2}, ["segment_1"]),
    ("checkpoint", {}, ["segment_0"]),
    ("deep-supervision", {}, ["segment_1"]),
]


@pytest.mark.parametrize(
    ("method", "options", "names"), [*DAILY, *(pytest.param(*one, marks=pytest.mark.slow) for one in SLOW)]
)
def test_the_audit_of_what_is_left_holds_and_nothing_frozen_moves(
    method: str, options: dict[str, Any], names: list[str]
) -> None:
    whole = made(method, **options)
    optimizer = sgd(whole)
    whole.step(X, Y, optimizer)  # momentum for all
    before = kept(whole)

    local = localize.freeze(whole, *names)

    localize.audit(local, (X, Y)).raise_if_failed()
    for _ in range(2):
        local.step(X, Y, optimizer)
    trained = {name for block in local.plan.blocks for name in block.parameters if name not in idle(whole)}
    assert moved(local, before) <= trained
    assert len(trained) < len({name for names in whole.reached() for name in names})
    assert {loss.name for loss in local.plan.losses} == {loss.name for loss in whole.plan.losses} - {
        loss.name for loss in local.plan.left_out
    }


def idle(local: LocalModel) -> set[str]:
    return {name for block in local.plan.frozen for name in local.plan.block(block).parameters}


def test_two_steps_equal_those_of_a_loop_by_hand() -> None:
    whole = localize.transform(MLP().train(), "ll-pred", example_input=X)
    by_hand = copy.deepcopy(whole)
    local = localize.freeze(whole, "segment_0")
    optimizer, other = sgd(whole), sgd(by_hand)
    functions = by_hand.functions_of_text
    names = [loss.name for loss in whole.plan.losses][1:]
    assert list(local.step(X, Y, optimizer).losses) == names
    local.step(X, Y, optimizer)

    for _ in range(2):
        h = X
        for k, segment in enumerate(whole.plan.segments.segments):
            h = functions[segment.name](by_hand.trunk, h.detach())
            if k > 0:
                other.zero_grad()
                F.cross_entropy(by_hand.heads[f"head_{k}"](h) if f"head_{k}" in by_hand.heads else h, Y).backward()
                other.step()

    for name, value in by_hand.state_dict().items():
        assert torch.equal(whole.state_dict()[name], value), name


def test_freezing_nothing_trains_all_again() -> None:
    whole = made("dgl")
    optimizer = sgd(whole)
    localize.freeze(whole, "segment_0").step(X, Y, optimizer)
    before = kept(whole)

    again = localize.freeze(whole)

    assert again.source == whole.source
    whole.step(X, Y, optimizer)
    assert moved(whole, before) == {name for names in whole.reached() for name in names}


def test_one_after_the_other_adds_up() -> None:
    local = localize.freeze(localize.freeze(made("dgl"), "segment_0"), "segment_1")

    assert [loss.name for loss in local.plan.losses] == ["loss_2", "loss_3"]
    assert [loss.name for loss in local.plan.left_out] == ["loss_0", "loss_1"]
    localize.audit(local, (X, Y)).raise_if_failed()


@pytest.mark.parametrize(
    ("method", "names", "error", "message"),
    [
        (
            "dgl",
            ["segment_7"],
            UnknownNameError,
            r"no block 'segment_7' is trained.\n  trained are segment_0, .*head_0",
        ),
        ("dgl", ["segment_*"], OptionError, "nothing is left to train"),
        ("backprop", ["segment_0"], OptionError, "nothing is left to train"),
    ],
)
def test_what_cannot_be_frozen_is_refused(
    method: str, names: list[str], error: type[LocalizeError], message: str
) -> None:
    whole = made(method)
    with pytest.raises(error, match=message):
        localize.freeze(whole, *names)
    assert all(parameter.requires_grad for parameter in whole.parameters())


def test_a_loss_that_starts_after_what_only_a_later_one_runs_is_refused() -> None:
    """As a plan could say it whose losses are not in the order of their segments."""
    import dataclasses

    from localize.ir import Route
    from localize.passes.freeze import freeze

    plan = made("dgl").plan
    first, second, third, last = plan.losses
    later = dataclasses.replace(third, route=Route(0, 2), reach=("segment_0", "segment_2", "head_2"))
    plan = dataclasses.replace(plan, losses=(first, second, later, last))
    with pytest.raises(MethodError, match="loss_1 of dgl starts after segment_0, whose own loss would be left out"):
        freeze(plan, ["segment_0"])


def test_a_recipe_freezes_parameters_of_the_model_and_norms_go_on_counting() -> None:
    model = ResNet().train()
    recipe = {"method": "dgl", "freeze": ["conv.*", "bn.*", "*.shortcut.weight"]}
    frozen = {"conv.weight", "bn.weight", "bn.bias", "blocks.1.shortcut.weight"}

    local = localize.transform(model, recipe, example_input=X)

    assert {name for name, p in model.named_parameters() if not p.requires_grad} == frozen
    localize.audit(local, (X, Y)).raise_if_failed()
    before = kept(local)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    heads = torch.optim.SGD(local.heads.parameters(), lr=0.1)
    local.step(X, Y, [optimizer, heads])
    assert {name.removeprefix("trunk.") for name in moved(local, before)}.isdisjoint(frozen)
    assert model.bn.num_batches_tracked == 1
    assert not torch.equal(model.bn.running_mean, before["trunk.bn.running_mean"])


def test_a_norm_in_eval_mode_is_left_alone() -> None:
    model = ResNet().train()
    local = localize.freeze(localize.transform(model, "dgl", example_input=X), "segment_0")
    model.bn.eval()

    local.step(X, Y, sgd(local))

    assert model.bn.num_batches_tracked == 0
    assert torch.equal(model.bn.running_mean, torch.zeros(4))


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["blocks.0"], UnknownNameError, r"no parameter is called 'blocks.0'.\n.*\n  help: 'blocks.0.\*', for all in"),
        (["convv.weight"], UnknownNameError, "conv.weight"),
        (["*"], OptionError, "no parameter is left to train"),
    ],
)
def test_parameters_that_cannot_be_frozen_are_refused(
    names: list[str], error: type[LocalizeError], message: str
) -> None:
    model = ResNet()
    with pytest.raises(error, match=message):
        localize.transform(model, {"method": "dgl", "freeze": names}, example_input=X)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_command_line_freezes_too(tmp_path: Path) -> None:
    words = ["convert", "cifar/fc_mnist", "--method", "dcl", "--input-shape", "1,8,8", "--freeze", "layer1.*"]
    answer = CliRunner().invoke(app, [*words, "--freeze", "norm.*", "-o", str(tmp_path / "out")])

    assert answer.exit_code == 0, answer.output
    assert "freeze: [layer1.*, norm.*]" in (tmp_path / "out" / "recipe.yaml").read_text()
    owners = (tmp_path / "out" / "ownership.csv").read_text().splitlines()
    frozen = {line.split(",")[0] for line in owners if "frozen" in line}
    assert frozen == {"trunk.layer1.fc.weight", "trunk.layer1.fc.bias", "trunk.norm.weight", "trunk.norm.bias"}


@functools.cache
def in_parts(micro_batch: int) -> LocalModel:
    torch.manual_seed(0)
    x = torch.zeros(12, *IMAGE).double()
    return localize.transform(NETS["ResNet"]().double(), "dgl", example_input=x, micro_batch=micro_batch).train()


@pytest.mark.parametrize("names", [("segment_0",), ("segment_0", "segment_1"), ("head_1",), ("segment_2", "segment_3")])
def test_what_is_left_trains_in_exact_parts_as_in_the_whole(names: tuple[str, ...]) -> None:
    x, y = torch.randn(12, *IMAGE).double(), torch.arange(12) % 5

    def trained(micro_batch: int) -> dict[str, torch.Tensor]:
        local = localize.freeze(copy.deepcopy(in_parts(micro_batch)), *names)
        optimizer = torch.optim.SGD(local.param_groups(lr=0.1), lr=0.1)
        for _ in range(3):
            local.step(x, y, optimizer)
        return local.state_dict()

    whole, parts = trained(0), trained(5)
    assert all(torch.allclose(whole[name], value, rtol=1e-9, atol=1e-12) for name, value in parts.items())


def test_sizes_of_parts_stay_with_their_losses() -> None:
    x = torch.randn(12, *IMAGE)
    local = localize.transform(NETS["ResNet"](), "dgl", example_input=x, micro_batch_at="2@blocks.0,4@output")
    sizes = {loss.name: local.plan.part_size(loss) for loss in local.plan.losses}
    assert sorted(sizes.values()) == [0, 0, 2, 4]

    plan = localize.freeze(local, "segment_0").plan

    assert {loss.name: plan.part_size(loss) for loss in plan.losses} == {
        name: size for name, size in sizes.items() if name != "loss_0"
    }
    assert len(plan.part_sizes) == 3


def test_a_segment_is_not_frozen_between_ones_that_are_trained_in_exact_parts() -> None:
    local = localize.transform(NETS["ResNet"](), "dgl", example_input=torch.randn(12, *IMAGE), micro_batch=4)
    with pytest.raises(MethodError, match="segment_1 cannot be frozen between segments that are trained in parts"):
        localize.freeze(local, "segment_1")


def test_what_is_frozen_behind_the_step_s_back_stays_and_a_loss_without_anything_to_train_is_named() -> None:
    local = made("dgl")
    optimizer = sgd(local)
    local.step(X, Y, optimizer)
    local.trunk.conv.requires_grad_(False)
    before = kept(local)
    local.step(X, Y, optimizer)
    assert "trunk.conv.weight" not in moved(local, before)

    for name in local.reached()[0]:
        local.get_parameter(name).requires_grad_(False)
    refused = (
        r"nothing that loss_0 trains requires a gradient any more.\n.*\n  help: localize.freeze\(local, \"segment_0\"\)"
    )
    with pytest.raises(OptionError, match=refused):
        local.step(X, Y, optimizer)
    localize.freeze(local, "segment_0").step(X, Y, optimizer)
