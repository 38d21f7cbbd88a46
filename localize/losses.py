"""Losses that torch does not have: functions of a prediction and a target that return a scalar.

All are computed in float32 at least (float64 stays float64), outside of autocast: they exponentiate dot products of
vectors that no layer has scaled.

What a plan has to know of a loss beside its value is declared where the function is defined: see :func:`declared`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., Any])


@contextmanager
def _precise(*values: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Give the values in float32 or more, and switch autocast off."""
    device = values[0].device.type
    plain = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
    with plain:
        yield tuple(value.float() if value.dtype in (torch.float16, torch.bfloat16) else value for value in values)


# ------------------------------------------------------------------------------------------ what is known of a loss


@dataclass(frozen=True)
class Loss:
    """What is known of a loss, a function of (prediction, target) that returns a scalar.

    A loss of which nothing is declared takes class ids, and may compare the images of a batch with each other.
    """

    labels: tuple[str, ...] = ("ids",)
    """What its target may be, where that is the labels themselves: class ``ids`` (N,); ``soft`` labels (N, Z), rows of
    shares of the classes that sum to 1; or ``multi``, (N, Z), for each class by itself how true it is, from 0 to 1."""
    mean: bool = False
    """It is a mean over the images of a batch, and compares none with another."""
    weights: Literal["none", "mean", "weighted mean"] = "none"
    """Whether it takes weights (Z,) of the classes, as ``weight``; and then is a mean over the images still, or is
    divided by the weights of the classes of the images in the batch."""
    reads: str = ""
    """What it reads of class ids that other labels do not say, such as ``which images are of one class``."""
    ignores: bool = False
    """An image of class id -100 is left out, also of the number of images in a mean."""


def declared(
    *,
    labels: tuple[str, ...] = ("ids",),
    mean: bool = False,
    weights: Literal["none", "mean", "weighted mean"] = "none",
    reads: str = "",
    ignores: bool = False,
) -> Callable[[_Function], _Function]:
    """Declare what is known of a loss function; the arguments are the fields of :class:`Loss`.

    Args:
        labels: see :attr:`Loss.labels`.
        mean: see :attr:`Loss.mean`.
        weights: see :attr:`Loss.weights`.
        reads: see :attr:`Loss.reads`.
        ignores: see :attr:`Loss.ignores`.

    Returns:
        The decorator of the function.

    Example:
        >>> @declared(labels=("ids", "soft"), mean=True)
        ... def my_loss(scores, labels): ...
    """

    def declare(function: _Function) -> _Function:
        function.declared = Loss(labels, mean, weights, reads, ignores)  # type: ignore[attr-defined]
        return function

    return declare


_OF_TORCH: Mapping[str, Loss] = MappingProxyType(
    {"torch.nn.functional.cross_entropy": Loss(("ids", "soft"), mean=True, weights="weighted mean", ignores=True)}
)


def about(name: str) -> Loss:
    """Return what is known of the loss with this importable name.

    Args:
        name: ``MODULE.FUNCTION``, such as ``localize.losses.focal``.

    Raises:
        ImportError: there is no such module.
    """
    if name in _OF_TORCH:
        return _OF_TORCH[name]
    home, _, function = name.rpartition(".")
    return getattr(getattr(importlib.import_module(home), function, None), "declared", Loss())


_ONE_CLASS = "which images are of one class"
_ANY = ("ids", "soft", "multi")

# ------------------------------------------------------------------------------------------------------ contrastive


