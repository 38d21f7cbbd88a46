"""The label-embedding dictionary of DCL, and the scores of features against it.

Source: S. Choi, M. Jeon, Y. Hwang, J. Oh, S. Lim, J. Lee, M. Kang, "Dictionary contrastive learning for efficient
local supervision without auxiliary networks", ICLR 2024, eqs. 2 and 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localize.ir import Features


class Dictionary(nn.Module):
    """One embedding vector for every class: T of shape (Z, C_D), entries from N(0, 1)."""

    def __init__(self, classes: int, width: int, *, trained: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, width), requires_grad=trained)

    def reset_parameters(self) -> None:
        """Draw all embeddings anew."""
        nn.init.normal_(self.weight)

    def forward(self) -> Tensor:
        """Return T, (Z, C_D)."""
        return self.weight


class DictionaryScores(nn.Module):
    """Class scores of local features against label embeddings: s_nz = mean over k of <h_n^k, t'_z> (in eq. 2).

    Args:
        features: layout of every tensor that crosses the cut; the scores of several are averaged.
        width: C_D, the width of the dictionary.
        k: number of contiguous segments that a flat feature vector is cut into.
        projection: map T to the features' width by a linear layer per head; default is adaptive average pooling.
        cosine: normalise the dictionary (before pooling) and the features, and divide by ``tau``.
        tau: temperature of the cosine form.

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
    ) -> None:
        super().__init__()
        self.features, self.k, self.cosine, self.tau = tuple(features), k, cosine, tau
        widths = [embedding_width(f, k) for f in features]
        self.projections = nn.ModuleList([nn.Linear(width, w) for w in widths] if projection else [])

    def forward(self, *inputs: Tensor) -> Tensor:
        *values, dictionary = inputs
        scores = [self._scores(i, value, dictionary) for i, value in enumerate(values)]
        return scores[0] if len(scores) == 1 else torch.stack(scores).mean(0)

    def _scores(self, i: int, value: Tensor, dictionary: Tensor) -> Tensor:
        layout = self.features[i]
        if self.cosine:
            dictionary = F.normalize(dictionary, dim=1)
            value = F.normalize(value, dim=1 if layout.kind == "flat" else layout.channels)
        vectors = local_vectors(value, layout, self.k)
        if self.projections:
            embeddings = self.projections[i](dictionary)
        elif vectors.shape[1] != dictionary.shape[1]:
            embeddings = F.adaptive_avg_pool1d(dictionary, vectors.shape[1])
        else:
            embeddings = dictionary
        scores = torch.einsum("nck,zc->nzk", vectors, embeddings).mean(2)
        return scores / self.tau if self.cosine else scores

    def extra_repr(self) -> str:
        """Show what is read from the features."""
        return ", ".join(f"{f.kind} {f.shape}" for f in self.features) + (f", k={self.k}" if self.k > 1 else "")


def embedding_width(features: Features, k: int) -> int:
    """Return C_l, the width of one local vector of these features.

    Args:
        features: the layout.
        k: number of segments of a flat feature vector; others ignore it.
    """
    return features.shape[0] // k if features.kind == "flat" else features.width


def local_vectors(value: Tensor, features: Features, k: int) -> Tensor:
    """Arrange features as vectors (N, C, K): pixels, tokens (or the class token), or segments of a flat vector."""
    if features.kind == "flat":
        return value.view(value.shape[0], k, -1).transpose(1, 2)
    if features.kind == "tokens":
        tokens = value if features.channels == 2 else value.transpose(1, 2)
        tokens = tokens[:, :1] if features.token == "class" else tokens[:, features.prefix :]
        return tokens.transpose(1, 2)
    return value.movedim(features.channels, 1).flatten(2)
