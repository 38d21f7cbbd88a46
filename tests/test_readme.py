"""The README says what is so: its Python runs, its excerpts and tables are what the package makes."""

from __future__ import annotations

import re
from pathlib import Path

import torch

import localize
from localize import methods, zoo
from localize.ir import CutSpec
from tests.plans import plan

README = (Path(__file__).parent.parent / "README.md").read_text()


def generated(name: str) -> str:
    """Return the part of the README between two marks."""
    return re.search(rf"<!-- generated: {name} -->\n(.*?)\n<!-- /generated -->", README, re.S)[1]


def test_the_python_example_runs() -> None:
    block = re.search(r"## In Python\n\n```python\n(.*?)```", README, re.S)[1]

    exec(compile(block, "README.md", "exec"), {})


def test_the_step_is_what_is_generated() -> None:
    excerpt = generated("step").removeprefix("```python\n").removesuffix("\n```")

    model = zoo.create_model("cifar/resnet20")
    local = localize.transform(model, "auglocal", example_input=torch.empty(2, 3, 32, 32), d=2, cut=CutSpec(segments=4))

    assert excerpt in local.source


def test_the_audit_prints_what_is_quoted() -> None:
    model = zoo.create_model("cifar/resnet20")
    x, y = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    local = localize.transform(model, "auglocal", example_input=x, d=2, cut=CutSpec(segments=4))

    report = localize.audit(local, (x, y))

    claims = {check.id: check.claim for check in report.checks}
    quoted = re.findall(r"^ok +(\S+) +(.+)$", README, re.M)
    assert len(quoted) == 6
    assert all(claims[name] == claim for name, claim in quoted)
    assert f"by auglocal: all {len(report.checks)} checks hold" in README


def test_the_table_of_methods_is_what_they_add() -> None:
    rows = [line for line in generated("methods").splitlines() if line.startswith("| `")]

    assert len(rows) == len(methods.names())
    for row, name in zip(rows, methods.names(), strict=True):
        made = plan("cifar/resnet110", name)
        size = sum(block.size for block in made.blocks if block.role != "segment")
        macs = sum(block.macs for block in made.blocks if block.role != "segment")
        update = "once, at the end" if made.update == "end" else "after each segment"
        assert row.startswith(f"| `{name}` | {len(made.segments)} | {size:,} | {macs:,} | {update} |")


def test_every_file_it_links_exists() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (Path(__file__).parent.parent / target).exists(), target
