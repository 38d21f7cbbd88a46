"""The recipes that the package ships, read once for all tests."""

from __future__ import annotations

import functools

from localize import recipes
from localize.recipes import Recipe


@functools.cache
def recipe(name: str) -> Recipe:
    """Return the packaged recipe of this name. Tests must not change it."""
    return recipes.load(name)
