"""The label-embedding dictionary of DCL and of its precursor CFL, and the scores of features against it.

Source: S. Choi, M. Jeon, Y. Hwang, J. Oh, S. Lim, J. Lee, M. Kang, "Dictionary contrastive learning for efficient
local supervision without auxiliary networks", ICLR 2024, eqs. 2 and 3; "Backpropagation-free contrastive forward
learning using label embeddings" (CFL), eqs. 2 to 6.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localize.errors import Advice, OptionError
from localize.ir import Block, Features, Segment
from localize.ops import average


class Dictionary(nn.Module):
    """One embedding vector for every class: T of shape (Z, C_D).

    Args:
        classes: Z.
        width: C_D.
        trained: whether the embeddings are trained.
        start: entries from N(0, 1) (``normal``), or orthogonal rows (``orthogonal``, the D-perp of Fig. 4).
        norm: length of every row; 0 keeps the length as drawn.

    Shape:
        no input; returns (Z, C_D).
    """

    def __init__(
        self, classes: int, width: int, *, trained: bool = True, start: str = "normal", norm: float = 0.0
    ) -> None:
        super().__init__()
        self.start, self.norm = start, norm
        self.weight = nn.Parameter(torch.empty(classes, width), requires_grad=trained)

    def reset_parameters(self) -> None:
        """Draw new embeddings."""
        (nn.init.orthogonal_ if self.start == "orthogonal" else nn.init.normal_)(self.weight)
        if self.norm:
            with torch.no_grad():
                self.weight.mul_(self.norm / self.weight.norm(dim=1, keepdim=True))

    def forward(self) -> Tensor:
        """Return T, (Z, C_D)."""
        return self.weight


def vector_width(dictionary: Block) -> int:
    """Return C_D of a block that is a dictionary."""
    assert isinstance(dictionary.module, Dictionary), f"{dictionary.name} is not a dictionary"
    return dictionary.module.weight.shape[1]


class DictionaryScores(nn.Module):
    """Class scores of local features against label embeddings: s_nz = mean over k of <h_n^k, t'_z> (in eq. 2).

    Args:
        features: layout of every tensor that crosses the cut; the scores of several are averaged.
        width: C_D, the width of the dictionary.
        k: number of contiguous parts into which a flat feature vector is cut.
        projection: map T to the features' width with a linear layer per head; default: adaptive average pooling.
        cosine: normalise the dictionary (before pooling) and the features, and divide by ``tau``.
        tau: temperature of the cosine form.
        noise: in train mode, add new random numbers from N(0, 1 / C_l^2) to every entry of the pooled dictionary (CFL,
            eq. 5; 1 / C_l^2 is the variance).

    Shape:
        features (N, C, H, W), (N, T, C) or (N, F), then T (Z, C_D); returns (N, Z).
    """

    def __init__(
        self,
        features: Sequence[Features],
        width: int,
        *,
        k: int = 1,
        projection: bool = False,
        cosine: bool = False,
        tau: float = 0.07,
        noise: bool = False,
    ) -> None:
        super().__init__()
        self.features, self.k, self.cosine, self.tau, self.noise = tuple(features), k, cosine, tau, noise
        widths = [embedding_width(f, k) for f in features]
        self.projections = nn.ModuleList([nn.Linear(width, w) for w in widths] if projection else [])

    def forward(self, *inputs: Tensor) -> Tensor:
        *values, dictionary = inputs
        scores = [self._scores(i, value, dictionary) for i, value in enumerate(values)]
        return scores[0] if len(scores) == 1 else torch.stack(scores).mean(0)

    def _scores(self, i: int, value: Tensor, dictionary: Tensor) -> Tensor:
        vectors, embeddings = self._compared(value, dictionary, i)
        scores = average(vectors, 2) @ embeddings.T  # the mean of the products, without storing all (N, Z, K)
        return scores / self.tau if self.cosine else scores

    def similarities(self, value: Tensor, dictionary: Tensor, i: int = 0) -> Tensor:
        """Return <h_n^k, t'_z> for every local vector k and every embedding z, (N, Z, K), without ``tau``.

        Args:
            value: one of the tensors at the cut: (N, C, H, W), (N, T, C) or (N, F).
            dictionary: T, (Z, C_D).
            i: number of that tensor.
        """
        return torch.einsum("nck,zc->nzk", *self._compared(value, dictionary, i))

    def _compared(self, value: Tensor, dictionary: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """Return the local vectors (N, C_l, K) and the embeddings (Z, C_l)."""
        layout = self.features[i]
        if self.cosine:
            dictionary = F.normalize(dictionary, dim=1)
            value = _unit(value, layout)
        vectors = local_vectors(value, layout, self.k)
        width = vectors.shape[1]
        embeddings = self.projections[i](dictionary) if self.projections else pooled(dictionary, width)
        if self.noise and self.training:
            embeddings = embeddings + torch.randn_like(embeddings) / width
        return vectors, embeddings

    @property
    def one_draw(self) -> str:
        """Random numbers that it draws once for a whole batch; empty if there are none."""
        return "noise of the dictionary" if self.noise else ""

    def extra_repr(self) -> str:
        """Show what is read from the features."""
        return ", ".join(f"{f.kind} {f.shape}" for f in self.features) + (f", k={self.k}" if self.k > 1 else "")


class BatchScores(nn.Module):
    """Dot products of every image's mean feature with the embedding of every image's label: A_ni = <h_n, t_i> (CFL).

    Args:
        features: layout of every tensor that crosses the cut; the products of several are averaged.
        k: number of contiguous parts into which a flat feature vector is cut.
        noise: in train mode, every image's copy of its label's embedding gets its own random numbers from
            N(0, 1 / C_l^2) (CFL, eq. 2).
        cosine: normalise the dictionary (before pooling) and the features, and divide by ``tau``.
        tau: temperature of the cosine form.

    Shape:
        features (N, C, H, W), (N, T, C) or (N, F), then T (Z, C_D), then class ids (N,); returns (N, N), features along
        the rows, embeddings along the columns.
    """

    reads_of_labels = "the embedding of each image's one class"

    def __init__(
        self, features: Sequence[Features], *, k: int = 1, noise: bool = True, cosine: bool = False, tau: float = 0.07
    ) -> None:
        super().__init__()
        self.features, self.k, self.noise, self.cosine, self.tau = tuple(features), k, noise, cosine, tau

    def forward(self, *inputs: Tensor) -> Tensor:
        *values, dictionary, labels = inputs
        if self.cosine:
            dictionary = F.normalize(dictionary, dim=1)
            values = [_unit(value, layout) for value, layout in zip(values, self.features, strict=True)]
        products = [
            self._products(average(local_vectors(value, layout, self.k), 2), dictionary, labels)
            for value, layout in zip(values, self.features, strict=True)
        ]
        product = products[0] if len(products) == 1 else torch.stack(products).mean(0)
        return product / self.tau if self.cosine else product

    def _products(self, vectors: Tensor, dictionary: Tensor, labels: Tensor) -> Tensor:
        width = vectors.shape[1]
        embeddings = pooled(dictionary, width)[labels]
        if self.noise and self.training:
            embeddings = embeddings + torch.randn_like(embeddings) / width
        return vectors @ embeddings.T

    def extra_repr(self) -> str:
        """Show what is read from the features."""
        return ", ".join(f"{f.kind} {f.shape}" for f in self.features) + (f", k={self.k}" if self.k > 1 else "")


def _unit(value: Tensor, layout: Features) -> Tensor:
    """Scale local vectors, or the whole vector of flat features, to length 1."""
    return F.normalize(value, dim=1 if layout.kind == "flat" else layout.channels)


def pooled(dictionary: Tensor, width: int) -> Tensor:
    """Average neighbouring entries of the embeddings (Z, C_D) until they are ``width`` wide: t' of DCL, (Z, C_l)."""
    return dictionary if width == dictionary.shape[1] else F.adaptive_avg_pool1d(dictionary, width)


