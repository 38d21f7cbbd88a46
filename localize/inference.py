"""Predict with a model that was trained by local losses: at any depth, by several depths together, and say why.

Every function runs the model in eval mode and without gradients, and leaves each module in the mode it was in::

    scores = inference.scores(local, x)                       # {"loss_0": (N, Z), ...}: layer-wise prediction
    inference.weighted_sum(inference.local_scores(local, x).values(), p=3).argmax(1)
    inference.superlabels(local, x, inference.CIFAR100_COARSE, form="mean")

Sources: S. Choi et al., "Dictionary contrastive learning for efficient local supervision without auxiliary networks",
ICLR 2024, eq. 3, appendices C.3 and D, and figure 5; G. Hinton, "The forward-forward algorithm: some preliminary
investigations", 2022, sec. 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

from localize.errors import Advice, InputError, MissingError, OptionError, UnknownNameError, did_you_mean
from localize.files import replacing
from localize.ir import LocalLoss, Target, Term
from localize.runtime.model import LocalModel

FORMS = ("l**p", "p**l")
"""Weights of layer l = 1, 2, ... in :func:`weighted_sum`."""
SUPERLABELS = ("mean", "super", "naive")
"""Ways to predict super-classes in :func:`superlabels`."""

CIFAR100_SUPERCLASSES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "aquatic_mammals": ("beaver", "dolphin", "otter", "seal", "whale"),
        "fish": ("aquarium_fish", "flatfish", "ray", "shark", "trout"),
        "flowers": ("orchid", "poppy", "rose", "sunflower", "tulip"),
        "food_containers": ("bottle", "bowl", "can", "cup", "plate"),
        "fruit_and_vegetables": ("apple", "mushroom", "orange", "pear", "sweet_pepper"),
        "household_electrical_devices": ("clock", "keyboard", "lamp", "telephone", "television"),
        "household_furniture": ("bed", "chair", "couch", "table", "wardrobe"),
        "insects": ("bee", "beetle", "butterfly", "caterpillar", "cockroach"),
        "large_carnivores": ("bear", "leopard", "lion", "tiger", "wolf"),
        "large_man-made_outdoor_things": ("bridge", "castle", "house", "road", "skyscraper"),
        "large_natural_outdoor_scenes": ("cloud", "forest", "mountain", "plain", "sea"),
        "large_omnivores_and_herbivores": ("camel", "cattle", "chimpanzee", "elephant", "kangaroo"),
        "medium_mammals": ("fox", "porcupine", "possum", "raccoon", "skunk"),
        "non-insect_invertebrates": ("crab", "lobster", "snail", "spider", "worm"),
        "people": ("baby", "boy", "girl", "man", "woman"),
        "reptiles": ("crocodile", "dinosaur", "lizard", "snake", "turtle"),
        "small_mammals": ("hamster", "mouse", "rabbit", "shrew", "squirrel"),
        "trees": ("maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"),
        "vehicles_1": ("bicycle", "bus", "motorcycle", "pickup_truck", "train"),
        "vehicles_2": ("lawn_mower", "rocket", "streetcar", "tank", "tractor"),
    }
)
"""The 20 super-classes of CIFAR-100 and the classes in each; ids of both are their places in alphabetical order.

Source: A. Krizhevsky, "Learning multiple layers of features from tiny images", 2009, and the data set's page,
https://www.cs.toronto.edu/~kriz/cifar.html.
"""


def _coarse_of_cifar100() -> tuple[int, ...]:
    coarse = {fine: i for i, fines in enumerate(CIFAR100_SUPERCLASSES.values()) for fine in fines}
    return tuple(coarse[fine] for fine in sorted(coarse))


CIFAR100_COARSE = _coarse_of_cifar100()
"""Super-class id (0..19) of each of the 100 class ids of CIFAR-100."""

Groups = Sequence[int] | Mapping[int, int]
"""Super-class id of every class id."""


# ---------------------------------------------------------------------------------------------------------- eval mode


@contextmanager
def evaluating(local: LocalModel) -> Iterator[None]:
    """Put the model into eval mode, without gradients, while the body runs; then every module is as it was.

    Args:
        local: a local model, in any mode.

    Returns:
        Nothing; use it as ``with evaluating(local): ...``.
    """
    modes = [(module, module.training) for module in local.modules()]
    local.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def needs_segments(local: LocalModel) -> None:
    """Refuse a model whose segments, which hold the operations of train mode, are not what it computes in eval mode.

    Args:
        local: a local model, in any mode.

    Raises:
        InputError: its forward computes other operations in eval mode than in train mode.
    """
    trunk = local.plan.segments.trunk
    if trunk.eval_differs:
        raise InputError(
            f"{trunk.name} computes other operations in eval mode than its segments do.",
            facts="so it cannot be looked into in eval mode.",
            help="only the model's own output can be used",
        )


# -------------------------------------------------------------------------------------------------------------- depths


@dataclass(frozen=True)
class Depth:
    """A place in the model where it can be asked for class scores."""

    name: str
    """Key in what :func:`scores` returns."""
    segment: int
    """Index of the segment whose output is read."""
    ends_at: str
    """Where that segment ends, as ``localize inspect`` calls it."""
    output: bool
    """It is the model's own output, and not a local loss."""


