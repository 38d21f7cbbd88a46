"""A schedule changes what a step costs, and not what it learns."""

from __future__ import annotations

import copy
import functools
import re
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor

import localize
from localize import folder, methods, zoo
from localize.errors import MethodError, OptionError, RecipeError
from localize.ops import micro_batches
from localize.passes import schedule
from localize.pictures.plan import graph_svg
from tests import daily
from tests.golden import det
from tests.nets import ALL, Auxiliary

X, Y = det((6, 3, 8, 8), 3), torch.tensor([0, 1, 2, 3, 4, 0])
OPTIONS: dict[str, dict[str, Any]] = {
    "auglocal": {"d": 2},
    "infopro": {"loss": "softmax", "mean": "0.5", "std": "0.2"},
}


def trained(net: str, method: str, steps: int = 3, **options: Any) -> tuple[localize.LocalModel, Tensor]:
    """Return a model behind some steps of SGD with momentum, and a draw from the random state that they leave."""
    torch.manual_seed(1)
    model = ALL[net]().double().train()
    local = localize.transform(model, method, example_input=X, **options)
    torch.manual_seed(2)
    for module in local.heads.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(local.param_groups(lr=0.1), lr=0.1, momentum=0.9)
    for _ in range(steps):
        local.step(X, Y, optimizer)
    return local, torch.rand(3)


def differences(one: localize.LocalModel, other: localize.LocalModel, tolerance: float = 0.0) -> list[str]:
    pairs = zip(one.state_dict().items(), other.state_dict().values(), strict=True)
    return [name for (name, a), b in pairs if not torch.allclose(a, b, rtol=tolerance, atol=tolerance)]


# ----------------------------------------------------------------------------------------------------------- recompute


@functools.cache
def trained_as_usual(net: str, method: str) -> tuple[localize.LocalModel, Tensor]:
    """Return what :func:`trained` makes without recomputing; several tests compare with it."""
    return trained(net, method, **OPTIONS.get(method, {}))


@pytest.mark.parametrize("what", ["head", "body", "all"])
@pytest.mark.parametrize("method", daily.in_turn(["backprop", "auglocal", "dcl", "predsim", "infopro", "dgl"], 3))
@pytest.mark.parametrize("net", ["ResNet", "TwoStreams", "ViT"])
def test_recomputing_leaves_the_same_weights_statistics_and_random_state(net: str, method: str, what: str) -> None:
    kept, drawn = trained_as_usual(net, method)
    again, drawn_again = trained(net, method, recompute=what, **OPTIONS.get(method, {}))

    assert not differences(kept, again)
    assert torch.equal(drawn, drawn_again)
    assert ("recompute(" in again.source) == (what != "head" or method != "backprop")


def test_segments_may_be_computed_again_in_ways_of_their_own() -> None:
    kept, drawn = trained_as_usual("ResNet", "dgl")
    again, drawn_again = trained(
        "ResNet", "dgl", recompute="head", recompute_at="all@blocks.*, body@blocks.1,none@relu"
    )

    assert again.plan.recompute == ("segment_1", "segment_2", "head_1")
    assert re.findall(r"recompute\((\w+(?:\.\w+)?),", again.source) == ["segment_1", "heads.head_1", "segment_2"]
    assert not differences(kept, again)
    assert torch.equal(drawn, drawn_again)
    localize.audit(again, (X, Y)).raise_if_failed()


def test_the_plan_and_the_picture_say_the_schedule_of_each_segment() -> None:
    options = {"recompute_at": "all@blocks.0", "micro_batch_at": "2@blocks.*,0@blocks.1"}
    local, _ = trained("ResNet", "dgl", steps=0, **options)
    told = ["", "parts of 2, all recomputed", "", ""]

    assert [local.plan.schedule_of(segment) for segment in local.plan.segments.segments] == told
    assert [one.get("schedule", "") for one in folder.describe(local)["segments"]] == told
    assert f">{told[1]}</text>" in graph_svg(local)


