"""Every check is seen to fail: by an edit of the text, of the plan, or of what runs."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from localize.auditor import audit, measured, static
from localize.errors import AuditError
from localize.ir import AuditReport, Check
from tests.auditor.audit_nets import Overwriting, batch, make


def edited(local: Any, old: str, new: str, count: int = 1) -> tuple[Any, int]:
    """Replace the first occurrence of ``old``; return the local model and the number of the line that changed."""
    assert old in local.source, f"{old!r} is not in the text:\n{local.source}"
    line = local.source[: local.source.index(old)].count("\n") + 1
    return local.with_source(local.source.replace(old, new, count)), line


def failed(report: AuditReport) -> dict[str, Check]:
    """Return the failing checks by their id."""
    return {check.id: check for check in report.checks if not check.ok}


TEXT = [
    ("auglocal", "h_0.detach()", "h_0", "static.detached", "history"),
    ("auglocal", "h_0.detach()", "h_0", "static.reach", "leak: loss_1 trains trunk.bn.bias"),
    ("auglocal", "h_0.detach()", "h_0", "static.overlaps", "trained by loss_0, loss_1"),
    ("auglocal", "h_0.detach()", "h_0.detach().clone()", "static.route", "copied against the declaration"),
    (
        "auglocal",
        "segment_0(trunk, x)\n    scores",
        "segment_0(trunk, y)\n    scores",
        "static.route",
        "not the argument x",
    ),
    (
        "auglocal",
        "= step_1(trunk, heads, x_1,",
        "= step_1(trunk, heads, x,",
        "static.route",
        "not value 0 of segment_0",
    ),
    ("auglocal", "= step_1(trunk, heads, x_1,", "= step_1(trunk, heads, x,", "static.used", "'x_1' is never read"),
    ("auglocal", "heads.head_0(h_0)", "heads.head_1(h_0)", "static.terms", "not from heads.head_0"),
    ("auglocal", "heads.head_0(h_0)", "heads.head_1(h_0)", "static.covered", "no loss trains it"),
    ("auglocal", "heads.head_0(h_0)", "heads.head_0(h_0.detach())", "static.reach", "dead weight"),
    ("auglocal", "F.cross_entropy(scores_0, y)", "0.5 * F.cross_entropy(scores_0, y)", "static.terms", "weight"),
    (
        "auglocal",
        "F.cross_entropy(scores_0, y)",
        "F.cross_entropy(scores_0, scores_0)",
        "static.terms",
        "not the argument y",
    ),
    ("auglocal", "F.cross_entropy(scores_0, y)", "F.nll_loss(scores_0, y)", "static.terms", "nll_loss"),
    ("auglocal", "F.cross_entropy(scores_0, y)", "F.cross_entropy(scores_0, y, None)", "static.terms", "nothing else"),
    ("auglocal", "    loss_0.backward()\n", "", "static.backward", "loss_0 has 0 backwards"),
    ("auglocal", "loss_0.backward()", "scores_0.backward()", "static.backward", "returned as no loss"),
    ("auglocal", "    optimizer.zero_grad()\n", "", "static.order", "zero_grad() does not come before"),
    ("auglocal", "    optimizer.step()\n", "", "static.order", "last action is not optimizer.step()"),
    (
        "auglocal",
        "    loss_0.backward()\n",
        "    loss_0.backward()\n    optimizer.step()\n",
        "static.order",
        "only backwards",
    ),
    ("dcl", "    optimizer[0].zero_grad()\n", "", "static.order", "not directly followed"),
    ("dcl", "optimizer[1].step()", "optimizer[0].step()", "static.order", "not directly followed"),
    ("dcl", "optimizer[1].step()", "optimizer.step()", "static.order", "not directly followed"),
    ("dcl-last", "dictionary_0.detach()", "dictionary_0", "static.reach", "leak"),
    (
        "dcl-last",
        "heads.head_2(h_2, heads.dictionary())",
        "heads.head_2(h_2, heads.dictionary().detach())",
        "static.terms",
        "with its history",
    ),
    ("dcl-averaged", "0.3333333333333333", "0.25", "static.terms", "scale"),
    ("auglocal", "trunk.bn(trunk.stem(x))", "trunk.stem(x)", "static.operations", "does not call trunk.bn"),
    ("auglocal", "= trunk.relu(trunk.bn(", "= trunk.relu(trunk.layers[0].bn1(", "static.operations", "more often"),
    ("auglocal", '"loss_0": loss_0', '"loss_0": loss_1', "static.results", "loss_0 is returned as"),
    ("auglocal", '"loss_0": scores_0', '"loss_0": scores_1', "static.results", "the scores of loss_0 are"),
    ("auglocal", '"loss_0": loss_0, ', "", "static.results", "returns losses loss_1"),
    ("auglocal", "    optimizer.step()\n", "    optimizer.step()\n    exec('x')\n", "static.readable", "uses 'exec'"),
    (
        "auglocal",
        "segment_0(trunk, x)\n    scores",
        "segment_0(trunk, x_)\n    scores",
        "static.readable",
        "before it is",
    ),
    ("auglocal", "loss_0.backward()", "loss_O.backward()", "static.readable", "'loss_O' is used before"),
    ("auglocal", "trunk.layers[0].conv1", "trunk.layers[9].conv1", "static.readable", "does not exist"),
]


@pytest.mark.parametrize(("variant", "old", "new", "id", "evidence"), TEXT)
def test_an_edit_of_the_text_fails_the_static_check_of_its_kind(
    variant: str, old: str, new: str, id: str, evidence: str
) -> None:
    local, _ = edited(make(variant), old, new)

    found = failed(static(local))

    assert id in found, f"fails only {list(found)}"
    assert evidence in found[id].evidence


@pytest.mark.parametrize(
    ("old", "new", "id"),
    [
        ("h_0.detach()", "h_0", "static.detached"),
        ("loss_0.backward()", "loss_O.backward()", "static.readable"),
        ("heads.head_0(h_0)", "heads.head_1(h_0)", "static.terms"),
        ("F.cross_entropy(scores_0, y)", "F.cross_entropy(scores_0, y) * 0.5", "static.terms"),
        ("= step_1(trunk, heads, x_1,", "= step_1(trunk, heads, x,", "static.route"),
    ],
)
def test_the_evidence_names_the_line_and_quotes_it(old: str, new: str, id: str) -> None:
    local, line = edited(make("auglocal"), old, new)
    source = local.source.splitlines()[line - 1].strip()

    evidence = "\n".join(check.evidence for check in failed(static(local)).values())

    assert id in failed(static(local))
    assert f"line {line}: {source}" in evidence


def test_a_loss_computed_after_the_next_forward_fails_locality() -> None:
    local = make("auglocal")
    source = local.source.replace("    loss_0.backward()\n", "").replace(
        "loss_0.detach(), scores_0", "loss_0, scores_0"
    )
    source = re.sub(r"(    x_2, loss_1, .*\n)", r"\1    loss_0.backward()\n", source)
    source = source.replace('"loss_0": loss_0', '"loss_0": loss_0.detach()')

    found = failed(static(local.with_source(source)))

    assert "segment_1 runs" in found["static.locality"].evidence


def test_at_most_eight_lines_are_printed() -> None:
    local, _ = edited(make("backprop"), "loss_0 = F.cross_entropy(h_0, y)", "loss_0 = F.cross_entropy(h_0.detach(), y)")

    evidence = failed(static(local))["static.reach"].evidence.splitlines()

    assert len(evidence) == 8
    assert re.fullmatch(r"and \d+ more", evidence[-1])


def test_a_parameter_that_nothing_declares_is_not_covered() -> None:
    local = make("auglocal")
    local.trunk.extra = nn.Parameter(torch.zeros(3))

    found = failed(audit(local, batch()))

    assert "trunk.extra is trainable, but no loss trains it" in found["static.covered"].evidence
    assert "extra is new" in found["measured.keys"].evidence


def test_a_plan_that_declares_too_much_is_dead_weight() -> None:
    local = make("auglocal")
    first, second, *rest = local.plan.losses
    wide = dataclasses.replace(first, reach=(*first.reach, "segment_1"))
    local.plan = dataclasses.replace(local.plan, losses=(wide, second, *rest))

    found = failed(audit(local, batch()))

    for id in ("static.reach", "measured.reach", "measured.numeric"):
        assert id in found
    assert "dead weight: loss_0 declares trunk." in found["static.reach"].evidence


MEASURED = [
    ("auglocal", "h_0.detach()", "h_0", "measured.reach", "leak: the graph of loss_1"),
    ("auglocal", "h_0.detach()", "h_0.detach() * 2", "measured.crossings", "is not what it was"),
    ("auglocal", "F.cross_entropy(scores_0, y)", "0.5 * F.cross_entropy(scores_0, y)", "measured.gradients", "off by"),
    (
        "auglocal",
        "F.cross_entropy(scores_0, y)",
        "0.5 * F.cross_entropy(scores_0, y)",
        "measured.values",
        "loss of loss_0",
    ),
    ("auglocal", "heads.head_0(h_0)", "heads.head_0(h_0.detach())", "measured.numeric", "applies no gradient to trunk"),
    ("auglocal", "    optimizer.zero_grad()\n", "", "measured.gradients", "off by"),
    ("auglocal", "    optimizer.step()\n", "", "measured.gradients", "0 updates ran, 1 are declared"),
    ("auglocal", "    loss_0.backward()\n", "", "measured.reach", "2 backwards ran, 3 losses are declared"),
    ("auglocal", "(layers_0_relu)) + x", "(layers_0_relu)) - x", "measured.forward-eval", "differ"),
    ("auglocal", "(layers_0_relu)) + x", "(layers_0_relu)) - x", "measured.forward-train", "buffer"),
    ("auglocal", "mean((2, 3))", "mean((2, 3)) * 1.0000001", "measured.forward-eval", "differ"),
    ("auglocal", "trunk.drop(", "(", "measured.forward-train", "output"),
    (
        "auglocal",
        "scores_0 = heads.head_0(h_0)",
        "scores_0 = heads.head_0(h_0 + 0 * heads.head_0(h_0).sum())",
        "measured.batchnorm",
        "ran 2 times, by the declared routes 1",
    ),
    (
        "auglocal",
        "loss_0.detach(), scores_0.detach()",
        "loss_0.detach(), scores_0",
        "measured.values",
        "with its history",
    ),
    (
        "auglocal",
        "F.cross_entropy(scores_0, y)",
        "F.cross_entropy(scores_0, y + 0 * trunk.fc.bias.detach().mul_(0.9).argmax())",
        "measured.still",
        "trunk.fc.bias has changed",
    ),
    ("dcl", "    optimizer[0].zero_grad()\n", "", "measured.nothing-left", "has a gradient left"),
    ("dcl", "    optimizer.zero_grad()\n", "", "measured.gradients", "off by"),
    ("backprop", "F.cross_entropy(h_0, y)", "F.cross_entropy(h_0 * 1.01, y)", "measured.plain-training", "differ"),
]


@pytest.mark.parametrize(("variant", "old", "new", "id", "evidence"), MEASURED)
def test_an_edit_of_the_text_fails_the_measured_check_of_its_kind(
    variant: str, old: str, new: str, id: str, evidence: str
) -> None:
    local, _ = edited(make(variant), old, new)

    found = {check.id: check for check in measured.checks(local, batch()[:1], batch()[1]) if not check.ok}

    assert id in found, f"fails only {list(found)}"
    assert evidence in found[id].evidence


def test_a_missing_copy_is_seen_in_the_text_and_in_memory() -> None:
    local, _ = edited(make("dcl", Overwriting()), ".detach().clone()", ".detach()")

    found = {check.id: check for check in measured.checks(local, batch()[:1], batch()[1]) if not check.ok}

    assert "is not copied against the declaration" in failed(static(local))["static.route"].evidence
    assert "is declared to be a copy, but shares its memory" in found["measured.crossings"].evidence


def test_a_head_that_writes_into_the_features_is_seen() -> None:
    local = make("auglocal")

    def write(head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        inputs[0].data.mul_(0.9)

    local.heads["head_0"].register_forward_pre_hook(write)

    found = {check.id: check for check in measured.checks(local, batch()[:1], batch()[1]) if not check.ok}

    assert "written to before its backward" in found["measured.crossings"].evidence
    assert "is not what it was when segment_0 returned it" in found["measured.crossings"].evidence


def test_a_step_that_runs_something_else_than_its_text_is_seen() -> None:
    local = make("auglocal")
    other, _ = edited(local, "F.cross_entropy(scores_0, y)", "2 * F.cross_entropy(scores_0, y)")
    other.source = local.source

    class Liar(type(other)):
        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            copied = super().__deepcopy__(memo)
            lying = copied.with_source(
                copied.source.replace("F.cross_entropy(scores_0", "2 * F.cross_entropy(scores_0")
            )
            assert lying.functions_of_text  # loaded, before it is said to be another text
            lying.source = copied.source
            return lying

    other.__class__ = Liar
    found = {check.id: check for check in measured.checks(other, batch()[:1], batch()[1]) if not check.ok}

    assert "loss_0: 1 of 1 values differ" in found["measured.text"].evidence


def test_an_error_while_running_names_the_line() -> None:
    local, line = edited(make("auglocal"), "F.cross_entropy(scores_0, y)", "F.cross_entropy(scores_0[0, 0, 0], y)")

    found = {check.id: check for check in measured.checks(local, batch()[:1], batch()[1]) if not check.ok}

    raised = f"line {line}: loss_0 = F.cross_entropy(scores_0[0, 0, 0], y): IndexError"
    assert raised in found["measured.run"].evidence
    assert found["measured.gradients"].evidence == "not measured, since measured.run fails"


def test_a_text_that_cannot_be_read_is_not_run() -> None:
    local, _ = edited(make("auglocal"), "loss_0.backward()", "exec('raise SystemExit')")

    report = audit(local, batch())

    assert [check.id for check in report.checks if check.id.startswith("measured.")] == ["measured.run"]
    assert "not run, since static.readable fails" in failed(report)["measured.run"].evidence


def test_central_differences_can_be_left_out() -> None:
    local = make("auglocal")
    with_them, without = (audit(local, batch(), numeric=numeric) for numeric in (True, False))
    assert {check.id for check in with_them.checks} - {check.id for check in without.checks} == {"measured.numeric"}


def test_a_failed_report_raises_with_the_evidence() -> None:
    local, line = edited(make("auglocal"), "h_0.detach()", "h_0")

    with pytest.raises(AuditError, match=rf"(?s)fails \d+ of 14 checks.*static.detached: line {line}: return h_0, "):
        static(local).raise_if_failed()
