"""What strangers send: code is not run, files do not crash, and nothing is written outside of a run folder."""

from __future__ import annotations

import os
import random
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from localize import recipes, zoo
from localize.cli.app import app
from localize.errors import LocalizeError, MissingError, OptionError, RecipeError
from localize.recipes.trust import UntrustedCodeError
from localize.train import TrainConfig, checkpoints, evaluation, export, metrics, resume, run, runs

MINE = """
from torch import nn

def make(num_classes=10):
    layers = [nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, num_classes)]
    return nn.Sequential(nn.Flatten(), *layers)

make.input_shape = (1, 8, 8)
"""
EVIL = 'import pathlib\npathlib.Path("ran").write_text("it ran")\n' + MINE
SETTINGS = {"epochs": 2, "batch_size": 256, "max_steps": 6, "device": "cpu", "input_shape": (1, 8, 8)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a small net of the package, with two checkpoints."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "run"
    (folder.parent / "mine.py").write_text(MINE)
    model = f"{folder.parent}/mine.py:make"
    run(TrainConfig(model, recipe="dgl", output=str(folder), checkpoint_every=3, **SETTINGS))
    assert len(checkpoints.files(folder)) == 2
    return folder


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments])


def told_in_words(answer: Result) -> bool:
    return answer.exit_code in (0, 1, 2, 3, 4) and (
        answer.exception is None or isinstance(answer.exception, SystemExit)
    )


# ---------------------------------------------------------------------------------------------------------------- code


@pytest.fixture
def sent(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder whose recipe names a file of code that this user has never run."""
    monkeypatch.chdir(tmp_path)
    Path("evil.py").write_text(EVIL)
    recipe = copied / recipes.FILE_NAME
    recipe.write_text(re.sub("model: .*:make", "model: evil.py:make", recipe.read_text()))
    shutil.copy(recipe, "recipe.yaml")
    return copied


COMMANDS = (
    ("eval",), ("export", "-o", "x.pt"), ("report", "--no-memory", "-o", "x.html"), ("report", "-o", "x.html"),
    ("predict", "evil.py"), ("train", "--resume"), ("draw",), ("audit",), ("convert", "--recipe"), ("plan", "--recipe"),
    ("train", "--recipe"),
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_file_of_code_that_a_folder_names_is_not_run(sent: Path, command: tuple[str, ...]) -> None:
    (sent / "train_step.py").write_text("")
    name, *rest = command
    if name == "report":
        (sent / "train_step.py").unlink()
    flags = ["--memory-budget", "1GiB"] if name == "plan" else []
    order = [*rest, sent] if rest and rest[0].startswith("--re") else [sent, *rest]
    answer = invoke(name, *order, *flags)
    assert answer.exit_code == 2, answer.output
    assert "names a file of code, evil.py:make" in answer.stderr
    assert "--trust-code" in answer.stderr
    assert not Path("ran").exists()


def test_it_is_run_if_the_caller_says_so(sent: Path) -> None:
    answer = invoke("report", sent, "--no-memory", "-o", "x.html", "--trust-code")
    assert answer.exit_code == 0, answer.output
    assert Path("ran").exists()


def test_the_own_run_of_a_user_is_trusted_until_the_code_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(EVIL)
    folder = run(TrainConfig("mine.py:make", output="own", **SETTINGS | {"epochs": 1})).output
    assert evaluation.open_run(folder, device="cpu").recipe.model == "mine.py:make"
    export(folder, "x.pt")
    moved = shutil.move("own", "moved")
    export(moved, "y.pt")
    Path("mine.py").write_text(EVIL + "\n# changed")
    with pytest.raises(UntrustedCodeError, match="or the file has changed since"):
        export(moved, "z.pt")
    export(moved, "z.pt", trust_code=True)


@pytest.mark.parametrize(
    "option",
    ["checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "pretrained_strict", "weights",
     "weights_backbone", "some_url", "scriptable"],
)  # fmt: skip
@pytest.mark.parametrize("model", ["timm/test_resnet", "tv/resnet18", "cifar/resnet20"])
def test_options_that_load_or_execute_are_refused(tmp_path: Path, model: str, option: str) -> None:
    with pytest.raises(OptionError, match=f"is not built with the option '{option}'"):
        zoo.create_model(model, **{option: str(tmp_path / "p.pt")})


def test_other_options_are_taken() -> None:
    zoo.create_model("timm/test_vit", drop_path_rate=0.1, weight_init="")


# ---------------------------------------------------------------------------------------------------------------- links


def test_nothing_is_written_through_a_link_in_a_run_folder(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    for name in ("export", "checkpoints", "metrics.jsonl", ".lock", "recipe.yaml", "segments.csv"):
        kept = tmp_path / "kept"
        path = copied / name
        path.rename(kept)
        path.symlink_to(tmp_path / "outside" / name if kept.is_file() else tmp_path / "outside")
        with pytest.raises(
            MissingError, match=f"{name} is a link to" if name != "recipe.yaml" else "not the folder|link"
        ):
            resume(copied)
        path.unlink()
        kept.rename(path)
    assert not list((tmp_path / "outside").iterdir())


def test_export_does_not_write_through_links(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x.pt").write_text("mine")
    monkeypatch.chdir(tmp_path / "here")
    os.symlink("../outside", "link")
    os.symlink("../outside/x.pt", "x.pt")
    for name in ("link/y.pt", "x.pt"):
        with pytest.raises(MissingError, match="link"):
            export(copied, name, force=True)
    assert [path.name for path in (tmp_path / "outside").iterdir()] == ["x.pt"]
    assert (tmp_path / "outside" / "x.pt").read_text() == "mine"


def test_the_output_of_a_recipe_does_not_lead_out_through_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    os.symlink("..", "link")
    with pytest.raises(RecipeError, match="train.output cannot be 'link/x'.\n  it leads through a link to"):
        recipes.load({"method": "dcl", "train": {"output": "link/x"}})


def test_what_a_killed_process_was_writing_is_removed(copied: Path) -> None:
    left = [".metrics-123.jsonl", ".recipe-7.yaml", "export/.backbone-9.safetensors", "checkpoints/.step-00000009-1.pt"]
    for name in (*left, ".mine", ".notes-1.txt"):
        (copied / name).write_text("half")
    resume(copied)
    assert not any((copied / name).exists() for name in left)
    assert (copied / ".mine").exists() and (copied / ".notes-1.txt").exists()


# ---------------------------------------------------------------------------------------------------------- checkpoints


def bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("step/data.pkl", bytes(100 * 2**20))


def folder_of_that_name(path: Path) -> None:
    path.unlink()
    path.mkdir()


ODD: dict[str, tuple[Callable[[Path], None], str]] = {
    "bomb": (bomb, "is too large for a checkpoint of this run. it unpacks to 104,857,600 bytes"),
    "folder": (folder_of_that_name, "is incomplete, or not a checkpoint"),
    "empty": (lambda path: path.write_bytes(b""), "is incomplete, or not a checkpoint"),
    "list": (lambda path: torch.save([1, 2], path), "is not a checkpoint that this version can read"),
    "form alone": (lambda path: torch.save({"form": checkpoints.FORM}, path), "is damaged. parts are missing"),
}


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_checkpoint_is_passed_over_by_name(copied: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    act, told = ODD[kind]
    whole = (copied / runs.BACKBONE).read_bytes()
    last = checkpoints.files(copied)[-1]
    act(last)
    resume(copied)
    err = capsys.readouterr().err
    assert f"skipped: {last}" in err and told in err
    assert (copied / runs.BACKBONE).read_bytes() == whole


def places(value: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield where every value of a checkpoint is."""
    yield keys
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from places(child, (*keys, key))


def mutate(values: Any, keys: tuple[Any, ...], choice: random.Random) -> Any:
    """Return values of which the one at a place is missing, or another."""
    if not keys:
        return choice.choice([None, 7, "x", torch.full((2,), torch.nan), [values], -1, 1e300])
    copied = dict(values) if isinstance(values, dict) else list(values)
    if len(keys) == 1 and choice.random() < 0.4:
        del copied[keys[0]]
    else:
        copied[keys[0]] = mutate(values[keys[0]], keys[1:], choice)
    return copied


def test_every_mutated_checkpoint_ends_in_a_resumed_run_or_words(copied: Path) -> None:
    check_mutated_checkpoints(copied, 10)


@pytest.mark.slow
def test_200_mutated_checkpoints_end_in_a_resumed_run_or_words(copied: Path) -> None:
    check_mutated_checkpoints(copied, 200)


def check_mutated_checkpoints(folder: Path, count: int) -> None:
    """Mutate the last checkpoint; in every second case its digest is right, as a stranger could make it."""
    whole = folder.parent / "whole"
    shutil.copytree(folder, whole)
    path = checkpoints.files(folder)[-1]
    values = checkpoints.read(path)
    found = [keys for keys in places(values) if keys]
    for number in range(count):
        choice = random.Random(number)
        changed = mutate(values, choice.choice(found), choice)
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)
        forged = {"sha256": checkpoints.digest(changed)} if number % 2 else {"sha256": "0"}
        torch.save({"form": checkpoints.FORM, **forged, **changed}, path)
        answer = invoke("train", "--resume", folder)
        assert told_in_words(answer), (number, answer.exception)
        assert answer.exit_code != 0 or metrics.read(folder)[-1].step == 6, number