@pytest.mark.parametrize("said", ["all@layer9", "heads@blocks.0", "body"])
def test_recomputation_of_no_segment_is_refused_with_the_names_of_all(said: str) -> None:
    with pytest.raises(
        OptionError, match="none, head, body, all; segments end at blocks.0, blocks.1, blocks.2, output"
    ):
        localize.transform(ALL["ResNet"](), "dcl", example_input=X.float(), recompute_at=said)


# ---------------------------------------------------------------------------------------------------------- micro-batch


@pytest.mark.parametrize("recompute", ["none", "all"])
@pytest.mark.parametrize(
    ("net", "method"),
    [("TwoStreams", "backprop"), ("TwoStreams", "auglocal"), ("MLP", "dcl"), ("MLP", "deep-supervision")],
)
def test_micro_batches_give_the_weights_of_whole_batches(net: str, method: str, recompute: str) -> None:
    options = {"d": 2, "head_norm": False} if method == "auglocal" else {}
    whole, _ = trained(net, method, **options)
    parts, _ = trained(net, method, micro_batch=4, recompute=recompute, **options)

    assert "micro_batches(step_0, 4," in parts.source
    assert not differences(whole, parts, 1e-9)


def test_what_a_step_returns_is_that_of_the_whole_batch() -> None:
    results = []
    for options in ({}, {"micro_batch": 4}):
        local, _ = trained("MLP", "dcl", steps=0, **options)
        results.append(local.step(X, Y, torch.optim.SGD(local.param_groups(lr=0.1), lr=0.1)))
    whole, parts = results

    assert parts.logits.shape == (6, 5)
    for name in whole.losses:
        torch.testing.assert_close(parts.losses[name], whole.losses[name])
    torch.testing.assert_close(parts.scores["loss_0"], whole.scores["loss_0"])


def test_a_batch_that_fits_is_taken_as_it_is() -> None:
    whole, _ = trained("MLP", "dcl")
    fits, _ = trained("MLP", "dcl", micro_batch=6)

    assert not differences(whole, fits)


def test_parts_are_put_together_in_their_memory_format() -> None:
    images = torch.randn(5, 3, 4, 4).to(memory_format=torch.channels_last)
    seen: list[tuple[int, float]] = []

    def function(trunk: Any, heads: Any, x: Tensor, y: Tensor, share: float) -> tuple[Tensor, Tensor]:
        seen.append((len(x), share))
        return 2 * x, share * y.double().mean()

    made, mean = micro_batches(function, 2, None, None, images, torch.arange(5))  # type: ignore[arg-type]

    assert seen == [(2, 0.4), (2, 0.4), (1, 0.2)]
    assert torch.equal(made, 2 * images)
    assert made.is_contiguous(memory_format=torch.channels_last)
    assert mean.item() == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("net", "method", "reason"),
    [
        ("MLP", "predsim", "similarity_matching is not known as a mean over images"),
        ("MLP", "dfa", "wait for the whole forward"),
        ("MLP", "accumulate", "takes the batch in parts already"),
        ("ResNet", "infopro", "supervised_contrastive is not known as a mean over images"),
    ],
)
def test_what_needs_the_whole_batch_is_refused(net: str, method: str, reason: str) -> None:
    with pytest.raises(MethodError, match=reason):
        localize.transform(ALL[net](), method, example_input=X.float(), micro_batch=2)


def test_the_audit_finds_losses_of_parts_that_do_not_add_up() -> None:
    local, _ = trained("MLP", "dcl", micro_batch=2)
    wrong = local.with_source(
        local.source.replace("share * F.cross_entropy(scores_0, y)", "F.cross_entropy(scores_0, y)")
    )

    report = localize.audit(wrong, (X, Y))

    failed = {check.id for check in report.checks if not check.ok}
    assert {"static.terms", "measured.run"} <= failed or "static.terms" in failed
    assert localize.audit(local, (X, Y)).ok


def test_ghost_norm_is_a_stated_deviation() -> None:
    local, _ = trained("ResNet", "dcl", micro_batch=2, ghost_norm=True)

    assert "ghost batch normalisation" in local.plan.deviations[-1]
    localize.audit(local, (X, Y)).raise_if_failed()


