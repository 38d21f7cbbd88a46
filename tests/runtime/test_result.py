"""What a step returns of class scores, and what lives because of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

import localize
from localize.errors import AuditError, OptionError
from localize.estimate.memory import Meter, predict, sgd
from localize.recipes.settings import TrainConfig
from localize.torch_names import tree_leaves
from localize.train.optimizers import clipping
from localize.train.passes import train_epoch
from tests.nets import ALL

X, Y = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 5
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("ResNet", "dcl", {}),
    ("ResNet", "dcl", {"micro_batch": 2}),
    ("ResNet", "accumulate", {"parts": 4}),
    ("ResNet", "dfa", {}),
    ("ResNet", "mlaan", {"window": 2}),
    ("ViT", "auglocal", {"d": 2, "update": "immediate"}),
    ("MLP", "dgl", {"micro_batch": 4, "loss_scaling": True}),
]


def made(net: str, method: str, **options: Any) -> localize.LocalModel:
    torch.manual_seed(0)
    return localize.transform(ALL[net]().train(), method, example_input=X, **options).train()


def stepped(local: localize.LocalModel) -> Any:
    torch.manual_seed(0)
    return local.step(X, Y, torch.optim.SGD(local.param_groups(lr=0.0), lr=0.0))


@pytest.mark.parametrize(("net", "method", "options"), CASES)
def test_classes_are_those_of_the_highest_scores(net: str, method: str, options: dict[str, Any]) -> None:
    whole, lean, bare = (stepped(made(net, method, scores=kept, **options)) for kept in ("all", "argmax", "none"))

    for name, scores in whole.scores.items():
        found = lean.classes[name]
        assert (found is None) == (scores is None)
        if scores is not None:
            assert torch.equal(found, scores.argmax(1))
            assert torch.equal(whole.classes[name], found)
    assert torch.equal(lean.predicted, whole.logits.argmax(1))
    assert torch.equal(whole.predicted, lean.predicted)
    for other in (lean, bare):
        assert {k: v.item() for k, v in other.losses.items()} == {k: v.item() for k, v in whole.losses.items()}
    assert bare.returned == {}


@pytest.mark.parametrize("kept", ["argmax", "none"])
@pytest.mark.parametrize(("net", "method", "options"), [CASES[1], CASES[3], CASES[5]])
def test_the_audit_knows_what_a_step_returns(net: str, method: str, options: dict[str, Any], kept: str) -> None:
    local = made(net, method, scores=kept, **options)

    localize.audit(local, (X, Y)).raise_if_failed()


@pytest.mark.parametrize(
    ("before", "after", "check"),
    [
        ("scores_1.argmax(1)", "scores_1.argmax(0)", "static.results"),
        ("scores_1.argmax(1)", "scores_1.detach()", "static.results"),
        ('"loss_1": classes_1', '"loss_1": classes_0', "static.results"),
        ("return losses, classes", "return losses, {}", "static.results"),
    ],
)
def test_other_classes_are_found(before: str, after: str, check: str) -> None:
    local = made("ResNet", "dcl", scores="argmax")
    text = local.source.replace(before, after)
    assert text != local.source

    with pytest.raises(AuditError, match=check):
        localize.audit(local.with_source(text)).raise_if_failed()


def test_what_is_not_kept_says_what_to_type() -> None:
    result = stepped(made("ResNet", "dcl", scores="argmax"))
    for name in ("scores", "logits"):
        with pytest.raises(OptionError) as raised:
            getattr(result, name)
        assert "result.classes" in str(raised.value) and "scores='all'" in str(raised.value)
        assert "--scores all" in str(raised.value.on_command_line)
    for name in ("scores", "logits", "classes", "predicted"):
        with pytest.raises(OptionError, match="scores='none'"):
            getattr(stepped(made("ResNet", "dcl", scores="none")), name)


def test_a_model_that_answers_by_all_its_losses_keeps_their_scores() -> None:
    result = stepped(made("ResNet", "cafo", scores="argmax"))

    assert all(scores is None or scores.shape == (6, 5) for scores in result.scores.values())


@pytest.mark.parametrize(("method", "options"), [("dcl", {}), ("accumulate", {"parts": 3}), ("cafo", {})])
def test_the_trainer_counts_the_same_from_classes(method: str, options: dict[str, Any]) -> None:
    found = []
    for kept in ("all", "argmax"):
        local = made("ResNet", method, scores=kept, **options)
        config = TrainConfig(recipe=method, model="resnet20")
        optimizer = torch.optim.SGD(local.param_groups(lr=0.1), lr=0.1)
        found.append(train_epoch(local, optimizer, [(X, Y), (X.flip(0), Y)], torch.device("cpu"), config, total=2))

    assert found[0] == found[1]
    assert found[0].accuracy


class Wide(nn.Module):
    """A perceptron of three layers with as many classes as ImageNet-21k has."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(192, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.fc = nn.Linear(width, 21841)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.layers(x))


