"""Conversions that between them use every word of a plan, and what each gives: hashes of its text and of its plan.

``python -m tests.codegen.texts`` writes ``texts.json`` again; a change of it in a review is a change for every user.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import localize
from localize import folder, methods, zoo
from tests import nets

RECORDED = Path(__file__).with_name("texts.json")

DEFAULTS: dict[str, dict[str, Any]] = {"mlaan": {"window": 2}}
"""Options without which a method does not fit the residual net, which has three segments."""

PRESETS: dict[str, tuple[dict[str, Any], ...]] = {
    "auglocal": ({"d": 3}, {"d": 2, "recompute": "all"}, {"d": 2, "loss_scaling": True, "update": "immediate"}),
    "dcl": (
        *({"dictionary": dictionary} for dictionary in ("last", "layerwise", "static", "averaged")),
        {"reduce": "projection", "match": "cosine"},
    ),
    "dgl": ({"cut": localize.CutSpec(segments=2)}, {"recompute": "body"}),
    "predsim": ({"terms": "sim"}, {"terms": "pred"}),
    "infopro": ({"loss": "softmax"},),
    "mlaan": ({"window": 2, "pull": "before"}, {"window": 2, "lam": "none"}),
    "ff": ({"goodness": "sum"},),
    "cfl": ({"total": "dict"}, {"total": "batch", "noise": False}),
    "accumulate": ({"parts": 2},),
}
"""Options beside the defaults of a method, for the residual net."""

NETS = ("Dense", "TwoStreams", "ViT", "MLP", "Writes")
CROSSED = ("backprop", "auglocal", "dcl", "dgl")
"""Methods that are tried on all nets."""


def converted() -> Iterator[tuple[str, localize.LocalModel]]:
    """Yield every conversion by a name that says what was asked."""
    for name, convert in requests():
        yield name, convert()


def requests() -> Iterator[tuple[str, Callable[[], localize.LocalModel]]]:
    """Yield what makes each conversion, by a name that says what is asked."""
    for method in methods.names():
        for options in (DEFAULTS.get(method, {}), *PRESETS.get(method, ())):
            told = ", ".join(f"{key}={value}" for key, value in options.items())
            if method == "pff":
                yield f"cifar/fc_mnist by {method}({told})", partial(_named, "cifar/fc_mnist", method, options)
            else:
                yield f"ResNet by {method}({told})", partial(_convert, nets.ResNet(), method, options)
    for name, method in itertools.product(NETS, CROSSED):
        yield f"{name} by {method}()", partial(_convert, nets.ALL[name](), method, {})
    yield "Writes by mlaan()", partial(_convert, nets.Writes(), "mlaan", {})
    yield "ViT by dcl(micro_batch=2)", partial(_convert, nets.ViT(), "dcl", {"micro_batch": 2})
    yield "ResNet by dcl(micro_batch=2)", partial(_convert, nets.ResNet(), "dcl", {"micro_batch": 2})
    yield "Recurrent by dgl(shared)", partial(_convert, nets.Recurrent(), "dgl", {"shared": True})
    yield "Auxiliary by dgl()", partial(_convert, nets.Auxiliary(), "dgl", {})
    yield "Auxiliary by auglocal()", partial(_convert, nets.Auxiliary(), "auglocal", {})
    added = {"method": "dgl", "terms": [{"branch": "reconstruction", "weight": [5.0, 0.2]}]}
    yield "ResNet by dgl with reconstruction", partial(_convert, nets.ResNet(), added, {})
    inputs = (torch.zeros(2, 3, 8, 8), torch.zeros(2, 6), torch.zeros(2, 6))
    yield "TwoInputs by dgl()", partial(_convert, nets.TwoInputs(), "dgl", {}, inputs)
    three = {"cut": localize.CutSpec(segments=3)}
    yield "tv/lraspp by dgl()", partial(_named, "tv/lraspp_mobilenet_v3_large", "dgl", three)
    for name in ("cifar/resnet20", "cifar/vgg8b", "cifar/vit", "cifar/mixer"):
        yield f"{name} by auglocal()", partial(_named, name, "auglocal", {})
    yield "cifar/resnet20 by mlaan()", partial(_named, "cifar/resnet20", "mlaan", {})


def _convert(model: nn.Module, recipe: Any, options: dict[str, Any], x: Any = None) -> localize.LocalModel:
    images: Any = torch.zeros(2, 3, 8, 8) if x is None else x
    return localize.transform(model, recipe, example_input=images, **options)


def _named(name: str, method: str, options: dict[str, Any]) -> localize.LocalModel:
    model = zoo.create_empty(name)
    shape = zoo.input_shape_of(zoo.resolve(name), model, None)
    return localize.transform(model, method, example_input=torch.empty(2, *shape, device="meta"), name=name, **options)


def hashes(local: localize.LocalModel) -> dict[str, str]:
    """Return the first digits of the SHA-256 of the text and of the plan; versions are left out."""
    plan = copy.deepcopy(folder.describe(local))
    plan.pop("versions")
    plan.pop("version", None)
    return {"text": _hash(local.source), "plan": _hash(json.dumps(plan, sort_keys=True))}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


if __name__ == "__main__":
    RECORDED.write_text(json.dumps({name: hashes(local) for name, local in converted()}, indent=1) + "\n")
