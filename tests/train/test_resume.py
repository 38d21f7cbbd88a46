"""A run that is killed, interrupted or out of room goes on as if nothing had happened, bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import localize
from localize import files, recipes
from localize.cli import app
from localize.errors import MissingError, RecipeError, VersionError
from localize.runtime.model import LocalModel
from localize.train import DivergedError, TrainConfig, checkpoints, loop, metrics, resume, run, runs

pytestmark = pytest.mark.lowest

NET = """
from torch import nn

class Net(nn.Sequential):
    input_shape = (1, 8, 8)

    def __init__(self, num_classes=10):
        layers = [nn.Flatten()]
        for _ in range(3):
            layers += [nn.LazyLinear(16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2)]
        super().__init__(*layers, nn.LazyLinear(num_classes))
        self(__import__("torch").zeros(2, 1, 8, 8))
"""
SHARED = {"recipe": "dcl", "opt": "adamw", "lr": 0.005, "epochs": 2, "batch_size": 128, "checkpoint_every": 3}
"""Several losses train one dictionary, each with its own moments; dropout draws numbers in every step."""
WHOLE = SHARED | {
    "recipe": "auglocal", "opt": "sgd", "grad_accum_steps": 2, "clip_grad": 0.5, "amp": True, "model_ema": True,
    "model_ema_decay": 0.9, "epochs": 3, "max_steps": 14,
}  # fmt: skip


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a small net of its own, as the current one."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "net.py").write_text(NET)
    before, threads = Path.cwd(), torch.get_num_threads()
    os.chdir(folder)
    torch.set_num_threads(1)
    yield folder
    os.chdir(before)
    torch.set_num_threads(threads)


def config(output: str, settings: dict[str, Any]) -> TrainConfig:
    return TrainConfig("net.py:Net", output=output, device="cpu", **settings)


@pytest.fixture(scope="module")
def undisturbed(here: Path) -> Path:
    return run(config("undisturbed", SHARED)).output


def test_a_checkpoint_says_its_version_and_one_of_0_1_0_is_taken_up(undisturbed: Path) -> None:
    """Version 0.1.0 wrote the same values, without a version."""
    folder = copied(undisturbed, "from-0.1.0")
    path = checkpoints.files(folder)[-1]
    values = torch.load(path, weights_only=True)
    assert values.pop("version") == files.VERSION
    torch.save(values, path)
    recipe = folder / recipes.FILE_NAME
    recipe.write_text(recipe.read_text().replace(f"version: {files.VERSION}\n", ""))

    resume(folder)

    assert lines(folder) == lines(undisturbed)


@pytest.mark.parametrize("version", [99, "2.0"])
def test_a_checkpoint_of_a_later_version_is_refused_with_both_versions(undisturbed: Path, version: Any) -> None:
    """And not passed over: an older checkpoint of the same run would be taken up, and its steps lost."""
    folder = copied(undisturbed, f"from-{version}")
    path = checkpoints.files(folder)[-1]
    torch.save({**torch.load(path, weights_only=True), "version": version}, path)

    with pytest.raises(VersionError, match=rf"{path.name}.*{version}(.*\n)*.*up to {files.VERSION}\.\n  help: "):
        resume(folder)


def copied(folder: Path, name: str) -> Path:
    return Path(shutil.copytree(folder, name))


def lines(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / runs.METRICS).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in found]


def check_same(folder: Path, other: Path) -> None:
    for name in (recipes.FILE_NAME, runs.HEADS, str(runs.BACKBONE)):
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    assert lines(folder) == lines(other)


@contextmanager
def at_step(number: int, act: Callable[[], Any]) -> Iterator[None]:
    """Do something in the middle of a step of whatever is trained."""
    step, calls = LocalModel.step, [0]

    def acting(self: LocalModel, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            act()
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalModel, "step", acting)
        yield


def interrupted(output: str, settings: dict[str, Any], step: int, number: signal.Signals = signal.SIGINT) -> Path:
    """Train until a signal comes in the middle of a step."""
    with at_step(step, lambda: os.kill(os.getpid(), number)), pytest.raises(KeyboardInterrupt):
        run(config(output, settings))
    return Path(output)


def train_in_a_process(output: str) -> None:
    torch.set_num_threads(1)
    if Path(output).exists():
        resume(output)
    else:
        run(config(output, SHARED))


def test_a_run_that_is_killed_again_and_again_ends_like_one_that_is_not(
    undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__, "sklearn.datasets"])
    moments = random.Random(date.today().isoformat())
    killed = Path("killed")
    for last in (*sorted(moments.sample(range(3, 16), 2)), None):  # 11 steps an epoch
        process = processes.Process(target=train_in_a_process, args=(str(killed),))
        process.start()
        while process.is_alive() and (
            last is None or not any(checkpoints.step_of(f) >= last for f in files_of(killed))
        ):
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.02))
        if last is not None:
            assert process.is_alive()
            process.kill()
        process.join()
        assert process.exitcode == (0 if last is None else -signal.SIGKILL)
    check_same(killed, undisturbed)
    assert len(files_of(killed)) == checkpoints.KEPT
    assert sorted(path.name for path in (killed / checkpoints.FOLDER).iterdir()) == [f.name for f in files_of(killed)]


def test_no_two_processes_train_into_one_folder(undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__, "sklearn.datasets"])
    folder = Path("taken")
    process = processes.Process(target=train_in_a_process, args=(str(folder),))
    process.start()
    while process.is_alive() and not files_of(folder):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGSTOP)
    half = folder / checkpoints.FOLDER / ".step-00000099-1.pt"
    half.write_bytes(b"being written")
    try:
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        refused = r"another process is training into taken.\n  it holds taken/.lock.*\n  help: another --output; or"
        with pytest.raises(MissingError, match=refused):
            resume(folder)
        with pytest.raises(MissingError, match=refused):
            run(config("taken", SHARED), force=True)
        values_of(folder)  # what other processes than the first of a refused team read
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    finally:
        process.kill()
        process.join()
    resume(folder)
    assert not half.exists()
    check_same(folder, undisturbed)


def test_a_folder_in_which_nothing_but_a_lock_is_left_is_free(tmp_path: Path) -> None:
    with runs.locked(tmp_path / "new"):
        assert runs.named(str(tmp_path / "new")) == tmp_path / "new"
    with runs.locked(tmp_path / "new"):
        (tmp_path / "new" / "notes.txt").write_text("mine")
        with pytest.raises(MissingError, match=r"is not empty.\n  it contains notes.txt.\n"):
            runs.named(str(tmp_path / "new"))


def files_of(folder: Path) -> list[Path]:
    return checkpoints.files(folder)


def values_of(folder: Path) -> dict[str, Any]:
    return checkpoints.read(files_of(folder)[-1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_leaves_a_checkpoint_and_says_how_to_go_on(
    undisturbed: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    folder = interrupted(f"by-{number.name}", SHARED, 16, number)
    assert signal.getsignal(number) == before
    assert files_of(folder)[-1].name == "step-00000016.pt"
    assert f"to continue: localize train --resume {folder}" in capsys.readouterr().err
    assert not (folder / runs.BACKBONE).exists()
    answer = CliRunner().invoke(app, ["train", "--resume", str(folder)])
    assert answer.exit_code == 0, answer.output
    assert "16 steps done, 5 batches into epoch 2" in answer.stdout
    check_same(folder, undisturbed)


def test_a_signal_during_the_test_of_an_epoch_costs_nothing_of_the_epoch(
    undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def scores(self: LocalModel, x: Any, original: Any = LocalModel.scores) -> Any:
        if not asked:
            os.kill(os.getpid(), signal.SIGINT)
        asked.append(1)
        return original(self, x)

    monkeypatch.setattr(LocalModel, "scores", scores)
    with pytest.raises(KeyboardInterrupt):
        run(config("tested", SHARED))
    assert len(asked) == 1
    assert not (Path("tested") / runs.METRICS).exists()
    assert files_of(Path("tested"))[-1].name == "step-00000011.pt"
    resume("tested")
    check_same(Path("tested"), undisturbed)


class Steep(nn.Module):
    """A small net whose gradients overflow in float16 until the scale has been halved some times."""

    input_shape = (1, 8, 8)

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 16), nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x.flatten(1)).relu()) * 300


class Bottomless(Steep):
    """The same, and its gradients are no numbers at any scale."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0 * (0 * self.first.bias).sum().sqrt()


