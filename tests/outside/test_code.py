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


def test_files_of_one_stem_in_several_folders_are_told_apart() -> None:
    for folder in ("a", "b", "b/c", "b c"):
        Path(folder).mkdir()
        Path(folder, "mine.py").write_text(f"def f(): return {folder!r}\n")
    texts = [f"{folder}/mine.py:f" for folder in ("a", "b", "b/c", "b c")]
    functions = [outside.load(text) for text in texts]
    assert [outside.spelled(function) for function in functions] == texts
    assert [outside.load(text) for text in texts] == functions
    assert [function() for function in functions] == ["a", "b", "b/c", "b c"]
    modules = [function.__module__ for function in functions]
    assert len(set(modules)) == 4
    assert all(
        module.isidentifier() and sys.modules[module].f is f for module, f in zip(modules, functions, strict=True)
    )


def test_the_module_of_a_file_can_be_imported_whatever_the_file_is_called() -> None:
    Path("my-2 files.v1.py").write_text("def f(): pass\n")
    assert outside.load("my-2 files.v1.py:f").__module__ == "localize_file_my_2_files_v1"


def test_classes_of_one_name_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def made() -> type:
        class Local:
            pass

        return Local

    first, second = made(), made()
    assert [outside.load(text) for text in map(outside.spelled, (first, second, first))] == [first, second, first]
    texts = outside.spelled(first), outside.spelled(second)
    assert [outside.load(text) for text in texts] == [first, second]
    assert all(map(outside.is_spelled, texts))


def test_a_class_that_was_defined_again_does_not_stand_for_the_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[__name__]
    old, new = (type("Cell", (), {"__module__": __name__}) for _ in range(2))
    monkeypatch.setattr(module, "Cell", new, raising=False)  # a cell of a notebook that has run twice
    texts = outside.spelled(old), outside.spelled(new)
    assert texts[0] != texts[1] == f"{__name__}:Cell"
    assert [outside.load(text) for text in texts] == [old, new]


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("min.py:Net", UnknownNameError, "there is no file 'min.py'.*did you mean 'mine.py'"),
        ("mine.py:Nt", UnknownNameError, "'mine.py' defines no 'Nt'.*Net.*mine.py:Net"),
        ("mine.py", UnknownNameError, "names a file, not a name.*mine.py:Net"),
        ("mine", UnknownNameError, "'mine' names no name.*mine:NAME"),
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
