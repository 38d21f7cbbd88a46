"""What is promised for any model holds for random ones: see :mod:`tests.random_nets`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, currently_in_test_context, given, note, reject, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import localize
from localize import methods
from localize.cutting.cuts import candidates, place
from localize.errors import CutError, MethodError, OptionError, TiedWeightsError
from localize.graph.trace import trace
from localize.ir import CutSpec, Trunk
from localize.runtime.model import LocalModel
from tests import daily
from tests.random_nets import CLASSES, IMAGE, Net, Step, nets

METHODS = ("dcl", "auglocal", "predsim", "dgl")
OPTIONS = {"auglocal": ({"d": 2}, {"d": 2, "tail": "isolated"})}
TRACED, TRAINED = 2, 6
"""Number of images that a model is converted for, and that it is trained on: the tracer has not seen the latter."""
RATE = 0.05
SEEDS = 4
"""Seeds of the random nets; each day has one."""


def few(examples: int) -> settings:
    """Return the settings of a test whose examples follow from its seed alone."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )


@dataclass(frozen=True)
class Wish:
    """Where to cut: ``max``, at all places but a ``number``, or at some of them by their ``names``."""

    kind: str
    by: str = "layer"
    choice: int = 0

    def of(self, trunk: Trunk, method: methods.Method) -> CutSpec:
        """Return the request for a model, one that it can fulfil."""
        if self.kind == "names" and _cuts(trunk, method, "layer"):
            found = dict.fromkeys(cut.name for cut in candidates(trunk))
            return CutSpec(at=tuple(name for i, name in enumerate(found) if self.choice >> i % 8 & 1))
        if self.kind == "number":
            return CutSpec(max(1, 1 + _cuts(trunk, method, self.by) - self.choice), by=self.by)
        return CutSpec(by=self.by)


def _cuts(trunk: Trunk, method: methods.Method, by: str) -> int:
    """Return at how many places a model can be cut."""
    return len(place(trunk, CutSpec(by=by), grain=method.grain, together=method.together).cuts)


WISHES = st.one_of(
    st.builds(Wish, st.just("max"), st.sampled_from(["layer", "node"])),
    st.builds(Wish, st.just("number"), st.sampled_from(["layer", "node", "parameters", "macs"]), st.integers(0, 3)),
    st.builds(Wish, st.just("names"), choice=st.integers(1, 255)),
)


OVERWRITTEN = Net((Step("conv", (0,), 4), Step("gate", (1,)), Step("conv", (2,), 8), Step("gate", (3,))))
BORROWED = Net(
    (
        Step("conv", (0,), 8),
        Step("conv", (1,), 8),
        Step("relu", (2,)),
        Step("borrowed", (3,), like=1),
        Step("relu", (4,)),
        Step("conv", (5,), 8),
    )
)
FOLDED = Net((Step("conv_stride", (0,), 8), Step("to_tokens", (1,)), Step("parts", (2,)), Step("parts", (3,))))
"""Nets in which a value is overwritten behind a cut, a function reads a module's weight, and the batch is folded."""


def batch(images: int = TRAINED) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(images, *IMAGE, generator=generator), torch.arange(images) % CLASSES


def convert(model: nn.Module, method: str, cut: CutSpec, options: dict[str, Any]) -> LocalModel:
    """Convert a model, sharing parameters if a cut divides their uses; reject where the method does not apply."""
    given = {"example_input": batch(TRACED)[0], "cut": cut, **options}
    try:
        return localize.transform(model, method, **given)
    except MethodError as error:
        assert "needs at least two segments" in error.problem
        reject()
    except TiedWeightsError:
        local = localize.transform(model, method, shared=True, **given)
        assert local.plan.segments.tied
        return local


def same(one: Any, other: Any) -> bool:
    """Tell whether two tensors, or containers of them, are the same bit for bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return one == other


def left_behind(model: nn.Module) -> dict[str, Any]:
    """Return everything that a training step leaves behind, the random state included."""
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"state": model.state_dict(), "buffers": dict(model.named_buffers()), "gradients": gradients} | {
        "random": torch.get_rng_state()
    }


def everything(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield every attribute, mode, hook, gradient, version and key of a model."""
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            yield f"{path}.{key}", (id(value), *map(id, value.values())) if isinstance(value, dict) else id(value)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        yield name, (tensor._version, tensor.requires_grad, None if tensor.grad is None else id(tensor.grad))
    yield "keys", tuple(model.state_dict())


