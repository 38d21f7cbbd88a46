"""What a method is: options as fields, and a function from segments to a plan.

A method never edits a graph and never writes code. Everything that distinguishes one from another is data: which local
layers it wants (``grain``), which trailing layers stay together (``together``), and the plan.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Protocol

from localize.errors import OptionError, did_you_mean
from localize.ir import Grain, Plan, Segments


def option(default: Any, help: str, *, choices: tuple[str, ...] = (), low: float | None = None) -> Any:
    """Declare an option of a method: a dataclass field with its meaning, its choices, and its lowest value."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "low": low})


class Method(Protocol):
    """The interface of the frozen dataclasses in this package."""

    name: ClassVar[str]
    reference: ClassVar[str]
    """Paper: authors, title, venue, year, link."""
    deviations: ClassVar[tuple[str, ...]]
    """Where paper and reference code disagree, and what is done here."""

    @property
    def grain(self) -> Grain:
        """Which local layers the method cuts between."""
        ...

    @property
    def together(self) -> int:
        """How many trailing local layers stay in the last segment."""
        ...

    def plan(self, segments: Segments) -> Plan:
        """Attach heads and losses to the segments."""
        ...


def build(method: type, options: dict[str, Any]) -> Any:
    """Make the method with these options, checked.

    Raises:
        OptionError: an unknown option, a value of the wrong type, not among the choices, or too low.
    """
    fields = {field.name: field for field in dataclasses.fields(method)}
    for name, value in options.items():
        if name not in fields:
            raise OptionError(
                f"method {method.name!r} has no option {name!r}.",
                facts=f"its options are {', '.join(fields) or 'none'}.",
                help=did_you_mean(name, fields),
            )
        _check(method.name, fields[name], value)
    return method(**options)


def _check(method: str, field: dataclasses.Field, value: Any) -> None:
    expected = type(field.default)
    right = isinstance(value, expected) or (expected is float and isinstance(value, int))
    if not right or (expected is not bool and isinstance(value, bool)):
        raise OptionError(
            f"option {field.name!r} of method {method!r} cannot be {value!r}.",
            facts=f"it is {field.metadata['help']} and takes {expected.__name__} values; default {field.default!r}.",
        )
    choices, low = field.metadata["choices"], field.metadata["low"]
    if choices and value not in choices:
        raise OptionError(
            f"option {field.name!r} of method {method!r} cannot be {value!r}.",
            facts=f"its values are {', '.join(choices)}.",
            help=did_you_mean(str(value), choices),
        )
    if low is not None and value < low:
        raise OptionError(
            f"option {field.name!r} of method {method!r} cannot be {value!r}.",
            facts=f"it is {field.metadata['help']}; the lowest value is {low:g}.",
        )
