"""Work in several processes gives what one process gives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from localize.estimate.processes import each
from localize.torch_names import fake_mode

IN_A_FRESH_PROCESS = """
import os
import signal
from localize.estimate.processes import each

found = list(each(lambda item: (item, os.getpid()), list("abcd"), 2))
assert [item for item, _ in found] == list("abcd")
assert os.getpid() not in {pid for _, pid in found}
assert [pid for _, pid in each(lambda item: (item, os.getpid()), ["a"], 1)] == [os.getpid()]

here = os.getpid()
def dies(item):
    if item == "b" and os.getpid() != here:
        os.kill(os.getpid(), signal.SIGKILL)
    return item.upper()
assert list(each(dies, list("abcd"), 2)) == list("ABCD"), "what is left is done here"
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


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")
def test_an_interrupted_plan_ends_with_all_its_processes(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "localize", "plan", "resnet20", "--memory-budget", "10%"]
    with (tmp_path / "said").open("w") as file:
        plan = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        while len(children_of(plan.pid)) < 2:
            assert plan.poll() is None, (tmp_path / "said").read_text()
            time.sleep(0.05)
        os.killpg(plan.pid, signal.SIGINT)
        assert plan.wait(60) == 130
    assert (tmp_path / "said").read_text().strip() == "interrupted"
    with pytest.raises(ProcessLookupError):
        for _ in range(200):  # what has ended may still wait to be noticed
            os.killpg(plan.pid, 0)
            time.sleep(0.05)


def children_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_a_backward_before_does_not_matter() -> None:
    def work(item: int) -> int:
        with fake_mode():
            torch.ones(1, requires_grad=True).sum().backward()
        return 10 * item

    work(0)

    assert list(each(work, [1, 2, 3], 2)) == [10, 20, 30]


def test_where_no_process_can_be_forked_all_is_done_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")

    assert list(each(lambda item: (item, os.getpid()), [1, 2], 2)) == [(1, os.getpid()), (2, os.getpid())]


@pytest.mark.slow
def test_a_plan_of_all_methods_is_the_same_by_two_processes() -> None:
    assert said(PLANNED_TWICE) == "fine"
