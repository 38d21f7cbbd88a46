"""Plain SVG text: no script, no external font, no image; the same calls give the same bytes."""

from __future__ import annotations

from html import escape
from typing import Any

INK, MUTED, FAINT, PAPER = "#1f2933", "#66727f", "#c9d1da", "#ffffff"
TRUNK, TRUNK_FILL, PLAIN_FILL = "#3b6fb6", "#dfeafa", "#f5f7fa"
HEAD, HEAD_FILL = "#c77700", "#fff0d2"
SHARED, SHARED_FILL = "#2d8659", "#dcf3e6"
CUT = "#d1335b"
LOSS = "#3d3350"
REACH = "#f8f9fc"

FONT = "Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"


class Canvas:
    """SVG elements, in the order in which they are painted."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def rect(self, x: float, y: float, width: float, height: float, *, radius: float = 4, **style: Any) -> None:
        self._add("rect", x=x, y=y, width=width, height=height, rx=radius, **style)

    def path(self, d: str, *, stroke: str, width: float = 1.2, arrow: str = "", **style: Any) -> None:
        if arrow:
            style["marker_end"] = f"url(#{arrow})"
        self._add("path", d=d, fill="none", stroke=stroke, stroke_width=width, **style)

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

    def _add(self, tag: str, content: str | None = None, /, **attributes: Any) -> None:
        told = " ".join(f'{key.replace("_", "-")}="{escape(written(v))}"' for key, v in attributes.items())
        self.parts.append(f"<{tag} {told}/>" if content is None else f"<{tag} {told}>{escape(content)}</{tag}>")

    def svg(self, width: float, height: float) -> str:
        """Return the whole document."""
        arrows = "".join(
            f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6.5" markerHeight="6.5" '
            f'orient="auto-start-reverse"><path d="M0 0.8 L7.4 4 L0 7.2 z" fill="{colour}"/></marker>'
            for name, colour in (("flow", TRUNK), ("head", HEAD), ("shared", SHARED))
        )
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" width="{written(width)}" height="{written(height)}" '
                f'viewBox="0 0 {written(width)} {written(height)}" font-family="{FONT}">',
                f"<defs>{arrows}</defs>",
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
