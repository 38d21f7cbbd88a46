"""One object for a finished run: its model, heads, recipe and data, for notebooks and scripts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from PIL import Image
from torch import Tensor, nn

from localize import inference, methods
from localize.compiler import convert
from localize.cutting import cuts
from localize.ir import CutSpec
from localize.recipes import Recipe
from localize.recipes.preprocessing import Preprocessing
from localize.runtime.devices import choose_device
from localize.runtime.model import LocalModel
from localize.train import data, evaluation, metrics, runs
from localize.train.data import fingerprint
from localize.train.data.decoding import converted, decode, to_tensor
from localize.train.data.loaders import Fit
from localize.train.data.transforms import AUGMENTATIONS, evaluation_transform


@dataclass(frozen=True)
class LoadedRun:
    """A finished run, as :func:`load` returns it.

    ::

        run = localize.load("runs/resnet20-dcl-digits-seed0")
        scores = run.model(run.transform(Image.open("seven.png"))[None])
        run.classes[scores.argmax()]
        for x, y in DataLoader(run.test.test, 256):
            run.local.scores(x)  # scores of every loss that makes class scores
    """

    folder: Path
    local: LocalModel
    """The local model, in eval mode: ``scores``, ``features``, ``step``; its plan, program and text."""
    recipe: Recipe
    """The complete recipe of the run, as written when it started."""
    metrics: tuple[metrics.EpochMetrics, ...]
    """Metrics of each epoch, for the model and for every local loss."""
    data_dir: str | None = None

    @property
    def model(self) -> nn.Module:
        """The plain model, with its own keys; it shares its parameters with ``local``."""
        return self.local.trunk

    @property
    def heads(self) -> nn.ModuleDict:
        """The heads and shared blocks, by name."""
        return self.local.heads

    @cached_property
    def layered(self) -> LocalModel:
        """A local model in eval mode whose ``features`` are those after every layer.

        This is ``local``; but if the run was trained as one segment, its model is cut after each local layer, hidden
        linear layers included, with the same weights.

        Raises:
            InputError: in eval mode the model computes operations that its segments do not contain.
        """
        local = self.local.eval()
        inference.needs_segments(local)
        if len(local.plan.segments) > 1:
            return local
        trunk = local.plan.segments.trunk
        grain = replace(methods.get(methods.CHECKPOINTING)().grain, classifier="own", hidden_linear="own")
        names = tuple(cut.name for cut in cuts.place(trunk, CutSpec("max"), grain=grain).cuts)
        recipe = Recipe(methods.CHECKPOINTING, cut=CutSpec(at=names) if names else CutSpec(1), shared=True)
        return convert(trunk, recipe).eval()

    @property
    def preprocessing(self) -> Preprocessing:
        """How an image becomes the input of the model."""
        assert self.recipe.preprocessing is not None, "a run writes it when it starts"
        return self.recipe.preprocessing

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the class ids."""
        assert self.recipe.dataset is not None, "a run writes it when it starts"
        return self.recipe.dataset.classes

    def transform(self, image: Image.Image | str | Path) -> Tensor:
        """Return an image, or the image in a file, preprocessed as in tests: float32 (C, H, W), normalised.

        Args:
            image: a PIL image, or the path of a file.

        Raises:
            DamagedImageError: a file is not an image.
        """
        how = self.preprocessing
        pixels = converted("the image", image, how.mode) if isinstance(image, Image.Image) else decode(image, how.mode)
        fit = Fit(how, AUGMENTATIONS["none"])
        return fit.finish(to_tensor(evaluation_transform(how)(pixels), how)[None])[0]

    @cached_property
    def test(self) -> data.TestSplit:
        """The test images of the run's data set, read on first use: ``run.test.test[i]`` is (image, class id).

        Raises:
            MissingError: they have been moved, or have changed since the run was started.
        """
        return evaluation.test_images(self.folder, self.recipe, None, self.data_dir, download=False, accept=False)

    @cached_property
    def train(self) -> data.Images:
        """The training images of the run, preprocessed as in tests: ``run.train[i]`` is (image, class id).

        Raises:
            MissingError: they have been moved, or have changed since the run was started.
        """
        asked, record = self.recipe.train, self.recipe.dataset
        assert record is not None, "a run writes it when it starts"
        listing = runs.listing_of(self.folder)
        splits = data.load(
            record.name,
            self.preprocessing.input_size,
            data_dir=self.data_dir or data.located(asked.get("data_dir"), listing),
            preprocessing=self.preprocessing,
            split=asked.get("split"),
            seed=asked.get("seed", 0),
            listing=listing,
            hashed=record.hashed,
        )
        fingerprint.refuse_changed(
            record, splits.record, (listing, splits.listing), parts=("train",), accept="localize train --resume RUN"
        )
        return splits.train


def load(
    folder: str | Path, *, device: str = "cpu", data_dir: str | None = None, trust_code: bool = False
) -> LoadedRun:
    """Load a finished run: model, heads, recipe, classes, transform and test images in one object.

    Args:
        folder: the run folder that ``localize train`` wrote.
        device: device of the model, see :func:`localize.runtime.devices.choose_device`.
        data_dir: where the data are now; default: where they were.
        trust_code: run the code file that the run names, see :mod:`localize.recipes.trust`.

    Returns:
        The run, with its model in eval mode.

    Raises:
        MissingError: the folder is not that of a finished run, or its files are damaged.
        UntrustedCodeError: it names a code file, and ``trust_code`` is false.
        LocalizeError: its recipe cannot be carried out here.
    """
    where, path = choose_device(device), Path(folder)
    local, recipe = runs.load(path, trust_code=trust_code)
    recipe = runs.fed(path, recipe)
    return LoadedRun(path, local.eval().to(where), recipe, metrics.read(path), data_dir)
