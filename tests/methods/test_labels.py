"""Labels beyond class ids, and losses beyond the plain cross-entropy: every method equals a step written by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import localize
from localize import methods
from localize.errors import InputError, LocalizeError
from localize.methods import labels_of
from localize.runtime.model import LocalModel
from tests.methods import labels
from tests.nets import ResNet

Z, LR, E, GAMMA = 5, 0.1, 0.1, 1.5
X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
IDS = torch.tensor([0, 1, 2, 3, 4, 0])
SOFT = torch.rand(6, Z, generator=torch.Generator().manual_seed(1), dtype=torch.float64).softmax(1)
SEVERAL = (torch.rand(6, Z, generator=torch.Generator().manual_seed(2), dtype=torch.float64) > 0.6).double()
W = torch.tensor([0.5, 1.0, 2.0, 0.0, 3.0], dtype=torch.float64)

Loss = Callable[[Tensor], Tensor]


def hot() -> Tensor:
    return torch.eye(Z, dtype=torch.float64)[IDS]


def crossed(scores: Tensor, y: Tensor) -> Tensor:
    """The cross-entropy of every image, written out."""
    return -(y * (scores - scores.exp().sum(1, keepdim=True).log())).sum(1)


def weighted(scores: Tensor) -> Tensor:
    return (W[IDS] * crossed(scores, hot())).sum() / W[IDS].sum()


def smoothed_and_weighted(scores: Tensor) -> Tensor:
    logs = scores - scores.exp().sum(1, keepdim=True).log()
    y = (1 - E) * hot() + E / Z
    return -(W * y * logs).sum() / W[IDS].sum()


def focal(scores: Tensor) -> Tensor:
    p = scores.exp() / scores.exp().sum(1, keepdim=True)
    return -(SOFT * (1 - p) ** GAMMA * p.log()).sum() / 6


def several(scores: Tensor) -> Tensor:
    p = 1 / (1 + (-scores).exp())
    return -(SEVERAL * p.log() + (1 - SEVERAL) * (1 - p).log()).sum() / (6 * Z)


CASES: dict[str, tuple[Any, Tensor, Loss]] = {
    "soft labels": (None, SOFT, lambda s: crossed(s, SOFT).mean()),
    "smoothing": ({"smoothing": E}, IDS, lambda s: crossed(s, (1 - E) * hot() + E / Z).mean()),
    "soft and smoothed": ({"smoothing": E}, SOFT, lambda s: crossed(s, (1 - E) * SOFT + E / Z).mean()),
    "weights": ({"weights": W.tolist()}, IDS, weighted),
    "weights of soft labels": ({"weights": W.tolist()}, SOFT, lambda s: crossed(s, W * SOFT).mean()),
    "smoothing and weights": ({"smoothing": E, "weights": W.tolist()}, IDS, smoothed_and_weighted),
    "focal": ({"name": "focal", "gamma": GAMMA}, SOFT, focal),
    "several classes": ("bce", SEVERAL, several),
}
"""What is asked for, the labels, and the loss of class scores, written out."""

PIECES = {
    "relu": lambda net, x: F.relu(net.bn(net.conv(x))),
    "blocks.0": lambda net, x: net.blocks[0](x),
    "blocks.1": lambda net, x: net.blocks[1](x),
    "blocks.2": lambda net, x: net.blocks[2](x),
    "output": lambda net, x: net.fc(x.mean((2, 3))),
}
"""What the net computes, by where it ends."""


def similarity(x: Tensor) -> Tensor:
    x = x.flatten(2).std(2) if x.dim() == 4 else x
    x = x - x.mean(1, keepdim=True)
    z = x / (x.norm(dim=1, keepdim=True) + 1e-8)
    return (z @ z.T).clamp(-1, 1)


def similar(heads: Any, k: int, h: Tensor, y: Tensor) -> Tensor:
    return (similarity(heads[f"similarity_{k}"](h)) - similarity(y)).square().mean()


Local = Callable[[Any, int, Tensor, Tensor, Loss], Tensor]
"""The loss of a segment that is not the last: of the heads, its number, its output, the labels (N, Z) and the loss."""


def plain(heads: Any, k: int, h: Tensor, y: Tensor, loss: Loss) -> Tensor:
    return loss(heads[f"head_{k}"](h))


def infopro(heads: Any, k: int, h: Tensor, y: Tensor, loss: Loss) -> Tensor:
    r = k / 2
    image = (X - X.min()) / (X.max() - X.min())
    pixels = heads[f"decoder_{k}"](h)
    reconstruction = -(image * pixels.log() + (1 - image) * (1 - pixels).log()).mean()
    return ((1 - r) * 5 + r * 0.2) * reconstruction + ((1 - r) * 0.05 + r * 0.5) * loss(heads[f"head_{k}"](h))


METHODS: dict[str, tuple[str, dict[str, Any], Local, float]] = {
    "auglocal": ("auglocal", {"d": 2}, plain, 1.0),
    "dcl": ("dcl", {}, lambda heads, k, h, y, loss: loss(heads[f"head_{k}"](h, heads.dictionary())), 1.0),
    "dgl": ("dgl", {}, plain, 1.0),
    "prediction": ("predsim", {"terms": "pred"}, plain, 1.0),
    "predsim": (
        "predsim",
        {"beta": 0.75},
        lambda heads, k, h, y, loss: 0.75 * similar(heads, k, h, y) + 0.25 * plain(heads, k, h, y, loss),
        0.25,
    ),
    "infopro-softmax": ("infopro", {"loss": "softmax"}, infopro, 1.0),
    "deep-supervision": ("deep-supervision", {}, plain, 1.0),
    "backprop": ("backprop", {}, plain, 1.0),
}
"""The method, its options, its local losses written out, and the weight of the loss of the output."""


def by_hand(local: LocalModel, y: Tensor, loss: Loss, supervise: Local, output: float) -> list[Tensor]:
    """Train ``local`` by one step of gradient descent, and return its losses."""
    net, heads, plan = local.trunk, local.heads, local.plan
    parameters = dict(local.named_parameters())
    h, left, values, gradients = X, dict(PIECES), [], []

    def update(names: Sequence[str], found: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for name, gradient in zip(names, found, strict=True):
                parameters[name] -= LR * gradient

    summed = plan.losses[0].route.stop > 0 or plan.method == "backprop"
    total = torch.zeros((), dtype=torch.float64)
    for segment in plan.segments.segments:
        h = h if summed else h.detach()
        for end in list(left):
            h = left.pop(end)(net, h)
            if end == segment.ends_at:
                break
        k, last = segment.index, segment.index == len(plan.segments) - 1
        value = output * loss(h) if last else supervise(heads, k, h, y, loss)
        total = total + value
        if summed and not last:
            continue
        value = total if summed else value
        names = sorted(plan.reach(plan.losses[-1 if summed else k]))
        found = torch.autograd.grad(value, [parameters[name] for name in names])
        values.append(value.detach())
        if plan.update == "immediate":
            update(names, found)
        else:
            gradients.append((names, found))
    for names, found in gradients:
        update(names, found)
    return values


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", METHODS)
def test_a_step_equals_one_written_by_hand(name: str, case: str) -> None:
    method, options, supervise, output = METHODS[name]
    asked, y, loss = CASES[case]
    torch.manual_seed(0)
    recipe = {"method": method, "options": options}
    local = localize.transform(ResNet().double(), recipe, example_input=X, loss=asked).train()
    with torch.no_grad():
        for parameter in local.heads.parameters():  # heads that start at zero hand nothing back
            parameter.add_(0.1 * torch.randn_like(parameter))
    twin = copy.deepcopy(local)

    result = local.step(X, y, torch.optim.SGD(local.param_groups(lr=LR), lr=LR))
    expected = by_hand(twin, y if y.is_floating_point() else hot(), loss, supervise, output)

    torch.testing.assert_close(list(result.losses.values()), expected, rtol=1e-12, atol=0)
    for (key, found), wanted in zip(local.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12, msg=lambda told, key=key: f"{key}: {told}")


@pytest.mark.parametrize(
    ("method", "asked", "y"),
    [
        ("dcl", {"name": "focal", "smoothing": 0.1, "weights": W.tolist()}, SOFT),
        ("predsim", "bce", SEVERAL),
        ("dfa", None, SOFT),
        ("drtp", {"weights": W.tolist()}, IDS),
        ("backprop", {"weights": W.tolist(), "smoothing": 0.1}, SOFT),
    ],
)
def test_labels_and_losses_pass_the_whole_audit(method: str, asked: Any, y: Tensor) -> None:
    local = localize.transform(ResNet(), method, example_input=X.float(), loss=asked).train()

    localize.audit(local, (X.float(), y.float() if y.is_floating_point() else y)).raise_if_failed()


def test_the_error_that_dfa_feeds_back_is_that_of_the_soft_labels() -> None:
    local = localize.transform(ResNet().double(), "dfa", example_input=X).train()
    weight = local.trunk.blocks[0].conv2.weight
    twin = copy.deepcopy(local)

    local.step(X, SOFT, torch.optim.SGD(local.param_groups(lr=0.0), lr=0.0))

    net = twin.trunk
    h = net.blocks[0](F.relu(net.bn(net.conv(X))))
    scores = net.fc(net.blocks[2](net.blocks[1](h.detach())).mean((2, 3))).detach()
    direction = twin.heads.feedback_0(scores.softmax(1) - SOFT)
    (expected,) = torch.autograd.grad((h * direction).sum(), [net.blocks[0].conv2.weight])
    torch.testing.assert_close(weight.grad, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", ["drtp", "predsim", "ll-bpf"])
def test_soft_labels_that_are_one_hot_train_as_class_ids_do(method: str) -> None:
    states = []
    for y in (IDS, hot()):
        torch.manual_seed(0)
        local = localize.transform(ResNet().double(), method, example_input=X).train()
        local.step(X, y, torch.optim.SGD(local.param_groups(lr=LR), lr=LR))
        states.append(local.state_dict())

    torch.testing.assert_close(*states, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", [name for name in methods.names() if name not in methods.taking("soft")])
def test_a_method_that_needs_class_ids_says_why_and_which_do_not(name: str) -> None:
    plan = labels.plan(name, {})
    trunk = plan.segments.trunk
    local = localize.transform(trunk.model, name, example_input=torch.empty(2, *trunk.input_shape)).train()
    soft = torch.full((2, trunk.num_classes), 1 / trunk.num_classes)

    with pytest.raises(InputError) as caught:
        local.step(torch.randn(2, *trunk.input_shape), soft, torch.optim.SGD(local.param_groups(lr=LR), lr=LR))

    told = str(caught.value)
    assert plan.labels.why in told and plan.labels.why
    assert all(other in told for other in methods.taking("soft"))


@pytest.mark.parametrize("name", methods.names())
def test_what_a_method_declares_is_what_its_plan_takes(name: str) -> None:
    compared = 0
    for options in (options for method, options in labels.choices() if method == name):
        method = methods.create(name, **{**labels.DEFAULTS.get(name, {}), **options})
        try:
            found = labels.kinds(name, options)
        except LocalizeError:  # this choice does not fit the small net
            continue
        assert found == labels_of(method), options
        compared += 1
    assert compared


def test_the_table_of_the_docs_is_current() -> None:
    assert labels.PAGE.read_text(encoding="utf-8") == labels.written()


def test_a_method_from_outside_that_says_nothing_needs_class_ids() -> None:
    class Other:
        name = "other"

    assert labels_of(Other()) == ("ids",)


def test_methods_that_take_soft_labels_are_named_with_the_option_that_they_need() -> None:
    found = methods.taking("soft")

    assert {"auglocal", "dcl", "dgl", "predsim", "backprop", "infopro (loss=softmax)"} <= set(found)
    assert not {"infopro", "ff", "symba", "pff", "ll-cont", "feat", "cfl"} & set(found)
