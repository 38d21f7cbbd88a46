"""A recorded graph does what the model does, in either mode and for any batch size, and leaves the model alone."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import Tensor, fx, nn

from localize import zoo
from localize.errors import ModelError, TraceError
from localize.trace import trace
from tests.nets import ALL, Recurrent, ResNet


def run(model: nn.Module, graph: fx.Graph, x: Tensor, *, training: bool) -> Tensor:
    module = fx.GraphModule(model, graph)
    model.train(training)
    module.training = training
    torch.manual_seed(3)
    return module(x)


def original(model: nn.Module, x: Tensor, *, training: bool) -> Tensor:
    model.train(training)
    torch.manual_seed(3)
    return model(x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("net", [*ALL.values(), Recurrent])
def test_the_graph_equals_the_model_bit_for_bit(net: type[nn.Module], training: bool) -> None:
    model = net()
    graph = trace(model, torch.empty(2, 3, 8, 8)).graph
    x = torch.randn(6, 3, 8, 8)  # a batch size that was not recorded

    twin = copy.deepcopy(model)
    assert torch.equal(run(model, graph, x, training=training), original(twin, x, training=training))
    for (name, found), (_, expected) in zip(model.named_buffers(), twin.named_buffers(), strict=True):
        assert torch.equal(found, expected), name


DROPS = [
    ("timm/vit_tiny_patch16_224", {"img_size": 32, "drop_rate": 0.1, "drop_path_rate": 0.1, "attn_drop_rate": 0.1}),
    ("timm/convnext_atto", {"drop_rate": 0.1, "drop_path_rate": 0.1}),
    ("timm/swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 2, "attn_drop_rate": 0.1}),
    ("timm/ghostnet_050", {"drop_rate": 0.1}),
    ("tv/mobilenet_v3_small", {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), DROPS, ids=[name for name, _ in DROPS])
def test_one_graph_serves_both_modes_with_dropout_on(name: str, options: dict) -> None:
    model = zoo.create_model(name, 5, **options)
    size = options.get("img_size", 64)
    x = torch.randn(2, 3, size, size)
    graph = trace(model, x).graph

    for training in (True, False):
        twin = copy.deepcopy(model)
        assert torch.equal(run(model, graph, x, training=training), original(twin, x, training=training))


def test_the_user_s_model_and_random_states_are_untouched() -> None:
    model = zoo.create_model("timm/levit_128s", img_size=32).eval()
    model(torch.randn(1, 3, 32, 32))  # fills the cache of attention biases
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate()

    trace(model, torch.empty(1, 3, 32, 32))

    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert all(torch.equal(tensors[key], value) for key, value in model.state_dict().items())
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert not model.training


def test_hooks_that_a_generated_step_would_not_call_are_warned_of() -> None:
    model = ResNet()
    model.blocks[0].register_forward_hook(lambda module, inputs, output: None)

    with pytest.warns(UserWarning, match="hooks on 'blocks.0' are recorded once and not called"):
        trace(model, torch.empty(2, 3, 8, 8))


def test_frozen_and_tied_parameters_are_known_by_their_first_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model[2].weight = model[0].weight

    assert trace(model, torch.empty(2, 4)).num_classes == 2


class ReadsValue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.sum() > 0 else self.fc(-x)


class Draws(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * random.random()


class AsksForBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if len(x) < 4 else self.fc(x).relu()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ReadsValue(), r"(?s)reads the value of a tensor.*test_trace.py:\d+: return self.fc\(x\) if x.sum\(\) > 0"),
        (Draws(), r"(?s)Draws draws random numbers from Python or NumPy.*return self.fc\(x\) \* random.random\(\)"),
        (AsksForBatch(), "other things for other batch sizes"),
    ],
)
def test_what_cannot_be_recorded_is_refused_with_the_line(model: nn.Module, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        trace(model, torch.empty(2, 4))


def test_a_forward_that_fails_is_reported_with_the_line() -> None:
    with pytest.raises(TraceError, match=r"(?s)fails on an input of shape \(N, 7\)"):
        trace(nn.Sequential(nn.Linear(4, 2)), torch.empty(2, 7))


def test_wrapped_and_compiled_models_are_refused_with_the_attribute_to_pass() -> None:
    with pytest.raises(ModelError, match=r"(?s)is compiled.*model._orig_mod"):
        trace(torch.compile(ResNet()), torch.empty(2, 3, 8, 8))
    with pytest.raises(ModelError, match=r"(?s)wrapped in DataParallel.*model.module"):
        trace(nn.DataParallel(ResNet()), torch.empty(2, 3, 8, 8))
    with pytest.raises(ModelError, match="expected an nn.Module, got str"):
        trace("resnet18", torch.empty(2, 3, 8, 8))
    with pytest.raises(ModelError, match="no trainable parameter"):
        trace(ResNet().requires_grad_(False), torch.empty(2, 3, 8, 8))


class WithoutGradient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.fc = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.frozen(x)
        return self.fc(h)


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient


class Binary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(Sign.apply(self.fc1(x)))


class TensorHook(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        h.register_hook(lambda gradient: -gradient)
        return self.fc2(h)


class Assigns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.fc(x - self.mean)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (WithoutGradient(), r"(?s)gradients are switched off .* h = self.frozen\(x\)"),
        (Binary(), "(?s)Sign has a backward of its own .* return self.fc2"),
        (TensorHook(), "(?s)a hook on a tensor changes its gradient .* h.register_hook"),
        (Assigns(), "assigns another tensor to buffer 'mean'"),
    ],
)
def test_what_a_list_of_calls_does_not_show_is_refused_at_the_top(model: nn.Module, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        trace(model, torch.empty(2, 4))


@pytest.mark.parametrize("inner", [WithoutGradient(), Binary(), TensorHook()])
def test_and_below_the_top_its_module_is_called_whole(inner: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), inner)
    apply = torch.autograd.Function.__dict__["apply"]

    recorded = trace(model, torch.empty(2, 4))

    assert recorded.leaves in (("2",), ())
    assert [node.target for node in recorded.graph.nodes if node.op == "call_module"] == ["0", "1", "2"]
    assert torch.autograd.Function.__dict__["apply"] is apply
