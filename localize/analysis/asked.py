"""The analyses by name: how many runs each takes, and how the results of several runs are combined."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor, float64, tensor

from localize.analysis import confusions, estimates, kernels, maps, planes, probes
from localize.analysis.confusions import Confusion
from localize.analysis.costs import Costs, cost
from localize.analysis.curves import Convergence, convergence
from localize.analysis.embeddings import Labels, labels
from localize.analysis.found import Depths, Found, Layer
from localize.analysis.kept import Parts, identity
from localize.analysis.kernels import CKA
from localize.analysis.seeds import grouped, mean
from localize.errors import OptionError
from localize.recipes.preprocessing import DataRecord
from localize.train.loaded import LoadedRun

Runs = Mapping[str, LoadedRun]
"""Runs by folder, as given by the user."""


@dataclass(frozen=True)
class Analysis:
    """An analysis of runs."""

    ask: Callable[..., Found]
    """Function of the runs and the finished parts of the analysis."""
    most: int | None = None
    """Largest number of runs; None: any number."""
    picture: str = "svg"
    """Format of its picture."""
    options: tuple[str, ...] = ()
    """Names of its options."""


def check(what: str, runs: Sequence[str], options: Mapping[str, Any]) -> None:
    """Refuse more runs than an analysis takes, and options that it does not have.

    Raises:
        OptionError: there are too many runs, or it does not have an option.
    """
    for name in options:
        if name not in ANALYSES[what].options:
            having = [one for one, analysis in ANALYSES.items() if name in analysis.options]
            raise OptionError(f"--what {what} has no option --{name}.", help=f"--what {' or '.join(having)} has it")
    most = ANALYSES[what].most
    if most is not None and len(runs) > most:
        raise OptionError(
            f"--what {what} takes {'one run' if most == 1 else f'{most} runs at most'}, not {len(runs)}.",
            facts=", ".join(runs),
            help=f"localize analyze {runs[0]} --what {what}",
        )


def ask(what: str, runs: Runs, parts: Parts, **options: Any) -> Found:
    """Return the results of an analysis of runs.

    Args:
        what: a name in :data:`ANALYSES`.
        runs: the runs, by folder.
        parts: finished parts, which are not computed again.
        options: options named in :attr:`Analysis.options`.

    Raises:
        LocalizeError: the analysis does not work for these runs; the message says why.
    """
    if what != "cka":  # which shows the images of the first run to all of them
        _check_same_data(runs)
    return ANALYSES[what].ask(runs, parts, **options)


def _check_same_data(runs: Runs) -> None:
    """Refuse runs on different data, whose results cannot be compared."""
    (first, run), *others = runs.items()
    record = run.recipe.dataset
    assert record is not None, "a run writes it when it starts"
    for folder, other in others:
        theirs = other.recipe.dataset
        assert theirs is not None, "a run writes it when it starts"
        same = record.name == theirs.name or record.test.sha256 == theirs.test.sha256
        if not same or record.classes != theirs.classes:
            raise OptionError(
                f"{folder} was not trained on the data of {first}.",
                facts=f"{first}: {_told(record)}. {folder}: {_told(theirs)}.",
                help="use runs on the same data, or one command for each; --what cka gives all runs the same images",
            )


def _told(record: DataRecord) -> str:
    return f"{record.name}, {len(record.classes)} classes, {record.test.images} test images"


def _groups(runs: Runs) -> dict[str, tuple[str, ...]]:
    return grouped({folder: run.recipe for folder, run in runs.items()})


def _confusion(runs: Runs, parts: Parts) -> Confusion:
    (run,) = runs.values()

    def make() -> dict[str, Any]:
        return {name: counts.tolist() for name, counts in confusions.confusion(run).by.items()}

    found = parts.get("confusion", identity(run), make)
    return Confusion(run.classes, {name: tensor(counts) for name, counts in found.items()})


def _probes(runs: Runs, parts: Parts) -> Depths:
    by = {}
    for folder, run in runs.items():

        def make(run: LoadedRun = run) -> list[dict[str, Any]]:
            return [asdict(one) for one in probes.probe(run)]

        found = parts.get("probe", identity(run), make)
        by[folder] = tuple(
            Layer(
                one["ends_at"],
                (one["segment"] + 1) / len(run.layered.plan.segments),
                {"test": one["test_accuracy"], "train": one["train_accuracy"]},
            )
            for one in found
        )
    quantities = {"test": "test accuracy", "train": "training accuracy"}
    title = "linear classifiers on the input of each segment"
    return Depths(title, quantities, by, _groups(runs), drawn=("test",))


def _cka(runs: Runs, parts: Parts) -> CKA | Depths:
    (first, run), *others = runs.items()
    if len(others) < 2:
        return _matrix(run, others[0][1] if others else None, parts)
    segments = run.layered.plan.segments.segments
    places = {segment.ends_at: (segment.index + 1) / len(segments) for segment in segments}
    by = {}
    for folder, other in others:
        pairs = _matrix(run, other, parts).pairs
        if not pairs:
            raise OptionError(
                f"no layer of {folder} ends where one of {first} does.",
                facts="with more than two runs, layers of the same name are compared.",
                help="use runs of one model with the same cuts, or only two runs",
            )
        by[folder] = tuple(Layer(name, places[name], {"cka": value}) for name, value in pairs.items())
    groups = _groups(runs)
    own = next(name for name, members in groups.items() if first in members)
    seeds = tuple(member for member in groups[own] if member != first)
    baseline = f"{run.recipe.method}, another seed" if seeds else ""
    shown = {baseline: seeds} if seeds else {}
    shown |= {name: members for name, members in groups.items() if name != own}
    said = []
    for name, members in shown.items():
        average = mean([layer.values["cka"] for member in members for layer in by[member]])
        said.append(f"{name}: mean CKA {average:.3f}")
    if not seeds:
        said.append(f"no run of {first} with another seed was given, which would show the effect of chance")
    title = f"similarity of layers to those of {run.recipe.method}"
    return Depths(title, {"cka": "linear CKA"}, by, shown, baseline=baseline, said=tuple(said))


def _matrix(run: LoadedRun, other: LoadedRun | None, parts: Parts) -> CKA:
    key = {"run": identity(run), "other": None if other is None else identity(other)}
    found = parts.get("cka", key, lambda: kernels.cka(run, other).plain())
    values = [[float("nan") if value is None else value for value in row] for row in found["values"]]
    return CKA(tuple(found["rows"]), tuple(found["columns"]), tensor(values, dtype=float64))


def _information(runs: Runs, parts: Parts, epochs: int = estimates.EPOCHS) -> Depths:
    by = {}
    for folder, run in runs.items():
        segments = run.layered.plan.segments.segments
        layers = []
        for segment in segments[:-1]:
            key = {"run": identity(run), "segment": segment.index, "epochs": epochs}

            def make(run: LoadedRun = run, index: int = segment.index) -> dict[str, Any]:
                return asdict(estimates.information(run, index, epochs=epochs))

            one = estimates.Information(**parts.get("mi", key, make))
            values = {"hx": one.of_image, "hy": one.of_class, "hr": one.of_rest}
            layers.append(Layer(segment.ends_at, (segment.index + 1) / len(segments), values))
        by[folder] = tuple(layers)
    quantities = {"hx": "I(h, x), estimate", "hy": "I(h, y), estimate", "hr": "I(h, r), upper bound + 1"}
    said = f"networks trained for {epochs} epochs; the paper trains the classifier for 160"
    return Depths(
        "information in features about the image, its class, and the rest", quantities, by, _groups(runs), said=(said,)
    )


def _neighbours(runs: Runs, parts: Parts) -> planes.Neighbours:
    (run,) = runs.values()
    images: tuple[int, ...] = ()
    labels: tuple[int, ...] = ()
    places: dict[str, Tensor] = {}
    for segment in run.layered.plan.segments.segments[:-1]:
        key = {"run": identity(run), "segment": segment.index}

        def make(name: str = segment.ends_at) -> dict[str, Any]:
            return planes.neighbours(run, name).plain()

        one = parts.get("tsne", key, make)
        images, labels = tuple(one["images"]), tuple(one["labels"])
        places |= {name: tensor(found, dtype=float64) for name, found in one["places"].items()}
    return planes.Neighbours(run.classes, images, labels, places)


def _features(runs: Runs, parts: Parts) -> maps.Features:
    names = {folder: name for name, members in _groups(runs).items() for folder in members}
    if len(set(names.values())) < len(names):
        names = {folder: Path(folder).name for folder in runs}
    return replace(maps.features(runs), names=names)


def _labels(runs: Runs, parts: Parts) -> Labels:
    (run,) = runs.values()
    return labels(run, counted=lambda: _confusion(runs, parts))


def _saliency(runs: Runs, parts: Parts) -> maps.Saliency:
    (run,) = runs.values()
    return maps.saliency(run)


def _convergence(runs: Runs, parts: Parts) -> Convergence:
    return convergence(runs)


def _costs(runs: Runs, parts: Parts) -> Costs:
    return cost(runs)


ANALYSES: Mapping[str, Analysis] = MappingProxyType(
    {
        "confusion": Analysis(_confusion, most=1),
        "probe": Analysis(_probes),
        "cka": Analysis(_cka),
        "mi": Analysis(_information, options=("epochs",)),
        "labels": Analysis(_labels, most=1),
        "tsne": Analysis(_neighbours, most=1, picture="png"),
        "saliency": Analysis(_saliency, most=1, picture="png"),
        "features": Analysis(_features, picture="png"),
        "convergence": Analysis(_convergence),
        "cost": Analysis(_costs),
    }
)
