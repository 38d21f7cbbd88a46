"""Commands on packaged recipes."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Optional

import typer

from localize.cli.app import app
from localize.cli.flags import SETTINGS, Force, Json
from localize.cli.printed import check_new_file, print_json, say, table_lines, write_file
from localize.errors import UnknownNameError, did_you_mean

recipes_app = typer.Typer(name="recipes", help="List, show, copy and check recipes.", **SETTINGS)
app.add_typer(recipes_app)


@recipes_app.command("ls")
def recipes_ls(
    patterns: Annotated[
        Optional[list[str]],  # noqa: UP045  typer reads this at run time
        typer.Argument(metavar="GLOB...", help="Such as '*-cifar10', or a method; default: all."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the packaged recipes: method, model, data set and paper of each."""
    from localize import recipes
    from localize.recipes.citations import cited

    loaded = {name: recipes.load(name) for name in recipes.names()}
    names = [
        name
        for name, recipe in loaded.items()
        if not patterns or any(fnmatchcase(name, one) or recipe.method == one for one in patterns)
    ]
    if not names:
        raise UnknownNameError(
            f"no recipe is called {' or '.join(map(repr, patterns or ()))}.",
            facts=f"there are {len(loaded)}.",
            help=did_you_mean((patterns or [""])[0], loaded) or "localize recipes ls",
        )
    found = [
        {
            "name": name,
            "method": recipe.method,
            "model": recipe.model,
            "data": recipe.train.get("data"),
            "paper": recipe.paper or None,
        }
        for name, recipe in ((name, loaded[name]) for name in names)
    ]
    if as_json:
        print_json(found)
        return
    rows = [["recipe", "method", "model", "data set", "paper"]]
    for one in found:
        rows.append(
            [
                one["name"],
                one["method"],
                one["model"] or "any",
                one["data"] or "any",
                cited(one["paper"]) if one["paper"] else "-",
            ]
        )
    say("\n".join(table_lines(rows, right=())))


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
    """Copy a packaged recipe into a file, to change it."""
    from localize import recipes

    text = recipes.text(name)
    path = output or f"{name}.yaml"
    check_new_file(path, force=force)
    write_file(path, text)
    say(f"written: {path}")


@recipes_app.command("validate")
def recipes_validate(files: Annotated[list[str], typer.Argument(metavar="FILE...")]) -> None:
    """Check recipe files: every key, every value, every option."""
    from localize import methods, recipes

    for file in files:
        recipe = recipes.load(Path(file) if Path(file).exists() else file)
        methods.create(recipe.method, **recipe.options)  # one of the user's is imported only here
        say(f"{file}: ok, {recipe.method} on {recipe.model or 'any model'}")
