"""Name the line of the user's code that a torch function was called from."""

from __future__ import annotations

import dis
import itertools
import linecache
import os
import sys
import types

import torch

from localize import ops

_TORCH = os.path.dirname(torch.__file__) + os.sep
_RECORDER = (os.path.dirname(__file__), os.path.dirname(ops.__file__))


def _is_users(filename: str) -> bool:
    """Tell whether code is the user's: not torch's, and not the recorder's."""
    return not filename.startswith(_TORCH) and os.path.dirname(filename) not in _RECORDER


def calling_line() -> str:
    """Return ``file:line: source`` of the innermost frame of the user's."""
    return calling_lines()[0]


def calling_lines() -> list[str]:
    """Return ``file:line: source`` of the innermost frame of the user's, and the expression that is computed there."""
    frame = sys._getframe(1)
    while frame is not None:
        if _is_users(frame.f_code.co_filename):
            return _source(frame.f_code, frame.f_lineno, frame.f_lasti)
        if frame.f_back is None:
            break
        frame = frame.f_back
    return ["an unknown line"]


def user_frames(error: BaseException) -> list[str]:
    """Return the same for the innermost frame of the user's that an error went through."""
    found: list[str] = []
    trace_back = error.__traceback__
    while trace_back is not None:
        code = trace_back.tb_frame.f_code
        if _is_users(code.co_filename):
            found = _source(code, trace_back.tb_lineno, trace_back.tb_lasti)
        trace_back = trace_back.tb_next
    return found


def _source(code: types.CodeType, line: int, instruction: int) -> list[str]:
    text = linecache.getline(code.co_filename, line).strip()
    found = [f"{code.co_filename}:{line}: {text}"]
    number = instruction // 2
    if dis.opname[code.co_code[instruction]].startswith(("POP_JUMP", "TO_BOOL")):
        number -= 1  # a jump has the place of another part of the condition; what made its value comes before it
    first, last, start, stop = next(itertools.islice(code.co_positions(), number, None))
    if first is not None and first == last and start is not None:
        expression = linecache.getline(code.co_filename, first).encode()[start:stop].decode()
        if expression and expression != text:
            found.append(f"in the expression: {expression}")
    return found
