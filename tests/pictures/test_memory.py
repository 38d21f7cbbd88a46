"""The picture of memory over a step: every curve is there, at its height, and inside of the page."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from localize.cli.app import app
from localize.estimate.memory import Footprint
from localize.pictures import memory as draw_memory
from localize.pictures.memory import BOTTOM, HEIGHT, TOP, memory_svg

SVG = "{http://www.w3.org/2000/svg}"
HILL = Footprint(10, 100, 80, 50, ((0, 10), (20, 100), (50, 12)))
TOOTH = Footprint(20, 40, 20, 60, ((10, 40), (20, 20), (40, 40), (60, 20)))


def curves(svg: str) -> list[list[tuple[float, float]]]:
    found = []
    for path in ElementTree.fromstring(svg).iter(f"{SVG}path"):
        if path.get("stroke") in draw_memory.COLOURS and "L" in path.get("d", ""):
            pairs = re.findall(r"([\d.]+) ([\d.]+)", path.get("d", ""))
            found.append([(float(x), float(y)) for x, y in pairs])
    return found


def test_peaks_are_at_their_heights() -> None:
    hill, tooth = curves(memory_svg({"backprop": HILL, "local": TOOTH}, "a net"))
    high = HEIGHT - TOP - BOTTOM

    assert min(y for _, y in hill) == pytest.approx(TOP, abs=0.1)
    assert HEIGHT - BOTTOM - min(y for _, y in tooth) == pytest.approx(0.4 * high, abs=0.1)
    assert max(x for x, _ in tooth) > max(x for x, _ in hill)
    assert [x for x, _ in tooth] == sorted(x for x, _ in tooth)


def test_names_and_shares_are_written() -> None:
    svg = memory_svg({"backprop": HILL, "local <1>": TOOTH}, "a net")
    found = [element.text for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]

    assert {"a net", "backprop: 100.0%, 1.00 x", "local <1>: 40.0%, 1.20 x"} <= set(found)


def test_the_command_draws_beside_backprop_and_checkpointing(tmp_path: Path) -> None:
    output = tmp_path / "memory.svg"
    arguments = ["draw", "cifar/vgg8b", "-m", "dcl", "--memory", "-b", "16", "-o", str(output)]

    found = CliRunner().invoke(app, arguments)

    assert found.exit_code == 0, found.output
    assert len(curves(output.read_text())) == 3
    for curve in curves(output.read_text()):
        assert all(0 <= y <= HEIGHT for _, y in curve)
