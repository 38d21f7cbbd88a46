"""The page about runs: what it says is what the runs have written, it loads nothing, and no text of a run is markup."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import shutil
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import pytest
import safetensors.torch
from typer.testing import CliRunner

from localize import build
from localize.cli.app import app
from localize.errors import MissingError
from localize.ir import CutSpec
from localize.recipes import Recipe
from localize.report import report
from localize.report.charts import RAMP, Line, line_chart, strip
from localize.report.markup import Html, element
from localize.report.page import page
from localize.report.step import Step
from localize.report.training import Training, read
from localize.train import TrainConfig, metrics, run, runs

SVG = "{http://www.w3.org/2000/svg}"
VOID = {"meta"}


class Reader(HTMLParser):
    """Reads a page: its tags, which must be closed in order, their attributes, the ids, and the cells of its tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open
        self.ids = [value for name, value in self.attributes if name == "id"]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        self.open += [] if tag in VOID else [tag]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def row(self, first: str) -> list[str]:
        return next(row for row in self.rows if row and row[0] == first)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "run"
    settings = {"epochs": 2, "max_steps": 4, "batch_size": 256, "grad_accum_steps": 2, "lr": 0.01, "device": "cpu"}
    run(TrainConfig("cifar/fc_mnist", recipe="cafo", output=str(output), **settings))
    return output


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "copied"))


def pictures(text: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(found) for found in re.findall(r"<svg .*?</svg>", text, re.S)]


def test_the_command_writes_a_page_that_loads_nothing(trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "page.html"

    done = CliRunner().invoke(app, ["report", str(trained), "-o", str(output)])
    again = CliRunner().invoke(app, ["report", str(trained), "-o", str(output)])

    assert done.exit_code == 0, done.output
    assert again.exit_code == 4
    assert "--force" in again.output
    text = output.read_text()
    found = Reader(text)
    assert not found.tags & {"script", "link", "img", "image", "use", "iframe", "object", "base", "foreignobject"}
    assert not {name for name, _ in found.attributes} & {"src", "srcset", "xlink:href", "style"}
    assert all(value.startswith("#run-") for name, value in found.attributes if name == "href")
    assert "url(" not in text
    assert "@import" not in text
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in found.attributes
    assert len(found.ids) == len(set(found.ids))
    assert len(pictures(text)) == 5
    assert all(picture.get("role") == "img" and picture.get("aria-label") for picture in pictures(text))


def test_the_page_says_what_the_run_has_written(trained: Path) -> None:
    found = Reader(report([str(trained)], memory=False))
    epochs = metrics.read(trained)
    last = epochs[-1]

    assert [epoch.images for epoch in epochs] == [5 * 256, 2 * 256]
    assert read(str(trained)).seconds == sum(epoch.images / epoch.images_per_second for epoch in epochs)
    row = found.row(str(trained))
    assert row[1:6] == ["cifar/fc_mnist", "cafo", "digits", "0", "2"]
    weights = safetensors.torch.load_file(trained / runs.BACKBONE)
    assert row[6] == f"{sum(weight.numel() for weight in weights.values()):,}"
    assert row[8] == f"{100 * last.test_accuracy:.2f} %"
    for epoch in epochs:
        assert found.row(str(epoch.epoch))[1] == f"{epoch.train_loss:.4f}"
    trains = {}
    for loss in last.segments:
        told = [row for row in found.rows if row[0] == loss.name]
        assert told[0][2:] == [
            f"{loss.train_loss:.4f}",
            f"{100 * loss.train_accuracy:.2f} %",
            f"{100 * loss.test_accuracy:.2f} %",
        ]
        trains[loss.name] = told[1][2:4]
    # CaFo trains its heads, and of the model only the output layer.
    assert list(trains.values()) == [["none", "predictor_0"], ["none", "predictor_1"], ["segment_2", "none"]]
    assert (trained / "recipe.yaml").read_text() in found.text


def test_nothing_that_a_run_says_is_markup(copied: Path) -> None:
    attack = "</svg></pre></style><script>alert('1')</script><img src=x onerror=\"alert(1)\">&lt;"
    recipe = copied / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("cifar/fc_mnist", json.dumps(attack)))
    lines = [json.loads(line) for line in (copied / runs.METRICS).read_text().splitlines()]
    for line in lines:
        for loss in line["segments"]:
            loss["name"] = attack + loss["name"]
    (copied / runs.METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))

    text = report([str(copied)])
    found = Reader(text)

    assert not found.tags & {"script", "img"}
    assert "onerror" not in {name for name, _ in found.attributes}
    assert found.text.count(attack) > 5
    assert "Not predicted: " in found.text
    assert all(picture.get("aria-label") for picture in pictures(text))


def test_text_is_escaped_unless_it_is_markup() -> None:
    assert element("a", "<b>", Html("<i></i>"), href='"') == '<a href="&quot;">&lt;b&gt;<i></i></a>'


