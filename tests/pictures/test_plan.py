"""The picture: valid SVG, complete, the same every time, and nothing of it outside the page."""

from __future__ import annotations

import functools
import re
from xml.etree import ElementTree

import pytest

from localize import build
from localize.ir import CutSpec
from localize.pictures import plan as draw
from localize.recipes import Recipe

SVG = "{http://www.w3.org/2000/svg}"


@functools.cache
def picture(method: str, model: str = "cifar/resnet20", cut: CutSpec | None = None, **options: object) -> str:
    return draw.graph_svg(build.build(Recipe(method, options, model=model, cut=cut or CutSpec())))


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


@pytest.fixture(scope="module")
def auglocal() -> str:
    return picture("auglocal", d=3)


def test_segments_heads_losses_and_shapes_are_named(auglocal: str) -> None:
    found = texts(auglocal)
    for name in ["cifar/resnet20 by auglocal", "segment_0", "segment_7", "head_0", "head_6", "loss_0", "loss_7"]:
        assert name in found
    assert found.count("16×32×32") >= 4
    assert "72,906 parameters" in found
    assert "sampled 4, 9" in found
    assert "head_7" not in found


def test_every_cut_is_a_dashed_line_of_its_own_colour(auglocal: str) -> None:
    lines = [p for p in ElementTree.fromstring(auglocal).iter(f"{SVG}path") if p.get("stroke") == draw.CUT]
    assert len(lines) == 7 + 1  # and the one in the legend
    assert all(line.get("stroke-dasharray") for line in lines)
    others = {p.get("stroke") for p in ElementTree.fromstring(auglocal).iter(f"{SVG}path")} - {draw.CUT}
    assert draw.HEAD in others


def test_the_same_plan_gives_the_same_bytes(auglocal: str) -> None:
    assert picture.__wrapped__("auglocal", d=3) == auglocal


def test_a_shared_block_is_one_bar_linked_to_every_head_that_reads_it() -> None:
    trained, static = picture("dcl"), picture("dcl", dictionary="static")
    assert texts(trained).count("dictionary") == 1
    assert "shared block" in texts(trained)
    assert "shared block" not in texts(picture("mlaan"))
    assert trained.count('marker-end="url(#shared)"') == static.count('marker-end="url(#shared)"') == 9
    dashed = re.compile(r'stroke="#2d8659" stroke-width="1.6" stroke-dasharray="3 3" marker-end')
    assert (len(dashed.findall(trained)), len(dashed.findall(static))) == (0, 9)
    assert "dictionary_8" in texts(picture("dcl", dictionary="layerwise"))


def test_backprop_is_one_column_without_cut_or_head() -> None:
    found = texts(picture("backprop"))
    assert "1 segment, 1 loss; 272,474 parameters in the model, 0 in heads and shared blocks" in found
    assert "layer1" in found
    assert "conv1" in found


@pytest.mark.parametrize("model", ["cifar/resnet20", "cifar/resnet56", "cifar/mixer"])
def test_nothing_is_drawn_outside_the_page(model: str) -> None:
    root = ElementTree.fromstring(picture("dcl", model))
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    for rect in root.iter(f"{SVG}rect"):
        if rect.get("x"):
            x, y, w, h = (float(rect.get(key, 0)) for key in ("x", "y", "width", "height"))
            assert 0 <= x <= x + w <= width
            assert 0 <= y <= y + h <= height
    for text in root.iter(f"{SVG}text"):
        assert 0 <= float(text.get("x", 0)) <= width
        assert 0 <= float(text.get("y", 0)) <= height


def test_many_segments_wrap_into_rows() -> None:
    root = ElementTree.fromstring(picture("dcl", "cifar/resnet56"))
    names = [text for text in root.iter(f"{SVG}text") if re.fullmatch(r"segment_\d+", text.text or "")]
    assert len(names) == 28
    assert len({text.get("y") for text in names}) == 3
    assert len({text.get("x") for text in names}) == 10


def test_a_segment_of_many_operations_is_drawn_by_its_modules() -> None:
    found = texts(picture("dcl", "cifar/resnet20", CutSpec(at=("layer3.1",))))
    assert {"layer1", "layer2", "layer3.0", "layer3.1"} & set(found)
    assert sum(1 for text in found if text == "bn1") <= 1