def _trained(local: localize.LocalModel, steps: int) -> None:
    """Train as a user writes it: what a step returns lives through the next."""
    optimizer = sgd(local.param_groups(lr=0.1))
    for _ in range(steps):
        result = local.step(X, Y, optimizer)
    del result


@pytest.mark.parametrize("kept", ["all", "argmax", "none"])
def test_the_peak_of_a_loop_that_keeps_results_is_as_predicted(kept: str) -> None:
    predicted, found = {}, {}
    for method in ("dcl", "backprop"):
        torch.manual_seed(0)
        local = localize.transform(Wide().train(), method, example_input=X, scores=kept).train()
        predicted[method] = predict(local, 6).peak
        with Meter() as meter:
            for value in (*local.parameters(), *local.buffers(), X, Y):
                meter.add(value)
            _trained(local, 3)
        found[method] = meter.peak
    assert found == predicted


@pytest.mark.parametrize("kept", ["all", "argmax"])
def test_a_count_of_allocations_agrees(kept: str) -> None:
    """The profiler sees what the allocator gives and takes back, also inside of an operation."""
    torch.manual_seed(0)
    local = localize.transform(Wide().train(), "dcl", example_input=X, scores=kept).train()
    optimizer = sgd(local.param_groups(lr=0.1))
    result = local.step(X, Y, optimizer)
    optimizer.zero_grad(set_to_none=True)
    state = [value for values in optimizer.state.values() for value in tree_leaves(values)]
    held = {id(v.untyped_storage()): v.nbytes for v in (*local.parameters(), *state, X, Y) if v is not None}
    held |= {id(v.untyped_storage()): v.nbytes for v in (*result.losses.values(), *result.returned.values())}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = local.step(X, Y, optimizer)
    level = peak = 0
    for event in sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    predicted = predict(local, 6).peak

    assert predicted <= sum(held.values()) + peak <= 1.02 * predicted


class _Alive(TorchFunctionMode):
    """Note how many bytes of gradients live when a backward begins."""

    def __init__(self, local: localize.LocalModel) -> None:
        super().__init__()
        self.local, self.found = local, []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.backward:
            self.found.append(sum(p.grad.nbytes for p in self.local.parameters() if p.grad is not None))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"micro_batch": 4}, {"loss_scaling": True}])
@pytest.mark.parametrize("method", ["dcl", "auglocal", "infopro"])
def test_an_update_behind_a_backward_drops_its_gradients_clipped_or_not(method: str, options: dict[str, Any]) -> None:
    if method == "infopro":
        options = {**options, "mean": "0.5", "std": "0.5", "loss": "softmax"}
    local = made("ResNet", method, update="immediate", **options)
    optimizer = torch.optim.SGD(local.param_groups(lr=0.1), lr=0.1, momentum=0.9)
    optimizer.register_step_pre_hook(clipping(0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if "loss_scaling" in options else None
    with _Alive(local) as alive:
        local.step(X, Y, optimizer, scaler=scaler)

    first = [0] * len(alive.found) if not options.get("micro_batch") else alive.found[::2]
    assert len(alive.found) >= len(local.plan.losses) and not any(first)
    assert all(parameter.grad is None for parameter in local.parameters())


def test_an_update_at_the_end_keeps_them_until_then() -> None:
    local = made("ResNet", "auglocal", update="end")
    with _Alive(copied := copy.deepcopy(local)) as alive:
        stepped(copied)

    assert alive.found[0] == 0 < alive.found[-1]
