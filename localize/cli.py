"""The command line: read what was typed, call the function that does it, print what it returns.

What is here imports neither torch nor a model library, so that ``localize --help`` answers at once. The options of the
methods and of the trainer become flags when a command that has them is asked for, and only then: their names, types
and meanings are read from the dataclasses that declare them.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from typer.core import TyperGroup

import localize
from localize.errors import LocalizeError, MissingError, OptionError, did_you_mean
from localize.files import replacing

if TYPE_CHECKING:
    from localize import compare as comparing
    from localize import planner
    from localize.ir import AuditReport, CutSpec
    from localize.recipes import Recipe
    from localize.train import sweep as sweeping


class _Group(TyperGroup):
    """Turns our errors into messages, and stub commands into commands with flags."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        if name in _WITH_FLAGS:
            command = _command_with_flags(name, _WITH_FLAGS[name])
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LocalizeError as error:
            typer.echo(f"error: {error}", err=True)
            if not error.help:
                typer.echo(f"  help: localize {ctx.invoked_subcommand} --help", err=True)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from error


_SETTINGS: dict[str, Any] = {
    "no_args_is_help": True,
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"], "max_content_width": 110},
}
app = typer.Typer(name="localize", cls=_Group, add_completion=False, **_SETTINGS)
recipes_app = typer.Typer(name="recipes", help="List, show, copy and check recipes.", **_SETTINGS)
app.add_typer(recipes_app)

_WITH_FLAGS: dict[str, Callable[..., None]] = {}


def main() -> None:
    """Run the command line."""
    app(prog_name="localize")


# --------------------------------------------------------------------------------------------------------- options

_DEVICES = "cpu, cuda, cuda:N, or auto (cuda where there is one)"
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="Model by name: see `localize models`.")]
OptionalModel = Annotated[
    Optional[str],  # noqa: UP045  typer reads this at run time
    typer.Argument(metavar="MODEL", help="Model by name; may be left out where the recipe names one."),
]
MethodName = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--method", "-m", metavar="NAME", help="Method, or packaged recipe, by name."),
]
RecipeFile = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--recipe", "-r", metavar="FILE", help="Recipe: a file, or a folder that convert has written."),
]
SegmentCount = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--segments", "-K", metavar="N|max", help="Number of segments; max: one per local layer."),
]
CutAt = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--cut-at", metavar="NAME,NAME", help="Cut behind these: names as `localize inspect` prints them."),
]
CutBy = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--cut-by", metavar="layer|node|parameters|macs|memory", help="What -K balances."),
]
Leaf = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--leaf", metavar="PATH", help="Take this module whole: no cut in it; may be given several times."),
]
Classes = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--num-classes", metavar="N", help="Number of classes; default: what the model was made for."),
]
InputShape = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--input-shape", metavar="C,H,W", help="Size of one image; default: what the model was made for."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else, on stdout.")]
Shared = Annotated[
    bool, typer.Option("--shared", help="Let several losses train parameters that are used on both sides of a cut.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace what an earlier call has written.")]


