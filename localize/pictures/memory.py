"""Draw the memory over one training step: the saw-tooth of a local step, beside the hill of backprop.

Across runs the arithmetic of the step, upwards the bytes of live tensors, both predicted from the step that runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from localize.estimate.memory import Footprint
from localize.pictures.svg import CUT, FAINT, HEAD, INK, MUTED, SHARED, TRUNK, Canvas, tick

WIDTH, HEIGHT = 900, 420
LEFT, RIGHT, TOP, BOTTOM = 84, 28, 96, 58
COLOURS = (MUTED, HEAD, TRUNK, SHARED, CUT)


def memory_svg(steps: Mapping[str, Footprint], title: str) -> str:
    """Return a picture of the memory over time of training steps, as SVG text.

    Args:
        steps: what each step needs, by its name; the first is what the axes are shares of.
        title: of the picture.
    """
    canvas = Canvas()
    base = next(iter(steps.values()))
    right = max(step.macs for step in steps.values()) / base.macs
    top = max(step.peak for step in steps.values())
    canvas.text(LEFT, 34, title, size=17, bold=True)
    canvas.text(LEFT, 54, "bytes of live tensors over one training step, predicted from its text", size=12, fill=MUTED)
    _axes(canvas, top, right)
    x = float(LEFT)
    for (name, step), colour in zip(steps.items(), COLOURS, strict=False):
        canvas.path(_curve(step, base, top, right), stroke=colour, width=1.4, stroke_linejoin="round")
        told = f"{name}: {step.peak / base.peak:.1%}, {step.macs / base.macs:.2f} x"
        canvas.rect(x, TOP - 26, 14, 4, radius=2, fill=colour)
        canvas.text(x + 20, TOP - 20, told, size=11.5, fill=INK)
        x += 20 + 6.3 * len(told) + 22
    told = ", ".join(f"{name} {step.peak / base.peak:.0%}" for name, step in steps.items())
    return canvas.svg(max(WIDTH, x), HEIGHT, label=f"Memory over one training step of {title}. Peaks: {told}.")


def _curve(step: Footprint, base: Footprint, top: float, right: float) -> str:
    points = [(0, step.resident), *step.timeline, (step.macs, step.resident)]
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    placed = [(LEFT + wide * macs / base.macs / right, HEIGHT - BOTTOM - high * held / top) for macs, held in points]
    written: list[str] = []
    for x, y in placed:
        here = f"{x:.1f} {y:.1f}"
        if not written or written[-1] != here:
            written.append(here)
    return "M" + " L".join(written)


def _axes(canvas: Canvas, top: float, right: float) -> None:
    """Draw lines at round numbers of bytes, and of times the arithmetic of the first step."""
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    unit, name = (2**30, "GiB") if top >= 2**30 else (2**20, "MiB")
    step = tick(top / unit / 5)
    for i in range(math.floor(top / unit / step) + 1):
        y = HEIGHT - BOTTOM - high * i * step * unit / top
        canvas.path(f"M{LEFT} {y:.1f} H{WIDTH - RIGHT}", stroke=FAINT, width=0.8)
        canvas.text(LEFT - 10, y + 4, f"{i * step:g} {name}", size=11, fill=MUTED, anchor="end")
    across = tick(right / 5)
    for i in range(math.floor(right / across + 1e-9) + 1):
        x = LEFT + wide * i * across / right
        canvas.path(f"M{x:.1f} {HEIGHT - BOTTOM} v5", stroke=MUTED, width=0.8)
        canvas.text(x, HEIGHT - BOTTOM + 20, f"{i * across:g}", size=11, fill=MUTED, anchor="middle")
    canvas.text(LEFT + wide / 2, HEIGHT - 14, "multiply-adds, as a share of backprop's", size=11.5, anchor="middle")
