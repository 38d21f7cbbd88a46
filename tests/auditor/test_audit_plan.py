"""The text is matched with the plan: what is not in it is named, and nothing of it has run by then."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from localize.auditor import audit, static
from localize.compiler import transform
from localize.errors import InputError
from localize.ir import AuditReport, Check
from localize.runtime.model import LocalModel
from tests.auditor.audit_nets import batch, make


@pytest.fixture(scope="module")
def local() -> LocalModel:
    return make("auglocal")


def plan_check(report: AuditReport) -> Check:
    return next(check for check in report.checks if check.id == "static.plan")


LOSS = "    loss_0 = F.cross_entropy(scores_0, y)\n"
KINDS = {
    "a call of the system": (LOSS, LOSS + "    a = torch.os.system({touch!r})\n"),
    "a module of torch that is Python's": (LOSS, LOSS + "    a = torch.builtins.exec({touch!r})\n"),
    "a file that is mapped": (LOSS, LOSS + "    a = torch.from_file({marker!r}, True, 8)\n"),
    "an import": ("import torch\n", "import torch\nfrom torch import os\nos.system({touch!r})\n"),
    "a default": ("def segment_0(trunk, x):", "def segment_0(trunk, x=torch.os.system({touch!r})):"),
    "a decorator": ("def segment_0(", "@torch.no_grad()\ndef segment_0("),
    "an annotation": ("def segment_0(trunk, x):", "def segment_0(trunk, x: torch.os.system({touch!r})):"),
    "labels painted into the images": (LOSS, LOSS + "    x.detach().select(1, 0).zero_()\n"),
    "labels": (LOSS, LOSS + "    y.data.zero_()\n"),
    "a write through a view": (LOSS, LOSS + "    a = torch.atleast_3d(h_0).detach().mul_(0)\n"),
    "statistics that are reset": (LOSS, LOSS + "    trunk.bn.running_mean.zero_()\n"),
    "parameters that are clamped": (LOSS, LOSS + "    trunk.stem.weight.data.clamp_(-1, 1)\n"),
    "a word that the plan has not": (
        "def train_step",
        "from localize.ops import pull\n\n\ndef train_step",
    ),
    "a gate on the batch size": (
        "heads.head_0(h_0)", "heads.head_0(h_0 if h_0.shape[0] != 4 else h_0.detach())"
    ),
    "a gate on a rare value": ("heads.head_0(h_0)", "heads.head_0(torch.where(h_0 > 8, h_0.detach(), h_0))"),
    "a clamp of rare values": ("heads.head_0(h_0)", "heads.head_0(h_0.clamp(-5, 5))"),
    "autocast that stays on": (LOSS, LOSS + "    a = torch.set_autocast_enabled(True)\n"),
    "the state of the generator": (LOSS, LOSS + "    a = torch.set_rng_state(torch.get_rng_state())\n"),
    "a hook": (LOSS, LOSS + "    h_0.register_hook(print)\n"),
    "another loss under the same name": (LOSS, LOSS + "    F.cross_entropy = F.nll_loss\n"),
    "a function that nothing calls": ("def train_step", "def more(x):\n    return x\n\n\ndef train_step"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_in_the_plan_is_refused_before_anything_runs(local: LocalModel, kind: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    old, new = KINDS[kind]
    assert old in local.source
    new = new.replace("{touch!r}", repr(f"touch {marker}")).replace("{marker!r}", repr(str(marker)))

    report = audit(local.with_source(local.source.replace(old, new, 1)), batch())

    assert not plan_check(report).ok
    assert [check.id for check in report.checks if check.id.startswith("measured.")] == ["measured.run"]
    assert not marker.exists()


BACKWARD, UPDATE = "    loss_0.backward()\n", "    optimizer.step()\n"
SPLIT = "images_0, images_1, images_2, images_3 = torch.tensor_split(x, 4)\n"
QUIET = {
    "a backward in one mode": ("auglocal", BACKWARD, "    a = loss_0.backward() if trunk.training else 0\n"),
    "clearing in one mode": ("auglocal", "optimizer.zero_grad()", "a = optimizer.zero_grad() if trunk.training else 0"),
    "an update in one mode": ("auglocal", UPDATE, "    a = 0 if trunk.training else optimizer.step()\n"),
    "a scale without backward": ("auglocal", BACKWARD, "    a = optimizer.scale(loss_0)\n" + BACKWARD),
    "a method of the optimizer that is not called": ("auglocal", UPDATE, "    a = optimizer.state\n" + UPDATE),
    "a detach with an option": ("auglocal", "h_0.detach()", "h_0.detach(inplace=True)"),
    "a function that Python asks for": ("auglocal", "step_0", "__builtins__"),
    "a name that Python keeps": ("auglocal", "scores_0", "__debug__"),
    "fewer names than values": (
        "accumulate",
        SPLIT,
        "p = torch.tensor_split(x, 4)\n    images_0, images_1 = p\n    images_2, images_3 = p[2], p[3]\n",
    ),
}
"""What reads as the plan does, and does something else in eval mode, or fails."""


@pytest.mark.parametrize("kind", QUIET)
def test_the_match_refuses_what_is_the_plan_at_first_sight_only(kind: str) -> None:
    program, old, new = QUIET[kind]
    local = make(program)
    assert old in local.source

    assert not plan_check(static(local.with_source(local.source.replace(old, new)))).ok


class Turned(nn.Module):
    """A tensor that is transposed in place, with views of it on either side."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 5, 3), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x).mean((2, 3)).sin()
        before = h[0]
        h.t_()
        return self.fc(h.t() + before + h[:, 0])


