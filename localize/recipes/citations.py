"""Cite a paper in short, by its authors and year, as recipes and methods name papers in full."""

from __future__ import annotations

import re

_AUTHOR = re.compile(r"(?:[^\W\d_]{1,2}\.[ -]?)+([^\s,.&]+(?: [^\s,.&]+)*?)(, | & | and |\. |$)")
"""Initials, a family name, and what follows it: another author, or the end of the authors."""


def cited(reference: str) -> str:
    """Return authors and year of a paper: ``Lee & Song 2023``, or ``Choi et al. 2024`` for more than two.

    Args:
        reference: begins with the authors ("S. Choi, M. Jeon, Y. Hwang. Title. ICLR 2024."); of one that does not, the
            author is ``anonymous``.
    """
    names: list[str] = []
    rest = reference
    while author := _AUTHOR.match(rest):
        names.append(author[1])
        rest = rest[author.end() :]
        if author[2] in (". ", ""):
            break
    year = re.search(r"\b(?:19|20)\d\d\b", rest)
    shown = f"{names[0]} et al." if len(names) > 2 else " & ".join(names) or "anonymous"
    return f"{shown} {year[0]}" if year else shown
