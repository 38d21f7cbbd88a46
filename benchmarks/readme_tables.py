"""Write the tables of the README that are made from the package and from recorded results, and nothing by hand.

Everything between ``<!-- generated: NAME -->`` and ``<!-- /generated -->`` is replaced::

    python benchmarks/readme_tables.py
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

from localize import methods, recipes
from localize.recipes import Recipe
from localize.recipes.citations import cited

HERE = Path(__file__).parent
README = HERE.parent / "README.md"


def methods_table() -> str:
    """Return one row for every method, and for every preset of one that is for any model."""
    lines = ["| name | what trains a segment | source |", "|---|---|---|"]
    presets = {name: recipes.load(name) for name in recipes.names() if name not in methods.names()}
    for name in methods.names():
        kind = methods.get(name)
        lines.append(f"| `{name}` | {_first_line(kind.__doc__)} | {cited(kind.reference)} |")
        for preset, recipe in presets.items():
            if recipe.method == name and recipe.model is None:
                lines.append(f"| `{preset}` | {_preset(recipe)} | {cited(kind.reference)} |")
    return "\n".join(lines)


def _first_line(text: str | None) -> str:
    return (text or "").strip().splitlines()[0]


def _preset(recipe: Recipe) -> str:
    """Say of what a recipe is a preset."""
    options = ", ".join(f"{name}={value}" for name, value in recipe.options.items())
    terms = " and ".join(f"`{term.branch}`" for term in recipe.terms if term.branch != "own")
    return f"`{recipe.method}`" + (f" with {options}" if options else "") + (f" plus {terms}" if terms else "")


def measured_table() -> str:
    """Return what ``method_table.py`` has recorded."""
    benchmark = _benchmark("method_table")
    return benchmark.table(benchmark.read(HERE / "method_table.jsonl"))


def trained_table() -> str:
    """Return what ``localize compare --train ... --json`` has printed into ``trained.json``."""
    lines = ["| recipe | net | data | mean | std | n | hours |", "|---|---|---|---:|---:|---:|---:|"]
    for row in json.loads((HERE / "trained.json").read_text(encoding="utf-8"))["rows"]:
        name, net = f"`{row['recipe']}`", row["model"].partition("/")[2]
        numbers = f"{100 * row['mean']:.2f} | {100 * row['std']:.2f} | {len(row['accuracies'])} | {row['hours']:.2f}"
        lines.append(f"| {name} | {net} | {row['data']} | {numbers} |")
    return "\n".join(lines)


def published_table() -> str:
    """Return the test accuracies that papers print: recipes that differ in the data set alone are in one row."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for name in recipes.names():
        recipe = recipes.load(name)
        values = [one.value for one in recipe.expected if one.metric == "test_accuracy"]
        if values:
            data = recipe.train["data"]
            family = name.replace(data.removesuffix("_extra"), "*")
            found.setdefault((cited(recipe.paper), family), {})[data] = values[0]
    lines = [f"| paper | recipe | {' | '.join(SETS)} |", "|---|---|" + "---:|" * len(SETS)]
    for (paper, family), row in sorted(found.items()):
        cells = [f"{100 * row[data]:.2f}" if data in row else "" for data in SETS]
        lines.append(f"| {paper} | `{family}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


SETS = ("mnist", "fashion_mnist", "cifar10", "cifar100", "svhn", "svhn_extra", "stl10", "imagenet")
TABLES: Mapping[str, Callable[[], str]] = {
    "methods": methods_table,
    "measured": measured_table,
    "trained": trained_table,
    "published": published_table,
}


def main() -> None:
    """Replace the tables of the README."""
    text = README.read_text(encoding="utf-8")
    for name, make in TABLES.items():
        mark = rf"(?<=<!-- generated: {name} -->\n).*?(?=\n<!-- /generated -->)"
        before, after = re.split(mark, text, maxsplit=1, flags=re.S)
        text = before + make() + after
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
