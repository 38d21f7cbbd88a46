"""Commands on costs: compare, plan."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from localize.cli.app import with_flags
from localize.cli.asked import Asked
from localize.cli.flags import (
    DEVICES,
    OF_LOSS,
    Force,
    Json,
    OptionalModel,
    Without,
)
from localize.cli.printed import check_new_file, print_json, say, table_lines, working, write_file
from localize.cli.training import train_and_compare
from localize.errors import OptionError
from localize.text import counted

if TYPE_CHECKING:
    from localize.estimate import compare as comparing
    from localize.estimate import memory, planner
    from localize.recipes import Recipe


@dataclasses.dataclass(frozen=True)
class Training:
    """How ``compare --train`` trains."""

    seeds: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--seeds", metavar="N", min=1, help="Seeds of --train, from 0; default 3.", show_default=False),
    ] = None
    output: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--output", "-o", metavar="DIR", help="Where --train keeps its runs; default runs/compare."),
    ] = None
    results: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--results", metavar="FILE", help="Where --train adds a line for each finished run; default DIR/runs.jsonl."
        ),
    ] = None
    data_dir: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--data-dir", metavar="DIR", help="For --train: folder of a data set that is not bundled."),
    ] = None
    download: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option("--download", help="For --train: download missing data.", show_default=False),
    ] = None
    data: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--data", metavar="DATA", help="For --train: data set, instead of the recipes'."),
    ] = None
    epochs: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--epochs", metavar="N", help="For --train: epochs, instead of the recipes'."),
    ] = None
    max_steps: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--max-steps", metavar="N", help="For --train: stop every run after this many steps."),
    ] = None


@dataclasses.dataclass(frozen=True)
class Conditions:
    """Conditions under which steps are compared."""

    amp: Annotated[bool, typer.Option("--amp", help="Run steps under autocast to --amp-dtype.")] = False
    amp_dtype: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--amp-dtype", metavar="bfloat16|float16", help="Type of --amp; default bfloat16."),
    ] = None
    opt: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--opt", metavar="NAME", help="Optimizer by its name in timm; default SGD with momentum."),
    ] = None

    device_model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--device-model",
            metavar="NAME",
            help="Device to predict time for: cpu (default), h200, a100, or FLOP/s,bytes/s,seconds per call.",
        ),
    ] = None

    @property
    def told(self) -> str:
        """A description of the conditions."""
        kind = "SGD with momentum" if self.opt is None else self.opt
        return f"{kind}, under autocast to {self.amp_dtype or 'bfloat16'}" if self.amp else kind

    def read(self) -> memory.Conditions:
        """Return the conditions as values.

        Raises:
            OptionError: autocast does not support the type, the type was given without --amp, or there is no such
                device.
            UnknownNameError: timm has no such optimizer.
        """
        import torch

        from localize.estimate import memory
        from localize.estimate.speed import speed_of

        if self.amp_dtype not in (None, "bfloat16", "float16"):
            raise OptionError(
                f"--amp-dtype cannot be {self.amp_dtype!r}.",
                facts="its values are bfloat16, float16.",
                help="--amp-dtype bfloat16",
            )
        if self.amp_dtype is not None and not self.amp:
            raise OptionError("--amp-dtype is the type of --amp, which was not given.", help="add --amp")
        dtype = getattr(torch, self.amp_dtype or "bfloat16") if self.amp else None
        optimizer = memory.sgd if self.opt is None else memory.named(self.opt)
        return memory.Conditions(optimizer, dtype, speed_of(self.device_model or "cpu"), self.opt or "")


@with_flags
def compare(
    names: Annotated[
        list[str], typer.Argument(metavar="MODEL|RECIPE...", help="A model; with --train, recipes by name or file.")
    ],
    chosen: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--methods",
            metavar="NAME,NAME",
            help="Methods or recipes, options after colons: NAME:OPTION=4,NAME; default: all methods.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", metavar="N", min=1, help="Images in a step.")] = 128,
    *,
    asked: Annotated[Asked, Without("method", "recipe", "options", "trust_code", *OF_LOSS)],
    measure: Annotated[bool, typer.Option("--measure", help="Run steps on random images, and time them.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the steps that --measure times.")] = False,
    train: Annotated[
        bool, typer.Option("--train", help="Train every recipe with several seeds, and tabulate test accuracies.")
    ] = False,
    training: Training,
    conditions: Conditions,
    device: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--device", metavar="TEXT", help=f"Where --measure (default cpu) and --train (auto) run: {DEVICES}."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare the costs of methods, or the accuracies of recipes.

    Methods are compared with backprop, backprop with activation checkpointing (the best of several schedules), backprop
    on parts of the batch, and local losses that are summed and have one backward.

    Without --measure nothing is run or allocated. Cuts and schedules apply to the local methods.

    With --train, every recipe is trained with every seed, and its accuracy is listed next to the paper's. Called again,
    it resumes where it stopped. With --methods too, it trains these methods on one model, without recipes.
    """
    typed = {f"--{name.replace('_', '-')}": value for name, value in dataclasses.asdict(training).items()}
    if train:
        words = _words(asked) if chosen is not None else ()
        if measure or compiled or conditions != Conditions() or (chosen is None and not asked.is_empty):
            raise OptionError(
                "--train takes recipes as they are.",
                facts=f"it allows {', '.join(typed)}, --device and --json; with --methods also cuts.",
                help="localize recipes cp NAME, then change the copy",
            )
        if chosen is not None and len(names) > 1:
            raise OptionError("--methods are trained on one model.", facts=", ".join(names), help="one MODEL")
        settings = {name: getattr(training, name) for name in ("data", "data_dir", "download", "epochs", "max_steps")}
        settings["device"] = device
        seeds, output = training.seeds or 3, training.output or "runs/compare"
        sources = names if chosen is None else _chosen(names[0], chosen, asked)
        train_and_compare(sources, seeds, output, settings, words=words, results=training.results, as_json=as_json)
        return
    if alone := [flag for flag, value in typed.items() if value is not None]:
        raise OptionError(f"{alone[0]} needs --train.", help="add --train, or leave it out")
    if compiled and not measure:
        raise OptionError("--compile needs --measure, which times steps.", help="add --measure, or leave it out")
    if len(names) > 1:
        raise OptionError(
            f"only one model can be compared, not {len(names)}.",
            facts=f"{', '.join(names)}",
            help="--methods compares methods; --train takes several recipes",
        )
    where = (device or "cpu") if measure else None
    _compare_costs(names[0], chosen, batch_size, asked, conditions, device=where, compiled=compiled, as_json=as_json)


