"""The commands that list methods and start a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Annotated, Any, Optional

import typer

from localize.cli import tables
from localize.cli.app import app
from localize.cli.flags import Force, Json
from localize.cli.printed import check_new_file, print_json, say, table_lines, write_file
from localize.errors import LocalizeError, UnknownNameError, did_you_mean

_PACKAGED = "localize"


@app.command("methods")
def list_methods(
    patterns: Annotated[
        Optional[list[str]],  # noqa: UP045  typer reads this at run time
        typer.Argument(metavar="GLOB...", help="Such as 'll-*', or FILE.py:CLASS, module:CLASS; default: all."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List packaged methods, and those that installed packages offer, with their options.

    A method that cannot be imported is listed with the reason, and the exit code is 1.
    """
    found = [*_packaged(), *_offered(), *_spelled(patterns or ())]
    wanted = [one for one in found if not patterns or any(fnmatchcase(one["name"], glob) for glob in patterns)]
    if not wanted:
        names = [one["name"] for one in found]
        raise UnknownNameError(
            f"no method is called {' or '.join(map(repr, patterns or ()))}.",
            facts=f"there are {len(names)}.",
            help=did_you_mean((patterns or [""])[0], names) or "localize methods",
        )
    if as_json:
        print_json(wanted)
    else:
        rows = [["method", "what trains a segment", "source", "from"]]
        rows += [[one["name"], one["summary"], one["source"] or "-", one["from"]] for one in wanted if not one["error"]]
        say("\n".join(table_lines(rows, right=())))
    for one in wanted:
        if one["error"]:
            say(f"error: {one['error']}", err=True)
    if any(one["error"] for one in wanted):
        raise typer.Exit(1)


def _packaged() -> Iterator[dict[str, Any]]:
    for name, about in tables.methods().items():
        yield _row(name, about.summary, about.source, _PACKAGED, about.options)


def _offered() -> Iterator[dict[str, Any]]:
    """Yield the methods of installed packages, imported."""
    from localize.outside import offers

    for offer in offers("localize.methods"):
        where = f"{offer.package} {offer.version}".strip()
        if offer.name in tables.methods():
            told = f"{offer.name!r} of package {offer.package} is not used: a packaged method has the same name.\n"
            yield _row(offer.name, "", "", where, error=f"{told}  help: --method {offer.value}")
            continue
        yield _imported(offer.name, where)


def _spelled(names: Any) -> Iterator[dict[str, Any]]:
    from localize.outside import is_spelled

    yield from (_imported(name, name.rpartition(":")[0]) for name in names if is_spelled(name))


def _imported(name: str, where: str) -> dict[str, Any]:
    from localize import methods
    from localize.recipes.citations import cited

    try:
        kind: Any = methods.get(name)
    except LocalizeError as error:
        return _row(name, "", "", where, error=error.on_command_line)
    told = (kind.__doc__ or "").strip().split("\n")[0]
    summary = "" if told.startswith(f"{kind.__name__}(") else told  # the docstring that dataclasses generate
    return _row(name, summary, cited(kind.reference) if kind.reference else "", where, tables.from_class(kind))


def _row(
    name: str, summary: str, source: str, where: str, options: tuple[tables.Option, ...] = (), error: str = ""
) -> dict[str, Any]:
    given = [{"name": one.name, "default": one.default, "help": one.help} for one in options]
    return {"name": name, "summary": summary, "source": source, "from": where, "options": given, "error": error}


@app.command("init")
def init(
    method: Annotated[
        str,
        typer.Argument(metavar="METHOD", help="Its name, or FILE.py:CLASS.", autocompletion=tables.complete_method),
    ],
    output: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(metavar="FILE", help="Default: METHOD.yaml in this directory."),
    ] = None,
    force: Force = False,
) -> None:
    """Write a recipe to start from, with the options of a method, the usual settings, and their meanings."""
    from localize import methods

    kind: Any = methods.get(method)
    path = output or f"{kind.name}.yaml"
    check_new_file(path, force=force)
    write_file(path, "\n".join(_recipe(method, tables.from_class(kind))) + "\n")
    say(f"written: {path}\nlocalize train --recipe {path}")


_SETTINGS = ("data", "augment", "epochs", "batch_size", "opt", "lr", "momentum", "weight_decay", "sched", "seed")


def _recipe(method: str, options: tuple[tables.Option, ...]) -> Iterator[str]:
    """Yield the lines of a commented recipe, in which every value is the default."""
    yield "# A recipe. To train: localize train --recipe FILE; to check it: localize recipes validate FILE."
    yield "notes: what this is for"
    yield "model: cifar/resnet20  # by name (localize models), or FILE.py:FACTORY"
    yield f"method: {method}"
    if options:
        yield "options:"
        yield from (f"  {one.name}: {_yaml(one.default)}{_comment(one)}" for one in options)
    yield "# cut:"
    yield "#   segments: 4  # default: one for each local layer"
    yield "train:"
    for one in tables.settings():
        if one.name in _SETTINGS:
            default = "none" if one.name == "augment" else one.default
            yield f"  {one.name}: {_yaml(default)}{_comment(one)}"


def _yaml(value: Any) -> str:
    import yaml

    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def _comment(one: tables.Option) -> str:
    from localize.cli.helping import SHORT, first_clause

    told = f"  # {SHORT.get(one.name) or first_clause(one.help)}" if one.help else ""
    return told + (f": {', '.join(one.choices)}" if one.choices and one.name not in SHORT else "")
