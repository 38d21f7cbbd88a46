"""What labels each method takes, read from its plan: the table of docs/losses.md.

``python -m tests.methods.labels`` writes the table again.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from localize import compiler, methods, options
from localize.cutting.cuts import place
from localize.cutting.split import split
from localize.errors import LocalizeError
from localize.graph.trace import trace
from localize.ir import Plan, Trunk
from localize.passes.labels import create
from localize.zoo.dcl_nets import FCNet
from tests import nets

PAGE = Path(__file__).parents[2] / "docs" / "losses.md"
BEGIN, END = "<!-- methods: python -m tests.methods.labels -->", "<!-- end -->"
DEFAULTS: dict[str, dict[str, Any]] = {"mlaan": {"window": 2}}
"""Options without which a method does not fit the net, which has three segments."""


def variants() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every method with its defaults, and with the options with which it takes more labels."""
    for name in methods.names():
        yield name, {}
        for told in methods.taking("soft"):
            method, _, option = told.partition(" ")
            if method == name and option:
                key, _, value = option.strip("()").partition("=")
                yield name, {key: value}


def plan(name: str, options: dict[str, Any], loss: Any = None) -> Plan:
    """Return the plan of a method on a small net that it fits."""
    method = methods.create(name, **{**DEFAULTS.get(name, {}), **options})
    trunk = _trunk(vectors=name == "pff")
    segments = split(place(trunk, method.cut, grain=method.grain, together=method.together))
    return compiler.design(segments, method, loss=create(loss))


@functools.cache
def _trunk(*, vectors: bool) -> Trunk:
    """Return a small net, recorded; with ``vectors``, a fully connected one."""
    net: nn.Module = FCNet(20, 10, input_shape=(1, 4, 5)) if vectors else nets.ResNet()
    return trace(net, torch.empty((2, 1, 4, 5) if vectors else (2, 3, 8, 8)), name="net")


def kinds(name: str, options: dict[str, Any]) -> tuple[str, ...]:
    """Return the kinds of labels that the plans of a method take: with the plain loss, or with bce."""
    found = set(plan(name, options).labels.kinds)
    with contextlib.suppress(LocalizeError):
        found.update(plan(name, options, "bce").labels.kinds)
    return tuple(kind for kind in ("ids", "soft", "multi") if kind in found)


def table() -> str:
    """Return the table as Markdown."""
    lines = [
        "| method | class ids | soft labels | multi-label, with `bce` | losses that `loss` chooses | why not all |",
        "|---|---|---|---|---|---|",
    ]
    lines += [f"| {' | '.join(_row(name, options))} |" for name, options in variants()]
    return "\n".join(lines)


def _row(name: str, options: dict[str, Any]) -> Iterator[str]:
    told = "".join(f", {key}={value}" for key, value in options.items())
    yield f"`{name}`{told}"
    found, plain = kinds(name, options), plan(name, options)
    yield from ("yes" if kind in found else "no" for kind in ("ids", "soft", "multi"))
    try:
        chosen = plan(name, options, {"smoothing": 0.1})
    except LocalizeError as error:
        yield "none"
        yield _written(error.facts[0])
        return
    pairs = zip(plain.losses, chosen.losses, strict=True)
    changed = [after.terms != before.terms for before, after in pairs]
    last = [loss in chosen.outputs for loss in chosen.losses]
    yield "all" if all(changed) else "that of the output" if changed == last else "some"
    yield _written(plain.labels.why or _kept(chosen))


def _kept(plan: Plan) -> str:
    told = next((line for line in plan.deviations if line.startswith("What else compares with labels")), "")
    return told.replace("What else compares with labels stays as in the sources: ", "stays as it is: ")


def _written(text: str) -> str:
    return text.replace("localize.losses.", "").replace("|", "/")


def written() -> str:
    """Return the page with the table as it is now."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


def choices() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every method with its defaults, and with every choice of every option alone."""
    for name in methods.names():
        yield name, {}
        for item in options.of(methods.get(name)):
            for choice in item.choices:
                if choice != item.default:
                    yield name, {item.name: choice}


if __name__ == "__main__":
    PAGE.write_text(written(), encoding="utf-8")
