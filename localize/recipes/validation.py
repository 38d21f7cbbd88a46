"""Check a recipe: every key, every value, every option, with its place in the file."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

import pydantic

from localize import methods, outside
from localize.errors import LocalizeError, OptionError, RecipeError, VersionError, did_you_mean
from localize.files import check_version
from localize.ir import CutSpec, Stated
from localize.passes import compose, labels, schedule
from localize.passes.compose import Addition
from localize.recipes.preprocessing import DataRecord, PartRecord, Preprocessing
from localize.recipes.schema import Expected, Recipe
from localize.recipes.settings import TrainConfig, settings
from localize.zoo.names import checked_shape

CHECK_AGAIN = "change it, then localize recipes validate FILE"


Keys = tuple[str | int, ...]
"""Where a value is: the keys and indices that lead to it."""


@dataclass(frozen=True)
class Place:
    """What a recipe is called in messages, and the line of each of its values."""

    name: str
    lines: Mapping[Keys, int]

    def at(self, keys: Keys) -> str:
        """Say where a value is, or the nearest enclosing one whose line is known."""
        dotted = ".".join(str(key) for key in keys)
        where = next((self.lines[keys[:n]] for n in range(len(keys), -1, -1) if keys[:n] in self.lines), None)
        return f"at {dotted or 'the top'} of {self.name}" + (f", line {where}." if where else ".")


def validated(data: Any, place: Place) -> Recipe:
    if not isinstance(data, Mapping):
        raise RecipeError(
            f"{place.name} is not a recipe: it holds {kind_of(data)}, not keys with values.",
            facts=f"keys of a recipe are {', '.join(_known(()) or ())}.",
            help=f"method: {methods.names()[0]}",
        )
    _refuse_odd(data, place)
    _check_version(data, place)
    _refuse_unknown(data, place)
    if "method" not in data:
        raise RecipeError(
            f"{place.name} does not say which method.",
            facts=f"methods are {', '.join(methods.names())}.",
            help=f"method: {methods.names()[0]}",
        )
    try:
        # JSON is where pydantic is strict about numbers and strings and still takes a list for a tuple.
        plain = {key: value for key, value in data.items() if key != "version"}
        recipe = _ADAPTER.validate_json(json.dumps(plain, default=str), strict=True)
    except pydantic.ValidationError as error:
        raise _wrong_value(error.errors()[0], data, place) from error
    _check_shape(recipe, place)
    _check_train(recipe, place)
    _check_schedule(recipe, place)
    _check_terms(recipe, place)
    _check_loss(recipe, place)
    _check_data(recipe, place)
    _check_method(recipe, place)
    return recipe


def _check_version(data: Mapping[str, Any], place: Place) -> None:
    try:
        check_version(data.get("version"), place.name)
    except VersionError as error:
        raise _placed(error, place, ("version",)) from error


def _refuse_odd(value: Any, place: Place, keys: Keys = ()) -> None:
    """Refuse what no recipe holds and no file keeps: keys that are not text, endless numbers, half characters."""
    odd = ""
    if isinstance(value, float) and not math.isfinite(value):
        odd = f"{value} is not a finite number"
    elif isinstance(value, int) and value.bit_length() > 64:
        odd = f"it is a number of {value.bit_length():,} bits"
    elif isinstance(value, str) and not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        odd = "it holds half of a character (a surrogate)"
    elif isinstance(value, Mapping):
        odd = next((f"{key!r} is not text, and keys are" for key in value if not isinstance(key, str)), "")
    if odd:
        name = ".".join(map(str, keys)) or "the recipe"
        raise RecipeError(f"{name} cannot be read.", facts=[f"{odd}.", place.at(keys)], help=CHECK_AGAIN, keys=keys)
    for key, child in _children(value):
        if isinstance(value, Mapping):
            _refuse_odd(key, place, keys)
        _refuse_odd(child, place, (*keys, key))


def _refuse_unknown(value: Any, place: Place, keys: Keys = ()) -> None:
    known = _known(keys)
    for key, child in _children(value):
        if known is not None and isinstance(value, Mapping) and key not in known:
            raise RecipeError(
                f"a recipe has no key {key!r}{f' in {keys[0]}' if keys else ''}.",
                facts=[place.at((*keys, key)), f"known keys are {', '.join(known)}."],
                help=did_you_mean(str(key), known) or "localize recipes ls, and localize recipes show NAME",
                keys=(*keys, key),
            )
        _refuse_unknown(child, place, (*keys, key))


def _children(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, list | tuple):
        yield from enumerate(value)


def _known(keys: Keys) -> tuple[str, ...] | None:
    """Return the keys that may stand at a place; None where they are not the recipe's own (method options)."""
    match keys:
        case ():
            return ("version", *(item.name for item in dataclasses.fields(Recipe)))
        case ("cut",):
            return tuple(item.name for item in dataclasses.fields(CutSpec))
        case ("terms", int()):
            return tuple(item.name for item in dataclasses.fields(Addition))
        case ("expected", int()):
            return tuple(item.name for item in dataclasses.fields(Expected))
        case ("features", str()) | ("features", str(), int()):
            return tuple(item.name for item in dataclasses.fields(Stated))
        case ("schedule",):
            return schedule.names()
        case ("loss",):
            return tuple(item.name for item in dataclasses.fields(labels.LabelLoss))
        case ("train",):
            return tuple(item.name for item in settings())
        case ("preprocessing",):
            return tuple(item.name for item in dataclasses.fields(Preprocessing))
        case ("dataset",):
            return tuple(item.name for item in dataclasses.fields(DataRecord))
        case ("dataset", "train" | "test"):
            return tuple(item.name for item in dataclasses.fields(PartRecord))
    return None


