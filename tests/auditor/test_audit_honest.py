"""Honest steps pass the audit, and the audit leaves no trace on what it looks at."""

from __future__ import annotations

import ast
import copy
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import localize.auditor.measured
from localize.auditor import audit, measured, static
from localize.auditor.execution import is_sum
from localize.auditor.reference import RandomState
from localize.compiler import transform
from localize.ir import CutSpec
from tests.auditor.audit_nets import VARIANTS, Overwriting, TinyResNet, batch, make
from tests.corpus import ALL

pytestmark = pytest.mark.lowest

AUDIT = Path(localize.auditor.measured.__file__).parent


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("inplace", [False, True], ids=["pure", "inplace"])
def test_every_variant_passes(variant: str, inplace: bool) -> None:
    audit(make(variant, TinyResNet(inplace=inplace)), batch()).raise_if_failed()


@pytest.mark.parametrize("variant", ["backprop", "dcl", "dcl-end"])
def test_values_that_are_overwritten_behind_a_cut_are_copied(variant: str) -> None:
    report = audit(make(variant, Overwriting(), CutSpec(by="node")), batch()).raise_if_failed()

    evidence = next(check.evidence for check in report.checks if check.id == "measured.crossings")
    assert evidence == ("1 values, 0 copied" if variant == "backprop" else "8 values, 3 copied")


def test_a_pull_is_compared_with_the_size_of_its_addends() -> None:
    """Where they cancel, what is left is rounding, which is large beside the sum."""
    drawn = torch.Generator().manual_seed(0)
    copies, source = torch.randn(2, 200_000, generator=drawn)
    addends = 0.5 * copies, 0.5 * source
    pulled = copies.clone().mul_(0.5).add_(source * (1 + 1e-6), alpha=0.5)

    assert not torch.allclose(pulled, sum(addends), rtol=1e-3, atol=0)
    assert is_sum(pulled, *addends, 1e-3)
    assert not is_sum(copies.lerp(source, 0.51), *addends, 1e-3)


