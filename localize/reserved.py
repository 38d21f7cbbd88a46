"""Names that the generated text gives a meaning to: a value of the user's that has one of them is called otherwise."""

from __future__ import annotations

import builtins
import keyword
import re

_EVERYWHERE = re.compile(
    r"trunk|heads|torch|F|operator|localize|train_step|(segment|step|part)_\d+"
    r"|exact_parts|micro_batches|output_error|pull|recompute|scale_gradient|set_item|share|without_gradient"
)
"""What a module of generated text defines and imports, and what every function of it takes."""

_IN_STEPS = re.compile(
    r"y|optimizer|stream|error|images|labels|losses|classes"
    r"|(x|h|loss|scores|classes|term|sum|weighted|target|prediction|step|segment|passed|copied|stream|streams|detached|losses"
    r"|images|labels|side|run)_.*"
)
"""What training functions and the driver call their own values."""

_QUOTING = re.compile(r'["\\\x00-\x1f]')
"""What ends a quoted name, or does not stand in one."""


def name_in_segment(name: str) -> str:
    """Return what a value called ``name`` is called in the function of a segment."""
    return f"{name}_value" if _EVERYWHERE.fullmatch(name) or _is_pythons(name) else name


def name_of_input(name: str) -> str:
    """Return what an argument of the model called ``name`` is called in the text, the training functions included."""
    taken = _EVERYWHERE.fullmatch(name) or _IN_STEPS.fullmatch(name) or _is_pythons(name)
    return f"{name}_" if taken else name


def path_in_head(path: str) -> str:
    """Return where a head keeps its copy of the module at ``path`` of the trunk: fx writes each name of it as it is."""
    parts = path.split(".")
    return ".".join(f"{part}_" if keyword.iskeyword(part) else _QUOTING.sub(_coded, part) for part in parts)


def _coded(found: re.Match[str]) -> str:
    return "".join(f"_{ord(character):x}" for character in found.group())


def _is_pythons(name: str) -> bool:
    return keyword.iskeyword(name) or hasattr(builtins, name)
