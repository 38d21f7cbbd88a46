"""What the folder of a run says, read without building its model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from localize import folder, recipes
from localize.errors import MissingError
from localize.recipes import Recipe, trust
from localize.train import TrainConfig, runs
from localize.train.metrics import EpochMetrics
from localize.train.metrics import read as read_metrics


@dataclass(frozen=True)
class Training:
    """A run, as far as it has come."""

    name: str
    """Its folder, as it was typed."""
    recipe: Recipe
    config: TrainConfig
    epochs: tuple[EpochMetrics, ...]
    finished: bool
    text: str
    """Its recipe as it lies in the folder."""

    @property
    def best(self) -> EpochMetrics:
        """The first of the epochs with the highest test accuracy."""
        return max(self.epochs, key=lambda epoch: epoch.test_accuracy)

    @property
    def seconds(self) -> float | None:
        """Seconds of loading and training, without tests; None where ``metrics.jsonl`` does not say."""
        found = [epoch.seconds for epoch in self.epochs]
        return None if None in found else sum(seconds for seconds in found if seconds is not None)

    @property
    def images_per_second(self) -> float | None:
        """Images per second of loading and training, over all epochs."""
        return sum(epoch.images or 0 for epoch in self.epochs) / self.seconds if self.seconds else None


def read(name: str, *, trust_code: bool = False) -> Training:
    """Read the folder of a run.

    Raises:
        MissingError: it is not the folder of a run.
        LocalizeError: its recipe or its metrics cannot be read.
        UntrustedCodeError: its recipe names a file of code, see :mod:`localize.recipes.trust`.
    """
    path = Path(name)
    file = path / recipes.FILE_NAME
    if not file.is_file():
        raise _no_run(path, f"it has no {file.name}." if path.is_dir() else "there is no such folder.")
    if (path / folder.STEP).exists() and not (path / runs.METRICS).exists():
        raise _no_run(path, f"it holds {folder.STEP}: localize convert wrote it, and nothing was trained.")
    recipe = recipes.load(file)
    if recipe.model is None or "data" not in recipe.train:
        raise _no_run(path, f"its {file.name} does not say which model was trained on which data.")
    trust.refuse_untrusted(path, recipe, trust_code=trust_code)
    config = runs.config_of(recipe)
    finished = (path / runs.BACKBONE).is_file()
    return Training(name, recipe, config, read_metrics(path), finished, file.read_text(encoding="utf-8"))


def _no_run(path: Path, fact: str) -> MissingError:
    inside = sorted(child.parent.name for child in path.glob(f"*/{runs.METRICS}"))
    if inside:
        told = f"it holds runs: {', '.join(inside[:5])}{', ...' if len(inside) > 5 else ''}."
        return MissingError(f"{path} is not the folder of a run.", facts=(fact, told), help=f"localize report {path}/*")
    help = "localize train MODEL --output DIR makes one"
    return MissingError(f"{path} is not the folder of a run.", facts=fact, help=help)
