"""A recorded graph does what the model does, in either mode and for any batch size, and leaves the model alone."""

from __future__ import annotations

import copy
import json
import pickle
import random
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor, fx, nn
from typer.testing import CliRunner

import localize
from localize import zoo
from localize.cli import app
from localize.errors import ModelError, OptionError, TraceError, UnknownNameError
from localize.graph.record import TakeWhole
from localize.graph.shapes import Shapes
from localize.graph.trace import trace
from localize.ir import facts
from tests.nets import ALL, Recurrent, ResNet

pytestmark = pytest.mark.lowest


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


def contents(value: object) -> object:
    """Return what a module holds: containers by their items, all else by identity."""
    if isinstance(value, dict):
        return {key: contents(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [contents(item) for item in value]
    return value if isinstance(value, bool | int | float | str | None) else id(value)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["timm/levit_128s", "timm/convit_tiny"])
def test_the_user_s_model_and_random_states_are_untouched(name: str, training: bool) -> None:
    model = zoo.create_model(name, img_size=32).train(training)
    for part in list(model.modules())[::3]:
        part.training = not training  # modes of its own
    model(torch.randn(2, 3, 32, 32))  # fills what the model keeps
    before = {path: contents(vars(module)) for path, module in model.named_modules()}
    tensors = {key: value.clone() for key, value in (*model.named_parameters(), *model.named_buffers())}
    versions = {key: value._version for key, value in (*model.named_parameters(), *model.named_buffers())}
    states = torch.get_rng_state(), random.getstate(), pickle.dumps(numpy.random.get_state())
    call = nn.Module.__call__

    trace(model, torch.empty(1, 3, 32, 32))

    assert {path: contents(vars(module)) for path, module in model.named_modules()} == before
    now = dict((*model.named_parameters(), *model.named_buffers()))
    assert all(torch.equal(value, now[key]) and versions[key] == now[key]._version for key, value in tensors.items())
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert states[2] == pickle.dumps(numpy.random.get_state())
    assert nn.Module.__call__ is call


def test_random_states_are_put_back_behind_an_error_too() -> None:
    model, states = Draws(), (torch.get_rng_state(), random.getstate())
    with pytest.raises(TraceError):
        trace(model, torch.empty(2, 4))
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()


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
        (
            ReadsValue(),
            r"(?s)reads the value of a tensor.*test_trace.py:\d+: return self.fc\(x\) if x.sum\(\) > 0.*"
            r"in the expression: x.sum\(\) > 0\n.*help: move it into the forward of a submodule",
        ),
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


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            WithoutGradient(),
            r"(?s)gradients of 'frozen' are switched off .* h = self.frozen\(x\).*requires_grad_\(False\)",
        ),
        (Binary(), "(?s)Sign has a backward of its own .* return self.fc2"),
        (TensorHook(), "(?s)a hook on a tensor changes its gradient .* h.register_hook"),
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


# ------------------------------------------------------------------------------------ what a forward leaves to the next


class KeepsInEval(nn.Module):
    """Keeps what it has computed from its weights, and drops it in train mode (as LeViT does)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.table, self.kept = nn.Linear(4, 4), nn.Parameter(torch.randn(8)), {}

    def train(self, mode: bool = True) -> nn.Module:
        self.kept = {}
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.table[::2] if self.training else self.kept.get("bias")
        if bias is None:
            bias = self.kept["bias"] = self.table[::2]
        return self.fc(x) + bias


class MakesIndices(nn.Module):
    """Makes a buffer of the right size in its first forward (as ConViT does)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("steps", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if len(self.steps) != x.shape[1]:
            self.steps = torch.arange(x.shape[1], device=x.device).to(x.dtype)
        return self.fc(x) * self.steps


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("kind", [KeepsInEval, MakesIndices])
def test_what_does_not_depend_on_the_input_is_computed_anew(kind: type[nn.Module], warm: bool) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), kind()), torch.randn(6, 4)
    if warm:
        model.eval()(x)
    recorded = trace(model, torch.empty(2, 4))

    assert recorded.leaves == () and not recorded.eval_differs
    for training in (False, True, False):
        for _ in range(2):
            assert torch.equal(run(model, recorded.graph, x, training=training), original(model, x, training=training))


def test_a_buffer_that_the_first_forward_makes_is_no_difference_to_the_audit() -> None:
    model = nn.Sequential(nn.Linear(4, 4), MakesIndices(), nn.Linear(4, 2))
    local = localize.transform(model, example_input=torch.empty(2, 4))
    localize.audit(local, (torch.randn(4, 4), torch.tensor([0, 1, 0, 1]))).raise_if_failed()


class KeepsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.last = nn.Linear(4, 4), None

    def forward(self, x: Tensor) -> Tensor:
        last, self.last = self.last, x.detach().mean(0)
        return self.fc(x) if last is None else self.fc(x - last)