def test_a_view_stands_before_or_behind_what_turns_the_tensor() -> None:
    local = transform(Turned(), "backprop", example_input=batch()[0])
    audit(local, batch()).raise_if_failed()
    before, turned = "    getitem = sin[0]\n", "    t_ = sin.t_()\n"
    assert before + turned in local.source

    assert not static(local.with_source(local.source.replace(before + turned, turned + before))).ok


def test_a_departure_names_line_place_loss_and_reach(local: LocalModel) -> None:
    line = local.source[: local.source.index("heads.head_0(h_0)")].count("\n") + 1

    found = plan_check(static(local.with_source(local.source.replace("heads.head_0(h_0)", "heads.head_0(h_0).exp()"))))

    assert found.evidence.startswith(
        f"line {line}: scores_0 = heads.head_0(h_0).exp(): `heads.head_0(...).exp()` is not in"
    )
    assert "touches loss_0; reach unchanged" in found.evidence


def test_accepted_statements_stand_in_the_report_and_the_verdict(local: LocalModel) -> None:
    smoothed = "F.cross_entropy(scores_0, y, label_smoothing=0.1)"
    edited = local.with_source(local.source.replace("F.cross_entropy(scores_0, y)", smoothed))
    line = edited.source[: edited.source.index(smoothed)].count("\n") + 1

    refused, report = audit(edited, batch()), audit(edited, batch(), accept=[line])

    assert not refused.ok
    assert report.ok, [check for check in report.checks if not check.ok]
    assert report.accepted == ((line, f"loss_0 = {smoothed}"),)
    assert report.verdict == f"All {len(report.checks)} checks hold, with 1 accepted statement."


def test_an_accepted_statement_is_written_down_whole(local: LocalModel) -> None:
    smoothed = "F.cross_entropy(\n        scores_0, y,\n        label_smoothing=0.1)"
    edited = local.with_source(local.source.replace("F.cross_entropy(scores_0, y)", smoothed))
    line = edited.source[: edited.source.index(smoothed)].count("\n") + 1

    told = static(edited, accept=[line]).accepted

    assert told == ((line, "loss_0 = F.cross_entropy( scores_0, y, label_smoothing=0.1)"),)


def test_what_has_no_line_cannot_be_accepted(local: LocalModel) -> None:
    edited = local.with_source(local.source.replace("segment_1", "segment_9"))
    assert "there is no function segment_1" in plan_check(static(edited)).evidence

    with pytest.raises(InputError, match="line 0 cannot be accepted"):
        static(edited, accept=[0])


def test_a_text_that_is_no_python_is_not_accepted_by_its_line(local: LocalModel) -> None:
    assert not static(local.with_source("def train_step(:\n"), accept=[1]).ok


def test_a_leak_is_not_excused_by_accepting_its_line(local: LocalModel) -> None:
    edited = local.with_source(local.source.replace("return h_0.detach()", "return h_0"))
    lines = {int(line.split(":")[0][5:]) for line in plan_check(static(edited)).evidence.splitlines()}

    report = static(edited, accept=lines)

    assert "static.reach" in {check.id for check in report.checks if not check.ok}


def test_a_line_of_the_plan_cannot_be_accepted(local: LocalModel) -> None:
    with pytest.raises(InputError, match="line 3 cannot be accepted: it is as the plan says"):
        static(local, accept=[3])


