"""The forward of a step as an fx graph: its losses are those of the step, and passes of others run on it."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch.fx.passes.shape_prop import ShapeProp

from localize.runtime.model import LocalModel
from tests.auditor.audit_nets import PROGRAMS, batch, make


@pytest.fixture(scope="module")
def local() -> LocalModel:
    return make("auglocal")


def losses_of(local: LocalModel, graph: fx.GraphModule) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {name: loss.detach() for name, loss in graph(*batch())[0].items()}


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_graph_gives_the_losses_and_logits_of_the_step(program: str) -> None:
    local, other = make(program), make(program)
    optimizer = torch.optim.SGD(local.param_groups(lr=0.0), lr=0.0)

    torch.manual_seed(3)
    result = local.step(*batch(), optimizer)
    torch.manual_seed(3)
    losses, logits = other.graph_module()(*batch())

    assert list(losses) == list(result.losses)
    torch.testing.assert_close({name: loss.detach() for name, loss in losses.items()}, result.losses, rtol=0, atol=0)
    torch.testing.assert_close(logits, result.logits, rtol=0, atol=0)


def test_gradients_stop_at_the_detach_nodes(local: LocalModel) -> None:
    losses, _ = local.graph_module()(*batch())

    names = {id(p): name for name, p in local.named_parameters()}
    held = [p for p in local.parameters() if p.requires_grad]
    found = torch.autograd.grad(losses["loss_1"], held, allow_unused=True)

    reached = {names[id(p)] for p, gradient in zip(held, found, strict=True) if gradient is not None}
    assert reached == local.plan.reach(local.plan.losses[1])


def test_it_shares_the_parameters_of_the_model(local: LocalModel) -> None:
    own = {id(p) for p in local.parameters()}

    assert all(id(p) in own for p in local.graph_module().parameters())


def test_elimination_of_dead_code_leaves_the_losses(local: LocalModel) -> None:
    graph = local.graph_module()
    before = losses_of(local, local.graph_module())

    graph.graph.eliminate_dead_code()
    graph.recompile()

    torch.testing.assert_close(losses_of(local, graph), before, rtol=0, atol=0)


def test_shapes_are_propagated_through_all_nodes(local: LocalModel) -> None:
    graph = local.graph_module()

    ShapeProp(graph).propagate(*batch())

    heads = [node for node in graph.graph.nodes if node.op == "call_module" and str(node.target).startswith("heads.")]
    assert [tuple(node.meta["tensor_meta"].shape) for node in heads] == [(4, 5)] * len(heads)


def test_it_prints_as_a_table(local: LocalModel, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tabulate")

    local.graph_module().graph.print_tabular()

    assert "heads.head_0" in capsys.readouterr().out


def test_it_is_drawn_by_the_drawer_of_fx(local: LocalModel) -> None:
    pytest.importorskip("pydot")
    from torch.fx.passes.graph_drawer import FxGraphDrawer

    assert "heads.head_0" in FxGraphDrawer(local.graph_module(), "step").get_dot_graph().to_string()
