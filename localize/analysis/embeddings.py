"""The space of the label embeddings: how similar they are, and how this relates to confusions.

S. Choi, M. Jeon, Y. Hwang, J. Oh, S. Lim, J. Lee, M. Kang. Dictionary contrastive learning for efficient local
supervision without auxiliary networks. ICLR 2024 (figures 6, 7, VI, VII).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.manifold import TSNE
from torch import Tensor

from localize import inference
from localize.analysis.confusions import OUTPUT, Confusion, confusion
from localize.train.loaded import LoadedRun


@dataclass(frozen=True)
class Labels:
    """Similarities of the label embeddings, and how often the labels are confused."""

    classes: tuple[str, ...]
    similarity: Mapping[str, Tensor]
    """float64 (Z, Z) by the name of the dictionary: cosine of two embeddings (figure VI a)."""
    confused: Tensor
    """float64 (Z, Z): share of the test images of class i that the model predicts as class j (figure VI b)."""
    places: Tensor
    """float64 (Z, 2): the embeddings of the last dictionary as points in a plane, from t-SNE (figure 6)."""

    def pairs(self) -> list[tuple[int, int, float, float]]:
        """Return class i, class j > i, cosine in the last dictionary, and mean confusion both ways (figure 7)."""
        last = list(self.similarity.values())[-1]
        both = (self.confused + self.confused.T) / 2
        return [(i, j, float(last[i, j]), float(both[i, j])) for i, j in combinations(range(len(self.classes)), 2)]

    @property
    def correlation(self) -> float | None:
        """Pearson correlation of cosine and confusion over all pairs of classes; None if one of them is constant."""
        found = torch.tensor([pair[2:] for pair in self.pairs()], dtype=torch.float64).T
        if found.shape[-1] < 2 or (found.std(1) == 0).any():
            return None
        return float(torch.corrcoef(found)[0, 1])

    def csv(self) -> Iterator[list[Any]]:
        """Yield a line for each pair of classes; the line of a class with itself has its point in the plane."""
        yield ["class", "other", *(f"cosine in {name}" for name in self.similarity), "confused", "x", "y"]
        both = (self.confused + self.confused.T) / 2
        for i, name in enumerate(self.classes):
            for j in range(i, len(self.classes)):
                cosines = [round(float(one[i, j]), 6) for one in self.similarity.values()]
                place = [round(value, 4) for value in self.places[i].tolist()] if i == j else [None, None]
                yield [name, self.classes[j], *cosines, round(float(both[i, j]), 6), *place]

    def plain(self) -> dict[str, Any]:
        """Return matrices, places and the correlation."""
        return {
            "classes": self.classes,
            "similarity": {name: one.tolist() for name, one in self.similarity.items()},
            "confused": self.confused.tolist(),
            "places": self.places.tolist(),
            "correlation": self.correlation,
        }

    def table(self) -> list[list[str]]:
        """Return the ten pairs of classes that are confused most."""
        pairs = sorted(self.pairs(), key=lambda pair: -pair[3])[:10]
        lines = [[self.classes[i], self.classes[j], f"{cos:.3f}", f"{100 * rate:.2f} %"] for i, j, cos, rate in pairs]
        return [["class", "other", "cosine", "confused"], *lines]

    def notes(self) -> list[str]:
        """Return the correlation."""
        found = self.correlation
        if found is None:
            return ["no correlation: the similarity, or the confusion, is the same for all pairs"]
        return [f"correlation of similarity and confusion over {len(self.pairs())} pairs: {found:.3f}"]


def labels(
    run: LoadedRun,
    *,
    counted: Callable[[], Confusion] | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> Labels:
    """Compare the label embeddings of a run with each other, and with the confusions of its model on the test images.

    Args:
        run: a run from :func:`localize.load`, whose local losses score features against label embeddings.
        counted: returns the confusions of the run, if they are known; by default they are counted.
        batch_size: images at a time; default: the run's own.
        progress: show a progress bar on stderr; default: if stderr is a terminal.

    Returns:
        Similarities (Z, Z), confusions (Z, Z) and points (Z, 2).

    Raises:
        OptionError: its method has no label embeddings.
        MissingError: the test images are missing or have changed.
    """
    dictionaries = {name: one.detach().double().cpu() for name, one in inference.embeddings(run.local).items()}
    units = {name: F.normalize(one, dim=1) for name, one in dictionaries.items()}
    similarity = {name: one @ one.T for name, one in units.items()}
    found = confusion(run, batch_size=batch_size, progress=progress) if counted is None else counted()
    return Labels(run.classes, similarity, found.shares[OUTPUT], plane(list(dictionaries.values())[-1]))


def plane(vectors: Tensor) -> Tensor:
    """Return vectors (N, C) as points in a plane, float64 (N, 2), from scikit-learn's t-SNE.

    It starts from the first two principal components, without random numbers, and has a perplexity of 30, or a third of
    the number of other vectors if that is less.

    Source: L. van der Maaten, G. Hinton. Visualizing data using t-SNE. JMLR 9, 2008.
    """
    n = len(vectors)
    if n < 4 or vectors.shape[1] < 2:  # too few for neighbours
        return torch.zeros(n, 2, dtype=torch.float64)
    how = TSNE(perplexity=min(30.0, (n - 1) / 3), init="pca", random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(how.fit_transform(vectors.double().numpy())).double()