# ---------------------------------------------------------------------------------------------------------- exact parts


EXACT = [
    (net, method)
    for net in ("ResNet", "Dense", "Auxiliary", "Dropped")
    for method in ("backprop", "auglocal", "dcl", "dgl", "infopro")
]
SIZES = (4, 2, 1)
"""Images in a part: two parts, one of them smaller, three, and as many as there are images."""


def state_of(local: localize.LocalModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return weights, statistics, counters, and what the optimizer keeps."""
    kept = optimizer.state_dict()["state"]
    return local.state_dict() | {f"{i}.{k}": v for i, own in kept.items() for k, v in own.items()}


def after_three_steps(
    model: torch.nn.Module, method: str, x: Tensor, y: Tensor, *, batches: int = 1, lr: float = 0.02, **options: Any
) -> tuple[localize.LocalModel, dict[str, Tensor]]:
    """Return a local model behind three updates with SGD and momentum, in float64, and all state."""
    torch.manual_seed(1)
    local = localize.transform(model.double().train(), method, example_input=x, **options)
    torch.manual_seed(2)
    for module in local.heads.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    local.double()
    optimizer = torch.optim.SGD(local.param_groups(lr=lr), lr=lr, momentum=0.9)
    torch.manual_seed(3)
    for step in range(3):
        for batch in range(batches):
            result = local.step(x.roll(step + batch, 0), y.roll(step + batch), optimizer, batch=(batch, batches))
    state = state_of(local, optimizer)
    return local, state | result.losses | {"draw": torch.rand(3), "logits": result.logits}


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Every tensor within 1e-9 of its own norm, or of 1e-3 where it is next to nothing: a sum that cancels."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        off = float((found[name].double() - value.double()).norm())
        assert off <= 1e-9 * max(float(value.double().norm()), 1e-3), f"{name} is off by {off}"


@functools.cache
def whole(net: str, method: str) -> dict[str, Tensor]:
    """Return what three steps on whole batches leave; several tests compare with it."""
    return after_three_steps(normed(net), method, X, Y, **OPTIONS.get(method, {}))[1]


class Dropped(ALL["ResNet"]):
    """Dropout of values and channels, and stochastic depth, between norms."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].conv2 = torch.nn.Sequential(torch.nn.Dropout(0.2), self.blocks[1].conv2)
        self.blocks[2].conv1 = torch.nn.Sequential(self.blocks[2].conv1, torch.nn.Dropout2d(0.3))
        self.blocks[2].shortcut = torchvision.ops.StochasticDepth(0.5, "row")


def normed(net: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return {"Dropped": Dropped, "Auxiliary": Auxiliary}.get(net, ALL.get(net))()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("net", "method"), daily.in_turn(EXACT, 5))
def test_parts_leave_weights_statistics_and_momenta_of_whole_batches(net: str, method: str, size: int) -> None:
    parts, state = after_three_steps(normed(net), method, X, Y, micro_batch=size, **OPTIONS.get(method, {}))

    assert f"exact_parts(part_0, {size}, trunk" in parts.source
    assert_equal(state, whole(net, method))


@pytest.mark.parametrize(
    ("net", "method", "options"),
    [
        ("Dropped", "auglocal", {"recompute": "all"}),
        ("ResNet", "dcl", {"recompute": "body"}),
        ("Dense", "infopro", {"recompute": "head"}),
        ("Dropped", "dgl", {"batches": 2}),
        ("ResNet", "dcl", {"batches": 2, "moments": "shared"}),
    ],
)
def test_parts_are_exact_under_recomputation_and_accumulation(net: str, method: str, options: dict[str, Any]) -> None:
    options = OPTIONS.get(method, {}) | options
    _, whole = after_three_steps(normed(net), method, X, Y, **options)
    _, parts = after_three_steps(normed(net), method, X, Y, micro_batch=4, **options)

    assert_equal(parts, whole)


def test_segments_may_take_the_batch_in_parts_of_their_own() -> None:
    options = {"micro_batch": 4, "micro_batch_at": "2@blocks.*, 0@blocks.1,3@output"}
    parts, state = after_three_steps(normed("Dropped"), "dgl", X, Y, **options)

    called = re.findall(r"exact_parts\((part_\d, \d)", parts.source)
    assert called == ["part_0, 4", "part_1, 2", "part_2, 0", "part_3, 3"]
    assert_equal(state, whole("Dropped", "dgl"))
    localize.audit(parts, (X, Y)).raise_if_failed()


def test_a_segment_alone_may_be_taken_in_parts_and_the_others_whole() -> None:
    parts, state = after_three_steps(normed("ResNet"), "dcl", X, Y, micro_batch_at="2@blocks.0")

    assert re.findall(r"exact_parts\((part_\d, \d)", parts.source)[:2] == ["part_0, 2", "part_1, 0"]
    assert_equal(state, whole("ResNet", "dcl"))


@pytest.mark.parametrize("said", ["16@layer9", "many@blocks.0", "4"])
def test_parts_of_no_segment_are_refused_with_the_names_of_all(said: str) -> None:
    with pytest.raises(OptionError, match="segments end at blocks.0, blocks.1, blocks.2, output"):
        localize.transform(ALL["ResNet"](), "dcl", example_input=X.float(), micro_batch_at=said)


KEPT = {"micro_batch": 4, "keep_at": "bn2@blocks.1,bn2@blocks.2"}


@pytest.mark.parametrize("more", [{}, {"recompute_at": "all@blocks.1"}])
def test_segments_that_keep_inputs_of_norms_train_as_whole_batches(more: dict[str, Any]) -> None:
    parts, state = after_three_steps(normed("Dropped"), "dcl", X, Y, **KEPT, **more)

    called = re.findall(r"exact_parts\((part_\d).*?(?:keep=\"(.*)\")?\)", parts.source)
    assert called == [("part_0", ""), ("part_1", "bn2"), ("part_2", "bn2"), ("part_3", "")]
    assert parts.plan.schedule_of(parts.plan.segments.segments[2]) == "parts of 4, bn2 kept"
    assert folder.describe(parts)["kept"] == {"loss_1": "bn2", "loss_2": "bn2"}
    assert_equal(state, whole("Dropped", "dcl"))
    localize.audit(parts, (X, Y)).raise_if_failed()


@pytest.mark.parametrize(("old", "new"), [(', keep="bn2"', ""), ('keep="bn2"', 'keep="bn1"'), ("keep=", "kept=")])
def test_the_audit_finds_a_text_that_keeps_something_else(old: str, new: str) -> None:
    local, _ = trained("ResNet", "dcl", steps=0, **KEPT)

    report = localize.auditor.static(local.with_source(local.source.replace(old, new, 1)))

    assert not report.ok


@pytest.mark.parametrize("said", ["bn9@blocks.1", "bn2@layer9", "bn2"])
def test_inputs_of_no_norm_are_refused(said: str) -> None:
    with pytest.raises(OptionError, match="'keep_at' of the schedule cannot hold"):
        localize.transform(ALL["ResNet"](), "dcl", example_input=X.float(), micro_batch=2, keep_at=said)


def test_a_step_in_parts_goes_on_from_saved_state_bit_for_bit() -> None:
    def made() -> tuple[localize.LocalModel, torch.optim.Optimizer]:
        torch.manual_seed(1)
        local = localize.transform(normed("Dropped").double(), "dcl", example_input=X, micro_batch=4, update="end")
        return local, torch.optim.SGD(local.param_groups(lr=0.1), lr=0.1, momentum=0.9)

    straight, optimizer = made()
    straight.step(X, Y, optimizer)
    resumed, another = made()
    resumed.load_state_dict(straight.state_dict())
    another.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for local, its in ((straight, optimizer), (resumed, another)):
        torch.manual_seed(2)
        local.step(X, Y, its)

    assert not differences(straight, resumed)


class Sync(ALL["ResNet"]):
    """A norm over all processes."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = torch.nn.SyncBatchNorm(4)


class Attending(ALL["ResNet"]):
    """Dropout inside of an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.bn(self.conv(x)))
        tokens = h.flatten(2).transpose(1, 2)
        return self.fc(
            self.blocks(h + self.attention(tokens, tokens, tokens)[0].transpose(1, 2).view_as(h)).mean((2, 3))
        )


