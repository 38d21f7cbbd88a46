"""Recipes: a method with its options, and what goes with them, as a YAML file.

A recipe names a method; everything else may be left out::

    model: cifar/resnet110
    method: METHOD
    options:
      OPTION: 4
    terms:
    - {branch: own, weight: [0.05, 0.5]}
    - {branch: reconstruction, weight: [5.0, 0.2]}
    cut:
      segments: max
    train:
      epochs: 400
      lr: 0.8

Packaged recipes are found by name (``localize recipes ls``); the name of a method is a recipe too, with the method's
defaults. Reading checks everything: a key that does not exist, a value of the wrong type, an option that the method
does not have are refused with the file, the line, and the nearest valid name.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path, PureWindowsPath
from typing import Annotated, Any

import pydantic
import yaml
from torch import nn

from localize import compose, methods, schedule, zoo
from localize.compose import Addition
from localize.errors import LocalizeError, RecipeError, UnknownNameError, did_you_mean
from localize.ir import CutSpec, Stated
from localize.train.config import TrainConfig, settings

FILE_NAME = "recipe.yaml"
"""The recipe in a folder that ``localize convert`` has written."""


@dataclass(frozen=True)
class Expected:
    """A published number that this recipe is meant to reach, and where it is printed.

    ``metric`` is ``test_accuracy``, a share of 1, or ``test_accuracy_top5``. What follows it says which one is meant:
    that of a local layer, ``test_accuracy of layer 2``; of another way to predict, ``test_accuracy of super-labels
    (mean)``; of the recipe with other options, or another number of segments, ``test_accuracy with d=4``.
    """

    metric: str
    value: float
    source: str


@dataclass(frozen=True)
class Recipe:
    """What to do to a model. Made by :func:`load`, which checks it.

    ``model``, ``num_classes``, ``input_shape`` and ``model_options`` (the model's own, such as ``dropout``) are as in
    :func:`localize.zoo.create_model`; ``options`` are the fields of the method's dataclass, ``train`` the settings of
    :class:`localize.train.TrainConfig`. ``shared`` lets several losses train parameters that are
    used on both sides of a cut. ``leaf`` names modules that are called whole, see :func:`localize.transform`.
    ``features`` states layouts by the name of a cut where what is inferred is not right, see
    :func:`localize.features.state`. ``terms`` are added to every local loss, see :func:`localize.compose.compose`.
    ``outputs`` are weights of further outputs of the model (auxiliary classifiers) by their names, see
    :func:`localize.sides.attach`. ``schedule`` says how the step spends memory and arithmetic, see
    :class:`localize.schedule.Schedule`.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None
    num_classes: int | None = None
    input_shape: Annotated[tuple[int, ...], pydantic.Field(min_length=2)] | None = None
    model_options: Mapping[str, Any] = field(default_factory=dict)
    cut: CutSpec | None = None
    shared: bool = False
    leaf: tuple[str, ...] = ()
    features: Mapping[str, Stated | tuple[Stated, ...]] = field(default_factory=dict)
    terms: tuple[Addition, ...] = ()
    outputs: Mapping[str, float] = field(default_factory=dict)
    schedule: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    paper: str = ""
    notes: str = ""
    expected: tuple[Expected, ...] = ()


Source = str | Path | Mapping[str, Any] | Recipe
"""What :func:`load` takes."""


def load(source: Source) -> Recipe:
    """Read and check a recipe.

    Args:
        source: the name of a packaged recipe or of a method, a YAML file, a folder that ``localize convert`` has
            written, the same as a dict, or a recipe made in Python. A file or folder in the current directory whose
            name is also that of a recipe is written with its directory: ``./NAME``.

    Raises:
        UnknownNameError: no recipe, method or file has this name.
        RecipeError: it is not a recipe. The message names file and line.

    """
    if isinstance(source, Recipe):
        return _validated(_plain(source), _Place("the recipe", {}))
    if isinstance(source, Mapping):
        return _validated(dict(source), _Place("the recipe", {}))
    if not isinstance(source, str | Path):
        raise RecipeError(
            f"{_kind(source)} is not a recipe.",
            facts="a recipe is a name, a path, a dict or a localize.Recipe.",
            help="localize recipes ls",
        )
    if isinstance(source, str) and source in names():
        return parse(text(source), f"{source}.yaml")
    if isinstance(source, str) and source in methods.names():
        return Recipe(method=source)
    return _load_path(source)


def parse(text: str, name: str) -> Recipe:
    """Check the text of a recipe; ``name`` is what messages call the file.

    Raises:
        RecipeError: it is not a recipe.
    """
    data, lines = _read_yaml(text, name)
    return _validated(data, _Place(name, lines))


def dump(recipe: Recipe) -> str:
    """Return the recipe as YAML, keys in a fixed order, without what is empty; :func:`load` reads it back."""
    return yaml.dump(_plain(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def names() -> tuple[str, ...]:
    """Return the names of the packaged recipes, sorted."""
    files = (file.name for file in _packaged().iterdir())
    return tuple(sorted(name.removesuffix(".yaml") for name in files if name.endswith(".yaml")))


def text(name: str) -> str:
    """Return the text of the packaged recipe called ``name``.

    Raises:
        UnknownNameError: there is no such recipe.
    """
    if name not in names():
        raise UnknownNameError(
            f"there is no recipe {name!r}.",
            facts=f"there are {len(names())}.",
            help=did_you_mean(name, names()) or "localize recipes ls",
        )
    return _packaged().joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def create_model(recipe: Recipe, *, data: bool = True, weights: bool = False) -> nn.Module:
    """Make the model that a recipe names.

    Args:
        recipe: its model, with its options.
        data: False makes it without data, on the meta device.
        weights: with those that its library has published, if the recipe begins with them (``train: {pretrained:
            true}``); otherwise it is the same net with fresh ones.

    Raises:
        RecipeError: the recipe names no model.
        LocalizeError: see :func:`localize.zoo.create_model`.
    """
    if recipe.model is None:
        raise RecipeError("the recipe does not say which model.", help="model: NAME, or localize convert NAME")
    create = zoo.create_model if data else zoo.create_empty
    published = {"pretrained": True, "fetch": weights} if recipe.train.get("pretrained") else {}
    options = {**recipe.model_options, **published}
    return create(recipe.model, recipe.num_classes, input_shape=recipe.input_shape, **options)


def resolve(recipe: Recipe) -> Recipe:
    """Return the recipe with the default of every option of its method written out."""
    method = methods.create(recipe.method, **recipe.options)
    return dataclasses.replace(recipe, options=dataclasses.asdict(method))


def _packaged() -> Traversable:
    """Return the folder of the packaged recipes: inside an installed package, beside the package in a checkout."""
    package = resources.files("localize")
    installed = package.joinpath("_recipes")
    if installed.is_dir():
        return installed
    checkout = Path(str(package)).parent
    assert (checkout / "pyproject.toml").is_file(), "neither an installed package nor a checkout"
    return checkout / "recipes"


def _load_path(source: str | Path) -> Recipe:
    path = Path(source)
    if path.is_dir():
        path = path / FILE_NAME
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path} is not a recipe: it is not text.", facts=f"byte {error.start} is not UTF-8.", help="key: value"
        ) from error
    except OSError as error:
        known = [*names(), *methods.names()]
        raise UnknownNameError(
            f"there is no recipe {str(source)!r}.",
            facts=[f"no recipe or method has this name, and {path} cannot be read."],
            help=did_you_mean(str(source), known) or "localize recipes ls",
        ) from error
    return parse(content, str(path))


# ------------------------------------------------------------------------------------------------------ validation

CHECK_AGAIN = "change it, then localize recipes validate FILE"

Keys = tuple[str | int, ...]
"""Where a value is: the keys and indices that lead to it."""


@dataclass(frozen=True)
class _Place:
    """What a recipe is called in messages, and the line of each of its values."""

    name: str
    lines: Mapping[Keys, int]

    def at(self, keys: Keys) -> str:
        """Say where a value is, or the nearest enclosing one whose line is known."""
        dotted = ".".join(str(key) for key in keys)
        where = next((self.lines[keys[:n]] for n in range(len(keys), -1, -1) if keys[:n] in self.lines), None)
        return f"at {dotted or 'the top'} of {self.name}" + (f", line {where}." if where else ".")


def _validated(data: Any, place: _Place) -> Recipe:
    if not isinstance(data, Mapping):
        raise RecipeError(
            f"{place.name} is not a recipe: it holds {_kind(data)}, not keys with values.",
            facts=f"keys of a recipe are {', '.join(_known(()) or ())}.",
            help=f"method: {methods.names()[0]}",
        )
    _refuse_odd(data, place)
    _refuse_unknown(data, place)
    if "method" not in data:
        raise RecipeError(
            f"{place.name} does not say which method.",
            facts=f"methods are {', '.join(methods.names())}.",
            help=f"method: {methods.names()[0]}",
        )
    try:
        # JSON is where pydantic is strict about numbers and strings and still takes a list for a tuple.
        recipe = _ADAPTER.validate_json(json.dumps(data, default=str), strict=True)
    except pydantic.ValidationError as error:
        raise _wrong_value(error.errors()[0], data, place) from error
    _check_train(recipe, place)
    _check_schedule(recipe, place)
    _check_terms(recipe, place)
    try:
        methods.create(recipe.method, **recipe.options)
    except LocalizeError as error:
        keys = next((("options", name) for name in recipe.options if repr(name) in error.problem), ("method",))
        help = error.help or CHECK_AGAIN
        raise RecipeError(error.problem, facts=[*error.facts, place.at(keys)], help=help) from error
    return recipe


def _refuse_odd(value: Any, place: _Place, keys: Keys = ()) -> None:
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
        raise RecipeError(f"{name} cannot be read.", facts=[f"{odd}.", place.at(keys)], help=CHECK_AGAIN)
    for key, child in _children(value):
        if isinstance(value, Mapping):
            _refuse_odd(key, place, keys)
        _refuse_odd(child, place, (*keys, key))


def _refuse_unknown(value: Any, place: _Place, keys: Keys = ()) -> None:
    known = _known(keys)
    for key, child in _children(value):
        if known is not None and isinstance(value, Mapping) and key not in known:
            raise RecipeError(
                f"a recipe has no key {key!r}{f' in {keys[0]}' if keys else ''}.",
                facts=[place.at((*keys, key)), f"known keys are {', '.join(known)}."],
                help=did_you_mean(str(key), known) or "localize recipes ls, and localize recipes show NAME",
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
            return tuple(item.name for item in dataclasses.fields(Recipe))
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
        case ("train",):
            return tuple(item.name for item in settings())
    return None


def _wrong_value(error: Any, data: Any, place: _Place) -> RecipeError:
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
        return RecipeError(f"{missing!r} is missing.", facts=place.at(keys), help=f"{missing}: VALUE")
    return RecipeError(
        f"{'.'.join(str(key) for key in keys)} cannot be {value!r}.",
        facts=[f"{error['msg'][:1].lower()}{error['msg'][1:]}.", place.at(keys)],
        help=CHECK_AGAIN,
    )


def _check_train(recipe: Recipe, place: _Place) -> None:
    output = PureWindowsPath(str(recipe.train.get("output") or "."))  # it takes / and \\ for separators
    if output.anchor or ".." in output.parts:
        raise RecipeError(
            f"train.output cannot be {recipe.train['output']!r}.",
            facts=["what a recipe writes stays below the folder it is run in.", place.at(("train", "output"))],
            help="a relative folder without '..'; or localize train --output DIR, which takes any",
        )
    try:
        TrainConfig(model="any", **recipe.train)
    except LocalizeError as error:
        keys = next((("train", name) for name in recipe.train if name in error.problem), ("train",))
        raise RecipeError(error.problem, facts=[*error.facts, place.at(keys)], help=CHECK_AGAIN) from error


def _check_schedule(recipe: Recipe, place: _Place) -> None:
    try:
        schedule.create(**recipe.schedule)
    except LocalizeError as error:
        keys = next((("schedule", name) for name in recipe.schedule if repr(name) in error.problem), ("schedule",))
        raise RecipeError(error.problem, facts=[*error.facts, place.at(keys)], help=CHECK_AGAIN) from error


def _check_terms(recipe: Recipe, place: _Place) -> None:
    for number in range(len(recipe.terms)):
        try:
            compose.check(recipe.terms[: number + 1])
        except LocalizeError as error:
            words = {"weight": "weight", "option ": "options"}
            key = next((key for word, key in words.items() if word in error.problem), "branch")
            facts = [*error.facts, place.at(("terms", number, key))]
            raise RecipeError(error.problem, facts=facts, help=error.help or CHECK_AGAIN) from error


def _kind(value: Any) -> str:
    name = type(value).__name__
    return "nothing" if value is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


_ADAPTER = pydantic.TypeAdapter(Recipe)


# ------------------------------------------------------------------------------------------------------------ YAML


DEEPEST = 20
"""How deep lists and mappings of a recipe may lie in each other."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader; ``1e-4`` is a number, and what would be read as something else than it says is refused."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "a recipe does not refer to itself", event.start_mark)
        if self.depth > DEEPEST:
            told = f"lists and keys lie in each other more than {DEEPEST} times"
            raise yaml.composer.ComposerError(None, None, told, event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError) as error:  # PyYAML lets Python's own through
            told = f"{str(node.value):.40} is no {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, told, node.start_mark) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands here twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


class _Dumper(yaml.SafeDumper):
    """Lists of plain values on one line, everything else in block style."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.Node:
        flat = not any(isinstance(value, list | dict) for value in sequence)
        return super().represent_sequence(tag, sequence, flow_style=flat)


def _read_yaml(text: str, name: str) -> tuple[Any, dict[Keys, int]]:
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return (None, {}) if node is None else (loader.construct_document(node), dict(_lines(node)))
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an escape, such as "\U00110000", that is no character
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        raise RecipeError(
            f"{name} is not YAML.", facts=f"{what}{f', line {mark.line + 1}' if mark else ''}.", help="key: value"
        ) from error


def _lines(node: yaml.Node, keys: Keys = ()) -> Iterator[tuple[Keys, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*keys, key.value), key.start_mark.line + 1
            yield from _lines(value, (*keys, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*keys, index), value.start_mark.line + 1
            yield from _lines(value, (*keys, index))


def _plain(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as dicts, lists and plain values, in the order a reader wants, without what is empty."""
    data = dataclasses.asdict(recipe)
    order = (
        "paper", "notes", "model", "num_classes", "input_shape", "model_options",
        "method", "options", "terms", "outputs", "cut", "shared", "leaf", "features", "schedule", "train", "expected",
    )  # fmt: skip
    assert set(order) == set(data)
    data["terms"] = [{key: value for key, value in term.items() if value != {}} for term in data["terms"]]
    if data["cut"] is not None:
        data["cut"] = {key: value for key, value in data["cut"].items() if value != ()}
    data["features"] = {name: _without_none(statement) for name, statement in data["features"].items()}
    return {key: _listed(data[key]) for key in order if data[key] not in (None, "", {}, (), [], False)}


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: child for key, child in value.items() if child is not None}
    return [_without_none(child) for child in value]


def _listed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _listed(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_listed(child) for child in value]
    return value
