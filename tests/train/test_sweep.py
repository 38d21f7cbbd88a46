"""A sweep trains every recipe with every seed, once, and puts what it finds beside the paper's number."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from localize.cli import app
from localize.errors import LocalizeError, MissingError, OptionError
from localize.train import ledger, loop, metrics, runs, sweep

TINY = """
model: cifar/fc_mnist
input_shape: [1, 8, 8]
method: {method}
train: {{epochs: 1, max_steps: {steps}, batch_size: 32, lr: {lr}, device: cpu}}
expected:
- {{metric: test_accuracy of layer 1, value: 0.1, source: nowhere}}
- {{metric: test_accuracy, value: 0.9876, epoch: best, source: Table 9}}
"""


@pytest.fixture(autouse=True)
def _two_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("one.yaml").write_text(TINY.format(method="backprop", steps=3, lr=0.05))
    Path("two.yaml").write_text(TINY.format(method="dcl", steps=3, lr=0.005))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["compare", "--train", *arguments])


def by_depth(folders: list[Path]) -> list[float]:
    """Return the mean test accuracy of every loss in the last epochs of runs."""
    last = [metrics.read(folder)[-1].segments for folder in folders]
    return [statistics.mean(one.test_accuracy for one in losses) for losses in zip(*last, strict=True)]


def test_methods_are_trained_on_a_model_without_recipes() -> None:
    words = ["cifar/fc_mnist", "--methods", "dcl:moments=shared,dcl", "-K", "3", "--data", "digits", "--seeds", "2"]

    printed = run(*words, "--max-steps", "2", "-o", "out")

    assert printed.exit_code == 0, printed.output
    folders = [Path("out") / f"{name}-seed{seed}" for name in ("dcl-moments-shared", "dcl") for seed in (0, 1)]
    head, *rows = printed.stdout.splitlines()
    assert "by depth, %" in head
    for row, mine in zip(rows, (folders[:2], folders[2:]), strict=True):
        depths = by_depth(mine)
        assert len(depths) == 3
        assert "  " + " ".join(f"{100 * one:.2f}" for one in depths) + "  " in row
    lines = ledger.read(Path("out/runs.jsonl"))
    command = "localize compare --train cifar/fc_mnist --methods dcl:moments=shared -K 3 --seeds 2"
    assert lines[0].command == f"{command} --data digits --max-steps 2"
    assert [line.recipe for line in lines] == ["dcl-moments-shared", "dcl"] * 2
    found = json.loads(run(*words, "--max-steps", "2", "-o", "out", "--json").stdout)["rows"]
    assert list(found[0]["depths"].values()) == pytest.approx(by_depth(folders[:2]))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["resnet20", "resnet32", "--methods", "dcl"], "--methods are trained on one model."),
        (["resnet20", "--methods", "dcl", "--recompute", "all"], "only cuts can be given"),
        (["one.yaml", "-K", "3"], "--train takes recipes as they are"),
        (["one.yaml", "--amp"], "--train takes recipes as they are"),
    ],
)
def test_what_beside_train_says_nothing_to_it_is_refused(words: list[str], told: str) -> None:
    answer = run(*words)
    assert answer.exit_code == 2
    assert told in answer.stderr
    assert not Path("runs").exists()


def test_of_many_depths_five_are_shown() -> None:
    from localize.cli.training import _spread

    assert _spread([0.0, 1.0, 2.0]) == [0.0, 1.0, 2.0]
    assert _spread(list(range(54))) == [0, 13, 26, 40, 53]
    assert _spread([]) == []


def test_a_sweep_is_tabulated_and_goes_on_where_it_stopped() -> None:
    printed = run("one.yaml", "two.yaml", "--seeds", "2", "--output", "out")
    assert printed.exit_code == 0, printed.output
    folders = [Path("out") / f"{name}-seed{seed}" for name in ("one", "two") for seed in (0, 1)]
    assert sorted(Path("out").iterdir()) == [*folders[:2], Path("out/runs.jsonl"), *folders[2:]]
    accuracies = [json.loads((folder / runs.METRICS).read_text())["test_accuracy"] for folder in folders]
    head, one, two, *sources = printed.stdout.splitlines()
    assert head.split("  ")[0] == "recipe" and "last epoch, %" in head and "best epoch, %" in head
    for line, name, found in ((one, "one", accuracies[:2]), (two, "two", accuracies[2:])):
        mean, std = 100 * statistics.mean(found), 100 * statistics.stdev(found)
        shown = [f"{mean:.2f}", f"{std:.2f}"]  # of a single epoch, which is the last and the best
        depths = [f"{100 * one:.2f}" for one in by_depth([folder for folder in folders if name in folder.name])]
        assert line.split()[: 9 + len(depths)] == [name, *shown, *shown, *depths, "2", "98.76", "best", "0.00"]
        assert line.endswith("cores")
    assert sources == ["one: Table 9", "two: Table 9"]

    kept = {folder: (folder / runs.BACKBONE).stat().st_mtime_ns for folder in folders}
    (folders[3] / runs.BACKBONE).unlink()  # as if it had been interrupted
    (folders[0] / runs.COST).unlink()  # as if localize train --resume had finished it
    again = run("one.yaml", "two.yaml", "--seeds", "2", "--output", "out", "--json")
    found = json.loads(again.stdout)
    assert "run 4 of 4: out/two-seed1" in again.stderr and again.stderr.count("run ") == 1
    assert "resuming from out/two-seed1/checkpoints/" in again.stderr
    assert [list(row["accuracies"].values()) for row in found["rows"]] == [accuracies[:2], accuracies[2:]]
    assert {folder for folder in folders if (folder / runs.BACKBONE).stat().st_mtime_ns == kept[folder]} == {
        *folders[:3]
    }


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (runs.METRICS, "", "out/one-seed0 has no metrics.jsonl"),
        (runs.COST, "[]", "out/one-seed0/cost.json does not contain the cost of a run"),
    ],
)
def test_what_a_finished_run_does_not_tell_is_named(name: str, content: str, message: str) -> None:
    run("one.yaml", "--seeds", "1", "--output", "out")
    Path("out/one-seed0", name).write_text(content)
    with pytest.raises(MissingError, match=message):
        sweep.sweep(sweep.plan(["one.yaml"], 1, "out"))


def test_a_run_that_diverges_is_told_and_the_others_are_run() -> None:
    Path("one.yaml").write_text(TINY.format(method="backprop", steps=9, lr=1e30))
    printed = run("one.yaml", "two.yaml", "--seeds", "1", "--output", "out")
    assert printed.exit_code == 1
    _, one, two, *rest = printed.stdout.splitlines()
    assert one.split() == ["one", "0", "98.76", "best", "0.00"]
    assert two.split()[3 + len(by_depth([Path("out/two-seed0")]))] == "1"  # no standard deviation of one run
    assert [line.recipe for line in ledger.read(Path("out/runs.jsonl"))] == ["two"]
    assert rest[0].startswith("one, seed 0: the loss of segment_0 became ")


def test_every_finished_run_is_a_line_of_the_book_once() -> None:
    Path("one.yaml").write_text(TINY.format(method="backprop", steps=90, lr=0.05).replace("epochs: 1", "epochs: 2"))
    for seeds in ("1", "2"):  # the second time, seed 0 has finished and is in the book
        printed = run("one.yaml", "--seeds", seeds, "--epochs", "2", "--output", "out", "--results", "book/runs.jsonl")
        assert printed.exit_code == 0, printed.output

    lines = ledger.read(Path("book/runs.jsonl"))

    assert [(line.recipe, line.seed, line.data, line.images) for line in lines] == [
        ("one", 0, "digits", (1437, 360)), ("one", 1, "digits", (1437, 360)),
    ]  # fmt: skip
    for line in lines:
        epochs = metrics.read(Path(f"out/one-seed{line.seed}"))
        accuracies = [epoch.test_accuracy for epoch in epochs]
        assert (line.last, line.best) == (accuracies[-1], max(accuracies))
        assert line.epochs == len(epochs) == 2
        assert accuracies[line.best_epoch - 1] == line.best
        assert set(line.versions) >= {"localize", "torch"} and line.core_hours >= 0 and line.machine
    (trial,) = sweep.plan(["one.yaml"], 1, "out", epochs=2)
    assert lines[0].hash == lines[1].hash == sweep.digest(loop.merge(trial.config))
    assert lines[1].command == "localize compare --train one.yaml --seeds 2 --epochs 2"
    assert not Path("out/runs.jsonl").exists()


def test_a_run_that_the_book_has_from_elsewhere_is_not_repeated() -> None:
    Path("one.yaml").write_text(TINY.format(method="backprop", steps=45, lr=0.05))
    there = ("one.yaml", "--results", "runs.jsonl", "--json")
    first = json.loads(run(*there, "--seeds", "1", "--output", "there").stdout)["rows"][0]

    both = run(*there, "--seeds", "2", "--output", "here")
    (row,) = json.loads(both.stdout)["rows"]

    assert "run 1 of 2: already in runs.jsonl" in both.stderr
    assert not Path("here/one-seed0").exists()
    assert row["accuracies"]["0"] == first["accuracies"]["0"]
    assert set(row["accuracies"]) == {"0", "1"}
    assert row["folders"] == ["here/one-seed1"]
    other = run(*there, "--seeds", "1", "--output", "here", "--epochs", "2")  # is another run
    assert other.exit_code == 0, other.output
    assert Path("here/one-seed0").is_dir()


def test_the_hash_of_a_run_is_that_of_what_it_learns() -> None:
    def digest(**settings: object) -> str:
        (trial,) = sweep.plan(["one.yaml"], 1, "out", **settings)
        return sweep.digest(loop.merge(trial.config))

    other = Path("other.yaml")
    other.write_text(TINY.format(method="dfa", steps=3, lr=0.05) + "options: {scale: 2.0}")
    (trial,) = sweep.plan(["other.yaml"], 1, "out")

    assert digest() == digest(device="cpu", data_dir="elsewhere") == digest(epochs=1)
    assert len({digest(), digest(epochs=3), sweep.digest(loop.merge(trial.config))}) == 3


def test_the_hash_of_a_run_stays_the_same_when_a_method_gets_an_option_that_is_off() -> None:
    (trial,) = sweep.plan(["dcl-s-fc-mnist"], 1, "runs")
    recipe = loop.merge(trial.config)

    def digest(**options: object) -> str:
        return sweep.digest(dataclasses.replace(recipe, options={**recipe.options, **options}))

    assert digest(later=0) == digest(later=False) == digest()
    assert len({digest(later=1), digest(later=0.0), digest()}) == 3


def test_a_line_that_is_no_run_is_named() -> None:
    Path("book.jsonl").write_text('{"recipe": "one"}\n')
    with pytest.raises(MissingError, match="line 1 of book.jsonl is not a finished run"):
        ledger.read(Path("book.jsonl"))


def test_runs_of_something_else_are_not_taken_for_those_that_are_asked_for() -> None:
    (trial,) = sweep.plan(["one.yaml"], 1, "out")
    sweep.sweep([trial])
    assert sweep.plan(["one.yaml"], 1, "out", device="auto", download=True) != []
    with pytest.raises(MissingError, match="contains a run with other settings.\n  max_steps is 3 there, but 4"):
        sweep.plan(["one.yaml"], 1, "out", max_steps=4)
    Path("out/two-seed0").mkdir()
    Path("out/two-seed0/thesis.tex").write_text("mine")
    with pytest.raises(MissingError, match="exists and is not empty.\n  it contains thesis.tex"):
        sweep.plan(["two.yaml"], 1, "out")


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["one.yaml", "./one.yaml"], "two recipes are called 'one'"),
        (["one.yaml", "backprop"], "'backprop' names no model"),
        ([], "no recipe was given"),
        (["nowhere.yaml"], "there is no recipe 'nowhere.yaml'"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is(sources: list[str], message: str) -> None:
    with pytest.raises(LocalizeError, match=message):
        sweep.plan(sources, 1, "out")
    assert not Path("out").exists()


def test_options_of_the_other_comparison_are_refused() -> None:
    assert "--train takes recipes as they are" in run("one.yaml", "-K", "3").stderr
    alone = CliRunner().invoke(app, ["compare", "resnet20", "--seeds", "2"])
    assert alone.exit_code == OptionError.exit_code
    assert "--seeds needs --train" in alone.stderr
    several = CliRunner().invoke(app, ["compare", "resnet20", "resnet32"])
    assert "only one model can be compared, not 2" in several.stderr