def test_float16_goes_on_with_the_scale_that_it_has_come_to(here: Path) -> None:
    settings = SHARED | {"amp": True, "amp_dtype": "float16", "epochs": 1, "lr": 1e-4}
    whole = run(TrainConfig(f"{__file__}:Steep", output="steep", device="cpu", **settings)).output
    scale = lines(whole)[-1]["loss_scale"]
    assert scale < 2.0**15, "it has been halved more than once"
    with at_step(4, lambda: os.kill(os.getpid(), signal.SIGINT)), pytest.raises(KeyboardInterrupt):
        run(TrainConfig(f"{__file__}:Steep", output="steep-again", device="cpu", **settings))
    values = values_of(Path("steep-again"))
    assert scale <= values["scaler"]["scale"] < 2.0**16, "in the middle of it"
    resume("steep-again")
    check_same(Path("steep-again"), whole)


def test_a_scale_that_falls_to_nothing_ends_the_run(here: Path) -> None:
    settings = {"amp": True, "amp_dtype": "float16", "epochs": 1, "batch_size": 16, "max_steps": 60}
    with pytest.raises(DivergedError, match="the scale of the losses fell to 6e-11 by step 50"):
        run(TrainConfig(f"{__file__}:Bottomless", output="bottomless", device="cpu", **settings))