def test_the_middle_of_too_many_boxes_is_folded_and_its_values_are_kept() -> None:
    boxes = [draw._Box(str(i), "", False, (i - 1,)) for i in range(19)] + [draw._Box("sum", "", False, (-1, 3, 9, 18))]
    folded = draw._folded(boxes)
    assert [box.label for box in folded] == ["0", "1", "2", "3", "… 12 more", "16", "17", "18", "sum"]
    assert [box.reads for box in folded] == [(-1,), (0,), (1,), (2,), (3,), (4,), (5,), (6,), (-1, 3, 4, 7)]
    assert draw._folded(boxes[:9]) == boxes[:9]


def test_names_are_escaped() -> None:
    canvas = draw.Canvas()
    canvas.text(0, 0, 'a<b>&"c')
    assert ElementTree.fromstring(canvas.svg(10, 10)).find(f"{SVG}text").text == 'a<b>&"c'  # type: ignore[union-attr]


def test_every_head_of_a_window_leads_to_its_loss() -> None:
    root = ElementTree.fromstring(picture("mlaan", cut=CutSpec(5)))
    paths = [[float(v) for v in re.findall(r"[\d.]+", p.get("d", ""))] for p in root.iter(f"{SVG}path")]
    texts = {text.text: (float(text.get("x", 0)), float(text.get("y", 0))) for text in root.iter(f"{SVG}text")}
    rects = [[float(r.get(k, 0)) for k in ("x", "y", "width", "height")] for r in root.iter(f"{SVG}rect") if r.get("x")]

    def around(name: str) -> list[float]:
        x, y = texts[name]
        inside = [r for r in rects if r[0] <= x <= r[0] + r[2] and r[1] <= y <= r[1] + r[3]]
        return min(inside, key=lambda r: r[2] * r[3])

    def leads(start: list[float], stop: list[float]) -> bool:
        """Whether a path begins at the edge of one rectangle and ends at that of another."""
        for path in paths:
            ends = len(path) == 5  # M x y H a V b
            x, y = (path[2], path[3] + 1) if len(path) == 4 else (path[4], path[3]) if ends else (-1.0, -1.0)
            begins = (
                start[0] - 1 <= path[0] <= start[0] + start[2] + 1 and start[1] - 1 <= path[1] <= start[1] + start[3]
            )
            if begins and stop[0] - 3 <= x <= stop[0] + stop[2] + 3 and stop[1] - 3 <= y <= stop[1] + stop[3] + 3:
                return True
        return False

    bars = {
        "loss_0": "loss_0: segments 0 to 2",
        "loss_1": "loss_1: segments 1 to 3",
        "loss_3": "loss_3: segments 2 to 4",
    }
    assert set(bars.values()) <= set(texts)
    for head, loss in (("head_0", "loss_0"), ("head_1", "loss_1"), ("head_2", "loss_3")):
        assert leads(around(head), around(bars[loss])), head
        others = [bar for name, bar in bars.items() if name != loss]
        assert not any(leads(around(head), around(bar)) for bar in others)
    for head, loss in (("cascade_2", "loss_0"), ("cascade_3", "loss_1"), ("head_3", "loss_2")):
        assert leads(around(head), around(loss)), head
    assert not leads(around("head_2"), around("loss_0"))
    assert "segments that one loss trains" in texts
    assert "segments that one loss trains" not in "".join(picture("dcl"))


def test_windows_lie_inside_of_the_page() -> None:
    root = ElementTree.fromstring(picture("mlaan", cut=CutSpec(5)))
    look = (draw.LOSS, draw.PAPER)
    bars = [rect for rect in root.iter(f"{SVG}rect") if (rect.get("stroke"), rect.get("fill")) == look]
    assert len(bars) == 3 + 1  # and the one in the legend
    assert all(float(r.get("x", 0)) + float(r.get("width", 0)) <= float(root.get("width", 0)) for r in bars)
    assert all(float(r.get("y", 0)) + float(r.get("height", 0)) <= float(root.get("height", 0)) for r in bars)