@dataclasses.dataclass(frozen=True)
class _Flag:
    """A flag made of a dataclass field: ``d_min`` becomes ``--d-min``."""

    name: str
    kind: type
    help: str
    choices: tuple[str, ...] = ()

    @property
    def parameter(self) -> inspect.Parameter:
        spelled = "--" + self.name.replace("_", "-")
        if self.kind is bool:
            declared = typer.Option(f"{spelled}/--no-{spelled[2:]}", help=self.help, show_default=False)
        else:
            metavar = "|".join(self.choices) or {int: "N", float: "F", tuple: "N,N"}.get(self.kind, "TEXT")
            declared = typer.Option(spelled, metavar=metavar, help=self.help, show_default=False)
        kind = bool if self.kind is bool else str
        annotation = Annotated[Optional[kind], declared]  # noqa: UP045
        return inspect.Parameter(self.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def with_flags(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command that takes flags of dataclasses, by the names of their groups in ``_FLAGS``."""
    _WITH_FLAGS[function.__name__] = function
    app.command(function.__name__, help=function.__doc__)(lambda: None)
    return function


def _command_with_flags(name: str, function: Callable[..., None]) -> Any:
    signature = inspect.signature(function, eval_str=True)
    groups = {group: list(_FLAGS[group]()) for group in _FLAGS if group in signature.parameters}
    flags = [flag for group in groups.values() for flag in group]
    parameters = [p for p in signature.parameters.values() if p.name not in groups]
    assert len({flag.name for flag in flags} | {p.name for p in parameters}) == len(flags) + len(parameters)

    def command(**given: Any) -> None:
        found = {
            group: {flag.name: value for flag in members if (value := given.pop(flag.name)) is not None}
            for group, members in groups.items()
        }
        function(**given, **found)

    parameters += [flag.parameter for flag in flags]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    one = typer.Typer(add_completion=False, **_SETTINGS | {"no_args_is_help": False})
    one.command(name, help=function.__doc__)(command)
    return typer.main.get_command(one)


def _method_flags() -> Iterator[_Flag]:
    """Yield one flag for every option that some method has, saying what it means to whom."""
    from localize import methods

    flags: dict[str, _Flag] = {}
    for method in methods.names():
        for item in dataclasses.fields(methods.get(method)):
            flag = _Flag(
                item.name,
                type(item.default),
                f"{method}: {item.metadata['help']}; default {item.default}.",
                item.metadata["choices"],
            )
            flags[item.name] = _merged(flags[item.name], flag) if item.name in flags else flag
    yield from flags.values()


def _merged(one: _Flag, other: _Flag) -> _Flag:
    """Return the flag of an option that two methods have."""
    kind = one.kind if one.kind is other.kind else str
    choices = tuple(dict.fromkeys((*one.choices, *other.choices))) if one.choices and other.choices else ()
    return _Flag(one.name, kind, f"{one.help} {other.help}", choices)


def _training_flags() -> Iterator[_Flag]:
    """Yield one flag for every setting of the trainer."""
    from localize.train.config import settings

    for item in settings():
        if item.name != "output":
            default = f"; default {item.default}" if item.default is not None else ""
            choices = item.metadata["choices"]
            yield _Flag(item.name, item.metadata["type"], f"{item.metadata['help']}{default}.", choices)


def _schedule_flags() -> Iterator[_Flag]:
    """Yield one flag for every option of a schedule."""
    from localize.schedule import Schedule

    for item in dataclasses.fields(Schedule):
        about = item.metadata
        yield _Flag(item.name, type(item.default), f"{about['help']}; default {item.default}.", about["choices"])


_FLAGS: Mapping[str, Callable[[], Iterator[_Flag]]] = {
    "options": _method_flags,
    "schedule": _schedule_flags,
    "settings": _training_flags,
}


def _number(text: Any, kind: type, of: type = int) -> Any:
    """Return the number, or numbers of type ``of``, or the truth value, that ``text`` spells.

    What spells none stays as it is, and is refused by whose option it is. A switch is spelled only where another method
    has an option of the same name that is none.
    """
    try:
        if kind is bool:
            return {"true": True, "false": False}.get(str(text).lower(), text)
        if kind is tuple:
            return tuple(of(part) for part in text.split(","))
        return kind(text) if kind in (int, float) else text
    except ValueError:
        return text


def _recipe(
    model: str | None,
    method: str | None,
    recipe: str | None,
    options: Mapping[str, Any],
    cut: CutSpec | None = None,
    num_classes: int | None = None,
    input_shape: str | None = None,
    *,
    shared: bool = False,
    leaf: Sequence[str] | None = None,
    schedule: Mapping[str, Any] | None = None,
) -> Recipe:
    """Put together what was typed: flags win over the recipe."""
    from localize import methods, recipes

    if method and recipe:
        raise OptionError("--method and --recipe were both given.", help="one of them")
    if not (method or recipe):
        raise OptionError(
            "no method was given.",
            facts=f"methods are {', '.join(methods.names())}; {len(recipes.names())} recipes preset them.",
            help="--method NAME, or --recipe FILE; localize recipes ls",
        )
    if method and method not in recipes.names() and method not in methods.names():
        known = [*methods.names(), *recipes.names()]
        raise localize.errors.UnknownNameError(
            f"there is no method {method!r}.",
            facts=f"methods are {', '.join(methods.names())}; {len(recipes.names())} recipes preset them.",
            help=did_you_mean(method, known) or "localize recipes ls, or --recipe FILE for a recipe of your own",
        )
    asked = recipes.load(method or recipe or "")
    fields = {item.name: type(item.default) for item in dataclasses.fields(methods.get(asked.method))}
    for name in options:
        if name not in fields:
            owners = [one for one in methods.names() if name in {f.name for f in dataclasses.fields(methods.get(one))}]
            raise OptionError(
                f"method {asked.method!r} has no option --{name.replace('_', '-')}.",
                facts=f"its options are {', '.join('--' + f.replace('_', '-') for f in fields) or 'none'}.",
                help=f"--method {' or '.join(owners)} has it; or leave it out",
            )
    given = {name: _number(value, fields[name]) for name, value in options.items()}
    merged = {**asked.options, **given}
    methods.create(asked.method, **merged)
    return dataclasses.replace(
        asked,
        model=model or asked.model,
        model_options={} if model and model != asked.model else asked.model_options,
        options=merged,
        cut=cut or asked.cut,
        shared=shared or asked.shared,
        leaf=tuple(leaf or ()) or (() if model and model != asked.model else asked.leaf),
        schedule={**asked.schedule, **_typed(schedule or {})},
        num_classes=asked.num_classes if num_classes is None else num_classes,
        input_shape=_shape(input_shape) or asked.input_shape,
    )


def _typed(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a schedule, as they were typed, as values."""
    from localize.schedule import Schedule, create

    kinds = {item.name: type(item.default) for item in dataclasses.fields(Schedule)}
    typed = {name: _number(value, kinds[name]) for name, value in given.items()}
    create(**typed)
    return typed


def _cut(segments: str | None, at: str | None, by: str | None) -> CutSpec | None:
    """Return the cuts that were asked for; None if nothing was."""
    from localize.ir import CutSpec

    if segments is None and at is None and by is None:
        return None
    if segments is not None and at is not None:
        raise OptionError("-K and --cut-at were both given.", facts="--cut-at says how many.", help="one of them")
    ways = ("layer", "node", "parameters", "macs", "memory")
    if by is not None and by not in ways:
        raise OptionError(
            f"--cut-by cannot be {by!r}.", facts=f"its values are {', '.join(ways)}.", help=did_you_mean(by, ways)
        )
    count: Any = segments or "max"
    if count not in ("max", "sqrt"):
        count = _number(count, int)
        if not isinstance(count, int) or count < 1:
            raise OptionError(f"-K cannot be {segments}.", facts="it is a number of segments.", help="-K 4, or -K max")
    names = tuple(name.strip() for name in (at or "").split(",") if name.strip())
    if at is not None and not names:
        raise OptionError("--cut-at names no cut.", help="localize inspect MODEL lists them")
    return CutSpec(segments=count, at=names, by=by or "layer")  # type: ignore[arg-type]


def _shape(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    sizes = [_number(part, int) for part in text.replace("x", ",").split(",")]
    if len(sizes) < 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise OptionError(
            f"--input-shape cannot be {text!r}.",
            facts="it is channels, height, width (for videos channels, frames, height, width).",
            help="--input-shape 3,32,32",
        )
    return tuple(sizes)


# -------------------------------------------------------------------------------------------------------- commands


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"localize {localize.__version__}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Rewrite a torchvision or timm model so that every segment is trained by its own loss, and prove that it is."""


@app.command()
def models(
    patterns: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="GLOB...", help="Such as 'tv/resnet*' or '*vit*'; default: all."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Convert every one, without data, and keep what was found in a file.")
    ] = False,
    run: Annotated[bool, typer.Option("--run", help="Train those of up to 60 M parameters for one step too.")] = False,
    out: Annotated[
        str, typer.Option("--out", metavar="FILE", help="What --check keeps; what it holds is not checked again.")
    ] = "models.jsonl",
    retry: Annotated[bool, typer.Option("--retry", help="Check what has failed again.")] = False,
    write: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--write", metavar="FILE.md", help="Write a page about what was found."),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", metavar="N", min=1, help="Models at a time.")] = 2,
    timeout: Annotated[float, typer.Option("--timeout", metavar="SECONDS", help="Longest time for a model.")] = 300.0,
    memory: Annotated[float, typer.Option("--memory", metavar="GIB", help="Most memory for a model (Linux).")] = 8.0,
    as_json: Json = False,
) -> None:
    """List models by name, or check that they convert."""
    if not check and (run or retry or write):
        raise OptionError("--run, --retry and --write say how to check.", help="--check, or leave them out")
    names = list(dict.fromkeys(name for pattern in patterns or ["*"] for name in _names(pattern, files=check)))
    if not check:
        _print_json(names) if as_json else typer.echo("\n".join(names))
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
        _write_file(write, checking.markdown(rows))
    if as_json:
        _print_json(rows)
    else:
        typer.echo("\n".join(_checked(rows)))
        typer.echo(f"rows: {out}" + (f"; page: {write}" if write else ""))
    if not all(row["ok"] for row in rows):
        raise typer.Exit(1)


