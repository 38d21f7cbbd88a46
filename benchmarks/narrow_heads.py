"""Heads of limited width beside those of the papers: parameters, memory and arithmetic, and accuracy after few epochs.

On nets for images of 224x224 a step of AugLocal is predicted in both forms, beside backprop and the best schedule of
activation checkpointing; nothing is run. On images of 16x16 a ResNet-20 is trained by five methods in both forms: 3
epochs on digits, and AugLocal for one on mnist5k; one seed, the same settings in both forms. PredSim is trained with
Adam for 10 epochs, since it hardly learns with SGD. Results go into a JSONL file one by one; what is found there is not
repeated::

    python benchmarks/narrow_heads.py
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from localize import build
from localize.estimate import compare, memory
from localize.recipes import Recipe
from localize.train import TrainConfig, run

NETS = {
    "tv/resnet50": 64,
    "tv/mobilenet_v2": 32,
    "tv/efficientnet_b0": 32,
    "tv/densenet121": 32,
    "timm/vit_small_patch16_224": 32,
    "timm/convnext_atto": 32,
    "tv/vit_b_16": 16,
}
"""Nets, and the images in a batch; all of 224x224."""
WIDTH = 64
"""Of the narrow heads on those nets."""
AUGLOCAL: Mapping[str, Mapping[str, Any]] = {
    "auglocal": {},
    "auglocal narrow": {"head_width": WIDTH},
    "auglocal lean": {"head_width": WIDTH, "tail": "isolated", "update": "immediate"},
}
"""Its default; with narrow heads; and with these, the last d layers each by its own loss, as in the paper, and an
update after each backward."""
SMALL, SMALL_WIDTH = "cifar/resnet20", 16
"""The net that is trained, whose widest map has 64 channels, and the width of its narrow heads."""
TRAINING = {"opt": "sgd", "lr": 0.05, "weight_decay": 1e-4, "batch_size": 64}
ADAM = {"opt": "adam", "lr": 5e-4, "weight_decay": 0.0, "batch_size": 64}
"""For PredSim, which is published with Adam at this rate."""
TRAINED: Mapping[str, tuple[tuple[str, int], ...]] = {
    "auglocal": (("digits", 3), ("mnist5k", 1)),
    "dgl": (("digits", 3),),
    "predsim": (("digits", 10),),
    "infopro": (("digits", 3),),
    "mlaan": (("digits", 3),),
}
"""Methods that are trained: data sets, and for how many epochs."""


def main() -> None:
    """Run what is missing, and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nets", nargs="*", default=list(NETS), help="only these; none: only what is trained")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--print", action="store_true", help="print what is there, and run nothing")
    args = parser.parse_args()
    if not args.print:
        for net in args.nets:
            for step in ("backprop", "checkpoint", *AUGLOCAL):
                key = {"net": net, "batch": NETS[net], "step": step, "width": WIDTH}
                if not any(row["key"] == key for row in read(args.results)):
                    add(args.results, {"key": key, **predicted(net, step)})
        for method, width, data, epochs in runs():
            settings = ADAM if method == "predsim" else TRAINING
            key = {"net": SMALL, "method": method, "head_width": width, "data": data, "epochs": epochs, **settings}
            if not any(row["key"] == key for row in read(args.results)):
                add(args.results, {"key": key, **trained(method, width, data, epochs, settings)})
    print("\n\n".join((costs_table(read(args.results)), accuracy_table(read(args.results)))))


def runs() -> Iterator[tuple[str, int, str, int]]:
    """Yield what is trained: method, width of its heads (0: the paper's), data set, epochs."""
    for method, sets in TRAINED.items():
        for data, epochs in sets:
            for width in (0, SMALL_WIDTH):
                yield method, width, data, epochs


