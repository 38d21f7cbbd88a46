"""Seconds of an operation by the model of a device, and what counts as traffic."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from localize.errors import OptionError
from localize.estimate.memory import Meter
from localize.estimate.speed import SPEEDS, Speed, speed_of


def metered(run: object, speed: Speed) -> Meter:
    with Meter(speed) as meter:
        run()  # type: ignore[operator]
    return meter


def test_an_operation_takes_the_longer_of_arithmetic_and_traffic_and_a_call() -> None:
    a, b = torch.randn(100, 100), torch.randn(100, 100)
    moved = 3 * 100 * 100 * 4

    products = metered(lambda: a @ b, Speed(1e6, 1e30, 0.5))
    assert products.seconds == pytest.approx(1.0 + 0.5)
    sums = metered(lambda: a + b, Speed(1e30, moved, 0.25))
    assert (sums.moved, sums.calls, sums.seconds) == (moved, 1, pytest.approx(1.25))


def test_views_and_empty_tensors_move_nothing() -> None:
    a = torch.randn(4, 6)
    found = metered(lambda: (a.view(24), a.t(), torch.empty(9), a.detach()), SPEEDS["cpu"])

    assert (found.moved, found.calls, found.seconds) == (0, 0, 0.0)


def test_convolutions_in_groups_have_a_rate_of_their_own() -> None:
    x, speed = torch.randn(1, 4, 8, 8), Speed(1e9, 1e30, 0.0, grouped=1e6)
    dense, depthwise = torch.randn(4, 4, 1, 1), torch.randn(4, 1, 1, 1)

    assert metered(lambda: F.conv2d(x, dense), speed).seconds == pytest.approx(64 * 16 / 1e9)
    assert metered(lambda: F.conv2d(x, depthwise, groups=4), speed).seconds == pytest.approx(64 * 4 / 1e6)


def test_speeds_are_named_or_stated() -> None:
    assert speed_of("h200") is SPEEDS["h200"]
    stated = speed_of("60e12,2e12,6e-6")
    assert (stated.macs, stated.bytes, stated.call) == (30e12, 2e12, 6e-6)


@pytest.mark.parametrize("text", ["h300", "", "1,2", "0,1,1", "1,2,x"])
def test_what_is_no_speed_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="--device-model cannot be"):
        speed_of(text)