def _names(pattern: str, *, files: bool) -> list[str]:
    """Return the names of the models that a pattern finds; a file of the user's is one, where ``files`` are allowed."""
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
    """Show on stderr how many models are checked, how many of them failed, and the last one; yield what is told each.

    Where stderr is no terminal, every model is a line.
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
                typer.echo(f"{'ok  ' if row['ok'] else 'FAIL'}  {row['name']}  {row['total']} s", err=True)

        yield show


@app.command("inspect")
def inspect_model(
    model: ModelName,
    leaf: Leaf = None,
    num_classes: Classes = None,
    input_shape: InputShape = None,
    as_json: Json = False,
) -> None:
    """List where a model can be cut.

    Names for --cut-at, shapes and layouts of what crosses, and what lies between a cut and the one before it.
    """
    from localize import cuts, trace, zoo
    from localize.features import describe
    from localize.ir import Features, Grain

    source = zoo.resolve(model)
    shape = _shape(input_shape)
    made = zoo.create_model(source.name, num_classes=num_classes, input_shape=shape)
    shape = zoo.input_shape_of(source, made, shape)
    import torch

    trunk = trace.trace(made, torch.zeros(2, *shape), name=source.name, leaves=leaf or ())
    ends = {layer.end.after: layer.name for layer in cuts.local_layers(trunk, Grain()) if layer.end is not None}
    pieces = cuts.pieces(trunk)
    found = [
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
        _print_json({**facts, "cuts": found, "outputs": outputs, "leaves": list(trunk.leaves), "notes": list(notes)})
        return
    rows = [["cut", "shape", "layout", "tensors", "parameters", "share", "multiply-adds", "ends local layer"]]
    for cut in found:
        shapes = " + ".join("x".join(str(size) for size in one) for one in cut["shapes"])
        layouts = " + ".join(describe(Features(**one)) for one in cut["features"])
        counts = [f"{cut['parameters']:,}", f"{cut['share']:.1%}", f"{cut['macs_share']:.1%}"]
        rows.append([cut["name"], shapes, layouts, str(cut["live"]), *counts, cut["local_layer"] or ""])
    rest = pieces[-1]
    rows.append(["output", "", "", "", f"{rest.parameters:,}", f"{rest.share:.1%}", f"{rest.macs_share:.1%}", ""])
    typer.echo("\n".join(_table(rows, right=(3, 4, 5, 6))))
    typer.echo(f"{source.name}: {len(found)} cuts, {len(ends)} of them between local layers; {total:,} parameters")
    if trunk.leaves:
        typer.echo(f"taken whole, without a cut inside: {', '.join(trunk.leaves)}")
    for note in notes:
        typer.echo(note)
    for further in outputs:
        typer.echo(f"further output {further['name']}: its cross-entropy is added with weight {further['weight']:g}")


@with_flags
def convert(
    model: OptionalModel = None,
    method: MethodName = None,
    recipe: RecipeFile = None,
    segments: SegmentCount = None,
    cut_at: CutAt = None,
    cut_by: CutBy = None,
    shared: Shared = False,
    leaf: Leaf = None,
    num_classes: Classes = None,
    input_shape: InputShape = None,
    output: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--output", "-o", metavar="DIR", help="Folder to write; without it nothing is written."),
    ] = None,
    force: Force = False,
    as_json: Json = False,
    *,
    options: dict[str, Any],
    schedule: dict[str, Any],
) -> None:
    """Give a model local losses.

    Writes a training step as Python text, a plan, an audit and a picture.
    """
    asked = _recipe(
        model,
        method,
        recipe,
        options,
        _cut(segments, cut_at, cut_by),
        num_classes,
        input_shape,
        shared=shared,
        leaf=leaf,
        schedule=schedule,
    )
    from localize import auditor, folder

    if output is not None:
        folder.check_free(output, force=force)
    local = folder.build(asked)
    report = auditor.static(local)
    if output is not None:
        folder.write(local, asked, report, output, force=force)
    plan = folder.describe(local)
    if as_json:
        _print_json(plan)
        return
    typer.echo("\n".join(_summary(plan, report)))
    typer.echo(f"written: {output}" if output is not None else "nothing is written; -o DIR writes it")


def _summary(plan: Mapping[str, Any], report: AuditReport) -> Iterator[str]:
    totals = plan["totals"]
    held = sum(check.ok for check in report.checks)
    yield f"{plan['model']} by {plan['method']}: {len(plan['segments'])} segments, {len(plan['losses'])} losses"
    yield from _table(
        [
            ["", "parameters", "multiply-adds, one image"],
            ["model", f"{totals['trunk_parameters']:,}", f"{totals['trunk_macs']:,}"],
            ["training", f"{totals['training_parameters']:,}", f"{totals['training_macs']:,}"],
        ]
    )
    yield f"audit: {held} of {len(report.checks)} checks of the text hold; `localize audit` runs the step as well"


@with_flags
def audit(
    target: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(metavar="DIR|MODEL", help="A folder that convert has written, or a model by name."),
    ] = None,
    method: MethodName = None,
    recipe: RecipeFile = None,
    segments: SegmentCount = None,
    cut_at: CutAt = None,
    cut_by: CutBy = None,
    shared: Shared = False,
    leaf: Leaf = None,
    num_classes: Classes = None,
    input_shape: InputShape = None,
    as_json: Json = False,
    *,
    options: dict[str, Any],
    schedule: dict[str, Any],
) -> None:
    """Check what each loss trains.

    Reads the text of the training step, and runs it on a random batch.

    Exit code 1 if a check fails.
    """
    import torch

    from localize import folder
    from localize.auditor import audit as audit_local
    from localize.auditor import to_dict

    torch.manual_seed(0)
    cut = _cut(segments, cut_at, cut_by)
    if target is not None and _is_folder(target):
        given = (method, recipe, cut, shared or None, leaf, num_classes, input_shape, *options, *schedule)
        _refuse_beside_folder(target, *given)
        local, report = folder.reaudit(target)
    else:
        local = folder.build(
            _recipe(
                target,
                method,
                recipe,
                options,
                cut,
                num_classes,
                input_shape,
                shared=shared,
                leaf=leaf,
                schedule=schedule,
            )
        )
        report = audit_local(local, folder.random_batch(local))
    if as_json:
        _print_json(to_dict(report))
    else:
        typer.echo("\n".join(_verdict(local.plan.segments.trunk.name, local.plan.method, report)))
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
        yield f"{check.id} fails: not true that {check.claim}"
        yield from (f"  {line}" for line in check.evidence.splitlines())
    if report.deviations:
        yield ""
        yield f"where {method} deviates from its paper:"
        yield from (f"  - {line}" for line in report.deviations)
    yield ""
    total = len(report.checks)
    verdict = f"{len(failed)} of {total} checks fail" if failed else f"all {total} checks hold"
    yield f"{model} by {method}: {verdict}"


@with_flags
def compare(
    names: Annotated[
        list[str], typer.Argument(metavar="MODEL|RECIPE...", help="A model; with --train, recipes by name or file.")
    ],
    asked: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--methods",
            metavar="NAME,NAME",
            help="Methods or recipes, options behind colons: NAME:OPTION=4,NAME; default: all methods.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", metavar="N", min=1, help="Images in a step.")] = 128,
    segments: SegmentCount = None,
    cut_at: CutAt = None,
    cut_by: CutBy = None,
    shared: Shared = False,
    leaf: Leaf = None,
    num_classes: Classes = None,
    input_shape: InputShape = None,
    measure: Annotated[bool, typer.Option("--measure", help="Run steps on random images, and time them.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the steps that --measure times.")] = False,
    train: Annotated[
        bool, typer.Option("--train", help="Train every recipe with several seeds, and tabulate test accuracies.")
    ] = False,
    seeds: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--seeds", metavar="N", min=1, help="Seeds of --train, from 0; default 3.", show_default=False),
    ] = None,
    output: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--output", "-o", metavar="DIR", help="Where --train keeps its runs; default runs/compare."),
    ] = None,
    data_dir: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--data-dir", metavar="DIR", help="For --train: folder of a data set that is not bundled."),
    ] = None,
    download: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option("--download", help="For --train: fetch what is not there.", show_default=False),
    ] = None,
    epochs: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--epochs", metavar="N", help="For --train: epochs, instead of those of the recipes."),
    ] = None,
    max_steps: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--max-steps", metavar="N", help="For --train: stop every run after this many steps."),
    ] = None,
    device: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--device", metavar="TEXT", help=f"Where --measure (default cpu) and --train (auto) run: {_DEVICES}."
        ),
    ] = None,
    as_json: Json = False,
    *,
    schedule: dict[str, Any],
) -> None:
    """Compare what methods cost, or what recipes reach.

    Beside backprop, backprop with activation checkpointing (the best of several schedules), backprop on parts of the
    batch, and local losses that are summed and have one backward.

    Without --measure nothing is run or allocated. Cuts and schedules are those of the local methods.

    With --train, every recipe is trained with every seed, and its accuracy stands beside the paper's; called again, it
    goes on where it stopped.
    """
    trained = {
        "--seeds": seeds,
        "--output": output,
        "--data-dir": data_dir,
        "--download": download,
        "--epochs": epochs,
        "--max-steps": max_steps,
    }
    if train:
        costs = (asked, segments, cut_at, cut_by, leaf, num_classes, input_shape, *schedule.values())
        if measure or compiled or shared or any(value is not None for value in costs):
            raise OptionError(
                "--train takes recipes as they are.",
                facts=f"beside it may stand {', '.join(trained)}, --device and --json.",
                help="localize recipes cp NAME, and change the copy",
            )
        where = {"data_dir": data_dir, "download": download, "device": device}
        settings = {**where, "epochs": epochs, "max_steps": max_steps}
        _train_and_compare(names, seeds or 3, output or "runs/compare", settings, as_json=as_json)
        return
    if alone := [flag for flag, value in trained.items() if value is not None]:
        raise OptionError(f"{alone[0]} says how to train.", help="--train, or leave it out")
    if compiled and not measure:
        raise OptionError("--compile says how steps are run that are timed.", help="--measure too, or leave it out")
    if len(names) > 1:
        raise OptionError(
            f"one model is compared, not {len(names)}.",
            facts=f"{', '.join(names)}",
            help="--methods compares methods; --train takes several recipes",
        )
    model = names[0]
    from localize import compare as comparing
    from localize import methods

    cut = _cut(segments, cut_at, cut_by)
    local = [name for name in methods.names() if name not in methods.RIVALS]
    recipes = {}
    wanted = local if asked is None else asked.split(",")
    if not all(text.partition(":")[0].strip() for text in wanted):
        raise OptionError(
            f"--methods cannot be {asked!r}.",
            facts="it is names of methods or recipes, each with its options: NAME:OPTION=4,NAME.",
            help=f"--methods {','.join(local[:2])}; or leave it out, for all methods",
        )
    for text in wanted:
        name, *given = text.strip().split(":")
        options = dict(part.partition("=")[::2] for part in given)
        recipes[text.strip()] = _recipe(
            model, name, None, options, cut, num_classes, input_shape, shared=shared, leaf=leaf, schedule=schedule
        )
    base = _recipe(model, methods.BACKPROP, None, {}, None, num_classes, input_shape, shared=shared, leaf=leaf)
    with _working() as tell:
        rows = comparing.compare(
            recipes, base, batch_size, device=(device or "cpu") if measure else None, compiled=compiled, tell=tell
        )
    if as_json:
        _print_json({"model": base.model, "batch_size": batch_size, "rows": [dataclasses.asdict(row) for row in rows]})
        return
    typer.echo("\n".join(_compared(rows)))


def _train_and_compare(
    names: Sequence[str], seeds: int, output: str, settings: Mapping[str, Any], *, as_json: bool
) -> None:
    from localize.train import sweep

    rows = sweep.sweep(sweep.plan(names, seeds, output, **settings))
    if as_json:
        _print_json({"seeds": seeds, "output": output, "rows": [dataclasses.asdict(row) for row in rows]})
    else:
        typer.echo("\n".join(_trained(rows)))
    if any(row.diverged for row in rows):
        raise typer.Exit(1)


def _trained(rows: Sequence[sweeping.Row]) -> Iterator[str]:
    def percent(share: float | None) -> str:
        return "" if share is None else f"{100 * share:.2f}"

    lines = [["recipe", "test accuracy, %", "std", "n", "paper", "hours", "machine"]]
    for row in rows:
        found = [percent(row.mean), percent(row.std), str(len(row.accuracies)), percent(row.paper)]
        lines.append([row.recipe, *found, f"{row.hours:.2f}", ", ".join(row.machines)])
    yield from _table(lines, right=range(1, 6))
    for row in rows:
        yield from (f"{row.recipe}, seed {seed}: {problem}" for seed, problem in row.diverged.items())
        if row.source:
            yield f"{row.recipe}: {row.source}"


def _compared(rows: list[comparing.Row]) -> Iterator[str]:
    from localize.compare import verdict

    base = rows[0]
    lines = [["", "parameters", "multiply-adds", "", "saved", "peak", "", "step"]]
    for row in rows:
        if row.refused:
            continue
        shares = f"{row.macs / base.macs:.2f} x", f"{row.peak_bytes / base.peak_bytes:.1%}"
        step = "" if row.seconds is None else f"{row.seconds:.3g} s, {row.seconds / base.seconds:.2f} x"
        sizes = f"{row.saved_bytes / 2**20:,.1f} MiB", f"{row.peak_bytes / 2**20:,.1f} MiB"
        lines.append([row.method, f"{row.parameters:,}", f"{row.macs:,}", shares[0], *sizes, shares[1], step])
    yield from _table(lines)
    yield ""
    yield from verdict(rows)
    yield from (f"{row.method}: {row.refused}" for row in rows if row.refused)


@contextmanager
def _working() -> Iterator[Callable[[str], None]]:
    """Show on stderr what was done last; yield what is told it."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status("...") as status:
        yield lambda name: status.update(name)


