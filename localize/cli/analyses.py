"""The command that asks trained runs what their layers have learned."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from localize.cli.app import app
from localize.cli.flags import Json, TrustCode
from localize.cli.printed import check_new_file, print_json, say, table_lines, write_file
from localize.errors import OptionError, did_you_mean
from localize.text import csv_table

if TYPE_CHECKING:
    from localize.analysis import Confusion, Probe

WHAT = ("confusion", "probe", "cka")


@app.command()
def analyze(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN [RUN]", help="Folders of runs: one, or for cka two to be compared.")
    ],
    what: Annotated[str, typer.Option("--what", metavar="|".join(WHAT), help="What is asked.")],
    data_dir: Annotated[
        Optional[str],  # noqa: UP045  typer reads this at run time
        typer.Option("--data-dir", metavar="DIR", help="Where the data are now."),
    ] = None,
    device: Annotated[str, typer.Option("--device", metavar="TEXT", help="cpu, cuda, cuda:N, or auto.")] = "auto",
    csv: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--csv", metavar="FILE", help="Write the numbers as CSV too."),
    ] = None,
    trust_code: TrustCode = False,
    as_json: Json = False,
) -> None:
    """Say what the layers of trained runs have learned.

    confusion: for the model and every local loss, which classes are taken for which. probe: how well a linear
    classifier tells the classes apart by the features of each segment. cka: how similar the features of the segments
    are, within a run or between two.
    """
    if what not in WHAT:
        raise OptionError(
            f"--what cannot be {what!r}.", facts=f"its values are {', '.join(WHAT)}.", help=did_you_mean(what, WHAT)
        )
    most = 2 if what == "cka" else 1
    if len(runs) > most:
        raise OptionError(
            f"--what {what} takes {'one run' if most == 1 else 'two runs at most'}, not {len(runs)}.",
            facts=", ".join(runs),
            help="localize report compares any number of runs",
        )
    if csv is not None:
        check_new_file(csv, force=False)
    import localize
    from localize import analysis

    loaded = [localize.load(run, device=device, data_dir=data_dir, trust_code=trust_code) for run in runs]
    if what == "confusion":
        found: Any = analysis.confusion(loaded[0])
        shown, rows, plain = _confused(found), list(_counts(found)), _counted(found)
    elif what == "probe":
        found = analysis.probe(loaded[0])
        rows = [["segment", "ends_at", "features", "train_accuracy", "test_accuracy"]]
        rows += [list(dataclasses.astuple(one)) for one in found]
        shown = "\n".join(table_lines(_probed(found)))
        plain = {"probes": [dataclasses.asdict(one) for one in found]}
    else:
        found = analysis.cka(*loaded)
        values = [[round(value, 3) for value in row] for row in found.values.tolist()]
        rows = [["", *found.columns], *([name, *row] for name, row in zip(found.rows, values, strict=True))]
        shown = "\n".join(table_lines([[f"{one:.3f}" if isinstance(one, float) else one for one in r] for r in rows]))
        plain = {"rows": found.rows, "columns": found.columns, "values": found.values.tolist()}
    if csv is not None:
        write_file(csv, csv_table(rows))
    print_json({"what": what, "runs": runs, **plain}) if as_json else say(shown)


def _probed(found: Sequence[Probe]) -> Iterator[list[str]]:
    """Yield the lines of a table."""
    yield ["after", "features", "training images", "test images"]
    for one in found:
        accuracies = (f"{100 * value:.1f} %" for value in (one.train_accuracy, one.test_accuracy))
        yield [one.ends_at, str(one.width), *accuracies]


def _counted(found: Confusion) -> dict[str, Any]:
    counts = {name: one.tolist() for name, one in found.by.items()}
    return {"classes": found.classes, "accuracy": found.accuracy, "confusion": counts}


def _counts(found: Confusion) -> Iterator[list[Any]]:
    """Yield the lines of the CSV: one for every pair of classes that occurs, by what predicts."""
    yield ["predicted_by", "class", "predicted", "images"]
    for name, counts in found.by.items():
        for i, j in counts.nonzero().tolist():
            yield [name, found.classes[i], found.classes[j], int(counts[i, j])]


def _confused(found: Confusion) -> str:
    """Return a table: accuracy by class and by what predicts, and the pairs that are confused most."""
    by_class = found.by_class
    rows = [["class", *found.by]]
    for number, name in enumerate(found.classes):
        rows.append([name, *(f"{100 * by_class[one][number]:.1f} %" for one in found.by)])
    rows.append(["all", *(f"{100 * value:.1f} %" for value in found.accuracy.values())])
    lines = list(table_lines(rows))
    counts = next(iter(found.by.values())).clone()
    counts.fill_diagonal_(0)
    for place in counts.flatten().argsort(descending=True)[:5].tolist():
        i, j = divmod(place, len(found.classes))
        if counts[i, j]:
            lines.append(f"{found.classes[i]} is taken for {found.classes[j]}: {int(counts[i, j])} images")
    return "\n".join(lines)
