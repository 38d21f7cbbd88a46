"""Words that a reader of English stumbles at do not come back: in pages, recipes, comments, docstrings and messages."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WORSE = {
    r"(?<!left )(?<!leave )(?<!leaves )\bbehind\b": "after",
    r"\banew\b": "again",
    r"(?<!there )\bis no (tensor|parameter|method|module|number|image|buffer|dataclass|terminal)\b": "is not a",
    r"(?<!there )\bare no (tensors|parameters|methods|modules|numbers|images|buffers)\b": "are not",
}
"""What stands for what."""
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "MODELS.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "recipes").rglob("*.yaml")),
]
MODULES = sorted((ROOT / "localize").rglob("*.py"))


def found(text: str) -> Iterator[str]:
    """Yield the places of worse words in a text, each with what to write."""
    for worse, better in WORSE.items():
        for match in re.finditer(worse, text, re.I):
            before = text[max(0, match.start() - 30) : match.end() + 30].replace("\n", " ")
            yield f"...{before}...: write {better!r}"


def prose(source: str) -> str:
    """Return the comments and strings of a module; names in the braces of an f-string are left out."""
    kept = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            kept.append(token.string)
        elif token.type == tokenize.STRING:
            formatted = "f" in token.string.partition(token.string[-1])[0].lower()
            kept.append(re.sub(r"\{[^{}]*\}", "", token.string) if formatted else token.string)
        elif token.type == getattr(tokenize, "FSTRING_MIDDLE", None):
            kept.append(token.string)
    return "\n".join(kept)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("One behind the other.", 1),
        ("what it leaves behind", 0),
        ("drawn anew", 1),
        ("It is no tensor.", 1),
        ("after", 0),
    ],
)
def test_worse_words_are_found(text: str, count: int) -> None:
    assert len(list(found(text))) == count


def test_names_are_not_words() -> None:
    assert "behind" not in prose('behind = 1\nx = f"{behind} values"\n')
    assert "behind" in prose('x = f"{y} behind"  # a comment\n')


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_and_recipes_have_no_worse_words(path: Path) -> None:
    assert not list(found(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_have_no_worse_words(path: Path) -> None:
    assert not list(found(prose(path.read_text(encoding="utf-8"))))