def test_every_setting_of_the_loop_goes_on_where_it_was(here: Path) -> None:
    whole = run(config("whole", WHOLE)).output
    assert [line["step"] for line in lines(whole)] == [6, 12, 14]
    folder = interrupted("again", WHOLE, 16)
    assert files_of(folder)[-1].name == "step-00000009.pt"  # two batches a step, 11 an epoch: the last stands alone
    resume(folder)
    check_same(folder, whole)


def test_images_are_mixed_as_if_the_run_had_not_stopped(here: Path) -> None:
    mixed = SHARED | {"mixup": 0.2, "cutmix": 1.0}
    whole = run(config("mixed-whole", mixed)).output

    folder = interrupted("mixed-stopped", mixed, 15)
    resume(folder)

    check_same(folder, whole)


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def flip(path: Path) -> None:
    """Change a byte in the middle of the largest record, where no padding is."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        record = max(archive.infolist(), key=lambda one: one.file_size)
    begins = record.header_offset + 30 + sum(struct.unpack("<HH", content[record.header_offset + 26 :][:4]))
    content[begins + record.file_size // 2] ^= 1
    path.write_bytes(content)


def other(path: Path) -> None:
    torch.save({"state_dict": {}}, path)


@pytest.mark.parametrize(
    ("damage", "told"), [(tear, "incomplete"), (flip, "damaged"), (other, "not a checkpoint that")]
)
def test_a_file_that_is_not_whole_is_passed_over_by_name(
    undisturbed: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], told: str
) -> None:
    folder = interrupted(f"with-{damage.__name__}", SHARED, 16)
    before, last = files_of(folder)
    damage(last)
    capsys.readouterr()
    resume(folder)
    out, err = capsys.readouterr()
    assert re.match(f"skipped: {last} is .*{told}", err)
    assert f"resuming from {before}: 15 steps done" in out
    check_same(folder, undisturbed)


def test_without_any_whole_checkpoint_nothing_is_begun_anew(here: Path) -> None:
    folder = interrupted("hopeless", SHARED, 5)
    for path in files_of(folder):
        tear(path)
    with pytest.raises(
        MissingError, match=r"no checkpoint in .* is intact.\n  .*step-00000005.pt is incomplete.*\n  .*00003"
    ):
        resume(folder)
    assert len(files_of(folder)) == 2


def test_a_full_disk_leaves_the_last_checkpoint_and_is_named(undisturbed: Path) -> None:
    size = files_of(undisturbed)[-1].stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with (
            at_step(14, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))),
            pytest.raises(MissingError, match=r"step 15 cannot be written.*\n  .*\n  the last one is step-00000012.pt"),
        ):
            run(config("full", SHARED))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    folder = Path("full")
    assert [path.name for path in (folder / checkpoints.FOLDER).iterdir()] in (
        ["step-00000011.pt", "step-00000012.pt"],
        ["step-00000012.pt", "step-00000011.pt"],
    )
    resume(folder)
    check_same(folder, undisturbed)


def test_lines_that_do_not_fit_on_the_disk_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.append_metrics(tmp_path, {"epoch": 1})
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, line: write(descriptor, line[:3]))
    with pytest.raises(MissingError, match="metrics.jsonl cannot be written to .*\n.*No space.*\n  help: make room"):
        runs.append_metrics(tmp_path, {"epoch": 2})
    assert (tmp_path / runs.METRICS).read_text() == '{"epoch": 1}\n'


def test_a_full_disk_is_told_where_the_table_is_written(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
    try:
        with pytest.raises(MissingError, match="segments.csv cannot be written to .*\n.*\n  help: make room"):
            metrics.write_segments(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_belongs_to_the_statements_of_its_text() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    local = localize.transform(net, "dgl", example_input=torch.empty(1, 4), cut=localize.CutSpec(2, by="node"))
    told = local.source.replace('"""Return', '"""Compute\n\n    and return').replace("def ", "\n# A remark.\ndef ", 1)
    changed = local.source.replace("backward()", "backward(retain_graph=True)", 1)

    assert told != local.source != changed
    assert loop.statements_of(told) == loop.statements_of(local.source) != loop.statements_of(changed)
    assert '"""' not in loop.statements_of(local.source)


