"""The command that analyses what the layers of trained runs have learned."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from localize.cli.app import app
from localize.cli.flags import Force, Json, TrustCode
from localize.cli.printed import check_new_file, print_json, say, table_lines, write_file
from localize.errors import OptionError, did_you_mean
from localize.text import csv_table

WHAT = ("confusion", "probe", "cka", "mi", "labels", "tsne", "saliency", "features", "convergence", "cost")


@app.command()
def analyze(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folders of runs: see `localize train`.")],
    what: Annotated[str, typer.Option("--what", metavar="NAME", help="The analysis: see above.")],
    output: Annotated[
        Optional[str],  # noqa: UP045  typer reads this at run time
        typer.Option("--output", "-o", metavar="DIR", help="Write a picture and its CSV there; resume if interrupted."),
    ] = None,
    csv: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--csv", metavar="FILE", help="Write the numbers as CSV."),
    ] = None,
    epochs: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--epochs", metavar="N", min=1, help="mi: epochs of the networks that estimate it; default 10."),
    ] = None,
    data_dir: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--data-dir", metavar="DIR", help="Where the data are now."),
    ] = None,
    device: Annotated[str, typer.Option("--device", metavar="TEXT", help="cpu, cuda, cuda:N, or auto.")] = "auto",
    force: Force = False,
    trust_code: TrustCode = False,
    as_json: Json = False,
) -> None:
    """Analyse what the layers of trained runs have learned.

    \b
    confusion    which classes the model and each local loss confuse (one run)
    probe        how well a linear classifier does on each segment's input
    cka          similarity of layers: in one run, or of others to the first run
    mi           information about image, class, and the rest (trains networks)
    labels       label embeddings: similarity, confusions, t-SNE (one run)
    tsne         which images have similar features, by layer (one run)
    saliency     where images look like a label (one run with label embeddings)
    features     feature maps of one test image
    convergence  loss and accuracy over epochs
    cost         accuracy against memory, arithmetic and time, with Pareto front

    The pictures of probe, cka, mi, convergence and cost average runs of one recipe with different seeds.
    """
    if what not in WHAT:
        raise OptionError(
            f"--what cannot be {what!r}.", facts=f"its values are {', '.join(WHAT)}.", help=did_you_mean(what, WHAT)
        )
    runs = list(dict.fromkeys(runs))
    if csv is not None:
        check_new_file(csv, force=force)
    import localize
    from localize.analysis import asked, figures
    from localize.analysis.kept import Parts

    files = []
    if output is not None:
        figures.check()
        files = [str(Path(output) / f"{what}.{end}") for end in (asked.ANALYSES[what].picture, "csv")]
        for file in files:
            check_new_file(file, force=force)
    options = {} if epochs is None else {"epochs": epochs}
    asked.check(what, runs, options)
    loaded = {run: localize.load(run, device=device, data_dir=data_dir, trust_code=trust_code) for run in runs}
    found = asked.ask(what, loaded, Parts(output), **options)
    if files:
        figures.save(found, Path(files[0]))
    for file in [*files[1:], *([] if csv is None else [csv])]:
        write_file(file, csv_table(found.csv()))
    if as_json:
        print_json({"what": what, "runs": runs, **found.plain(), "files": files})
        return
    say("\n".join([*table_lines(found.table()), *found.notes()]))
    for file in files:
        say(f"written: {file}")