def _words(asked: Asked) -> tuple[str, ...]:
    """Return the typed flags for cuts, as words of a command line.

    Raises:
        OptionError: flags were typed that belong in a recipe.
    """
    cuts = (("-K", asked.segments), ("--cut-at", asked.cut_at), ("--cut-by", asked.cut_by))
    if not dataclasses.replace(asked, segments=None, cut_at=None, cut_by=None).is_empty:
        raise OptionError(
            "with --train and --methods, only cuts can be given.",
            facts="they are -K, --cut-at and --cut-by; options of a method follow its name: NAME:OPTION=4.",
            help="write a recipe for each: localize recipes cp NAME",
        )
    return tuple(word for flag, value in cuts if value is not None for word in (flag, value))


def _compare_costs(
    model: str,
    chosen: str | None,
    batch_size: int,
    asked: Asked,
    conditions: Conditions,
    *,
    device: str | None,
    compiled: bool,
    as_json: bool,
) -> None:
    from localize import methods
    from localize.estimate import compare as comparing
    from localize.estimate import processes, sharing

    recipes, under = _chosen(model, chosen, asked), conditions.read()
    plain = Asked(
        method=methods.BACKPROP,
        shared=asked.shared,
        freeze=asked.freeze,
        leaf=asked.leaf,
        output_field=asked.output_field,
        num_classes=asked.num_classes,
        input_shape=asked.input_shape,
    )
    base = plain.build_recipe(model)
    with working() as tell:
        rows = comparing.compare(
            recipes, base, batch_size, device=device, compiled=compiled, under=under, processes=processes.default(),
            tell=tell,
        )  # fmt: skip
        shared = [] if as_json else list(sharing.suggestions(rows, recipes, batch_size, under, tell=tell))
    if as_json:
        about = {"model": base.model, "batch_size": batch_size, "conditions": conditions.told}
        print_json({**about, "rows": [dataclasses.asdict(row) for row in rows]})
        return
    say("\n".join((*_compared(rows), *shared)))
    if conditions != Conditions():
        say(f"all steps with {conditions.told}; time is predicted by a model of {conditions.device_model or 'cpu'}")


def _chosen(model: str, typed: str | None, asked: Asked) -> dict[str, Recipe]:
    """Return a recipe for every method and its options in ``--methods``; by default for all local methods."""
    from localize import methods

    local = [name for name in methods.names() if name not in methods.RIVALS]
    wanted = local if typed is None else typed.split(",")
    if not all(text.partition(":")[0].strip() for text in wanted):
        raise OptionError(
            f"--methods cannot be {typed!r}.",
            facts="it must be names of methods or recipes, each with its options: NAME:OPTION=4,NAME.",
            help=f"--methods {','.join(local[:2])}; or leave it out to compare all methods",
        )
    recipes = {}
    for text in wanted:
        parts = text.strip().split(":")  # a name may be MODULE:CLASS; an option is NAME=VALUE
        count = next((n for n, part in enumerate(parts) if "=" in part), len(parts))
        name, options = ":".join(parts[:count]), dict(part.partition("=")[::2] for part in parts[count:])
        recipes[text.strip()] = dataclasses.replace(asked, method=name, options=options).build_recipe(model)
    return recipes