def test_a_run_that_goes_on_is_told_as_far_as_it_has_come(copied: Path) -> None:
    (copied / runs.BACKBONE).unlink()
    first = (copied / runs.METRICS).read_text().splitlines()[0]
    (copied / runs.METRICS).write_text(first + "\n")
    begun = Reader(report([str(copied)], memory=False))
    (copied / runs.METRICS).unlink()
    fresh = Reader(report([str(copied)], memory=False))

    assert begun.row(str(copied))[5] == "1 of 2, unfinished"
    assert "unfinished: the rest is about 1 of 2 epochs" in begun.text
    assert fresh.row(str(copied))[5] == "0 of 2, unfinished"


def test_what_is_no_run_is_refused_by_its_name(trained: Path, copied: Path, tmp_path: Path) -> None:
    with pytest.raises(
        MissingError, match=r"nowhere is not the folder of a run.\n  there is no such folder.\n  help: "
    ):
        report(["nowhere"])
    with pytest.raises(MissingError, match=r"(?s)it has no recipe.yaml.*it holds runs: run.*localize report .*/\*"):
        report([str(trained.parent)])
    (copied / runs.METRICS).write_text('{"epoch": 1}\n')
    with pytest.raises(
        MissingError, match=r"line 1 of .*metrics.jsonl does not contain the metrics of an epoch.\n  step: "
    ):
        report([str(copied)])
    (copied / runs.METRICS).unlink()
    (copied / "train_step.py").write_text("")
    with pytest.raises(MissingError, match="localize convert wrote it"):
        report([str(copied)])


def test_many_losses_are_drawn_by_depth_inside_of_the_picture(trained: Path) -> None:
    training = read(str(trained))
    losses = tuple(metrics.LossMetrics(f"loss_{k}", (k, k), 2.0 + k, 0.5, k / 100) for k in range(55))
    epochs = tuple(dataclasses.replace(epoch, segments=losses) for epoch in training.epochs)

    accuracy, *_ = pictures(page([dataclasses.replace(training, epochs=epochs)], [Step()]))

    lines = [path for path in accuracy.iter(f"{SVG}path") if path.find(f"{SVG}title") is not None]
    assert [path.find(f"{SVG}title").text for path in lines] == [f"loss_{k}" for k in range(54)] + [
        "the model's own output"
    ]
    colours = [path.get("stroke") for path in lines[:-1]]
    assert [RAMP.index(colour) for colour in colours] == sorted(RAMP.index(colour) for colour in colours)
    assert len(set(colours)) == len(RAMP)
    assert "loss_0 to loss_53, the deepest" in [text.text for text in accuracy.iter(f"{SVG}text")]
    width, height = float(accuracy.get("width")), float(accuracy.get("height"))
    for path in lines:
        for x, y in re.findall(r"([\d.]+) ([\d.]+)", path.get("d")):
            assert 0 <= float(x) <= width
            assert 0 <= float(y) <= height


def seeded(training: Training, name: str, seed: int, shares: tuple[float, float]) -> Training:
    """Return a run as another, with another seed and other accuracies."""
    recipe = dataclasses.replace(training.recipe, train={**training.recipe.train, "seed": seed})
    epochs = tuple(
        dataclasses.replace(one, test_accuracy=share) for one, share in zip(training.epochs, shares, strict=True)
    )
    return dataclasses.replace(training, name=name, recipe=recipe, epochs=epochs)


def test_seeds_of_one_recipe_are_one_line_with_a_band(trained: Path) -> None:
    training = read(str(trained))
    runs = [seeded(training, f"seed{i}", i, shares) for i, shares in enumerate([(0.2, 0.4), (0.3, 0.8)])]
    text = page(runs, [Step(), Step()])
    picture = pictures(text)[0]
    lines = [path for path in picture.iter(f"{SVG}path") if path.find(f"{SVG}title") is not None]
    (band,) = [path for path in picture.iter(f"{SVG}path") if path.get("fill-opacity")]

    assert [path.find(f"{SVG}title").text for path in lines] == ["cafo (2 seeds)"]
    points = [tuple(map(float, one)) for one in re.findall(r"([\d.]+) ([\d.]+)", lines[0].get("d"))]
    corners = [tuple(map(float, one)) for one in re.findall(r"([\d.]+) ([\d.]+)", band.get("d"))]
    assert [x for x, _ in corners] == [points[0][0], points[1][0], points[1][0], points[0][0]]
    assert points[1][1] == pytest.approx((corners[1][1] + corners[2][1]) / 2, abs=0.2)
    assert "Test accuracy of the runs over epochs. In their last epochs: cafo (2 seeds) 60.00 %." in text
    assert "cafo (2 seeds): seed0, seed1." in Reader(text).text


