"""What MkDocs makes of this folder besides its pages: reference, a page for each method, and files that pages link.

``mkdocs.yml`` names this file as a hook. Nothing that is made here is written into the repository.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the pages are about this checkout, whatever is installed
os.environ["COLUMNS"] = "100"  # of help texts

import pydantic
import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from typer.testing import CliRunner

from localize import methods, options, recipes
from localize.cli import app

PAGES = {
    "README.md": "readme.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "MODELS.md": "models_list.md",
}
"""Pages at the top of the repository, and where they are on the site."""
_LINK = re.compile(r"\[([^\[\]]*)\]\(([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are generated, and the files at the top of the repository."""
    made = {
        "reference/cli.md": command_line(),
        "reference/recipe.md": recipe_schema(),
        "reference/recipe.schema.json": json.dumps(schema(), indent=2),
        **{f"methods/{name}.md": method(name) for name in methods.names()},
        **{there: (ROOT / here).read_text(encoding="utf-8") for here, there in PAGES.items()},
    }
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    linked = {target for file in files.documentation_pages() for target in _linked(file)}
    for path in sorted(linked):
        files.append(File.generated(config, f"files/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links that leave ``docs/`` point to where their files are on the site; a folder is named, and not linked."""
    here = page.file.src_uri

    def placed(found: re.Match[str]) -> str:
        target = _in_repository(here, found[2])
        if target is None:
            return found[0]
        there = _on_site(target)
        if there is None:
            return found[1]
        return f"[{found[1]}]({posixpath.relpath(there, posixpath.dirname(here) or '.')}{found[3] or ''})"

    return _LINK.sub(placed, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Show names that docstrings refer to as names."""
    return re.sub(r":(?:attr|class|func|meth|mod):<code>~?(.*?)</code>", r"<code>\1</code>", html)


def _in_repository(page: str, target: str) -> str | None:
    """Return the path in the repository that a link of a page leads to; None for one that stays on the site."""
    if "://" in target or target.startswith("mailto:"):
        return None
    home = {there: here for here, there in PAGES.items()}.get(page)
    if home is None:
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
        return None if path.startswith("docs/") else path
    return posixpath.normpath(target)


def _on_site(path: str) -> str | None:
    """Return where a file of the repository is on the site; None for a folder."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"files/{path}" if (ROOT / path).is_file() else None


def _linked(file: File) -> list[str]:
    """Return the files outside of ``docs/`` that a page links, which are copied."""
    found = [_in_repository(file.src_uri, match[2]) for match in _LINK.finditer(file.content_string)]
    placed = [path for path in found if path is not None and (_on_site(path) or "").startswith("files/")]
    return placed


# --------------------------------------------------------------------------------------------------------- reference


def command_line() -> str:
    """Return a section for every command, with its help."""
    group: Any = typer.main.get_command(app)
    parts = ["# Command line", "`localize COMMAND --help` prints the short form, `--help-all` what is here."]
    for name, command in group.commands.items():
        inner = getattr(command, "commands", None)
        for words in [[name]] if inner is None else [[name, one] for one in inner]:
            printed = CliRunner().invoke(app, [*words, "--help-all"])
            if printed.exit_code != 0:
                printed = CliRunner().invoke(app, [*words, "--help"])
            if printed.exit_code != 0:
                raise RuntimeError(f"localize {' '.join(words)} --help: {printed.output}")
            parts += [f"## localize {' '.join(words)}", f"```text\n{printed.stdout.rstrip()}\n```"]
    return "\n\n".join(parts) + "\n"


def schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe."""
    found = pydantic.TypeAdapter(recipes.Recipe).json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}


def recipe_schema() -> str:
    """Return the page about the schema."""
    rows = [f"| `{name}` | {_type(about)} |" for name, about in schema()["properties"].items()]
    return "\n".join(
        [
            "# Recipe schema",
            "",
            "[recipe.schema.json](recipe.schema.json) is the JSON schema of a recipe, for editors that complete and",
            "check YAML. `localize recipes validate FILE` checks more: names of models, options of the method, values.",
            "[Recipes](../recipes.md) says what they are for.",
            "",
            "| key | type |",
            "|---|---|",
            *rows,
            "",
        ]
    )


def _type(about: dict[str, Any]) -> str:
    if "anyOf" in about:
        return " or ".join(_type(one) for one in about["anyOf"])
    if "$ref" in about:
        return about["$ref"].rpartition("/")[2]
    return str(about.get("type", "any")).replace("null", "nothing")


def method(name: str) -> str:
    """Return the page of a method, made from its file."""
    kind = methods.get(name)
    module = __import__(kind.__module__, fromlist=["_"])
    told = textwrap.dedent(module.__doc__ or "").strip()
    lines = [f"# {name}", "", (kind.__doc__ or "").strip().splitlines()[0], "", told.replace("::\n", ":\n"), ""]
    lines += ["## Source", "", kind.reference, ""]
    if kind.deviations:
        lines += ["## Where it deviates", "", *(f"- {one}" for one in kind.deviations), ""]
    found = options.of(kind)
    if found:
        lines += ["## Options", "", "| option | default | meaning | values |", "|---|---|---|---|"]
        for one in found:
            values = ", ".join(one.choices) or ("" if one.low is None else f"from {one.low:g}")
            lines.append(f"| `{one.name}` | `{one.default}` | {one.help.replace('|', '/')} | {values} |")
        lines.append("")
    loaded = {preset: recipes.load(preset) for preset in recipes.names()}
    mine = [(preset, recipe) for preset, recipe in loaded.items() if recipe.method == name]
    if mine:
        lines += ["## Recipes", "", "| recipe | model | data |", "|---|---|---|"]
        lines += [f"| `{preset}` | {r.model or 'any'} | {r.train.get('data') or 'any'} |" for preset, r in mine]
        lines.append("")
    where = Path(module.__file__ or "").relative_to(ROOT) if ROOT in Path(module.__file__ or "").parents else None
    if where is not None:
        lines.append(f"The method is one file: [{where}](../../{where.as_posix()}).")
    return "\n".join(lines) + "\n"
