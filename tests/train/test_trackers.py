"""TensorBoard and Weights & Biases hold the lines of metrics.jsonl, each once, also behind a resume."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from localize import recipes
from localize.errors import MissingError
from localize.train import TrainConfig, checkpoints, resume, run, runs, trackers

SETTINGS = {"recipe": "dcl", "augment": "crop2-flip", "epochs": 3, "batch_size": 512, "lr": 0.01}
History = list[dict[str, float]]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nothing leaves this machine, or is left in the home folder; the packages warn of what they use themselves."""
    for name, value in {"MODE": "offline", "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    for name in ("CONFIG_DIR", "CACHE_DIR", "DATA_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / "wandb" / name))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="(tensorboard|wandb|google)")
        yield


def config(folder: Path, **settings: Any) -> TrainConfig:
    return TrainConfig(
        "cifar/fc_mnist", input_shape=(1, 12, 12), device="cpu", output=str(folder), **{**SETTINGS, **settings}
    )


def in_tensorboard(folder: Path) -> History:
    """Return what TensorBoard shows, by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(folder))
    shown.Reload()
    found: dict[int, dict[str, float]] = {}
    for name in shown.Tags()["scalars"]:
        events = shown.Scalars(name)
        assert len({event.step for event in events}) == len(events), "none is there twice"
        for event in events:
            found.setdefault(event.step, {"step": event.step})[name] = event.value
    return [found[step] for step in sorted(found)]


def records(path: Path) -> Iterator[Any]:
    """Yield what an offline run of Weights & Biases has kept: records in the log format of LevelDB."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        parts, at = parts + content[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def in_wandb(folder: Path) -> History:
    """Return what the last start of the run has told, by step."""
    identifier = (folder / runs.WANDB_ID).read_text().strip()
    starts = (folder / "wandb").glob(f"offline-run-*/run-{identifier}.wandb")
    last = max(starts, key=lambda path: path.stat().st_mtime_ns)
    (about,) = (record.run for record in records(last) if record.WhichOneof("record_type") == "run")
    assert about.display_name == folder.name
    told = {item.key: json.loads(item.value_json) for item in about.config.update}
    assert told.items() >= yaml.safe_load((folder / recipes.FILE_NAME).read_text()).items()
    history = [record.history for record in records(last) if record.WhichOneof("record_type") == "history"]
    return [
        {"step": one.step.num} | {
            name: json.loads(item.value_json)
            for item in one.item
            if not (name := item.key or "/".join(item.nested_key)).startswith("_")
        }
        for one in history
    ]  # fmt: skip


@pytest.mark.parametrize(("package", "shown"), [("tensorboard", in_tensorboard), ("wandb", in_wandb)])
def test_every_epoch_is_told_once_and_nothing_else_changes(package: str, shown: Any, tmp_path: Path) -> None:
    pytest.importorskip(package)
    plain = run(config(tmp_path / "plain")).output
    folder = run(config(tmp_path / "told", **{f"log_{package}": True})).output
    check(folder, shown(folder))
    identifier = folder / runs.WANDB_ID
    known = identifier.read_text() if package == "wandb" else ""

    checkpoints.files(folder)[-1].unlink()  # as if it had been killed behind the last line, and before its checkpoint
    (folder / runs.METRICS).write_text((folder / runs.METRICS).read_text() + '{"epoch": 4')
    resume(folder)
    check(folder, shown(folder))
    for name in (runs.BACKBONE, runs.HEADS):
        assert (folder / name).read_bytes() == (plain / name).read_bytes()

    assert not known or identifier.read_text() == known

    run(config(folder, epochs=1, **{f"log_{package}": True}), force=True)
    check(folder, shown(folder))
    assert not known or identifier.read_text() != known


def check(folder: Path, history: History) -> None:
    lines = [json.loads(line) for line in (folder / runs.METRICS).read_text().splitlines()]
    assert [told["step"] for told in history] == [line["step"] for line in lines]
    for told, line in zip(history, lines, strict=True):
        assert told == pytest.approx({"step": line["step"], **trackers.numbers(line)}, rel=1e-6)
        for loss in line["segments"]:
            assert told[f"test_accuracy/{loss['name']}"] == pytest.approx(loss["test_accuracy"], rel=1e-6)


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_package_that_is_missing_is_named_before_anything_is_written(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    help = rf'--log-{package} needs the package {package}.*\n.*\n  help: pip install "torch-localize\[{package}\]"'
    with pytest.raises(MissingError, match=help):
        run(config(tmp_path / "run", **{f"log_{package}": True}))
    assert not list(tmp_path.iterdir())