@with_flags
def plan(
    model: OptionalModel = None,
    method: MethodName = None,
    recipe: RecipeFile = None,
    memory_budget: Annotated[
        str, typer.Option("--memory-budget", metavar="SIZE", help="Such as 8GiB or 500MiB.", show_default=False)
    ] = "",
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", metavar="N", min=1, help="Images in a step.")] = 128,
    shared: Shared = False,
    leaf: Leaf = None,
    num_classes: Classes = None,
    input_shape: InputShape = None,
    output: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--output", "-o", metavar="FILE", help="Recipe to write; without it nothing is written."),
    ] = None,
    force: Force = False,
    measure: Annotated[bool, typer.Option("--measure", help="Time distinct segments; take the quickest.")] = False,
    device: Annotated[str, typer.Option("--device", metavar="TEXT", help=f"Where --measure runs: {_DEVICES}.")] = "cpu",
    as_json: Json = False,
    *,
    options: dict[str, Any],
    schedule: dict[str, Any],
) -> None:
    """Choose cuts and recomputation that fit a memory budget.

    Of all that fit, the one with the least arithmetic. Without --measure nothing is run or allocated.
    """
    budget = _bytes(memory_budget)
    if output is not None:
        _check_new_file(output, force=force)
    from localize import methods

    asked = _recipe(
        model,
        method or (None if recipe else methods.PLANNED),
        recipe,
        options,
        None,
        num_classes,
        input_shape,
        shared=shared,
        leaf=leaf,
        schedule=schedule,
    )
    from localize import planner, recipes

    try:
        with _working() as tell:
            choice = planner.plan(asked, budget, batch_size, device=device if measure else None, tell=tell)
    except planner.BudgetError as error:
        typed = memory_budget.strip()
        if not typed[-1].isdecimal() or budget >= 2**20:
            raise
        help = f"{typed} is {budget} bytes; --memory-budget {typed}{'GiB' if budget < 100 else 'MiB'}"
        raise planner.BudgetError(error.problem, facts=error.facts, help=help) from error
    chosen = recipes.dump(choice.chosen.recipe)
    if output is not None:
        _write_file(output, chosen)
    if as_json:
        rows = [
            {name: value for name, value in dataclasses.asdict(one).items() if name != "recipe"}
            for one in (choice.chosen, *choice.frontier, choice.backprop)
        ]
        names = ["chosen", *("frontier" for _ in choice.frontier), "backprop"]
        _print_json({"rows": [{"row": name, **row} for name, row in zip(names, rows, strict=True)], "recipe": chosen})
        return
    typer.echo("\n".join(_planned(choice, budget, batch_size)))
    typer.echo(chosen, nl=False)
    typer.echo(f"written: {output}" if output is not None else "nothing is written; -o FILE.yaml writes this recipe")


