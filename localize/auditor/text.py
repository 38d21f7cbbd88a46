"""Take a text apart, or say in words why it is not: nothing of it is run, and what it costs is bounded.

A text of more than :data:`MAX_BYTES` is refused unread. One that holds far more code than its plan can need is refused
before it is parsed, since a syntax tree takes a hundred times the memory of its text.
"""

from __future__ import annotations

import ast
import re

from localize.auditor.reading import Problem

MAX_BYTES = 16 * 2**20
"""Size of the largest text that is looked at."""
BYTES = (2**16, 300)
"""Bytes of code that any text may hold, and how many more for each operation of its plan; comments are not counted."""
LINES = (2000, 8)
"""The same for lines and statements."""
_CODING = re.compile(r"^[ \t\f]*#.*?coding[:=][ \t]*([-\w.]+)")


def parse(source: str, operations: int) -> ast.Module | Problem:
    """Return the syntax tree of a text, or what forbids one.

    Args:
        source: the text.
        operations: how many operations its plan has.
    """
    if len(source) > MAX_BYTES or (len(source) > MAX_BYTES // 4 and len(source.encode(errors="replace")) > MAX_BYTES):
        return Problem(0, f"the text has more than {MAX_BYTES // 2**20} MiB, and is not read")
    size, lines = _code(source)
    if size > BYTES[0] + BYTES[1] * operations or lines > LINES[0] + LINES[1] * operations:
        return Problem(
            0, f"the text holds {lines} lines and {size} bytes of code, far more than its plan needs: it is not read"
        )
    for number, line in enumerate(source.splitlines()[:2], start=1):
        coding = _CODING.match(line)
        if coding and coding[1].lower().replace("_", "-") not in ("utf-8", "utf8", "ascii", "us-ascii"):
            return Problem(number, f"says that it is written in {coding[1]}; a step is UTF-8")
    try:
        return ast.parse(source)
    except SyntaxError as error:
        return Problem(error.lineno or 1, f"not Python: {error.msg}")
    except (RecursionError, MemoryError):
        return Problem(_deepest(source), "not read: it is nested too deeply")
    except ValueError as error:  # a null byte, an integer of thousands of digits
        return Problem(1, f"not Python: {error}")


def _code(source: str) -> tuple[int, int]:
    """Return how many bytes and statements a text holds, without comments and blank lines."""
    size = lines = start = 0
    while start < len(source):
        end = source.find("\n", start)
        end = len(source) if end < 0 else end
        while start < end and source[start] in " \t":
            start += 1
        if start < end and source[start] != "#":
            size += end - start
            lines += 1 + source.count(";", start, end)
        start = end + 1
    return size, lines


def _deepest(source: str) -> int:
    """Return the number of the longest line, which is the one that nests."""
    lines = source.splitlines()
    return max(range(len(lines)), key=lambda i: len(lines[i])) + 1 if lines else 1
