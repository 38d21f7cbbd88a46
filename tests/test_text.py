"""Text from elsewhere is shown, and never obeyed: by a terminal, a page, a picture or a spreadsheet."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from localize.cli.app import app
from localize.cli.printed import print_json, say
from localize.pictures.svg import Canvas
from localize.report.markup import element
from localize.text import cell, csv_table, markup, visible
from localize.train import metrics

RED = "\x1b[31mred\x1b[0m"
HIDDEN = {
    RED: "\\x1b[31mred\\x1b[0m",
    "bell\x07": "bell\\x07",
    "\x9b2J": "\\x9b2J",
    "right\u202eleft": "right\\u202eleft",
    "line\u2028end": "line\\u2028end",
    "back\rover": "back\\rover",
    "half\udcff": "half\\udcff",
    "zero\u200bwidth": "zero\\u200bwidth",
    "null\x00": "null\\x00",
}


@pytest.mark.parametrize("text", HIDDEN)
def test_control_characters_are_shown_as_escapes(text: str) -> None:
    assert visible(text) == HIDDEN[text]
    assert HIDDEN[text] in element("p", text)
    canvas = Canvas()
    canvas.text(0, 0, text)
    assert HIDDEN[text] in canvas.svg(10, 10)


@pytest.mark.parametrize("text", ["plain", "Größe 50 %", "日本語", "two\nlines\tand a tab", "naïve ✓"])
def test_other_text_stays_as_it_is(text: str) -> None:
    assert visible(text) == text


def test_markup_is_escaped_too() -> None:
    assert markup("<b>\x1b&") == "&lt;b&gt;\\x1b&amp;"


@pytest.mark.parametrize("text", ["=HYPERLINK(1)", "+1", "-1", "@SUM(1)", "\t=1"])
def test_a_cell_is_no_formula(text: str) -> None:
    assert str(cell(text)).startswith("'")
    assert cell(-1.5) == -1.5


def test_what_is_printed_and_errors_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    say(RED)
    print_json({"name": RED + "\u202e"})
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\u202e" not in out
    assert json.loads(out.partition("\n")[2]) == {"name": RED + "\u202e"}
    answer = CliRunner().invoke(app, ["inspect", f"cifar/{RED}"])
    assert answer.exit_code == 2
    assert "\\x1b[31mred" in answer.stderr and "\x1b[31m" not in answer.stderr


def test_a_key_of_a_recipe_does_not_reach_the_terminal_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text('"\\e[31mkey": 1\nmethod: dcl\n')
    answer = CliRunner().invoke(app, ["recipes", "validate", str(tmp_path / "r.yaml")])
    assert answer.exit_code == 2
    assert "\x1b" not in answer.stderr and "x1b" in answer.stderr


def test_the_name_of_a_loss_is_no_formula_in_the_table() -> None:
    loss = metrics.LossMetrics("=HYPERLINK(1)", (0, 0), 1.0)
    epoch = metrics.EpochMetrics(1, 1, 1.0, 0.5, 0.5, 0.1, 1.0, (loss,))
    rows = list(csv.reader(metrics.segments_csv([epoch]).splitlines()))
    assert rows[1][1] == "'=HYPERLINK(1)"


def test_a_csv_table_is_read_back_as_it_was() -> None:
    rows = [["class", "images"], ['a "quoted", name', 3], ["two\\nlines", 0.5], ["=1+1", None]]
    found = list(csv.reader(io.StringIO(csv_table(rows))))
    assert found == [["class", "images"], ['a "quoted", name', "3"], ["two\\nlines", "0.5"], ["'=1+1", ""]]
