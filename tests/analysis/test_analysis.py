"""Analyses against computations that share nothing with them, on runs that were trained."""

from __future__ import annotations

import csv
import dataclasses
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeClassifier
from sklearn.metrics import confusion_matrix
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

import localize
from localize import analysis, train
from localize.analysis import asked
from localize.analysis.kept import Parts
from localize.analysis.kernels import _normalised, hsic
from localize.analysis.probes import _Sums
from localize.cli import app
from localize.errors import OptionError
from localize.recipes.preprocessing import Preprocessing
from localize.train import TrainConfig, loaded
from localize.train.data.loaders import MemoryImages


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, made = tmp_path_factory.mktemp("runs"), {}
    for method in ("dcl-s", "backprop", "dgl", "auglocal"):
        made[method] = root / method
        train.run(
            TrainConfig(
                "cifar/resnet20" if method == "auglocal" else "cifar/fc_mnist", recipe=method,
                input_shape=(1, 8, 8), data="digits", epochs=2, lr=0.005,
                batch_size=64, device="cpu", output=str(made[method]),
            )
        )  # fmt: skip
    return made


# ---------------------------------------------------------------------------------------------------------- confusion


@pytest.mark.parametrize("method", ["dcl-s", "backprop", "dgl", "auglocal"])
def test_confusions_are_those_that_scikit_learn_counts_over_what_eval_predicts(
    folders: dict[str, Path], method: str
) -> None:
    run = localize.load(folders[method])

    found = analysis.confusion(run, batch_size=100)

    x, y = run.test.test[list(range(360))]
    with torch.no_grad():
        wanted = confusion_matrix(y, run.model(x).argmax(1))
    assert np.array_equal(found.by["answer"].numpy(), wanted)
    evaluated = json.loads(CliRunner().invoke(app, ["eval", str(folders[method]), "--json"]).stdout)
    assert found.accuracy["answer"] == pytest.approx(evaluated["accuracy"], abs=1e-12)
    assert {n: v for n, v in found.accuracy.items() if n != "answer"} == pytest.approx(
        {one.name: one.test_accuracy for one in run.metrics[-1].segments}
    )
    assert all(counts.sum(1).tolist() == [36] * 10 for counts in found.by.values())


