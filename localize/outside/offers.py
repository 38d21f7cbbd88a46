"""What installed packages offer: their entry points, by group."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from localize.errors import LocalizeError, UnknownNameError
from localize.outside import code


@dataclass(frozen=True)
class Offer:
    """An entry point: what a package calls it, what it stands for (``module:NAME``), and which package it is."""

    name: str
    value: str
    package: str
    version: str

    def load(self) -> Any:
        """Import what it stands for.

        Raises:
            CodeError: it cannot be imported; the message names the package.
        """
        try:
            return code.load(self.value)
        except LocalizeError as error:
            raise code.CodeError(
                f"{self.name!r} of package {self.package} cannot be loaded.",
                facts=(f"it stands for {self.value}.", error.problem, *error.facts),
                help=f"pip install --upgrade {self.package}, or pip uninstall {self.package}",
            ) from error


def offers(group: str) -> tuple[Offer, ...]:
    """Return the entry points of a group, such as ``localize.methods``, sorted by name."""
    found = {
        Offer(one.name, one.value, one.dist.name if one.dist else "unknown", one.dist.version if one.dist else "")
        for one in metadata.entry_points(group=group)
    }
    return tuple(sorted(found, key=lambda one: (one.name, one.package)))


def offered(group: str, name: str, packaged: Iterable[str] = ()) -> Offer | None:
    """Return the entry point of a group that is called ``name``; None where there is none.

    Raises:
        UnknownNameError: several packages offer one of this name.
    """
    if name in packaged:
        return None
    found = [one for one in offers(group) if one.name == name]
    if len(found) > 1:
        raise UnknownNameError(
            f"{name!r} is offered by {' and by '.join(one.package for one in found)}.",
            facts=f"they stand for {' and '.join(one.value for one in found)}.",
            help=found[0].value,
        )
    return found[0] if found else None
