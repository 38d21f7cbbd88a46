"""Print the lowest versions that pyproject.toml declares, one a line, as constraints for pip."""

from __future__ import annotations

import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def lowest(text: str, extras: tuple[str, ...] = ("data", "test")) -> list[str]:
    """Return ``name==bound`` for every requirement of a project and of some of its extras.

    Raises:
        ValueError: a requirement has no lower bound, so its lowest version is not known.
    """
    project = tomllib.loads(text)["project"]
    asked = [*project["dependencies"], *(one for extra in extras for one in project["optional-dependencies"][extra])]
    return [_pinned(requirement) for requirement in asked]


def _pinned(requirement: str) -> str:
    """Return the lowest version that a requirement allows, as a pin."""
    name, bound, version = requirement.partition(">=")
    if not bound:
        raise ValueError(f"{requirement!r} has no lower bound: write it as {requirement}>=VERSION")
    return f"{name}=={version.partition(',')[0]}"


if __name__ == "__main__":
    print("\n".join(lowest(PYPROJECT.read_text(encoding="utf-8"))))
