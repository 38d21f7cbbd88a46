"""Text from elsewhere (names of files, of classes, of models; recipes) as it may be shown."""

from __future__ import annotations

import csv
import html
import io
import unicodedata
from collections.abc import Iterable

_KEPT = "\n\t"
_SHOWN_ESCAPED = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
"""Categories of Unicode: control and format characters, halves of characters, private ones, line separators."""
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def visible(text: str) -> str:
    """Return a text with control characters written as escapes, such as ``\\x1b``.

    A terminal obeys some of them, and others turn text around or hide it. Line ends and tabs stay.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escaped(one) if one not in _KEPT and _is_hidden(one) else one for one in text)


def counted(number: int, one: str, several: str = "") -> str:
    """Return a number of things: 1 segment, 2 segments; 1 loss, 2 losses."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def markup(text: str) -> str:
    """Return a text as HTML, SVG and XML show it; control characters, which XML forbids, as escapes."""
    return html.escape(visible(text))


def cell(value: object) -> object:
    """Return a value for a cell of a CSV file; text that a spreadsheet would take for a formula gets a ``'``."""
    if not isinstance(value, str):
        return value
    text = visible(value)
    return f"'{text}" if text.startswith(_FORMULA) else text


def csv_table(rows: Iterable[Iterable[object]]) -> str:
    """Return rows as CSV, the names of the columns first; see :func:`cell`. None is an empty cell."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(map(cell, row) for row in rows)
    return text.getvalue()


def _is_hidden(letter: str) -> bool:
    return unicodedata.category(letter) in _SHOWN_ESCAPED


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape", "surrogatepass").decode("ascii")