class Decays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.scale = nn.Linear(4, 4), torch.ones(())

    def forward(self, x: Tensor) -> Tensor:
        self.scale = self.scale * 0.9
        return self.fc(x) * self.scale


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.count = nn.Linear(4, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 2
        return self.fc(x) * self.count


class StartsFromData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.shift, self.started = nn.Linear(4, 4), nn.Parameter(torch.zeros(4)), False

    def forward(self, x: Tensor) -> Tensor:
        if not self.started:
            self.shift.data.copy_(x.mean(0))
            self.started = True
        return self.fc(x - self.shift)


@pytest.mark.parametrize("kind", [KeepsLast, Decays, Counts, StartsFromData])
def test_a_forward_that_depends_on_those_before_is_refused(kind: type[nn.Module]) -> None:
    with pytest.raises(TraceError, match="a second forward of Sequential is not the same as the first"):
        trace(nn.Sequential(nn.Linear(4, 4), kind()), torch.empty(2, 4))


class FillsByView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        padded = torch.zeros(len(x), 4, device=x.device)
        padded[:, :2].copy_(self.fc1(x)[:, :2])
        return self.fc2(padded) + padded


class DropsParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift, self.drop, self.fc = nn.Parameter(torch.randn(4)), nn.Dropout(0.5), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        shift = self.drop(self.shift)
        return self.fc(nn.functional.dropout(x, 0.5, self.training)) + shift


@pytest.mark.parametrize(("kind", "name"), [(FillsByView, "zeros"), (DropsParameter, "drop")])
def test_what_is_written_or_drawn_once_is_not_computed_anew(kind: type[nn.Module], name: str) -> None:
    model, x = kind(), torch.randn(6, 4)
    recorded = trace(model, torch.empty(2, 4))

    depends = {node.name: facts(node).depends for node in recorded.graph.nodes}
    assert depends[name] and not depends.get("shift")
    assert torch.equal(run(model, recorded.graph, x, training=True), original(model, x, training=True))


# ------------------------------------------------------------------------------------------------------------- leaves


def test_all_modules_that_cannot_be_recorded_are_found_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    init = TakeWhole.__init__
    monkeypatch.setattr(TakeWhole, "__init__", lambda self, paths: (found.append(tuple(paths)), init(self, paths))[1])
    inner = [nn.Sequential(nn.Linear(4, 4), kind()) for kind in (Wide, WideWithoutGradient, Wide)]

    recorded = trace(nn.Sequential(*inner), torch.empty(2, 4))

    assert recorded.leaves == ("0.1", "1.1", "2.1")
    assert found == [("0.1", "1.1", "2.1")]


held = torch.no_grad


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return Sign.apply(self.fc(x))


class WideWithoutGradient(Wide):
    def forward(self, x: Tensor) -> Tensor:
        with held():
            return self.fc(x)


class Either(nn.Module):
    """Decides on values."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.fc1(x)
        return self.fc2(x)


class MeanOfPositive(Either):
    """Picks by a mask: how many values depends on the values."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc1(x) + x[x > 0].mean().nan_to_num()


class ThroughNumpy(Either):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc1(x) * torch.from_numpy(numpy.sign(x.detach().cpu().numpy())).to(x.device)


class Lists(Either):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc1(x) * max(x.abs().mean(0).tolist())


class DrawsInside(Either):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc1(x) if random.random() < 0.5 else x


MEAN = torch.tensor([1.0, 2.0, 3.0, 4.0])


class ReadsGlobal(Either):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc1(x) - MEAN


HARD = [
    (Either, r"reads the value of a tensor.*if x.sum\(\) > 0:\n  in the expression: x.sum\(\) > 0"),
    (MeanOfPositive, r"needs the values of a tensor.*x\[x > 0\].mean\(\).*in the expression: x\[x > 0\]"),
    (ThroughNumpy, r"needs the values of a tensor.*in the expression: x.detach\(\).cpu\(\)"),
    (Lists, r"reads the value of a tensor \(tolist\).*in the expression: x.abs\(\).mean\(0\).tolist\(\)"),
    (DrawsInside, "draws random numbers from Python or NumPy"),
    (ReadsGlobal, "needs the values of a tensor.*in the expression: self.fc1"),
]


@pytest.mark.parametrize(("kind", "message"), HARD)
def test_a_module_that_no_list_of_calls_shows_is_named_and_can_be_taken_whole(
    kind: type[nn.Module], message: str
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), kind()), nn.Linear(4, 2))
    with pytest.raises(TraceError, match=rf"(?s){message}.*help: .*leaf=\('1.1',\) takes the module around it whole"):
        trace(model, torch.empty(2, 4))

    recorded = trace(model, torch.empty(2, 4), leaves=("1.1",))

    assert recorded.leaves == ("1.1",)
    for x in (torch.randn(5, 4), torch.randn(5, 4) - 3):
        random.seed(1)
        found = run(model, recorded.graph, x, training=True)
        random.seed(1)
        assert torch.equal(found, original(model, x, training=True))