class Kept(ALL["ResNet"]):
    """An InstanceNorm with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = torch.nn.Sequential(torch.nn.InstanceNorm2d(4, track_running_stats=True), torch.nn.ReLU())


class Noisy(ALL["ResNet"]):
    """Noise on the images."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn_like(x))


@pytest.mark.parametrize(
    ("net", "method", "options", "reason"),
    [
        (Sync, "dcl", {}, r"bn \(SyncBatchNorm\)"),
        (Attending, "dcl", {}, "attention"),
        (Kept, "dcl", {}, "relu.0 .running statistics of InstanceNorm2d"),
        (Noisy, "dcl", {}, "randn_like draws"),
        (ALL["ResNet"], "cfl", {"total": "dict"}, "noise of the dictionary once for a batch"),
        (
            ALL["ResNet"],
            "infopro",
            {"loss": "softmax"},
            "heads.pixels scales the images to the range of the whole batch",
        ),
    ],
)
def test_what_normalises_or_draws_in_another_way_is_refused_by_name(
    net: Any, method: str, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(MethodError, match=reason):
        localize.transform(net(), method, example_input=X.float(), micro_batch=2, **options)


NETS = ("cifar/resnet20", "tv/mobilenet_v3_small", "tv/efficientnet_b0", "tv/resnet50", "tv/densenet121")
SLOW = (*(("cifar/resnet20", method) for method in ("auglocal", "dcl", "infopro")), ("tv/mobilenet_v3_small", "dcl"))
"""The others take about a minute of CPU time each, and more."""


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(name, method, marks=pytest.mark.slow if (name, method) in SLOW else pytest.mark.zoo)
        for name in NETS
        for method in ("auglocal", "dcl", "dgl", "infopro")
    ],
)
def test_parts_of_nets_of_the_libraries_leave_what_whole_batches_leave(name: str, method: str) -> None:
    pixels = 32 if name.startswith("cifar/") else 64  # at 32 their last norms would see one value of each image
    lr = 0.002  # at 0.1, three steps of resnet50 make 1e-8 of a change of the images by 1e-15
    x, y = det((5, 3, pixels, pixels), 3).double(), torch.arange(5)
    states = []
    for options in ({}, {"micro_batch": 2}):
        torch.manual_seed(0)
        model = zoo.create_model(name, num_classes=10)
        cut = localize.CutSpec("max" if "densenet" in name else 4)  # a quarter of it has 30 norms in series
        states.append(after_three_steps(model, method, x, y, cut=cut, lr=lr, **OPTIONS.get(method, {}), **options)[1])
    assert_equal(*states)


