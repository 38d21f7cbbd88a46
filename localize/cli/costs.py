"""Commands on costs: compare, plan."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Optional

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
        typer.Option("--download", help="For --train: fetch what is not there.", show_default=False),
    ] = None
    data: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--data", metavar="DATA", help="For --train: data set, instead of that of the recipes."),
    ] = None
    epochs: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--epochs", metavar="N", help="For --train: epochs, instead of those of the recipes."),
    ] = None
    max_steps: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--max-steps", metavar="N", help="For --train: stop every run after this many steps."),
    ] = None


@dataclasses.dataclass(frozen=True)
class Conditions:
    """What steps are compared under."""

    amp: Annotated[bool, typer.Option("--amp", help="Steps run under autocast to --amp-dtype.")] = False
    amp_dtype: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--amp-dtype", metavar="bfloat16|float16", help="Type of --amp; default bfloat16."),
    ] = None
    opt: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--opt", metavar="NAME", help="Optimizer by its name in timm; default SGD with momentum."),
    ] = None

    @property
    def told(self) -> str:
        """What they are, in words."""
        kind = "SGD with momentum" if self.opt is None else self.opt
        return f"{kind}, under autocast to {self.amp_dtype or 'bfloat16'}" if self.amp else kind

    def read(self) -> memory.Conditions:
        """Return what they stand for.

        Raises:
            OptionError: a type that is not one of autocast, or one without --amp.
            UnknownNameError: timm has no such optimizer.
        """
        import torch

        from localize.estimate import memory

        if self.amp_dtype not in (None, "bfloat16", "float16"):
            raise OptionError(
                f"--amp-dtype cannot be {self.amp_dtype!r}.",
                facts="its values are bfloat16, float16.",
                help="--amp-dtype bfloat16",
            )
        if self.amp_dtype is not None and not self.amp:
            raise OptionError("--amp-dtype is the type of --amp, which was not given.", help="--amp too")
        dtype = getattr(torch, self.amp_dtype or "bfloat16") if self.amp else None
        optimizer = memory.sgd if self.opt is None else memory.named(self.opt)
        return memory.Conditions(optimizer, dtype, self.opt or "")


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
    """Compare what methods cost, or what recipes reach.

    Beside backprop, backprop with activation checkpointing (the best of several schedules), backprop on parts of the
    batch, and local losses that are summed and have one backward.

    Without --measure nothing is run or allocated. Cuts and schedules are those of the local methods.

    With --train, every recipe is trained with every seed, and its accuracy stands beside the paper's; called again, it
    goes on where it stopped. With --methods too, methods are trained on one model, and need no recipes.
    """
    typed = {f"--{name.replace('_', '-')}": value for name, value in dataclasses.asdict(training).items()}
    if train:
        words = _words(asked) if chosen is not None else ()
        if measure or compiled or conditions != Conditions() or (chosen is None and not asked.is_empty):
            raise OptionError(
                "--train takes recipes as they are.",
                facts=f"beside it may stand {', '.join(typed)}, --device and --json; beside --methods also cuts.",
                help="localize recipes cp NAME, and change the copy",
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
        raise OptionError(f"{alone[0]} says how to train.", help="--train, or leave it out")
    if compiled and not measure:
        raise OptionError("--compile says how steps are run that are timed.", help="--measure too, or leave it out")
    if len(names) > 1:
        raise OptionError(
            f"one model is compared, not {len(names)}.",
            facts=f"{', '.join(names)}",
            help="--methods compares methods; --train takes several recipes",
        )
    where = (device or "cpu") if measure else None
    _compare_costs(names[0], chosen, batch_size, asked, conditions, device=where, compiled=compiled, as_json=as_json)


def _words(asked: Asked) -> tuple[str, ...]:
    """Return what was typed about cuts, as it is typed again.

    Raises:
        OptionError: something else was typed, which a recipe has to say.
    """
    cuts = (("-K", asked.segments), ("--cut-at", asked.cut_at), ("--cut-by", asked.cut_by))
    if not dataclasses.replace(asked, segments=None, cut_at=None, cut_by=None).is_empty:
        raise OptionError(
            "beside --train and --methods only cuts can be given.",
            facts="they are -K, --cut-at and --cut-by; options of a method stand after its name: NAME:OPTION=4.",
            help="a recipe for each: localize recipes cp NAME",
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
    from localize.estimate import sharing

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
        rows = comparing.compare(recipes, base, batch_size, device=device, compiled=compiled, under=under, tell=tell)
        shared = [] if as_json else list(sharing.suggestions(rows, recipes, batch_size, under, tell=tell))
    if as_json:
        about = {"model": base.model, "batch_size": batch_size, "conditions": conditions.told}
        print_json({**about, "rows": [dataclasses.asdict(row) for row in rows]})
        return
    say("\n".join((*_compared(rows), *shared)))
    if conditions != Conditions():
        say(f"all steps with {conditions.told}")


def _chosen(model: str, typed: str | None, asked: Asked) -> dict[str, Recipe]:
    """Return the recipe of every method that ``--methods`` names with its options; of all local ones by default."""
    from localize import methods

    local = [name for name in methods.names() if name not in methods.RIVALS]
    wanted = local if typed is None else typed.split(",")
    if not all(text.partition(":")[0].strip() for text in wanted):
        raise OptionError(
            f"--methods cannot be {typed!r}.",
            facts="it is names of methods or recipes, each with its options: NAME:OPTION=4,NAME.",
            help=f"--methods {','.join(local[:2])}; or leave it out, for all methods",
        )
    recipes = {}
    for text in wanted:
        parts = text.strip().split(":")  # a name may be MODULE:CLASS; an option is NAME=VALUE
        count = next((n for n, part in enumerate(parts) if "=" in part), len(parts))
        name, options = ":".join(parts[:count]), dict(part.partition("=")[::2] for part in parts[count:])
        recipes[text.strip()] = dataclasses.replace(asked, method=name, options=options).build_recipe(model)
    return recipes


def _compared(rows: list[comparing.Row]) -> Iterator[str]:
    from localize.estimate.compare import verdict

    base = rows[0]
    resident = any(row.resident_bytes is not None for row in rows)
    lines = [["", "parameters", "multiply-adds", "", "saved", "peak", "", *(["resident"] * resident), "step"]]
    for row in rows:
        if row.refused:
            continue
        shares = f"{row.macs / base.macs:.2f} x", f"{row.peak_bytes / base.peak_bytes:.1%}"
        step = "" if row.seconds is None else f"{row.seconds:.3g} s, {row.seconds / base.seconds:.2f} x"
        sizes = f"{row.saved_bytes / 2**20:,.1f} MiB", f"{row.peak_bytes / 2**20:,.1f} MiB"
        held = "" if row.resident_bytes is None else f"{row.resident_bytes / 2**20:,.1f} MiB"
        cells = [shares[0], *sizes, shares[1], *([held] * resident), step]
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
            help="Such as 8GiB or 500MiB; or 30%, of what backprop needs.",
            show_default=False,
        ),
    ] = "",
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", metavar="N", min=1, help="Images in a step.")] = 128,
    output: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--output", "-o", metavar="FILE", help="Recipe to write; without it nothing is written."),
    ] = None,
    force: Force = False,
    conditions: Conditions,
    measure: Annotated[bool, typer.Option("--measure", help="Time distinct segments; take the quickest.")] = False,
    device: Annotated[str, typer.Option("--device", metavar="TEXT", help=f"Where --measure runs: {DEVICES}.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Choose cuts and recomputation that fit a memory budget.

    Of all that fit, the one with the least arithmetic. Without --measure nothing is run or allocated.
    """
    budget = _budget(memory_budget)
    if conditions.amp and measure:
        raise OptionError("--measure times segments without autocast.", help="--amp or --measure")
    if output is not None:
        check_new_file(output, force=force)
    from localize import methods

    if not (asked.method or asked.recipe):
        asked = dataclasses.replace(asked, method=methods.PLANNED)
    recipe = asked.build_recipe(model)
    from localize import recipes
    from localize.estimate import planner

    where, under = device if measure else None, conditions.read()
    try:
        with working() as tell:
            choice = planner.plan(recipe, budget, batch_size, device=where, under=under, tell=tell)
    except planner.BudgetError as error:
        typed = memory_budget.strip()
        if isinstance(budget, planner.Share) or not typed[-1].isdecimal() or budget >= 2**20:
            raise
        help = f"{typed} is {budget} bytes; --memory-budget {typed}{'GiB' if budget < 100 else 'MiB'}"
        raise planner.BudgetError(error.problem, facts=error.facts, help=help) from error
    chosen = recipes.dump(choice.chosen.recipe)
    if output is not None:
        write_file(output, chosen)
    if as_json:
        rows = [
            {name: value for name, value in dataclasses.asdict(one).items() if name != "recipe"}
            for one in (choice.chosen, *choice.frontier, choice.backprop)
        ]
        names = ["chosen", *("frontier" for _ in choice.frontier), "backprop"]
        print_json({"rows": [{"row": name, **row} for name, row in zip(names, rows, strict=True)], "recipe": chosen})
        return
    say("\n".join(_planned(choice, batch_size, conditions)))
    say(chosen, nl=False)
    say(f"written: {output}" if output is not None else "nothing is written; -o FILE.yaml writes this recipe")