def _compared(rows: list[comparing.Row]) -> Iterator[str]:
    from localize.estimate.compare import known, verdict

    base = rows[0]
    resident = any(row.resident_bytes is not None for row in rows)
    lines = [["", "parameters", "multiply-adds", "", "saved", "peak", "", *(["resident"] * resident), "time", "step"]]
    for row in rows:
        if row.refused:
            continue
        macs, peak, saved = known(row.macs), known(row.peak_bytes), known(row.saved_bytes)
        shares = f"{macs / known(base.macs):.2f} x", f"{peak / known(base.peak_bytes):.1%}"
        step = "" if row.seconds is None else f"{row.seconds:.3g} s, {row.seconds / known(base.seconds):.2f} x"
        sizes = f"{saved / 2**20:,.1f} MiB", f"{peak / 2**20:,.1f} MiB"
        held = "" if row.resident_bytes is None else f"{row.resident_bytes / 2**20:,.1f} MiB"
        time = f"{known(row.predicted_seconds) / known(base.predicted_seconds):.2f} x"
        cells = [shares[0], *sizes, shares[1], *([held] * resident), time, step]
        lines.append([row.method, f"{row.parameters:,}", f"{row.macs:,}", *cells])
    yield from table_lines(lines)
    yield ""
    yield from verdict(rows)
    yield from (f"{row.method}: {row.refused}" for row in rows if row.refused)


