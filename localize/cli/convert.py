"""Commands on one conversion: inspect, convert, audit, draw."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from localize.cli.app import app, with_flags
from localize.cli.asked import Asked, is_folder, read_shape, refuse_beside_folder
from localize.cli.flags import (
    Classes,
    Force,
    InputShape,
    Json,
    Leaf,
    ModelName,
    OptionalModel,
    OutputField,
)
from localize.cli.printed import check_new_file, print_json, say, table_lines, working, write_file
from localize.errors import OptionError
from localize.text import counted

if TYPE_CHECKING:
    from localize.ir import AuditReport
    from localize.runtime.model import LocalModel


@app.command("inspect")
def inspect_model(
    model: ModelName,
    leaf: Leaf = None,
    output_field: OutputField = None,
    num_classes: Classes = None,
    input_shape: InputShape = None,
    as_json: Json = False,
) -> None:
    """List where a model can be cut.

    Prints the names for --cut-at, the shape and layout of the values that cross, and the cost since the previous cut.
    """
    from localize import zoo
    from localize.cutting import cuts
    from localize.graph import trace
    from localize.graph.features import describe
    from localize.ir import Features, Grain

    source = zoo.resolve(model)
    shape = read_shape(input_shape)
    made = zoo.create_model(source.name, num_classes=num_classes, input_shape=shape)
    shape = zoo.input_shape_of(source, made, shape)
    import torch

    images = torch.empty((2, *shape), device="meta")
    trunk = trace.trace(made, images, name=source.name, leaves=leaf or (), output=output_field)
    ends = {layer.end.after: layer.name for layer in cuts.local_layers(trunk, Grain()) if layer.end is not None}
    pieces = cuts.pieces(trunk)
    found: list[dict[str, Any]] = [
        {
            "name": piece.cut.name,
            "shapes": [list(features.shape) for features in piece.cut.features],
            "features": [dataclasses.asdict(layout) for layout in piece.cut.features],
            "live": len(piece.cut.values),
            "parameters_before": piece.cut.parameters_before,
            "parameters_after": piece.cut.parameters_after,
            "parameters": piece.parameters,
            "share": piece.share,
            "macs_share": piece.macs_share,
            "local_layer": ends.get(piece.cut.after),
        }
        for piece in pieces
        if piece.cut is not None
    ]
    total = sum(parameter.numel() for parameter in made.parameters())
    outputs = [{"name": side.name, "weight": side.weight} for side in trunk.sides]
    notes = cuts.notes(trunk)
    if as_json:
        facts = {"model": source.name, "input_shape": list(shape), "parameters": total}
        print_json({**facts, "cuts": found, "outputs": outputs, "leaves": list(trunk.leaves), "notes": list(notes)})
        return
    rows = [["cut", "shape", "layout", "tensors", "parameters", "share", "multiply-adds", "ends local layer"]]
    for cut in found:
        shapes = " + ".join("x".join(str(size) for size in one) for one in cut["shapes"])
        layouts = " + ".join(describe(Features(**one)) for one in cut["features"])
        counts = [f"{cut['parameters']:,}", f"{cut['share']:.1%}", f"{cut['macs_share']:.1%}"]
        rows.append([cut["name"], shapes, layouts, str(cut["live"]), *counts, cut["local_layer"] or ""])
    rest = pieces[-1]
    rows.append(["output", "", "", "", f"{rest.parameters:,}", f"{rest.share:.1%}", f"{rest.macs_share:.1%}", ""])
    say("\n".join(table_lines(rows, right=(3, 4, 5, 6))))
    say(f"{source.name}: {len(found)} cuts, {len(ends)} of them between local layers; {total:,} parameters")
    if trunk.leaves:
        say(f"taken as a whole, with no cut inside: {', '.join(trunk.leaves)}")
    for note in notes:
        say(note)
    for further in outputs:
        say(f"further output {further['name']}: its cross-entropy is added with weight {further['weight']:g}")


@with_flags
def convert(
    model: OptionalModel = None,
    *,
    asked: Asked,
    output: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--output", "-o", metavar="DIR", help="Folder to write; without it nothing is written."),
    ] = None,
    stages: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--stages", metavar="N|0,4,7", help="Split the step among N ranks, or by the first loss of each."),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Give a model local losses.

    Writes a training step as Python text, a plan, an audit and a picture.
    """
    recipe = asked.build_recipe(model)
    from localize import auditor, build, folder

    if output is not None:
        folder.check_free(output, force=force)
    local = build.build(recipe)
    report = auditor.static(local)
    ranks, shared = (None, None) if stages is None else _shared(local, stages)
    if output is not None:
        folder.write(local, recipe, report, output, force=force, ranks=ranks)
    plan = folder.describe(local)
    if as_json:
        print_json(plan if shared is None else {**plan, "partition": shared})
        return
    say("\n".join(_summary(plan, report)))
    if shared is not None:
        say("\n".join(_ranks(shared)))
    say(f"written: {output}" if output is not None else "nothing is written; -o DIR writes it")