def depths(local: LocalModel) -> tuple[Depth, ...]:
    """Return every place with class scores, in the order of :func:`scores`.

    Args:
        local: a local model, in any mode.
    """
    return tuple(depth for depth, _ in _terms(local))


def _terms(local: LocalModel) -> Iterator[tuple[Depth, Term]]:
    for loss in local.plan.losses:
        if loss.part is not None and loss.part[0] > 0:
            continue
        for term in loss.terms:
            if term.scores and not term.labels:
                segment = local.plan.segments.segments[_segment_of(loss, term)]
                name = loss.name if term is loss.scored else f"{loss.name}.{term.head}"
                yield Depth(name, segment.index, segment.ends_at, term.head is None), term


def _segment_of(loss: LocalLoss, term: Term) -> int:
    return loss.route.stop if term.at is None else term.at


def depth(local: LocalModel, name: str) -> Depth:
    """Return the depth called ``name``: a loss, a segment, or where one ends (its last scores, where it has several).

    Args:
        local: a local model, in any mode.
        name: of a loss (``loss_0``), of a segment (``segment_0``), or of where a segment ends (``layer1.0``).

    Raises:
        UnknownNameError: there are no class scores at a place of this name.
    """
    found = depths(local)
    exact = [one for one in found if one.name == name]
    same = exact or [one for one in found if name in (one.ends_at, f"segment_{one.segment}")]
    if same:
        return same[-1]
    known = [text for one in found for text in (one.name, one.ends_at)]
    raise UnknownNameError(
        f"there is no layer {name!r} with class scores.",
        facts=f"layers are {', '.join(f'{one.name} ({one.ends_at})' for one in found) or 'none'}.",
        help=did_you_mean(name, known) or "one of these, by either name",
    )


def local_depths(local: LocalModel) -> tuple[Depth, ...]:
    """Return one depth for each segment that has class scores of a local loss, the model's own output left out.

    Of several at a segment it is the last.

    Args:
        local: a local model, in any mode.

    Raises:
        OptionError: no local loss makes class scores.
    """
    last = {one.segment: one for one in depths(local) if not one.output}
    if not last:
        raise OptionError(
            f"no local loss of {local.plan.method} makes class scores.",
            facts=f"layers with class scores are {', '.join(one.name for one in depths(local)) or 'none'}.",
            help="the model's own output, or goodness where labels are shown with the images",
        )
    return tuple(last[segment] for segment in sorted(last))


# ---------------------------------------------------------------------------------------------------------- prediction


def scores(local: LocalModel, x: Tensor) -> dict[str, Tensor]:
    """Return class scores (N, Z) at every depth that has them: layer-wise prediction (Choi et al., eq. 3).

    Args:
        local: in any mode.
        x: images (N, C, H, W).

    Raises:
        InputError: the model computes other operations in eval mode than in train mode.
    """
    needs_segments(local)
    with evaluating(local):
        return local.scores(x)


def local_scores(local: LocalModel, x: Tensor) -> dict[str, Tensor]:
    """Return class scores (N, Z) of the local losses, one for each depth from the first, without the classifier.

    Args:
        local: a local model, in any mode.
        x: images (N, C, H, W).

    Raises:
        OptionError: no local loss makes class scores.
        InputError: see :func:`scores`.
    """
    wanted = local_depths(local)
    found = scores(local, x)
    return {one.name: found[one.name] for one in wanted}


