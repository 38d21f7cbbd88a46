"""What a loop of one's own does around ``local.step`` trains to the weights of a loop that has no ``step``.

The other loop calls the segments' forwards and the heads, and does everything else itself: one cross-entropy and one
backward for each segment, clipping, hooks, learning rates, scaling, averages, optimizers.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import swa_utils

import localize
from localize import LocalModel
from localize.errors import OptionError
from tests.nets import MLP, ResNet

BATCHES = [(torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(i)), torch.arange(6) % 5) for i in range(4)]
X, _ = BATCHES[0]


def pair(method: str = "ll-pred", net: type[nn.Module] = MLP, **options: Any) -> tuple[LocalModel, LocalModel]:
    """Return two local models of the same weights."""
    local = made(method, net, tuple(options.items()))
    return copy.deepcopy(local), copy.deepcopy(local)


@functools.cache
def made(method: str, net: type[nn.Module], options: tuple[tuple[str, Any], ...]) -> LocalModel:
    torch.manual_seed(0)
    return localize.transform(net().train(), method, example_input=X, **dict(options))


def sgd(local: LocalModel, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(local.param_groups(), **{"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3} | options)


def parameters(local: LocalModel, k: int) -> list[nn.Parameter]:
    """Return what loss ``k`` trains."""
    named = dict(local.named_parameters())
    return [named[name] for name in local.reached()[k]]


def train_by_hand(
    local: LocalModel,
    batch: tuple[Tensor, Tensor],
    *,
    begin: Callable[[], None],
    each: Callable[[int], None] = lambda k: None,
    end: Callable[[], None] = lambda: None,
    backward: Callable[[Tensor], None] = lambda loss: loss.backward(),
) -> None:
    """Train on a batch: ``begin``, for every segment k a backward and ``each(k)``, then ``end``."""
    begin()
    h, y = batch
    for k, segment in enumerate(local.plan.segments.segments):
        h = local.functions_of_text[segment.name](local.trunk, h.detach())
        head = f"head_{k}"
        backward(F.cross_entropy(local.heads[head](h) if head in local.heads else h, y))
        each(k)
    end()


def assert_same(local: LocalModel, other: LocalModel) -> None:
    for name, value in local.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_a_hook_of_the_optimizer_clips_the_gradient_of_all_losses() -> None:
    local, other = pair("auglocal", d=2)
    assert local.plan.update == "end"
    optimizer, by_hand = sgd(local), sgd(other)

    def clip(optimizer: torch.optim.Optimizer, *given: Any) -> None:
        clip_grad_norm_(local.parameters(), 0.1)

    optimizer.register_step_pre_hook(clip)
    norms = []

    def end() -> None:
        norms.append(float(clip_grad_norm_(other.parameters(), 0.1)))
        by_hand.step()

    for x, y in BATCHES:
        local.step(x, y, optimizer)
        train_by_hand(other, (x, y), begin=by_hand.zero_grad, end=end)

    assert min(norms) > 0.1, "every step was clipped"
    assert_same(local, other)


def test_the_same_hook_clips_the_gradient_of_each_loss_where_each_is_updated_at_once() -> None:
    local, other = pair()
    assert local.plan.update == "immediate"
    optimizer = sgd(local)

    def clip(optimizer: torch.optim.Optimizer, *given: Any) -> None:
        clip_grad_norm_(local.parameters(), 0.1)

    optimizer.register_step_pre_hook(clip)
    losses = range(len(other.plan.losses))
    own = [torch.optim.SGD(parameters(other, k), lr=0.1, momentum=0.9, weight_decay=1e-3) for k in losses]

    def each(k: int) -> None:
        reached = {id(p) for p in parameters(other, k)}
        clip_grad_norm_([p for p in other.parameters() if id(p) in reached], 0.1)  # squares are summed in this order
        own[k].step()

    for x, y in BATCHES:
        local.step(x, y, optimizer)
        train_by_hand(other, (x, y), begin=other.zero_grad, each=each)

    assert_same(local, other)


def test_a_hook_over_what_each_loss_reaches_clips_each_where_all_are_updated_at_the_end() -> None:
    local, other = pair("auglocal", d=2)
    optimizer, by_hand = sgd(local), sgd(other)

    def clip(optimizer: torch.optim.Optimizer, *given: Any) -> None:
        for k in range(len(local.plan.losses)):
            clip_grad_norm_(parameters(local, k), 0.1)

    optimizer.register_step_pre_hook(clip)
    for x, y in BATCHES:
        local.step(x, y, optimizer)
        train_by_hand(
            other, (x, y), begin=by_hand.zero_grad, each=lambda k: clip_grad_norm_(parameters(other, k), 0.1),
            end=by_hand.step,
        )  # fmt: skip

    assert_same(local, other)


def clipping(local: LocalModel, norm: float) -> LocalModel:
    """As docs/loops.md has it: clip what each loss adds, also to parameters that several losses train."""
    trained = [p for p in local.parameters() if p.requires_grad]

    def around(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def clipped(*given: Any) -> Any:
            before = [p.grad for p in trained]
            for p in trained:
                p.grad = None
            returned = function(*given)
            clip_grad_norm_(trained, norm)
            for p, held in zip(trained, before, strict=True):
                if held is not None:
                    p.grad = held if p.grad is None else held + p.grad
            return returned

        return clipped

    return local.with_functions(around)


def test_what_each_loss_adds_to_shared_parameters_is_clipped_by_functions_around_the_step() -> None:
    local, other = pair("mlaan", net=ResNet, window=2)
    reached = local.reached()
    shared = set(reached[0]) & set(reached[1])
    assert local.plan.update == "end"
    assert shared
    added: list[dict[str, Tensor]] = []
    named = dict(other.named_parameters())

    def around(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*given: Any) -> Any:
            before = {n: p.grad.clone() for n, p in named.items() if p.grad is not None}
            returned = function(*given)
            added.append({n: p.grad - before.get(n, 0) for n, p in named.items() if p.grad is not None})
            return returned

        return counted

    other.with_functions(around).step(*BATCHES[0], sgd(other, lr=0.0))
    clipping(local, 0.1).step(*BATCHES[0], sgd(local, lr=0.0))

    for name, parameter in local.named_parameters():
        parts = []
        for loss in added:
            norm = torch.stack([gradient.norm() for gradient in loss.values()]).norm()
            assert norm > 0.1
            parts += [loss[name] * 0.1 / (norm + 1e-6)] if name in loss else []
        if parts:
            torch.testing.assert_close(parameter.grad, sum(parts), rtol=1e-4, atol=1e-6)


def test_hooks_of_parameters_and_of_the_modules_that_the_text_calls_run() -> None:
    local, other = pair("auglocal", net=ResNet, d=2)
    optimizer, by_hand = sgd(local), sgd(other)
    seen: list[str] = []

    def halve(parameter: Tensor) -> None:
        parameter.grad *= 0.5

    for one in (local, other):
        one.trunk.conv.weight.register_hook(lambda gradient: gradient.sign())
        one.trunk.fc.weight.register_post_accumulate_grad_hook(halve)
        one.trunk.blocks[0].conv2.register_full_backward_hook(lambda *given: seen.append("conv2"))
        one.trunk.blocks[0].register_forward_hook(lambda *given: seen.append("block"))

    for x, y in BATCHES:
        local.step(x, y, optimizer)
        train_by_hand(other, (x, y), begin=by_hand.zero_grad, end=by_hand.step)

    assert seen == ["conv2"] * 2 * len(BATCHES), "a container is not called: what is in it is"
    assert set(local.trunk.conv.weight.grad.unique().tolist()) <= {-1.0, 0.0, 1.0}
    assert_same(local, other)


@pytest.mark.parametrize("update", ["end", "immediate"])
@pytest.mark.parametrize("name", ["cosine", "onecycle", "timm"])
def test_schedulers_set_learning_rates_and_momentum(update: str, name: str) -> None:
    local, other = pair("auglocal", net=ResNet, d=2, update=update)
    optimizer, by_hand = sgd(local), sgd(other)
    losses = range(len(other.plan.losses))
    own = [torch.optim.SGD(parameters(other, k), lr=0.1, momentum=0.9, weight_decay=1e-3) for k in losses]
    others = [by_hand] if update == "end" else own
    steps: list[Callable[[int], None]] = []
    for one in (optimizer, *others):
        if name == "timm":
            scheduler, _ = create_scheduler_v2(one, sched="cosine", num_epochs=4, warmup_epochs=1, warmup_lr=0.01)
            steps.append(lambda i, scheduler=scheduler: scheduler.step(i + 1))
        elif name == "cosine":
            cosine = torch.optim.lr_scheduler.CosineAnnealingLR(one, len(BATCHES))
            steps.append(lambda i, cosine=cosine: cosine.step())
        else:
            cycle = torch.optim.lr_scheduler.OneCycleLR(one, 0.2, total_steps=len(BATCHES) + 1)
            steps.append(lambda i, cycle=cycle: cycle.step())

    for i, (x, y) in enumerate(BATCHES):
        local.step(x, y, optimizer)
        if update == "end":
            train_by_hand(other, (x, y), begin=by_hand.zero_grad, end=by_hand.step)
        else:
            train_by_hand(other, (x, y), begin=other.zero_grad, each=lambda k: own[k].step())
        for step in steps:
            step(i)

    assert_same(local, other)
    assert optimizer.param_groups[0]["lr"] != 0.1


def test_a_gradient_scaler_serves_all_losses_as_in_pytorch_s_examples() -> None:
    local, other = pair("auglocal", d=2, loss_scaling=True)
    assert local.plan.update == "end"
    optimizer, by_hand = sgd(local, lr=0.01), sgd(other, lr=0.01)
    scaler, another = (torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=2) for _ in range(2))
    scales = []

    def end() -> None:
        another.step(by_hand)
        another.update()

    for x, y in (*BATCHES, *BATCHES):
        with torch.autocast("cpu", torch.float16, cache_enabled=False):
            local.step(x, y, optimizer, scaler=scaler)
            train_by_hand(
                other, (x, y), begin=by_hand.zero_grad, end=end, backward=lambda loss: another.scale(loss).backward()
            )
        scales.append(scaler.get_scale())

    assert scaler.state_dict() == another.state_dict()
    assert min(scales) < 2.0**20, "some update was left out"
    assert scales[-1] != scales[0]
    assert_same(local, other)


@pytest.mark.parametrize("average", ["torch", "timm"])
@pytest.mark.parametrize("whole", [True, False], ids=["local", "model"])
def test_averages_of_the_weights_are_those_of_a_plain_loop(average: str, whole: bool) -> None:
    local, other = pair("auglocal", net=ResNet, d=2)
    optimizer, by_hand = sgd(local), sgd(other)
    part: Callable[[LocalModel], nn.Module] = (lambda one: one) if whole else (lambda one: one.export())
    mean: Any
    if average == "torch":
        mean = swa_utils.AveragedModel(part(local), multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True)
        update = mean.update_parameters
    else:
        mean = ModelEmaV3(part(local), decay=0.9)
        update = mean.update
    kept = {name: value.clone() for name, value in part(other).state_dict().items()}

    for i, (x, y) in enumerate(BATCHES):
        local.step(x, y, optimizer)
        update(part(local))
        train_by_hand(other, (x, y), begin=by_hand.zero_grad, end=by_hand.step)
        for name, value in part(other).state_dict().items():
            first = average == "torch" and i == 0  # it begins with the first weights that it is given
            kept[name] = value.clone() if first or not value.is_floating_point() else 0.9 * kept[name] + 0.1 * value

    for name, value in mean.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, kept[name], rtol=1e-5, atol=1e-6, msg=name)
    before = [value.clone() for value in mean.module.state_dict().values()]
    swa_utils.update_bn([x for x, _ in BATCHES], mean.module.train())
    assert any(not torch.equal(a, b) for a, b in zip(before, mean.module.state_dict().values(), strict=True))


@pytest.mark.parametrize("update", ["end", "immediate"])
def test_an_optimizer_for_each_block_trains_as_they_would_alone(update: str) -> None:
    local, other = pair("auglocal", net=ResNet, d=2, update=update)

    def optimizers(one: LocalModel) -> list[torch.optim.Optimizer]:
        kinds: Iterable[Callable[..., torch.optim.Optimizer]] = (torch.optim.SGD, torch.optim.AdamW)
        groups = one.param_groups(by="block")
        kinds = (torch.optim.AdamW if group["name"].startswith("head") else torch.optim.SGD for group in groups)
        return [kind([group], lr=0.01) for kind, group in zip(kinds, groups, strict=True)]

    several, by_hand = optimizers(local), optimizers(other)
    names = [one.param_groups[0]["name"] for one in several]
    assert names == ["segment_0", "segment_1", "segment_2", "head_0", "head_1"]
    schedules = [torch.optim.lr_scheduler.ExponentialLR(one, 0.5) for one in (several[0], by_hand[0])]

    def step(k: int | None = None) -> None:
        for one in by_hand:
            if k is None or one.param_groups[0]["name"].endswith(f"_{k}"):
                one.step()

    for batch in BATCHES:
        local.step(*batch, several)
        if update == "end":
            train_by_hand(other, batch, begin=other.zero_grad, end=step)
        else:
            train_by_hand(other, batch, begin=other.zero_grad, each=step)
        for schedule in schedules:
            schedule.step()

    assert_same(local, other)


def test_one_optimizer_or_several_make_no_difference_to_moments_that_each_loss_has_of_a_shared_block() -> None:
    local, other = pair("dcl", net=ResNet)
    one = torch.optim.AdamW(local.param_groups(), lr=0.01)
    several = [torch.optim.AdamW([group], lr=0.01) for group in other.param_groups(by="block")]
    assert len(several) == 5

    for batch in BATCHES:
        local.step(*batch, one)
        other.step(*batch, several)

    assert_same(local, other)


def test_several_optimizers_share_a_scaler_and_batches() -> None:
    local, other = pair("auglocal", d=2, loss_scaling=True, update="immediate")
    one = sgd(local)
    several = [torch.optim.SGD([g], lr=0.1, momentum=0.9, weight_decay=1e-3) for g in other.param_groups(by="block")]
    scalers = [torch.amp.GradScaler("cpu", init_scale=8.0) for _ in range(2)]

    for i, (x, y) in enumerate(BATCHES):
        local.step(x, y, one, scaler=scalers[0], batch=(i % 2, 2))
        other.step(x, y, several, scaler=scalers[1], batch=(i % 2, 2))

    assert_same(local, other)


def test_optimizers_that_overlap_or_leave_something_out_are_refused() -> None:
    local, _ = pair()
    groups = local.param_groups(by="block")

    def of(chosen: Sequence[dict[str, Any]]) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD([dict(group)], lr=0.1) for group in chosen]

    with pytest.raises(OptionError, match=r"parameters are held by two optimizers.\n  e.g. .*\n  help: .*by=\"block\""):
        local.step(*BATCHES[0], of([*groups, groups[0]]))
    with pytest.raises(OptionError, match="the optimizers lack 2 parameters that this step trains"):
        local.step(*BATCHES[0], of(groups[1:]))
    with pytest.raises(OptionError, match="by cannot be 'layer'"):
        local.param_groups(by="layer")  # type: ignore[arg-type]