def _planned(choice: planner.Choice, batch_size: int, conditions: Conditions) -> Iterator[str]:
    from localize.estimate.planner import described, told

    base, chosen, budget = choice.backprop, choice.chosen, choice.budget
    yield f"{batch_size} images, a budget of {told(budget)}: {described(chosen)}"
    rows = [["", "peak", "", "multiply-adds", "", "step", ""]]
    timed = [one for one in choice.tried if one.seconds is not None and one not in choice.frontier]
    for one in (base, *choice.frontier, *timed):
        name = "backprop" if one is base else described(one)
        shares = f"{one.peak_bytes / base.peak_bytes:.1%}", f"{one.macs / base.macs:.2f} x"
        mark = "chosen" if one is chosen else ""
        step = "" if one.seconds is None else f"{one.seconds:.3g} s"
        rows.append([name, told(one.peak_bytes), shares[0], f"{one.macs:,}", shares[1], step, mark])
    yield from table_lines(rows)
    if base.peak_bytes <= budget:
        yield f"backprop fits the budget too, for {base.macs / chosen.macs:.2f} times the arithmetic of this choice"
    yield (
        f"peaks are exact for live tensors (parameters, gradients, {conditions.told}, batch, activations); an "
        "allocator holds more: workspaces of convolutions, and gaps"
    )
    if chosen.seconds is not None:
        yield "seconds are those of every distinct segment, timed alone, added up: right within a few per cent"
    yield ""


def _budget(text: str) -> int | planner.Share:
    """Return the number of bytes that a text such as 8GiB spells, or the share that 30% does."""
    if found := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text):
        from localize.estimate.planner import Share

        if float(found[1]) > 0:
            return Share(float(found[1]) / 100)
    units = {"": 1, "b": 1}
    for power, letter in enumerate("kmgt", start=1):
        units |= {letter: 1024**power, f"{letter}ib": 1024**power, f"{letter}b": 1000**power}
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].lower() not in units or float(found[1]) == 0:
        told = f"--memory-budget cannot be {text!r}." if text else "no budget was given."
        facts = "it is a number of bytes, or a share of what backprop needs."
        raise OptionError(told, facts=facts, help="--memory-budget 8GiB, 500MiB, or 30%")
    return int(float(found[1]) * units[found[2].lower()])
