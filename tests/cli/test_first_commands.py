"""What a newcomer types first works, one command after the other, on a net of full depth."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from localize.cli import app


def typed(line: str) -> str:
    """Run a command; return what it prints."""
    result = CliRunner().invoke(app, line.split())
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.slow
@pytest.mark.lowest
def test_a_net_is_converted_audited_trained_resumed_evaluated_and_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = "--data digits --input-shape 3,8,8 --batch-size 32 --device cpu"

    assert "9 segments, 9 losses" in typed("convert resnet20 --method auglocal --d 2 -o out")
    assert "checks hold" in typed("audit out")
    assert "epoch 1/1" in typed(f"train resnet20 --method auglocal --d 2 --epochs 1 --max-steps 20 {small} -o run")
    (line,) = Path("run/metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 20
    assert "20 steps done" in typed("train --resume run")
    assert "by its own output" in typed("eval run --device cpu")
    assert "verified" in typed("export run -o model.safetensors --verify")