def segments_of_vectors(segment: Segment, local: Sequence[Segment], k: int) -> int:
    """Return K, the number of parts into which the flat feature vector of a segment is cut (1 for other features).

    Args:
        segment: the segment of the trunk.
        local: all segments that are trained by local losses.
        k: the user's value; 0 makes the parts as wide as the widest feature map (or wider, if that does not divide the
            vector), and means 1 in a net without feature maps.

    Raises:
        OptionError: the vector cannot be cut into ``k`` equal parts.
    """
    flat = [f for f in segment.features if f.kind == "flat"]
    if not flat:
        return 1
    maps = [f.width for s in local for f in s.features if f.kind == "map"]
    if k == 0:
        wanted = flat[0].shape[0] // max(maps) if maps else 1
        common = math.gcd(*(layout.shape[0] for layout in flat))
        k = next((k for k in range(wanted, 1, -1) if common % k == 0), 1)
    for layout in flat:
        if layout.shape[0] % k:
            raise OptionError(
                f"the {layout.shape[0]} features of {segment.ends_at} cannot be cut into k={k} equal parts.",
                help=Advice(f"k=... with a divisor of {layout.shape[0]}", f"--k with a divisor of {layout.shape[0]}"),
                option="k",
            )
    return k


def embedding_width(features: Features, k: int) -> int:
    """Return C_l, the width of one local vector of these features.

    Args:
        features: the layout.
        k: number of parts of a flat feature vector; other features ignore it.
    """
    return features.shape[0] // k if features.kind == "flat" else features.width


def local_vectors(value: Tensor, features: Features, k: int) -> Tensor:
    """Arrange features as vectors (N, C, K): pixels, tokens (or the class token), or parts of a flat vector."""
    if features.kind == "flat":
        return value.view(value.shape[0], k, -1).transpose(1, 2)
    if features.kind == "tokens":
        tokens = value if features.channels == 2 else value.transpose(1, 2)
        tokens = tokens[:, :1] if features.token == "class" else tokens[:, features.prefix :]
        return tokens.transpose(1, 2)
    return value.movedim(features.channels, 1).flatten(2)
