"""What a recipe is: frozen objects, made by :func:`localize.recipes.load`, which checks them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pydantic

from localize.ir import CutSpec, Stated
from localize.passes.compose import Addition
from localize.recipes.preprocessing import DataRecord, Preprocessing

FILE_NAME = "recipe.yaml"
"""The recipe in a folder that ``localize convert`` has written."""


@dataclass(frozen=True)
class Expected:
    """A published number that this recipe is meant to reach, and where it is printed.

    ``metric`` is ``test_accuracy``, a share of 1, or ``test_accuracy_top5``. What follows it says which one is meant:
    that of a local layer, ``test_accuracy of layer 2``; of another way to predict, ``test_accuracy of super-labels
    (mean)``; of the recipe with other options, or another number of segments, ``test_accuracy with d=4``. ``epoch``
    says which accuracy of a run it is: that of its ``best`` epoch on the test images, of its ``last``, or ``unstated``
    where neither the paper nor its code says.
    """

    metric: str
    value: float
    source: str
    epoch: Literal["best", "last", "unstated"] = "unstated"


def _named(loss: Any) -> Any:
    """Read the name of a loss as a mapping that holds it."""
    return {"name": loss} if isinstance(loss, str) else loss


@dataclass(frozen=True)
class Recipe:
    """What to do to a model. Made by :func:`load`, which checks it.

    ``model``, ``num_classes``, ``input_shape`` and ``model_options`` (the model's own, such as ``dropout``) are as in
    :func:`localize.zoo.create_model`; ``options`` are the fields of the method's dataclass, ``train`` the settings of
    :class:`localize.train.TrainConfig`. ``shared`` lets several losses train parameters that are used on both sides of
    a cut. ``freeze`` names parameters of the model that are not trained, ``*`` standing for anything; they require no
    gradient from :func:`localize.transform` on. ``leaf`` names modules that are called whole, see there. ``output``
    names the output that holds the class scores, of a model that returns several tensors. ``features`` states layouts
    by the name of a cut where what is inferred is not right, see :func:`localize.passes.stated.override_features`.
    ``terms`` are added to every local loss, see :func:`localize.passes.compose.compose`. ``outputs`` are weights of
    further outputs of the model (auxiliary classifiers) by their names, see :func:`localize.passes.sides.attach`.
    ``loss`` is what class scores are trained by, see :class:`localize.passes.labels.LabelLoss`.
    ``schedule`` says how the step spends memory and arithmetic, see :class:`localize.passes.schedule.Schedule`.

    In the recipe of a run, ``preprocessing`` says how an image becomes the input of the model, and ``dataset`` which
    data the run was started on. Both are written when the run starts.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None
    num_classes: int | None = None
    input_shape: Annotated[tuple[int, ...], pydantic.Field(min_length=2)] | None = None
    model_options: Mapping[str, Any] = field(default_factory=dict)
    cut: CutSpec | None = None
    shared: bool = False
    freeze: tuple[str, ...] = ()
    leaf: tuple[str, ...] = ()
    output: str | None = None
    features: Mapping[str, Stated | tuple[Stated, ...]] = field(default_factory=dict)
    terms: tuple[Addition, ...] = ()
    outputs: Mapping[str, float] = field(default_factory=dict)
    loss: Annotated[Mapping[str, Any], pydantic.BeforeValidator(_named)] = field(default_factory=dict)
    schedule: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    preprocessing: Preprocessing | None = None
    dataset: DataRecord | None = None
    paper: str = ""
    notes: str = ""
    expected: tuple[Expected, ...] = ()
