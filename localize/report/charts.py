"""The pictures of the page: lines over epochs or depth, and the strip that says which loss trains which segment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from localize.ir import LocalLoss, Plan
from localize.pictures.svg import FAINT, HEAD, INK, MUTED, PAPER, SHARED, TRUNK, TRUNK_FILL, Canvas, tick, written

WIDTH, HEIGHT = 536.0, 330.0
LEFT, RIGHT, BOTTOM = 56.0, 12.0, 44.0
MOST_NAMES = 12
"""Number of lines that a legend names one by one; for more, it shows a scale of colours."""

DEPTHS = 16
"""Colours from the first loss to the deepest."""


def _blend(stops: Sequence[str]) -> tuple[str, ...]:
    """Return ``DEPTHS`` colours from the first of ``stops`` to the last."""
    rgb = [[int(stop[i : i + 2], 16) for i in (1, 3, 5)] for stop in stops]
    found = []
    for index in range(DEPTHS):
        place = index / (DEPTHS - 1) * (len(rgb) - 1)
        low = min(int(place), len(rgb) - 2)
        mixed = (a + (b - a) * (place - low) for a, b in zip(rgb[low], rgb[low + 1], strict=True))
        found.append("#" + "".join(f"{round(value):02x}" for value in mixed))
    return tuple(found)


RAMP = _blend(("#10248f", "#6a1fb0", "#b52a82", "#e0552f"))
DARK_RAMP = dict(zip(RAMP, _blend(("#7a5cd6", "#c45cc0", "#f0707a", "#f5d560")), strict=True))
"""What a dark page shows instead of each colour of ``RAMP``.

