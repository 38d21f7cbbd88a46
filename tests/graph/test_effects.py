"""Writes into the model's own tensors, and random draws, are part of the forward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import localize
from localize.errors import MethodError, TraceError
from localize.graph.trace import trace
from localize.ir import facts
from localize.runtime.model import LocalModel
from tests.corpus.state import ByHand, Counter, HandWritten


class Net(nn.Module):
    """Three layers, and something that is done in the forward."""

    def __init__(self, act: Callable[[Net, Tensor], None]) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Sequential(nn.Conv2d(i, 8, 3), nn.ReLU()) for i in (3, 8, 8))
        self.fc = nn.Linear(8, 5)
        self.register_buffer("n", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(8))
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        self.act(self, h)
        return self.fc(self.c(self.b(h)).mean((2, 3)))


def converted(model: nn.Module, method: str = "dcl", **options: object) -> LocalModel:
    """Return a net as a local model."""
    return localize.transform(model.train(), method, example_input=images(), **options)


def images() -> Tensor:
    """Return four images."""
    return torch.randn(4, 3, 12, 12)


def train(local: LocalModel, x: Tensor, steps: int = 3, lr: float = 0.0) -> None:
    """Train for some steps on one batch."""
    optimizer = torch.optim.SGD(local.param_groups(lr=lr), lr=lr)
    for _ in range(steps):
        local.step(x, torch.arange(len(x)) % 5, optimizer)


def text_of(local: LocalModel, k: int) -> str:
    """Return the function of segment ``k``."""
    return local.source.partition(f"def segment_{k}(")[2].partition("\n\n\n")[0]


@pytest.mark.parametrize("method", ["backprop", "auglocal", "dcl"])
@pytest.mark.parametrize("way", ["add", "item", "no_grad"])
def test_a_counter_counts_every_step(method: str, way: str) -> None:
    model = Counter(way)

    train(converted(model, method), images())

    assert model.n + model.many[2] == 3


def test_a_write_is_a_statement_of_its_segment_and_says_what_it_writes() -> None:
    local = converted(Counter("slice"))

    assert "    trunk.many[1:3].add_(1)\n" in text_of(local, 0)
    assert '"""Segment 0, up to a: 8x12x12. Writes many."""' in text_of(local, 0)
    nodes = local.plan.segments.segments[0].graph.nodes
    assert [facts(node).writes for node in nodes if facts(node).writes] == [("many",)]


@pytest.mark.parametrize("method", ["auglocal", "dcl", "mlaan"])
@pytest.mark.parametrize("data", [False, True])
def test_a_batch_norm_by_hand_has_the_statistics_of_torchs(method: str, data: bool) -> None:
    torch.manual_seed(0)
    own, torchs = ByHand(partial(HandWritten, data=data)), ByHand(nn.BatchNorm2d)
    convolutions = [[m for m in net.modules() if isinstance(m, nn.Conv2d)] for net in (own, torchs)]
    for one, other in zip(*convolutions, strict=True):
        other.load_state_dict(one.state_dict())
    x = images()

    train(converted(own, method), x)
    train(converted(torchs, method), x)

    for one, other in zip(own.net, torchs.net, strict=True):
        torch.testing.assert_close(one[1].moving_mean.flatten(), other[1].running_mean)
        torch.testing.assert_close(one[1].moving_var.flatten(), other[1].running_var)


def test_a_segment_that_runs_several_times_says_how_often_it_writes() -> None:
    local = converted(ByHand(HandWritten), "mlaan")
    train(local, images(), steps=1)

    segments = local.plan.segments.segments
    runs = [sum(loss.route.start <= s.index <= loss.route.stop for loss in local.plan.losses) for s in segments]
    assert max(runs) > 1
    for k, layer in enumerate(local.trunk.net):
        often = f", {runs[k]} times per step." if runs[k] > 1 else "num_batches_tracked."
        assert f"net.{k}.1.num_batches_tracked" in text_of(local, k).partition("\n")[2].partition("\n")[0]
        assert often in text_of(local, k)
        assert layer[1].num_batches_tracked == runs[k]


def test_what_is_read_before_a_write_in_an_earlier_segment_is_handed_on() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Sequential(nn.Conv2d(i, 8, 3), nn.ReLU()) for i in (3, 8, 8))
            self.fc = nn.Linear(8, 5)
            self.register_buffer("n", torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            before = self.n * 2
            h = self.a(x)
            self.n += 1
            return self.fc((self.c(self.b(h)) * before).mean((2, 3)))

    model, x = Late().train(), images()
    expected = model(x)
    model.n.fill_(1)
    local = localize.transform(model, "dcl", example_input=x)

    optimizer = torch.optim.SGD(local.param_groups(lr=0.0), lr=0.0)
    torch.testing.assert_close(local.step(x, torch.arange(4), optimizer).logits, expected.detach())


def test_an_assignment_to_a_buffer_is_repeated() -> None:
    def act(net: Net, h: Tensor) -> None:
        net.mean = 0.9 * net.mean + 0.1 * h.detach().mean((0, 2, 3))

    torch.manual_seed(0)
    model, x = Net(act), images()
    local, plain = converted(model), Net(act)
    plain.load_state_dict(model.state_dict())
    kept = model.mean

    train(local, x)
    for _ in range(3):
        plain(x)

    torch.testing.assert_close(model.mean, plain.mean)
    assert model.mean is kept


def test_an_assignment_of_another_shape_is_refused_with_its_line() -> None:
    def act(net: Net, h: Tensor) -> None:
        net.mean = torch.cat([net.mean, h.mean((0, 2, 3))])

    with pytest.raises(TraceError, match=r"(?s)another tensor to buffer 'mean'.*net.mean = torch.cat"):
        converted(Net(act))


def test_a_write_that_only_the_first_forward_makes_is_refused() -> None:
    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(8))
            self.fresh = True
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.conv(x)
            if self.fresh:
                self.scale.copy_(h.detach().std((0, 2, 3)))
                self.fresh = False
            return h / self.scale[:, None, None]

    model = nn.Sequential(Once(), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(TraceError, match="(?s)a second forward .* is not the same as the first.*self.scale.copy_"):
        converted(nn.Sequential(model, nn.Linear(8, 5)))


def test_a_draw_that_nothing_reads_is_recorded() -> None:
    trunk = trace(Net(lambda net, h: torch.rand(3)).train(), images())

    assert [node.name for node in trunk.graph.nodes if facts(node).draws] == ["rand"]


def test_a_draw_that_nothing_reads_is_made() -> None:
    local = converted(Net(lambda net, h: torch.rand(3)))
    x, y = images(), torch.arange(4)
    optimizer = torch.optim.SGD(local.param_groups(lr=0.0), lr=0.0)

    torch.manual_seed(1)
    local.step(x, y, optimizer)
    found = torch.rand(())
    torch.manual_seed(1)
    torch.rand(3)

    assert "torch.rand(3" in local.source
    assert torch.equal(found, torch.rand(()))


def test_a_parameter_that_is_only_read_without_its_gradient_is_not_trained_there() -> None:
    class Probed(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.a(x))
            with torch.no_grad():
                self.mean.copy_(self.fc.weight.mean(0))
            return self.fc(self.c(self.b(h)).mean((2, 3)))

    local = converted(Probed(lambda net, h: None))

    assert not local.plan.segments.tied
    assert "trunk.fc.weight" in local.plan.segments.segments[-1].parameters


def test_a_segment_that_writes_is_not_computed_again() -> None:
    local = converted(Counter("add"), "dgl", recompute="body")

    train(local, images())

    assert "segment_0" not in local.plan.recompute and "segment_1" in local.plan.recompute
    assert local.trunk.n == 3
    assert "segment_0 is not computed again" in local.plan.deviations[-1]


def test_a_net_that_writes_is_not_trained_on_micro_batches() -> None:
    with pytest.raises(MethodError, match="(?s)cannot train on micro-batches.*its forward writes n"):
        converted(Counter("add"), "dgl", micro_batch=2)
