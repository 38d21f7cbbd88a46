"""What ``FILE.py:NAME`` and ``module:NAME`` name, and how what was found is spelled."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

import localize
from localize import outside, recipes
from localize.cli import app
from localize.errors import LocalizeError, UnknownNameError
from localize.outside import CodeError
from localize.testing.nets import IMAGE, NETS


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
    assert re.search(words, told), told


def test_where_code_would_come_from_is_told_without_running_it() -> None:
    Path("beside_broken.py").write_text("1 / 0\n")
    assert Path(outside.origin("beside_broken")).name == "beside_broken.py"
    assert outside.origin("nowhere_at_all") == ""


# ------------------------------------------------------------------------------------------------------------- losses

LOSSES = """
import torch.nn.functional as F
from torch import nn
from localize.losses import declared

@declared(labels=("ids", "soft"), mean=True)
def gentle(scores, labels, label_smoothing=0.0):
    return 0.5 * F.cross_entropy(scores, labels, label_smoothing=label_smoothing)

def plain(scores, labels):
    return F.multi_margin_loss(scores, labels)

def net(num_classes=5):
    hidden = [nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(8, num_classes))

net.input_shape, net.num_classes = (3, 8, 8), 5
number = 3
"""


def test_a_loss_of_ones_own_trains_what_the_cross_entropy_did() -> None:
    Path("own.py").write_text(LOSSES)
    model, x, y = NETS["MLP"](), torch.randn(6, *IMAGE), torch.arange(6) % 5
    local = localize.transform(model, "dgl", example_input=x, loss={"name": "own.py:gentle", "smoothing": 0.1})
    localize.audit(local, (x, y)).raise_if_failed()
    scores = local.scores(x)

    found = local.step(x, y, torch.optim.SGD(local.param_groups(lr=0.0), lr=0.0)).losses

    for name, values in scores.items():
        wanted = 0.5 * F.cross_entropy(values, y, label_smoothing=0.1)
        assert torch.allclose(found[name], wanted)
    local.step(x, torch.rand(6, 5).softmax(1), torch.optim.SGD(local.param_groups(lr=0.0), lr=0.0))


def test_a_loss_is_given_as_a_function_too_and_takes_class_ids_unless_it_declares_more() -> None:
    Path("own.py").write_text(LOSSES)
    function = outside.load("own.py:plain")
    model, x = NETS["MLP"](), torch.randn(6, *IMAGE)
    local = localize.transform(model, "dgl", example_input=x, loss=function)
    assert local.plan.loss["name"] == "own.py:plain"
    with pytest.raises(LocalizeError, match="class ids"):
        local.step(x, torch.rand(6, 5).softmax(1), torch.optim.SGD(local.param_groups(lr=0.0), lr=0.0))


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ("own.py:missing", "defines no 'missing'"),
        ("own.py:number", "is int, not a function of class scores"),
        ({"name": "own.py:plain", "smoothing": 0.1}, "takes no label_smoothing"),
        ({"name": "own.py:gentle", "weights": [1, 2, 1, 1, 1]}, "takes no weight"),
        (lambda scores, labels: scores.sum(), "cannot be imported"),
        ("gentle", "its values are|did you mean"),
    ],
)
def test_what_is_no_loss_is_refused(loss: object, words: str) -> None:
    Path("own.py").write_text(LOSSES)
    with pytest.raises(LocalizeError, match=words):
        localize.transform(NETS["MLP"](), "dgl", example_input=torch.randn(6, *IMAGE), loss=loss)


def test_a_folder_remembers_the_loss_and_asks_before_it_runs_it() -> None:
    Path("own.py").write_text(LOSSES)
    command = ["convert", "own.py:net", "--method", "dgl", "--loss", "own.py:gentle", "-o", "out"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert recipes.load("out").loss["name"] == "own.py:gentle"
    assert CliRunner().invoke(app, ["audit", "out"]).exit_code == 0
    Path("own.py").write_text(LOSSES + "\n# otherwise\n")
    assert "names files of code, own.py:net, own.py:gentle" in CliRunner().invoke(app, ["audit", "out"]).stderr