The lightness of both rises, so that the order is seen without telling hues apart; the contrast with the page is 3 or
more.
"""


@dataclass(frozen=True)
class Line:
    """A line of a chart; ``points`` are (x, y) from left to right."""

    name: str
    points: tuple[tuple[float, float], ...]
    colour: str = INK
    width: float = 1.4
    dash: str = ""
    """Lengths of dashes and gaps; empty for a solid line."""
    dots: bool = False
    band: tuple[tuple[float, float, float], ...] = ()
    """(x, lowest, highest) from left to right: the range of what the line is a mean of."""


DASHES = ("", "7 3", "2 2.5", "8 3 2 3")
"""Of lines that stand for runs: beside their colours, so that print and the colour-blind keep them apart."""


@dataclass(frozen=True)
class _Scale:
    """Where a value stands on an axis, and the marks of the axis with their texts."""

    low: float
    high: float
    marks: tuple[tuple[float, str], ...]
    logarithmic: bool = False

    def share(self, value: float) -> float:
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def depth_colour(index: int, count: int) -> str:
    """Return the colour of loss ``index`` of ``count``."""
    return RAMP[round(index / max(count - 1, 1) * (DEPTHS - 1))]


def line_chart(
    lines: Sequence[Line], *, title: str, across: str, upward: str, label: str, share: bool = False, scale: str = ""
) -> str:
    """Return lines over whole numbers as SVG text.

    Args:
        lines: painted in this order, none empty.
        title: above the picture.
        across: what the horizontal axis counts.
        upward: what the vertical axis measures.
        label: says in words what the picture shows.
        share: the values are shares (0..1), shown in percent. Otherwise the axis is logarithmic if all of them are
            above 0 and the largest is more than 30 times the smallest.
        scale: what the colours of the lines stand for, where there are too many to name; the last one is still named.
    """
    canvas = Canvas()
    values = [y for line in lines for _, y in line.points]
    values += [y for line in lines for _, *ends in line.band for y in ends]
    upright = _percents(values) if share else _powers(values) if _spread(values) > 30 else _round_numbers(values)
    level = _whole_numbers([x for line in lines for x, _ in line.points])
    canvas.text(LEFT, 22, title, size=14, bold=True)
    top = _legend(canvas, lines, scale) + 34

    def place(x: float, y: float) -> tuple[float, float]:
        wide, high = WIDTH - LEFT - RIGHT, HEIGHT - top - BOTTOM
        return LEFT + wide * level.share(x), top + high * (1 - upright.share(y))

    for value, told in upright.marks:
        _, y = place(level.low, value)
        canvas.path(f"M{written(LEFT)} {y:.1f} H{written(WIDTH - RIGHT)}", stroke=FAINT, width=0.8)
        canvas.text(LEFT - 8, y + 4, told, size=11, fill=MUTED, anchor="end")
    for value, told in level.marks:
        x, y = place(value, upright.low)
        canvas.path(f"M{x:.1f} {y:.1f} v5", stroke=MUTED, width=0.8)
        canvas.text(x, y + 19, told, size=11, fill=MUTED, anchor="middle")
    canvas.text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, across, size=11.5, fill=MUTED, anchor="middle")
    canvas.text(LEFT, top - 11, upward + (", logarithmic" if upright.logarithmic else ""), size=11.5, fill=MUTED)
    for line in lines:
        if line.band:
            edge = [place(x, high) for x, _, high in line.band] + [place(x, low) for x, low, _ in reversed(line.band)]
            canvas.area("M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in edge) + " z", fill=line.colour, opacity=0.18)
    for line in lines:
        _draw(canvas, line, [place(x, y) for x, y in line.points])
    return canvas.svg(WIDTH, HEIGHT, label=label)


def _draw(canvas: Canvas, line: Line, points: Sequence[tuple[float, float]]) -> None:
    style = {"stroke_dasharray": line.dash} if line.dash else {}
    d = "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    if len(points) > 1:
        canvas.path(d, stroke=line.colour, width=line.width, stroke_linejoin="round", hint=line.name, **style)
    if line.dots or len(points) == 1:
        for x, y in points:
            canvas.circle(round(x, 1), round(y, 1), line.width + 1.6, fill=line.colour, hint=line.name)


def _legend(canvas: Canvas, lines: Sequence[Line], scale: str) -> float:
    """Name the lines below the title, or show a scale of their colours; return where the legend ends."""
    named = list(lines) if len(lines) <= MOST_NAMES or not scale else [lines[-1]]
    x, y = LEFT, 42.0
    if len(named) < len(lines):
        for colour in RAMP:
            canvas.rect(x, y - 9, 8, 9, radius=0, fill=colour)
            x += 8
        canvas.text(x + 7, y, scale, size=11.5)
        x += 7 + 6.2 * len(scale) + 22
    for line in named:
        wide = 24 + 6.2 * len(line.name) + 16
        if x + wide > WIDTH - RIGHT and x > LEFT:
            x, y = LEFT, y + 17
        style = {"stroke_dasharray": line.dash} if line.dash else {}
        canvas.path(f"M{written(x)} {written(y - 4)} h18", stroke=line.colour, width=max(line.width, 2.0), **style)
        canvas.text(x + 24, y, line.name, size=11.5, room=WIDTH - RIGHT - x - 24)
        x += wide
    return y


def _spread(values: Sequence[float]) -> float:
    return max(values) / min(values) if min(values) > 0 else 1.0


def _percents(values: Sequence[float]) -> _Scale:
    step = tick(max(max(values) - min(values), 0.02) / 5)
    low = max(math.floor(min(values) / step), 0)
    high = max(math.ceil(max(values) / step - 1e-9), low + 1)
    marks = tuple((i * step, f"{100 * i * step:.3g} %") for i in range(low, high + 1))
    return _Scale(low * step, high * step, marks)


def _round_numbers(values: Sequence[float]) -> _Scale:
    step = tick(max(max(max(values), 0.0) - min(min(values), 0.0), 1e-9) / 5)
    low, high = math.floor(min(min(values), 0.0) / step), max(math.ceil(max(values) / step), 1)
    return _Scale(low * step, high * step, tuple((i * step, f"{i * step:.3g}") for i in range(low, high + 1)))


def _powers(values: Sequence[float]) -> _Scale:
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    every = math.ceil((high - low) / 6)
    marks = tuple((10.0**power, f"{10.0**power:g}") for power in range(low, high + 1, every))
    return _Scale(10.0**low, 10.0**high, marks, logarithmic=True)


def _whole_numbers(values: Sequence[float]) -> _Scale:
    low, high = round(min(values)), round(max(values))
    if low == high:
        return _Scale(low - 1, high + 1, ((low, str(low)),))
    step = max(1, round(tick((high - low) / 10)))
    inner = range(math.ceil(low / step) * step, high + 1, step)
    numbers = inner if inner[0] - low < step / 2 else [low, *inner]
    return _Scale(low, high, tuple((n, str(n)) for n in numbers))


# ------------------------------------------------------------------------------------------------------- ownership

STRIP = 1092.0
SIDE, LANE, BOX = 8.0, 30.0, 26.0


def strip(plan: Plan) -> str:
    """Return which loss trains which segment, as SVG text: segments side by side, and below them a bar for each loss.

    A bar covers the segments that its loss trains, and ends in a square where the loss trains a head. The bar of a loss
    that trains none is empty. Other blocks that losses train, such as those that they share, are bars below.
    """
    canvas = Canvas()
    segments = plan.segments.segments
    wide = (STRIP - 2 * SIDE) / len(segments)
    canvas.text(SIDE, 22, "Which loss trains which segment", size=14, bold=True)
    canvas.text(SIDE, 41, "segments, from the images to the output", size=11.5, fill=MUTED)
    for segment in segments:
        x = SIDE + segment.index * wide
        hint = f"{segment.name}, to {segment.ends_at}: {segment.size:,} parameters"
        style = {"stroke_dasharray": "3 3"} if segment.name in plan.frozen else {}
        canvas.rect(x + 1, 50, wide - 2, BOX, radius=3, fill=TRUNK_FILL, stroke=TRUNK, hint=hint, **style)
        if wide >= 15 or segment.index % 5 == 0:
            canvas.text(x + wide / 2, 50 + BOX / 2 + 4, str(segment.index), size=10.5, anchor="middle")
    canvas.text(SIDE, 50 + BOX + 22, "losses", size=11.5, fill=MUTED)
    top = 50 + BOX + 30
    spans = [_span(plan, loss) for loss in plan.losses]
    lanes = _lanes(spans)
    for index, (loss, (first, last), lane) in enumerate(zip(plan.losses, spans, lanes, strict=True)):
        colour = depth_colour(index, len(plan.losses))
        _draw_bar(canvas, plan, loss, SIDE + first * wide, (last - first + 1) * wide, top + lane * LANE, colour)
    y = top + (max(lanes) + 1) * LANE
    shared = [(block, _readers(plan, block.name)) for block in plan.blocks if block.role not in ("segment", "head")]
    shared = [(block, readers) for block, readers in shared if readers]
    for (block, readers), lane in zip(shared, _lanes([(r[0], r[-1]) for _, r in shared]), strict=True):
        x, across = SIDE + readers[0] * wide, (readers[-1] - readers[0] + 1) * wide
        hint = f"{block.name}: {block.size:,} parameters"
        canvas.rect(x + 1, y + lane * LANE, across - 2, 10, radius=3, fill=SHARED, hint=hint)
        if across > 6.2 * len(block.name):
            canvas.text(x + 3, y + lane * LANE + 21, block.name, size=10, fill=MUTED)
        top = y + (lane + 1) * LANE
    end = max(y, top)
    marks = [("trains segments", RAMP[0]), ("trains a head", HEAD), *([("shared", SHARED)] if shared else [])]
    x = SIDE
    for told, colour in marks:
        canvas.rect(x, end + 2, 12, 10, radius=2, fill=colour)
        canvas.text(x + 18, end + 11, told, size=11, fill=MUTED)
        x += 18 + 6.2 * len(told) + 18
    told = "; ".join(f"{loss.name}: segments {a} to {b}" for loss, (a, b) in zip(plan.losses, spans, strict=True))
    return canvas.svg(STRIP, end + 28, label=f"Which loss trains which segment. {told}.")


def _draw_bar(canvas: Canvas, plan: Plan, loss: LocalLoss, x: float, wide: float, y: float, colour: str) -> None:
    heads = [name for name in loss.reach if plan.block(name).role == "head"]
    hint = f"{loss.name} trains {', '.join(loss.reach) or 'nothing'}"
    trains = any(plan.block(name).role == "segment" for name in loss.reach)
    style = {"fill": colour} if trains else {"fill": "none", "stroke": colour, "stroke_dasharray": "3 3"}
    canvas.rect(x + 1, y, wide - 2, 10, radius=3, hint=hint, **style)
    if heads:
        canvas.rect(x + wide - min(wide / 2, 12) - 1, y, min(wide / 2, 12), 10, radius=2, fill=HEAD, stroke=PAPER)
    if wide > 6.2 * len(loss.name):
        canvas.text(x + 3, y + 21, loss.name, size=10, fill=MUTED)


def _span(plan: Plan, loss: LocalLoss) -> tuple[int, int]:
    """Return the first and the last segment that a loss trains; where it trains none, the one that it reads."""
    trained = [segment.index for segment in plan.segments.segments if segment.name in loss.reach]
    return (trained[0], trained[-1]) if trained else (loss.route.stop, loss.route.stop)


def _readers(plan: Plan, block: str) -> list[int]:
    """Return the segments at whose end losses train a block, in order."""
    return sorted({loss.route.stop for loss in plan.losses if block in loss.reach})


def _lanes(spans: Sequence[tuple[int, int]]) -> list[int]:
    """Return for every span the first line in which it does not lie over an earlier one."""
    taken: list[list[tuple[int, int]]] = []
    found = []
    for first, last in spans:
        free = (i for i, lane in enumerate(taken) if all(last < a or b < first for a, b in lane))
        lane = next(free, len(taken))
        taken[lane : lane + 1] = [[*(taken[lane] if lane < len(taken) else []), (first, last)]]
        found.append(lane)
    return found
