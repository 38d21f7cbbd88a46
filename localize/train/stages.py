"""Which blocks a run trains in each epoch: all, all except those that are frozen by then, or one segment at a time.

Epochs are counted from 1. The blocks are those of the plan: ``segment_0``, ``head_0``, ...
"""

from __future__ import annotations

from collections.abc import Iterator

from localize.errors import MethodError, OptionError
from localize.ir import Plan
from localize.passes import freeze as freezing
from localize.recipes.settings import TrainConfig, epochs_by_block


def frozen_in(config: TrainConfig, plan: Plan, epoch: int) -> tuple[str, ...]:
    """Return the names of the blocks that an epoch does not train, for :func:`localize.freeze`."""
    if config.stage_epochs is not None:
        stage = _segments(plan)[(epoch - 1) // config.stage_epochs]
        return tuple(segment.name for segment in plan.segments.segments if segment.index != stage)
    return tuple(name for name, last in epochs_by_block(config.freeze_after).items() if epoch > last)


def check(config: TrainConfig, plan: Plan) -> None:
    """Refuse stages that do not fit the plan or the number of epochs, before anything is trained.

    Raises:
        MethodError: one segment is to be trained at a time, but losses run several segments.
        OptionError: the stages do not add up to the epochs, or nothing would be left to train.
        UnknownNameError: the plan trains no block of that name.
    """
    if config.stage_epochs is not None:
        long = [loss for loss in plan.losses if loss.route.start != loss.route.stop]
        if long:
            raise MethodError(
                f"{plan.method} does not train one segment at a time.",
                facts=f"{long[0].name} runs segment_{long[0].route.start} to segment_{long[0].route.stop}.",
                help="use another method, or leave out --stage-epochs",
            )
        count, total = len(_segments(plan)), config.stage_epochs * len(_segments(plan))
        if config.epochs != total:
            raise OptionError(
                f"{count} segments of {config.stage_epochs} epochs each are {total} epochs, not {config.epochs}.",
                help=f"--epochs {total}, or another --stage-epochs",
                option="epochs",
            )
    for names in {frozen_in(config, plan, epoch): None for epoch in range(1, config.epochs + 1)}:
        freezing.freeze(plan, names)


def told(config: TrainConfig, plan: Plan, epoch: int) -> str:
    """Return a line that says what an epoch trains."""
    names = frozen_in(config, plan, epoch)
    now = freezing.freeze(plan, names)
    return f"from epoch {epoch} on: {', '.join(_trained(now))} trained; {', '.join(names)} frozen"


def _trained(plan: Plan) -> Iterator[str]:
    reached = {name for loss in plan.losses for name in loss.reach if plan.block(name).parameters}
    return (block.name for block in plan.blocks if block.name in reached)


def _segments(plan: Plan) -> tuple[int, ...]:
    """Return the segments that have a loss, in order; each one is a stage."""
    return tuple(sorted({loss.route.stop for loss in plan.losses}))