def test_twelve_runs_are_kept_apart_by_colour_and_dash(trained: Path) -> None:
    training = read(str(trained))
    changed = [dataclasses.replace(training.recipe, train={**training.recipe.train, "lr": 0.1 + i}) for i in range(12)]
    runs = [dataclasses.replace(training, name=f"run{i}", recipe=recipe) for i, recipe in enumerate(changed)]
    picture = pictures(page(runs, [Step()] * 12))[0]
    lines = [path for path in picture.iter(f"{SVG}path") if path.find(f"{SVG}title") is not None]

    assert [path.find(f"{SVG}title").text for path in lines] == [f"run{i}" for i in range(12)]
    assert len({(path.get("stroke"), path.get("stroke-dasharray")) for path in lines}) == 12
    assert all(a.get("stroke-dasharray") != b.get("stroke-dasharray") for a, b in zip(lines, lines[1:], strict=False))


def test_runs_without_scores_by_depth_are_named(trained: Path) -> None:
    training = read(str(trained))
    silent = [
        dataclasses.replace(epoch, segments=tuple(dataclasses.replace(s, test_accuracy=None) for s in epoch.segments))
        for epoch in training.epochs
    ]
    other = dataclasses.replace(training, name="silent", epochs=tuple(silent))
    told = Reader(page([other, dataclasses.replace(other, name="silent too")], [Step(), Step()])).text
    assert "Without class scores at two depths or more, and so not shown by depth: silent, silent too." in told
    assert "not shown by depth: silent." in Reader(page([training, other], [Step(), Step()])).text


def test_analyses_are_taken_in(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "probe.csv").write_text(
        "run,group,layer,depth,test\na,dcl (2 seeds),x,0.5,0.25\na,dcl (2 seeds),y,1.0,0.5\n"
        "b,dcl (2 seeds),x,0.5,0.75\nb,dcl (2 seeds),y,1.0,1.0\n"
    )
    (tmp_path / "labels.csv").write_text("class,other,cosine\n<b>cat</b>,dog,0.123456\n")
    output = tmp_path / "page.html"
    done = CliRunner().invoke(
        app, ["report", str(trained), "--no-memory", "--analyses", str(tmp_path), "-o", str(output)]
    )
    assert done.exit_code == 0, done.output
    found = Reader(output.read_text())
    assert found.row("<b>cat</b>") == ["<b>cat</b>", "dog", "0.1235"]
    assert found.row("b") == ["b", "dcl (2 seeds)", "x", "0.5", "0.75"]
    (picture,) = [
        one for one in pictures(output.read_text()) if one.get("aria-label") == "test by depth: dcl (2 seeds)."
    ]
    assert [path for path in picture.iter(f"{SVG}path") if path.get("fill-opacity")]
    with pytest.raises(MissingError, match="holds no analyses"):
        report([str(trained)], memory=False, analyses=str(tmp_path / "empty"))


def test_a_chart_has_its_values_at_their_heights() -> None:
    chart = ElementTree.fromstring(
        line_chart([Line("a", ((1, 0.0), (2, 5.0), (3, 10.0)))], title="", across="", upward="", label="a")
    )
    path = next(path for path in chart.iter(f"{SVG}path") if path.find(f"{SVG}title") is not None)
    (x1, y1), (x2, y2), (x3, y3) = [tuple(map(float, one)) for one in re.findall(r"([\d.]+) ([\d.]+)", path.get("d"))]
    marks = {text.text: float(text.get("y")) - 4 for text in chart.iter(f"{SVG}text")}

    assert x3 - x2 == pytest.approx(x2 - x1, abs=0.2)
    assert y2 == pytest.approx((y1 + y3) / 2, abs=0.2)
    assert y1 == pytest.approx(marks["0"], abs=0.1)
    assert y3 == pytest.approx(marks["10"], abs=0.1)


def test_the_strip_shows_for_every_loss_the_segments_that_it_trains() -> None:
    plan = build.build(Recipe("mlaan", model="cifar/resnet20", cut=CutSpec(5)), data=False).plan
    spans = {}
    for rect in ElementTree.fromstring(strip(plan)).iter(f"{SVG}rect"):
        if (hint := rect.find(f"{SVG}title")) is not None:
            left = float(rect.get("x"))
            name = re.match(r"\w+", hint.text)[0]
            spans[name] = (left, left + float(rect.get("width")), rect.get("y"))

    assert len(plan.losses) == 4
    for loss in plan.losses:
        assert spans[loss.name][0] == spans[f"segment_{loss.route.start}"][0]
        assert spans[loss.name][1] == pytest.approx(spans[f"segment_{loss.route.stop}"][1], abs=0.2)
    bars = [spans[loss.name] for loss in plan.losses]
    assert all(a[2] != b[2] or a[1] <= b[0] or b[1] <= a[0] for a, b in combinations(bars, 2))
    assert len({y for _, _, y in bars}) < len(bars)


def test_the_table_by_segment_holds_the_metrics(trained: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (trained / runs.METRICS).read_text().splitlines()]
    expected = [
        [str(line["epoch"]), loss["name"], *map(str, loss["route"]), str(loss["train_loss"])]
        + [str(loss["train_accuracy"]), str(loss["test_accuracy"])]
        for line in lines
        for loss in line["segments"]
    ]

    found = list(csv.reader((trained / runs.SEGMENTS).read_text().splitlines()))

    assert found == [list(metrics.COLUMNS), *expected]
    assert len(expected) == 6
