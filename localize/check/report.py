"""Write rows down for people: how many models convert, what each family is like, and every failure with its reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any

from localize.check.one import BATCH, LARGEST, Row

LIBRARIES = {"cifar": "cifar", "tv": "torchvision", "timm": "timm", "file": "files"}
LEGEND = (
    "A family is a file of its library. *Cuts*: places where the model can be cut. *Live*: the most tensors that cross "
    "one. *Segments*: by each method's own local layers. *Operations* (multiply-adds) and *parameters*: the share of "
    "the largest piece, with all cuts made."
)
NAMED = 6
"""Number of models that a failure names; the others are counted."""


def markdown(rows: Iterable[Row]) -> str:
    """Return a Markdown page about these rows. It depends on what they hold, and not on their order.

    Args:
        rows: at most one for each check of each model.
    """
    rows = sorted(rows, key=_place)
    static = [row for row in rows if row["check"] == "static"]
    run = [row for row in rows if row["check"] == "run" and "left_out" not in row]
    lines = ["# Which models convert", "", *_headline(static, run), "", *_libraries(static, run), ""]
    lines += [*_what_was_done(rows, run), "", *_pieces(static), ""]
    lines += ["## Families", "", LEGEND, ""]
    for library, members in groupby(static, key=lambda row: row["library"]):
        lines += [f"### {LIBRARIES[library]}", "", *_families(list(members)), ""]
    lines += ["## Failures", "", *_failures(rows), ""]
    lines += ["## Where cuts go through several tensors", "", *_several(static), ""]
    lines += ["## What no cut can help", "", *_indivisible(static), ""]
    return "\n".join(lines)


def _place(row: Row) -> tuple[int, str, str, str]:
    return list(LIBRARIES).index(row["library"]), row["family"], row["name"], row["check"]


# ----------------------------------------------------------------------------------------------------------- headline


def _headline(static: Sequence[Row], run: Sequence[Row]) -> Iterator[str]:
    told = f"**{_of(static)} models convert.**"
    yield f"{told} **{_of(run)} that were run train for a step and pass its audit.**" if run else told


def _libraries(static: Sequence[Row], run: Sequence[Row]) -> Iterator[str]:
    yield "| library | models | convert | were run | train |"
    yield "|---|---:|---:|---:|---:|"
    for library, title in LIBRARIES.items():
        mine, ran = ([row for row in rows if row["library"] == library] for rows in (static, run))
        if mine:
            counts = (len(mine), _good(mine), len(ran), _good(ran))
            yield f"| {title} | {' | '.join(f'{count:,}' for count in counts)} |"


def _what_was_done(rows: Sequence[Row], run: Sequence[Row]) -> Iterator[str]:
    versions = sorted({", ".join(f"{name} {version}" for name, version in row["versions"].items()) for row in rows})
    methods = list(dict.fromkeys(method for row in rows for method in row.get("methods", ())))
    yield f"Written by `localize models --check{' --run' if run else ''} --write FILE` with {'; '.join(versions)}."
    yield ""
    yield (
        f"*Converts*: without data (meta device), the forward is recorded, cut, planned by {_listed(methods)}, written "
        "as text, and the text is audited; all segments and heads (by the last method, a whole training step) then run "
        f"on {BATCH} images, a number that the recording has not seen, and give scores of the right shape."
    )
    if run:
        small = sum(row["check"] == "static" and row.get("parameters", LARGEST + 1) <= LARGEST for row in rows)
        yield ""
        yield (
            f"*Trains* (models of up to {LARGEST // 10**6} M parameters, of which {len(run):,} of {small:,} were run; "
            "fresh weights, CPU, two images, of half the side where the model takes that): the logits in eval mode are "
            "the same before and after, bit for bit, and so are the keys; one step runs; the audit of the executed "
            "step holds, so that each loss reaches exactly the parameters it declares."
        )


def _pieces(static: Sequence[Row]) -> Iterator[str]:
    cut = [row for row in static if "largest" in row]
    if not cut:
        return
    halves, quarters = (sum(row["largest"]["macs"]["share"] <= most for row in cut) for most in (0.5, 0.25))
    yield (
        f"With all cuts made, the largest piece holds at most half of the operations in {halves:,} of {len(cut):,} "
        f"models, and at most a quarter in {quarters:,}."
    )


# ----------------------------------------------------------------------------------------------------------- families


def _segments(method: str, row: Row) -> Any:
    return row.get("methods", {}).get(method, {}).get("segments")


def _largest(what: str, row: Row) -> Any:
    return _percent(row["largest"][what]) if "largest" in row else None


def _families(rows: Sequence[Row]) -> Iterator[str]:
    methods = sorted({method for row in rows for method in row.get("methods", ())})
    names = ["family", "models", "cuts", "live", *(f"segments, {method}" for method in methods)]
    names += ["operations, %", "parameters, %", "notes"]
    yield f"| {' | '.join(names)} |"
    yield f"|---|{'---:|' * (len(names) - 2)}---|"
    for family, found in groupby(rows, key=lambda row: row["family"]):
        members = list(found)
        good = _good(members)
        cells = [family, str(good) if good == len(members) else f"{good} of {len(members)}"]
        cells += [_range(members, lambda row: row.get("cuts")), _range(members, lambda row: row.get("live"))]
        cells += [_range(members, partial(_segments, m)) for m in methods]
        for what in ("macs", "parameters"):
            cells.append(_range(members, partial(_largest, what)))
        yield f"| {' | '.join(cells)} | {'; '.join(_notes(members))} |"


def _notes(rows: Sequence[Row]) -> Iterator[str]:
    """Say what is special about a family; a number of models stands after what is not true of all."""
    kinds = [sorted({leaf["kind"] for leaf in row.get("leaves", ())}) for row in rows]
    if any(kinds):
        shares = [sum(leaf["share"] for leaf in row["leaves"]) for row in rows if row.get("leaves")]
        names = ", ".join(sorted({f"`{kind}`" for found in kinds for kind in found}))
        most = f"up to {100 * max(shares):.0f} % of the parameters"
        yield f"{names} taken whole, {most}" + _times(sum(map(bool, kinds)), rows)
    facts = {
        "parameters shared across cuts": lambda row: any(m.get("shared") for m in row.get("methods", {}).values()),
        "other operations in eval mode": lambda row: row.get("eval_differs"),
    }
    for told, holds in facts.items():
        if count := sum(bool(holds(row)) for row in rows):
            yield told + _times(count, rows)


def _times(count: int, rows: Sequence[Row]) -> str:
    return "" if count == len(rows) else f" ({count})"


def _range(rows: Sequence[Row], value: Callable[[Row], float | None]) -> str:
    found = [number for row in rows if (number := value(row)) is not None]
    if not found:
        return "-"
    low, high = min(found), max(found)
    return f"{low}" if low == high else f"{low}–{high}"


def _percent(piece: Row) -> int:
    return round(100 * piece["share"])


# ----------------------------------------------------------------------------------------------- failures, and limits


def _failures(rows: Sequence[Row]) -> Iterator[str]:
    """Yield every reason with the models that fail for it, the most frequent first."""
    found: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        for one in row["failures"]:
            # the name is taken out of the reason, so that models of one kind are told together
            told = one["message"].splitlines()[0] if one["message"] else ""
            where = f" ({one['at']})" if "at" in one else ""
            reason = (row["check"], one["stage"], one["error"], told.replace(row["name"], "MODEL") + where)
            found.setdefault(reason, []).append(row["name"])
    if not found:
        yield "None."
        return
    yield "| models | check | stage | reason |"
    yield "|---|---|---|---|"
    for (check, stage, error, told), names in sorted(found.items(), key=lambda item: (-len(item[1]), item)):
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        listed = ", ".join(f"`{name}`" for name in names[:NAMED])
        yield f"| {listed}{more} | {check} | {stage} | {error}: {_cell(told)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _several(static: Sequence[Row]) -> Iterator[str]:
    """Yield every family of which some model is cut through several tensors, with the reason for its first one."""
    found = [row for row in static if row.get("live", 0) > 1]
    if not found:
        yield "Nowhere: every cut of every model goes through one tensor."
    for family, members in groupby(found, key=lambda row: row["family"]):
        rows = list(members)
        count = f"{len(rows)} model{'s' if len(rows) > 1 else ''}, up to {max(row['live'] for row in rows)} tensors"
        why = "; ".join(rows[0].get("notes", ())) or "what is made by chance and without the images is handed on too"
        yield f"- {family} ({count}). `{rows[0]['name']}`: {why}"


def _indivisible(static: Sequence[Row]) -> Iterator[str]:
    found: dict[tuple[str, str], list[Row]] = {}
    for row in static:
        if "largest" in row and row["largest"]["layer"]["share"] > 0.5:
            found.setdefault((row["family"], row["largest"]["layer"]["name"]), []).append(row)
    if not found:
        yield "No model has one layer that holds more than half of its parameters."
        return
    yield "One layer holds more than half of the parameters of these models; a cut can stand before or after it:"
    yield ""
    for (family, layer), rows in found.items():
        shares = _range(rows, lambda row: _percent(row["largest"]["layer"]))
        yield f"- {family}: `{layer}`, {shares} % ({', '.join(row['name'] for row in rows)})"


def _good(rows: Sequence[Row]) -> int:
    return sum(row["ok"] for row in rows)


def _of(rows: Sequence[Row]) -> str:
    return f"{_good(rows):,} of {len(rows):,}"


def _listed(names: Sequence[str]) -> str:
    return " and by ".join(names)
