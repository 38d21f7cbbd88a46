"""Branches by name, which any method can attach to the output of a segment.

A builder takes a segment, its trunk, and the name of the branch's own block, and returns a
:class:`localize.heads.branch.Branch`. Its options are its keyword-only arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from torch import nn

from localize.errors import PlanError, UnknownNameError, did_you_mean
from localize.heads import blocks
from localize.heads.branch import Branch
from localize.heads.decoder import Decoder, DeepDecoder, pixels, require_images
from localize.heads.dgl import SpatialMLP
from localize.heads.dictionary import segments_of_vectors
from localize.heads.projection import (
    CONFIGURATIONS,
    ConvolutionalProjection,
    DeepProjection,
    LinearProjection,
    MeanVector,
    PooledProjection,
    widest_map,
)
from localize.heads.similarity import decoder_width, prediction, similarity
from localize.ir import Segment, Target, Term, Trunk
from localize.options import check_name, check_value

Builder = Callable[..., Branch]

CONTRASTIVE = {
    "supcon": "localize.losses.supervised_contrastive",
    "pairs": "localize.losses.pair_contrastive",
    "ratio": "localize.losses.feature_ratio",
}
"""Losses that pull vectors of the same class together, see :mod:`localize.losses`."""
PROJECTIONS = ("linear", "pooled", *CONFIGURATIONS, "deep")
"""Heads that map features to a vector or to class scores."""


def softmax(
    segment: Segment, trunk: Trunk, name: str, *, head: str = "linear", limit: int = 0, widest: int = 0
) -> Branch:
    """Classify with a cross-entropy of class scores.

    Args:
        segment: the segment to train.
        trunk: its model.
        name: name of the head.
        head: one of ``PROJECTIONS``.
        limit: largest number of inputs of the linear layer of a ``pooled`` head; 0 means
            :func:`localize.heads.similarity.decoder_width` of the trunk.
        widest: width of the trunk's widest map, which decides whether a head's convolutions double the width; 0: it is
            determined from the trunk.

    Returns:
        The head, which returns class scores (N, Z), and its loss.
    """
    module = _projection(segment, trunk, head, trunk.num_classes, unit=False, limit=limit, widest=widest)
    return headed(segment, name, module.to("meta"), Term(blocks.CROSS_ENTROPY))


def mlp(segment: Segment, trunk: Trunk, name: str, *, n_conv: int = 3, n_hidden: int = 3, bias: bool = True) -> Branch:
    """Classify with 1x1 convolutions and a fully connected net (MLP-SR-aux), and a cross-entropy.

    Args:
        segment: the segment to train.
        trunk: its model.
        name: name of the head.
        n_conv: number of 1x1 convolutions.
        n_hidden: number of hidden linear layers.
        bias: whether the hidden linear layers have a bias.
    """
    module = SpatialMLP(segment.features, trunk.num_classes, n_conv=n_conv, n_hidden=n_hidden, bias=bias)
    return headed(segment, name, module.to("meta"), Term(blocks.CROSS_ENTROPY))


def contrast(
    segment: Segment,
    trunk: Trunk,
    name: str,
    *,
    head: str = "linear",
    size: int = 128,
    tau: float = 0.07,
    form: str = "supcon",
    limit: int = 0,
    widest: int = 0,
) -> Branch:
    """Project to vectors of length 1, and pull those of one class together.

    Args:
        segment: the segment to train.
        trunk: its model.
        name: name of the head.
        head: one of ``PROJECTIONS``.
        size: length of the vectors.
        tau: temperature.
        form: form of the loss, a key of ``CONTRASTIVE``.
        limit: as in :func:`softmax`.
        widest: as in :func:`softmax`.
    """
    module = _projection(segment, trunk, head, size, unit=True, limit=limit, widest=widest)
    return headed(segment, name, module.to("meta"), _contrastive(tau, form))


def feature(
    segment: Segment, trunk: Trunk, name: str, *, tau: float = 0.07, form: str = "supcon", k: int = 1
) -> Branch:
    """Pull together the features of the same class, averaged over positions and scaled to length 1 (L_feat).

    Args:
        segment: the segment to train.
        trunk: its model.
        name: name of the head, which has no parameters.
        tau: temperature.
        form: form of the loss, a key of ``CONTRASTIVE``.
        k: number of parts into which a flat feature vector is cut before averaging.

    Raises:
        OptionError: a flat vector cannot be cut into ``k`` equal parts.
    """
    k = segments_of_vectors(segment, (segment,), k)
    return headed(segment, name, MeanVector(segment.features, k=k), _contrastive(tau, form))


def reconstruction(
    segment: Segment, trunk: Trunk, name: str, *, decoder: str = "plain", mean: str = "", std: str = ""
) -> Branch:
    """Reconstruct the image's pixels (N, C, H, W), with a binary cross-entropy.

    Args:
        segment: the segment to train.
        trunk: its model.
        name: name of the decoder; its target is a block called ``pixels``, which all such branches share.
        decoder: ``plain`` (two convolutions), or ``deep`` (four, for large images).
        mean: means with which the channels were normalised, separated by commas; if empty, each batch is scaled so that
            its smallest value becomes 0 and its largest 1.
        std: standard deviations with which the channels were normalised, in the same form.

    Raises:
        PlanError: the features have no positions, or the model does not take images.
        OptionError: a mean or standard deviation cannot be read.
    """
    require_images("a reconstruction", segment, trunk)
    channels, height, width = trunk.input_shape
    module = _DECODERS[decoder](segment.features, (channels, height, width))
    target = blocks.of_module("pixels", pixels(mean, std, channels), role="shared")
    term = Term("localize.losses.reconstruction", scores=False, target=Target("images", target.name))
    branch = headed(segment, name, module.to("meta"), term)
    return Branch(branch.term, (*branch.blocks, target))


_DECODERS = {"plain": Decoder, "deep": DeepDecoder}
_CHOICES = {"head": PROJECTIONS, "form": tuple(CONTRASTIVE), "decoder": tuple(_DECODERS)}
_LOW = {"tau": 1e-6, "size": 1, "k": 1, "limit": 0, "widest": 0, "dim_in": 0, "n_conv": 0, "n_hidden": 0}
"""Allowed values, or smallest values, of options by name; an option means the same for every branch."""

BRANCHES: Mapping[str, Builder] = MappingProxyType(
    {
        "softmax": softmax,
        "mlp": mlp,
        "pred": prediction,
        "sim": similarity,
        "contrast": contrast,
        "feature": feature,
        "reconstruction": reconstruction,
    }
)


def build(kind: str, segment: Segment, trunk: Trunk, name: str, options: Mapping[str, Any]) -> Branch:
    """Make the branch ``kind`` for the output of a segment.

    Raises:
        LocalizeError: see :func:`check`; or the branch cannot be attached there.
    """
    check(kind, options)
    return BRANCHES[kind](segment, trunk, name, **options)


def check(kind: str, options: Mapping[str, Any]) -> None:
    """Refuse a branch that does not exist, and options that it does not have.

    Raises:
        UnknownNameError: there is no such branch.
        OptionError: there is no such option, or it cannot have this value.
    """
    if kind not in BRANCHES:
        raise UnknownNameError(
            f"there is no branch {kind!r}.",
            facts=f"branches are {', '.join(BRANCHES)}.",
            help=did_you_mean(kind, BRANCHES),
        )
    known, owner = defaults(kind), f"branch {kind!r}"
    for name, value in options.items():
        check_name(owner, name, known)
        default, choices, low = known[name], _CHOICES.get(name, ()), _LOW.get(name)
        check_value(owner, name, value, default=default, choices=choices, low=low)


def defaults(kind: str) -> dict[str, Any]:
    """Return the options of a branch with their defaults."""
    parameters = inspect.signature(BRANCHES[kind]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _contrastive(tau: float, form: str) -> Term:
    return Term(CONTRASTIVE[form], scores=False, options=(("tau", tau),))


def _projection(
    segment: Segment, trunk: Trunk, head: str, out: int, *, unit: bool, limit: int, widest: int
) -> nn.Module:
    if head == "linear":
        return LinearProjection(segment.features, out, unit=unit)
    if head == "pooled":
        return PooledProjection(segment.features, out, limit=limit or decoder_width(trunk), unit=unit)
    if head == "deep":
        return DeepProjection(segment.features, out, unit=unit)
    widest = widest or widest_map(trunk)
    return ConvolutionalProjection(segment.features, out, configuration=head, widest=widest, unit=unit)


def headed(segment: Segment, name: str, module: nn.Module, term: Term) -> Branch:
    """Return a branch whose only block is a head on the output of a segment.

    Args:
        segment: the segment to train.
        name: name of the block; every segment needs its own, such as ``f"head_{segment.index}"``.
        module: the head. It takes the output tensors of the segment, one for each entry of ``segment.features``, and
            returns the prediction. Parameters on the meta device are drawn when the local model is made (with each
            module's ``reset_parameters``); others keep their values.
        term: the loss of the prediction, such as ``Term(my_loss)``; its head is set here.

    Raises:
        PlanError: ``module`` is not a module.
    """
    if not isinstance(module, nn.Module):
        raise PlanError(f"{name} is {type(module).__name__}, not a torch.nn.Module.", help="class Head(nn.Module): ...")
    head = blocks.of_module(name, module, *(f.shape for f in segment.features))
    return Branch(replace(term, head=head.name), (head,))
