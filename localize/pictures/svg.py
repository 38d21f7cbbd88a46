"""Plain SVG text: no script, no external font, no image; the same calls give the same bytes."""

from __future__ import annotations

import math
from typing import Any

from localize.text import markup

INK, MUTED, FAINT, PAPER = "#1f2933", "#66727f", "#c9d1da", "#ffffff"
TRUNK, TRUNK_FILL, PLAIN_FILL = "#3b6fb6", "#dfeafa", "#f5f7fa"
HEAD, HEAD_FILL = "#c77700", "#fff0d2"
SHARED, SHARED_FILL = "#2d8659", "#dcf3e6"
CUT = "#d1335b"
LOSS = "#3d3350"
REACH = "#f8f9fc"

DARK = {
    INK: "#e4e8ec",
    MUTED: "#9ba7b3",
    FAINT: "#3b444e",
    PAPER: "#15191e",
    TRUNK: "#7ba7e3",
    TRUNK_FILL: "#1f304a",
    PLAIN_FILL: "#1d2228",
    HEAD: "#eda23c",
    HEAD_FILL: "#3a2c12",
    SHARED: "#5dc08f",
    SHARED_FILL: "#173426",
    CUT: "#f2708f",
    LOSS: "#c3b6e2",
    REACH: "#191e24",
}
"""What a page with dark paper puts in place of each colour."""

FONT = "Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"


class Canvas:
    """SVG elements, in the order in which they are painted; ``hint`` is what an element says under the pointer."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.arrows: set[str] = set()

    def rect(self, x: float, y: float, width: float, height: float, *, radius: float = 4, **style: Any) -> None:
        self._add("rect", x=x, y=y, width=width, height=height, rx=radius, **style)

    def circle(self, x: float, y: float, radius: float, **style: Any) -> None:
        self._add("circle", cx=x, cy=y, r=radius, **style)

    def path(self, d: str, *, stroke: str, width: float = 1.2, arrow: str = "", **style: Any) -> None:
        if arrow:
            self.arrows.add(arrow)
            style["marker_end"] = f"url(#{arrow})"
        self._add("path", d=d, fill="none", stroke=stroke, stroke_width=width, **style)

    def area(self, d: str, *, fill: str, opacity: float) -> None:
        self._add("path", d=d, fill=fill, fill_opacity=opacity, stroke="none")

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 11,
        fill: str = INK,
        anchor: str = "start",
        bold: bool = False,
        room: float | None = None,
        halo: str = "",
    ) -> None:
        if room is not None:
            text = fitted(text, size * (1.06 if bold else 1.0), room)
        style: dict[str, Any] = {"font_weight": "bold"} if bold else {}
        if halo:
            style |= {"stroke": halo, "stroke_width": 4, "paint_order": "stroke", "stroke_linejoin": "round"}
        self._add("text", text, x=x, y=y, font_size=size, fill=fill, text_anchor=anchor, **style)

    def _add(self, tag: str, content: str = "", /, hint: str = "", **attributes: Any) -> None:
        told = " ".join(f'{key.replace("_", "-")}="{markup(written(v))}"' for key, v in attributes.items())
        inside = (f"<title>{markup(hint)}</title>" if hint else "") + markup(content)
        self.parts.append(f"<{tag} {told}>{inside}</{tag}>" if inside else f"<{tag} {told}/>")

    def svg(self, width: float, height: float, *, label: str = "") -> str:
        """Return the whole document; ``label`` says what it shows to those who do not see it."""
        arrows = "".join(
            f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6.5" markerHeight="6.5" '
            f'orient="auto-start-reverse"><path d="M0 0.8 L7.4 4 L0 7.2 z" fill="{colour}"/></marker>'
            for name, colour in (("flow", TRUNK), ("head", HEAD), ("shared", SHARED))
            if name in self.arrows
        )
        spoken = f'role="img" aria-label="{markup(label)}" ' if label else ""
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" {spoken}width="{written(width)}" height="{written(height)}" '
                f'viewBox="0 0 {written(width)} {written(height)}" font-family="{FONT}">',
                *([f"<defs>{arrows}</defs>"] if arrows else []),
                f'<rect width="100%" height="100%" fill="{PAPER}"/>',
                *self.parts,
                "</svg>\n",
            ]
        )


def written(value: Any) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)


def fitted(text: str, size: float, room: float) -> str:
    """Shorten a text that would be wider than ``room``, taking letters as 0.62 of the font's size."""
    most = max(1, int(room / (0.62 * size)))
    return text if len(text) <= most else text[: most - 1] + "…"


def tick(value: float) -> float:
    """Return the next of 1, 2, 5 times a power of ten: the distance of round numbers on an axis."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(n * power for n in (1, 2, 5, 10) if n * power >= value * 0.999)
