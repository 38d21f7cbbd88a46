"""Commands on packaged recipes."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from localize.cli.app import app
from localize.cli.flags import SETTINGS, Force, Json
from localize.cli.printed import check_new_file, print_json, say, table_lines, write_file
from localize.errors import UnknownNameError, did_you_mean

recipes_app = typer.Typer(name="recipes", help="List, show, copy and check recipes.", **SETTINGS)
app.add_typer(recipes_app)


def _filter(name: str, what: str) -> Any:
    return typer.Option(f"--{name}", metavar="GLOB", help=f"Only recipes of {what}.")


@recipes_app.command("ls")
def recipes_ls(
    patterns: Annotated[
        Optional[list[str]],  # noqa: UP045  typer reads this at run time
        typer.Argument(metavar="GLOB...", help="Such as '*-cifar10', or a method; default: all."),
    ] = None,
    method: Annotated[Optional[str], _filter("method", "this method")] = None,  # noqa: UP045
    model: Annotated[Optional[str], _filter("model", "this model, such as 'resnet110' or 'tv/*'")] = None,  # noqa: UP045
    data: Annotated[Optional[str], _filter("data", "this data set")] = None,  # noqa: UP045
    paper: Annotated[Optional[str], _filter("paper", "this paper, such as 'Ma et al. 2024' or '*2025'")] = None,  # noqa: UP045
    as_json: Json = False,
) -> None:
    """List the packaged recipes, with the method, model, data set and paper of each."""
    from localize import recipes
    from localize.recipes.citations import cited

    loaded = {name: recipes.load(name) for name in recipes.names()}
    listed: list[dict[str, Any]] = [
        {
            "name": name,
            "method": recipe.method,
            "model": recipe.model,
            "data": recipe.train.get("data"),
            "paper": recipe.paper or None,
            "cited": cited(recipe.paper) if recipe.paper else None,
        }
        for name, recipe in loaded.items()
    ]
    asked = {"method": method, "model": model, "data": data, "cited": paper}
    found = [
        one
        for one in listed
        if (not patterns or any(fnmatchcase(one["name"], glob) or one["method"] == glob for glob in patterns))
        and all(_fits(one[key], glob) for key, glob in asked.items() if glob is not None)
    ]
    if not found:
        typed = [*(patterns or ()), *(f"--{'paper' if k == 'cited' else k} {v}" for k, v in asked.items() if v)]
        known = {value for key, glob in asked.items() if glob for value in (one[key] for one in listed) if value}
        raise UnknownNameError(
            f"no recipe matches {' and '.join(map(repr, typed))}.",
            facts=f"there are {len(loaded)} recipes.",
            help=did_you_mean(next((v for v in asked.values() if v), (patterns or [""])[0]), known or set(loaded))
            or "localize recipes ls",
        )
    if as_json:
        print_json([{key: value for key, value in one.items() if key != "cited"} for one in found])
        return
    rows = [["recipe", "method", "model", "data set", "paper"]]
    for one in found:
        rows.append([one["name"], one["method"], one["model"] or "any", one["data"] or "any", one["cited"] or "-"])
    say("\n".join(table_lines(rows, right=())))


def _fits(value: str | None, glob: str) -> bool:
    """Return whether a value matches a pattern; for a model, the pattern may leave out the library."""
    if value is None:
        return False
    return any(fnmatchcase(one.lower(), glob.lower()) for one in (value, value.rpartition("/")[2]))


@recipes_app.command("show")
def recipes_show(name: Annotated[str, typer.Argument(metavar="NAME")]) -> None:
    """Print a packaged recipe."""
    from localize import recipes

    say(recipes.text(name), nl=False)


@recipes_app.command("cp")
def recipes_cp(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    output: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(metavar="FILE", help="Default: NAME.yaml in this directory."),
    ] = None,
    force: Force = False,
) -> None:
    """Copy a packaged recipe into a file that you can change."""
    from localize import recipes

    text = recipes.text(name)
    path = output or f"{name}.yaml"
    check_new_file(path, force=force)
    write_file(path, text)
    say(f"written: {path}")


@recipes_app.command("validate")
def recipes_validate(files: Annotated[list[str], typer.Argument(metavar="FILE...")]) -> None:
    """Check every key, value and option of recipe files."""
    from localize import methods, recipes

    for file in files:
        recipe = recipes.load(Path(file) if Path(file).exists() else file)
        methods.create(recipe.method, **recipe.options)  # a method of the user's own is imported only here
        say(f"{file}: ok, {recipe.method} on {recipe.model or 'any model'}")
