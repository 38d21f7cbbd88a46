"""HTML text that cannot be broken by what stands in it: all text is escaped, unless it is markup already."""

from __future__ import annotations

from localize.text import markup


class Html(str):
    """Text that is HTML."""


def element(tag: str, *children: str, **attributes: str) -> Html:
    """Return an element; ``class_`` is the attribute ``class``, and ``aria_label`` is ``aria-label``."""
    told = "".join(f' {name.rstrip("_").replace("_", "-")}="{markup(value)}"' for name, value in attributes.items())
    return Html(f"<{tag}{told}>{joined(*children)}</{tag}>")


def joined(*children: str) -> Html:
    """Return pieces of text and of HTML as one piece of HTML."""
    return Html("".join(child if isinstance(child, Html) else markup(child) for child in children))
