"""Work in several processes gives what one process gives."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from localize.estimate.processes import each
from localize.torch_names import fake_mode

IN_A_FRESH_PROCESS = """
import os
from localize.estimate.processes import each

found = list(each(lambda item: (item, os.getpid()), list("abcd"), 2))
assert [item for item, _ in found] == list("abcd")
assert os.getpid() not in {pid for _, pid in found}
assert [pid for _, pid in each(lambda item: (item, os.getpid()), ["a"], 1)] == [os.getpid()]
print("fine")
"""

PLANNED_TWICE = """
from localize.estimate import planner
from localize.recipes import Recipe

def found(processes):
    choice = planner.plan(Recipe("backprop", model="resnet20"), planner.Share(0.3), 32, every=True, processes=processes)
    return [(way.name, way.recipe, way.peak_bytes, way.macs, round(way.predicted, 9)) for way in choice.ways]

two = found(2)
assert len(two) > 20
assert two == found(1)  # in this order: a process that has followed a step can have no forked ones that do
print("fine")
"""


def said(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")
def test_items_are_worked_on_elsewhere_and_come_back_in_order() -> None:
    assert said(IN_A_FRESH_PROCESS) == "fine"


def test_after_a_backward_without_values_all_is_done_here() -> None:
    with fake_mode():
        torch.ones(1, requires_grad=True).sum().backward()

    assert list(each(lambda item: (item, os.getpid()), [1, 2], 2)) == [(1, os.getpid()), (2, os.getpid())]


@pytest.mark.slow
def test_a_plan_of_all_methods_is_the_same_by_two_processes() -> None:
    assert said(PLANNED_TWICE) == "fine"