@pytest.mark.parametrize("name", ["hook_that_keeps", "codebook", "follower", "exits_dict", "features_and_scores"])
def test_a_net_that_keeps_looks_up_follows_or_returns_several_passes(name: str) -> None:
    entry = next(entry for entry in ALL if entry.name == name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        local = transform(entry.make().train(), "auglocal", example_input=entry.inputs(4), **entry.options)

    audit(local, (entry.inputs(4), torch.tensor([0, 1, 2, 3]))).raise_if_failed()


def test_what_the_forward_writes_into_a_parameter_is_compared() -> None:
    entry = next(entry for entry in ALL if entry.name == "follower")
    local = transform(entry.make().train(), "backprop", example_input=entry.inputs(4))
    edited = local.with_source(local.source.replace("mul_(0.99)", "mul_(0.5)", 1))
    assert edited.source != local.source

    found = measured.checks(edited, (entry.inputs(4),), torch.tensor([0, 1, 2, 3]))

    left = next(check for check in found if check.id == "measured.left")
    assert "trunk.follower.weight is not what the declared losses leave" in left.evidence


def test_several_values_cross_a_cut() -> None:
    class TwoStreams(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = nn.ModuleList([nn.Conv2d(3 if i == 0 else 4, 4, 3, 1, 1) for i in range(4)])
            self.right = nn.ModuleList([nn.Conv2d(3 if i == 0 else 4, 4, 3, 1, 1) for i in range(4)])
            self.fc = nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            a = b = x
            for left, right in zip(self.left, self.right, strict=True):
                a, b = left(a).relu(), right(b).relu()
            return self.fc((a + b).mean((2, 3)))

    local = make("dcl", TwoStreams(), CutSpec(by="node"))
    assert max(len(segment.inputs) for segment in local.plan.segments.segments) == 2, local.source

    audit(local, batch()).raise_if_failed()


def test_a_model_without_data_is_audited_statically_and_not_run() -> None:
    local = make("auglocal").to("meta")

    static(local).raise_if_failed()
    report = audit(local, batch())

    assert [(c.id, c.evidence) for c in report.checks if not c.ok] == [("measured.run", "the model has no data (meta)")]


def test_the_audit_leaves_no_trace() -> None:
    local = make("dcl")
    local.train()
    local.trunk.layers[0].eval()
    for parameter in local.parameters():
        parameter.grad = torch.ones_like(parameter)
    state = {name: value.clone() for name, value in local.state_dict().items()}
    modes = {name: module.training for name, module in local.named_modules()}
    random = RandomState.now(torch.device("cpu"))
    x, y = batch()
    backward = Tensor.backward

    audit(local, (x, y))

    torch.testing.assert_close(local.state_dict(), state, rtol=0, atol=0)
    assert {name: module.training for name, module in local.named_modules()} == modes
    assert all(torch.equal(parameter.grad, torch.ones_like(parameter)) for parameter in local.parameters())
    assert torch.equal(torch.get_rng_state(), random.cpu)
    assert torch.equal(x, batch()[0]) and x.dtype == torch.float32
    assert Tensor.backward is backward
    assert not any(module._forward_pre_hooks for module in local.modules())


def test_the_audit_is_not_disturbed_by_no_grad() -> None:
    with torch.no_grad():
        audit(make("auglocal"), batch()).raise_if_failed()


def test_two_audits_give_the_same_report() -> None:
    local = make("dcl")

    assert audit(local, batch()) == audit(copy.deepcopy(local), batch())


def test_a_model_with_types_written_into_its_forward_is_compared_in_its_own_type() -> None:
    class Typed(TinyResNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.to(torch.float32))

    report = audit(make("auglocal", Typed()), batch()).raise_if_failed()

    evidence = {check.id: check.evidence for check in report.checks}
    assert "does not run in float64" in evidence["measured.again"]


def test_branches_that_the_output_does_not_use_are_left_out() -> None:
    class Auxiliary(TinyResNet):
        def __init__(self) -> None:
            super().__init__()
            self.auxiliary = nn.Sequential(nn.BatchNorm2d(6), nn.Dropout(0.5), nn.Flatten(), nn.Linear(96, 5))

        def forward(self, x: Tensor) -> Any:
            h = self.layers(self.relu(self.bn(self.stem(x))))
            other = self.auxiliary(h) if self.training else None
            out = self.fc(self.drop(h.mean((2, 3))))
            return (out, other) if self.training else out

    recipe = {"method": "dcl", "output": "output_0", "outputs": {"output_1": 0.0}}
    local = transform(Auxiliary().train(), recipe, example_input=batch()[0])
    assert len(local.plan.segments.unused) == 4

    report = audit(local, batch()).raise_if_failed()

    evidence = {check.id: check.evidence for check in report.checks}
    assert "not run, since the output does not use them: auxiliary" in evidence["measured.forward-train"]
    assert "trunk.auxiliary.0.bias" in evidence["static.covered"]


def test_the_auditor_imports_only_data_types_torch_and_networkx() -> None:
    allowed = {"localize.ir", "localize.errors", "torch", "networkx", *sys.stdlib_module_names}
    for path in sorted(AUDIT.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                own = name.startswith("localize.auditor")
                known = own or name in allowed or name.split(".")[0] in allowed - {"localize"}
                assert known, f"{path.name} imports {name}"


@pytest.mark.slow
def test_resnet32_with_fifteen_cuts_passes_in_float64() -> None:
    from localize import zoo
    from localize.compiler import transform

    model = zoo.create_model("cifar/resnet32", 10)
    local = transform(model, "auglocal", example_input=torch.empty(2, 3, 32, 32), tail="isolated")
    assert len(local.plan.losses) == 16

    report = audit(local, (torch.randn(4, 3, 32, 32), torch.randint(10, (4,)))).raise_if_failed()

    evidence = {check.id: check.evidence for check in report.checks}
    assert "forward each" in evidence["measured.batchnorm"]


@pytest.mark.parametrize("seed", [1, 5])
def test_a_saturated_loss_is_held_to_no_more_than_rounding_allows(seed: int) -> None:
    """Two large steps on two images leave a loss of about 1e-9, whose central difference has few digits."""
    from localize import zoo
    from localize.compiler import transform

    torch.manual_seed(seed)
    model, x, y = zoo.create_model("cifar/resnet20"), torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    local = transform(model, "dcl", example_input=x).train()
    optimizer = torch.optim.SGD(local.param_groups(lr=0.1), lr=0.1)
    for _ in range(2):
        local.step(x, y, optimizer)

    audit(local, (x, y)).raise_if_failed()