def _planned(choice: planner.Choice, budget: int, batch_size: int) -> Iterator[str]:
    from localize.planner import described, told

    base, chosen = choice.backprop, choice.chosen
    yield f"{batch_size} images, a budget of {told(budget)}: {described(chosen)}"
    rows = [["", "peak", "", "multiply-adds", "", "step", ""]]
    timed = [one for one in choice.tried if one.seconds is not None and one not in choice.frontier]
    for one in (base, *choice.frontier, *timed):
        name = "backprop" if one is base else described(one)
        shares = f"{one.peak_bytes / base.peak_bytes:.1%}", f"{one.macs / base.macs:.2f} x"
        mark = "chosen" if one is chosen else ""
        step = "" if one.seconds is None else f"{one.seconds:.3g} s"
        rows.append([name, told(one.peak_bytes), shares[0], f"{one.macs:,}", shares[1], step, mark])
    yield from _table(rows)
    if base.peak_bytes <= budget:
        yield f"backprop fits the budget too, for {base.macs / chosen.macs:.2f} times the arithmetic of this choice"
    yield (
        "peaks are exact for live tensors (parameters, gradients, SGD with momentum, batch, activations); an allocator "
        "holds more: workspaces of convolutions, and gaps"
    )
    if chosen.seconds is not None:
        yield "seconds are those of every distinct segment, timed alone, added up: right within a few per cent"
    yield ""


