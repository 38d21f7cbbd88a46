"""Options of methods, schedules and the trainer, for the command line to read without importing torch.

``python -m tests.options`` writes ``options.json``, next to this file, from the dataclasses that declare the options; a
test checks that it is current. Methods from elsewhere are imported.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Option:
    """An option that becomes a flag."""

    name: str
    kind: str
    """``int``, ``float``, ``bool``, ``str``, ``tuple`` of numbers, ``words``, or ``NoneType`` where it can be any."""
    default: Any = None
    help: str = ""
    choices: tuple[str, ...] = ()

    @property
    def told(self) -> str:
        """Its meaning and its default."""
        if self.default is None:
            return self.help
        default = ",".join(map(str, self.default)) if isinstance(self.default, list | tuple) else self.default
        return f"{self.help}{'; ' if self.help else ''}default {'none' if default == '' else default}"


@dataclass(frozen=True)
class About:
    """A packaged method: its first sentence, the paper, its options."""

    summary: str
    source: str
    options: tuple[Option, ...]


def methods() -> Mapping[str, About]:
    """Return the packaged methods by name."""
    return {
        name: About(about["summary"], about["source"], _options(about["options"]))
        for name, about in _table()["methods"].items()
    }


def schedule() -> tuple[Option, ...]:
    """Return the options of a schedule."""
    return _options(_table()["schedule"])


def settings() -> tuple[Option, ...]:
    """Return the settings of the trainer that have flags."""
    return _options(_table()["settings"])


def options_of(method: str) -> tuple[Option, ...]:
    """Return the options of a method, packaged or not; none for an unknown method, which is refused later."""
    if method in methods():
        return methods()[method].options
    from localize.errors import LocalizeError
    from localize.methods import get

    try:
        return from_class(get(method))
    except LocalizeError:
        return ()


def problem_of(method: str) -> str:
    """Return the error that keeps the options of a method from being shown; empty if there is none."""
    if not method or method in methods():
        return ""
    from localize.errors import LocalizeError
    from localize.methods import get

    try:
        get(method)
    except LocalizeError as error:
        return f"error: {error.on_command_line}"
    return ""


def from_class(kind: type) -> tuple[Option, ...]:
    """Return the options of the class of a method."""
    from localize import options

    return tuple(
        Option(
            one.name, "str" if one.default is None else type(one.default).__name__, one.default, one.help, one.choices
        )
        for one in options.of(kind)
    )


def method_of(name: str) -> str:
    """Return the method of a method's name, a recipe's name or a recipe file; empty if none is known.

    The recipe in a folder may name untrusted code, so its method is not looked up.
    """
    if name in methods() or name.endswith(".py"):
        return name
    files = [Path(name)] if Path(name).is_file() else [*_packaged(name)]
    if not files:
        return name if ":" in name else _offered(name)
    found = re.search(r"^method:\s*['\"]?([^\s'\"]+)", files[0].read_text(encoding="utf-8", errors="replace"), re.M)
    return found.group(1) if found else ""


def complete_method(begun: str) -> list[str]:
    """Return the methods and recipes whose names start with a text, for completion in a shell."""
    names = [*methods(), *(file.stem for file in _packaged("*"))]
    return sorted({name for name in names if name.startswith(begun)})


def _packaged(name: str) -> list[Path]:
    """Return the files of packaged recipes of this name."""
    package = Path(str(resources.files("localize")))
    folders = (package / "_recipes", package.parent / "recipes")
    root = next((folder for folder in folders if folder.is_dir()), None)
    return [] if root is None or "/" in name else sorted(root.glob(f"*/{name}.yaml"))


def _offered(name: str) -> str:
    """Return the name if an installed package offers a method under it."""
    from localize.outside import offers

    return name if any(one.name == name for one in offers("localize.methods")) else ""


def _options(rows: list[dict[str, Any]]) -> tuple[Option, ...]:
    return tuple(Option(**row | {"choices": tuple(row.get("choices", ()))}) for row in rows)


@functools.cache
def _table() -> dict[str, Any]:
    return json.loads(resources.files("localize.cli").joinpath("options.json").read_text(encoding="utf-8"))