def _wrong_value(error: Any, data: Any, place: Place) -> RecipeError:
    keys: Keys = ()
    value = data
    for key in error["loc"]:  # pydantic appends the branch of a union: what is not a key of the data is that
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            break
        keys = (*keys, key)
    missing = error["loc"][-1]
    if error["type"] == "missing" and isinstance(missing, str):
        return RecipeError(f"{missing!r} is missing.", facts=place.at(keys), help=f"{missing}: VALUE", keys=keys)
    return RecipeError(
        f"{'.'.join(str(key) for key in keys)} cannot be {value!r}.",
        facts=[f"{error['msg'][:1].lower()}{error['msg'][1:]}.", place.at(keys)],
        help=CHECK_AGAIN,
        keys=keys,
    )


def _check_shape(recipe: Recipe, place: Place) -> None:
    if recipe.input_shape is None:
        return
    try:
        checked_shape(recipe.input_shape)
    except OptionError as error:
        raise _placed(error, place, ("input_shape",), help=CHECK_AGAIN) from error


def _check_train(recipe: Recipe, place: Place) -> None:
    output = PureWindowsPath(str(recipe.train.get("output") or "."))  # it takes / and \\ for separators
    if output.anchor or ".." in output.parts:
        raise RecipeError(
            f"train.output cannot be {recipe.train['output']!r}.",
            facts=["what a recipe writes stays below the folder it is run in.", place.at(("train", "output"))],
            help="a relative folder without '..'; or localize train --output DIR, which takes any",
            keys=("train", "output"),
        )
    place_of = Path(str(recipe.train.get("output") or "."))
    if not place_of.resolve().is_relative_to(Path.cwd().resolve()):
        raise RecipeError(
            f"train.output cannot be {recipe.train['output']!r}.",
            facts=[
                f"it leads through a link to {place_of.resolve()}.",
                "what a recipe writes stays below the folder it is run in.",
                place.at(("train", "output")),
            ],
            help="another relative folder; or localize train --output DIR, which takes any",
        )
    try:
        TrainConfig(model="any", **recipe.train)
    except LocalizeError as error:
        raise _placed(error, place, _keys(error, ("train",)), help=CHECK_AGAIN) from error


def _check_schedule(recipe: Recipe, place: Place) -> None:
    try:
        schedule.create(**recipe.schedule)
    except LocalizeError as error:
        raise _placed(error, place, _keys(error, ("schedule",)), help=CHECK_AGAIN) from error


def _check_loss(recipe: Recipe, place: Place) -> None:
    try:
        labels.create(recipe.loss)
    except OptionError as error:
        raise _placed(error, place, _keys(error, ("loss",)), help=CHECK_AGAIN) from error


def _check_terms(recipe: Recipe, place: Place) -> None:
    for number in range(len(recipe.terms)):
        try:
            compose.check(recipe.terms[: number + 1])
        except LocalizeError as error:
            keys: Keys = ("terms", number)
            keys = _keys(error, keys) if isinstance(error, OptionError) else (*keys, "branch")
            raise _placed(error, place, keys) from error


def _check_method(recipe: Recipe, place: Place) -> None:
    """Check the name of the method and its options; code of the user's is not run by reading a recipe."""
    if outside.is_spelled(recipe.method):
        return
    try:
        methods.create(recipe.method, **recipe.options)
    except OptionError as error:
        raise _placed(error, place, _keys(error, ("options",))) from error
    except LocalizeError as error:
        raise _placed(error, place, ("method",)) from error


def _keys(error: LocalizeError, section: Keys) -> Keys:
    """Return where the option that an error is about stands in a section of the recipe; else the section."""
    option = error.option if isinstance(error, OptionError) else None
    return (*section, *option.split(".")) if option else section


def _placed(error: LocalizeError, place: Place, keys: Keys, *, help: str = "") -> RecipeError:
    """Return the error with the place of the value that it is about."""
    facts = [*error.facts, place.at(keys)]
    return RecipeError(error.problem, facts=facts, help=help or error.help or CHECK_AGAIN, keys=keys)


def _check_data(recipe: Recipe, place: Place) -> None:
    """Refuse a preprocessing that does not fit the model's input, and counts that do not fit the classes."""
    how, data = recipe.preprocessing, recipe.dataset
    if how is not None and recipe.input_shape is not None and how.input_size != recipe.input_shape:
        raise RecipeError(
            f"preprocessing.input_size is {list(how.input_size)}, and input_shape is {list(recipe.input_shape)}.",
            facts=[place.at(("preprocessing", "input_size"))],
            help=CHECK_AGAIN,
        )
    for name, values in (("mean", how.mean), ("std", how.std)) if how is not None else ():
        if how is not None and len(values) != how.input_size[0]:
            raise RecipeError(
                f"preprocessing.{name} has {len(values)} numbers for {how.input_size[0]} channels.",
                facts=[place.at(("preprocessing", name))],
                help=CHECK_AGAIN,
            )
    if data is not None and recipe.num_classes is not None and len(data.classes) != recipe.num_classes:
        raise RecipeError(
            f"dataset.classes has {len(data.classes)} names, and num_classes is {recipe.num_classes}.",
            facts=[place.at(("dataset", "classes"))],
            help=CHECK_AGAIN,
        )


def kind_of(value: Any) -> str:
    name = type(value).__name__
    return "nothing" if value is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


_ADAPTER = pydantic.TypeAdapter(Recipe)
