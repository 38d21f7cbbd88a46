"""Whatever a recipe says, reading it gives a recipe or an error of ours, runs nothing, and names no file outside."""

from __future__ import annotations

import ast
import random
from collections import Counter
from pathlib import Path

import pytest

import localize
from localize import recipes
from localize.errors import LocalizeError, RecipeError, UnknownNameError
from localize.recipes import Recipe
from tests import daily

MUTATIONS = 400
"""Mutations of each part."""
VALUES = (
    "", "null", "~", "true", "no", "0", "-1", "1e999", "-.inf", ".nan", "1" * 5000, "0x10", "0b1", "1_0", "12:30:45",
    "0x" + "f" * 5000,
    "2026-11-21", "2026-11-21 10:00:00 +25:99", "2026-99-99", "''", "'\\0'", '"\\ud800"', '"\\U00110000"', "\ud800",
    "[]", "{}", "[[]]", "{a: [b, {c: d}]}", "[" * 3000, "{a: " * 500, "- " * 2000, "&a [*a]", "*nowhere",
    "!!binary aGk=", "!!binary ä", "!!set {a, b}", "!!omap [a: b]", "!!pairs [a: b]", "!!int x", "!!float []",
    "!!bool maybe", "!!timestamp x", "!!python/object/apply:os.system ['touch owned']", "!!python/name:os.system",
    "!mine x", "|\n x", "? [a, b]\n: c", "? {a: b}\n: c", "? 2026-11-21\n: c",
    "<<: {a: b}", "<<: [1]", "%YAML 9.9", "---", "...", "\t", "\x00", "\ufeff", "#",
    "../../../etc/passwd", "/etc/passwd", "file.py:f", "é" * 300, "@", "`", "%", "!", "!<", "!!", "=", "9" * 400 + ".5",
)  # fmt: skip


def mutated(text: str, draw: random.Random) -> str:
    """Return a recipe with one to three things changed: characters, lines, keys or values."""
    for _ in range(draw.randint(1, 3)):
        lines = text.split("\n")
        row = draw.randrange(len(lines))
        key, colon, value = lines[row].partition(":")
        at = draw.randrange(len(text) + 1)
        match draw.randrange(9):
            case 0:
                text = text[:at] + text[at + draw.randint(1, 9) :]
                continue
            case 1:
                text = text[:at] + draw.choice("\n\t :-[]{}&*!|>'\"%@`,?#\x00é\ud8009") + text[at:]
                continue
            case 2:
                lines.insert(draw.randrange(len(lines)), lines[row])
            case 3:
                lines[row] = "  " * draw.randint(0, 2) + lines[row].strip()
            case 4:
                lines[row] = f"{key}: {draw.choice(VALUES)}"
            case 5:
                lines[row] = f"{draw.choice(VALUES)}{colon}{value}"
            case 6:
                lines[row] = f"{key}:{draw.choice(lines).partition(':')[2]}"
            case 7:
                lines[row] = draw.choice(VALUES)
            case _:
                lines[row] = f"{draw.choice(lines).partition(':')[0]}{colon}{value}"
        text = "\n".join(lines)
    return text


@pytest.mark.parametrize("part", daily.parts(5))
def test_a_mutated_recipe_is_a_recipe_or_is_refused(part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    texts = sorted((recipes.text(name) for name in recipes.names()), key=len)[:60]
    draw = random.Random(part)
    ended: Counter[str] = Counter()
    for number in range(MUTATIONS):
        text = mutated(draw.choice(texts), draw)
        try:
            found = recipes.parse(text, "mine.yaml")
        except LocalizeError as error:
            assert str(error)
            ended[type(error).__name__] += 1
        except Exception as error:
            raise AssertionError(f"mutation {number} ends in {error!r}:\n{text[:3000]!r}") from error
        else:
            assert isinstance(found, Recipe)
            assert recipes.parse(recipes.dump(found), "again") == found, text
            ended["Recipe"] += 1
    assert list(tmp_path.iterdir()) == []  # nothing in a text was run
    assert set(ended) == {"Recipe", "RecipeError"} and min(ended.values()) > MUTATIONS / 20, ended


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("notes: " + "[" * 3000, "more than 20 times, line 2."),
        ('notes: "\\U00110000"', "is not YAML"),
        ('notes: "\\ud800"', "notes cannot be read.\n  it holds half of a character (a surrogate)"),
        ("notes: 2026-99-99", "2026-99-99 is no timestamp, line 2."),
        ("notes: !!bool maybe", "maybe is no bool, line 2."),
        ("notes: !!python/name:os.system", "line 2."),
        ("num_classes: 0x" + "f" * 5000, "it is a number of 20,000 bits.\n  at num_classes of mine.yaml, line 2."),
        ("outputs: {aux: .inf}", "outputs.aux cannot be read.\n  inf is not a finite number"),
        ("options: {2026-11-21: 1}", "datetime.date(2026, 11, 21) is not text, and keys are"),
        ("train: {output: /etc/cron.d}", "train.output cannot be '/etc/cron.d'"),
        (
            "train: {output: runs/../../x}",
            "stays below the folder it is run in.\n  at train.output of mine.yaml, line 2.",
        ),
        ("train: {output: 'C:\\x'}", "train.output cannot be"),
        ("train: {output: '..\\x'}", "train.output cannot be"),
    ],
)
def test_what_is_hostile_is_refused_with_its_place(text: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipes.parse(f"method: dcl\n{text}\n", "mine.yaml")
    assert words in str(caught.value)


def test_a_folder_below_is_taken() -> None:
    assert recipes.load({"method": "dcl", "train": {"output": "runs/a..b"}}).train["output"] == "runs/a..b"


@pytest.mark.parametrize("name", ["../recipes/dcl", "dcl/../../x", "/etc/passwd", ".."])
def test_the_name_of_a_recipe_is_no_way_out(name: str) -> None:
    with pytest.raises(UnknownNameError):
        recipes.text(name)


def test_yaml_is_read_by_safe_loaders_only() -> None:
    for path in Path(localize.__file__).parent.rglob("*.py"):
        nodes = [
            node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Attribute)
        ]
        used = {node.attr for node in nodes if isinstance(node.value, ast.Name) and node.value.id == "yaml"}
        assert not {name for name in used if "load" in name.lower()} - {"safe_load", "SafeLoader"}, path