def _bytes(text: str) -> int:
    """Return the number of bytes that a text such as 8GiB spells."""
    units = {"": 1, "b": 1}
    for power, letter in enumerate("kmgt", start=1):
        units |= {letter: 1024**power, f"{letter}ib": 1024**power, f"{letter}b": 1000**power}
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].lower() not in units or float(found[1]) == 0:
        told = f"--memory-budget cannot be {text!r}." if text else "no budget was given."
        raise OptionError(told, facts="it is a number of bytes.", help="--memory-budget 8GiB, or 500MiB")
    return int(float(found[1]) * units[found[2].lower()])


@with_flags
def train(
    model: OptionalModel = None,
    method: MethodName = None,
    recipe: RecipeFile = None,
    segments: SegmentCount = None,
    cut_at: CutAt = None,
    cut_by: CutBy = None,
    shared: Shared = False,
    leaf: Leaf = None,
    input_shape: InputShape = None,
    output: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--output", "-o", metavar="DIR", help="Run folder; default runs/MODEL-METHOD-DATA-seedN."),
    ] = None,
    resume: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--resume", metavar="DIR", help="Go on with the run in DIR from its last checkpoint, as it was."),
    ] = None,
    force: Force = False,
    *,
    options: dict[str, Any],
    schedule: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    """Train a model by local losses.

    Leaves a folder with the metrics of every epoch and the trained model under its original keys.
    """
    from localize import train as training
    from localize.train.config import settings as known

    if resume is not None:
        if not resume:
            raise OptionError(
                "--resume names no folder.", facts="its name is empty.", help="localize train --resume DIR"
            )
        given = (model, method, recipe, segments, cut_at, cut_by, leaf, input_shape, output)
        if any(value is not None for value in given) or shared or force or options or schedule or settings:
            raise OptionError(
                "--resume takes no other argument.",
                facts=f"{Path(resume) / 'recipe.yaml'} says everything about the run.",
                help=f"localize train --resume {resume}; or without --resume, for another run",
            )
        training.resume(resume)
        return
    asked = _recipe(
        model,
        method,
        recipe,
        options,
        _cut(segments, cut_at, cut_by),
        input_shape=input_shape,
        shared=shared,
        leaf=leaf,
        schedule=schedule,
    )
    if asked.model is None:
        raise OptionError("no model was given, and the recipe names none.", help="localize train MODEL ...")
    about = {item.name: item.metadata for item in known()}
    typed = {name: _number(value, about[name]["type"], about[name]["of"]) for name, value in settings.items()}
    chosen = {**asked.train, **typed, **({"output": output} if output is not None else {})}
    config = training.TrainConfig(asked.model, recipe=asked, input_shape=asked.input_shape, **chosen)
    training.run(config, force=force)


