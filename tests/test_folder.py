"""The folder of convert: complete, deterministic, written in one step, audited as it lies there."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from localize import build, folder, recipes
from localize.auditor import static
from localize.errors import LocalizeError, MissingError, RecipeError, VersionError
from localize.files import VERSION
from localize.ir import CutSpec
from localize.recipes import Recipe
from localize.runtime.model import LocalModel

SMALL = Recipe("dcl", model="cifar/conv256")
OLD = Path(__file__).parent / "corpus" / "folder_0.1.0"
"""What ``localize convert cifar/resnet20 --method dcl -K 2 --input-shape 3,8,8`` of version 0.1.0 has written."""
DEEP = Recipe("auglocal", {"d": 3}, model="cifar/resnet20")


@pytest.fixture(scope="module")
def small() -> LocalModel:
    return build.build(SMALL)


@pytest.fixture(scope="module")
def deep() -> LocalModel:
    return build.build(DEEP)


def write(local: LocalModel, path: Path, *, force: bool = False) -> Path:
    return folder.write(local, SMALL, static(local), path, force=force)


def contents(path: Path) -> dict[str, bytes]:
    return {child.name: child.read_bytes() for child in path.iterdir()}


# ------------------------------------------------------------------------------------------------------- plan.json


def test_the_plan_has_the_promised_keys(deep: LocalModel) -> None:
    plan = folder.describe(deep)
    promised = {"model", "method", "options", "input_shape", "num_classes", "segments", "losses", "blocks", "totals"}
    assert promised <= set(plan)
    assert (plan["model"], plan["method"], plan["options"]["d"]) == ("cifar/resnet20", "auglocal", 3)
    assert (plan["input_shape"], plan["num_classes"]) == ([3, 32, 32], 10)
    assert {"index", "name", "parameters"} <= set(plan["segments"][0])
    assert {"name", "route", "head", "weight", "reach"} <= set(plan["losses"][0])
    assert {"name", "role", "parameters", "macs"} <= set(plan["blocks"][0])
    assert {"trunk_parameters", "training_parameters", "trunk_macs", "training_macs"} <= set(plan["totals"])
    assert json.loads(json.dumps(plan)) == plan


def test_the_plan_counts_what_is_there(deep: LocalModel) -> None:
    plan = folder.describe(deep)
    totals, blocks = plan["totals"], {block["name"]: block for block in plan["blocks"]}
    assert totals["trunk_parameters"] == sum(p.numel() for p in deep.trunk.parameters()) == 272_474
    assert totals["training_parameters"] == sum(p.numel() for p in deep.parameters())
    assert sum(segment["parameters"] for segment in plan["segments"]) == totals["trunk_parameters"]
    assert totals["trunk_macs"] == 40_813_184
    assert totals["training_macs"] == sum(block["macs"] for block in plan["blocks"])
    assert blocks["head_0"]["sampled"] == [4, 9]
    assert [loss["route"] for loss in plan["losses"]] == [[k, k] for k in range(8)]
    assert plan["losses"][0]["reach"] == ["segment_0", "head_0"]
    assert plan["losses"][-1]["head"] is None


def test_without_a_head_there_is_null(deep: LocalModel) -> None:
    plan = folder.describe(build.build(Recipe("backprop", model="cifar/conv256")))
    assert [(loss["head"], loss["route"], loss["weight"]) for loss in plan["losses"]] == [(None, [0, 0], 1.0)]
    assert plan["totals"]["trunk_macs"] == plan["totals"]["training_macs"]
    assert plan["totals"]["trunk_parameters"] == plan["totals"]["training_parameters"]


# ---------------------------------------------------------------------------------------------------------- writing


def test_the_folder_is_complete(small: LocalModel, tmp_path: Path) -> None:
    path = write(small, tmp_path / "out")
    assert sorted(contents(path)) == sorted(folder.FILES)
    assert (path / "train_step.py").read_text() == small.source
    assert json.loads((path / "plan.json").read_text()) == folder.describe(small)
    assert json.loads((path / "audit.json").read_text())["ok"] is True
    rows = list(csv.DictReader(io.StringIO((path / "ownership.csv").read_text())))
    assert {row["parameter"] for row in rows} == {name for name, _ in small.named_parameters()}
    assert (path / "graph.svg").read_text().startswith("<svg ")


def test_its_recipe_is_whole_and_makes_the_same_again(small: LocalModel, tmp_path: Path) -> None:
    path = write(small, tmp_path / "out")
    recipe = recipes.load(path)
    assert (recipe.model, recipe.num_classes, recipe.input_shape) == ("cifar/conv256", 10, (3, 32, 32))
    assert dict(recipe.options) == dict(small.plan.options)
    assert build.build(recipe).source == small.source


def test_the_same_recipe_gives_the_same_bytes_and_no_trace_of_where_or_when(tmp_path: Path) -> None:
    first = write(build.build(SMALL), tmp_path / "one")
    second = write(build.build(SMALL), tmp_path / "two")
    assert contents(first) == contents(second)
    text = b"".join(contents(first).values()).decode()
    assert str(tmp_path) not in text
    assert not re.search(r"0x[0-9a-f]{6,}|\d{4}-\d\d-\d\d|\d\d:\d\d:\d\d", text)


def test_the_card_runs(small: LocalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(small, tmp_path / "out")
    monkeypatch.chdir(path)
    (code,) = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    local = names["local"]
    assert isinstance(local, LocalModel)
    result = local.step(*build.random_batch(local), names["optimizer"])
    assert result.logits.shape == (4, 10)


def test_an_existing_folder_is_not_touched(small: LocalModel, tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.mkdir()
    (path / "mine").write_text("mine")
    for force in (False, True):
        with pytest.raises(MissingError, match="out"):
            write(small, path, force=force)
    assert contents(path) == {"mine": b"mine"}
    assert [child.name for child in tmp_path.iterdir()] == ["out"]


def test_force_replaces_what_convert_wrote(small: LocalModel, tmp_path: Path) -> None:
    path = write(small, tmp_path / "out")
    before = contents(path)
    (path / "train_step.py").write_text("edited")
    with pytest.raises(MissingError, match="--force"):
        write(small, path)
    write(small, path, force=True)
    assert contents(path) == before
    assert [child.name for child in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("failing", ["rename", "write", "interrupt"])
def test_a_failure_leaves_everything_as_it_was(
    existing: bool, failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "out"
    if existing:
        folder.write_files({"plan.json": "old"}, path)
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if target == path and self.name != "old":
            raise OSError("no space left")
        return real(self, target)

    def fsync(descriptor: int) -> None:
        raise OSError("no space left") if failing == "write" else KeyboardInterrupt

    if failing == "rename":
        monkeypatch.setattr(Path, "rename", rename)
    else:
        monkeypatch.setattr(folder.os, "fsync", fsync)
    with pytest.raises(KeyboardInterrupt if failing == "interrupt" else MissingError):
        folder.write_files({"plan.json": "new", "train_step.py": "new"}, path)

    monkeypatch.undo()
    assert contents(path) == {"plan.json": b"old"} if existing else list(tmp_path.iterdir()) == []
    assert not existing or [child.name for child in path.parent.iterdir()] == ["out"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MissingError, match=r"file/out cannot be written") as caught:
        folder.write_files({"a": ""}, tmp_path / "file" / "out")
    assert caught.value.exit_code == 4


# ---------------------------------------------------------------------------------------------------------- reading


def test_a_folder_audits_as_it_was_written(small: LocalModel, tmp_path: Path) -> None:
    path = write(small, tmp_path / "out")
    local, report = folder.reaudit(path)
    report.raise_if_failed()
    assert local.source == small.source
    assert any(check.id.startswith("measured") for check in report.checks)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("return h_0.detach()", "return h_0"),
        ("loss_0.backward()", "pass"),
        ("segment_1(trunk, x)", "segment_1(trunk, y)"),
    ],
)
def test_an_edited_step_is_what_is_audited(old: str, new: str, small: LocalModel, tmp_path: Path) -> None:
    path = write(small, tmp_path / "out")
    text = (path / "train_step.py").read_text()
    assert old in text
    (path / "train_step.py").write_text(text.replace(old, new, 1))
    _, report = folder.reaudit(path)
    assert not report.ok


def test_a_step_that_is_not_python_is_a_failing_check_that_names_the_line(small: LocalModel, tmp_path: Path) -> None:
    path = write(small, tmp_path / "out")
    lines = (path / "train_step.py").read_text().splitlines()
    lines.insert(10, "def def (")
    (path / "train_step.py").write_text("\n".join(lines))
    _, report = folder.reaudit(path)
    failed = [check for check in report.checks if not check.ok]
    assert failed
    assert "line 11" in failed[0].evidence


def test_a_step_that_the_audit_cannot_read_is_not_run(small: LocalModel, tmp_path: Path) -> None:
    path = write(small, tmp_path / "out")
    trace = tmp_path / "ran"
    with open(path / "train_step.py", "a") as file:
        file.write(f"\nopen({str(trace)!r}, 'w').close()\n")
    _, report = folder.reaudit(path)
    assert not report.ok
    assert not trace.exists()


def test_recipe_plan_and_audit_say_the_version_of_the_interface(small: LocalModel, tmp_path: Path) -> None:
    path = write(small, tmp_path / "out")

    assert json.loads((path / "plan.json").read_text())["version"] == VERSION
    assert json.loads((path / "audit.json").read_text())["version"] == VERSION
    assert yaml.safe_load((path / "recipe.yaml").read_text())["version"] == VERSION


def test_a_folder_that_0_1_0_has_written_still_audits() -> None:
    """It says no version anywhere; its text calls what it called then."""
    written = {name: (OLD / name).read_text() for name in ("recipe.yaml", "plan.json", "audit.json", "train_step.py")}
    assert not any('"version":' in text or "version:" in text for text in written.values())

    local, report = folder.reaudit(OLD)

    report.raise_if_failed()
    assert local.source == written["train_step.py"]
    before = {check["id"] for check in json.loads(written["audit.json"])["checks"]}
    assert before <= {check.id for check in report.checks}


@pytest.mark.parametrize("name", ["recipe.yaml", "plan.json", "audit.json"])
def test_a_folder_of_a_later_version_is_refused_with_both_versions(
    name: str, small: LocalModel, tmp_path: Path
) -> None:
    path = write(small, tmp_path / "out")
    text = (path / name).read_text()
    (path / name).write_text(re.sub(r'(?m)^( *"?version"?: )\d+', r"\g<1>99", text, count=1))
    error = RecipeError if name == "recipe.yaml" else VersionError

    with pytest.raises(error, match=rf"{name} is of version 99(.*\n)*.*up to {VERSION}\.(.*\n)*  help: pip install"):
        folder.reaudit(path)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ('{"version": "2.0"}', VersionError, "cannot be '2.0'"),
        ('{"version": true}', VersionError, "cannot be True"),
        ("[]", MissingError, "holds a list"),
        ("{", MissingError, "is not JSON"),
        ("[" * 100_000, MissingError, "is not JSON"),
        ("\udc80", MissingError, "is not JSON"),
    ],
)
def test_a_plan_that_is_none_is_refused_in_words(
    text: str, error: type[LocalizeError], message: str, small: LocalModel, tmp_path: Path
) -> None:
    path = write(small, tmp_path / "out")
    (path / "plan.json").write_bytes(text.encode("utf-8", "surrogateescape"))

    with pytest.raises(error, match=rf"plan.json(.*\n)*.*{message}(.*\n)*  help: "):
        folder.reaudit(path)


@pytest.mark.parametrize("name", ["recipe.yaml", "train_step.py"])
def test_a_missing_file_is_named(name: str, small: LocalModel, tmp_path: Path) -> None:
    path = write(small, tmp_path / "out")
    (path / name).unlink()
    with pytest.raises(MissingError, match=f"it has no {name}"):
        folder.reaudit(path)
    with pytest.raises(MissingError, match="there is no such folder"):
        folder.reaudit(tmp_path / "nowhere")


def test_a_recipe_without_a_model_cannot_be_built() -> None:
    with pytest.raises(RecipeError, match="does not say which model"):
        build.build(Recipe("backprop"))


def test_cuts_and_shapes_of_the_recipe_are_kept() -> None:
    recipe = Recipe("dcl", model="cifar/resnet20", cut=CutSpec(2), input_shape=(3, 16, 16), num_classes=7)
    local = build.build(recipe)
    again = build.build(folder.resolved(local, recipe))
    assert (len(again.plan.segments), again.plan.segments.trunk.input_shape) == (2, (3, 16, 16))
    assert again(torch.zeros(2, 3, 16, 16)).shape == (2, 7)
    assert folder.resolved(local, recipe) == dataclasses.replace(folder.resolved(again, recipe), cut=CutSpec(2))
