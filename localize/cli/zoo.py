"""The command on models by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

import localize
from localize.cli.app import app
from localize.cli.flags import Json
from localize.cli.printed import print_json, say, write_file
from localize.errors import OptionError


@app.command()
def models(
    patterns: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="GLOB...", help="Such as 'tv/resnet*' or '*vit*'; default: all."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Convert each model, without data, and keep the results in a file.")
    ] = False,
    run: Annotated[
        bool, typer.Option("--run", help="Also train models of up to 60 M parameters for one step.")
    ] = False,
    out: Annotated[
        str, typer.Option("--out", metavar="FILE", help="Results of --check; models in it are not checked again.")
    ] = "models.jsonl",
    retry: Annotated[bool, typer.Option("--retry", help="Check models again that have failed.")] = False,
    write: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--write", metavar="FILE.md", help="Write a page about the results."),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", metavar="N", min=1, help="Models at a time.")] = 2,
    timeout: Annotated[float, typer.Option("--timeout", metavar="SECONDS", help="Time limit for each model.")] = 300.0,
    memory: Annotated[
        float, typer.Option("--memory", metavar="GIB", help="Memory limit for each model (Linux).")
    ] = 8.0,
    as_json: Json = False,
) -> None:
    """List models by name, or check that they convert."""
    if not check and (run or retry or write):
        raise OptionError("--run, --retry and --write need --check.", help="--check, or leave them out")
    names = list(dict.fromkeys(name for pattern in patterns or ["*"] for name in _names(pattern, files=check)))
    if not check:
        print_json(names) if as_json else say("\n".join(names))
        return
    from localize import check as checking

    keys = [(kind, name) for kind in ("static", *(["run"] if run else [])) for name in names]
    found = checking.known(keys, Path(out), retry=retry)
    todo = [key for key in keys if key not in found]
    with _progress(len(keys), found.values()) as show:
        for row in checking.check(todo, Path(out), jobs=jobs, limits=checking.Limits(timeout, memory)):
            found[row["check"], row["name"]] = row
            show(row)
    rows = [found[key] for key in keys]
    if write is not None:
        write_file(write, checking.markdown(rows))
    if as_json:
        print_json(rows)
    else:
        say("\n".join(_checked(rows)))
        say(f"rows: {out}" + (f"; page: {write}" if write else ""))
    if not all(row["ok"] for row in rows):
        raise typer.Exit(1)


def _names(pattern: str, *, files: bool) -> list[str]:
    """Return the names of the models that match a pattern; with ``files``, a file of the user's is also a model."""
    from localize import zoo

    if files and zoo.library(pattern) == "file":
        return [zoo.resolve(pattern).name]
    names = zoo.list_models(pattern)
    if not names:
        raise localize.errors.UnknownNameError(
            f"no model is called {pattern!r}.", help=f"localize models '*{pattern.strip('*')}*', or localize models"
        )
    return names


def _checked(rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        for one in row["failures"]:
            first = one["message"].splitlines()[0] if one["message"] else ""
            yield f"{row['name']}: {one['stage']}: {one['error']}: {first}"
    for kind, verb in (("static", "convert"), ("run", "train")):
        mine = [row for row in rows if row["check"] == kind and "left_out" not in row]
        if mine:
            yield f"{sum(row['ok'] for row in mine)} of {len(mine)} models {verb}"
    if left := sum("left_out" in row for row in rows):
        yield f"{left} models were not run: too large"


@contextmanager
def _progress(total: int, before: Iterable[Mapping[str, Any]]) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Show on stderr how many models were checked, how many failed, and the last one.

    Yields the function to call with each result. If stderr is not a terminal, each model gets a line.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[failed]} failed"), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=console, transient=True) as bar:
        rows = list(before)
        failed = sum(not row["ok"] for row in rows)
        task = bar.add_task("", total=total, completed=len(rows), failed=failed)

        def show(row: Mapping[str, Any]) -> None:
            nonlocal failed
            failed += not row["ok"]
            bar.update(task, advance=1, failed=failed, description=row["name"])
            if not console.is_terminal:
                say(f"{'ok  ' if row['ok'] else 'FAIL'}  {row['name']}  {row['total']} s", err=True)

        yield show
