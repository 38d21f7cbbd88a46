"""Analyses of maps, labels, information, curves and costs, against computations that share nothing with them."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import localize
from localize import analysis, train
from localize.analysis import asked, estimates, maps
from localize.analysis.confusions import Confusion
from localize.analysis.costs import Cost, Costs, front
from localize.analysis.curves import Convergence
from localize.analysis.embeddings import Labels, plane
from localize.analysis.kept import Parts
from localize.analysis.seeds import grouped
from localize.cli import analyses, app
from localize.errors import OptionError
from localize.text import csv_table
from localize.train import TrainConfig, loaded


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of a few steps: by dcl, dgl, and backprop with two seeds."""
    root, made = tmp_path_factory.mktemp("runs"), {}
    for name, method, seed in (("dcl", "dcl", 0), ("dgl", "dgl", 0), ("bp0", "backprop", 0), ("bp1", "backprop", 1)):
        made[name] = root / name
        cut = None if method == "backprop" else localize.CutSpec(3)
        train.run(
            TrainConfig(
                "timm/test_resnet", recipe=method, input_shape=(3, 16, 16), data="digits", epochs=2, max_steps=2,
                cut=cut, batch_size=32, lr=0.01, seed=seed, device="cpu", output=str(made[name]),
            )
        )  # fmt: skip
    return made


@pytest.fixture(scope="module")
def opened(folders: dict[str, Path]) -> dict[str, loaded.LoadedRun]:
    """The runs as objects, which tests leave as they are: a conversion takes longer than most of them."""
    return {str(folder): loaded.load(folder) for folder in folders.values()}