def test_the_command_prints_the_same_counts(folders: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "counts.csv"
    typed = ["analyze", str(folders["dcl-s"]), "--what", "confusion", "--device", "cpu"]
    printed = json.loads(CliRunner().invoke(app, [*typed, "--json", "--csv", str(file)]).stdout)
    found = analysis.confusion(localize.load(folders["dcl-s"]))

    assert printed["confusion"] == {name: counts.tolist() for name, counts in found.by.items()}
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert sum(int(row["images"]) for row in rows if row["predicted_by"] == "answer") == 360
    shown = CliRunner().invoke(app, typed).stdout.splitlines()
    again = CliRunner().invoke(app, [*typed, "--csv", str(file)])
    assert (again.exit_code, "exists" in again.stderr) == (4, True)
    assert shown[0].split() == ["class", *found.by]
    assert shown[11].split()[:2] == ["all", f"{100 * found.accuracy['answer']:.1f}"]


# -------------------------------------------------------------------------------------------------------------- probe


@pytest.mark.parametrize("method", ["dcl-s", "dgl", "auglocal"])
def test_a_probe_is_the_ridge_classifier_of_scikit_learn(folders: dict[str, Path], method: str) -> None:
    run = localize.load(folders[method])
    (x, y), (test_x, test_y) = run.train[list(range(len(run.train)))], run.test.test[list(range(360))]
    with torch.no_grad():
        features, tested = (
            [(x.flatten(2).mean(2),), *run.local.features(x)],
            [
                (test_x.flatten(2).mean(2),),
                *run.local.features(test_x),
            ],
        )

    found = analysis.probe(run, alpha=2.0, batch_size=100)

    assert [one.segment for one in found] == list(range(-1, len(run.local.plan.segments) - 1))
    for one, (mine,), (theirs,) in zip(found, features, tested, strict=False):
        mine, theirs = (one.flatten(2).mean(2) if one.dim() == 4 else one for one in (mine, theirs))
        wanted = RidgeClassifier(alpha=2.0).fit(mine.double().numpy(), y.numpy())
        assert one.train_accuracy == pytest.approx(wanted.score(mine.double().numpy(), y.numpy()), abs=1e-3)
        assert one.test_accuracy == pytest.approx(wanted.score(theirs.double().numpy(), test_y.numpy()), abs=3e-3)
        assert one.width == mine.shape[1]


def test_planted_features_are_told_apart_and_noise_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    planted = torch.eye(3)[labels] + 0.01 * torch.randn(300, 3, generator=generator)
    noise = torch.randn(300, 3, generator=generator)
    for vectors, right in ((planted.double(), True), (noise.double(), False)):
        sums = _Sums(3, 3, torch.device("cpu"))
        for start in (0, 100, 200):
            sums.add(vectors[start : start + 100], labels[start : start + 100])
        weights, bias = sums.solve(1.0)
        accuracy = float(((vectors @ weights + bias).argmax(1) == labels).double().mean())
        assert (accuracy == 1.0) if right else (accuracy < 0.5)


def test_the_command_prints_the_same_probes(folders: dict[str, Path]) -> None:
    folder = str(folders["dgl"])
    typed = ["analyze", folder, "--what", "probe", "--device", "cpu"]
    printed = json.loads(CliRunner().invoke(app, [*typed, "--json"]).stdout)
    found = analysis.probe(localize.load(folder))
    assert [one["test"] for one in printed["layers"][folder]] == [one.test_accuracy for one in found]
    assert [one["layer"] for one in printed["layers"][folder]] == ["images", *(one.ends_at for one in found[1:])]
    assert len(CliRunner().invoke(app, typed).stdout.splitlines()) == 1 + len(found)


def test_a_run_of_one_segment_is_asked_by_its_local_layers(folders: dict[str, Path]) -> None:
    run = localize.load(folders["backprop"])
    taken: dict[str, Tensor] = {}

    def take(name: str) -> None:
        run.model.get_submodule(name).register_forward_hook(lambda *given: taken.update({name: given[2].clone()}))

    take("layer1")
    x, _ = run.test.test[list(range(8))]
    with torch.no_grad():
        features = run.layered.features(x)
        logits = run.model(x)

    assert len(run.local.plan.segments) == 1
    assert torch.equal(features[-1][0], logits)
    assert [segment.ends_at for segment in run.layered.plan.segments.segments] == ["layer1", "layer2", "output"]
    assert torch.equal(features[0][0], taken["layer1"])
    assert localize.load(folders["dgl"]).layered.plan.method == "dgl"


# ---------------------------------------------------------------------------------------------------------------- cka


def by_definition(x: np.ndarray, y: np.ndarray) -> float:
    """Song et al. 2012, eq. 4: sums over all i, j, q, r that differ, term by term."""
    n = len(x)
    k, el = x @ x.T, y @ y.T
    total = 0.0
    for i in range(n):
        for j in (j for j in range(n) if j != i):
            for q in (q for q in range(n) if q not in (i, j)):
                for r in (r for r in range(n) if r not in (i, j, q)):
                    total += k[i, j] * el[i, j] + k[i, j] * el[q, r] - 2 * k[i, j] * el[i, q]
    return total / (n * (n - 1) * (n - 2) * (n - 3))


def without_diagonal(x: Tensor) -> Tensor:
    kernel = x @ x.T
    return kernel - torch.diag(kernel.diagonal())


def test_hsic_is_the_sum_over_quadruples() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(7, d, generator=generator, dtype=torch.float64) for d in (3, 5))
    found = hsic(without_diagonal(x)[None], without_diagonal(y)[None])
    assert float(found) == pytest.approx(by_definition(x.numpy(), y.numpy()), rel=1e-10)


def test_cka_is_one_of_a_layer_with_itself_and_that_of_the_closed_form(folders: dict[str, Path]) -> None:
    run, other = localize.load(folders["dcl-s"]), localize.load(folders["backprop"])

    own = analysis.cka(run, batch_size=360)
    across = analysis.cka(run, other, batch_size=360)

    assert torch.allclose(own.values.diagonal(), torch.ones(len(own.rows), dtype=torch.float64))
    assert torch.allclose(own.values, own.values.T)
    x, _ = run.test.test[list(range(360))]
    with torch.no_grad():
        first = run.local.features(x)[0][0].double()
        last = other.layered.features(x)[-1][0].double()
    k, el = (without_diagonal(one.flatten(1))[None] for one in (first, last))
    wanted = hsic(k, el) / (hsic(k, k) * hsic(el, el)).sqrt()
    assert float(across.values[0, -1]) == pytest.approx(float(wanted), rel=1e-9)
    assert across.columns == tuple(s.ends_at for s in other.layered.plan.segments.segments)


def test_minibatches_estimate_what_the_whole_gives(folders: dict[str, Path]) -> None:
    run = localize.load(folders["dgl"])
    whole, parts = analysis.cka(run, batch_size=360), analysis.cka(run, batch_size=60)
    assert (whole.values - parts.values).abs().max() < 0.05
    with pytest.raises(OptionError, match="four images"):
        analysis.cka(run, batch_size=3)


