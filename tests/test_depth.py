"""The work of a conversion grows as the depth of the net does: no part of it looks through the whole net."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import localize
from localize import auditor
from localize.ir import AuditReport
from localize.zoo.cifar_resnet import CifarResNet

PACKAGE = str(Path(localize.__file__).parent)
SHALLOW, DEEP = 2, 6
"""Blocks of each of three stages."""
MARGIN = 1.25
FEW = 150
"""What a function may do besides, however deep the net is."""


def visits(act: Callable[[], Any]) -> Counter[str]:
    """Count by function: its calls, the values that it yields and, in the package, the lines that it runs."""
    counts: Counter[Any] = Counter()

    def count(frame: FrameType, event: str, _: Any) -> Any:
        if event in ("call", "line"):
            counts[frame.f_code] += 1
        return count if frame.f_code.co_filename.startswith(PACKAGE) else None

    before = sys.gettrace()
    sys.settrace(count)
    try:
        act()
    finally:
        sys.settrace(before)
    named: Counter[str] = Counter()
    for code, number in counts.items():
        if not code.co_filename.startswith("<"):  # code that is made for one net
            named[f"{code.co_filename}:{code.co_qualname}"] += number
    return named


def superlinear(act: Callable[[int], Any]) -> dict[str, tuple[int, int]]:
    """Return the functions whose visits grow by more than the depth, with their numbers at both depths."""
    shallow, deep = (visits(lambda blocks=blocks: act(blocks)) for blocks in (SHALLOW, DEEP))
    return {
        name: (shallow[name], count)
        for name, count in deep.items()
        if count > MARGIN * shallow[name] * DEEP / SHALLOW + FEW
    }


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dcl", {"recompute": "all"}),
        pytest.param("backprop", {}, marks=pytest.mark.slow),
        pytest.param("auglocal", {"d": 2}, marks=pytest.mark.slow),
    ],
)
def test_work_of_a_conversion_grows_as_the_depth_of_the_net(
    monkeypatch: pytest.MonkeyPatch, method: str, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(auditor, "static", lambda local: AuditReport(()))

    def convert(blocks: int) -> None:
        net = CifarResNet(blocks, width=2, input_shape=(3, 8, 8))
        localize.transform(net, method, example_input=torch.zeros(2, 3, 8, 8), **options)

    convert(SHALLOW)  # what is found once for each shape

    assert not superlinear(convert)


def test_a_search_for_each_part_is_seen_as_more_than_linear() -> None:
    def search(blocks: int) -> None:
        for i in range(10 * blocks):
            sum(j == i for j in range(10 * blocks))

    assert superlinear(search)