@with_flags
def plan(
    model: OptionalModel = None,
    *,
    asked: Annotated[Asked, Without("segments", "cut_at", "cut_by", *OF_LOSS)],
    memory_budget: Annotated[
        str,
        typer.Option(
            "--memory-budget",
            metavar="SIZE|P%",
            help="Such as 8GiB or 500MiB; or 30%, of what backprop needs in float32.",
            show_default=False,
        ),
    ] = "",
    time_budget: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--time-budget", metavar="TIMES", help="Longest step, as a multiple of backprop's, such as 1.5."),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", metavar="N", min=1, help="Images in a step.")] = 128,
    output: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--output", "-o", metavar="FILE", help="Recipe to write; without it nothing is written."),
    ] = None,
    force: Force = False,
    conditions: Conditions,
    measure: Annotated[bool, typer.Option("--measure", help="Time distinct segments, and choose by that.")] = False,
    device: Annotated[str, typer.Option("--device", metavar="TEXT", help=f"Where --measure runs: {DEVICES}.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Choose how to train within a memory budget: cuts, a schedule for each segment, moments.

    Without a method, it tries all local methods and their rivals. Among those that fit, it takes the one with the
    shortest predicted time. Without --measure nothing is run or allocated.
    """
    budget = _budget(memory_budget)
    if conditions.amp and measure:
        raise OptionError("--measure times segments without autocast.", help="use either --amp or --measure")
    if time_budget is not None and time_budget <= 0:
        raise OptionError(f"--time-budget cannot be {time_budget:g}.", help="--time-budget 1.5")
    if output is not None:
        check_new_file(output, force=force)
    from localize import methods

    every = not (asked.method or asked.recipe)
    recipe = dataclasses.replace(asked, method=methods.BACKPROP if every else asked.method).build_recipe(model)
    from localize import recipes
    from localize.estimate import planner, processes

    where, under = device if measure else None, conditions.read()
    with working() as tell:
        choice = planner.plan(
            recipe, budget, batch_size, every=every, time_budget=time_budget, device=where, under=under,
            processes=processes.default(), tell=tell,
        )  # fmt: skip
    if as_json:
        about = {"model": recipe.model, "batch_size": batch_size, "conditions": conditions.told}
        rows = [_planned_row(choice, way, batch_size, conditions) for way in choice.ways]
        print_json({**about, "budget_bytes": choice.budget, "time_budget": time_budget, "rows": rows})
    else:
        say("\n".join(_planned(choice, batch_size, conditions)))
    _check_fits(choice, batch_size, recipe.model or "", memory_budget.strip())
    chosen = next((way for way in choice.fitting if way.recipe is not None), None)
    if chosen is None:
        say("no recipe can express the way that fits, so nothing is written", err=True)
        return
    assert chosen.recipe is not None, "chosen for it"
    text = recipes.dump(_as_planned(chosen.recipe, batch_size, conditions))
    if output is not None:
        write_file(output, text)
    if not as_json:
        say(f"\n# {chosen.name}\n{text}", nl=False)
        say(f"written: {output}" if output is not None else "nothing is written; -o FILE.yaml writes this recipe")


def _check_fits(choice: planner.Choice, batch_size: int, model: str, typed: str) -> None:
    """Raise an error if nothing fits, with a hint if the number was probably meant as GiB.

    Raises:
        BudgetError: nothing fits.
    """
    from localize.estimate import planner

    try:
        planner.check(choice, batch_size, model)
    except planner.BudgetError as error:
        if not typed[-1].isdecimal() or choice.budget >= 10_000:
            raise
        help = f"{typed} is {choice.budget} bytes; --memory-budget {typed}{'GiB' if choice.budget < 100 else 'MiB'}"
        raise planner.BudgetError(error.problem, facts=error.facts, help=help) from error


def _as_planned(recipe: Recipe, batch_size: int, conditions: Conditions) -> Recipe:
    """Return the recipe of a way with the settings of training that it was planned for."""
    settings: dict[str, Any] = {"batch_size": batch_size}
    if conditions.opt is not None:
        settings["opt"] = conditions.opt
    if conditions.amp:
        settings |= {"amp": True, "amp_dtype": conditions.amp_dtype or "bfloat16"}
    notes = "Chosen by localize plan, which counts on the settings below."
    return dataclasses.replace(recipe, train={**recipe.train, **settings}, notes=notes)


def _planned_row(choice: planner.Choice, way: planner.Way, batch_size: int, conditions: Conditions) -> dict[str, Any]:
    from localize.recipes.yaml import to_plain

    return {
        "name": way.name,
        "method": way.method,
        "local": way.local,
        "keeps_gradients": way.keeps_gradients,
        "changes_statistics": way.changes_statistics,
        "combined": way.combined,
        "peak_bytes": way.peak_bytes,
        "share": choice.share(way),
        "arithmetic": choice.arithmetic(way),
        "time": choice.time(way),
        "seconds": way.seconds,
        "fits": choice.fits(way),
        "remark": way.remark,
        "recipe": None if way.recipe is None else to_plain(_as_planned(way.recipe, batch_size, conditions)),
    }


def _planned(choice: planner.Choice, batch_size: int, conditions: Conditions) -> Iterator[str]:
    from localize.estimate.planner import told, verdict

    base = choice.backprop
    times = "" if choice.time_budget is None else f" and {choice.time_budget:g} times backprop's time"
    yield f"{counted(batch_size, 'image')}, a budget of {told(choice.budget)}{times}; {conditions.told}"
    rows = [["", "peak", "", "multiply-adds", "time", "step", ""]]
    for way in (base, *(way for way in choice.ways if way.name != base.name or choice.share(way) != 1)):
        step = "" if way.seconds is None else f"{way.seconds:.3g} s"
        notes = ["fits"] if choice.fits(way) else []
        notes += ["backprop's gradients"] if way.keeps_gradients else []
        notes += ["other statistics"] if way.changes_statistics else []
        cells = f"{choice.share(way):.1%}", f"{choice.arithmetic(way):.2f} x", f"{choice.time(way):.2f} x"
        rows.append([way.name, told(way.peak_bytes), *cells, step, ", ".join(notes)])
    yield from table_lines(rows, right=range(1, 6))
    yield ""
    yield from verdict(choice)
    yield from (f"{name}: {problem}" for name, problem in choice.refused)
    yield (
        "peaks are exact for live tensors (parameters, gradients, optimizer's state, batch, activations); an allocator "
        f"holds more. time is predicted by a model of {conditions.device_model or 'cpu'}, as a multiple of backprop's"
    )


def _budget(text: str) -> int | planner.Share:
    """Return a budget as bytes, from a text such as 8GiB, or as a share, from one such as 30%."""
    if found := re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*%\s*", text):
        from localize.estimate.planner import Share

        if float(found[1]) > 0:
            return Share(float(found[1]) / 100)
    units = {"": 1, "b": 1}
    for power, letter in enumerate("kmgt", start=1):
        units |= {letter: 1024**power, f"{letter}ib": 1024**power, f"{letter}b": 1000**power}
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].lower() not in units or float(found[1]) == 0:
        told = f"--memory-budget cannot be {text!r}." if text else "no budget was given."
        facts = "it must be a number of bytes, or a share of what backprop needs."
        raise OptionError(told, facts=facts, help="--memory-budget 8GiB, 500MiB, or 30%")
    return int(float(found[1]) * units[found[2].lower()])
