"""The command line as it is typed: exit code, what is printed, what is written, and what a mistake is answered with."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

import localize
from localize import build, folder, methods, recipes
from localize.cli import app
from localize.recipes.settings import settings
from tests import options

pytestmark = pytest.mark.lowest

HERE = {**os.environ, "PYTHONPATH": str(Path(localize.__file__).parents[1])}

METHOD_FILE = (Path(__file__).parents[1] / "outside" / "proto.py").read_text()
USER_FILE = """
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(12, 12), nn.Linear(12, 10)])
    def forward(self, x):
        x = x.flatten(1)
        if x.sum() > 0:
            x = self.layers[0](x)
        return self.layers[1](x)

def branching():
    return Branching()

def plain(num_classes=10):
    hidden = [nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(12, num_classes))

def compiled():
    return torch.compile(plain(), backend="eager")

class Wrapped(DistributedDataParallel):
    def __init__(self):
        nn.Module.__init__(self)
        self.module = plain()

for factory in (branching, plain, compiled, Wrapped):
    factory.input_shape, factory.num_classes = (3, 2, 2), 10
"""


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def fails(code: int, *arguments: str) -> str:
    """Run what is wrong; return the message, after checking its form, and that nothing is left behind."""
    before = sorted(Path.cwd().rglob("*"))
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    message = result.stderr
    assert message.startswith("error: ")
    assert "Traceback" not in message
    lines = message.rstrip("\n").splitlines()
    assert all(line.startswith("  ") for line in lines[1:])
    assert lines[-1].startswith("  help: "), f"no help in {message!r}"
    assert len(lines[-1]) > len("  help: ")
    assert sorted(Path.cwd().rglob("*")) == before
    return message


# ------------------------------------------------------------------------------------------------------ what it can


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom localize.cli import app\n"
        "result = CliRunner().invoke(app, ['--help'])\n"
        "assert result.exit_code == 0 and 'convert' in result.output, result.output\n"
        "assert not {'torch', 'timm', 'networkx', 'numpy'} & set(sys.modules), 'too much was imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=HERE)


def test_python_m_localize_is_localize() -> None:
    command = [sys.executable, "-m", "localize", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=HERE)
    assert done.stdout == "localize 0.1.0\n"


def test_every_option_of_every_method_and_every_setting_is_a_flag() -> None:
    text = run("train", "--help-all").stdout
    for method in methods.names():
        for option in dataclasses.fields(methods.get(method)):
            assert f"--{option.name.replace('_', '-')} " in text
    for item in settings():
        assert f"--{item.name.replace('_', '-')} " in text


def test_the_table_of_options_is_current() -> None:
    assert options.FILE.read_text(encoding="utf-8") == options.text(), "python -m tests.options"


@pytest.mark.parametrize("command", sorted(typer.main.get_command(app).commands))
def test_help_is_short(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = run(command, "--help").stdout
    assert text.startswith("Usage: ")
    assert len(text.splitlines()) <= 70
    assert max(map(len, text.splitlines())) <= 80


def test_help_is_read_without_torch() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from localize.cli import app\n"
        "for command in ('train', 'convert', 'compare', 'plan', 'methods'):\n"
        "    result = CliRunner().invoke(app, [command, '--help'])\n"
        "    assert result.exit_code == 0, result.output\n"
        "assert not {'torch', 'timm', 'networkx', 'numpy'} & set(sys.modules), 'too much was imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=HERE)


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("localize tra", "train"),
        ("localize train --batch", "--batch-size"),
        ("localize train --method auglocal-dig", "auglocal-digits"),
        ("localize init deep", "deep-supervision"),
    ],
)
def test_a_shell_completes_commands_flags_and_methods(typed: str, found: str) -> None:
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1), "_LOCALIZE_COMPLETE": "complete_bash"}
    command = [sys.executable, "-c", "from localize.cli import main; main()"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**HERE, **words})
    assert done.stdout.split() == [found], done.stderr


def test_help_shows_the_options_of_the_method_that_is_named_and_no_others() -> None:
    text = run("train", "--method", "auglocal", "--help").stdout
    assert "Options of auglocal:" in text
    assert {"--tau", "--d-min"} <= set(text.split())
    assert not {"--dictionary", "--n-hidden"} & set(text.split())
    assert "--dictionary" in run("train", "--recipe", "dcl-s-fc-mnist", "--help").stdout
    assert "--dictionary" not in run("train", "--help").stdout


def test_a_method_of_a_file_has_flags_of_its_own() -> None:
    Path("proto.py").write_text(METHOD_FILE)
    text = run("convert", "--method", "proto.py:Prototypes", "--help").stdout
    assert "what similarities are multiplied by; default 10.0" in " ".join(text.split())
    assert "--d N" in text
    Path("mine.py").write_text(USER_FILE)
    typed = ("--method", "proto.py:Prototypes", "--d", "5", "--no-deep", "--names", "a,b")
    result = run("convert", "mine.py:plain", *typed, "-o", "out")
    assert result.exit_code == 0, result.output
    written = recipes.load("out")
    assert written.method == "proto.py:Prototypes"
    assert written.options == {"scale": 10.0, "d": 5, "deep": False, "names": ["a", "b"]}
    assert run("audit", "out").exit_code == 0
    listed = run("methods", "proto.py:Prototypes", "--json")
    (found,) = json.loads(listed.stdout)
    assert [one["name"] for one in found["options"]] == ["scale", "d", "deep", "names"]


def test_the_loss_of_labels_is_typed_and_wins_over_the_recipe() -> None:
    Path("weights.txt").write_text("1\n2.5\n" + "1 " * 8)
    Path("mine.yaml").write_text("method: dcl\nmodel: cifar/fc_mnist\nloss: {name: focal, gamma: 3, smoothing: 0.2}\n")
    plan = json.loads(run("convert", "--recipe", "mine.yaml", "--class-weights", "weights.txt", "--json").stdout)
    assert plan["loss"] == {"name": "focal", "smoothing": 0.2, "weights": [1.0, 2.5] + [1.0] * 8, "gamma": 3.0}
    plan = json.loads(run("convert", "--recipe", "mine.yaml", "--loss", "bce", "--smoothing", "0.1", "--json").stdout)
    assert plan["loss"] == {"name": "bce", "smoothing": 0.1}
    assert plan["losses"][0]["terms"][0]["options"] == {"label_smoothing": 0.1}
    typed = ["--class-weights", "[1,2,3,4,5,6,7,8,9,10]", "--loss", "focal", "--focal-gamma", "1"]
    Path("[1,2,3,4,5,6,7,8,9,10]").write_text("[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]")
    plan = json.loads(run("convert", "cifar/fc_mnist", "-m", "dcl", *typed, "--json").stdout)
    assert plan["loss"] == {"name": "focal", "weights": [float(n) for n in range(1, 11)], "gamma": 1.0}
    plan = json.loads(run("convert", "resnet20", "-m", "infopro", "--loss", "softmax", "--json").stdout)
    assert plan["options"]["loss"] == "softmax" and "loss" not in plan


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--loss focl", ["the loss of labels cannot be 'focl'", "cross-entropy, focal, bce"]),
        ("--smoothing much", ["smoothing", "cannot be 'much'"]),
        ("--class-weights nofile", ["--class-weights cannot be 'nofile'", "no such file"]),
        ("--class-weights words.txt", ["words.txt does not contain class weights"]),
        ("--class-weights 1,2", ["2 weights of classes were given", "10 classes"]),
        ("--focal-gamma 1", ["'cross-entropy' has no gamma", "--loss focal --focal-gamma"]),
    ],
)
def test_a_loss_that_cannot_be_had_is_refused(arguments: str, words: list[str]) -> None:
    Path("words.txt").write_text("one, two")
    message = fails(2, "convert", "cifar/fc_mnist", "-m", "dcl", *arguments.split())
    assert all(word in message for word in words), message


def test_code_that_a_folder_names_as_its_method_is_not_run_unless_it_is_trusted() -> None:
    Path("proto.py").write_text(METHOD_FILE)
    Path("mine.py").write_text(USER_FILE)
    assert run("convert", "mine.py:plain", "--method", "proto.py:Prototypes", "-o", "out").exit_code == 0
    Path("proto.py").write_text(METHOD_FILE + "\nraise RuntimeError('it was run')\n")
    sys.modules.pop("localize_file_proto", None)
    message = fails(2, "audit", "out")
    assert "out names files of code, mine.py:plain, proto.py:Prototypes" in message
    assert "it was run" in fails(2, "audit", "out", "--trust-code")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("proto.py", ["names a file, not a class", "proto.py:Prototypes"]),
        ("proto.py:Prototype", ["'proto.py' defines no 'Prototype'", "proto.py:Prototypes"]),
        ("proto.py:Similarities", ["is not a method", "no plan"]),
        ("nomodule:Prototypes", ["there is no module 'nomodule'"]),
        ("json:loads", ["is function", "not the class of a method"]),
    ],
)
def test_what_is_no_method_is_refused(name: str, words: list[str]) -> None:
    Path("proto.py").write_text(METHOD_FILE)
    shown = run("train", "--method", name, "--help")  # says so too, and shows what all methods share
    assert shown.exit_code == 0
    assert all(word in " ".join(shown.output.split()) for word in [*words, "--epochs"]), shown.output
    message = fails(2, "convert", "resnet20", "--method", name)
    assert all(word in message for word in words), message


def test_a_recipe_to_start_from_is_one(tmp_path: Path) -> None:
    for method in ("auglocal", "mlaan", "backprop"):
        assert run("init", method).exit_code == 0
        assert f"{method}.yaml: ok, {method} on cifar/resnet20" in run("recipes", "validate", f"{method}.yaml").stdout
        assert recipes.resolve(recipes.load(f"{method}.yaml")).options == recipes.resolve(recipes.load(method)).options


def test_recipes_are_found_by_method_model_data_and_paper() -> None:
    found = json.loads(run("recipes", "ls", "--method", "auglocal", "--data", "cifar10", "--json").stdout)
    assert found
    assert {(one["method"], one["data"]) for one in found} == {("auglocal", "cifar10")}
    found = json.loads(run("recipes", "ls", "--model", "resnet101", "--paper", "zhang et al*", "--json").stdout)
    assert {one["name"] for one in found} == {"mlaan-resnet101-imagenet", "backprop-resnet101-imagenet-mlaan"}
    assert "did you mean 'cifar/resnet" in fails(2, "recipes", "ls", "--model", "cifar/resnet1100")


def test_models_are_listed_by_pattern() -> None:
    assert "cifar/resnet110" in run("models", "cifar/*").stdout.splitlines()
    assert json.loads(run("models", "cifar/resnet1*", "--json").stdout) == ["cifar/resnet110", "cifar/resnet1202"]


def test_inspect_lists_where_a_model_can_be_cut() -> None:
    result = run("inspect", "conv256")
    assert result.exit_code == 0
    header, *rows, rest, summary, note = result.stdout.splitlines()
    assert header.split()[:6] == ["cut", "shape", "layout", "tensors", "parameters", "share"]
    assert rest.split()[0] == "output"
    assert note == "layers.1.conv alone holds 97% of the model: no cut makes it smaller"
    assert len(rows) == int(summary.split()[1])

    found = json.loads(run("inspect", "conv256", "--json").stdout)
    assert [cut["name"] for cut in found["cuts"]] == [row.split()[0] for row in rows]
    assert all(0 <= cut["share"] <= 1 and cut["live"] >= 1 for cut in found["cuts"])


def test_inspect_says_which_further_outputs_are_trained() -> None:
    lines = run("inspect", "tv/googlenet", "--input-shape", "3x64x64").stdout.splitlines()
    assert lines[-1] == "further output aux_logits2: its cross-entropy is added with weight 0.3"


def test_the_names_that_inspect_prints_can_be_cut_at() -> None:
    names = [cut["name"] for cut in json.loads(run("inspect", "resnet20", "--json").stdout)["cuts"]]
    assert "layer1.1" in names
    plan = json.loads(run("convert", "resnet20", "-m", "dcl", "--cut-at", "layer1.1,layer2.0", "--json").stdout)
    assert [segment["ends_at"] for segment in plan["segments"]] == ["layer1.1", "layer2.0", "output"]


def test_convert_prints_the_object_that_it_writes() -> None:
    printed = run("convert", "conv256", "--method", "dcl", "--json")
    assert printed.exit_code == 0
    assert list(Path.cwd().iterdir()) == []

    written = run("convert", "conv256", "--method", "dcl", "-o", "out/")
    assert written.exit_code == 0
    assert "written: out/" in written.stdout
    assert sorted(path.name for path in Path("out").iterdir()) == sorted(folder.FILES)
    assert Path("out/plan.json").read_text() == printed.stdout


def test_convert_says_what_it_made() -> None:
    lines = run("convert", "conv256", "--method", "dcl").stdout.splitlines()
    assert lines[0] == "cifar/conv256 by dcl: 3 segments, 3 losses"
    assert lines[-1] == "nothing is written; -o DIR writes it"


def test_options_cuts_and_shapes_are_flags() -> None:
    arguments = "convert resnet20 --method auglocal --d 3 --tau 0.25 -K 3 --cut-by macs --num-classes 7"
    plan = json.loads(run(*arguments.split(), "--input-shape", "3x16x16", "--json").stdout)
    assert (plan["options"]["d"], plan["options"]["tau"]) == (3, 0.25)
    assert (len(plan["segments"]), plan["num_classes"], plan["input_shape"]) == (3, 7, [3, 16, 16])
    assert json.loads(run("convert", "conv256", "-m", "dcl", "-K", "max", "--json").stdout)["segments"]


def test_a_switch_that_another_method_spells_is_spelled() -> None:
    # predsim's classifier is own or merged, cfl's is a switch.
    plan = json.loads(run("convert", "conv256", "--method", "cfl", "--classifier", "false", "--json").stdout)
    assert plan["options"]["classifier"] is False
    plan = json.loads(run("convert", "conv256", "--method", "predsim", "--classifier", "merged", "--json").stdout)
    assert plan["options"]["classifier"] == "merged"


def test_a_recipe_can_be_named_as_a_method_and_flags_win_over_it() -> None:
    options = json.loads(run("convert", "conv256", "-m", "dcl-s", "--match", "cosine", "--json").stdout)["options"]
    assert (options["dictionary"], options["match"]) == ("static", "cosine")
    options = json.loads(run("convert", "conv256", "-m", "dcl-s", "--dictionary", "last", "--json").stdout)["options"]
    assert options["dictionary"] == "last"


def test_a_recipe_file_brings_its_model() -> None:
    Path("mine.yaml").write_text("model: cifar/conv256\nmethod: dcl\ncut:\n  segments: 2\n")
    assert len(json.loads(run("convert", "--recipe", "mine.yaml", "--json").stdout)["segments"]) == 2
    assert len(json.loads(run("convert", "--recipe", "mine.yaml", "-K", "3", "--json").stdout)["segments"]) == 3


def test_a_file_of_ones_own_is_a_model() -> None:
    Path("mine.py").write_text(USER_FILE)
    plan = json.loads(run("convert", "mine.py:plain", "--method", "dcl", "-K", "2", "--json").stdout)
    assert (plan["input_shape"], plan["num_classes"]) == ([3, 2, 2], 10)


def test_audit_of_a_folder_and_of_a_model() -> None:
    run("convert", "conv256", "--method", "dcl", "-o", "out")
    result = run("audit", "out", "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["ok"] is True
    assert all(set(check) == {"id", "ok", "claim", "evidence"} for check in report["checks"])

    text = run("audit", "conv256", "--method", "dcl")
    assert text.exit_code == 0
    of_step = [check for check in report["checks"] if check["id"] != "folder.files"]  # a model by name has no files
    assert len(of_step) == len(report["checks"]) - 1
    assert text.stdout.splitlines()[-1] == f"cifar/conv256 by dcl: all {len(of_step)} checks hold"


def test_an_audit_that_fails_exits_with_1_and_names_the_line() -> None:
    run("convert", "conv256", "--method", "dcl", "-o", "out")
    step = Path("out/train_step.py")
    step.write_text(step.read_text().replace("return h_0.detach()", "return h_0"))
    result = run("audit", "out/")
    assert result.exit_code == 1
    assert "FAIL  static." in result.stdout
    assert "line " in result.stdout
    assert json.loads(run("audit", "out/", "--json").stdout)["ok"] is False

    step.write_text("def (:\n")
    broken = run("audit", "out/")
    assert broken.exit_code == 1
    assert "line 1" in broken.stdout

    step.write_text("")
    assert "\n  there is no function train_step\n" in run("audit", "out/").stdout


def test_draw_writes_a_picture_of_a_model_or_a_folder() -> None:
    assert run("draw", "conv256", "--method", "dcl", "-o", "a.svg").exit_code == 0
    run("convert", "conv256", "--method", "dcl", "-o", "out")
    run("draw", "out", "-o", "b.svg")
    assert Path("a.svg").read_bytes() == Path("b.svg").read_bytes() == Path("out/graph.svg").read_bytes()
    assert run("draw", "out").stdout == Path("a.svg").read_text()


def test_train_leaves_a_run_and_export_takes_the_model_out() -> None:
    Path("mine.py").write_text(USER_FILE)
    arguments = "train mine.py:plain -K 2 --method dcl --data digits --epochs 1 --max-steps 2 --batch-size 8 --lr 0.01"
    result = run(*arguments.split(), "--seed", "3", "--device", "cpu", "--output", "run")
    assert result.exit_code == 0, result.output
    (line,) = Path("run/metrics.jsonl").read_text().splitlines()
    assert {"epoch", "train_loss", "test_accuracy"} <= set(json.loads(line))
    assert Path("run/export/backbone.safetensors").is_file()
    exported = run("export", "run", "-o", "model.safetensors", "--verify")
    assert exported.exit_code == 0, exported.output
    assert exported.stdout.splitlines()[1].startswith("verified: a fresh mine.py:plain")
    again = run(*arguments.split(), "--device", "cpu", "--output", "more", "--initial-checkpoint", "model.safetensors")
    assert "weights: model.safetensors, 6 tensors loaded\n" in again.stdout
    assert "exists" in fails(4, "export", "run", "-o", "model.safetensors")


def test_eval_asks_a_run_in_every_way() -> None:
    arguments = "train resnet20 -K 3 --method dcl --epochs 1 --max-steps 2 --batch-size 64 --input-shape 3,8,8"
    run(*arguments.split(), "--device", "cpu", "--output", "run")
    Path("map.json").write_text("[0, 0, 0, 0, 0, 1, 1, 1, 1, 1]")
    asked = "--at all --weighted 2 --form p**l --without-classifier --superlabels mean --map map.json --device cpu"

    result = run("eval", "run", *asked.split(), "--saliency", "pictures", "-n", "2")

    assert result.exit_code == 0, result.output
    head, names, *rows, first, second = result.stdout.splitlines()
    assert head == "cifar/resnet20 by dcl: 360 test images of digits"
    assert names.split() == ["prediction", "accuracy"]
    assert [row.split("  ")[0] for row in rows] == [
        "by its own output",
        *(f"by loss_{k}, up to {end}" for k, end in enumerate(["layer1.2", "layer2.2", "output"])),
        "by the weighted sum, p**l, p = 2",
        "without the classifier, by loss_1",
        "2 super-classes, mean",
    ]
    assert all(row.endswith(" %") for row in rows)
    assert first.startswith("pictures/saliency-0000.png: label ")
    assert sorted(path.name for path in Path("pictures").iterdir()) == ["saliency-0000.png", "saliency-0001.png"]
    printed = json.loads(run("eval", "run", *asked.split(), "--json").stdout)
    assert [f"{100 * printed['accuracy']:.2f}", f"{100 * printed['weighted']['accuracy']:.2f}"] == [
        row.split()[-2] for row in (rows[0], rows[4])
    ]
    tested = json.loads(Path("run/metrics.jsonl").read_text())["test_accuracy"]
    assert printed["accuracy"] == printed["layers"][-1]["accuracy"] == tested


def test_what_a_run_cannot_be_asked_is_refused_and_nothing_is_written() -> None:
    Path("mine.py").write_text(USER_FILE)
    arguments = "train mine.py:plain -K 2 --method dcl --epochs 1 --max-steps 2 --batch-size 8 --device cpu"
    run(*arguments.split(), "--output", "run")
    for asked, words in (
        ("--at loss_9", ["'loss_9'", "layers are loss_0"]),
        ("--superlabels mean", ["no map", "--map FILE"]),
        ("--map cifar100", ["--superlabels"]),
        ("--superlabels naive --map cifar100", ["has 100 classes", "tells 10"]),
        ("--weighted 1 --form l", ["'l'", "p**l"]),
        ("--weighted nan", ["p cannot be nan"]),
        ("--goodness", ["does not show labels"]),
        ("--skip-first", ["--skip-first needs", "--goodness"]),
        ("--all-layers", ["--all-layers needs", "--goodness"]),
        ("--saliency pictures", ["no layer has feature maps"]),
        ("--saliency pictures -n 0", ["-n cannot be 0"]),
        ("--saliency pictures --goodness", ["does not show labels"]),
        ("--data digitz", ["did you mean 'digits'"]),
        ("--batch-size 0", ["batch_size cannot be 0"]),
        ("--download", ["reads no folder", "leave out --download"]),
    ):
        message = fails(2, "eval", "run", *asked.split())
        for word in words:
            assert word in message
    assert "cuda:77" in fails(4, "eval", "run", "--device", "cuda:77")
    assert "nowhere" in fails(4, "eval", "run", "--superlabels", "mean", "--map", "nowhere")


def test_train_takes_settings_from_the_recipe_unless_they_are_typed() -> None:
    Path("mine.py").write_text(USER_FILE)
    recipe = "model: mine.py:plain\nmethod: dcl\ncut: {segments: 2}\ntrain: {epochs: 2, batch_size: 8, max_steps: 3}\n"
    Path("mine.yaml").write_text(recipe)
    run("train", "--recipe", "mine.yaml", "--device", "cpu", "--output", "one")
    assert json.loads(Path("one/metrics.jsonl").read_text().splitlines()[-1])["step"] == 3
    run("train", "--recipe", "mine.yaml", "--device", "cpu", "--output", "two", "--max-steps", "1")
    assert json.loads(Path("two/metrics.jsonl").read_text().splitlines()[-1])["step"] == 1


def test_milestones_are_typed_with_commas_and_kept_in_the_recipe() -> None:
    Path("mine.py").write_text(USER_FILE)
    arguments = "train mine.py:plain -K 2 --method dcl --epochs 3 --batch-size 512 --device cpu --output run"
    schedule = "--sched multistep --milestones 1,2 --gamma 0.5 --lr 0.1"
    assert run(*arguments.split(), *schedule.split()).exit_code == 0
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines] == [0.1, 0.05, 0.025]
    assert "milestones: [1, 2]" in Path("run/recipe.yaml").read_text()
    assert "'1;2'" in fails(2, *arguments.split(), "--sched", "multistep", "--milestones", "1;2")


def test_recipes_are_listed_shown_copied_and_checked() -> None:
    listed = run("recipes", "ls").stdout
    assert "dcl-s" in listed
    (row,) = [line for line in listed.splitlines() if line.startswith("dcl-resnet32-cifar10 ")]
    assert row.split() == ["dcl-resnet32-cifar10", "dcl", "cifar/resnet32", "cifar10", "Choi", "et", "al.", "2024"]
    found = {one["name"]: one for one in json.loads(run("recipes", "ls", "--json").stdout)}
    assert list(found) == list(recipes.names())
    assert all(list(one) == ["name", "method", "model", "data", "paper"] for one in found.values())
    assert found["dcl-digits"]["data"] == "digits"
    assert found["dcl-s"] | {"paper": ""} == {
        "name": "dcl-s", "method": "dcl", "model": None, "data": None, "paper": ""
    }  # fmt: skip
    assert found["dcl-s"]["paper"].startswith("S. Choi, M. Jeon")
    shown = run("recipes", "show", "dcl-s").stdout
    assert run("recipes", "cp", "dcl-s").exit_code == 0
    assert Path("dcl-s.yaml").read_text() == shown
    assert run("recipes", "validate", "dcl-s.yaml").stdout == "dcl-s.yaml: ok, dcl on any model\n"
    assert "exists" in fails(4, "recipes", "cp", "dcl-s")


def test_an_interrupt_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "build", interrupted)
    assert run("convert", "conv256", "--method", "dcl").exit_code == 130


# ----------------------------------------------------------------------------------------------- what is asked wrong


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("convert resnet111 --method dcl", ["'resnet111'", "resnet110"]),
        ("convert resnet50 --method dcl", ["tv/resnet50", "timm/resnet50"]),
        ("convert cifar/resnet33 --method dcl", ["did you mean 'resnet32'"]),
        ("convert resnet20 --method auglokal", ["'auglokal'", "did you mean 'auglocal'"]),
        ("convert resnet20", ["no method was given", "--method NAME"]),
        ("convert --method dcl", ["does not say which model"]),
        ("convert resnet20 --method dcl --recipe x.yaml", ["--method and --recipe"]),
        ("convert resnet20 --recipe nowhere.yaml", ["'nowhere.yaml'", "cannot be read"]),
        ("convert resnet20 --method dcl --d 3", ["'dcl' has no option --d", "auglocal"]),
        ("convert resnet20 --method auglocal --d 1", ["'d'", "lowest value is 2"]),
        ("convert resnet20 --method auglocal --d four", ["'d'", "'four'"]),
        ("convert resnet20 --method auglocal --tau 2x", ["'tau'", "'2x'"]),
        ("convert resnet20 --method dcl --dictionary statik", ["'statik'", "static"]),
        ("convert resnet20 --method dcl -K 0", ["-K cannot be 0"]),
        ("convert resnet20 --method dcl -K many", ["-K cannot be many"]),
        ("convert resnet20 --method dcl -K 2 --cut-at relu", ["-K and --cut-at"]),
        ("convert resnet20 --method dcl --cut-by weight", ["'weight'", "macs"]),
        ("convert resnet20 --method dcl --input-shape 32", ["'32'", "3,32,32"]),
        ("convert resnet20 --method dcl --num-classes 0", ["0 classes"]),
        ("models nonesuch*", ["nonesuch"]),
        ("recipes show dcl-x", ["'dcl-x'", "dcl-s"]),
        ("train conv256 --method dcl --data cifar99", ["cifar99"]),
        ("train conv256 --method dcl --epochs 0", ["epochs cannot be 0"]),
        ("train --resume=", ["--resume names no folder"]),
        ("train conv256 --method dcl --lr fast", ["lr cannot be 'fast'"]),
        ("export nowhere -o model.bin", ["model.bin"]),
        ("convert resnet20 --method dcl -K 100", ["100 segments", "-K max"]),
        ("convert resnet20 --method dcl --cut-at layer9", ["'layer9'"]),
    ],
)
def test_wrong_use_exits_with_2(arguments: str, words: list[str]) -> None:
    message = fails(2, *arguments.split())
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("convert mine.py:branching --method dcl", ["Branching"]),
    ],
)
def test_a_model_that_cannot_be_converted_exits_with_3(arguments: str, words: list[str]) -> None:
    Path("mine.py").write_text(USER_FILE)
    message = fails(3, *arguments.split(), "-o", "out")
    for word in words:
        assert word in message


@pytest.mark.parametrize("factory", ["compiled", "Wrapped"])
def test_a_compiled_or_wrapped_model_is_refused(factory: str) -> None:
    Path("mine.py").write_text(USER_FILE)
    fails(2, "convert", f"mine.py:{factory}", "--method", "dcl", "-o", "out")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("audit ./nowhere", ["there is no such folder"]),
        ("audit empty", ["it has no recipe.yaml"]),
        ("export nowhere -o model.pt", ["nowhere"]),
        ("eval nowhere", ["nowhere is not the folder of a run"]),
        ("eval empty", ["it has no recipe.yaml"]),
        ("convert conv256 --method dcl -o empty", ["empty exists"]),
        ("convert conv256 --method dcl -o empty/file/out", ["empty/file/out"]),
        ("draw conv256 --method dcl -o empty", ["empty is a folder"]),
        ("train conv256 --method dcl --device cuda:77", ["cuda:77"]),
    ],
)
def test_what_the_environment_lacks_exits_with_4(arguments: str, words: list[str]) -> None:
    Path("empty").mkdir()
    Path("empty/file").touch()
    message = fails(4, *arguments.split())
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("method: [dcl", ["not YAML", "line 1"]),
        ("metod: dcl", ["'metod'", "did you mean 'method'", "line 1"]),
        ("method: dcl\noptions: {dictionari: static}", ["'dictionari'", "did you mean 'dictionary'", "line 2"]),
        ("method: dcl\nnum_classes: ten", ["num_classes", "'ten'", "line 2"]),
        ("", ["nothing"]),
    ],
)
def test_a_wrong_recipe_is_answered_with_file_and_line(text: str, words: list[str]) -> None:
    Path("mine.yaml").write_text(text)
    for arguments in (["convert", "conv256", "-r", "mine.yaml", "-o", "out"], ["recipes", "validate", "mine.yaml"]):
        message = fails(2, *arguments)
        for word in ["mine.yaml", *words]:
            assert word in message


def test_a_taken_name_is_refused_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "build", lambda *_: pytest.fail("worked in vain"))
    Path("out").mkdir()
    assert "out exists" in fails(4, "convert", "conv256", "--method", "dcl", "-o", "out")
    Path("out.svg").touch()
    assert "out.svg exists" in fails(4, "draw", "conv256", "--method", "dcl", "-o", "out.svg")


def test_options_beside_a_folder_are_refused() -> None:
    run("convert", "conv256", "--method", "dcl", "-o", "out")
    assert "out is a folder" in fails(2, "audit", "out", "--method", "dcl")
    assert "out is a folder" in fails(2, "audit", "out", "--match", "cosine")


@pytest.mark.parametrize(
    ("arguments", "right"),
    [
        ("convrt resnet20", "convert"),
        ("convert resnet20 --metod dcl", "--method"),
        ("convert resnet20 --method auglocal --d-mim 2", "--d-min"),
        ("train resnet20 --method dcl --epoch 3", "--epochs"),
        ("recipes sho dcl", "show"),
        ("convert resnet20 dcl", "unexpected extra argument"),
        ("export run", "--output"),
    ],
)
def test_a_typo_exits_with_2_and_the_right_word(arguments: str, right: str) -> None:
    result = run(*arguments.split())
    assert result.exit_code == 2
    assert result.stdout == ""
    assert right in result.stderr
    assert list(Path.cwd().iterdir()) == []
