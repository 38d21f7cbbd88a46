"""Commands on training runs: train, eval, predict, export, report."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from localize.cli.app import app, with_flags
from localize.cli.asked import Asked
from localize.cli.flags import (
    DEVICES,
    Force,
    Json,
    OptionalModel,
    TrustCode,
    Without,
    read_number,
)
from localize.cli.printed import check_new_file, print_json, say, table_lines, working, write_file
from localize.errors import MissingError, OptionError

if TYPE_CHECKING:
    from localize.recipes import Recipe
    from localize.train import predicting as predictions
    from localize.train import sweep as sweeping


def train_and_compare(
    sources: Sequence[str] | Mapping[str, Recipe],
    seeds: int,
    output: str,
    settings: Mapping[str, Any],
    *,
    words: Sequence[str] = (),
    results: str | None = None,
    as_json: bool,
) -> None:
    from localize.train import ledger, sweep

    book = Path(output) / ledger.FILE if results is None else Path(results)
    rows = sweep.sweep(sweep.plan(sources, seeds, output, words=words, **settings), book)
    if as_json:
        print_json({"seeds": seeds, "output": output, "rows": [dataclasses.asdict(row) for row in rows]})
    else:
        say("\n".join(_trained(rows)))
    if any(row.diverged for row in rows):
        raise typer.Exit(1)


def _trained(rows: Sequence[sweeping.Row]) -> Iterator[str]:
    def percent(share: float | None) -> str:
        return "" if share is None else f"{100 * share:.2f}"

    names = ["last epoch, %", "std", "best epoch, %", "std", "by depth, %", "n", "paper", "of", "hours", "machine"]
    lines = [["recipe", *names]]
    for row in rows:
        found = [percent(one) for one in (row.mean, row.std, row.best_mean, row.best_std)]
        found += [" ".join(map(percent, _spread(list(row.depths.values()))))]
        found += [str(len(row.accuracies)), percent(row.paper), row.epoch]
        lines.append([row.recipe, *found, f"{row.hours:.2f}", ", ".join(row.machines)])
    yield from table_lines(lines, right=(*range(1, 8), 9))
    for row in rows:
        yield from (f"{row.recipe}, seed {seed}: {problem}" for seed, problem in row.diverged.items())
        if row.source:
            yield f"{row.recipe}: {row.source}"


def _spread(values: Sequence[float]) -> list[float]:
    """Return all values if there are at most five; otherwise the first, the last, and three evenly between them."""
    last = len(values) - 1
    return [values[round(i * last / 4)] for i in range(5)] if last > 4 else list(values)


@with_flags
def train(
    model: OptionalModel = None,
    *,
    asked: Annotated[Asked, Without("num_classes")],
    output: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--output", "-o", metavar="DIR", help="Run folder; default runs/MODEL-METHOD-DATA-seedN."),
    ] = None,
    resume: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--resume", metavar="DIR", help="Continue the run in DIR from its last checkpoint."),
    ] = None,
    accept_data: Annotated[
        bool, typer.Option("--accept-data", help="With --resume: continue even if the data have changed.")
    ] = False,
    resume_if_there: Annotated[
        bool,
        typer.Option(
            "--resume-if-there", help="If --output already holds this very run, continue it; otherwise start it."
        ),
    ] = False,
    processes: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--processes", metavar="N", min=1, help="Train in N processes on this machine."),
    ] = None,
    max_restarts: Annotated[
        int,
        typer.Option("--max-restarts", metavar="N", min=0, help="With --processes: how many times to restart."),
    ] = 0,
    force: Force = False,
    settings: dict[str, Any],
) -> None:
    """Train a model with local losses.

    Writes a folder with the metrics of every epoch and the trained model under its original keys.

    --resume continues a run. With it, --epochs extends the run, --data-dir says where its data are now; --timeout and
    --stages may change.
    """
    from localize import train as training
    from localize.recipes.settings import settings as known

    if max_restarts and (processes is None or not (resume_if_there or resume)):
        raise OptionError(
            "--max-restarts needs several processes that can resume a run.",
            facts="after a restart, they continue from the last checkpoint.",
            help="--processes N --output DIR --resume-if-there",
        )
    if processes is not None and _launched(processes, max_restarts):
        return
    if resume is not None:
        if not resume:
            raise OptionError(
                "--resume names no folder.", facts="its name is empty.", help="localize train --resume DIR"
            )
        others = set(settings) - {"epochs", "data_dir", "timeout", "stages"}
        if model is not None or not asked.is_empty or output is not None or force or others or resume_if_there:
            raise OptionError(
                "--resume allows no arguments except --epochs, --data-dir, --timeout, --stages, --accept-data, "
                "--trust-code and --processes.",
                facts=f"{Path(resume) / 'recipe.yaml'} says everything else about the run.",
                help=f"localize train --resume {resume}; for a new run, leave out --resume",
            )
        training.resume(
            resume,
            epochs=read_number(settings["epochs"], int) if "epochs" in settings else None,
            data_dir=settings.get("data_dir"),
            timeout=read_number(settings["timeout"], float) if "timeout" in settings else None,
            stages=read_number(settings["stages"], tuple, int) if "stages" in settings else None,
            accept_data=accept_data,
            trust_code=asked.trust_code,
        )
        return
    if accept_data:
        raise OptionError("--accept-data needs a run to resume.", help="--resume DIR, or leave it out")
    recipe = asked.build_recipe(model)
    if recipe.model is None:
        raise OptionError("no model was given, and the recipe names none.", help="localize train MODEL ...")
    about = {item.name: item.metadata for item in known()}
    typed = {name: read_number(value, about[name]["type"], about[name]["of"]) for name, value in settings.items()}
    chosen = {**recipe.train, **typed, **({"output": output} if output is not None else {})}
    config = training.TrainConfig(recipe.model, recipe=recipe, input_shape=recipe.input_shape, **chosen)
    if resume_if_there:
        from localize.train.resuming import begin_or_go_on

        begin_or_go_on(config, force=force, trust_code=asked.trust_code)
    else:
        training.run(config, force=force)
    _say_resident(config.device)


def _launched(processes: int, max_restarts: int) -> bool:
    """Start the processes that the command line asks for, unless this is one of them; return whether it did."""
    from localize.train import launch

    os.environ.update(launch.slurm(processes))
    if launch.started():
        launch.check_count(processes)
        return False
    if processes == 1 and not max_restarts:
        return False
    launch.launch(sys.argv[1:], processes, max_restarts=max_restarts)
    return True


def _say_resident(device: str) -> None:
    """Print how much memory a run on the CPU used; of several processes, only one prints it."""
    from localize.estimate import resident
    from localize.runtime.devices import choose_device

    if choose_device(device).type == "cpu" and os.environ.get("RANK", "0") == "0" and (line := resident.told()):
        say(line)


@app.command()
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run: see `localize train`.")],
    output: Annotated[
        str,
        typer.Option("--output", "-o", metavar="FILE", help="File to write: .safetensors, .pt or .pth; .pt2 or .onnx."),
    ],
    at: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--at", metavar="LAYER", help="Only up to and with this local head, named as in `localize eval --at all`."
        ),
    ] = None,
    format: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--format", metavar="pt2|onnx", help="Write a program that runs without the model's code."),
    ] = None,
    force: Force = False,
    check: Annotated[
        bool, typer.Option("--verify", help="Read the file into a fresh model, and compare its logits bit for bit.")
    ] = False,
    trust_code: TrustCode = False,
) -> None:
    """Write the plain model of a run.

    The weights have their original keys, so the model's own library loads them. config.json next to the file describes
    the input, in timm's format. With --verify, exit code 1 if the logits differ. A program is always checked against
    the outputs of the run. --format writes one; so does --at, as pt2 by default.
    """
    from localize.train import export as export_run
    from localize.train import verify

    if format is not None or at is not None:
        from localize.train.exits import export_program

        if check:
            raise OptionError("--verify reads weights into a model.", facts="a program is always checked.", help="")
        written = export_program(run, output, format=format or "pt2", at=at, force=force, trust_code=trust_code)
        say(f"written: {written}")
        return
    say(f"written: {export_run(run, output, force=force, trust_code=trust_code)}")
    if check:
        say(verify(run, output, trust_code=trust_code))


@app.command("eval")
def evaluate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run: see `localize train`.")],
    at: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--at", metavar="LAYER|all", help="Predict with this local loss, named as in the table of --at all."
        ),
    ] = None,
    weighted: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--weighted", metavar="P", help="Predict with the weighted sum of all local losses' scores."),
    ] = None,
    form: Annotated[
        str, typer.Option("--form", metavar="l**p|p**l", help="Weight of layer l = 1, 2, ... in that sum.")
    ] = "l**p",
    without_classifier: Annotated[
        bool, typer.Option("--without-classifier", help="Predict with the deepest local loss.")
    ] = False,
    superlabels: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--superlabels", metavar="mean|super|naive", help="Predict super-classes, without training."),
    ] = None,
    groups: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--map",
            metavar="FILE|cifar100",
            help="Super-class of each class: a JSON or YAML list; default for 100 classes: that of CIFAR-100.",
        ),
    ] = None,
    goodness: Annotated[
        bool, typer.Option("--goodness", help="Predict by goodness, trying each label in turn.")
    ] = False,
    skip_first: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(
            "--skip-first/--all-layers",
            help="Leave the first layer out of the goodness, as the paper does (default), or not.",
            show_default=False,
        ),
    ] = None,
    saliency: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--saliency", metavar="DIR", help="Write pictures of where the two likeliest labels are seen."),
    ] = None,
    count: Annotated[int, typer.Option("-n", metavar="N", help="Number of pictures.")] = 8,
    data: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--data", metavar="NAME|DIR", help="Data set, or folder of images, to test on; default: the run's."
        ),
    ] = None,
    data_dir: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--data-dir", metavar="DIR", help="Folder of a data set that is not bundled."),
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="Download missing data, if torchvision can.")] = False,
    batch_size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--batch-size", metavar="N", help="Images at a time; default: the run's."),
    ] = None,
    device: Annotated[str, typer.Option("--device", metavar="TEXT", help=f"{DEVICES}.")] = "auto",
    accept_data: Annotated[
        bool, typer.Option("--accept-data", help="Test even if images or class names have changed since the run.")
    ] = False,
    trust_code: TrustCode = False,
    as_json: Json = False,
) -> None:
    """Test a trained run, with its output or its local losses.

    Layer by layer, with several layers together, without the classifier, on super-classes, by goodness; and saliency.
    """
    from localize.train import evaluation

    if groups is not None and superlabels is None:
        raise OptionError("--map needs --superlabels.", help="--superlabels mean, or leave out --map")
    if skip_first is not None and not goodness:
        flag = "--skip-first" if skip_first else "--all-layers"
        raise OptionError(f"{flag} needs --goodness.", help=f"--goodness, or leave out {flag}")
    skip = skip_first is None or skip_first
    questions = evaluation.Questions(at, weighted, form, without_classifier, superlabels, (), goodness, skip)
    opened = evaluation.open_run(
        run,
        heads=questions.any or saliency is not None,
        data_name=data,
        data_dir=data_dir,
        download=download,
        batch_size=batch_size,
        device=device,
        accept_data=accept_data,
        trust_code=trust_code,
    )
    if superlabels is not None:
        classes = opened.local.plan.segments.trunk.num_classes
        questions = dataclasses.replace(questions, groups=evaluation.read_groups(groups, classes))
    evaluation.check(opened, questions)
    layer = at if at != evaluation.ALL else None
    pictures = evaluation.write_saliency(opened, saliency, count, at=layer) if saliency is not None else []
    report = evaluation.evaluate_run(opened, questions) | ({"saliency": pictures} if saliency is not None else {})
    if as_json:
        print_json(report)
    else:
        say("\n".join(_evaluated(report)))


def _evaluated(report: Mapping[str, Any]) -> Iterator[str]:
    words = {"output": "its own output", "softmax_sum": "the sum of the softmax of all local losses"}
    found = [(f"by {words.get(report['answer'], report['answer'])}", report["accuracy"])]
    found += [(f"by {one['name']}, up to {one['ends_at']}", one["accuracy"]) for one in report.get("layers", ())]
    if one := report.get("weighted"):
        found.append((f"by the weighted sum, {one['form']}, p = {one['p']:g}", one["accuracy"]))
    if one := report.get("without_classifier"):
        found.append((f"without the classifier, by {one['name']}", one["accuracy"]))
    if one := report.get("superlabels"):
        found.append((f"{one['classes']} super-classes, {one['form']}", one["accuracy"]))
    if one := report.get("goodness"):
        found.append(
            (f"by goodness{', without the first layer' if one['skip_first'] else ', all layers'}", one["accuracy"])
        )
    yield f"{report['model']} by {report['method']}: {report['images']:,} test images of {report['data']}"
    yield from table_lines([["prediction", "accuracy"], *([what, f"{100 * share:.2f} %"] for what, share in found)])
    for one in report.get("saliency", ()):
        yield f"{one['file']}: label {one['label']}; maps of {one['top1']}, {one['top2']}"


@app.command()
def predict(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run: see `localize train`.")],
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE...", help="Image files, folders, or patterns such as '*.png'.")
    ],
    top: Annotated[
        int, typer.Option("--top", metavar="N", min=1, help="Number of classes to print for each image.")
    ] = 1,
    at: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--at", metavar="LAYER", help="Predict with this local loss, named as in `localize eval --at all`."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", metavar="N", min=1, help="Images at a time.")] = 64,
    device: Annotated[str, typer.Option("--device", metavar="TEXT", help=f"{DEVICES}.")] = "auto",
    trust_code: TrustCode = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV: one line for each image and class.")] = False,
    as_json: Json = False,
) -> None:
    """Predict the classes of images.

    Files that cannot be used are listed on stderr and skipped. Exit code 4 if none can be used.
    """
    from localize.train import predicting

    if as_csv and as_json:
        raise OptionError("--csv and --json were both given.", help="use only one of them")
    found = list(
        predicting.predict(run, images, top=top, at=at, batch_size=batch_size, device=device, trust_code=trust_code)
    )
    for one in found:
        if one.problem:
            say(f"skipped: {one.file}: {one.problem}", err=True)
    good = [one for one in found if not one.problem]
    if as_json:
        print_json([dataclasses.asdict(one) for one in found])
    elif as_csv:
        say(predicting.to_csv(good), nl=False)
    elif good:
        say("\n".join(_predicted(good)))
    if not good:
        raise MissingError("no image can be used.", facts=[f"{one.file}: {one.problem}" for one in found[:5]])


def _predicted(found: Sequence[predictions.Prediction]) -> Iterator[str]:
    rows = [["image", "class", "score"]]
    for one in found:
        for name, score in zip(one.classes, one.scores, strict=True):
            rows.append([one.file, name, f"{100 * score:.2f} %"])
    yield from table_lines(rows, right=(2,))


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folders of runs: see `localize train`.")],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE.html", help="Page to write; default report.html.")
    ] = "report.html",
    memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="Predict the memory during one step; this takes longest.")
    ] = True,
    analyses: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--analyses", metavar="DIR", help="Show the results of `localize analyze -o DIR`."),
    ] = None,
    force: Force = False,
    trust_code: TrustCode = False,
) -> None:
    """Write a page about training runs.

    One self-contained HTML file: accuracy and loss by depth, ownership, memory during a step, settings.
    """
    check_new_file(output, force=force)
    from localize.report import report as page

    with working() as tell:
        text = page(runs, memory=memory, analyses=analyses, tell=tell, trust_code=trust_code)
    write_file(output, text)
    say(f"written: {output}")
