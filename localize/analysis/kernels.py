"""Similarity of the features of layers, within a run or between two runs: linear CKA over minibatches.

S. Kornblith, M. Norouzi, H. Lee, G. Hinton. Similarity of neural network representations revisited. ICML 2019.
T. Nguyen, M. Raghu, S. Kornblith. Do wide and deep networks learn the same things? ICLR 2021 (section 3, eqs. 1-3).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from localize.analysis.batches import batches
from localize.analysis.seeds import mean
from localize.errors import OptionError
from localize.recipes.preprocessing import Preprocessing
from localize.runtime.model import LocalModel
from localize.train.loaded import LoadedRun

ROUNDING = 1e-12
"""Features count as constant if the layer's HSIC with itself is below this share of its kernel's mean square."""


@dataclass(frozen=True)
class CKA:
    """The similarity of every layer of one run to every layer of another."""

    rows: tuple[str, ...]
    """Layers of the first run at which segments end."""
    columns: tuple[str, ...]
    """Layers of the second run."""
    values: Tensor
    """float64 (rows, columns): 1 if features are equal up to rotation and scale, about 0 if they are unrelated, NaN if
    the features of a layer are the same for all images."""

    @property
    def pairs(self) -> dict[str, float]:
        """The similarity of each layer that both runs have, by name."""
        columns = {name: index for index, name in enumerate(self.columns)}
        return {n: float(self.values[i, columns[n]]) for i, n in enumerate(self.rows) if n in columns}

    def csv(self) -> Iterator[list[Any]]:
        """Yield one line for each layer of the first run."""
        yield ["", *self.columns]
        for name, row in zip(self.rows, self.values.tolist(), strict=True):
            yield [name, *(None if math.isnan(value) else round(value, 6) for value in row)]

    def plain(self) -> dict[str, Any]:
        """Return names and values."""
        values = [[None if math.isnan(value) else value for value in row] for row in self.values.tolist()]
        return {"rows": self.rows, "columns": self.columns, "values": values}

    def table(self) -> list[list[str]]:
        """Return one line for each layer of the first run."""
        lines = zip(self.rows, self.values.tolist(), strict=True)
        return [
            ["", *self.columns],
            *([name, *("-" if math.isnan(value) else f"{value:.3f}" for value in row)] for name, row in lines),
        ]

    def notes(self) -> list[str]:
        """Return the mean over the layers that both runs have."""
        found = self.pairs
        return [f"mean of the {len(found)} layers of the same name: {mean(list(found.values())):.3f}"] if found else []


@torch.no_grad()
def cka(run: LoadedRun, other: LoadedRun | None = None, *, batch_size: int = 256, progress: bool | None = None) -> CKA:
    """Compare the features after all segments of a run with those of another run, on the test images of the first.

    With features X and Y of n images, K = X X' and L = Y Y', zeros on their diagonals::

        HSIC(K, L) = (tr(K L) + 1'K1 1'L1 / ((n - 1)(n - 2)) - 2 / (n - 2) 1'K L 1) / (n (n - 3))
        CKA = mean HSIC(K, L) / sqrt(mean HSIC(K, K) mean HSIC(L, L))

    where means are over minibatches: the estimate does not depend on their size, and memory does not grow with the
    data (Nguyen et al. 2021, eqs. 2 and 3).

    Args:
        run: a run from :func:`localize.load`.
        other: another run on images of the same size, which are normalised as for its training; default: the run
            itself, layer against layer. If a run was trained as one segment, its local layers are compared.
        batch_size: images in a minibatch, at least 4; a smaller remainder is left out.
        progress: show a progress bar on stderr; default: if stderr is a terminal.

    Returns:
        The similarities, (layers of ``run``, layers of ``other``).

    Raises:
        OptionError: minibatches have fewer than 4 images, there are fewer than 4 images, or the runs resize images
            differently.
        MissingError: the test images are missing or have changed.
    """
    if batch_size < 4:
        raise OptionError(
            f"batch_size cannot be {batch_size}.", facts="CKA compares at least four images.", help="batch_size=256"
        )
    other = run if other is None else other
    _check_alike(run, other)
    pair = (run.layered, other.layered)
    sums: list[Tensor] = []
    for x, _ in batches(run, "cka", batch_size, progress):
        if len(x) < 4:
            continue
        mine, theirs = _kernels(pair[0], x), _kernels(pair[1], _normalised(x, run.preprocessing, other.preprocessing))
        made = [hsic(mine, theirs), hsic(mine, mine).diagonal(), hsic(theirs, theirs).diagonal()]
        made += [one.square().sum((1, 2)) / (len(x) * (len(x) - 3)) for one in (mine, theirs)]
        sums = made if not sums else [total + one for total, one in zip(sums, made, strict=True)]
    if not sums:
        raise OptionError("there are fewer than four test images.", help="use a data set with more")
    across, own, others, sizes, other_sizes = sums
    own = own.where(own > ROUNDING * sizes, math.nan)
    others = others.where(others > ROUNDING * other_sizes, math.nan)
    values = across / (own[:, None] * others[None, :]).sqrt()
    rows, columns = (tuple(segment.ends_at for segment in one.plan.segments.segments) for one in pair)
    return CKA(rows, columns, values.cpu())


def _check_alike(run: LoadedRun, other: LoadedRun) -> None:
    """Refuse runs that resize or crop images differently."""
    first, second = (dataclasses.replace(one.preprocessing, mean=(0.0,), std=(1.0,)) for one in (run, other))
    if first == second:
        return
    names = [field.name for field in dataclasses.fields(first)]
    facts = [f"{name} {getattr(first, name)} and {getattr(second, name)}" for name in names]
    differing = [fact for name, fact in zip(names, facts, strict=True) if getattr(first, name) != getattr(second, name)]
    raise OptionError(
        f"{other.folder} does not prepare images as {run.folder} does.",
        facts=f"{'; '.join(differing)}. CKA compares features of the same input.",
        help="use runs with the same --input-shape",
    )


def _normalised(x: Tensor, now: Preprocessing, wanted: Preprocessing) -> Tensor:
    """Convert images (N, C, H, W) from one normalisation to another."""
    if (now.mean, now.std) == (wanted.mean, wanted.std):
        return x
    mean, std, other_mean, other_std = (
        torch.tensor(one, dtype=x.dtype, device=x.device).reshape(-1, 1, 1)
        for one in (now.mean, now.std, wanted.mean, wanted.std)
    )
    return (x * std + mean - other_mean) / other_std


def hsic(kernels: Tensor, others: Tensor) -> Tensor:
    """Return the unbiased estimate of HSIC for every pair of (L, N, N) and (M, N, N) kernels: (L, M).

    The kernels are zero on their diagonals.

    Source: L. Song, A. Smola, A. Gretton, J. Bedo, K. Borgwardt. Feature selection via dependence maximization. JMLR
    2012, eq. 5.
    """
    n = kernels.shape[1]
    traces = torch.einsum("lij,mji->lm", kernels, others)
    mine, theirs = kernels.sum(2), others.sum(2)
    sums = mine.sum(1)[:, None] * theirs.sum(1)[None, :] / ((n - 1) * (n - 2))
    return (traces + sums - 2 / (n - 2) * mine @ theirs.T) / (n * (n - 3))


def _kernels(local: LocalModel, x: Tensor) -> Tensor:
    """Return the linear kernels (L, N, N) of the features after each segment, in float64, zero on the diagonal."""
    made = []
    for values in local.features(x):
        flat = torch.cat([value.flatten(1).double() for value in values], 1)
        kernel = flat @ flat.T
        made.append(kernel - torch.diag(kernel.diagonal()))
    return torch.stack(made)
