"""Draw a plan: one column per segment, the cuts between them, the heads and losses below, what is shared as a bar.

The picture is plain SVG text, made of the plan alone: the same plan gives the same bytes. It has no script, no
external font and no image. Many segments wrap into rows; a segment of many operations is drawn by its modules.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from localize.ir import Block, Cut, LocalLoss, Plan, Segment, facts
from localize.pictures.svg import (
    CUT,
    FAINT,
    HEAD,
    HEAD_FILL,
    LOSS,
    MUTED,
    PAPER,
    PLAIN_FILL,
    REACH,
    SHARED,
    SHARED_FILL,
    TRUNK,
    TRUNK_FILL,
    Canvas,
    fitted,
    written,
)
from localize.torch_names import CONVOLUTIONS

MOST_COLUMNS = 10
MOST_BOXES = 9

BOX, BOX_HEIGHT, BOX_GAP = 142, 24, 9
PAD_LEFT, PAD_RIGHT, GUTTER = 13, 25, 66
COLUMN = PAD_LEFT + BOX + PAD_RIGHT
HEADER = 62
MARGIN = 34
LINE = 13
LOSS_WIDTH, LOSS_HEIGHT = 104, 38
BAR_HEIGHT, BAR_GAP = 26, 8

SYMBOLS = {"add": "+", "iadd": "+", "mul": "×", "imul": "×", "getitem": "[ ]", "cat": "concat"}


def graph_svg(local: Any) -> str:
    """Return the picture of a :class:`localize.LocalModel` as SVG text."""
    return draw(local.plan)


def draw(plan: Plan) -> str:
    """Return the picture of a plan as SVG text."""
    columns = [_column(segment, plan) for segment in plan.segments.segments]
    lines = math.ceil(len(columns) / MOST_COLUMNS)
    per_line = math.ceil(len(columns) / lines)
    rows = [columns[start : start + per_line] for start in range(0, len(columns), per_line)]
    canvas = Canvas()
    width = max(2 * MARGIN + per_line * (COLUMN + GUTTER) - (GUTTER if lines == 1 else 0), 960)
    y = _title(canvas, plan, width)
    for row in rows:
        y = _draw_row(canvas, plan, row, y)
    return canvas.svg(width, y + MARGIN - 18)


# ----------------------------------------------------------------------------------------------------- what is drawn


@dataclass(frozen=True)
class _Box:
    """One or several operations of a segment, with the boxes (or -1: the segment's input) that they read."""

    label: str
    detail: str
    weighted: bool
    reads: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Column:
    """A segment, what trains it, and the cut after it."""

    segment: Segment
    boxes: tuple[_Box, ...]
    losses: tuple[LocalLoss, ...]
    heads: tuple[Block, ...]
    cut: Cut | None
    stopped: bool
    """The gradient of some loss stops at the cut: a loss starts after it."""
    schedule: str
    """How the segment spends memory and arithmetic; nothing where it runs as usual."""


def _column(segment: Segment, plan: Plan) -> _Column:
    losses = tuple(loss for loss in plan.losses if loss.route.stop == segment.index)
    heads = dict.fromkeys(
        term.head
        for loss in plan.losses
        for term in loss.terms
        if term.head is not None and (loss.route.stop if term.at is None else term.at) == segment.index
    )
    cuts = plan.segments.layout.cuts
    cut = cuts[segment.index] if segment.index < len(cuts) else None
    boxes = tuple(_boxes(segment.graph, plan.segments.trunk.twin))
    stopped = any(loss.route.start == segment.index + 1 for loss in plan.losses)
    told = plan.schedule_of(segment)
    return _Column(segment, boxes, losses, tuple(plan.block(head) for head in heads), cut, stopped, told)


def _boxes(graph: fx.Graph, root: nn.Module) -> list[_Box]:
    """Group the operations of a graph: each by itself, or by the modules that they belong to, or with some left out."""
    nodes = [node for node in graph.nodes if _is_drawn(node, root)]
    if not nodes:
        return []
    scopes = [_scope(node) for node in nodes]
    shared = 0
    while all(len(scope) > shared and scope[shared] == scopes[0][shared] for scope in scopes):
        shared += 1
    deepest = max(len(scope) for scope in scopes)
    for depth in range(deepest + 1, shared, -1):
        groups = _grouped(nodes, depth)
        if len(groups) <= MOST_BOXES:
            break
    names = [scope[0] for scope in scopes[0][:shared]]
    prefix = f"{names[-1]}." if names else ""
    boxes = [_box(group, depth, prefix, root) for group in groups]
    owner = {node: index for index, group in enumerate(groups) for node in group}
    boxes = [
        replace(box, reads=tuple(sorted(_sources(group, owner, index))))
        for index, (box, group) in enumerate(zip(boxes, groups, strict=True))
    ]
    return _folded(boxes)


def _is_drawn(node: fx.Node, root: nn.Module) -> bool:
    """Leave out what computes sizes, and modules that do nothing."""
    if node.op not in ("call_module", "call_function", "call_method") or not facts(node).depends:
        return False
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        return not (isinstance(module, nn.Identity) or (isinstance(module, nn.Sequential) and len(module) == 0))
    return True


def _scope(node: fx.Node) -> tuple[tuple[str, str], ...]:
    """Return names and classes of the modules around a node, without the model itself."""
    return tuple(facts(node).scope)


def _grouped(nodes: Sequence[fx.Node], depth: int) -> list[list[fx.Node]]:
    """Put neighbours together that lie in the same module at ``depth``."""
    groups: list[list[fx.Node]] = []
    last: Any = None
    for node in nodes:
        scope = _scope(node)
        key: Any = scope[:depth] if len(scope) >= depth else node
        if groups and key == last:
            groups[-1].append(node)
        else:
            groups.append([node])
        last = key
    return groups


def _label(name: str, prefix: str) -> str:
    """Return a module's name without what all names of its segment begin with; a bare number says too little."""
    short = name.removeprefix(prefix)
    return name if short.isdigit() else short


def _box(group: Sequence[fx.Node], depth: int, prefix: str, root: nn.Module) -> _Box:
    weighted = any(_has_parameters(node, root) for node in group)
    if len(group) > 1:
        name, kind = _scope(group[0])[depth - 1]
        return _Box(_label(name, prefix), kind.lstrip("_"), weighted)
    node = group[0]
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        return _Box(_label(str(node.target), prefix), _module_detail(module), weighted)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    label = SYMBOLS.get(name.strip("_"), name)
    shape = facts(node).shape
    return _Box(label, _sizes(shape) if shape else "", weighted)


def _has_parameters(node: fx.Node, root: nn.Module) -> bool:
    if node.op != "call_module":
        return False
    return any(True for _ in root.get_submodule(str(node.target)).parameters())


def _module_detail(module: nn.Module) -> str:
    if isinstance(module, CONVOLUTIONS):
        size = "×".join(str(k) for k in module.kernel_size)
        stride = f" /{module.stride[0]}" if module.stride[0] != 1 else ""
        return f"{size}, {module.in_channels}→{module.out_channels}{stride}"
    if isinstance(module, nn.Linear):
        return f"{module.in_features}→{module.out_features}"
    return type(module).__name__


def _sources(group: Sequence[fx.Node], owner: Mapping[fx.Node, int], own: int) -> set[int]:
    """Return the boxes that a group reads, looking through what is not drawn; -1 is the segment's input."""
    found: set[int] = set()
    pending = [source for node in group for source in node.all_input_nodes]
    while pending:
        node = pending.pop()
        if node in owner:
            found.add(owner[node])
        elif node.op == "placeholder":
            found.add(-1)
        else:
            pending += node.all_input_nodes
    return {index for index in found if index < own}


def _folded(boxes: list[_Box]) -> list[_Box]:
    """Replace the middle of too many boxes by one that says how many it stands for."""
    hidden = len(boxes) - MOST_BOXES + 1
    if hidden <= 1:
        return boxes
    first = (MOST_BOXES - 1) // 2

    def place(index: int) -> int:
        return index if index < first else max(first, index - hidden + 1)

    middle = _Box(f"… {hidden} more", "", any(box.weighted for box in boxes[first : first + hidden]), (first - 1,))
    kept = [*boxes[:first], middle, *boxes[first + hidden :]]
    return [
        replace(box, reads=tuple(sorted({place(read) for read in box.reads} - {index})))
        for index, box in enumerate(kept)
    ]


# ---------------------------------------------------------------------------------------------------------- drawing


def _sizes(shape: Iterable[int]) -> str:
    return "×".join(str(size) for size in shape)


def _title(canvas: Canvas, plan: Plan, width: float) -> float:
    trunk = sum(block.size for block in plan.blocks if block.role in ("segment", "tied", "side"))
    extra = sum(block.size for block in plan.blocks) - trunk
    canvas.text(MARGIN, 42, f"{plan.segments.trunk.name} by {plan.method}", size=20, bold=True)
    counts = (
        f"{_counted(len(plan.segments), 'segment')}, {_counted(len(plan.losses), 'loss', 'losses')}; "
        f"{trunk:,} parameters in the model, {extra:,} in heads and shared blocks"
    )
    canvas.text(MARGIN, 63, counts, size=12, fill=MUTED)
    options = ", ".join(f"{name}={value}" for name, value in plan.options.items() if value != "")
    canvas.text(MARGIN, 81, options, size=11, fill=MUTED, room=width - 2 * MARGIN)
    starts = {loss.route.start for loss in plan.losses}
    shared = any(block.role not in ("segment", "head") for block in plan.blocks)
    marks = [
        ("trunk", "layer with parameters"),
        ("plain", "operation"),
        ("cut", "cut: values are detached here"),
        ("head", "head"),
        *([("shared", "shared block"), ("unshared", "read, not trained")] if shared else []),
        ("loss", "loss"),
        *([("window", "segments that one loss trains")] if any(map(_is_window, plan.losses)) else []),
        *([("passed", "cut where no loss begins")] if len(starts | {0}) < len(plan.segments) else []),
    ]
    x = float(MARGIN)
    y = 98
    for kind, text in marks:
        wide = 28 + 6.1 * len(text) + 18
        if x + wide > width - MARGIN:
            x, y = float(MARGIN), y + 22
        _legend_mark(canvas, kind, x, y)
        canvas.text(x + 28, y + 10.5, text, size=11, fill=MUTED)
        x += wide
    return y + 34


def _legend_mark(canvas: Canvas, kind: str, x: float, y: float) -> None:
    boxes = {"trunk": (TRUNK_FILL, TRUNK), "plain": (PLAIN_FILL, FAINT), "head": (HEAD_FILL, HEAD)}
    boxes |= {"shared": (SHARED_FILL, SHARED), "loss": (LOSS, LOSS), "window": (PAPER, LOSS)}
    if kind in boxes:
        fill, stroke = boxes[kind]
        canvas.rect(x, y, 22, 13, radius=6 if kind == "loss" else 3, fill=fill, stroke=stroke)
    elif kind in ("cut", "passed"):
        colour = CUT if kind == "cut" else FAINT
        canvas.path(f"M{written(x + 11)} {y - 3} V{y + 17}", stroke=colour, width=2.2, stroke_dasharray="5 4")
    else:
        canvas.path(f"M{written(x)} {written(y + 6.5)} h22", stroke=SHARED, width=1.6, stroke_dasharray="3 3")


def _counted(n: int, one: str, many: str = "") -> str:
    return f"{n} {one if n == 1 else many or one + 's'}"


def _draw_row(canvas: Canvas, plan: Plan, row: Sequence[_Column], top: float) -> float:
    """Draw segments side by side with all that hangs below them; return where the next row starts."""
    boxes = max(max(len(column.boxes) for column in row), 1)
    bottom = top + HEADER + boxes * (BOX_HEIGHT + BOX_GAP) + 20
    head_heights = [sum(_head_height(head) + 8 for head in column.heads) for column in row]
    loss_top = bottom + 22 + max(head_heights) + (10 if any(head_heights) else 0)
    end = loss_top + max(len(column.losses) for column in row) * (LOSS_HEIGHT + 6) + 12
    places = [float(MARGIN + place * (COLUMN + GUTTER)) for place in range(len(row))]
    for x in places:
        canvas.rect(x, top, COLUMN, end - top, radius=10, fill=REACH, stroke=FAINT, stroke_width=1)
    for place, (x, column) in enumerate(zip(places, row, strict=True)):
        if column.schedule:
            canvas.text(x + PAD_LEFT, top - 6, column.schedule, size=9.5, fill=MUTED, room=COLUMN + GUTTER / 2)
        if place == 0 and column.segment.index > 0:
            _draw_stub(canvas, x, top)
        _draw_segment(canvas, column, x, top)
        if column.cut is not None:
            _draw_cut(canvas, column, x, top, end, follows=place + 1 < len(row))
        _draw_heads(canvas, column, x, top, bottom, loss_top)
    end = _draw_windows(canvas, plan, row, bottom + 22, loss_top, end)
    return _draw_shared(canvas, plan, row, bottom + 22, end) + 30


def _draw_stub(canvas: Canvas, x: float, top: float) -> None:
    """Show that a row goes on where the one above ended."""
    y = top + HEADER - 12
    canvas.path(f"M{written(x - 20)} {written(y)} H{written(x + PAD_LEFT + BOX / 2 - 6)}", stroke=TRUNK)
    line = f"M{written(x - 9)} {written(top)} V{written(top + HEADER)}"
    canvas.path(line, stroke=CUT, width=2, stroke_dasharray="6 5")
    _draw_entry(canvas, x, y)


def _draw_entry(canvas: Canvas, x: float, y: float) -> None:
    middle = x + PAD_LEFT + BOX / 2
    corner = f"M{written(middle - 6)} {written(y)} q6 0 6 6 V{written(y + 12)}"
    canvas.path(corner, stroke=TRUNK, arrow="flow")


def _draw_segment(canvas: Canvas, column: _Column, x: float, top: float) -> None:
    segment = column.segment
    canvas.text(x + PAD_LEFT, top + 18, segment.name, size=12, bold=True)
    canvas.text(x + PAD_LEFT, top + 32, f"to {segment.ends_at}", size=10.5, fill=MUTED, room=COLUMN - 2 * PAD_LEFT)
    canvas.text(x + PAD_LEFT, top + 45, f"{segment.size:,} parameters", size=10.5, fill=MUTED)
    if segment.index == 0:
        middle = x + PAD_LEFT + BOX / 2
        canvas.path(f"M{written(middle)} {written(top + HEADER - 12)} v12", stroke=TRUNK, arrow="flow")
    left = x + PAD_LEFT
    for index, box in enumerate(column.boxes):
        y = top + HEADER + index * (BOX_HEIGHT + BOX_GAP)
        fill, stroke = (TRUNK_FILL, TRUNK) if box.weighted else (PLAIN_FILL, FAINT)
        canvas.rect(left, y, BOX, BOX_HEIGHT, fill=fill, stroke=stroke)
        label = fitted(box.label, 11, BOX - 14)
        room = BOX - 27 - 7 * len(label)
        canvas.text(left + 8, y + 16, label, size=11)
        if room > min(5.9 * len(box.detail), 40):
            canvas.text(left + BOX - 7, y + 15.5, box.detail, size=9.5, fill=MUTED, anchor="end", room=room)
        for read in box.reads:
            _draw_edge(canvas, left, top, read, index)


def _draw_edge(canvas: Canvas, left: float, top: float, read: int, index: int) -> None:
    """Draw a value from one box to another: straight to the next, around the boxes between to any other."""
    step = BOX_HEIGHT + BOX_GAP
    y = top + HEADER + index * step
    if read == index - 1:
        if read >= 0:
            down = f"M{written(left + BOX / 2)} {written(y - BOX_GAP)} v{BOX_GAP - 1}"
            canvas.path(down, stroke=TRUNK, arrow="flow")
        return
    start = top + HEADER - 6 if read < 0 else top + HEADER + read * step + BOX_HEIGHT + BOX_GAP / 2 - 1
    begin = left + BOX / 2
    side = left + BOX + min(16, 7 + 1.6 * (index - read))
    stop = y + BOX_HEIGHT / 2
    canvas.path(
        f"M{written(begin)} {written(start)} H{written(side - 6)} q6 0 6 6 V{written(stop - 6)} q0 6 -6 6 "
        f"H{written(left + BOX + 1)}",
        stroke=TRUNK,
        width=1,
        arrow="flow",
    )


def _draw_cut(canvas: Canvas, column: _Column, x: float, top: float, end: float, *, follows: bool) -> None:
    """Draw the dashed line after a segment, the values that cross it, and the way they take."""
    assert column.cut is not None
    line = x + COLUMN + GUTTER / 2
    middle = x + PAD_LEFT + BOX / 2
    below = top + HEADER + len(column.boxes) * (BOX_HEIGHT + BOX_GAP) + 1
    entry = top + HEADER - 12
    riser = x + COLUMN + 9
    colour = CUT if column.stopped else FAINT
    canvas.path(f"M{written(line)} {written(top)} V{written(end)}", stroke=colour, width=2, stroke_dasharray="6 5")
    onward = line + GUTTER / 2 + PAD_LEFT + BOX / 2 - 6 if follows else line + 16
    canvas.path(
        f"M{written(middle)} {written(below)} H{written(riser - 6)} q6 0 6 -6 V{written(entry + 6)} q0 -6 6 -6 "
        f"H{written(onward)}",
        stroke=TRUNK,
    )
    if follows:
        _draw_entry(canvas, line + GUTTER / 2, entry)
    else:
        canvas.path(f"M{written(line + 12)} {written(entry)} h8", stroke=TRUNK, arrow="flow")
    shapes = [_sizes(features.shape) for features in column.cut.features]
    shown = shapes if len(shapes) <= 4 else [*shapes[:3], f"and {len(shapes) - 3} more"]
    for index, shape in enumerate(shown):
        canvas.text(
            line,
            entry + 22 + index * LINE,
            shape,
            size=10,
            fill=CUT if column.stopped else MUTED,
            anchor="middle",
            bold=True,
            halo=PAPER,
        )


def _head_height(head: Block) -> float:
    return 22 + LINE * len(_head_lines(head)) + 6


def _head_lines(head: Block) -> list[str]:
    """Say what a head costs and, from its facts, what it is made of."""
    lines = [f"{head.size:,} parameters" if head.size else "no parameters"]
    if head.macs:
        lines.append(f"{_short(head.macs)} multiply-adds")
    for name, value in head.facts.items():
        if isinstance(value, list | tuple):
            value = ", ".join(str(item) for item in value)
        if not isinstance(value, Mapping):
            wrapped = textwrap.wrap(f"{name} {value}", 22, subsequent_indent="  ", max_lines=3, placeholder=" …")
            lines += wrapped
    return lines


def _short(n: int) -> str:
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return str(n)


def _draw_heads(canvas: Canvas, column: _Column, x: float, top: float, bottom: float, loss_top: float) -> None:
    if not column.heads and not column.losses:
        return
    left, middle = x + PAD_LEFT, x + PAD_LEFT + BOX / 2
    below = top + HEADER + len(column.boxes) * (BOX_HEIGHT + BOX_GAP) - BOX_GAP
    y = bottom + 22
    colour, arrow = (HEAD, "head") if column.heads else (TRUNK, "flow")
    stop = y if column.heads else loss_top
    canvas.path(f"M{written(middle)} {written(below)} V{written(stop - 1)}", stroke=colour, arrow=arrow)
    for head in column.heads:
        lines = _head_lines(head)
        height = _head_height(head)
        canvas.rect(left, y, BOX, height, fill=HEAD_FILL, stroke=HEAD)
        canvas.text(left + 8, y + 16, head.name, size=11, bold=True)
        for index, line in enumerate(lines):
            canvas.text(left + 8, y + 30 + index * LINE, line, size=9.5, fill=MUTED, room=BOX - 12)
        y += height + 8
    read = [{term.head for term in loss.terms if term.head is not None} for loss in column.losses]
    if column.heads and column.losses and all(set(map(_name, column.heads)) <= heads for heads in read):
        down = f"M{written(middle)} {written(y - 8)} V{written(loss_top - 1)}"
        canvas.path(down, stroke=HEAD, arrow="head")
    else:
        _draw_rails(canvas, column, read, left, bottom + 22, loss_top)
    for index, loss in enumerate(column.losses):
        _draw_loss(canvas, loss, middle, _loss_y(loss_top, index))


def _name(block: Block) -> str:
    return block.name


def _loss_y(loss_top: float, index: int) -> float:
    """Return the upper edge of a loss in its column."""
    return loss_top + index * (LOSS_HEIGHT + 6)


def _head_y(column: _Column, index: int, heads_top: float) -> float:
    """Return the upper edge of a head in its column."""
    return heads_top + sum(_head_height(head) + 8 for head in column.heads[:index])


def _draw_rails(
    canvas: Canvas, column: _Column, read: Sequence[set[str]], left: float, heads_top: float, loss_top: float
) -> None:
    """Lead each head, on the left of its column, to the losses there that read it, where not all read all."""
    side = left - 3.0
    for number, (head, heads) in enumerate((h, r) for h in range(len(column.heads)) for r in range(len(read))):
        if column.heads[head].name in read[heads]:
            start = _head_y(column, head, heads_top) + 12 + 4 * (number % 2)
            stop = _loss_y(loss_top, heads) + LOSS_HEIGHT / 2
            edge = left + BOX / 2 - LOSS_WIDTH / 2 - 1
            rail = f"M{written(left)} {written(start)} H{written(side)} V{written(stop)} H{written(edge)}"
            canvas.path(rail, stroke=HEAD, arrow="head")
            side -= 4


def _draw_loss(canvas: Canvas, loss: LocalLoss, middle: float, y: float) -> None:
    left = middle - LOSS_WIDTH / 2
    canvas.rect(left, y, LOSS_WIDTH, LOSS_HEIGHT, radius=LOSS_HEIGHT / 2, fill=LOSS, stroke=LOSS)
    canvas.text(middle, y + 16, loss.name, size=11, fill=PAPER, anchor="middle", bold=True)
    terms = [("" if term.weight == 1 else f"{term.weight:g} ") + term.loss.rpartition(".")[2] for term in loss.terms]
    note = " + ".join(terms)
    if loss.route.start != loss.route.stop:
        note = f"segments {loss.route.start}-{loss.route.stop}"
    canvas.text(middle, y + 29, note, size=9, fill="#d9d3e8", anchor="middle", room=LOSS_WIDTH - 16)


def _is_window(loss: LocalLoss) -> bool:
    return loss.route.start != loss.route.stop


def _draw_windows(
    canvas: Canvas, plan: Plan, row: Sequence[_Column], heads_top: float, loss_top: float, end: float
) -> float:
    """Draw a bar under the segments that one loss trains together; return where the bars end.

    The heads of the loss at other segments than its last lead to the bar, and the bar to the loss.
    """
    places = {column.segment.index: place for place, column in enumerate(row)}
    lanes: list[int] = []
    for loss in filter(_is_window, plan.losses):
        shown = [places[i] for i in range(loss.route.start, loss.route.stop + 1) if i in places]
        if not shown:
            continue
        lane = next((lane for lane, busy in enumerate(lanes) if busy < shown[0]), len(lanes))
        lanes[lane : lane + 1] = [shown[-1]]
        y = end + 16 + lane * (BAR_HEIGHT + BAR_GAP)
        left, right = (MARGIN + place * (COLUMN + GUTTER) for place in (shown[0], shown[-1]))
        heads = {term.head for term in loss.terms if term.at not in (None, loss.route.stop)}
        for place in shown:
            rail = MARGIN + place * (COLUMN + GUTTER) + PAD_LEFT + BOX + 5.0 + 5 * lane
            for index, head in enumerate(row[place].heads):
                if head.name in heads:
                    start = _head_y(row[place], index, heads_top) + 14
                    down = f"M{written(rail - 5.0 - 5 * lane)} {written(start)} H{written(rail)} V{written(y - 1)}"
                    canvas.path(down, stroke=HEAD, arrow="head")
        if loss.route.stop in places and heads:
            place = places[loss.route.stop]
            edge = MARGIN + place * (COLUMN + GUTTER) + PAD_LEFT + BOX / 2 + LOSS_WIDTH / 2
            stop = _loss_y(loss_top, row[place].losses.index(loss)) + LOSS_HEIGHT / 2
            rail = edge + 5.0 + 5 * lane
            up = f"M{written(rail)} {written(y)} V{written(stop)} H{written(edge + 1)}"
            canvas.path(up, stroke=HEAD, arrow="head")
        width = right - left + COLUMN
        canvas.rect(left, y, width, BAR_HEIGHT, radius=6, fill=PAPER, stroke=LOSS)
        told = f"{loss.name}: segments {loss.route.start} to {loss.route.stop}"
        canvas.text(left + 10, y + 17, told, size=11, room=width - 16)
    return end + (8 + len(lanes) * (BAR_HEIGHT + BAR_GAP) if lanes else 0)


def _draw_shared(canvas: Canvas, plan: Plan, row: Sequence[_Column], heads_top: float, end: float) -> float:
    """Draw every shared block as a bar under the segments that read it; return where the bars end."""
    lanes: list[int] = []
    for block in plan.blocks:
        readers = [place for place, column in enumerate(row) if _reads(column, block.name)]
        if block.role in ("segment", "head") or not readers:
            continue
        first, last = readers[0], readers[-1]
        lane = next((lane for lane, busy in enumerate(lanes) if busy < first), len(lanes))
        lanes[lane : lane + 1] = [last]
        y = end + 22 + lane * (BAR_HEIGHT + BAR_GAP)
        left = MARGIN + first * (COLUMN + GUTTER)
        width = (last - first) * (COLUMN + GUTTER) + COLUMN
        for place in readers:
            _draw_reading(canvas, row[place], block, MARGIN + place * (COLUMN + GUTTER), heads_top, y)
        canvas.rect(left, y, width, BAR_HEIGHT, radius=6, fill=SHARED_FILL, stroke=SHARED)
        facts = ", ".join(line.strip() for line in _head_lines(block))
        facts = facts if len(readers) > 1 else f"{block.size:,}"
        canvas.text(left + 10, y + 17, block.name, size=11, bold=True)
        start = left + 10 + 6.8 * len(block.name) + 12
        canvas.text(start, y + 17, facts, size=10, fill=MUTED, room=left + width - start - 6)
    return end + (14 + len(lanes) * (BAR_HEIGHT + BAR_GAP) if lanes else 0)


def _reads(column: _Column, block: str) -> list[bool]:
    """Return, for every term at this segment that reads the block, whether its loss trains it."""
    terms = [(loss, term) for loss in column.losses for term in loss.terms]
    uses = [block in loss.reach and not use.detached for loss, term in terms for use in term.uses if use.block == block]
    return [*uses, *(False for _, term in terms if block in (term.target.block, term.weights))]


def _draw_reading(canvas: Canvas, column: _Column, block: Block, x: float, heads_top: float, y: float) -> None:
    side = x + PAD_LEFT + BOX - 8
    heads_end = heads_top + sum(_head_height(head) + 8 for head in column.heads) - 8
    style = {} if any(_reads(column, block.name)) else {"stroke_dasharray": "3 3"}
    line = f"M{written(side)} {written(y)} V{written(heads_end + 1)}"
    canvas.path(line, stroke=SHARED, width=1.6, arrow="shared", **style)
