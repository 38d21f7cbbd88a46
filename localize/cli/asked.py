"""Turn what was typed into a recipe; flags win over the recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import localize
from localize.errors import OptionError, did_you_mean

if TYPE_CHECKING:
    from localize.ir import CutSpec
    from localize.recipes import Recipe
from localize.cli.flags import read_number


def read_recipe(
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
    trust_code: bool = False,
) -> Recipe:
    """Put together what was typed: flags win over the recipe."""
    from localize import methods, recipes, trust

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
    if recipe and not model and Path(recipe).is_dir():
        trust.refuse_untrusted(recipe, asked, trust_code=trust_code)
    fields = {item.name: type(item.default) for item in dataclasses.fields(methods.get(asked.method))}
    for name in options:
        if name not in fields:
            owners = [one for one in methods.names() if name in {f.name for f in dataclasses.fields(methods.get(one))}]
            raise OptionError(
                f"method {asked.method!r} has no option --{name.replace('_', '-')}.",
                facts=f"its options are {', '.join('--' + f.replace('_', '-') for f in fields) or 'none'}.",
                help=f"--method {' or '.join(owners)} has it; or leave it out",
            )
    given = {name: read_number(value, fields[name]) for name, value in options.items()}
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
        input_shape=read_shape(input_shape) or asked.input_shape,
    )


def _typed(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a schedule, as they were typed, as values."""
    from localize.passes.schedule import Schedule, create

    kinds = {item.name: type(item.default) for item in dataclasses.fields(Schedule)}
    typed = {name: read_number(value, kinds[name]) for name, value in given.items()}
    create(**typed)
    return typed


def read_cut(segments: str | None, at: str | None, by: str | None) -> CutSpec | None:
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
        count = read_number(count, int)
        if not isinstance(count, int) or count < 1:
            raise OptionError(f"-K cannot be {segments}.", facts="it is a number of segments.", help="-K 4, or -K max")
    names = tuple(name.strip() for name in (at or "").split(",") if name.strip())
    if at is not None and not names:
        raise OptionError("--cut-at names no cut.", help="localize inspect MODEL lists them")
    return CutSpec(segments=count, at=names, by=by or "layer")  # type: ignore[arg-type]


def read_shape(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    sizes = [read_number(part, int) for part in text.replace("x", ",").split(",")]
    if len(sizes) < 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise OptionError(
            f"--input-shape cannot be {text!r}.",
            facts="it is channels, height, width (for videos channels, frames, height, width).",
            help="--input-shape 3,32,32",
        )
    return tuple(sizes)


def is_folder(target: str) -> bool:
    """Decide between a folder and a model's name: what looks like a path is one."""
    return Path(target).is_dir() or target.startswith((".", "/", "~")) or target.endswith("/")


def refuse_beside_folder(target: str, *given: Any) -> None:
    if any(value is not None for value in given):
        raise OptionError(
            f"{target} is a folder, and its recipe says what was built.",
            facts="method, cuts and options cannot be given beside it.",
            help="localize convert to build something else",
        )
