"""Declare options, of methods and of schedules, and check names and values against what they may be."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from localize.errors import OptionError, did_you_mean

_TYPES = {bool: "true or false", int: "whole numbers", float: "numbers", str: "text"}


def check_name(owner: str, name: str, known: Iterable[str]) -> None:
    """Refuse an option that does not exist.

    Args:
        owner: what has the options, such as ``method 'dcl'``.
        name: of the option.
        known: names of all options.

    Raises:
        OptionError: ``name`` is none of them.
    """
    known = tuple(known)
    if name not in known:
        raise OptionError(
            f"{owner} has no option {name!r}.",
            facts=f"its options are {', '.join(known) or 'none'}.",
            help=did_you_mean(name, known),
            option=name,
        )


def check_value(
    owner: str,
    name: str,
    value: Any,
    *,
    default: Any,
    meaning: str = "",
    choices: tuple[str, ...] = (),
    low: float | None = None,
) -> None:
    """Refuse a value that an option cannot have.

    Args:
        owner: what has the option, such as ``method 'dcl'``.
        name: of the option.
        value: to be checked; a whole number is a value of an option whose default is a float.
        default: a value of the right type.
        meaning: of the option, for the message.
        choices: all values, where they are words.
        low: the lowest value.

    Raises:
        OptionError: the value is of another type, not finite, not among the choices, or too low.
    """
    problem = f"option {name!r} of {owner} cannot be {value!r}."
    means = f"{name}: {meaning}; " if meaning else ""
    expected = type(default)
    right = isinstance(value, expected) or (expected is float and isinstance(value, int))
    if not right or (expected is not bool and isinstance(value, bool)):
        raise OptionError(problem, facts=f"{means}it takes {_TYPES[expected]}; default {default!r}.", option=name)
    if choices and value not in choices:
        raise OptionError(
            problem, facts=f"its values are {', '.join(choices)}.", help=did_you_mean(value, choices), option=name
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise OptionError(problem, facts=f"{means}it has to be finite.", option=name)
    if low is not None and value < low:
        raise OptionError(problem, facts=f"{means}the lowest value is {low:g}.", option=name)


def option(default: Any, help: str, *, choices: tuple[str, ...] = (), low: float | None = None) -> Any:
    """Declare an option: a dataclass field with its meaning, its choices, and its lowest value."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "low": low})


def build(kind: type, options: Mapping[str, Any], owner: str) -> Any:
    """Make an object of a dataclass whose fields are options, checked; ``owner`` is what messages call it.

    Raises:
        OptionError: an unknown option, or a value of the wrong type, not finite, not among the choices, or too low.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name, value in options.items():
        check_name(owner, name, fields)
        about = fields[name].metadata
        check_value(
            owner,
            name,
            value,
            default=fields[name].default,
            meaning=about["help"],
            choices=about["choices"],
            low=about["low"],
        )
    return kind(**options)