@declared(reads=_ONE_CLASS)
def supervised_contrastive(features: Tensor, labels: Tensor, tau: float = 0.07) -> Tensor:
    """Draw features of one class together: SupCon, as the code of InfoPro and of DCL computes it.

    With s_ik = <a_i, a_k> / tau and P(i) the other samples of class y_i::

        L = -1/N sum_i 1/|P(i)| sum_{p in P(i)} log( exp s_ip / sum_{k != i} exp s_ik )

    A sample without a partner contributes 0 and is counted in N.

    Args:
        features: a, (N, D); the sources normalise them to length 1.
        labels: class ids (N,).
        tau: temperature.

    Returns:
        The loss, a scalar.

    Source: Y. Wang et al., "Revisiting locally supervised learning: an alternative to end-to-end training", ICLR 2021,
    sec. 4; P. Khosla et al., "Supervised contrastive learning", NeurIPS 2020, eq. 2.
    """
    with _precise(features) as (features,):
        return _mean_over_anchors(features @ features.T / tau, labels)


@declared(reads=_ONE_CLASS)
def pair_contrastive(features: Tensor, labels: Tensor, tau: float = 0.07) -> Tensor:
    """Draw features of one class together, averaged over pairs: eq. 1 of DCL.

    With s_ik = <a_i, a_k> / tau::

        L = -1/|{(i, j): i != j, y_i = y_j}| sum_{i != j, y_i = y_j} log( exp s_ij / sum_{k != i} exp s_ik )

    It equals :func:`supervised_contrastive` where all classes are equally frequent in the batch. 0 without any pair.

    Args:
        features: a, (N, D).
        labels: class ids (N,).
        tau: temperature.

    Returns:
        The loss, a scalar.

    Source: S. Choi et al., "Dictionary contrastive learning for efficient local supervision without auxiliary
    networks", ICLR 2024, eq. 1.
    """
    with _precise(features) as (features,):
        shares, partners = _shares(features @ features.T / tau, labels)
        return -torch.where(partners, shares, 0.0).sum() / partners.sum().clamp(min=1)


@declared(reads=_ONE_CLASS)
def batch_contrastive(similarities: Tensor, labels: Tensor) -> Tensor:
    """Match features with the label embeddings of a batch, in the form of the authors' code: L_batch of CFL.

    With A_ni = <h_n, t_i>, t_i the (noisy) embedding of the label of sample i, and P(n) the other samples of class
    y_n::

        L = -1/N sum_n 1/|P(n)| sum_{p in P(n)} log( exp A_np / sum_{i != n} exp A_ni )

    A sample without a partner contributes 0. Never negative; the embedding of the sample's own draw is left out.

    Args:
        similarities: A, (N, N).
        labels: class ids (N,).

    Returns:
        The loss, a scalar.

    Source: "Backpropagation-free contrastive forward learning using label embeddings" (CFL, 2023), sec. 3.2.1; for
    eq. 4 as it is printed see :func:`batch_ratio`.
    """
    with _precise(similarities) as (similarities,):
        return _mean_over_anchors(similarities, labels)


@declared(reads=_ONE_CLASS)
def batch_ratio(similarities: Tensor, labels: Tensor) -> Tensor:
    """Match features with the label embeddings of a batch, as eq. 4 of CFL is printed.

    With A_ni = <h_n, t_i>::

        L = -1/N sum_n log( exp A_nn / sum_{i: y_i != y_n} exp A_ni )

    The denominator lacks the positive: the loss is unbounded below. A sample that is alone in its batch with no other
    class contributes 0.

    Args:
        similarities: A, (N, N).
        labels: class ids (N,).

    Returns:
        The loss, a scalar.

    Source: CFL (2023), eq. 4.
    """
    with _precise(similarities) as (similarities,):
        others = labels[:, None] != labels[None, :]
        against = _log_sum_exp(similarities, others)
        return torch.where(others.any(1), against - similarities.diagonal(), 0.0).mean()