@app.command()
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run: see `localize train`.")],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="File to write: .safetensors, .pt or .pth.")
    ],
    force: Force = False,
    check: Annotated[
        bool, typer.Option("--verify", help="Read the file into a fresh model, and compare its logits bit for bit.")
    ] = False,
) -> None:
    """Write the plain model of a run.

    Under its original keys: what the model's own library loads. With --verify, exit code 1 if the logits differ.
    """
    from localize.train import export as export_run
    from localize.train import verify

    typer.echo(f"written: {export_run(run, output, force=force)}")
    if check:
        typer.echo(verify(run, output))


@app.command("eval")
def evaluate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run: see `localize train`.")],
    at: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--at", metavar="LAYER|all", help="Predict by this local loss, named as in the table of --at all."
        ),
    ] = None,
    weighted: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--weighted", metavar="P", help="Predict by the weighted sum of all local losses' scores."),
    ] = None,
    form: Annotated[
        str, typer.Option("--form", metavar="l**p|p**l", help="Weight of layer l = 1, 2, ... in that sum.")
    ] = "l**p",
    without_classifier: Annotated[
        bool, typer.Option("--without-classifier", help="Predict by the deepest local loss.")
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
        bool, typer.Option("--goodness", help="Predict by goodness, each label shown in turn.")
    ] = False,
    skip_first: Annotated[
        bool, typer.Option("--skip-first", help="Leave the first layer out of the goodness.")
    ] = False,
    saliency: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--saliency", metavar="DIR", help="Write pictures of where the two most likely labels are seen."),
    ] = None,
    count: Annotated[int, typer.Option("-n", metavar="N", help="Number of pictures.")] = 8,
    data: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--data", metavar="NAME", help="Data set, by its test images; default: that of the run."),
    ] = None,
    data_dir: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--data-dir", metavar="DIR", help="Folder of a data set that is not bundled."),
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch what is not in that folder, where torchvision can fetch it.")
    ] = False,
    batch_size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--batch-size", metavar="N", help="Images at a time; default: as in the run."),
    ] = None,
    device: Annotated[str, typer.Option("--device", metavar="TEXT", help=f"{_DEVICES}.")] = "auto",
    as_json: Json = False,
) -> None:
    """Test a trained run, by its local losses too.

    Layer by layer, by several layers together, without the classifier, on super-classes, by goodness; and saliency.
    """
    from localize.train import evaluation

    if groups is not None and superlabels is None:
        raise OptionError("--map says which super-classes there are.", help="--superlabels mean, or leave out --map")
    if skip_first and not goodness:
        raise OptionError("--skip-first says what goodness leaves out.", help="--goodness, or leave out --skip-first")
    questions = evaluation.Questions(at, weighted, form, without_classifier, superlabels, (), goodness, skip_first)
    opened = evaluation.open_run(
        run,
        heads=questions.any or saliency is not None,
        data_name=data,
        data_dir=data_dir,
        download=download,
        batch_size=batch_size,
        device=device,
    )
    if superlabels is not None:
        classes = opened.local.plan.segments.trunk.num_classes
        questions = dataclasses.replace(questions, groups=evaluation.read_groups(groups, classes))
    evaluation.check(opened, questions)
    layer = at if at != evaluation.ALL else None
    pictures = evaluation.write_saliency(opened, saliency, count, at=layer) if saliency is not None else []
    report = evaluation.evaluate_run(opened, questions) | ({"saliency": pictures} if saliency is not None else {})
    if as_json:
        _print_json(report)
    else:
        typer.echo("\n".join(_evaluated(report)))


def _evaluated(report: Mapping[str, Any]) -> Iterator[str]:
    found = [(f"by {'its own output' if report['answer'] == 'output' else report['answer']}", report["accuracy"])]
    found += [(f"by {one['name']}, up to {one['ends_at']}", one["accuracy"]) for one in report.get("layers", ())]
    if one := report.get("weighted"):
        found.append((f"by the weighted sum, {one['form']}, p = {one['p']:g}", one["accuracy"]))
    if one := report.get("without_classifier"):
        found.append((f"without the classifier, by {one['name']}", one["accuracy"]))
    if one := report.get("superlabels"):
        found.append((f"{one['classes']} super-classes, {one['form']}", one["accuracy"]))
    if one := report.get("goodness"):
        found.append((f"by goodness{', without the first layer' if one['skip_first'] else ''}", one["accuracy"]))
    yield f"{report['model']} by {report['method']}: {report['images']:,} test images of {report['data']}"
    yield from _table([["prediction", "accuracy"], *([what, f"{100 * share:.2f} %"] for what, share in found)])
    for one in report.get("saliency", ()):
        yield f"{one['file']}: label {one['label']}; maps of {one['top1']}, {one['top2']}"


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folders of runs: see `localize train`.")],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE.html", help="Page to write; default report.html.")
    ] = "report.html",
    memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="Predict the memory over one step, which takes longest.")
    ] = True,
    force: Force = False,
) -> None:
    """Write a page about training runs.

    One HTML file that loads nothing: accuracy and loss by depth, ownership, memory over a step, settings.
    """
    _check_new_file(output, force=force)
    from localize.report import report as page

    with _working() as tell:
        text = page(runs, memory=memory, tell=tell)
    _write_file(output, text)
    typer.echo(f"written: {output}")


