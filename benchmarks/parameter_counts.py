"""Parameters that training adds, beside what the papers print: DCL Tables 4 and V, CFL Table 1, AugLocal Table 6.

Counted are the trainable parameters of heads and shared blocks (of all for CFL, whose table prints totals). Where
a number differs from the paper's beyond rounding, the reason stands beside it. Nothing is trained::

    python benchmarks/parameter_counts.py
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from localize import methods, recipes, zoo
from localize.cutting.cuts import place
from localize.cutting.split import split
from localize.graph.trace import trace
from localize.ir import Plan


@dataclass(frozen=True)
class Row:
    """One number of a paper: ``paper`` as printed, ``reason`` where ours is not that."""

    table: str
    recipe: str
    model: str
    paper: str
    input_shape: tuple[int, int, int] = (3, 32, 32)
    num_classes: int = 10
    options: Mapping[str, Any] = field(default_factory=dict)
    model_options: Mapping[str, Any] = field(default_factory=dict)
    total: bool = False
    """The paper prints the parameters of model and training together."""
    reason: str = ""


SETS = {
    "MNIST": ((1, 28, 28), 10), "CIFAR-10": ((3, 32, 32), 10), "CIFAR-100": ((3, 32, 32), 100),
    "STL-10": ((3, 96, 96), 10),
}  # fmt: skip
HIDDEN_FC = "the paper counts a decoder of {} values behind the hidden fc layer, which has 1,024 (and needs no pooling)"
SMALL = "the paper's pooling limit counts for every layer; smaller maps hold fewer values"


def _vgg8b() -> list[Row]:
    """Return the rows of DCL Table 4."""
    printed = {
        "ll-pred": ("71.8K", "143K", "1.43M", "143K"),
        "ll-sim": ("9.46M", "9.46M", "9.46M", "9.46M"),
        "predsim": ("9.53M", "9.60M", "10.9M", "9.60M"),
        "ll-bpf": ("3.28M", "3.28M", "3.28M", "3.28M"),
        "ll-cont": ("918K", "1.84M", "1.84M", "1.84M"),
        "ll-contrec": ("1.15M", "2.07M", "2.07M", "2.07M"),
        "dcl": ("5.12K", "5.12K", "5.12K", "5.12K"),
    }
    rows = []
    for recipe, values in printed.items():
        for (name, (shape, classes)), paper in zip(SETS.items(), values, strict=True):
            options, reason = {}, ""
            if recipe in ("ll-pred", "predsim"):
                options = {"dim_in": 1024 if name == "MNIST" else 2048}
                if name in ("CIFAR-10", "CIFAR-100"):
                    reason = HIDDEN_FC.format("2,048")
                elif name == "STL-10":
                    reason = f"{SMALL}; {HIDDEN_FC.format('2,048')}"
            elif recipe == "ll-bpf":
                options = {"dim_in": 4096}
                reason = SMALL if name in ("MNIST", "STL-10") else ""
            elif recipe in ("ll-cont", "ll-contrec") and name != "MNIST":
                reason = HIDDEN_FC.format("2,048") + (f"; {SMALL}" if name == "STL-10" else "")
            elif recipe == "dcl" and name == "CIFAR-100":
                reason = "100 classes x 512; the paper prints the number for 10 classes"
            if recipe == "ll-sim" or (recipe == "predsim" and reason):
                reason = "; ".join(
                    part for part in (reason, "9,453,568 for the similarities; the paper prints 9.46M") if part
                )
            rows.append(Row("DCL 4", recipe, "cifar/vgg8b", paper, shape, classes, options, reason=reason))
    return rows


def _table_v() -> list[Row]:
    """Return the rows of DCL Table V: modules of ResNets, a ViT and a Mixer."""
    mean = {"aux": "mean"}
    wide = "15 modules x Linear(4C, 128); no reading of the paper's text gives 266K"
    return [
        Row("DCL V", "ll-cont", "cifar/resnet32", "73.6K", options=mean),
        Row("DCL V", "ll-cont", "cifar/resnet32_w", "266K", options=mean, reason=wide),
        Row("DCL V", "ll-cont", "cifar/vit", "394K", options=mean),
        Row("DCL V", "ll-cont", "cifar/mixer", "394K", options=mean),
        Row("DCL V", "dcl", "cifar/resnet32", "0.64K"),
        Row("DCL V", "dcl", "cifar/resnet32_w", "2.56K"),
        Row("DCL V", "dcl", "cifar/vit", "5.12K"),
        Row("DCL V", "dcl", "cifar/mixer", "5.12K"),
    ]


def _cfl() -> list[Row]:
    """Return the rows of CFL Table 1: parameters of model and dictionary; convolutions without bias."""
    printed = {
        "MNIST": {"conv256": ("151.2K", "153.8K"), "conv512": ("1.335M", "1.34M"), "fc": ("1.871M", "1.88M")},
        "CIFAR-10": {"conv256": ("152.4K", "155K"), "conv512": ("1.336M", "1.341M"), "fc": ("18.93M", "18.93M")},
        "CIFAR-100": {"conv256": ("175.4K", "201.1K"), "conv512": ("1.382M", "1.433M"), "fc": ("19.21M", "19.23M")},
    }
    segments = {"MNIST": 8, "CIFAR-10": 24, "CIFAR-100": 12}
    reasons = {
        ("MNIST", "conv512", 0): "64-256-512 without bias has 1,334,474, which rounds to 1.334M",
        ("MNIST", "fc", 0): "784-1024-1024-10 with LayerNorm on the image as well is 0.002M less",
        ("MNIST", "fc", 1): "the same with a dictionary 10 x 128 is 0.01M less",
        ("CIFAR-100", "conv256", 0): "the paper's number is that of the net without its classifier's bias",
    }
    rows = []
    for name, nets in printed.items():
        shape, classes = SETS[name]
        for net, values in nets.items():
            for i, (recipe, paper) in enumerate(zip(("backprop", "cfl"), values, strict=True)):
                model = net if net != "fc" else f"fc_{name.replace('-', '').lower()}"
                more = {"input_norm": True} if net == "fc" else {"bias": False}
                options = {"k": segments[name]} if (net, recipe) == ("fc", "cfl") else {}
                reason = reasons.get((name, net, i), "")
                rows.append(Row("CFL 1", recipe, f"cifar/{model}", paper, shape, classes, options, more, True, reason))
    return rows


def _table_6() -> list[Row]:
    """Return the totals of the nets that AugLocal Table 6 spells out for ResNet-110 (the paper prints no totals)."""
    nets = {
        "predsim-auglocal": "AP-10FC / 16C3; AP-10FC / 32C3; AP-10FC / 64C3",
        "infopro-softmax": "32C3-AP-128FC-10FC / 12C3-3C3; 64C3-...; 64C3-...",
        "dgl-auglocal": "AP-16C1-16C1-16C1-AP-64FC-64FC-10FC; ...",
        "auglocal": "64R-AP-10FC",
    }
    return [Row("AugLocal 6", recipe, "cifar/resnet110", paper) for recipe, paper in nets.items()]


ROWS = (*_vgg8b(), *_table_v(), *_cfl(), *_table_6())


def count(row: Row) -> int:
    """Return the trainable parameters that a row is about."""
    plan = _plan(row)
    added = sum(
        p.numel() for b in plan.blocks if b.module is not None for p in b.module.parameters() if p.requires_grad
    )
    trunk = sum(segment.size for segment in plan.segments.segments)
    return trunk + added if row.total else added


def _plan(row: Row) -> Plan:
    recipe = recipes.load(row.recipe)
    method = methods.create(recipe.method, **{**recipe.options, **row.options})
    with torch.device("meta"):
        model = zoo.create_model(row.model, row.num_classes, input_shape=row.input_shape, **row.model_options)
        trunk = trace(model, torch.empty(2, *row.input_shape), name=row.model)
    layout = place(trunk, recipe.cut or method.cut, grain=method.grain, together=method.together)
    return method.plan(split(layout))


def main() -> None:
    """Print the table."""
    print("| table | method | model | images | classes | paper | ours | why they differ |")
    print("|---|---|---|---|---:|---|---:|---|")
    for row in ROWS:
        images = "x".join(map(str, row.input_shape))
        cells = [row.table, f"`{row.recipe}`", row.model.removeprefix("cifar/"), images, str(row.num_classes)]
        print(f"| {' | '.join([*cells, row.paper, f'{count(row):,}', row.reason])} |")


if __name__ == "__main__":
    main()
