"""Print tables and JSON, show work in progress, and write files in one step."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from localize.errors import MissingError
from localize.files import replacing
from localize.text import visible


@contextmanager
def working() -> Iterator[Callable[[str], None]]:
    """Show progress on stderr; yield the function to call with each new message."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=True)
    with console.status("...") as status:
        yield lambda name: status.update(escape(visible(name)))


def say(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Print a text; control characters in it are shown as escapes."""
    typer.echo(visible(text), err=err, nl=nl)


def print_json(value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    hidden = visible(text) != text  # then JSON's own escapes, for all letters beyond ASCII
    typer.echo(json.dumps(value, indent=2, ensure_ascii=True, allow_nan=False) if hidden else text)


def table_lines(rows: Iterable[list[str]], *, right: Iterable[int] | None = None) -> Iterator[str]:
    """Yield the rows as lines with aligned columns.

    Columns whose numbers are in ``right`` are aligned right; by default all but the first.
    """
    rows = list(rows)
    right = range(1, len(rows[0])) if right is None else right
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def check_new_file(path: str, *, force: bool) -> None:
    if Path(path).is_dir():
        raise MissingError(f"{path} is a folder.", help=f"{Path(path) / 'NAME'}")
    if Path(path).exists() and not force:
        raise MissingError(f"{path} exists.", help="choose another name, or --force to replace it")


def write_file(path: str, text: str) -> None:
    """Write a file in one step: whole, or not at all."""
    try:
        with replacing(Path(path)) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise MissingError(f"{path} cannot be written.", facts=str(error), help="choose another name") from error