@declared(reads=_ONE_CLASS)
def feature_ratio(features: Tensor, labels: Tensor, tau: float = 0.07) -> Tensor:
    """Draw features of one class together, as eq. 9 of CFL is printed: the logarithm of a mean over the class.

    With s_ik = <h_i, h_k> / tau, H+ all samples of class y_i (i itself as well) and H- all others::

        L = -1/N sum_i log( 1/|H+| sum_{k in H+} exp s_ik / sum_{k in H-} exp s_ik )

    The sample's product with itself dominates the mean; a batch of one class contributes 0.

    Args:
        features: h, (N, D), of length 1 in the source.
        labels: class ids (N,).
        tau: temperature.

    Returns:
        The loss, a scalar.

    Source: CFL (2023), eq. 9.
    """
    with _precise(features) as (features,):
        similarities = features @ features.T / tau
        same = labels[:, None] == labels[None, :]
        agreement = _log_sum_exp(similarities, same) - same.sum(1).to(similarities.dtype).log()
        against = _log_sum_exp(similarities, ~same)
        return torch.where((~same).any(1), against - agreement, 0.0).mean()


def _mean_over_anchors(similarities: Tensor, labels: Tensor) -> Tensor:
    """Return the mean over samples of the mean over their partners of -log softmax, the sample itself left out."""
    shares, partners = _shares(similarities, labels)
    each = torch.where(partners, shares, 0.0).sum(1) / partners.sum(1).clamp(min=1)
    return -each.mean()