def test_the_command_compares_two_runs(folders: dict[str, Path]) -> None:
    typed = ["analyze", str(folders["dcl-s"]), str(folders["dgl"]), "--what", "cka", "--device", "cpu"]
    printed = json.loads(CliRunner().invoke(app, [*typed, "--json"]).stdout)
    found = analysis.cka(localize.load(folders["dcl-s"]), localize.load(folders["dgl"]))
    assert printed["values"] == found.values.tolist()
    assert CliRunner().invoke(app, typed).stdout.splitlines()[0].split() == list(found.columns)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--what", "dreams"], "its values are confusion, probe, cka, mi"),
        (["again", "--what", "confusion"], "takes one run, not 2"),
    ],
)
def test_what_cannot_be_asked_is_refused(folders: dict[str, Path], more: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["analyze", str(folders["dgl"]), *more])
    assert result.exit_code == 2
    assert words in result.stderr


def test_features_that_never_vary_have_no_similarity(folders: dict[str, Path]) -> None:
    run = localize.load(folders["dgl"])
    with torch.no_grad():
        for parameter in run.model.get_submodule("layer1").parameters():
            parameter.zero_()
    found = analysis.cka(run)
    assert json.loads(json.dumps(found.plain(), allow_nan=False))["values"][0][0] is None
    assert found.table()[1][1] == "-"
    assert list(found.csv())[1][1] is None


def test_images_are_normalised_as_each_run_wants_them() -> None:
    pixels = torch.rand(2, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    mine, theirs = Preprocessing((1, 3, 3), (0.3,), (0.4,)), Preprocessing((1, 3, 3), (0.5,), (0.1,))
    found = _normalised((pixels - 0.3) / 0.4, mine, theirs)
    assert torch.allclose(found, (pixels - 0.5) / 0.1, atol=1e-5)


def changed(run: loaded.LoadedRun, **fields: Any) -> loaded.LoadedRun:
    return dataclasses.replace(run, recipe=dataclasses.replace(run.recipe, **fields))


def test_runs_on_inputs_of_other_sizes_are_refused(folders: dict[str, Path]) -> None:
    run = localize.load(folders["dgl"])
    other = changed(run, preprocessing=dataclasses.replace(run.preprocessing, input_size=(1, 9, 9)))
    with pytest.raises(OptionError, match=r"does not prepare images.*\n.*\(1, 8, 8\) and \(1, 9, 9\)"):
        analysis.cka(run, other)


def test_accuracies_on_other_data_are_not_compared(folders: dict[str, Path]) -> None:
    run = localize.load(folders["dgl"])
    record = run.recipe.dataset
    assert record is not None
    other = changed(run, dataset=dataclasses.replace(record, classes=record.classes[::-1]))
    for what in ("convergence", "cost", "probe", "mi", "features"):
        with pytest.raises(OptionError, match="b was not trained on the data of a"):
            asked.ask(what, {"a": run, "b": other}, Parts())


# ------------------------------------------------------------------------------------------------------------- memory


class Live(TorchDispatchMode):
    """The most bytes of floating-point tensors that live together, of those that are made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {one.untyped_storage().data_ptr() for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        for one in tree_leaves(made):
            if isinstance(one, Tensor) and one.is_floating_point() and one.untyped_storage().data_ptr() not in given:
                size = one.untyped_storage().nbytes()
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(one, self.gone, size)
        return made

    def gone(self, size: int) -> None:
        self.now -= size


def of_images(run: loaded.LoadedRun, count: int) -> loaded.LoadedRun:
    """Return a run whose training and test images are as many of its own training images."""
    images: Any = run.train
    few = MemoryImages(images.images[:count], images.labels[:count], images.fit)
    other = dataclasses.replace(run)
    other.__dict__["train"] = few
    other.__dict__["test"] = dataclasses.replace(run.test, test=few)
    return other


STREAMING: dict[str, Callable[[loaded.LoadedRun], object]] = {
    "confusion": lambda run: analysis.confusion(run, batch_size=32),
    "probe": lambda run: analysis.probe(run, batch_size=32),
    "cka": lambda run: analysis.cka(run, batch_size=32),
    "labels": lambda run: analysis.labels(run, batch_size=32),
    "mi": lambda run: analysis.information(run, 0, epochs=1, batch_size=32, classifier="cifar/resnet20"),
}


def test_every_analysis_of_all_images_is_one_that_streams() -> None:
    assert {*STREAMING} == {*asked.ANALYSES} - {"tsne", "saliency", "features", "convergence", "cost"}


@pytest.mark.parametrize("what", STREAMING)
def test_memory_does_not_grow_with_the_data(folders: dict[str, Path], what: str) -> None:
    run = localize.load(folders["dcl-s"])
    peaks = []
    for count in (128, 128, 512):  # the first makes what lives on
        few = of_images(run, count)
        with Live() as live:
            STREAMING[what](few)
        peaks.append(live.most)
    assert peaks[1] > 0
    assert peaks[2] <= 1.01 * peaks[1]
