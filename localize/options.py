"""Declare options, of methods and of schedules, and check names and values against what they may be."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from localize.errors import Advice, LocalizeError, OptionError, did_you_mean

_TYPES = {bool: "true or false", int: "whole numbers", float: "numbers", str: "text", tuple: "a list"}
_PLAIN = (bool, int, float, str)

Made = TypeVar("Made")
"""A dataclass whose fields are options."""


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
    if default is None:
        if value is None or is_plain(value):
            return
        raise OptionError(problem, facts=f"{means}it takes numbers, text, true or false, and lists.", option=name)
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
    """Declare an option: a dataclass field with its meaning, its choices, and its lowest value.

    Args:
        default: value where none is given.
        help: what the option means, for ``--help`` and pages.
        choices: the values that it can have; without them, any of the type of the field.
        low: lowest value of a number.

    Returns:
        A field of a dataclass.
    """
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "low": low})


@dataclass(frozen=True)
class Option:
    """An option of a dataclass, as its field declares it; a plain field declares its name, type and default alone."""

    name: str
    default: Any
    """None where it has none, or where it is made again for every object."""
    help: str = ""
    choices: tuple[str, ...] = ()
    low: float | None = None


def of(kind: type) -> tuple[Option, ...]:
    """Return the options of a dataclass."""
    return tuple(
        Option(
            field.name,
            None if field.default is dataclasses.MISSING else field.default,
            field.metadata.get("help", ""),
            tuple(field.metadata.get("choices", ())),
            field.metadata.get("low"),
        )
        for field in dataclasses.fields(kind)
        if field.init
    )


def is_plain(value: Any) -> bool:
    """Tell whether a recipe can hold a value: a number, text, true or false, or a list of these."""
    return isinstance(value, _PLAIN) or (isinstance(value, list | tuple) and all(map(is_plain, value)))


def build(kind: type[Made], options: Mapping[str, Any], owner: str) -> Made:
    """Make an object of a dataclass whose fields are options, checked; ``owner`` is what messages call it.

    A list is a value of an option whose default is a tuple, and becomes one.

    Raises:
        OptionError: an unknown option, or a value of the wrong type, not finite, not among the choices, or too low; or
            an option without a default is not given, or the class itself refuses a value.
    """
    known = {one.name: one for one in of(kind)}
    given = dict(options)
    for name, value in options.items():
        check_name(owner, name, known)
        one = known[name]
        if isinstance(one.default, tuple) and isinstance(value, list):
            given[name] = value = tuple(value)
        check_value(owner, name, value, default=one.default, meaning=one.help, choices=one.choices, low=one.low)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]  # no type says: any class that is a dataclass
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if field.init and needed and field.name not in given:
            raise OptionError(
                f"{owner} needs option {field.name!r}, which has no default.",
                help=Advice(f"{field.name}=VALUE"),
                option=field.name,
            )
    try:
        return kind(**given)
    except LocalizeError:
        raise
    except (TypeError, ValueError) as error:  # what a __post_init__ of the user's raises
        told = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise OptionError(f"{owner} refuses its options.", facts=(f"{error}.", f"they are {told}.")) from error