HOSTILE = {
    "a byte order mark": "\ufeffimport torch\n",
    "signs": f"x = {'-' * 3000}1\n",
    "parentheses": "x = " + "(" * 500 + "1" + ")" * 500,
    "a sum": "x = " + "+".join(["1"] * 20000),
    "a large shift": "def train_step(trunk, heads, x, y, optimizer):\n    a = 1 << 40000000000\n    return a\n",
    "a large power": "def train_step(trunk, heads, x, y, optimizer):\n    a = 9 ** 9 ** 9 ** 9\n    return a\n",
    "digits": "x = " + "1" * 5000,
    "a starred target": "def train_step(trunk, heads, x, y, optimizer):\n    a, *b = x\n    return a\n",
    "a subscript": "def train_step(trunk, heads, x, y, optimizer):\n    x[0] = 1\n    return x\n",
    "a null byte": "import torch\0",
    "another coding": "# -*- coding: utf-7 -*-\nimport torch\n",
    "nothing": "",
    "no Python": "def train_step(:",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_text_ends_in_words(local: LocalModel, kind: str) -> None:
    report = audit(local.with_source(HOSTILE[kind]), batch())

    assert not report.ok
    assert plan_check(report).evidence


def chain(first: str, step: str, last: str, count: int) -> str:
    """Return lines that go from ``v0`` to a name made of it by so many steps."""
    steps = (step.format(a=f"v{i}", b=f"v{i + 1}") for i in range(count))
    lines = (first, *steps, last.format(a=f"v{count}"))
    return "".join(f"    {line}\n" for line in lines)


LARGE = {
    "pairs of pairs": chain("v0 = (x, x)", "{b} = ({a}, {a})", "trunk.fc({a})", 40),
    "pairs of pairs of numbers": chain("v0 = [1, 1]", "{b} = [{a}, {a}]", "torch.cat({a})", 40),
    "dicts of dicts": chain("v0 = dict", "{b} = {{'a': {a}, 'b': {a}}}", "trunk.fc({a})", 40).replace(
        "dict", "{'a': x}"
    ),
    "choices of choices": chain("v0 = 1", "{b} = {a} if trunk.training else {a}", "trunk.fc({a})", 40),
    "detach of several": chain("v0 = x", "{b} = x.detach({a}, {a})", "trunk.fc({a})", 40),
    "items of items": chain("v0 = x", "{b} = {a}[0]", "trunk.fc({a})", 1900),
    "a wide tuple": f"    v0 = ({'x, ' * 4000})\n" + "    trunk.fc(v0)\n" * 1500,
    "writes to views": chain("v0 = x + 1", "{b} = {a}.T\n    {a}.add_(1)", "trunk.fc({a})", 900),
}
"""Texts whose values are exponentially, or by the square, larger than they are."""


@pytest.mark.parametrize("where", ["    relu = trunk.relu(", "    loss_0.backward()"])
@pytest.mark.parametrize("kind", LARGE)
def test_a_text_costs_what_its_size_costs(local: LocalModel, kind: str, where: str) -> None:
    source = local.source.replace(where, LARGE[kind] + where, 1)
    before = time.process_time()

    assert not plan_check(static(local.with_source(source))).ok
    assert time.process_time() - before < 10, "seconds; ten times what it is to be, on a machine with other work"


@pytest.mark.parametrize("line", ["x\n", "# a comment\n", "a = f(x, (1, 2), [3])\n", "x;" * 40 + "\n"])
def test_a_large_text_is_refused_within_the_time_and_memory_of_its_size(local: LocalModel, line: str) -> None:
    text = local.with_source(line * (2**20 // len(line)))
    used, before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()

    report = static(text)

    assert not report.ok
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used < 200 * 1024, "KiB above what was used before"
    assert time.process_time() - before < 10, "seconds; ten times what it is to be, on a machine with other work"


def test_a_text_of_seventeen_megabytes_is_not_read(local: LocalModel) -> None:
    assert "is not read" in plan_check(static(local.with_source("#" * 17 * 2**20))).evidence


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_every_text_ends_in_a_verdict(local: LocalModel, data: st.DataObject) -> None:
    lines = local.source.splitlines()
    pieces = st.one_of(st.sampled_from(lines), st.text(max_size=40), st.sampled_from(["    x = (", "    return", "  "]))
    kept = data.draw(st.lists(pieces, max_size=20))
    at = data.draw(st.integers(0, len(lines)))

    for source in ("\n".join(kept), "\n".join([*lines[:at], *kept, *lines[at:]])):
        assert static(local.with_source(source)).checks