@pytest.mark.parametrize(
    ("file", "change", "error", "message"),
    [
        ("begun/recipe.yaml", ("lr: 0.005", "lr: 0.1"), RecipeError, "has changed since .*\n  was: lr: 0.005\n  is"),
        ("net.py", ("nn.ReLU()", "nn.Hardtanh()"), MissingError, "belongs to another training step"),
        ("net.py", ("16", "8"), MissingError, "belongs to another training step"),
        (
            "net.py",
            ("nn.Dropout(0.2)", "nn.Sequential(nn.Dropout(0.2))"),
            MissingError,
            "belongs to another training step",
        ),
    ],
)
def test_what_has_changed_since_the_checkpoint_is_refused(
    here: Path, file: str, change: tuple[str, str], error: type[Exception], message: str
) -> None:
    begun = Path("begun") if Path("begun").exists() else interrupted("begun", SHARED, 5)
    text, kept = Path(file).read_text(), files_of(begun)
    Path(file).write_text(text.replace(*change))
    loaded = sys.modules.pop("localize_file_net")
    try:
        with pytest.raises(error, match=message):
            resume(begun, trust_code=True)
    finally:
        Path(file).write_text(text)
        sys.modules["localize_file_net"] = loaded
    assert files_of(begun) == kept


@pytest.mark.parametrize("left", ["", '{"epoch": 1, "st', "no metrics\n"])
def test_metrics_that_are_damaged_are_restored_from_the_checkpoint(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], left: str
) -> None:
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    whole = (folder / runs.METRICS).read_text()
    (folder / runs.METRICS).write_text(left)
    resume(folder)
    assert (folder / runs.METRICS).read_text() == whole
    assert "metrics.jsonl was damaged or missing; restored from the checkpoint" in capsys.readouterr().err


def test_lines_beyond_the_checkpoint_are_dropped(undisturbed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    content = (folder / runs.METRICS).read_bytes()
    (folder / runs.METRICS).write_bytes(content + b'{"epoch": 4, "st')
    resume(folder)
    assert (folder / runs.METRICS).read_bytes() == content


def test_without_a_checkpoint_a_run_begins_and_a_recipe_of_no_run_is_refused(here: Path, undisturbed: Path) -> None:
    runs.start(Path("early"), recipes.load(undisturbed))
    resume("early")
    check_same(Path("early"), undisturbed)
    Path("converted").mkdir()
    (Path("converted") / recipes.FILE_NAME).write_text("model: net.py:Net\nmethod: dcl\n")
    with pytest.raises(MissingError, match="no run has been started in converted"):
        resume("converted")
    with pytest.raises(MissingError, match="is not the folder of a run"):
        resume("nowhere")


def test_what_diverges_leaves_the_last_good_checkpoint(here: Path) -> None:
    settings = SHARED | {"opt": "sgd", "lr": 1e30, "warmup_epochs": 1, "checkpoint_every": 1}
    with pytest.raises(DivergedError, match=r"(loss of segment_\d|weights \S+) became"):
        run(config("diverged", settings))
    assert files_of(Path("diverged"))
    values = values_of(Path("diverged"))
    assert all(value.isfinite().all() for value in values["model"].values())


def test_resume_takes_no_other_argument(here: Path) -> None:
    for given in (["--lr", "0.1"], ["--output", "x"], ["net.py:Net"], ["--force"], ["--amp"]):
        answer = CliRunner().invoke(app, ["train", "--resume", "undisturbed", *given])
        assert answer.exit_code == 2
        assert "--resume allows no arguments except" in answer.stderr


def test_a_temporary_file_is_gone_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk"), files.replacing(tmp_path / "a.pt") as temporary:
        temporary.write_bytes(b"half")
        raise OSError("disk")
    assert not list(tmp_path.iterdir())
