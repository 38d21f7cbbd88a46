"""From a recipe to a model, and from there to a local model."""

from __future__ import annotations

import math
from importlib import metadata

import torch
from torch import nn

import localize
from localize import zoo
from localize.compiler import transform
from localize.errors import Advice, ModelError, OptionError, RecipeError
from localize.ir import Trunk
from localize.recipes import Recipe
from localize.runtime.model import LocalModel


def create_model(recipe: Recipe, *, data: bool = True, weights: bool = False) -> nn.Module:
    """Make the model that a recipe names.

    Args:
        recipe: its model, with its options.
        data: False makes it without data, on the meta device.
        weights: with those that its library has published, if the recipe begins with them (``train: {pretrained:
            true}``); otherwise it is the same net with fresh ones.

    Raises:
        RecipeError: the recipe names no model.
        ModelError: a model of the user's own has another number of class scores than was asked for.
        LocalizeError: see :func:`localize.zoo.create_model`.
    """
    if recipe.model is None:
        raise RecipeError("the recipe does not say which model.", help="model: NAME, or localize convert NAME")
    create = zoo.create_model if data else zoo.create_empty
    published = {"pretrained": True, "fetch": weights} if recipe.train.get("pretrained") else {}
    options = {**recipe.model_options, **published}
    return create(recipe.model, recipe.num_classes, input_shape=recipe.input_shape, **options)


def versions() -> dict[str, str]:
    """Return the versions that decide what is generated."""
    libraries = ("torch", "torchvision", "timm")
    return {"localize": localize.__version__} | {name: metadata.version(name) for name in libraries}


def build(recipe: Recipe, *, data: bool = True) -> LocalModel:
    """Make the model that a recipe names, with fresh weights or without data (meta device), and transform it.

    Raises:
        RecipeError: the recipe names no model.
        LocalizeError: see :func:`localize.zoo.create_model` and :func:`localize.transform`.
    """
    model = create_model(recipe, data=data)
    source = zoo.resolve(recipe.model or "")
    shape = zoo.input_shape_of(source, model, recipe.input_shape)
    local = transform(model, recipe, example_input=torch.empty((2, *shape), device="meta"), name=source.name)
    check_classes(local, recipe)
    return local


def check_classes(local: LocalModel, recipe: Recipe) -> None:
    """Refuse a model with another number of class scores than its recipe says.

    Raises:
        ModelError: a model of the user's own, whose factory takes no ``num_classes``.
    """
    found = local.plan.segments.trunk.num_classes
    if recipe.num_classes not in (None, 0, found):
        raise ModelError(
            f"{recipe.model} returns {found} class scores, and {recipe.num_classes} are needed.",
            help="an argument num_classes of what makes it, which is then passed; or a model with as many scores",
        )


def random_batch(local: LocalModel, size: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random images and labels of the size that ``local`` takes; always the same ones.

    There are ``size`` of them; by default 4, or two for each part where the batch is taken in parts.

    Raises:
        OptionError: they do not fit in memory.
    """
    trunk = local.plan.segments.trunk
    size = max([4, *(2 * loss.part[1] for loss in local.plan.losses if loss.part)]) if size is None else size
    generator = torch.Generator().manual_seed(0)
    try:
        images = torch.randn(size, *trunk.input_shape, generator=generator)
    except RuntimeError as error:  # what torch raises where memory does not suffice
        raise OptionError(
            f"{size} images of shape {trunk.input_shape} do not fit in memory.",
            facts=f"they hold {size * math.prod(trunk.input_shape):,} values.",
            help=Advice("smaller images: input_shape in the recipe", "smaller images: --input-shape"),
            option="input_shape",
        ) from error
    return images, some_labels(trunk, size)


def some_labels(trunk: Trunk, size: int) -> torch.Tensor:
    """Return class ids for ``size`` images of a model, (N,) or (N, H, W): every class in turn."""
    labels = torch.arange(math.prod((size, *trunk.output_size))) % trunk.num_classes
    return labels.reshape(size, *trunk.output_size)
