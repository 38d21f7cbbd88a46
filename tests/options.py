"""Write what the command line knows of options without importing torch: ``python -m tests.options``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from localize import cli, methods, options
from localize.passes.schedule import Schedule
from localize.recipes.citations import cited
from localize.recipes.settings import settings

FILE = Path(cli.__file__).with_name("options.json")


def table() -> dict[str, Any]:
    """Return the options of all packaged methods, of a schedule and of the trainer."""
    return {
        "methods": {name: _method(methods.get(name)) for name in methods.names()},
        "schedule": [_row(one) for one in options.of(Schedule)],
        "settings": [
            _plain(item.name, _kind(item), item.default, item.metadata["help"], item.metadata["choices"])
            for item in settings()
            if item.name != "output"
        ],
    }


def _method(kind: Any) -> dict[str, Any]:
    summary = (kind.__doc__ or "").strip().split("\n")[0]
    source = cited(kind.reference)
    return {"summary": summary, "source": source, "options": [_row(one) for one in options.of(kind)]}


def _row(one: options.Option) -> dict[str, Any]:
    return _plain(one.name, type(one.default).__name__, one.default, one.help, one.choices)


def _kind(item: dataclasses.Field) -> str:
    kind, of = item.metadata["type"], item.metadata["of"]
    return "words" if (kind, of) == (tuple, str) else kind.__name__


def _plain(name: str, kind: str, default: Any, help: str, choices: tuple[str, ...]) -> dict[str, Any]:
    row = {"name": name, "kind": kind, "default": default, "help": help}
    return row | ({"choices": list(choices)} if choices else {})


def text() -> str:
    """Return the table as it stands in the file."""
    return json.dumps(table(), indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
