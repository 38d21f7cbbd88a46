"""The language the reader understands, each form next to the nearest one that it refuses."""

from __future__ import annotations

import textwrap

import pytest
import torch
from torch import nn

from localize import zoo
from localize.auditor.reader import Reading, read
from localize.auditor.structure import checks
from localize.compiler import transform


class Trunk(nn.Module):
    """Modules and tensors of every kind that a path can lead through."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.seq = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.named = nn.ModuleDict({"a-b": nn.Linear(4, 4, bias=False)})
        self.listed = nn.ParameterList([torch.zeros(4)])
        self.token = nn.Parameter(torch.zeros(4))
        self.frozen = nn.Parameter(torch.zeros(4), requires_grad=False)
        self.register_buffer("mean", torch.zeros(4))
        self.rate = 0.5


def reading_of(body: str, extra: str = "") -> Reading:
    """Read a driver with this body, which assigns ``loss``."""
    lines = textwrap.indent(textwrap.dedent(body).strip(), "    ")
    driver = f"def train_step(trunk, heads, x, y, optimizer):\n{lines}\n    return loss"
    imports = "import torch, localize.runtime.model\nimport torch.nn.functional as F\nfrom localize.ops import set_item"
    source = f"{imports}\n{extra}\n{driver}\n"
    return read(source, Trunk(), nn.ModuleDict({"head_0": nn.Linear(4, 4, bias=False)}))


def reached(body: str) -> set[str]:
    """Return what a gradient of ``loss`` reaches, of a text that has to be readable."""
    reading = reading_of(body)
    assert not reading.problems, reading.problems
    (node,) = (event.outputs[0] for event in reading.events if event.kind == "leave")
    return {name.removeprefix("trunk.") for name in reading.parameters(node)}


@pytest.mark.parametrize(
    ("expression", "parameters"),
    [
        ("trunk.conv(x)", {"conv.weight"}),
        ("trunk.seq[0](x)", {"seq.0.weight", "seq.0.bias"}),
        ("trunk.seq(x)", {"seq.0.weight", "seq.0.bias", "seq.1.weight", "seq.1.bias"}),
        ('trunk.named["a-b"](x)', {"named.a-b.weight"}),
        ('getattr(trunk.named, "a-b")(x)', {"named.a-b.weight"}),
        ("heads.head_0(x)", {"heads.head_0.weight"}),
        ("x + trunk.token", {"token"}),
        ("x * trunk.listed[0]", {"listed.0"}),
        ("x + trunk.frozen", set()),
        ("x + trunk.mean", set()),
        ("trunk.conv(x).detach()", set()),
        ("torch.detach(trunk.conv(x))", set()),
        ("trunk.conv(x).data", set()),
        ("trunk.conv(x).argmax(1)", set()),
        ("trunk.conv(x) > 0", set()),
        ("x * trunk.conv(x).size(0)", set()),
        ("x.to(trunk.token.dtype)", set()),
        ("trunk.conv(x).long()", set()),
        ("trunk.conv(x).to(torch.float32)", {"conv.weight"}),
        ("torch.cat([x, trunk.conv(x)], dim=1)[:, 0, ..., None]", {"conv.weight"}),
        ("F.dropout(trunk.conv(x), 0.1 if trunk.training else 0.0)", {"conv.weight"}),
        ("F.relu(trunk.conv(x), inplace=True)", {"conv.weight"}),
        ("F.softmax(input=trunk.conv(x), dim=1)", {"conv.weight"}),
        ("-trunk.conv(x).T", {"conv.weight"}),
        ('x.new_full((3,), float("inf"), dtype=torch.float32, device=x.device)', set()),
    ],
)
def test_a_value_reaches_what_its_expression_reads(expression: str, parameters: set[str]) -> None:
    assert reached(f"loss = {expression}") == parameters


def test_a_write_in_place_reaches_every_name_of_the_memory() -> None:
    assert reached("a = x + 1\nb = a[:, 0]\nwritten = b.add_(trunk.token)\nloss = a.sum()") == {"token"}
    assert reached("a = x + 1\nwritten = set_item(a, (slice(None), 0), trunk.token)\nloss = a.sum()") == {"token"}
    assert reached("a = x + 1\na.add_(trunk.token)\nloss = a.sum()") == {"token"}


def test_a_write_in_place_does_not_reach_what_was_computed_before() -> None:
    assert reached("a = x + 1\nloss = a.sum()\nwritten = a.add_(trunk.token)") == set()


def test_several_results_are_unpacked() -> None:
    assert reached("a, b = trunk.conv(x).chunk(2)\nloss = a + b") == {"conv.weight"}


def test_a_name_that_is_never_read_is_noted_with_its_line() -> None:
    reading = reading_of("a = x + 1\nloss = x + 2")

    assert [(p.line, p.what) for p in reading.unread] == [(6, "'a' is never read")]


def test_a_deleted_name_is_forgotten() -> None:
    assert reached("a = trunk.conv(x)\nloss = a + 1\ndel a") == {"conv.weight"}


@pytest.mark.parametrize(
    ("body", "line", "what"),
    [
        ("loss = a", 6, "'a' is used before it is assigned"),
        ("loss = trunk.conv(x)\nloss = x", 7, "'loss' is assigned a second time"),
        ("x = trunk.conv(x)\nloss = x", 6, "'x' is assigned a second time"),
        ("a = x + 1\ndel a\nloss = a", 8, "used after it is deleted"),
        ("loss = trunk.convolution(x)", 6, "trunk.convolution does not exist"),
        ("loss = trunk.seq[2](x)", 6, r"trunk.seq\[2\] does not exist"),
        ("loss = trunk.seq[-1](x)", 6, r"trunk.seq\[-1\] does not exist"),
        ("loss = trunk.layers[0](x)", 6, "trunk.layers does not exist"),
        ("loss = torch.nothing(x)", 6, "torch.nothing does not exist"),
        ('loss = getattr(trunk, "co" + "nv")(x)', 6, "arithmetic on constants"),
        ('loss = exec("x")', 6, "uses 'exec'"),
        ('loss = __import__("os")', 6, "uses '__import__'"),
        ("loss = x.__class__", 6, "reads '__class__'"),
        ("loss = (lambda v: v)(x)", 6, "Lambda"),
        ("loss = [v for v in x]", 6, "ListComp"),
        ("if x:\n    pass\nloss = x", 6, "a statement of type If"),
        ("for i in x:\n    pass\nloss = x", 6, "a statement of type For"),
        ("with torch.no_grad():\n    pass\nloss = x", 6, "a statement of type With"),
        ("loss = x\nloss += 1", 7, "a statement of type AugAssign"),
        ("torch.manual_seed(0)\nloss = x", 6, "torch.manual_seed, which cannot be followed"),
        ("loss = torch.autograd.grad(x, x)", 6, "torch.autograd.grad, which cannot be followed"),
        ("loss = x.requires_grad_()", 6, "requires_grad_"),
        ("loss = x.item()", 6, "item"),
        ("a = x.backward()\nloss = x", 6, "calls .backward"),
        ("x.backward(retain_graph=True)\nloss = x", 6, "backward with arguments"),
        ("optimizer.add_param_group(x)\nloss = x", 6, "the optimizer is asked for something else"),
        ("loss = optimizer.scale(x)", 6, "a call that cannot be followed"),
        ("optimizer[1].scale(x).backward()\nloss = x", 6, "scaled by something else than optimizer.scale"),
        ("optimizer.scale(optimizer.scale(x)).backward()\nloss = x", 6, "a call that cannot be followed"),
        ("layer = trunk.conv\nloss = layer(x)", 6, "another name for a module"),
        ("loss = F.relu(trunk)", 6, "passes a module"),
        ("loss = torch.add(x, 1, out=(y, y))", 6, "writes to several tensors"),
        ("a = trunk.token.mul_(2)\nloss = a + x", 6, "writes into a parameter"),
        ("a = set_item(trunk.token, 0, x)\nloss = a + x", 6, "writes into a parameter"),
        ("loss = localize.runtime.model.load(x)", 6, "localize.runtime.model.load, which cannot be followed"),
        ("loss = x if y else x", 6, "conditional expression"),
        ("return x\nloss = x", 6, "return before the end"),
    ],
)
def test_what_cannot_be_followed_is_named_with_its_line(body: str, line: int, what: str) -> None:
    problems = reading_of(body).problems

    assert problems, "nothing was refused"
    with pytest.raises(AssertionError, match=what):
        raise AssertionError("; ".join(p.what for p in problems if p.line == line))


@pytest.mark.parametrize(
    ("extra", "what"),
    [
        ("import os", "imports 'os'"),
        ("from subprocess import run", "imports 'subprocess.run'"),
        ("FACTOR = 3", "Assign at the top level"),
        ("class A: pass", "ClassDef at the top level"),
        ("def f(a, b=1):\n    return a", "defaults"),
        ("def train_step(x):\n    return x", "'train_step' is defined twice"),
    ],
)
def test_the_top_level_holds_imports_and_functions_only(extra: str, what: str) -> None:
    problems = reading_of("loss = x", extra).problems

    assert any(what in problem.what for problem in problems), problems


def test_a_function_that_calls_itself_is_refused() -> None:
    problems = reading_of("loss = again(x)", "def again(x):\n    a = again(x)\n    return a").problems

    assert any("calls itself" in problem.what for problem in problems)


def test_a_call_that_hands_over_another_model_is_refused() -> None:
    problems = reading_of("loss = run(heads, x)", "def run(trunk, x):\n    return trunk.conv(x)").problems

    assert any("'trunk' is given something else" in problem.what for problem in problems)


def test_a_text_that_is_not_python_is_a_problem_and_not_an_exception() -> None:
    reading = read("def train_step(:\n", Trunk(), nn.ModuleDict())

    assert [(p.line, p.what) for p in reading.problems] == [(1, "not Python: invalid syntax")]


def test_the_path_names_values_and_lines() -> None:
    reading = reading_of("a = trunk.conv(x)\nb = F.relu(a) + 1\nloss = b.sum()")
    (node,) = (event.outputs[0] for event in reading.events if event.kind == "leave")

    path = reading.path("trunk.conv.weight", node)

    assert path == (
        "trunk.conv.weight -> a (train_step, line 6) -> b (train_step, line 7) -> loss (train_step, line 8)"
    )


@pytest.mark.slow
def test_fifty_five_segments_are_audited_without_data() -> None:
    with torch.device("meta"):
        model = zoo.create_model("cifar/resnet110", 10)
    local = transform(model, "dcl", example_input=torch.empty(2, 3, 32, 32, device="meta"))
    assert len(local.plan.losses) == 55

    found, _ = checks(local)

    assert all(check.ok for check in found)
