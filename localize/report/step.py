"""What the training step of a run is, and what it needs: predicted from its recipe, without data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from localize import build, folder, recipes
from localize.errors import LocalizeError
from localize.estimate import compare
from localize.estimate.memory import Footprint
from localize.ir import Plan
from localize.report.training import Training


@dataclass(frozen=True)
class Step:
    """The plan of a run's step and the number of its parameters; memory by the name of the step, backprop's first.

    Where the model cannot be made here any more, there is no plan, and ``refused`` says why; where only its memory
    cannot be predicted, there is no memory.
    """

    plan: Plan | None = None
    trunk_parameters: int = 0
    training_parameters: int = 0
    """Parameters of the model, and of heads and shared blocks."""
    memory: Mapping[str, Footprint] = field(default_factory=lambda: MappingProxyType({}))
    refused: str = ""


def predict_all(trainings: Sequence[Training], *, memory: bool, tell: Callable[[str], None]) -> list[Step]:
    """Return the step of every run; runs that differ in training settings only share one prediction."""
    known: dict[tuple[str, int], Step] = {}
    keys = []
    for training in trainings:
        step = dataclasses.replace(training.recipe, train={}, preprocessing=None, dataset=None)
        key = recipes.dump(step), training.config.batch_size
        keys.append(key)
        if key not in known:
            known[key] = predict(training, memory=memory, tell=tell)
    return [known[key] for key in keys]


def predict(training: Training, *, memory: bool, tell: Callable[[str], None]) -> Step:
    """Return the step of a run."""
    tell(training.name)
    try:
        local = build.build(training.recipe, data=False)
    except LocalizeError as error:
        return Step(refused=error.problem)
    totals = folder.describe(local)["totals"]
    step = Step(local.plan, totals["trunk_parameters"], totals["training_parameters"])
    if not memory:
        return dataclasses.replace(step, refused="it was not asked for.")
    try:
        found = compare.footprints(training.recipe, training.config.batch_size, tell=tell)
    except (LocalizeError, RuntimeError) as error:  # a step whose cost depends on values of tensors
        return dataclasses.replace(step, refused=str(error).partition("\n")[0])
    return dataclasses.replace(step, memory=found)
