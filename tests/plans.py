"""Make plans and local models for tests."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from localize import methods, zoo
from localize.cutting.cuts import place
from localize.cutting.split import split
from localize.graph.trace import trace
from localize.ir import Block, CutSpec, Plan, Segments, Trunk


def trunk(name: str, input_shape: tuple[int, ...] = (3, 32, 32), *, num_classes: int | None = None) -> Trunk:
    """Return the recorded model of this name; recorded once for all tests, which must not change it."""
    return _recorded(name, input_shape, num_classes)


@functools.cache
def _recorded(name: str, input_shape: tuple[int, ...], num_classes: int | None) -> Trunk:
    return trace(zoo.create_model(name, num_classes), torch.empty(2, *input_shape), name=name)


@functools.cache
def segments(name: str, input_shape: tuple[int, ...], grain: str, together: int) -> Segments:
    """Return the recorded model of this name, cut at every place that a method may cut; not to be changed."""
    return split(place(trunk(name, input_shape), CutSpec(), grain=grain, together=together))


def plan(name: str, method: str, input_shape: tuple[int, ...] = (3, 32, 32), **options: Any) -> Plan:
    """Return the plan of a method on a model of the zoo."""
    made = methods.create(method, **options)
    return made.plan(segments(name, input_shape, made.grain, made.together))


def heads(made: Plan) -> list[Block]:
    """Return the blocks that are heads."""
    return [block for block in made.blocks if block.role == "head"]


def gradient_norm(*modules: nn.Module) -> float:
    """Return the L2 norm of the gradients of these modules together."""
    return torch.cat([p.grad.flatten() for module in modules for p in module.parameters()]).norm().item()
