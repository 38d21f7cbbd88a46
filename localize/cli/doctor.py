"""The command that checks the installation."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from localize.cli.app import app
from localize.cli.flags import Json
from localize.cli.printed import print_json, say

_MARKS = {"ok": "ok  ", "missing": "-   ", "problem": "FAIL"}


@app.command()
def doctor(
    check: Annotated[
        bool,
        typer.Option("--check/--no-check", help="Train a small net for one step and audit it; takes at most a minute."),
    ] = True,
    as_json: Json = False,
) -> None:
    """Check the installation: versions, devices, data, extras, allocator.

    Exit code 1 if something is wrong. A missing extra or data set does not count as wrong.
    """
    from localize.check import doctor as looking

    found = []
    section = ""
    for one in looking.examine(check=check):
        found.append(one)
        if as_json:
            continue
        if one.section != section:
            section = one.section
            say(section)
        advice = f"  ({one.help})" if one.help else ""
        say(f"  {_MARKS[one.kind]}  {one.name}: {one.told}{advice}")
    if as_json:
        print_json([dataclasses.asdict(one) for one in found])
    if any(one.kind == "problem" for one in found):
        raise typer.Exit(1)