def test_every_mutated_run_folder_ends_in_an_answer_or_words(copied: Path) -> None:
    check_mutated_folders(copied, 8)


@pytest.mark.slow
def test_100_mutated_run_folders_end_in_an_answer_or_words(copied: Path) -> None:
    check_mutated_folders(copied, 100)


def check_mutated_folders(folder: Path, count: int) -> None:
    whole = folder.parent / "whole"
    shutil.copytree(folder, whole)
    names = sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != ".lock"
    )
    for number in range(count):
        choice = random.Random(number)
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)
        path = folder / choice.choice(names)
        content = bytearray(path.read_bytes())
        kind = choice.randrange(6)
        if kind == 0:
            path.unlink()
        elif kind == 1:
            folder_of_that_name(path)
        elif kind == 2:
            path.write_bytes(content[: choice.randrange(len(content))])
        elif kind == 3:
            path.write_bytes(choice.randbytes(200))
        else:
            for _ in range(3):
                content[choice.randrange(min(len(content), 3000))] = choice.randrange(256)
            path.write_bytes(content)
        out = folder.parent / "out"
        shutil.rmtree(out, ignore_errors=True)
        commands = [("train", "--resume", folder), ("eval", folder), ("export", folder, "-o", out / "x.pt")]
        commands += [("report", folder, "--no-memory", "--force", "-o", out / "x.html")]
        for command in commands if count > 50 else [choice.choice(commands)]:
            answer = invoke(*command)
            assert told_in_words(answer), (number, command[0], path.name, kind, answer.exception)


def test_nan_in_weights_is_named(copied: Path) -> None:
    path = copied / runs.BACKBONE
    model = runs.restore(copied)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = torch.nan
    runs.write_state(model, path)
    with pytest.raises(MissingError, match="backbone.safetensors contains NaN.\n  1 of "):
        evaluation.open_run(copied, device="cpu")
    with pytest.raises(LocalizeError, match="contains NaN"):
        model = recipes.load(copied).model
        run(TrainConfig(model, initial_checkpoint=str(path), output=str(copied.parent / "new"), **SETTINGS))