@pytest.mark.parametrize("number", daily.parts(SEEDS))
def test_one_segment_is_the_plain_training_step(number: int) -> None:
    @seed(number)
    @given(nets())
    @few(14)
    def check(net: Net) -> None:
        assume(net.trains)
        check_one_segment(net)

    check()


@pytest.mark.parametrize("net", [OVERWRITTEN, FOLDED, BORROWED], ids=["overwritten", "folded", "borrowed"])
def test_a_conversion_of_a_net_that_once_failed_keeps_what_is_promised(net: Net) -> None:
    check_conversion(net, "dcl", Wish("max", "node"), 0)


@pytest.mark.parametrize("number", daily.parts(SEEDS))
def test_a_conversion_keeps_what_is_promised(number: int) -> None:
    @seed(number)
    @given(net=nets(), method=st.sampled_from(METHODS), wish=WISHES, variant=st.integers(0, 1))
    @few(22)
    def check(net: Net, method: str, wish: Wish, variant: int) -> None:
        assume(net.trains)
        check_conversion(net, method, wish, variant)

    check()


@pytest.mark.parametrize("number", daily.parts(SEEDS))
def test_impossible_requests_are_refused(number: int) -> None:
    @seed(number)
    @given(net=nets(), method=st.sampled_from(METHODS), by=st.sampled_from(["layer", "node", "parameters", "macs"]))
    @few(6)
    def check(net: Net, method: str, by: str) -> None:
        assume(net.trains)
        check_requests(net, method, by)

    check()


@pytest.mark.zoo
@given(net=nets(20), method=st.sampled_from(METHODS), wish=WISHES, variant=st.integers(0, 1))
@settings(few(600), derandomize=False, print_blob=True)
def test_larger_nets_keep_the_same_promises(net: Net, method: str, wish: Wish, variant: int) -> None:
    assume(net.trains)
    check_one_segment(net)
    check_requests(net, method, wish.by)
    check_conversion(net, method, wish, variant)


def check_one_segment(net: Net) -> None:
    """Check that one step by backpropagation does what an ordinary one does, bit for bit."""
    x, y = batch()
    plain = net.build()
    local = localize.transform(net.build(), "backprop", example_input=batch(TRACED)[0])
    optimizer = torch.optim.SGD((p for p in plain.parameters() if p.requires_grad), lr=RATE)
    torch.manual_seed(0)
    loss = F.cross_entropy(plain(x), y)
    loss.backward()
    optimizer.step()
    expected = left_behind(plain)
    torch.manual_seed(0)
    result = local.step(x, y, torch.optim.SGD(local.param_groups(lr=RATE), lr=RATE))
    found = left_behind(local.export())

    assert len(local.plan.segments) == 1
    assert same(result.losses["loss_0"], loss.detach())
    for what in expected:
        assert same(found[what], expected[what]), what


def check_conversion(net: Net, method: str, wish: Wish, variant: int) -> None:
    """Check the audit, the forward, ownership, and that the model stays as it is."""
    x, y = batch()
    model = net.build()
    options = OPTIONS.get(method, ({},))
    options = options[variant % len(options)]
    cut = wish.of(trace(net.build(), x[:TRACED]), methods.create(method, **options))
    if currently_in_test_context():
        note(f"cut: {cut}")
    with torch.no_grad():
        scores = model.eval()(x)
    model.train()
    before = dict(everything(model))

    local = convert(model, method, cut, options)
    after = dict(everything(model))

    assert [key for key in {**before, **after} if before.get(key) != after.get(key)] == []
    with torch.no_grad():
        assert same(local.eval()(x), scores)
    local.train()
    report = localize.audit(local, (x, y), numeric="centred" not in repr(net))  # whose state moves with every forward
    assert report.ok, [f"{check.id}: {check.evidence}" for check in report.checks if not check.ok]
    check_forward(local, net.build(), x)
    if not local.plan.segments.trunk.eval_differs:
        check_features(local, x)
    check_ownership(local, net.build(), x, y)


