"""Make plans and local models for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from localize import methods, zoo
from localize.cutting.cuts import place
from localize.cutting.split import split
from localize.graph.trace import trace
from localize.ir import Block, CutSpec, Plan, Trunk

_TRUNKS: dict[tuple[str, tuple[int, ...]], Trunk] = {}


def trunk(name: str, input_shape: tuple[int, ...] = (3, 32, 32), *, num_classes: int | None = None) -> Trunk:
    """Return the recorded model of this name; recorded once for all tests, which must not change it."""
    key = (name, (*input_shape, num_classes or 0))
    if key not in _TRUNKS:
        _TRUNKS[key] = trace(zoo.create_model(name, num_classes), torch.empty(2, *input_shape), name=name)
    return _TRUNKS[key]


def plan(name: str, method: str, input_shape: tuple[int, ...] = (3, 32, 32), **options: Any) -> Plan:
    """Return the plan of a method on a model of the zoo."""
    made = methods.create(method, **options)
    layout = place(trunk(name, input_shape), CutSpec(), grain=made.grain, together=made.together)
    return made.plan(split(layout))


def heads(made: Plan) -> list[Block]:
    """Return the blocks that are heads."""
    return [block for block in made.blocks if block.role == "head"]


def gradient_norm(*modules: nn.Module) -> float:
    """Return the L2 norm of the gradients of these modules together."""
    return torch.cat([p.grad.flatten() for module in modules for p in module.parameters()]).norm().item()