def test_a_leaf_whose_output_has_the_shape_of_its_values_is_refused() -> None:
    class Picks(Either):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc1(x)[:, : 2 + int(x.abs().sum() > 0)]

    with pytest.raises(TraceError, match=r"(?s)module '0' returns other shapes for other values.*\(3, 2\).*\(3, 3\)"):
        trace(nn.Sequential(Picks(), nn.Flatten()), torch.empty(2, 4), leaves=("0",))


def test_leaves_that_the_forward_does_not_call_are_refused_with_the_nearest() -> None:
    model = ResNet()
    with pytest.raises(UnknownNameError, match=r"(?s)ResNet has no module 'block.0'.*did you mean 'blocks.0'"):
        trace(model, torch.empty(2, 3, 8, 8), leaves=("block.0",))
    with pytest.raises(UnknownNameError, match="(?s)does not call module 'blocks'.*a list of modules"):
        trace(Listed(), torch.empty(2, 4), leaves=("blocks",))
    with pytest.raises(OptionError, match="leaves are named by a tuple"):
        trace(model, torch.empty(2, 3, 8, 8), leaves="blocks.0")


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 2)])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1](self.blocks[0](x))


class Scales(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sub_(0.5)


class ScalesSecond(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        mask.mul_(2.0)
        return self.fc(x * mask)


def test_a_forward_that_writes_into_its_second_input_is_refused() -> None:
    with pytest.raises(TraceError, match=r"(?s)writes into its input.*mask.mul_\(2.0\)"):
        trace(ScalesSecond(), (torch.empty(2, 4), torch.empty(2, 4)))


def test_a_forward_that_writes_into_its_input_is_refused() -> None:
    with pytest.raises(TraceError, match=r"(?s)writes into its input.*return x.sub_\(0.5\).*x = x.clone\(\) first"):
        trace(nn.Sequential(Scales(), nn.Linear(4, 2)), torch.empty(2, 4))


def test_leaves_are_kept_in_the_folder_s_recipe_and_named(tmp_path: Path) -> None:
    def printed(*words: str) -> str:
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
        return result.stdout

    inspected = json.loads(printed("inspect", "resnet20", "--leaf", "layer1.1", "--leaf", "layer3", "--json"))
    assert inspected["leaves"] == ["layer1.1", "layer3"]
    assert "taken as a whole, with no cut inside: layer3" in printed("inspect", "resnet20", "--leaf", "layer3")
    out = tmp_path / "out"
    printed("convert", "resnet20", "-m", "backprop", "--leaf", "layer1.1", "-o", str(out))
    assert "leaf: [layer1.1]" in (out / "recipe.yaml").read_text()
    assert "called whole, without a cut inside: `layer1.1`" in (out / "README.md").read_text()
    assert json.loads((out / "plan.json").read_text())["leaves"] == ["layer1.1"]
    assert "trunk.layer1[1](" in (out / "train_step.py").read_text()
    local = localize.transform(
        localize.zoo.create_model("cifar/resnet20"), out, example_input=torch.zeros(2, 3, 32, 32)
    )
    assert local.source == (out / "train_step.py").read_text()


# ------------------------------------------------------------------------------------------------------------- shapes


def test_shapes_that_are_remembered_are_those_that_torch_finds() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten())
    net, x = net.to("meta"), torch.empty(2, 3, 8, 8, device="meta")

    def walk(dtype: torch.dtype) -> list[tuple]:
        values = [x.to(dtype), x.to(dtype).to(memory_format=torch.channels_last)]
        values += [net(x), *torch.var_mean(x, 1), x.sum(1, keepdim=True), x.sum(1, keepdim=False), x + 1, x.mul(True)]
        values += [torch.arange(3, device="meta") * 1.0, torch.arange(3, device="meta") * 1, x.clone().add_(1)]
        return [(v.shape, v.stride(), v.dtype, v.requires_grad) for v in values]

    expected = [walk(torch.float32), walk(torch.float64)]
    with Shapes():
        assert [walk(torch.float32), walk(torch.float64)] == expected  # found
        assert [walk(torch.float32), walk(torch.float64)] == expected  # and remembered


def test_operations_in_place_are_counted_when_they_are_remembered() -> None:
    x = torch.empty(2, 3, device="meta")
    with Shapes() as shapes:
        for _ in range(2):
            version = x._version
            assert x.mul_(2) is x
            assert x._version == version + 1
        assert not shapes.random
        torch.nn.functional.dropout(x, 0.5)
        assert shapes.random
