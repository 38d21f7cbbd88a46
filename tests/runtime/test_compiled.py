"""A compiled step does what the text does: the same graph of operations, compiled once for equal segments."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import localize
from localize.runtime import compiled
from localize.runtime.compiled import CompiledModel
from localize.runtime.model import LocalModel
from tests import daily
from tests.methods.test_common import batch, transformed
from tests.nets import ALL, Block

Y = torch.tensor([0, 1, 2, 3, 4, 0])


@pytest.fixture
def as_recorded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Run graphs operation by operation, with torch's own kernels and in the text's memory format; yield the graphs."""
    found: list[Any] = []

    def kept(graph: Callable[..., Any], inputs: list[Tensor], options: dict[str, Any]) -> Callable[..., Any]:
        found.append(graph)
        return graph

    monkeypatch.setattr(torch._inductor, "compile", kept)
    monkeypatch.setattr(compiled, "FORMS", {})
    return found


def sgd(local: LocalModel) -> torch.optim.Optimizer:
    return torch.optim.SGD(local.param_groups(lr=0.05), lr=0.05, momentum=0.9)


def both(local: LocalModel) -> tuple[LocalModel, CompiledModel]:
    return local, localize.compile(copy.deepcopy(local))


def compare(
    plain: LocalModel, fast: CompiledModel, *, steps: int = 3, tolerance: float = 0.0, **scaling: float
) -> None:
    """Train both on the same batches and random numbers; losses, state and random state are equal."""
    optimizers = sgd(plain), sgd(fast)
    scalers = [torch.amp.GradScaler("cpu", enabled=bool(scaling), **scaling) for _ in optimizers]
    for _ in range(steps):
        x, y = batch()
        x = x.to(next(plain.parameters()).dtype)
        state = torch.get_rng_state()
        one = plain.step(x, y, optimizers[0], scaler=scalers[0])
        left = torch.get_rng_state()
        torch.set_rng_state(state)
        other = fast.step(x, y, optimizers[1], scaler=scalers[1])
        assert torch.equal(left, torch.get_rng_state())
        torch.testing.assert_close(dict(other.losses), dict(one.losses), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(dict(other.scores), dict(one.scores), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(fast.state_dict(), plain.state_dict(), rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------------------ recording


@pytest.mark.parametrize(
    ("method", "net"),
    daily.in_turn(
        [
            (name, "ResNet")
            for name in ("backprop", "auglocal", "dcl", "cfl", "mlaan", "infopro", "ff", "drtp", "predsim")
        ]
        + [(name, "ViT") for name in ("auglocal", "dcl", "dfa", "fa")]
        + [("dcl", "TwoStreams"), ("deep-supervision", "Dense"), ("accumulate", "MLP"), ("dcl", "Writes")],
        3,
    ),
)
def test_the_graph_computes_what_the_text_computes_bit_for_bit(method: str, net: str, as_recorded: list[Any]) -> None:
    plain, fast = both(transformed(method, net))

    compare(plain, fast)

    assert as_recorded
    assert {function.reason for function in fast.functions} == {""}


@pytest.mark.parametrize("recompute", ["none", "all"])
def test_micro_batches_of_the_first_size_run_compiled_and_the_rest_as_it_is(
    recompute: str, as_recorded: list[Any]
) -> None:
    local = localize.transform(
        ALL["MLP"](), "dcl", example_input=torch.empty(2, 3, 8, 8), micro_batch=4, recompute=recompute
    )
    plain, fast = both(local.train())

    compare(plain, fast)  # six images: four, and two

    assert all(function.signature for function in fast.functions)


def test_weights_that_get_the_same_gradient_do_not_share_it(as_recorded: list[Any]) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(5))
            self.fc = nn.Linear(192, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.flatten(1)) + (self.a + self.b)

    model = Sum()
    fast = localize.compile(localize.transform(model, "backprop", example_input=torch.empty(2, 3, 8, 8)))
    fast.step(*batch(), torch.optim.SGD(fast.param_groups(lr=0.0), lr=0.0))

    assert model.a.grad is not None
    assert model.b.grad is not None
    assert model.a.grad.untyped_storage().data_ptr() != model.b.grad.untyped_storage().data_ptr()


def test_gradients_that_are_there_are_added_to(as_recorded: list[Any]) -> None:
    """Parameters that several losses reach get the sum, as in the text."""
    plain, fast = both(transformed("deep-supervision", "ResNet"))

    compare(plain, fast, steps=1)

    for (name, parameter), other in zip(plain.named_parameters(), fast.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad), name


def test_under_autocast_it_computes_in_the_same_types(as_recorded: list[Any]) -> None:
    plain, fast = both(transformed("dcl", "ResNet"))

    with torch.autocast("cpu", torch.bfloat16):
        compare(plain, fast)

    assert any(
        "bfloat16" in node.format_node() for graph in as_recorded for node in graph.graph.nodes if node.op[0] == "c"
    )


def test_exact_parts_run_as_they_are_with_the_reason() -> None:
    local = localize.transform(ALL["ResNet"](), "dcl", example_input=torch.empty(2, 3, 8, 8), micro_batch=2)
    compiled = localize.compile(local)

    compiled.step(torch.randn(6, 3, 8, 8), Y, torch.optim.SGD(compiled.param_groups(lr=0.1)))

    assert {function.reason for function in compiled.functions} == {
        "with the BatchNorm of the whole batch, parts of it are swept several times."
    }


@pytest.mark.parametrize("options", [{}, {"micro_batch": 4}])
def test_the_scale_of_the_losses_is_an_input_of_the_graph(options: dict[str, Any], as_recorded: list[Any]) -> None:
    """It doubles behind every step. Where there is no scaler, it is one."""
    local = localize.transform(ALL["MLP"](), "dcl", example_input=torch.empty(2, 3, 8, 8), loss_scaling=True, **options)
    plain, fast = both(local.train())

    compare(plain, fast, steps=2, init_scale=3.0, growth_interval=1)
    compare(plain, fast, steps=1)

    assert {function.reason for function in fast.functions} == {""}


# ------------------------------------------------------------------------------------------------------------- fallback


def test_other_batches_modes_and_types_run_the_text_as_it_is(as_recorded: list[Any]) -> None:
    # Not a net with 1x1 convolutions of stride 2: their backward in channels_last corrupts the heap of torch 2.14.1.
    plain, fast = both(transformed("dcl", "Dense"))
    compare(plain, fast, steps=1)
    count = len(as_recorded)

    optimizers = sgd(plain), sgd(fast)
    for change in (
        lambda local: None,
        lambda local: local.trunk.norm.eval(),
        lambda local: local.to(memory_format=torch.channels_last),
        lambda local: local.double(),
    ):
        for local, optimizer in zip((plain, fast), optimizers, strict=True):
            change(local)
            dtype = next(local.parameters()).dtype
            local.step(torch.ones(4, 3, 8, 8, dtype=dtype), Y[:4], optimizer)
            local.step(torch.ones(6, 3, 8, 8, dtype=dtype), Y, optimizer)

    torch.testing.assert_close(fast.state_dict(), plain.state_dict(), rtol=1e-6, atol=1e-6)
    assert len(as_recorded) == count


class Asks(nn.Module):
    """Looks at values: the number of operations depends on them."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum().item() > 0 else x


class Layered(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 1, 1)
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.conv(x)).mean((2, 3)))


def test_a_segment_that_looks_at_values_runs_as_it_is_and_says_so(as_recorded: list[Any]) -> None:
    model = Layered(Block(4, 4), nn.Sequential(Asks(), Block(4, 4)), Block(4, 4))
    local = localize.transform(model, "dcl", example_input=torch.empty(2, 3, 8, 8), leaf=("blocks.1.0",))
    plain, fast = both(local.train())

    compare(plain, fast)

    reasons = [function.reason for function in fast.functions]
    assert sum(map(bool, reasons)) == 1
    assert any("DataDependentOutputException" in reason for reason in reasons)


def test_random_numbers_that_are_drawn_twice_are_left_to_the_text(as_recorded: list[Any]) -> None:
    local = localize.transform(ALL["ViT"](), "dcl", example_input=torch.empty(2, 3, 8, 8), recompute="body")
    plain, fast = both(local.train())

    compare(plain, fast)

    assert any("random numbers" in function.reason for function in fast.functions)


def test_what_cannot_be_compiled_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise RuntimeError("no C++ compiler\nwas found")

    monkeypatch.setattr(torch._inductor, "compile", broken)
    plain, fast = both(transformed("dcl", "ResNet"))

    compare(plain, fast)

    assert {function.reason for function in fast.functions} == {"RuntimeError: no C++ compiler"}
    assert fast.graphs == 0


@pytest.mark.parametrize("net", ["ResNet", "Dense"])
def test_on_a_cpu_convolutions_are_recorded_in_channels_last(
    net: str, as_recorded: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "FORMS", {"cpu": torch.channels_last})
    plain, fast = both(transformed("deep-supervision", net).double())

    compare(plain, fast, tolerance=1e-10)

    backward = {"op": "call_function", "target": torch.ops.aten.convolution_backward.default}
    entering = [node.args[1].meta["val"] for graph in as_recorded for node in graph.graph.find_nodes(**backward)]
    assert entering
    assert all(value.is_contiguous(memory_format=torch.channels_last) for value in entering)


# ------------------------------------------------------------------------------------------------------------- Inductor


@pytest.mark.slow
def test_equal_segments_share_one_compiled_graph() -> None:
    model = Layered(*(Block(4, 4) for _ in range(4)))
    plain, fast = both(localize.transform(model, "dcl", example_input=torch.empty(2, 3, 8, 8)).double().train())
    told: list[str] = []
    fast._tell = lambda function: told.append(function.name)

    compare(plain, fast, tolerance=1e-10)

    signatures = [function.signature for function in fast.functions]
    assert told == [function.name for function in fast.functions]
    assert len(signatures) == len(plain.plan.segments)
    assert "" not in signatures
    assert fast.graphs == len(set(signatures)) < len(signatures)
    assert fast.compile_seconds > 0


@pytest.mark.slow
def test_dropout_draws_what_the_text_draws() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Dropout(0.5), nn.Linear(8, 5))
    local = localize.transform(model, "backprop", example_input=torch.empty(2, 3, 8, 8)).double().train()

    compare(*both(local), tolerance=1e-10)


# ------------------------------------------------------------------------------------------------------------ the model


def test_it_is_copied_and_pickled_like_any_local_model(as_recorded: list[Any]) -> None:
    plain, fast = both(transformed("dcl", "ResNet"))
    compare(plain, fast)

    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert isinstance(other, CompiledModel)
        assert not other.functions
        compare(copy.deepcopy(plain), other)
        assert other.functions


def test_compiling_takes_the_modules_and_leaves_the_model_as_it_was(as_recorded: list[Any]) -> None:
    local = transformed("dcl", "ResNet")
    before = {name: id(tensor) for name, tensor in local.state_dict(keep_vars=True).items()}

    fast = compiled.compile(local)
    fast.step(*batch(), sgd(fast))

    assert fast.trunk is local.trunk
    assert {name: id(tensor) for name, tensor in local.state_dict(keep_vars=True).items()} == before
    localize.audit(fast, batch()).raise_if_failed()