# -------------------------------------------------------------------------------------------------------------- options


def test_options_of_a_schedule_are_those_of_no_method() -> None:
    taken = {name for method in methods.names() for name in methods.get(method).__dataclass_fields__}
    assert not taken.intersection(schedule.names())


def test_a_recipe_may_state_a_schedule_and_what_is_typed_wins() -> None:
    recipe = {"method": "dcl", "schedule": {"recompute": "body"}}
    model = ALL["MLP"]()

    stated = localize.transform(model, recipe, example_input=X.float())
    typed = localize.transform(copy.deepcopy(model), recipe, example_input=X.float(), recompute="none")

    assert stated.plan.recompute and not typed.plan.recompute


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recompute": "heads"}, "cannot be 'heads'"),
        ({"micro_batch": -1}, "the lowest value is 0"),
        ({"micro_batch": 2.5}, "takes whole numbers"),
    ],
)
def test_wrong_values_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        localize.transform(ALL["MLP"](), "dcl", example_input=X.float(), **options)
    with pytest.raises(RecipeError, match=message):
        localize.recipes.load({"method": "dcl", "schedule": options})


def test_an_unknown_key_of_a_schedule_is_refused_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'micro_batch'"):
        localize.recipes.load({"method": "dcl", "schedule": {"microbatch": 2}})