def _shared(local: LocalModel, stages: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Split a step among ranks, and check their texts by reading them and by running them in this process.

    Returns:
        The files, and the partition as plain values.

    Raises:
        OptionError: ``stages`` is neither a number of ranks nor a list of losses.
        MethodError: see :func:`localize.pipeline.partition`.
        AuditError: the ranks together do not compute the one-process step.
    """
    from localize import build, pipeline
    from localize.auditor.ranks import check_ranks
    from localize.ir import AuditReport
    from localize.pipeline import described
    from localize.pipeline.together import compared

    numbers = [part.strip() for part in stages.split(",")]
    if not all(part.isdecimal() for part in numbers) or (len(numbers) == 1 and int(numbers[0]) < 2):
        raise OptionError(
            f"--stages cannot be {stages}.",
            facts="it must be a number of ranks, 2 or more; or the number of the first loss of each rank.",
            help="--stages 2, or --stages 0,3",
        )
    given = [int(part) for part in numbers]
    partition = pipeline.partition(local, given if len(given) > 1 else given[0])
    files = described.files(local, partition)
    texts = [text for name, text in files.items() if name != described.FILE]
    checks = (*check_ranks(local, texts), *compared(local, partition, build.random_batch(local)))
    AuditReport(checks).raise_if_failed()
    return files, described.describe(local, partition)


def _ranks(shared: Mapping[str, Any]) -> Iterator[str]:
    rows = [["rank", "losses", "share of the time", "receives, per image"]]
    for one in shared["ranks"]:
        got = [message for message in shared["messages"] if message["to"] == one["rank"]]
        told = ", ".join(f"{m['name']} ({m['bytes']:,} bytes) from {m['from']}" for m in got)
        first, last = one["losses"][0], one["losses"][-1]
        losses = first if first == last else f"{first} to {last}"
        rows.append([str(one["rank"]), losses, f"{one['cost']:.0%}", told or "-"])
    yield from table_lines(rows, right=(2,))
    yield f"predicted {shared['speedup']:.2f} times as fast as one rank; together the ranks equal the step, bit for bit"


def _summary(plan: Mapping[str, Any], report: AuditReport) -> Iterator[str]:
    totals = plan["totals"]
    held = sum(check.ok for check in report.checks)
    step = f"{counted(len(plan['segments']), 'segment')}, {counted(len(plan['losses']), 'loss', 'losses')}"
    yield f"{plan['model']} by {plan['method']}: {step}"
    yield from table_lines(
        [
            ["", "parameters", "multiply-adds, one image"],
            ["model", f"{totals['trunk_parameters']:,}", f"{totals['trunk_macs']:,}"],
            ["training", f"{totals['training_parameters']:,}", f"{totals['training_macs']:,}"],
        ]
    )
    yield f"audit: {held} of {len(report.checks)} checks of the text hold; `localize audit` also runs the step"


@with_flags
def audit(
    target: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(metavar="DIR|MODEL", help="A folder that convert has written, or a model by name."),
    ] = None,
    *,
    asked: Asked,
    accept: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--accept", metavar="LINES", help="Lines of train_step.py that may differ from the plan."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check which parameters each loss trains.

    Compares each statement of the training step with the plan, then runs the step on random batches. Nothing of a text
    runs before all of it has been compared. The other files of a folder are compared with recipe and model too.

    Exit code 1 if a check fails.
    """
    import torch

    from localize import build, folder
    from localize.auditor import audit as audit_local

    torch.manual_seed(0)
    if target is not None and is_folder(target):
        refuse_beside_folder(target, asked)
        local, report = folder.reaudit(target, _lines(accept), trust_code=asked.trust_code)
    else:
        if accept is not None:
            raise OptionError(
                "--accept needs a folder.",
                facts="without one, the audited text has just been generated and has no edited lines.",
                help="localize audit DIR --accept LINES",
            )
        local = build.build(asked.build_recipe(target))
        report = audit_local(local, build.random_batch(local))
    if as_json:
        print_json(folder.describe_audit(report))
    else:
        say("\n".join(_verdict(local.plan.segments.trunk.name, local.plan.method, report)))
    if not report.ok:
        raise typer.Exit(1)


def _verdict(model: str, method: str, report: AuditReport) -> Iterator[str]:
    failed = [check for check in report.checks if not check.ok]
    width = max(len(check.id) for check in report.checks)
    for check in report.checks:
        yield f"{'ok  ' if check.ok else 'FAIL'}  {check.id:<{width}}  {check.claim}"
        if check.ok:
            yield f"{'':<{width + 8}}{check.evidence}"
    for check in failed:
        yield ""
        yield f"{check.id} fails: it is not true that {check.claim}"
        yield from (f"  {line}" for line in check.evidence.splitlines())
    if report.deviations:
        yield ""
        yield f"deviations of {method} from its paper:"
        yield from (f"  - {line}" for line in report.deviations)
    if report.accepted:
        yield ""
        yield "accepted statements that are not in the plan:"
        yield from (f"  line {line}: {text}" for line, text in report.accepted)
    yield ""
    yield f"{model} by {method}: {report.verdict[0].lower()}{report.verdict[1:].rstrip('.')}"


def _lines(accept: str | None) -> frozenset[int]:
    """Return the numbers in a text such as ``41,57``.

    Raises:
        OptionError: one of them is not a line number.
    """
    numbers = [part.strip() for part in (accept or "").split(",") if part.strip()]
    for number in numbers:
        if not number.isdecimal() or int(number) < 1:
            raise OptionError(
                f"--accept cannot be {accept}.",
                facts=f"it must be line numbers separated by commas; {number!r} is not one.",
                help="--accept 41,57",
            )
    return frozenset(map(int, numbers))


@with_flags
def draw(
    target: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(metavar="DIR|MODEL", help="A folder that convert has written, or a model by name."),
    ] = None,
    *,
    asked: Asked,
    output: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--output", "-o", metavar="FILE.svg", help="File to write; without it, stdout."),
    ] = None,
    force: Force = False,
    memory: Annotated[
        bool, typer.Option("--memory", help="Draw memory during one step, against backprop and checkpointing.")
    ] = False,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "-b", metavar="N", min=1, help="Images in the step of --memory.")
    ] = 128,
) -> None:
    """Draw segments, cuts and heads, or the memory during a step, as SVG."""
    from localize import build, recipes
    from localize.pictures.plan import graph_svg
    from localize.recipes import trust

    if output is not None:
        check_new_file(output, force=force)
    if target is not None and is_folder(target):
        refuse_beside_folder(target, asked)
        recipe = recipes.load(Path(target))
        trust.refuse_untrusted(target, recipe, trust_code=asked.trust_code)
    else:
        recipe = asked.build_recipe(target)
    if memory:
        from localize.estimate import compare as comparing
        from localize.pictures.memory import memory_svg

        with working() as tell:
            steps = comparing.footprints(recipe, batch_size, tell=tell)
        picture = memory_svg(steps, f"{recipe.model}, {batch_size} images")
    else:
        picture = graph_svg(build.build(recipe))
    if output is None:
        say(picture, nl=False)
    else:
        write_file(output, picture)
        say(f"written: {output}")