def answer(local: LocalModel, x: Tensor) -> Tensor:
    """Return the scores (N, Z) that the model answers with, as its method predicts; see :func:`answers_by`.

    These are its own output, where some loss trains that; otherwise the scores of the deepest local loss, or, where
    there are none, the :func:`goodness`. A method may answer by all local losses: :func:`softmax_sum` of their scores.

    Args:
        local: a local model, in any mode.
        x: images (N, C, H, W).
    """
    if answers_by(local) == "softmax_sum":
        return softmax_sum(local_scores(local, x).values())
    if local.plan.outputs:
        with evaluating(local):
            return local.logits(x)
    if depths(local):
        return without_classifier(local, x)
    return goodness(local, x)


def answers_by(local: LocalModel) -> str:
    """Name what :func:`answer` returns: ``output``, ``softmax_sum``, a local loss, or ``goodness``.

    A model whose segments say nothing about eval mode answers with its own output.

    Args:
        local: a local model, in any mode.
    """
    if local.plan.answer == "softmax_sum" and not local.plan.segments.trunk.eval_differs:
        return "softmax_sum"
    if local.plan.outputs:
        return "output"
    return local_depths(local)[-1].name if depths(local) else "goodness"


def softmax_sum(scores: Iterable[Tensor]) -> Tensor:
    """Return log( 1/K sum_k softmax(s_k) ), (N, Z), float64, of scores s_k (N, Z): its argmax is CaFo's prediction.

    The logarithm of the mean has the order of the sum, and its softmax are the shares of the classes.

    Args:
        scores: (N, Z) of each local loss.

    Source: G. Zhao et al., "The cascaded forward algorithm for neural network training", arXiv 2303.09728, 2023.
    """
    return torch.stack([one.double().softmax(1) for one in scores]).mean(0).log()


def predict(local: LocalModel, x: Tensor, at: str | None = None) -> Tensor:
    """Return class ids (N,): of :func:`answer`, or of the layer called ``at`` (see :func:`depth`).

    Args:
        local: a local model, in any mode.
        x: images (N, C, H, W).
        at: name of a layer, see :func:`depth`; default is what the method answers by.

    Raises:
        UnknownNameError: there is no such layer; the message says which there are.
    """
    if at is None:
        return answer(local, x).argmax(1)
    name = depth(local, at).name
    return scores(local, x)[name].argmax(1)


def without_classifier(local: LocalModel, x: Tensor) -> Tensor:
    """Return class scores (N, Z) of the deepest local loss: the answer of a model without its classifier.

    Args:
        local: a local model, in any mode.
        x: images (N, C, H, W).

    Raises:
        OptionError: no local loss makes class scores.
    """
    return list(local_scores(local, x).values())[-1]


def weighted_sum(scores: Iterable[Tensor], p: float, form: str = "l**p") -> Tensor:
    """Return sum_l lambda_l s_l over the raw scores of the local losses, l = 1, 2, ... (Choi et al., app. C.3).

    The paper writes lambda_l = l^p, 0 < p <= 10, and says that all layers count equally at p = 1, which is so for
    lambda_l = p^l; both forms are here. The scores of the classifier are not among the summands in the paper.

    Args:
        scores: (N, Z) of each layer, from the first, such as ``local_scores(local, x).values()``.
        p: exponent, or base.
        form: ``l**p`` or ``p**l``.

    Returns:
        (N, Z), float64: weights may be larger than float32 holds.

    Raises:
        OptionError: there is no such form, ``p`` is not finite (or not above 0 in ``p**l``), or there are no scores.
    """
    layers = list(scores)
    if form not in FORMS:
        raise OptionError(
            f"form cannot be {form!r}.", facts=f"its values are {', '.join(FORMS)}.", help=did_you_mean(form, FORMS)
        )
    if not layers:
        raise OptionError("there are no scores to add up.", help="scores of one layer or more")
    if not math.isfinite(p) or (form == "p**l" and p <= 0):
        limit = "a number" if form == "l**p" else "above 0"
        raise OptionError(f"p cannot be {p}.", facts=f"in {form} it is {limit}.", help="p from 0 to 10, as published")
    try:
        weights = [float(l) ** p if form == "l**p" else float(p) ** l for l in range(1, len(layers) + 1)]  # noqa: E741
    except OverflowError as error:
        raise OptionError(
            f"p cannot be {p}.", facts=f"{form} is too large a number at layer {len(layers)}.", help="a smaller p"
        ) from error
    return sum((weight * layer.double() for weight, layer in zip(weights, layers, strict=True)), torch.zeros(()))