@with_flags
def draw(
    target: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(metavar="DIR|MODEL", help="A folder that convert has written, or a model by name."),
    ] = None,
    method: MethodName = None,
    recipe: RecipeFile = None,
    segments: SegmentCount = None,
    cut_at: CutAt = None,
    cut_by: CutBy = None,
    shared: Shared = False,
    leaf: Leaf = None,
    num_classes: Classes = None,
    input_shape: InputShape = None,
    output: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--output", "-o", metavar="FILE.svg", help="File to write; without it, stdout."),
    ] = None,
    force: Force = False,
    memory: Annotated[
        bool, typer.Option("--memory", help="Draw the memory over one step, beside backprop and checkpointing.")
    ] = False,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "-b", metavar="N", min=1, help="Images in the step of --memory.")
    ] = 128,
    *,
    options: dict[str, Any],
    schedule: dict[str, Any],
) -> None:
    """Draw segments, cuts and heads, or the memory over a step, as SVG."""
    from localize import folder, recipes
    from localize.draw import graph_svg

    cut = _cut(segments, cut_at, cut_by)
    if output is not None:
        _check_new_file(output, force=force)
    if target is not None and _is_folder(target):
        given = (method, recipe, cut, shared or None, leaf, num_classes, input_shape, *options, *schedule)
        _refuse_beside_folder(target, *given)
        asked = recipes.load(Path(target))
    else:
        asked = _recipe(
            target, method, recipe, options, cut, num_classes, input_shape, shared=shared, leaf=leaf, schedule=schedule
        )
    if memory:
        from localize import compare as comparing
        from localize.draw_memory import memory_svg

        with _working() as tell:
            steps = comparing.footprints(asked, batch_size, tell=tell)
        picture = memory_svg(steps, f"{asked.model}, {batch_size} images")
    else:
        picture = graph_svg(folder.build(asked))
    if output is None:
        typer.echo(picture, nl=False)
    else:
        _write_file(output, picture)
        typer.echo(f"written: {output}")


def _is_folder(target: str) -> bool:
    """Decide between a folder and a model's name: what looks like a path is one."""
    return Path(target).is_dir() or target.startswith((".", "/", "~")) or target.endswith("/")


def _refuse_beside_folder(target: str, *given: Any) -> None:
    if any(value is not None for value in given):
        raise OptionError(
            f"{target} is a folder, and its recipe says what was built.",
            facts="method, cuts and options cannot be given beside it.",
            help="localize convert to build something else",
        )


# --------------------------------------------------------------------------------------------------------- recipes


@recipes_app.command("ls")
def recipes_ls(as_json: Json = False) -> None:
    """List the packaged recipes: method, model, data set and paper of each."""
    from localize import recipes

    found = [
        {
            "name": name,
            "method": recipe.method,
            "model": recipe.model,
            "data": recipe.train.get("data"),
            "paper": recipe.paper or None,
        }
        for name, recipe in ((name, recipes.load(name)) for name in recipes.names())
    ]
    if as_json:
        _print_json(found)
        return
    rows = [["recipe", "method", "model", "data set", "paper"]]
    for one in found:
        rows.append([one["name"], one["method"], one["model"] or "any", one["data"] or "any", _cited(one["paper"])])
    typer.echo("\n".join(_table(rows, right=())))


def _cited(paper: str | None) -> str:
    """Return "Choi et al. 2024" for a paper that begins with its authors ("S. Choi, M. Jeon, ...") and has a year."""
    author = re.match(r"(?:[^\W\d_]{1,2}\.[ -]?)+([^,.&]+)([,&]| and )?", paper or "")
    years = re.findall(r"\b(?:19|20)\d\d\b", paper or "")
    if author is None or not years:
        return (paper or "-").split(".")[0]
    return f"{author[1].strip()}{' et al.' if author[2] else ''} {years[0]}"


@recipes_app.command("show")
def recipes_show(name: Annotated[str, typer.Argument(metavar="NAME")]) -> None:
    """Print a packaged recipe."""
    from localize import recipes

    typer.echo(recipes.text(name), nl=False)


@recipes_app.command("cp")
def recipes_cp(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    output: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(metavar="FILE", help="Default: NAME.yaml in this directory."),
    ] = None,
    force: Force = False,
) -> None:
    """Copy a packaged recipe into a file, to change it."""
    from localize import recipes

    text = recipes.text(name)
    path = output or f"{name}.yaml"
    _check_new_file(path, force=force)
    _write_file(path, text)
    typer.echo(f"written: {path}")


@recipes_app.command("validate")
def recipes_validate(files: Annotated[list[str], typer.Argument(metavar="FILE...")]) -> None:
    """Check recipe files: every key, every value, every option."""
    from localize import recipes

    for file in files:
        recipe = recipes.load(Path(file) if Path(file).exists() else file)
        typer.echo(f"{file}: ok, {recipe.method} on {recipe.model or 'any model'}")


# --------------------------------------------------------------------------------------------------------- writing


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def _table(rows: Iterable[list[str]], *, right: Iterable[int] | None = None) -> Iterator[str]:
    """Yield the rows as lines with aligned columns; all but the first are aligned right unless ``right`` says which."""
    rows = list(rows)
    right = range(1, len(rows[0])) if right is None else right
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def _check_new_file(path: str, *, force: bool) -> None:
    if Path(path).is_dir():
        raise MissingError(f"{path} is a folder.", help=f"{Path(path) / 'NAME'}")
    if Path(path).exists() and not force:
        raise MissingError(f"{path} exists.", help="another name, or --force to replace it")


def _write_file(path: str, text: str) -> None:
    """Write a file in one step: whole, or not at all."""
    try:
        with replacing(Path(path)) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise MissingError(f"{path} cannot be written.", facts=str(error), help="another name") from error
