"""Commands on folders of images."""

from __future__ import annotations

from typing import Annotated

import typer

from localize.cli.app import app
from localize.cli.flags import SETTINGS, Json
from localize.cli.printed import print_json, say

data_app = typer.Typer(name="data", help="Check folders of images.", **SETTINGS)
app.add_typer(data_app)


@data_app.command("check")
def data_check(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="Folder with train/CLASS and val/CLASS, or with class folders.")
    ],
    as_json: Json = False,
) -> None:
    """Decode every image of a folder, and report damaged files and oddities.

    Exit code 1 if files are damaged, or appear in both parts.
    """
    from localize.train.data import inspection, sources

    found = inspection.inspect(sources.every_part(folder), everything=True, progress=None)
    if as_json:
        print_json(inspection.to_dict(found))
    else:
        say("\n".join(inspection.lines(found)))
    if not found.ok:
        raise typer.Exit(1)