# -------------------------------------------------------------------------------------------------------- super-labels


def superlabels(local: LocalModel, x: Tensor, groups: Groups, form: str = "mean") -> Tensor:
    """Predict super-classes with a model that was trained on classes (Choi et al., app. D).

    ``mean``: the embeddings of each super-class are averaged, and the super-class is that of the highest score of the
    last local layer against these. ``super``: the super-class of the class with the highest score there. ``naive``: the
    super-class of what the model's own classifier says.

    Args:
        local: for mean and super, its last local loss scores features against label embeddings.
        x: images (N, C, H, W).
        groups: super-class id of every class id, e.g. ``CIFAR100_COARSE``.
        form: ``mean``, ``super`` or ``naive``.

    Returns:
        super-class ids (N,).

    Raises:
        OptionError: there is no such form, ``groups`` is no such map, or there are no label embeddings.
    """
    if form not in SUPERLABELS:
        raise OptionError(
            f"super-labels cannot be predicted by {form!r}.",
            facts=f"ways are {', '.join(SUPERLABELS)}.",
            help=did_you_mean(form, SUPERLABELS),
        )
    coarse = coarse_ids(groups, local.plan.segments.trunk.num_classes).to(x.device)
    if form == "naive":
        return coarse[answer(local, x).argmax(1)]
    last = local_depths(local)[-1]
    term, dictionary = _embeddings(local, last)
    if form == "super":
        return coarse[scores(local, x)[last.name].argmax(1)]
    needs_segments(local)
    with evaluating(local):
        values = local.features(x)[last.segment]
        found: Tensor = _head(local, term)(*values, averaged(dictionary, coarse))
        return found.argmax(1)


def coarse_ids(groups: Groups, classes: int) -> Tensor:
    """Return the super-class ids (Z,) of all class ids, checked.

    Args:
        groups: super-class id of every class id.
        classes: Z, the number of classes.

    Raises:
        OptionError: a class has none, or the ids are not 0, 1, ..., each used.
    """
    known = groups if isinstance(groups, Mapping) else dict(enumerate(groups))
    missing = [fine for fine in range(classes) if fine not in known]
    if missing or len(known) != classes:
        raise OptionError(
            f"the map of super-classes has {len(known)} classes, and the model tells {classes}.",
            facts=f"classes without a super-class: {', '.join(map(str, missing[:5]))}." if missing else (),
            help=f"one super-class id for each class id, 0 to {classes - 1}",
        )
    ids = [known[fine] for fine in range(classes)]
    whole = all(isinstance(one, int) and not isinstance(one, bool) for one in ids)
    if not whole or sorted(set(ids)) != list(range(len(set(ids)))):
        raise OptionError(
            f"super-class ids cannot be {', '.join(dict.fromkeys(map(str, ids)))}.",
            facts="they are whole numbers from 0, and none is left out.",
            help=f"0 to {len(set(ids)) - 1}",
        )
    return torch.tensor(ids)


def averaged(dictionary: Tensor, coarse: Tensor) -> Tensor:
    """Return the mean embedding of every super-class, (S, C_D), of embeddings (Z, C_D) with super-class ids (Z,).

    Args:
        dictionary: an embedding for each class, (Z, C_D).
        coarse: super-class id of each class, (Z,).
    """
    members = F.one_hot(coarse).to(dictionary.dtype)
    return members.T @ dictionary / members.sum(0).unsqueeze(1)


def _embeddings(local: LocalModel, at: Depth) -> tuple[Term, Tensor]:
    """Return the scored term at a depth and the label embeddings (Z, C_D) that its head reads."""
    term = next(term for one, term in _terms(local) if one == at)
    classes = local.plan.segments.trunk.num_classes
    if len(term.uses) == 1 and local.plan.block(term.uses[0].block).role == "shared":
        with evaluating(local):
            dictionary = local.heads[term.uses[0].block]()
        if dictionary.dim() == 2 and dictionary.shape[0] == classes:
            return term, dictionary
    raise OptionError(
        f"the local losses of {local.plan.method} have no label embeddings.",
        facts=f"the scores of {at.name} come from its head alone, and not from a vector for each of {classes} classes.",
        help="a model trained against a dictionary of labels, or naive super-labels",
    )


# ------------------------------------------------------------------------------------------------------------ saliency