def _shares(similarities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return log( exp s_ik / sum_{j != i} exp s_ij ), and which pairs are of one class and not the same sample."""
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    shares = similarities - _log_sum_exp(similarities, ~itself)[:, None]
    return shares, (labels[:, None] == labels[None, :]) & ~itself


def _log_sum_exp(values: Tensor, chosen: Tensor) -> Tensor:
    """Return the logarithm of the sum of exp over the chosen entries of each row; 0 where none is chosen.

    The row without a choice is kept out of the logarithm: its gradient would not be a number.
    """
    some = chosen.any(1)
    masked = values.masked_fill(~chosen & some[:, None], -torch.inf)
    return torch.where(some, torch.logsumexp(masked, 1), 0.0)


# ------------------------------------------------------------------------------------------------------- similarity


def similarity(x: Tensor) -> Tensor:
    """Return the cosine similarity of every two images of a batch, each centred: S(x), (N, N), in [-1, 1].

    Maps (N, C, H, W) with more than three channels and more than one row are reduced to the standard deviation (with
    H W - 1 in the denominator) of each channel over its places; everything else is flattened. With x_n the vector of
    image n and m_n the mean of its entries::

        z_n  = (x_n - m_n) / (1e-8 + |x_n - m_n|)
        S_nk = <z_n, z_k>, clamped to [-1, 1]

    An image whose entries are all equal is similar to none, itself included, and gets no gradient.

    Args:
        x: features (N, ...).

    Source: A. Nøkland, L. H. Eidnes, "Training neural networks with local error signals", ICML 2019, sec. 2.1, with
    the reduction of maps and the constant of the code (anokland/local-loss at 7b3b40b). The code's gradient is not a
    number for such an image.
    """
    with _precise(x) as (x,):
        if x.dim() == 4 and x.shape[1] > 3 and x.shape[2] > 1:
            x = x.flatten(2).std(2)
        x = x.flatten(1)
        x = x - x.mean(1, keepdim=True)
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        z = torch.where(length > 0, x / (length + 1e-8), 0.0)
        return (z @ z.T).clamp(-1, 1)


def similarity_matching(features: Tensor, targets: Tensor) -> Tensor:
    """Make features as similar to each other as their targets are: 1/N^2 sum_nk (S(h)_nk - S(t)_nk)^2, L_sim.

    Args:
        features: h, (N, ...).
        targets: t, (N, ...), such as one-hot labels (N, Z), whose similarity is 1 in a class and -1 / (Z - 1) across.

    Returns:
        The loss, a scalar.

    Source: Nøkland & Eidnes, ICML 2019, eq. 1; S is :func:`similarity`.
    """
    return F.mse_loss(similarity(features), similarity(targets.to(features.dtype)))


@declared(mean=True)
def sign_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Predict the signs of random projections of the label: binary cross-entropy, mean over images and projections.

    Args:
        logits: (N, D).
        targets: projections, (N, D); positive ones are to be predicted as 1, others as 0.

    Returns:
        The loss, a scalar.

    Source: Nøkland & Eidnes, ICML 2019, sec. 2.4 (the backprop-free prediction loss).
    """
    with _precise(logits) as (logits,):
        return F.binary_cross_entropy_with_logits(logits, (targets > 0).to(logits.dtype))


# --------------------------------------------------------------------------------------------------- reconstruction


@declared(mean=True)
def reconstruction(image: Tensor, target: Tensor) -> Tensor:
    """Return the binary cross-entropy of reconstructed pixels, mean over all of them.

    ::

        L = -mean( t log x + (1 - t) log(1 - x) )

    Args:
        image: x, (N, C, H, W), values in [0, 1].
        target: t, the pixels to reconstruct, (N, C, H, W), values in [0, 1].

    Source: Y. Wang et al., ICLR 2021, sec. 4 (InfoPro's estimate of I(h, x)).
    """
    with _precise(image, target) as (image, target):
        return F.binary_cross_entropy(image, target)


# ---------------------------------------------------------------------------------------------------------- goodness


@declared(labels=_ANY)
def forward_forward(goodness: Tensor, labels: Tensor, threshold: float = 2.0) -> Tensor:
    """Push the goodness of positive images above a threshold, and that of negative ones below: two means, added.

    It is twice :func:`forward_forward_mean`, which the methods use; texts that were generated by earlier versions call
    this one.

    Args:
        goodness: G, (2N,) or more.
        labels: class ids (N,); only their number is used.
        threshold: theta.

    Returns:
        The loss, a scalar.

    Source: G. Hinton, "The forward-forward algorithm: some preliminary investigations", 2022, sec. 2.
    """
    return 2 * forward_forward_mean(goodness, labels, threshold)


@declared(labels=_ANY)
def forward_forward_mean(goodness: Tensor, labels: Tensor, threshold: float = 2.0) -> Tensor:
    """Push the goodness of positive images above a threshold, and that of negative ones below.

    The rows are blocks of N: positive images, negative ones, and others, which are not read::

        L = 1/(2N) ( sum_n log(1 + exp(theta - G+_n)) + sum_n log(1 + exp(G-_n - theta)) )

    Args:
        goodness: G, (2N,) or more.
        labels: class ids (N,); only their number is used.
        threshold: theta.

    Returns:
        The loss, a scalar.

    Source: G. Hinton, "The forward-forward algorithm: some preliminary investigations", 2022, eq. 1 (the negative
    logarithm of the probability of being positive or negative), as one mean over all 2N images.
    """
    with _precise(goodness) as (goodness,):
        positive, negative = _two_blocks(goodness, labels)
        return torch.cat([F.softplus(threshold - positive), F.softplus(negative - threshold)]).mean()


@declared(labels=_ANY)
def goodness_gap(goodness: Tensor, labels: Tensor, alpha: float = 4.0) -> Tensor:
    """Push the goodness of each positive image above that of its negative: L = 1/N sum_n log(1 + exp(-alpha Delta_n)).

    Delta_n = G+_n - G-_n. Rows as in :func:`forward_forward_mean`.

    Args:
        goodness: G, (2N,) or more.
        labels: class ids (N,); only their number is used.
        alpha: scale of the difference.

    Returns:
        The loss, a scalar.

    Source: H.-C. Lee, J. Song, "SymBa: symmetric backpropagation-free contrastive learning with forward-forward
    algorithm for optimizing convergence", arXiv 2303.08418, 2023.
    """
    with _precise(goodness) as (goodness,):
        positive, negative = _two_blocks(goodness, labels)
        return F.softplus(-alpha * (positive - negative)).mean()


def _two_blocks(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first and the second N rows."""
    return rows[: len(labels)], rows[len(labels) : 2 * len(labels)]


# --------------------------------------------------------------------------------------------------------- feedback


@declared(mean=True)
def alignment(activities: Tensor, direction: Tensor) -> Tensor:
    """Return 1/N sum_n <h_n, t_n>, whose gradient at h is t / N: it hands t to the layer in place of a gradient.

    It is no objective: its value says nothing about the error.

    Args:
        activities: h, (N, ...).
        direction: t, of the same shape.

    Source: A. Nøkland, "Direct feedback alignment provides learning in deep neural networks", NeurIPS 2016, sec. 2, and
    C. Frenkel et al., Frontiers in Neuroscience 15, 2021, written as a loss. The division is that of the output's mean.
    """
    return summed_alignment(activities, direction) / len(activities)


def summed_alignment(activities: Tensor, direction: Tensor) -> Tensor:
    """Return sum_n <h_n, t_n>, whose gradient at h is t: :func:`alignment`, not divided by the batch size.

    Args:
        activities: h, (N, ...).
        direction: t, of the same shape.

    Source: the code of C. Frenkel et al. 2021 (ChFrenkel/DirectRandomTargetProjection), which uses ``labels.mm(B)``
    (DRTP) and ``(y - labels).mm(B)`` (DFA) as the gradient at h, together with an output loss that is a mean.
    """
    with _precise(activities, direction) as (activities, direction):
        return (activities * direction).sum()


# ---------------------------------------------------------------------------------------------- other class losses


@declared(labels=("ids", "soft"), mean=True)
def squared_error(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the squared distance of scores to the one-hot labels, mean over the batch: 1/N sum_n |s_n - y_n|^2.

    Args:
        scores: s, (N, Z).
        labels: class ids (N,), or y itself, (N, Z).

    Source: G. Zhao et al., "The cascaded forward algorithm for neural network training", arXiv 2303.09728, 2023.
    """
    with _precise(scores) as (scores,):
        y = labels if labels.is_floating_point() else F.one_hot(labels, scores.shape[1])
        return (scores - y).square().sum(1).mean()


@declared(mean=True, reads="the score of the one class of each image")
def sparsemax(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the sparsemax loss, mean over the batch.

    With S the classes that sparsemax(s) gives a probability, p = max(s - tau, 0) with sum p = 1::

        L = -s_y + 1/2 sum_{z in S} (s_z^2 - tau^2) + 1/2

    Its gradient is p - one-hot(y); it is 0 where s_y exceeds all other scores by 1.

    Args:
        scores: s, (N, Z).
        labels: class ids (N,).

    Source: A. F. T. Martins, R. F. Astudillo, "From softmax to sparsemax: a sparse model of attention and multi-label
    classification", ICML 2016, sec. 3.2.
    """
    with _precise(scores) as (scores,):
        ordered, _ = scores.sort(1, descending=True)
        sums = ordered.cumsum(1)
        count = torch.arange(1, scores.shape[1] + 1, device=scores.device, dtype=scores.dtype)
        inside = (1 + count * ordered > sums).sum(1, keepdim=True)
        tau = (sums.gather(1, inside - 1) - 1) / inside
        chosen = torch.where(scores > tau, scores.square() - tau.square(), 0.0).sum(1)
        return (0.5 * chosen + 0.5 - scores.gather(1, labels[:, None]).squeeze(1)).mean()


@declared(mean=True)
def squared_prediction_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the squared distance of predicted to true values, mean over the rows: 1/N sum_n |p_n - t_n|^2.

    Args:
        prediction: p, (N, D).
        target: t, (N, ...), D values in each row.

    Source: A. Ororbia, A. Mali, "The predictive forward-forward algorithm", arXiv 2301.01452, 2023.
    """
    with _precise(prediction, target) as (prediction, target):
        return (prediction - target.flatten(1)).square().sum(1).mean()


# ---------------------------------------------------------------------------------------- losses of labels, by choice


@declared(labels=("ids", "soft"), mean=True, weights="weighted mean", ignores=True)
def focal(
    scores: Tensor,
    labels: Tensor,
    gamma: float = 2.0,
    *,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the focal loss of a softmax: cross-entropy that counts a class less the more probable it is already.

    With p = softmax(s), y the one-hot or soft labels, e the smoothing, and w the weights of the classes::

        L = -1/N sum_n sum_z w_z y'_nz (1 - p_nz)^gamma log p_nz,     y' = (1 - e) y + e / Z

    With weights and class ids, N is replaced by the sum of the weights of the images' classes, as in
    ``torch.nn.functional.cross_entropy``, which this is where gamma is 0. An image of class id -100 is not counted.

    Args:
        scores: s, (N, Z).
        labels: class ids (N,), or shares of the classes (N, Z).
        gamma: how fast a class counts less, from 0 on.
        weight: w, (Z,); all 1 without.
        label_smoothing: e, from 0 to 1.

    Source: T.-Y. Lin, P. Goyal, R. Girshick, K. He, P. Dollar, "Focal loss for dense object detection", ICCV 2017,
    eq. 4 and 5, where each class has a sigmoid of its own.
    """
    with _precise(scores) as (scores,):
        shares, counted = _class_shares(labels, scores, label_smoothing)
        logarithms = scores.log_softmax(1)
        others = -torch.expm1(logarithms)  # 1 - p; kept above 0, where a power below 1 has no slope
        each = shares * others.clamp(min=torch.finfo(others.dtype).tiny).pow(gamma) * logarithms
        if weight is None:
            return -each.sum() / counted.sum()
        total = counted.sum()
        if not labels.is_floating_point():
            total = torch.where(counted, weight[labels.where(counted, 0)], 0.0).sum()
        return -(each * weight).sum() / total


@declared(labels=_ANY, mean=True, weights="mean", ignores=True)
def binary_cross_entropy(
    scores: Tensor, labels: Tensor, *, weight: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Return the binary cross-entropy of every class by itself, mean over images and classes.

    With y the one-hot, soft or multi-label targets, e the smoothing, and w the weights of the classes::

        L = -1/(N Z) sum_nz w_z ( y'_nz log sigmoid(s_nz) + (1 - y'_nz) log sigmoid(-s_nz) ),   y' = (1 - e) y + e / Z

    It is ``torch.nn.functional.binary_cross_entropy_with_logits``, which takes no class ids and does not smooth, and
    timm's ``BinaryCrossEntropy``. An image of class id -100 is not counted.

    Args:
        scores: s, (N, Z).
        labels: class ids (N,), or for each class how true it is (N, Z), from 0 to 1.
        weight: w, (Z,); all 1 without. Nothing is divided by their sum.
        label_smoothing: e, from 0 to 1.

    Source: R. Wightman, H. Touvron, H. Jegou, "ResNet strikes back: an improved training procedure in timm", 2021,
    sec. 3 (class ids and mixed labels as targets of a binary cross-entropy).
    """
    with _precise(scores) as (scores,):
        shares, counted = _class_shares(labels, scores, label_smoothing)
        each = F.binary_cross_entropy_with_logits(scores, shares, weight, reduction="none").mean(1)
        return torch.where(counted, each, 0.0).sum() / counted.sum()


def _class_shares(labels: Tensor, scores: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Return labels as shares of the classes (N, Z), smoothed, and which images count, (N,)."""
    if labels.is_floating_point():
        shares, counted = labels.to(scores.dtype), torch.ones(len(labels), dtype=torch.bool, device=labels.device)
    else:
        counted = labels != IGNORED
        shares = F.one_hot(labels.where(counted, 0), scores.shape[1]).to(scores.dtype)
    if smoothing:
        shares = (1 - smoothing) * shares + smoothing / scores.shape[1]
    return torch.where(counted[:, None], shares, 0.0), counted


IGNORED = -100
"""Class id of an image that no loss counts, as in ``torch.nn.functional.cross_entropy``."""
