"""The README and docs/ say what is so: code runs, recipes load, commands parse, tables are what is recorded."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer

import localize
from localize import methods, recipes, zoo
from localize.cli import app
from localize.ir import CutSpec

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = ROOT / "docs"
TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
PAGES = {name: ROOT / name for name in TOP} | {
    path.relative_to(DOCS).as_posix(): path for path in sorted(DOCS.rglob("*.md"))
}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}


@functools.cache
def tables() -> ModuleType:
    """Return the command that writes the tables."""
    path = ROOT / "benchmarks" / "readme_tables.py"
    spec = importlib.util.spec_from_file_location("readme_tables", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def generated(name: str) -> str:
    """Return the part of a page between two marks; it is on one page."""
    (found,) = (
        text
        for page in TEXTS.values()
        for text in re.findall(rf"<!-- generated: {name} -->\n(.*?)\n?<!-- /", page, re.S)
    )
    return found


def blocks(language: str) -> list[Any]:
    """Return the code blocks of a language that are not excerpts, with their pages."""
    found = []
    for name, page in TEXTS.items():
        page = re.sub(r"<!-- generated: step -->.*?<!-- /generated -->", "", page, flags=re.S)
        codes = re.findall(rf"^```{language}\n(.*?)^```", page, re.S | re.M)
        for i, code in enumerate(codes):
            marks = [pytest.mark.slow] * ("localize.audit(" in code)
            found.append(pytest.param(code, id=f"{name}-{i}", marks=marks))
    return found


@pytest.mark.filterwarnings("ignore::UserWarning:torch")  # Inductor, of the machine's compilers
@pytest.mark.parametrize("code", blocks("python"))
def test_python_examples_run(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs, options: graph)  # it takes minutes

    exec(compile(code, "README.md", "exec", dont_inherit=True), {"__name__": "__main__"})


@pytest.mark.parametrize("code", blocks("yaml"))
def test_recipes_load(code: str) -> None:
    assert recipes.parse(code, "README.md").method in methods.names()


def commands() -> list[Any]:
    """Return the command lines of localize on all pages, without their comments."""
    found = []
    for name, page in TEXTS.items():
        for block in re.findall(r"^```\n(.*?)^```", page, re.S | re.M):
            for line in block.splitlines():
                if match := re.match(r"(?:\$ )?localize (.*)", line):
                    found.append(pytest.param(shlex.split(match[1], comments=True), id=f"{name}: {match[1][:50]}"))
    return found


@pytest.mark.parametrize("words", commands())
def test_command_lines_are_understood(words: list[str]) -> None:
    group = typer.main.get_command(app)
    with group.make_context("localize", words, resilient_parsing=True) as context:
        name, command, rest = group.resolve_command(context, words)
        command.make_context(name, rest, parent=context)


def test_every_language_of_a_block_is_one_that_is_checked() -> None:
    found = {language for page in TEXTS.values() for language in re.findall(r"^```(\w+)$", page, re.M)}
    assert found == {"python", "yaml"}


def test_the_step_is_what_is_generated() -> None:
    excerpt = generated("step").removeprefix("```python\n").removesuffix("\n```")

    model = zoo.create_model("cifar/resnet20")
    local = localize.transform(model, "auglocal", example_input=torch.empty(2, 3, 32, 32), d=2, cut=CutSpec(segments=4))

    assert excerpt in local.source


@pytest.mark.slow
def test_the_audit_prints_what_is_quoted() -> None:
    model = zoo.create_model("cifar/resnet20")
    x, y = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    local = localize.transform(model, "auglocal", example_input=x, d=2, cut=CutSpec(segments=4))

    report = localize.audit(local, (x, y))

    claims = {check.id: check.claim for check in report.checks}
    quoted = re.findall(r"^ok +(\S+) +(.+)$", README, re.M)
    assert len(quoted) == 6
    assert all(claims[name] == claim for name, claim in quoted)
    of_folder = len(report.checks) + 1  # the audit of a folder compares its other files as well
    assert f"by auglocal: all {of_folder} checks hold" in README


def test_the_comparison_that_is_quoted_is_what_was_recorded() -> None:
    rows = [json.loads(line) for line in (ROOT / "benchmarks" / "memory.jsonl").read_text().splitlines()]
    recorded = {row["step"]: row for row in rows if (row["model"], row["batch"]) == ("cifar/resnet110", 1024)}
    quoted = dict(line.split("  ", 1) for line in generated("compare").splitlines()[3:-1])
    assert len(quoted) == 5

    for name in set(quoted) - {"auglocal:d=2, losses summed"}:
        row = recorded[name.replace(":d=2", " --d 2")]
        for shown in (f"{row['macs']:,}", f"{row['saved'] / 2**20:,.1f} MiB", f"{row['peak'] / 2**20:,.1f} MiB"):
            assert f" {shown} " in quoted[name], name


def test_tables_are_what_the_command_writes() -> None:
    for name, make in tables().TABLES.items():
        assert generated(name) == make(), name


def test_the_readme_counts_recipes_and_models_as_they_are_counted() -> None:
    (converted,) = re.findall(r"^\*\*([\d,]+ of [\d,]+) models convert", (ROOT / "MODELS.md").read_text(), re.M)

    assert f"{len(recipes.names())} recipes" in README
    assert f"{converted} names" in README
    assert f"{converted} names" in TEXTS["models.md"]


def test_every_generated_part_is_checked() -> None:
    marked = {name for page in TEXTS.values() for name in re.findall(r"<!-- generated: (\w+) -->", page)}
    assert marked == {"step", "compare", *tables().TABLES}


def test_every_method_was_measured_and_no_number_is_missing() -> None:
    rows = [line.split(" | ") for line in generated("measured").splitlines()[2:]]

    measured = {row[1].strip("`") for row in rows}
    named = {name for name in methods.names() if name not in measured}
    assert not named, f"{named} have no row"
    assert all(cell.strip(" |") for row in rows for cell in row)


@pytest.mark.parametrize("name", PAGES)
def test_every_file_that_a_page_links_exists(name: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", TEXTS[name]):
        assert "://" in target or (PAGES[name].parent / target).exists(), target


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= 1500


def test_every_page_is_in_the_menu_of_the_site() -> None:
    menu = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    generated_ones = {f"methods/{name}.md" for name in methods.names()} | {"reference/cli.md", "reference/recipe.md"}

    assert len(menu) == len(set(menu))
    assert {name for name in PAGES if name not in TOP} | generated_ones <= set(menu)


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "notebooks").glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_are_kept_without_what_they_print(path: Path) -> None:
    """CI runs them."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]

    assert cells
    assert all(not cell.get("outputs") for cell in cells)