def saliency(
    local: LocalModel,
    x: Tensor,
    labels: Tensor | None = None,
    *,
    top: int = 1,
    at: str | None = None,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Return where in the images the features look like a label: S_k = <h^k, t'_y> (Choi et al., fig. 5).

    Each map is scaled to [0, 1] over its positions (0 where all are equal), then resized bilinearly. Of several tensors
    that cross the cut, the first feature map is read.

    Args:
        local: a local loss scores features against label embeddings.
        x: images (N, C, H, W).
        labels: class ids (N,); default is the ``top``-th in the order of what the model answers.
        top: 1 for the most likely label, 2 for the next.
        at: layer whose features are read, as in :func:`depth`; default is the last that has feature maps.
        size: height and width of the result; default is that of the images.

    Returns:
        (N, H, W), values in [0, 1].

    Raises:
        OptionError: there are no label embeddings, or no feature maps at that layer.
        UnknownNameError: there is no such layer.
    """
    classes = local.plan.segments.trunk.num_classes
    if not 1 <= top <= classes:
        raise OptionError(f"top cannot be {top}.", facts=f"there are {classes} classes.", help="1 or 2")
    if labels is None:
        labels = answer(local, x).topk(top, 1).indices[:, -1]
    chosen, which = _mapped(local, at)
    term, dictionary = _embeddings(local, chosen)
    layout = local.plan.segments.segments[chosen.segment].features[which]
    needs_segments(local)
    with evaluating(local):
        value = local.features(x)[chosen.segment][which]
        compare: Any = _head(local, term)  # a head with label embeddings
        found = compare.similarities(value, dictionary, which)
        rows = found.gather(1, labels.view(-1, 1, 1).expand(-1, 1, found.shape[2])).squeeze(1)
        height, width = layout.space
        return resized(unit_range(rows), (height, width), size or (x.shape[-2], x.shape[-1]))


def _head(local: LocalModel, term: Term) -> nn.Module:
    """Return the head of a term that has one."""
    assert term.head is not None, "label embeddings are compared by a head"
    return local.heads[term.head]


def embeddings(local: LocalModel) -> dict[str, Tensor]:
    """Return the label embeddings (Z, C_D) that local losses score features against, by the name of their block.

    Args:
        local: a local model, in any mode.

    Raises:
        OptionError: there are none.
    """
    return {term.uses[0].block: value for term, value in (_embeddings(local, one) for one in local_depths(local))}


def saliency_layers(local: LocalModel) -> dict[Depth, int]:
    """Return the depths whose feature maps are compared with label embeddings, and which tensor there is the first map.

    Args:
        local: a local model, in any mode.

    Raises:
        OptionError: there are no label embeddings.
    """
    usable = {}
    for one in local_depths(local):
        term, _ = _embeddings(local, one)
        features = local.plan.segments.segments[one.segment].features
        maps = [i for i, layout in enumerate(features) if layout.kind == "map" and len(layout.space) == 2]
        if maps and hasattr(_head(local, term), "similarities"):
            usable[one] = maps[0]
    return usable


def _mapped(local: LocalModel, at: str | None) -> tuple[Depth, int]:
    """Return a depth whose feature maps are compared with label embeddings, and which of its tensors is the first map.

    Raises:
        OptionError: there is none, or not at the layer called ``at``.
    """
    usable = saliency_layers(local)
    wanted = next(reversed(usable), None) if at is None else depth(local, at)
    if wanted not in usable:
        raise OptionError(
            f"{at or 'no layer'} has {'no ' if at else ''}feature maps that are compared with label embeddings.",
            facts=f"layers that have: {', '.join(one.name for one in usable) or 'none'}.",
            help=f"at {next(reversed(usable)).name}" if usable else "a model with convolutions",
        )
    return wanted, usable[wanted]


def unit_range(values: Tensor) -> Tensor:
    """Scale each row of (N, K) so that its lowest value is 0 and its highest 1; a row of equal values becomes 0.

    Args:
        values: (N, K).

    Returns:
        (N, K), values in [0, 1].
    """
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    return (values - low) / torch.where(high > low, high - low, torch.ones_like(high))


def resized(rows: Tensor, plane: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Return rows (N, H W) as maps of another size, bilinearly, (N, *size).

    Args:
        rows: one row for each map, (N, H W).
        plane: H and W of the maps in ``rows``.
        size: H and W of the result.
    """
    maps = rows.view(len(rows), 1, *plane)
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False).squeeze(1)


