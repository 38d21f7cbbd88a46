"""What ``FILE.py:NAME`` and ``module:NAME`` name, and how what was found is spelled."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from localize import outside
from localize.errors import LocalizeError, UnknownNameError
from localize.outside import CodeError


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.startswith(("localize_file_", "beside_"))]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("mine.py:Net", True),
        ("a/b c/mine.py:Net", True),
        ("package.module:Class", True),
        ("package:Outer.Inner", True),
        ("C:\\data\\set", False),
        ("dcl", False),
        ("mine.py", False),
        ("https://host:80", False),
        ("NAME:OPTION=4", False),
        (":Net", False),
        ("mine.py:", False),
        ("a-b:Net", False),
    ],
)
def test_what_has_the_form_of_a_name(text: str, right: bool) -> None:
    assert outside.is_spelled(text) == right


def test_a_name_in_a_file_or_a_module_is_found_and_spelled_alike() -> None:
    Path("mine.py").write_text("class Outer:\n    class Inner: pass\n")
    Path("beside_it.py").write_text("def f(): pass\n")
    inner = outside.load("mine.py:Outer.Inner")
    assert outside.spelled(inner) == "mine.py:Outer.Inner"
    assert outside.load(outside.spelled(inner)) is inner
    function = outside.load("beside_it:f")  # in the current directory
    assert outside.spelled(function) == "beside_it:f"
    assert str(Path.cwd()) not in sys.path
    assert outside.spelled(json.JSONDecoder) == "json.decoder:JSONDecoder"


def test_what_no_module_holds_is_found_in_this_process() -> None:
    class Local:
        pass

    assert outside.load(outside.spelled(Local)) is Local


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("min.py:Net", UnknownNameError, "there is no file 'min.py'.*did you mean 'mine.py'"),
        ("mine.py:Nt", UnknownNameError, "'mine.py' defines no 'Nt'.*Net.*mine.py:Net"),
        ("mine.py", UnknownNameError, "names a file, not a name.*mine.py:Net"),
        ("nowhere_at_all:Net", UnknownNameError, "no module 'nowhere_at_all'"),
        ("broken.py:Net", CodeError, "'broken.py' could not be imported.*ZeroDivisionError"),
        ("beside_broken:Net", CodeError, "'beside_broken' could not be imported.*ZeroDivisionError"),
        ("beside_exits:Net", CodeError, "could not be imported.*SystemExit"),
        ("beside_lacks:Net", CodeError, "could not be imported.*no_such_thing"),
    ],
)
def test_what_is_not_there_or_cannot_be_imported_is_refused(text: str, error: type[LocalizeError], words: str) -> None:
    Path("mine.py").write_text("class Net: pass\n")
    for name in ("broken", "beside_broken"):
        Path(f"{name}.py").write_text("1 / 0\n")
    Path("beside_exits.py").write_text("raise SystemExit(3)\n")
    Path("beside_lacks.py").write_text("import no_such_thing\n")
    with pytest.raises(error) as caught:
        outside.load(text)
    told = " ".join(str(caught.value).split())
    import re

    assert re.search(words, told), told


def test_where_code_would_come_from_is_told_without_running_it() -> None:
    Path("beside_broken.py").write_text("1 / 0\n")
    assert Path(outside.origin("beside_broken")).name == "beside_broken.py"
    assert outside.origin("nowhere_at_all") == ""
