"""Every example runs, and prints what its header says."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_a_plain_loop_trains_audits_and_exports(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["01_train_digits.py", "--smoke"])

    runpy.run_path(str(EXAMPLES / "01_train_digits.py"), run_name="__main__")

    printed = capsys.readouterr().out
    assert "epoch 0: loss" in printed
    assert "audit: all checks hold" in printed
    assert "exported: CifarResNet with 272474 parameters, original keys" in printed