def save_saliency(
    path: str | Path,
    image: Tensor,
    maps: Tensor,
    *,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
    opacity: float = 0.5,
) -> None:
    """Write a picture: the image, and beside it the image under each map, blue where it is 0 and red where it is 1.

    Small images are enlarged by a whole factor, to 128 pixels or more.

    Args:
        path: ends in .png.
        image: (C, H, W), one channel or three, normalised with ``mean`` and ``std``.
        maps: (M, H, W), values in [0, 1].
        mean: of the pixels before normalisation, for all channels or for each.
        std: the same.
        opacity: share of the map in the mixture, 0..1.

    Raises:
        MissingError: the file cannot be written.
        InputError: the image has another number of channels.
    """
    if image.shape[0] not in (1, 3):
        raise InputError(f"the image has {image.shape[0]} channels.", facts="a picture has one or three.")
    image, maps = image.detach().float().cpu(), maps.detach().float().cpu()
    scale, shift = (torch.as_tensor(one, dtype=torch.float32).reshape(-1, 1, 1) for one in (std, mean))
    plain = (image * scale + shift).clamp(0, 1).expand(3, -1, -1)
    tiles = [plain, *((1 - opacity) * plain + opacity * _colours(one) for one in maps)]
    factor = max(1, math.ceil(128 / min(image.shape[1:])))
    row = torch.cat(tiles, 2).repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    picture = transforms.to_pil_image((row * 255).round().to(torch.uint8))
    try:
        with replacing(Path(path)) as temporary:
            picture.save(temporary, format="PNG")
    except OSError as error:
        raise MissingError(f"{path} cannot be written.", facts=str(error), help="another folder") from error


def _colours(heat: Tensor) -> Tensor:
    """Return colours (3, H, W) of values (H, W) in [0, 1]: blue, cyan, yellow, red."""
    return torch.stack([(1.5 - (4 * heat - peak).abs()).clamp(0, 1) for peak in (3, 2, 1)])


# ------------------------------------------------------------------------------------------------------------ goodness


def goodness(local: LocalModel, x: Tensor, *, skip_first: bool = True) -> Tensor:
    """Show the images with each label in turn, and return the goodness of the layers together (Hinton 2022, sec. 3.3).

    Args:
        local: the block that makes its input can show any label (it has ``overlay(images, labels)``), and its local
            losses take the goodness of features.
        x: images (N, C, H, W).
        skip_first: leave out the first layer, as the paper does; otherwise all layers count.

    Returns:
        (N, Z): at each label, the sum of the goodness of the layers. The answer is the label with the highest.

    Raises:
        OptionError: the method shows no labels, no loss takes goodness, or nothing is left after the first.
    """
    entry = local.plan.input
    overlay = getattr(local.heads[entry.block], "overlay", None) if entry is not None else None
    if overlay is None:
        raise OptionError(
            f"{local.plan.method} does not show labels with the images.",
            facts="goodness says how well an image and a label that is shown with it go together.",
            help="a model trained by a forward-forward method",
        )
    needs_segments(local)
    heads = _goodness_heads(local)
    columns = []
    with evaluating(local):
        for label in range(local.plan.segments.trunk.num_classes):
            shown = overlay(x, torch.full((len(x),), label, device=x.device))
            features = local.features(shown)
            found = [local.heads[head](*features[segment]) for segment, head in heads]
            layers = [one for one in found if one.shape == (len(x),)][1 if skip_first else 0 :]
            if not layers:
                raise OptionError(
                    f"{local.plan.method} has no goodness{' after its first layer' if skip_first else ''}.",
                    facts=f"local losses are {', '.join(loss.name for loss in local.plan.losses)}.",
                    help=Advice("skip_first=False", "--all-layers")
                    if skip_first
                    else "a model trained by a forward-forward method",
                )
            columns.append(sum(layers))
    return torch.stack(columns, 1)


def _goodness_heads(local: LocalModel) -> list[tuple[int, str]]:
    """Return (segment, head) wherever a head maps features alone to something that is not a class score, in order."""
    found = {
        (_segment_of(loss, term), term.head)
        for loss in local.plan.losses
        for term in loss.terms
        if not (term.head is None or term.scores or term.labels or term.uses) and term.target == Target()
    }
    return sorted(found)
