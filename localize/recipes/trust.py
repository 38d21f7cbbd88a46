"""Whether the code that a folder names may be run.

The recipe in a folder may name code: a model ``FILE.py:FACTORY``, a method ``FILE.py:CLASS`` or ``module:CLASS``, and
so on. A folder can come from anybody, so that this code is run only where the caller says so, or where this user's own
run, or ``convert``, wrote such a recipe. That is remembered outside of the folder, as a digest of the path and content
of each file and of what the recipe says about the model. Modules that these files import are not covered.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import typer

from localize import outside
from localize.errors import Advice, LocalizeError
from localize.recipes.schema import Recipe
from localize.zoo import library

FILE_NAME = "trusted-code"
"""One digest a line, in the folder that the system has for the settings of programs."""


class UntrustedCodeError(LocalizeError, PermissionError):
    """A folder names a file of code that nobody has said may be run."""


def refuse_untrusted(folder: str | Path, recipe: Recipe, *, trust_code: bool) -> None:
    """Refuse to run the code that the recipe of a folder names.

    Args:
        folder: that holds the recipe.
        recipe: its recipe.
        trust_code: the caller says that the code may be run.

    Raises:
        UntrustedCodeError: the recipe names a file of code, and nobody has said that it may be run.
    """
    named = code_of(recipe)
    if trust_code or not named or _digest(recipe) in _remembered():
        return
    raise UntrustedCodeError(
        f"{folder} names {'a file of code' if len(named) == 1 else 'files of code'}, {', '.join(named)}.",
        facts=(
            "it is run only if you say so: no run of yours wrote this, or the file has changed since.",
            f"its model's options are {dict(recipe.model_options)}.",
        ),
        help=Advice(
            "read that file, then the same call with trust_code=True",
            "read that file, then the same command with --trust-code",
        ),
    )


def remember(recipe: Recipe) -> None:
    """Remember that this user has run the code that a recipe names; nothing where it names none."""
    digest, path = _digest(recipe), _path()
    if digest is None or digest in _remembered():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="ascii") as file:
            file.write(digest + "\n")
    except OSError:
        return  # a home that cannot be written costs no run: --trust-code is asked for later


def _path() -> Path:
    return Path(typer.get_app_dir("localize")) / FILE_NAME


def _remembered() -> frozenset[str]:
    try:
        return frozenset(_path().read_text(encoding="ascii").split())
    except (OSError, UnicodeDecodeError):
        return frozenset()


def code_of(recipe: Recipe) -> tuple[str, ...]:
    """Return what a recipe names of code outside of this package: ``FILE.py:NAME`` and ``module:NAME``."""
    settings = [recipe.train.get(name) for name in ("data", "augment", "opt", "sched", "callback")]
    settings.append(recipe.loss.get("name"))
    spelled = [recipe.method, *(one for one in settings if isinstance(one, str) and not one.startswith("timm:"))]
    model = [recipe.model] if recipe.model is not None and library(recipe.model) == "file" else []
    return tuple(dict.fromkeys([*model, *(text for text in spelled if outside.is_spelled(text))]))


def _digest(recipe: Recipe) -> str | None:
    """Return the digest of a recipe's code; None where it names none, or a file cannot be read."""
    told: list[Any] = []
    for text in code_of(recipe):
        place = text if text.endswith(".py") else text.rpartition(":")[0]
        file = place if place.endswith(".py") else outside.origin(place)
        try:
            content = hashlib.sha256(Path(file).read_bytes()).hexdigest()
        except OSError:
            return None
        told += [os.path.realpath(file), content, text.rpartition(":")[2]]
    if not told:
        return None
    told.append(dict(recipe.model_options))
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()