@pytest.fixture(autouse=True)
def load_once(opened: dict[str, loaded.LoadedRun], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(localize, "load", lambda folder, **options: opened[str(folder)])


@pytest.fixture
def dcl(folders: dict[str, Path]) -> loaded.LoadedRun:
    return localize.load(folders["dcl"])


def analyze(*words: object) -> Result:
    return CliRunner().invoke(app, ["analyze", *map(str, words), "--device", "cpu"])


def lines(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


# ------------------------------------------------------------------------------------------------------------- command


def test_the_command_knows_every_analysis() -> None:
    assert tuple(asked.ANALYSES) == analyses.WHAT
    told = CliRunner().invoke(app, ["analyze", "--help"]).stdout
    assert all(f"\n  {what} " in told for what in analyses.WHAT)
    assert len(told.splitlines()) <= 70


def test_an_option_of_another_analysis_is_refused(folders: dict[str, Path]) -> None:
    result = analyze(folders["dcl"], "--what", "labels", "--epochs", 3)
    assert (result.exit_code, "--what labels has no option --epochs" in result.stderr) == (2, True)


def test_what_a_method_does_not_have_is_said(folders: dict[str, Path]) -> None:
    for what in ("labels", "saliency"):
        for name, words in (("dgl", "have no label embeddings"), ("bp0", "no local loss of backprop")):
            result = analyze(folders[name], "--what", what)
            assert (result.exit_code, words in result.stderr) == (2, True), result.stderr


def test_a_picture_its_numbers_and_its_parts_are_written(folders: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = analyze(folders["dcl"], folders["bp0"], folders["bp1"], "--what", "probe", "-o", tmp_path, "--json")
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    assert printed["files"] == [str(tmp_path / "probe.svg"), str(tmp_path / "probe.csv")]
    assert printed["groups"] == {
        "dcl": [str(folders["dcl"])],
        "backprop (2 seeds)": [str(folders[n]) for n in ("bp0", "bp1")],
    }
    rows = lines((tmp_path / "probe.csv").read_text())
    assert [float(row["test"]) for row in rows if row["run"] == str(folders["bp1"])] == [
        one["test"] for one in printed["layers"][str(folders["bp1"])]
    ]
    assert len(list((tmp_path / "parts").glob("probe-*.json"))) == 3
    picture = (tmp_path / "probe.svg").read_text()
    assert "backprop (2 seeds)" in picture
    again = analyze(folders["dcl"], "--what", "probe", "-o", tmp_path)
    assert (again.exit_code, "exists" in again.stderr) == (4, True)


def test_a_picture_is_the_same_again(folders: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = analysis.convergence({name: localize.load(folders[name]) for name in ("bp0", "dcl")})
    for name in ("a.svg", "b.svg"):
        analysis.save(found, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_curves_differ_without_their_colours() -> None:
    from localize.analysis.figures import looks

    found = list(looks(30))
    assert len({(one["color"], one["marker"]) for one in found}) == 30
    assert len({(one["color"], str(one["linestyle"])) for one in found}) == 30
    assert len({(one["marker"], str(one["linestyle"])) for one in found[:8]}) == 8


def test_a_part_is_computed_once(tmp_path: Path) -> None:
    calls: list[int] = []

    def make() -> dict[str, float]:
        calls.append(1)
        return {"value": 1 / 3}

    parts = Parts(tmp_path)
    assert parts.get("probe", {"run": "a"}, make) == parts.get("probe", {"run": "a"}, make) == {"value": 1 / 3}
    assert Parts(tmp_path).get("probe", {"run": "a"}, make) == {"value": 1 / 3}
    assert len(calls) == 1
    parts.get("probe", {"run": "b"}, make)
    parts.get("mi", {"run": "a"}, make)
    Parts().get("probe", {"run": "a"}, make)
    assert len(calls) == 4


def test_an_analysis_that_is_killed_does_not_begin_again(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def estimate(run: object, segment: int, *, epochs: int) -> estimates.Information:
        seen.append(segment)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return estimates.Information(segment, f"at {segment}", 0.5, 0.25)

    monkeypatch.setattr(estimates, "information", estimate)
    runs = {"a": localize.load(folders["dcl"])}
    with pytest.raises(KeyboardInterrupt):
        asked.ask("mi", runs, Parts(tmp_path), epochs=1)
    found = asked.ask("mi", runs, Parts(tmp_path), epochs=1)
    count = len(runs["a"].local.plan.segments) - 1
    assert seen == [0, 1, *range(1, count)]
    assert [layer["hr"] for layer in found.plain()["layers"]["a"]] == [1.25] * count
    asked.ask("mi", runs, Parts(tmp_path), epochs=2)
    assert len(seen) == 1 + count + count


# --------------------------------------------------------------------------------------------------------------- seeds


def test_seeds_of_one_recipe_are_one_group(folders: dict[str, Path]) -> None:
    recipes = {name: localize.load(folder).recipe for name, folder in folders.items()}
    assert grouped(recipes) == {"dcl": ("dcl",), "dgl": ("dgl",), "backprop (2 seeds)": ("bp0", "bp1")}


def test_the_baseline_of_cka_is_another_seed(folders: dict[str, Path]) -> None:
    runs = {name: localize.load(folders[name]) for name in ("bp0", "bp1", "dgl")}
    found = asked.ask("cka", runs, Parts())
    assert found.baseline == "backprop, another seed"
    assert list(found.groups) == ["backprop, another seed", "dgl"]
    whole = analysis.cka(runs["bp0"], runs["bp1"])
    assert {layer.name: layer.values["cka"] for layer in found.by["bp1"]} == whole.pairs
    assert len(whole.pairs) == len(runs["bp0"].layered.plan.segments)
    without = asked.ask("cka", {name: runs[name] for name in ("bp0", "dgl")} | {"dgl2": runs["dgl"]}, Parts())
    assert without.baseline == ""
    assert "another seed" in without.said[-1]


# -------------------------------------------------------------------------------------------------------------- labels


def test_similarities_are_cosines_and_the_relation_is_numpys(dcl: loaded.LoadedRun) -> None:
    found = analysis.labels(dcl)
    embeddings = dcl.heads["dictionary"].weight.detach().double().numpy()
    for i, j, cosine, rate in found.pairs():
        a, b = embeddings[i], embeddings[j]
        assert cosine == pytest.approx(float(a @ b / np.sqrt(a @ a) / np.sqrt(b @ b)), abs=1e-9)
        counts = analysis.confusion(dcl).by["answer"].double() if (i, j) == (0, 1) else None
        if counts is not None:
            assert rate == pytest.approx(float(counts[0, 1] / counts[0].sum() + counts[1, 0] / counts[1].sum()) / 2)
    rates, cosines = [pair[3] for pair in found.pairs()], [pair[2] for pair in found.pairs()]
    if found.correlation is not None:
        assert found.correlation == pytest.approx(np.corrcoef(rates, cosines)[0, 1])
    assert len(lines(csv_table(found.csv()))) == 55


def test_a_planted_relation_is_found() -> None:
    similarity = torch.tensor([[1, 0.8, 0.1], [0.8, 1, 0.4], [0.1, 0.4, 1]], dtype=torch.float64)
    confused = 1 - similarity
    found = Labels(("a", "b", "c"), {"d": similarity}, confused, torch.zeros(3, 2))
    assert found.correlation == pytest.approx(-1)
    assert Labels(("a", "b"), {"d": similarity[:2, :2]}, confused[:2, :2], torch.zeros(2, 2)).correlation is None


def test_points_of_two_clusters_stay_two_clusters_in_the_plane() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(40, 5, generator=generator) + 20.0 * (torch.arange(40) % 2)[:, None]
    places = plane(vectors)
    nearest = torch.cdist(places, places).fill_diagonal_(torch.inf).argmin(1)
    assert torch.equal(nearest % 2, torch.arange(40) % 2)
    assert torch.equal(plane(vectors), places)


def test_neighbours_are_told_by_layer(dcl: loaded.LoadedRun) -> None:
    found = analysis.neighbours(dcl, images=60)
    ends = [segment.ends_at for segment in dcl.local.plan.segments.segments[:-1]]
    assert list(found.places) == ends
    assert list(found.images) == list(range(0, 360, 6))
    assert [dcl.test.test[i][1] for i in found.images] == list(found.labels)
    first = ends[0]
    distances = np.linalg.norm(found.places[first][:, None].numpy() - found.places[first][None].numpy(), axis=2)
    np.fill_diagonal(distances, np.inf)
    right = [found.labels[j] == found.labels[i] for i, j in enumerate(distances.argmin(1))]
    assert found.same()[first] == pytest.approx(sum(right) / 60)


# ---------------------------------------------------------------------------------------------------------------- maps


def test_a_planted_dictionary_is_seen_where_it_was_planted(folders: dict[str, Path]) -> None:
    """The embedding of each label is made the feature of one place, and is brightest there."""
    run = loaded.load(folders["dcl"])  # its own: it is changed
    x, _ = run.test.test[[0]]
    layer, which = list(localize.inference.saliency_layers(run.local).items())[-2]
    with torch.no_grad():
        value = run.local.features(x)[layer.segment][which][0]
        flat = F.normalize(value.flatten(1), dim=0)
        place = int((flat.T @ flat).sum(1).argmin())  # the one that is least like the others
        head = run.heads[f"head_{layer.segment}"]
        planted = run.heads["dictionary"].weight
        width = value.shape[0]
        wide = F.interpolate((flat[:, place] * 1.0)[None, None], size=planted.shape[1], mode="nearest")[0, 0]
        planted.copy_(torch.zeros_like(planted))
        planted += 100 * wide
        assert torch.allclose(F.adaptive_avg_pool1d(planted, width)[0], 100 * flat[:, place], rtol=1e-4)
        assert head is not None
    found = analysis.saliency(run, images=1)
    shown = found.maps[layer.ends_at][0, 0]
    products = (value.flatten(1).T @ flat[:, place]).view(shown.shape)
    wanted = (products - products.min()) / (products.max() - products.min())
    assert torch.allclose(shown, wanted, atol=1e-4)
    assert found.pixels.shape == (1, 3, 16, 16)
    assert 0 <= float(found.pixels.min()) <= float(found.pixels.max()) <= 1


def test_feature_maps_are_those_of_the_model(folders: dict[str, Path]) -> None:
    run = localize.load(folders["bp0"])
    taken: dict[str, Tensor] = {}
    run.model.layer1.register_forward_hook(lambda module, given, value: taken.update(layer1=value.clone()))
    found = analysis.features({"a": run}, image=3, channels=2)
    x, _ = run.test.test[[3]]
    with torch.no_grad():
        run.model(x)
    (layer,) = [one for one in found.by["a"] if one.layer.startswith("layer1")][-1:]
    assert torch.equal(layer.mean, taken["layer1"][0].abs().mean(0))
    energy = taken["layer1"][0].square().mean((1, 2))
    assert layer.channels == tuple(energy.argsort(descending=True)[:2].tolist())
    assert torch.equal(layer.maps, taken["layer1"][0][list(layer.channels)])
    assert torch.allclose(maps.pixels(run, x)[0], torch.from_numpy(np.asarray(found.pixels["a"])))


@pytest.mark.parametrize(
    "what", ["saliency", "features", "labels", "confusion", pytest.param("tsne", marks=pytest.mark.zoo)]
)
def test_every_kind_of_picture_is_drawn(folders: dict[str, Path], tmp_path: Path, what: str) -> None:
    pytest.importorskip("matplotlib")
    result = analyze(folders["dcl"], "--what", what, "-o", tmp_path)
    assert result.exit_code == 0, result.output
    (picture,) = [path for path in tmp_path.glob(f"{what}.*") if path.suffix != ".csv"]
    assert picture.stat().st_size > 2000
    assert len((tmp_path / f"{what}.csv").read_text().splitlines()) > 10


# --------------------------------------------------------------------------------------------------------- information


def planted(h: Tensor, x: Tensor, y: Tensor) -> estimates.Batches:
    return lambda: zip(h.split(64), x.split(64), y.split(64), strict=True)


@pytest.mark.slow
def test_what_noise_and_the_image_itself_say_of_the_image_is_known() -> None:
    """Of black and white noise a constant says 1 - H(0.3) nats, at best; the image itself says 1, nearly."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(256, 1, 8, 8, generator=generator) < 0.3).float()
    y = torch.zeros(256, dtype=torch.long)
    torch.manual_seed(0)
    own = estimates.reconstruction(planted(x, x, y), 1, (1, 8, 8), epochs=150)
    nothing = estimates.reconstruction(planted(torch.zeros_like(x), x, y), 1, (1, 8, 8), epochs=150)
    entropy = -(0.3 * math.log(0.3) + 0.7 * math.log(0.7))
    assert nothing == pytest.approx(1 - entropy, abs=0.03)
    assert own > 0.9


def test_what_features_say_of_the_class_is_known() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(256) % 4
    x = torch.zeros(256, 1, 4, 4)
    telling = F.one_hot(y, 4).float()[:, :, None, None].expand(-1, -1, 4, 4)
    silent = torch.randn(256, 4, 4, 4, generator=generator)
    found = []
    for h in (telling, silent):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
        )
        half = (h[:128], x[:128], y[:128]), (h[128:], x[128:], y[128:])
        found.append(estimates.prediction(planted(*half[0]), planted(*half[1]), net, epochs=12))
    assert found[0] == 1.0
    assert found[1] < 0.45


@pytest.mark.slow
def test_information_is_estimated_for_a_layer_of_a_run(dcl: loaded.LoadedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    of_class = estimates.prediction

    def look(train: estimates.Batches, test: estimates.Batches, net: nn.Module, *, epochs: int) -> float:
        batches = list(train())
        shapes.extend((tuple(h.shape[1:]), tuple(x.shape[1:])) for h, x, _ in batches[:1])
        assert sum(len(y) for _, _, y in batches) == len(dcl.train)
        assert all(0 <= float(x.min()) <= float(x.max()) <= 1 for _, x, _ in batches)
        small = [batches[:2], list(test())[:1]]
        return of_class(lambda: iter(small[0]), lambda: iter(small[1]), net, epochs=epochs)

    monkeypatch.setattr(estimates, "prediction", look)
    found = estimates.information(dcl, 0, epochs=1, classifier="cifar/resnet20")
    width = dcl.local.plan.segments.segments[0].features[0].width
    assert shapes == [((width, 16, 16), (3, 16, 16))]
    assert found.ends_at == dcl.local.plan.segments.segments[0].ends_at
    assert found.of_rest == pytest.approx(found.of_image - found.of_class + 1)
    with pytest.raises(OptionError, match="there is no segment 99"):
        estimates.information(dcl, 99)


# ------------------------------------------------------------------------------------------------- runs side by side


def test_convergence_is_what_the_runs_have_written(folders: dict[str, Path]) -> None:
    typed = [str(folders[name]) for name in ("bp0", "bp1", "dgl")]
    printed = json.loads(analyze(*typed, "--what", "convergence", "--json").stdout)
    for folder in typed:
        written = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        for key in ("epoch", "train_loss", "train_accuracy", "test_accuracy"):
            assert [one[key] for one in printed["epochs"][folder]] == [one[key] for one in written]
    found = analysis.convergence({folder: localize.load(folder) for folder in typed})
    (_, middle, low, high), *_ = found.averaged("train_loss")["backprop (2 seeds)"]
    values = [printed["epochs"][folder][0]["train_loss"] for folder in typed[:2]]
    assert (middle, low, high) == (pytest.approx(sum(values) / 2), min(values), max(values))


def test_epochs_are_counted_to_what_all_runs_reach(folders: dict[str, Path]) -> None:
    import dataclasses

    (epoch, *_) = localize.load(folders["bp0"]).metrics
    curves = {"a": (0.2, 0.6, 0.9), "b": (0.1, 0.3, 0.6)}
    by = {
        name: tuple(dataclasses.replace(epoch, epoch=i, test_accuracy=v) for i, v in enumerate(values, start=1))
        for name, values in curves.items()
    }
    found = Convergence(by, {"a": ("a",), "b": ("b",)})
    assert found.common == 0.6
    assert found.reached == {"a": 2, "b": 3}


def test_the_pareto_front_is_what_no_other_dominates() -> None:
    generator = torch.Generator().manual_seed(0)
    points = [tuple(point) for point in torch.randint(0, 6, (40, 2), generator=generator).tolist()]
    names = [str(i) for i in range(40)]
    wanted = []
    for i, (cost, loss) in enumerate(points):
        better = [j for j, (c, o) in enumerate(points) if c <= cost and o <= loss and (c < cost or o < loss)]
        wanted += [] if better else [names[i]]
    assert front(points, names) == wanted
    by = {
        "a": Cost(("a",), (0.9,), 10, 1, 1),
        "b": Cost(("b",), (0.8,), 20, 1, 0.5),
        "c": Cost(("c",), (0.95, 0.97), 30),
    }
    found = Costs(by, 8, "cpu")
    assert (found.front("peak"), found.front("macs"), found.front("seconds")) == (["a", "c"], ["a"], ["b", "a"])


@pytest.mark.slow
def test_costs_are_those_that_compare_predicts(folders: dict[str, Path], tmp_path: Path) -> None:
    from localize import build
    from localize.estimate import memory

    typed = [str(folders[name]) for name in ("bp0", "bp1", "dgl")]
    printed = json.loads(analyze(*typed, "--what", "cost", "--json").stdout)
    first, second = printed["recipes"]
    assert (first["recipe"], first["runs"], second["runs"]) == ("backprop (2 seeds)", typed[:2], typed[2:])
    assert first["accuracy"] == pytest.approx(sum(first["accuracies"]) / 2)
    for one in printed["recipes"]:
        run = localize.load(one["runs"][0])
        found = memory.predict(build.build(run.recipe, data=False), 32)
        assert (one["peak_bytes"], one["multiply_adds"]) == (found.peak, found.macs)
        assert one["seconds"] > 0
        assert one["accuracies"][0] == run.metrics[-1].test_accuracy
    assert printed["batch_size"] == 32


def test_the_counts_of_a_class_without_images_are_no_numbers_in_json() -> None:
    found = Confusion(("a", "b"), {"answer": torch.tensor([[3, 1], [0, 0]])})
    assert json.dumps(found.plain(), allow_nan=False)
    assert found.shares["answer"].tolist() == [[0.75, 0.25], [0.0, 0.0]]
    assert found.table()[2] == ["b", "-"]