def check_forward(local: LocalModel, model: nn.Module, x: Tensor) -> None:
    """Check that the segments, one behind the other, do what the model's forward does."""
    found, expected = copy.deepcopy(local), model
    torch.manual_seed(0)
    logits = expected(x)
    left = left_behind(expected)
    torch.manual_seed(0)
    values = found.features(x)

    assert same(values[-1][0], logits)
    assert same(left_behind(found.export()), left)


def check_features(local: LocalModel, x: Tensor) -> None:
    """Check that what leaves a segment is still what it was when the other segments have run."""
    entering = (x,)
    for segment, found in zip(local.plan.segments.segments, local.eval().features(x), strict=True):
        again = local.functions_of_text[segment.name](local.trunk, *(value.clone() for value in entering))
        assert all(map(same, again if isinstance(again, tuple) else (again,), found)), segment.name
        entering = found


def check_ownership(local: LocalModel, model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Check that a loss trains each parameter that backpropagation trains, and that it is in one segment, or tied."""
    F.cross_entropy(model(x), y).backward()
    trained = {f"trunk.{name}" for name, p in model.named_parameters() if p.grad is not None}
    segments = local.plan.segments
    owned = [name for entry in (*segments.segments, *segments.tied) for name in entry.parameters]
    reached = {name for loss in local.plan.losses for name in local.plan.reach(loss)}

    assert all(one.parameters or any(one.index in tied.segments for tied in segments.tied) for one in segments.segments)
    assert sorted(owned) == sorted(set(owned))
    assert {name for name in reached if name.startswith("trunk.")} == trained
    assert trained <= set(owned)
    assert {*owned, *segments.unused} == {f"trunk.{n}" for n, p in model.named_parameters() if p.requires_grad}


def check_requests(net: Net, method: str, by: str) -> None:
    """Check that cuts that do not exist are refused as such."""
    x, _ = batch(TRACED)
    model = net.build()
    trunk = trace(model, x)
    most = 1 + _cuts(trunk, methods.create(method), by)
    names = [cut.name for cut in candidates(trunk)]
    impossible = [CutSpec(n, by=by) for n in (most + 1, 0, -1)] + [CutSpec(at=("nowhere",))]
    impossible += [CutSpec(at=(name, name)) for name in names[:1]]
    for cut in impossible:
        with pytest.raises(CutError):
            localize.transform(model, method, example_input=x, cut=cut)
    for cut in (CutSpec(2), CutSpec(at=tuple(names[:1]) or ("nowhere",))):
        with pytest.raises(CutError):
            localize.transform(model, "backprop", example_input=x, cut=cut)


def test_cuts_between_which_nothing_is_trained_are_refused() -> None:
    steps = (
        Step("conv", (0,), 4),
        Step("relu", (1,)),
        Step("max_pool", (2,)),
        Step("conv", (3,), 4),
        Step("relu", (4,)),
    )
    frozen = (Step("conv", (0,), 4), Step("relu", (1,)), Step("conv", (2,), 4, frozen=True), Step("relu", (3,)))

    with pytest.raises(CutError, match="nothing is trained between cuts 'relu' and 'max_pool2d'"):
        localize.transform(
            Net(steps).build(), "predsim", example_input=batch(TRACED)[0], cut=CutSpec(at=("max_pool2d", "relu"))
        )
    assert [cut.name for cut in candidates(trace(Net(frozen).build(), batch(TRACED)[0]))] == ["relu"]


@pytest.mark.parametrize(
    "cut", [CutSpec("many"), CutSpec(2.5), CutSpec(True), CutSpec(by="size"), CutSpec(at=(3,)), CutSpec(at="conv")]
)
def test_what_is_no_request_for_cuts_is_refused(cut: CutSpec) -> None:
    model = Net((Step("conv", (0,), 4),)).build()

    with pytest.raises(OptionError, match="cannot be|named by a tuple"):
        localize.transform(model, "dcl", example_input=batch(TRACED)[0], cut=cut)