def predicted(net: str, step: str) -> dict[str, Any]:
    """Predict a step of SGD with momentum."""
    model = Recipe("backprop", model=net, input_shape=(3, 224, 224))
    if step == "checkpoint":
        entry, row = compare.checkpointing(model, NETS[net], lambda name: None)
        return {"schedule": entry.name, "heads": 0, "peak": row.peak_bytes, "macs": row.macs}
    local = build.build(replace(model, method=step.split()[0], options=AUGLOCAL.get(step, {})), data=False)
    found = memory.predict(local, NETS[net])
    heads = sum(parameter.numel() for parameter in local.heads.parameters())
    model_size = sum(parameter.numel() for parameter in local.trunk.parameters())
    return {"parameters": model_size, "heads": heads, "peak": found.peak, "macs": found.macs}


def trained(method: str, width: int, data: str, epochs: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Train once, in a temporary folder; and predict a step."""
    folder = tempfile.mkdtemp()
    options = {"head_width": width} if width else {}
    try:
        config = TrainConfig(
            SMALL, recipe=method, options=options, input_shape=(3, 16, 16), data=data, epochs=epochs, device="cpu",
            output=f"{folder}/run", **settings,
        )  # fmt: skip
        accuracy = run(config).metrics[-1]["test_accuracy"]
    finally:
        shutil.rmtree(folder)
    local = build.build(Recipe(method, model=SMALL, input_shape=(3, 16, 16), options=options), data=False)
    heads = sum(parameter.numel() for parameter in local.heads.parameters())
    return {"test_accuracy": accuracy, "heads": heads, "peak": memory.predict(local, settings["batch_size"]).peak}


def costs_table(rows: list[dict[str, Any]]) -> str:
    """Return the predicted steps as a Markdown table."""
    lines = [
        "| net, batch | parameters, M | heads: paper | narrow | checkpoint, % | paper, % | narrow, % | lean, % "
        "| arithmetic, narrow |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for net, batch in NETS.items():
        own = {row["key"]["step"]: row for row in rows if row["key"]["net"] == net}
        if not {"backprop", "auglocal narrow"} <= own.keys():
            continue
        base = own["backprop"]
        cells = [f"{base['parameters'] / 1e6:.1f}"]
        cells += [_cell(own.get(step), "heads", 1e-6) for step in ("auglocal", "auglocal narrow")]
        cells += [_cell(own.get(step), "peak", 100 / base["peak"]) for step in ("checkpoint", *AUGLOCAL)]
        cells.append(_cell(own["auglocal narrow"], "macs", 1 / base["macs"], 2))
        lines.append(f"| {net.partition('/')[2]}, {batch} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: Mapping[str, Any] | None, name: str, factor: float, digits: int = 1) -> str:
    """Return a number of a row, times a factor; a dash where the row is not there yet."""
    return "-" if row is None else f"{row[name] * factor:.{digits}f}"


def accuracy_table(rows: list[dict[str, Any]]) -> str:
    """Return what was trained as a Markdown table."""
    lines = [
        "| method | data, epochs | heads, parameters | narrow | peak, MiB | narrow | test accuracy, % | narrow |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for method, sets in TRAINED.items():
        for data, epochs in sets:
            wanted = {"net": SMALL, "method": method, "data": data, "epochs": epochs}
            own = [row for row in rows if wanted.items() <= row["key"].items()]
            pair = sorted(own, key=lambda row: row["key"]["head_width"])
            if len(pair) < 2:
                continue
            cells = [f"{row['heads']:,}" for row in pair] + [f"{row['peak'] / 2**20:.1f}" for row in pair]
            cells += [f"{100 * row['test_accuracy']:.1f}" for row in pair]
            lines.append(f"| `{method}` | {data}, {epochs} | {' | '.join(cells)} |")
    return "\n".join(lines)


def read(results: Path) -> list[dict[str, Any]]:
    """Return the results of earlier runs."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def add(results: Path, row: Mapping[str, Any]) -> None:
    """Add a result to the file."""
    with open(results, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
