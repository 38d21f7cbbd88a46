"""Find recipes by name, by path, or as a dict, and read them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from localize import methods, options
from localize.errors import OptionError, RecipeError, UnknownNameError, did_you_mean
from localize.methods import Method
from localize.passes import labels
from localize.recipes.schema import FILE_NAME, Recipe
from localize.recipes.validation import Place, kind_of, validated
from localize.recipes.yaml import read_yaml, to_plain

Source = str | Path | Mapping[str, Any] | Recipe | Method | type
"""What :func:`load` takes."""


def load(source: Source) -> Recipe:
    """Read and check a recipe.

    Args:
        source: the name of a packaged recipe or of a method, a YAML file, a folder that ``localize convert`` has
            written, the same as a dict, or a recipe made in Python; or a method, as an object or a class of the
            :class:`localize.methods.Method` protocol, or by where its class is, ``module:Class`` or ``FILE.py:Class``.
            A file or folder in the current directory whose name is also that of a recipe is written with its
            directory: ``./NAME``.

    Returns:
        The recipe, checked.

    Raises:
        UnknownNameError: no recipe, method or file has this name.
        RecipeError: it is not a recipe. The message names file and line.
        MethodClassError: a class or an object that is not a method.
        CodeError: the class of a method cannot be imported.
    """
    if isinstance(source, Recipe):
        return validated(to_plain(source), Place("the recipe", {}))
    if isinstance(source, Mapping):
        return validated(dict(source), Place("the recipe", {}))
    if isinstance(source, type):
        return _of_method(source)
    if not isinstance(source, str | Path):
        if methods.is_class(type(source)):
            return _of_method(source)
        raise RecipeError(
            f"{kind_of(source)} is not a recipe.",
            facts="a recipe is a name, a path, a dict, a localize.Recipe or a method.",
            help="localize recipes ls",
        )
    if isinstance(source, str) and source in names():
        return parse(text(source), f"{source}.yaml")
    if isinstance(source, str) and not Path(source).exists() and methods.exists(source):
        methods.get(source)
        return Recipe(method=source)
    return _load_path(source)


def _of_method(method: Any) -> Recipe:
    """Return the recipe of a method: of a class with its defaults, of an object with its options.

    Raises:
        MethodClassError: the class is not a method.
        OptionError: an option has a value that no recipe can hold.
    """
    if isinstance(method, type):
        return Recipe(method=methods.name_of(method))
    values = _values(method)
    for name, value in values.items():
        if value is not None and not options.is_plain(value):
            raise OptionError(
                f"option {name!r} of method {method.name!r} cannot be {kind_of(value)}.",
                facts="a recipe holds the options of its method: numbers, text, true or false, and lists of these.",
                help=f"make it in plan(), from options that are plain; or {name}: ClassVar, or a field(init=False)",
                option=name,
            )
    recipe = Recipe(method=methods.name_of(type(method)), options=values)
    again = _values(methods.create(recipe.method, **values))
    if again != values:
        name = next(name for name in values if again[name] != values[name])
        raise OptionError(
            f"option {name!r} of method {method.name!r} is {values[name]!r}, and a method made with that has "
            f"{again[name]!r}.",
            facts="a recipe holds the options of its method, and makes the method from them; __post_init__ changes "
            "them once more.",
            help="a property of another name for what follows from the options",
            option=name,
        )
    return recipe


def parse(text: str, name: str) -> Recipe:
    """Read and check the text of a recipe.

    Args:
        text: YAML.
        name: of the file, for messages.

    Returns:
        The recipe, checked.

    Raises:
        RecipeError: it is not a recipe.
    """
    data, lines = read_yaml(text, name)
    return validated(data, Place(name, lines))


def names() -> tuple[str, ...]:
    """Return the names of the packaged recipes, sorted."""
    return tuple(_packaged())


def text(name: str) -> str:
    """Return the text of the packaged recipe called ``name``.

    Args:
        name: as ``localize recipes ls`` prints it.

    Raises:
        UnknownNameError: there is no such recipe.
    """
    if name not in _packaged():
        raise UnknownNameError(
            f"there is no recipe {name!r}.",
            facts=f"there are {len(names())}.",
            help=did_you_mean(name, names()) or "localize recipes ls",
        )
    return _packaged()[name].read_text(encoding="utf-8")


def resolve(recipe: Recipe) -> Recipe:
    """Return the recipe with the default of every option of its method, and of its loss, written out.

    Args:
        recipe: the recipe.
    """
    method = methods.create(recipe.method, **recipe.options)
    loss = labels.create(recipe.loss).told if recipe.loss else {}
    return dataclasses.replace(recipe, options=_values(method), loss=loss)


def _values(method: Method) -> dict[str, Any]:
    """Return the options of a method by name."""
    return {one.name: getattr(method, one.name) for one in options.of(type(method))}


@functools.cache
def _packaged() -> Mapping[str, Traversable]:
    """Return the files of the packaged recipes by name, sorted; they lie in a folder for each method."""
    folders = [folder for folder in _folder().iterdir() if folder.is_dir()]
    files = [file for folder in folders for file in folder.iterdir() if file.name.endswith(".yaml")]
    return dict(sorted((file.name.removesuffix(".yaml"), file) for file in files))


def _folder() -> Traversable:
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
    if path.suffix == ".py":
        methods.get(str(source))
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
