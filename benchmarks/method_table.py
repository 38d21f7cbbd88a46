"""Every method on one net, on digits and mnist5k: accuracy after few epochs, what it adds, memory and time of a step.

Convolutional methods train a ResNet-32 on images of 16x16 pixels, cut at every block; forward learning and feedback
alignment a fully connected net (784-1024-1024-10). All methods of a net get the same epochs, batch size, optimizer and
learning rate, which is theirs to suffer from: this says what runs, not which method is best.

``memory`` is the peak of the bytes of live tensors during one training step, beyond what lives before it (parameters,
optimizer state, the batch), ``time`` the median time of a step; both as shares of backprop on the same net, and the
steps of both are interleaved. Accuracies are those of the last epoch, in percent of the test images, one seed. Results
go into a JSONL file one by one; what is found there is not repeated::

    python benchmarks/method_table.py --threads 1
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import localize
from localize import recipes, zoo
from localize.errors import LocalizeError
from localize.estimate import memory
from localize.train import TrainConfig, run


@dataclass(frozen=True)
class Net:
    """A net, how it is trained, and by which methods."""

    model: str
    input_shape: tuple[int, int, int]
    training: Mapping[str, Any]
    methods: tuple[str, ...]


SGD = {"opt": "sgd", "lr": 0.05, "weight_decay": 1e-4, "batch_size": 64}
ADAMW = {"opt": "adamw", "lr": 5e-4, "weight_decay": 0.01, "batch_size": 64}
NETS = (
    Net(
        "cifar/resnet32",
        (3, 16, 16),
        SGD,
        (
            "backprop", "checkpoint", "accumulate", "deep-supervision", "auglocal", "auglocal-infopro", "dgl",
            "predsim", "ll-pred", "ll-sim", "ll-bpf", "infopro", "infopro-softmax", "ll-cont", "ll-contrec", "feat",
            "dcl", "dcl-s", "dcl-o", "dcl-ld", "cfl", "mlaan", "mlaan-code", "mlaan-dgl", "mlaan-infopro", "mlm", "lam",
        ),
    ),
    Net("cifar/fc_mnist", (1, 28, 28), ADAMW, ("backprop", "ff", "symba", "pff", "drtp", "cafo", "fa", "dfa")),
)  # fmt: skip
EPOCHS = {"digits": 3, "mnist5k": 1}
STEPS = 15


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", nargs="+", choices=EPOCHS, default=list(EPOCHS))
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--print", action="store_true", help="print what is there, and run nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for net in NETS:
        for method in net.methods:
            if args.methods and method not in args.methods:
                continue
            for data in args.data:
                key = {"model": net.model, "input_shape": list(net.input_shape), "method": method, "data": data,
                       "epochs": EPOCHS[data], **net.training}  # fmt: skip
                if not args.print and key not in [row["key"] for row in read(args.results)]:
                    add(args.results, {"key": key, **accuracy(net, method, data)})
            key = {"model": net.model, "input_shape": list(net.input_shape), "method": method, "step": STEPS}
            if not args.print and key not in [row["key"] for row in read(args.results)]:
                add(args.results, {"key": key, **cost(net, method)})
    print(table(read(args.results)))


def accuracy(net: Net, method: str, data: str) -> dict[str, Any]:
    """Train once, in a temporary folder."""
    folder = tempfile.mkdtemp()
    try:
        config = TrainConfig(
            net.model, recipe=method, input_shape=net.input_shape, data=data, epochs=EPOCHS[data], device="cpu",
            output=f"{folder}/run", **net.training,
        )  # fmt: skip
        return {"test_accuracy": run(config).metrics[-1]["test_accuracy"]}
    except LocalizeError as error:
        return {"refused": str(error)}
    finally:
        shutil.rmtree(folder)


def cost(net: Net, method: str) -> dict[str, Any]:
    """Compare one step of a method with one of backprop: parameters, bytes, time."""
    torch.manual_seed(0)
    x, y = torch.randn(net.training["batch_size"], *net.input_shape), torch.arange(net.training["batch_size"]) % 10
    made = {name: make(net, name, x) for name in dict.fromkeys(("backprop", method))}
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(STEPS):
        for name, (local, optimizer) in made.items():
            started = time.perf_counter()
            local.step(x, y, optimizer)
            times[name].append(time.perf_counter() - started)
    found = {name: memory.measure(local, x, y, optimizer) for name, (local, optimizer) in made.items()}
    peaks = {name: footprint.peak - footprint.resident for name, footprint in found.items()}
    local, _ = made[method]
    medians = {name: statistics.median(measured[3:]) for name, measured in times.items()}
    return {
        "segments": len(local.plan.segments),
        "added_parameters": sum(p.numel() for p in local.heads.parameters()),
        "memory": peaks[method] / peaks["backprop"],
        "time": medians[method] / medians["backprop"],
        "backprop_bytes": peaks["backprop"],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def make(net: Net, method: str, x: Tensor) -> tuple[localize.LocalModel, torch.optim.Optimizer]:
    """Return a local model and its optimizer."""
    model = zoo.create_model(net.model, input_shape=net.input_shape).train()
    local = localize.transform(model, recipes.load(method), example_input=x)
    kind = torch.optim.SGD if net.training["opt"] == "sgd" else torch.optim.AdamW
    more = {"momentum": 0.9, "nesterov": True} if kind is torch.optim.SGD else {}
    return local, kind(local.param_groups(lr=net.training["lr"]), lr=net.training["lr"], **more)


def read(results: Path) -> list[dict[str, Any]]:
    """Return the results of earlier runs."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def add(results: Path, row: Mapping[str, Any]) -> None:
    """Add a result to the file."""
    with open(results, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| net | method | digits, % | mnist5k, % | segments | added parameters | memory | time |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for net in NETS:
        for method in net.methods:
            own = [r for r in rows if (r["key"]["model"], r["key"]["method"]) == (net.model, method)]
            found = {r["key"].get("data", "step"): r for r in own}
            if "step" not in found:
                continue
            cells = [_percent(found.get(data)) for data in EPOCHS]
            step = found["step"]
            cells += [str(step["segments"]), f"{step['added_parameters']:,}"]
            cells += [f"{step['memory']:.2f}", f"{step['time']:.2f}"]
            lines.append(f"| {net.model.removeprefix('cifar/')} | `{method}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _percent(row: Mapping[str, Any] | None) -> str:
    return f"{100 * row['test_accuracy']:.1f}" if row and "test_accuracy" in row else ""


if __name__ == "__main__":
    main()
