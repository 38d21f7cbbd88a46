"""Recipes as YAML text: read safely with the line of every value, and written in a fixed order."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from localize.errors import RecipeError
from localize.files import VERSION
from localize.recipes.schema import Recipe
from localize.recipes.validation import Keys


def dump(recipe: Recipe) -> str:
    """Return the recipe as YAML: its version, then its keys in a fixed order, without what is empty.

    :func:`load` reads it back.

    Args:
        recipe: the recipe.
    """
    plain = {"version": VERSION, **to_plain(recipe)}
    return str(yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100))


DEEPEST = 20
"""How deep lists and mappings of a recipe may lie in each other."""


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML ships no types
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
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # PyYAML ships no types
    """Lists of plain values on one line, everything else in block style."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.Node:
        flat = not any(isinstance(value, list | dict) for value in sequence)
        return super().represent_sequence(tag, sequence, flow_style=flat)


def read_yaml(text: str, name: str) -> tuple[Any, dict[Keys, int]]:
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return (None, {}) if node is None else (loader.construct_document(node), dict(_lines(node)))
    except (
        yaml.YAMLError,
        ValueError,
    ) as error:  # ValueError: an escape, such as "\U00110000", that is not a character
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


def to_plain(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as dicts, lists and plain values, in the order a reader wants, without what is empty."""
    data = dataclasses.asdict(recipe)
    order = (
        "paper", "notes", "model", "num_classes", "input_shape", "model_options",
        "method", "options", "terms", "outputs", "loss", "cut", "shared", "freeze", "leaf", "output", "features",
        "schedule",
        "train", "preprocessing", "dataset", "expected",
    )  # fmt: skip
    assert set(order) == set(data)
    data["terms"] = [{key: value for key, value in term.items() if value != {}} for term in data["terms"]]
    if isinstance(data["cut"], Mapping):
        data["cut"] = {key: value for key, value in data["cut"].items() if value != ()}
    data["features"] = {name: _without_none(statement) for name, statement in data["features"].items()}
    for name in ("preprocessing", "dataset"):
        data[name] = data[name] and _without_none(data[name])
    return {key: _listed(data[key]) for key in order if data[key] not in (None, "", {}, (), [], False)}


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(child) for key, child in value.items() if child is not None}
    if isinstance(value, list | tuple):
        return [_without_none(child) for child in value]
    return value


def _listed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _listed(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_listed(child) for child in value]
    return value
