"""The README says what is so: its Python runs, its excerpts and tables are what the package makes."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

import localize
from localize import methods, zoo
from localize.ir import CutSpec

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


@pytest.mark.parametrize("name", ["methods", "measured", "trained", "published"])
def test_its_tables_are_what_the_command_writes(name: str) -> None:
    assert generated(name) == tables().TABLES[name]()


def test_every_method_was_measured_and_no_number_is_missing() -> None:
    rows = [line.split(" | ") for line in generated("measured").splitlines()[2:]]

    measured = {row[1].strip("`") for row in rows}
    named = {name for name in methods.names() if name not in measured}
    assert not named, f"{named} have no row"
    assert all(cell.strip(" |") for row in rows for cell in row)


def tables() -> ModuleType:
    """Return the command that writes the tables."""
    path = Path(__file__).parent.parent / "benchmarks" / "readme_tables.py"
    spec = importlib.util.spec_from_file_location("readme_tables", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_file_it_links_exists() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (Path(__file__).parent.parent / target).exists(), target
