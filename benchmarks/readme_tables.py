"""Write the tables of the README and of ``docs/`` that are made from the package and from recorded results.

Everything between ``<!-- generated: NAME -->`` and ``<!-- /generated -->`` is replaced, for the names in ``TABLES``::

    python benchmarks/readme_tables.py
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from localize import methods, recipes
from localize.recipes import Recipe
from localize.recipes.citations import cited
from localize.train import ledger, loop, sweep

HERE = Path(__file__).parent


METHODS_HEADER = ("| name | what trains a segment | source |", "|---|---|---|")


def methods_table() -> str:
    """Return one row for every method."""
    return "\n".join((*METHODS_HEADER, *(_method(name) for name in methods.names())))


def presets_table() -> str:
    """Return one row for every method, and for every preset of one that is for any model."""
    lines = [*METHODS_HEADER]
    presets = {name: recipes.load(name) for name in recipes.names() if name not in methods.names()}
    for name in methods.names():
        lines.append(_method(name))
        for preset, recipe in presets.items():
            if recipe.method == name and recipe.model is None:
                lines.append(f"| `{preset}` | {_preset(recipe)} | {cited(methods.get(name).reference)} |")
    return "\n".join(lines)


def _method(name: str) -> str:
    kind = methods.get(name)
    return f"| `{name}` | {_first_line(kind.__doc__)} | {cited(kind.reference)} |"


def _first_line(text: str | None) -> str:
    return (text or "").strip().splitlines()[0]


def _preset(recipe: Recipe) -> str:
    """Say of what a recipe is a preset."""
    options = ", ".join(f"{name}={value}" for name, value in recipe.options.items())
    terms = " and ".join(f"`{term.branch}`" for term in recipe.terms if term.branch != "own")
    return f"`{recipe.method}`" + (f" with {options}" if options else "") + (f" plus {terms}" if terms else "")


def measured_table() -> str:
    """Return what ``method_table.py`` has recorded."""
    benchmark = _benchmark("method_table")
    return benchmark.table(benchmark.read(HERE / "method_table.jsonl"))


def narrow_table() -> str:
    """Return what ``narrow_heads.py`` has predicted."""
    benchmark = _benchmark("narrow_heads")
    return benchmark.costs_table(benchmark.read(HERE / "narrow_heads.jsonl"))


def narrowed_table() -> str:
    """Return what ``narrow_heads.py`` has trained."""
    benchmark = _benchmark("narrow_heads")
    return benchmark.accuracy_table(benchmark.read(HERE / "narrow_heads.jsonl"))


def trained_table() -> str:
    """Return what ``localize compare --train ... --json`` has printed into ``trained.json``."""
    lines = ["| recipe | net | data | mean | std | n | hours |", "|---|---|---|---:|---:|---:|---:|"]
    for row in json.loads((HERE / "trained.json").read_text(encoding="utf-8"))["rows"]:
        name, net = f"`{row['recipe']}`", row["model"].partition("/")[2]
        numbers = f"{100 * row['mean']:.2f} | {100 * row['std']:.2f} | {len(row['accuracies'])} | {row['hours']:.2f}"
        lines.append(f"| {name} | {net} | {row['data']} | {numbers} |")
    return "\n".join(lines)


RUNS = HERE.parent / "results" / "runs.jsonl"
"""What ``localize compare --train ... --results results/runs.jsonl`` has written: one line for each finished run."""


def runs_table(book: Path = RUNS) -> str:
    """Return one row for every recipe that was trained as it stands now: the paper's number, and ours beside it."""
    lines = [
        "| recipe | data | paper | epoch | ours, last | ours, best | n | core-hours | command |",
        "|---|---|---:|---|---:|---:|---:|---:|---|",
    ]
    for name, runs in _finished(book).items():
        if not name.endswith("-short"):
            paper = next((one for one in recipes.load(name).expected if one.metric == "test_accuracy"), None)
            published = ("none", "") if paper is None else (f"{100 * paper.value:.2f}", paper.epoch)
            cells = (f"`{name}`", runs[0].data, *published, *_numbers(runs), f"`{runs[-1].command}`")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def short_table(book: Path = RUNS) -> str:
    """Return one row for every shortened recipe that was trained as it stands now."""
    lines = [
        "| recipe | epochs | last epoch | best epoch | n | core-hours | command |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for name, runs in _finished(book).items():
        if name.endswith("-short"):
            cells = (f"`{name}`", str(runs[0].epochs), *_numbers(runs), f"`{runs[-1].command}`")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _finished(book: Path) -> dict[str, list[ledger.Line]]:
    """Return the runs of every recipe that stands as it was trained, by its name; say which others there are."""
    found: dict[str, list[ledger.Line]] = {}
    for line in ledger.read(book):
        if line.recipe in recipes.names() and line.hash == _hash(line.recipe):
            found.setdefault(line.recipe, []).append(line)
        else:
            told = f"{line.recipe}, seed {line.seed}, was trained by other settings than those of the recipe now."
            print(told, file=sys.stderr)
    return dict(sorted(found.items()))


def _numbers(runs: list[ledger.Line]) -> tuple[str, str, str, str]:
    """Return last and best accuracy, the number of runs, and their core-hours, as they stand in a row."""
    hours = f"{sum(run.core_hours for run in runs):.2f}"
    return _mean([run.last for run in runs]), _mean([run.best for run in runs]), str(len(runs)), hours


def _mean(shares: list[float]) -> str:
    """Return mean and sample standard deviation in percent; the number alone where there is one."""
    spread = f" ± {100 * statistics.stdev(shares):.2f}" if len(shares) > 1 else ""
    return f"{100 * statistics.mean(shares):.2f}{spread}"


def _hash(name: str) -> str:
    """Return the hash of a packaged recipe as it is trained now."""
    with tempfile.TemporaryDirectory() as folder:  # of as many classes, for a recipe that is trained on a folder
        for number in range(recipes.load(name).num_classes or 0):
            Path(folder, "train", str(number)).mkdir(parents=True)
        (trial,) = sweep.plan([name], 1, "results/of-this-recipe", data_dir=folder)
        return sweep.digest(loop.merge(trial.config))


def published_table() -> str:
    """Return the test accuracies that papers print: recipes that differ in the data set alone are in one row."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for name in recipes.names():
        recipe = recipes.load(name)
        values = [one.value for one in recipe.expected if one.metric == "test_accuracy"]
        if values:
            data = recipe.train["data"]
            family = name.replace(data.removesuffix("_extra"), "*")
            found.setdefault((cited(recipe.paper), family), {})[data] = values[0]
    lines = [f"| paper | recipe | {' | '.join(SETS)} |", "|---|---|" + "---:|" * len(SETS)]
    for (paper, family), row in sorted(found.items()):
        cells = [f"{100 * row[data]:.2f}" if data in row else "" for data in SETS]
        lines.append(f"| {paper} | `{family}` | {' | '.join(cells)} |")
    return "\n".join(lines)


CHECKPOINT = "checkpoint"
RESNET110 = ("cifar/resnet110", 1024)
SAVED = ("backprop", CHECKPOINT, "auglocal --d 2", "auglocal --d 2 --recompute all", "dcl", "dcl --cut-by node")
"""Steps of ResNet-110 that the README shows."""
PEAKS: Mapping[tuple[str, int], tuple[str, ...]] = {
    RESNET110: (
        "backprop",
        CHECKPOINT,
        "auglocal --d 2",
        "auglocal --d 2 --recompute all",
        "auglocal --d 6",
        "auglocal --d 6 --recompute all",
        "auglocal --d 6 --recompute all --update immediate",
        "auglocal --d 2 --recompute all, bf16",
        "auglocal --d 6 --recompute all --update immediate, bf16",
        "dcl",
        "dcl --cut-by node",
        "dcl --cut-by node, bf16",
    ),
    ("cifar/vit", 512): ("backprop", CHECKPOINT, "dcl", "dcl --micro-batch 128"),
    ("cifar/vgg8b", 128): ("backprop", CHECKPOINT, "dcl"),
    ("tv/resnet50", 64): ("backprop", CHECKPOINT, "dcl"),
}
"""Steps of each net and batch that ``docs/results.md`` shows."""


def saved_table() -> str:
    """Return the peak memory of a few steps of one net, of what ``memory.py`` has recorded."""
    lines = ["| step | peak, MiB | of backprop's | arithmetic |", "|---|---:|---:|---:|"]
    lines += [f"| {step} | {numbers} |" for step, numbers in _peaks(RESNET110, SAVED)]
    return "\n".join(lines)


RIVALS = {
    "tv/resnet50": "ResNet-50 (torchvision)",
    "tv/mobilenet_v2": "MobileNetV2 (torchvision)",
    "timm/vit_small_patch16_224": "ViT-S/16 (timm)",
    "cifar/resnet110": "ResNet-110 (CIFAR)",
}
"""Nets that the README shows."""
WAYS = ("checkpoint", "accumulate", "combined", "ours, equal time", "ours")


def rivals_table() -> str:
    """Return the peaks of a few nets by the best rivals and by local steps, of what ``eight_nets.py`` has recorded."""
    lines = [
        "| net, batch | backprop, MiB | checkpointing | accumulation | both | `dcl`, equal time | `dcl`, leanest |"
    ]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    eight_nets = _benchmark("eight_nets")
    recorded = [row for row in _recorded("eight_nets") if row["opt"] == "sgd"]
    for net, title in RIVALS.items():
        rows = [row for row in recorded if row["net"] == net]
        base = next(row for row in rows if row["kind"] == "backprop")
        cells = [eight_nets.cell(rows, kind) for kind in WAYS]
        lines.append(f"| {title}, {base['batch']} | {base['peak'] / 2**20:,.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def eight_table() -> str:
    """Return the peaks of eight nets by the best rivals and by local steps."""
    return str(_benchmark("eight_nets").table(_recorded("eight_nets")))


def memory_table() -> str:
    """Return the peak memory of the steps of several nets, of what ``memory.py`` has recorded."""
    lines = ["| net, batch | step | peak, MiB | share | arithmetic |", "|---|---|---:|---:|---:|"]
    for net, steps in PEAKS.items():
        name = f"{net[0].partition('/')[2]}{' (torchvision)' * net[0].startswith('tv/')}, {net[1]}"
        for i, (step, numbers) in enumerate(_peaks(net, steps)):
            lines.append(f"| {'' if i else name} | {step} | {numbers} |".replace("|  |", "| |"))
    return "\n".join(lines)


def _peaks(net: tuple[str, int], steps: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield the name and the numbers of every step of a net."""
    rows = {row["step"].partition(" -K")[0]: row for row in _recorded("memory") if (row["model"], row["batch"]) == net}
    base = rows["backprop"]
    for step in steps:
        row, (name, *form) = rows[step], step.split(", ")
        share, times = row["peak"] / base["peak"], row["macs"] / base["macs"]
        yield ", ".join([f"`{name}`", *form]), f"{row['peak'] / 2**20:,.1f} | {share:.3f} | {times:.2f}"


TIMED = {
    ("cifar/resnet110", "auglocal --d 2"): 1.87,
    ("cifar/resnet110", "auglocal --d 6"): 3.15,
    ("cifar/resnet110", "dcl"): None,
    ("cifar/vgg8b", "dcl"): None,
}
"""Steps that ``docs/cost.md`` shows, and the number of AugLocal's Table 7."""
NETS = {"cifar/resnet110": "ResNet-110", "cifar/vgg8b": "VGG8B"}


def time_table() -> str:
    """Return the time of steps relative to backprop's, of what ``step_time.py`` has recorded."""
    rows = {(row["net"], row["step"], row["compiled"]): row for row in _recorded("step_time")}
    header = (
        "net | method | arithmetic | eager",
        "convolutions alone | compiled | eager, to the same loop by hand | paper",
    )
    lines = [f"| {' | '.join(header)} |", "|---|---|---:|---:|---:|---:|---:|---:|"]
    for (net, step), paper in TIMED.items():
        eager, compiled = rows[net, step, False], rows[net, step, True]
        numbers = (eager["bound"], eager["ratio"], eager["convolutions"], compiled["ratio"], eager["by_hand"], paper)
        cells = " | ".join("" if number is None else f"{number:.2f}" for number in numbers)
        lines.append(f"| {NETS[net]} | `{step}` | {cells} |".replace("|  |", "| |").replace("|  |", "| |"))
    return "\n".join(lines)


def conversion_table() -> str:
    """Return the seconds of conversions, as ``convert_time.py`` has printed them."""
    lines = ["| model | method | total | trace | heads and plan | drawing the weights of heads |"]
    lines.append("|---|---|---:|---:|---:|---:|")
    for row in _recorded("convert_time"):
        cells = " | ".join(f"{row[key]:.2f}" for key in ("total", "trace", "plan", "draw"))
        lines.append(f"| {row['model']} | `{row['step']}` | {cells} |")
    return "\n".join(lines)


def _recorded(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (HERE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def _benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def figures_table() -> str:
    """Return one row for every table and figure of the papers: the command that makes it, or why there is none."""
    lines = ["| paper | item | shows | command | recipes, remarks |", "|---|---|---|---|---|"]
    for paper in yaml.safe_load((HERE / "papers.yaml").read_text(encoding="utf-8")):
        for one in paper["items"]:
            command = f"`{one['command']}`" if "command" in one else f"none: {one['why']}"
            remarks = [f"`{pattern}`" for pattern in one.get("recipes", ())] + [one[k] for k in ("note",) if k in one]
            lines.append(f"| {paper['paper']} | {one['item']} | {one['shows']} | {command} | {', '.join(remarks)} |")
    return "\n".join(lines)


def tried_line() -> str:
    """Return the sentence that says how many packaged recipes were tried."""
    rows = _recorded("every_recipe")
    (batch,) = {row["batch_size"] for row in rows}
    trained = sum(row["ok"] for row in rows)
    return (
        f"{trained} of {len(recipes.names())} packaged recipes convert their models and train for "
        f"two steps on random images\nof their data set's size, batch {batch}, with their own optimizers."
    )


SETS = ("mnist", "fashion_mnist", "cifar10", "cifar100", "svhn", "svhn_extra", "stl10", "imagenet")


def order_table() -> str:
    """Return ways to train by predicted and measured time, and how well their orders agree."""
    return str(_benchmark("time_order").table(HERE / "time_order.jsonl"))


def parts_table() -> str:
    """Return one row for every step in exact parts that was predicted or timed beside backprop."""
    lines = ["| net, batch | parts; kept | backprop MiB | parts MiB | memory | arithmetic | time | allocated MiB |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|---:|")
    for row in map(json.loads, (HERE / "exact_parts.jsonl").read_text().splitlines()):
        asked = row["parts"]
        size = f"`{asked.get('micro_batch_at', asked.get('micro_batch'))}`"
        kept = f"; `{asked['keep_at']}`" if "keep_at" in asked else ""
        pixels = f", {row['pixels']} pixels" if row["pixels"] != 32 else ""
        shown = [f"{row['backprop MiB']:,.0f}", f"{row['parts MiB']:,.1f}", f"{row['memory']:.4f}"]
        shown += [
            f"{row['arithmetic']:.2f}",
            f"{row['time']:.2f}" if row["n"] else "",
            f"{row.get('allocated MiB', '')}",
        ]
        net = row["net"].partition("/")[2]
        lines.append(f"| {net}{pixels}, {row['batch']:,} | {size}{kept} | {' | '.join(shown)} |")
    return "\n".join(lines)


def live_table() -> str:
    """Return the bytes that live in each process of a pipeline, beside what is predicted."""
    lines = ["| net, method | process | held | largest step | at cuts | predicted | measured | measured / predicted |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|---:|")
    for row in _pipelines("live"):
        for number, rank in enumerate(row["ranks"]):
            parts = ("resident", "largest segment", "boundaries", "predicted", "measured")
            cells = " | ".join(f"{rank[part] / 2**20:.2f}" for part in parts)
            name, which = f"{row['model']}, `{row['method']}`", f"{number} of {row['processes']}"
            lines.append(f"| {name} | {which} | {cells} | {rank['measured'] / rank['predicted']:.3f} |")
    return "\n".join(lines)


def path_table() -> str:
    """Return the longest step among the processes of a pipeline, beside that of one process."""
    lines = ["| method | image | processes | one, ms | each, ms | predicted | measured | share | nothing to do |"]
    lines.append("|---|---|---:|---:|---|---:|---:|---:|---:|")
    for row in _pipelines("path"):
        each, name = ", ".join(f"{one:.0f}" for one in row["ms"]), f"`{row['method']}`"
        name += f", d={row['d']}" if "d" in row else ""
        side = "x".join(map(str, row["image"][1:]))
        about = f"{name} | {side} | {row['processes']} | {row['ms of one']:.0f} | {each}"
        shown = f"{row['predicted']:.2f} | {row['speedup']:.2f} | {row['speedup'] / row['predicted']:.2f}"
        lines.append(f"| {about} | {shown} | {row['bubble']:.2%} |")
    return "\n".join(lines)


def delayed_table() -> str:
    """Return accuracies with a dictionary that reaches earlier layers a batch late, beside the sequential forms."""
    lines = ["| form | net, data, epochs | test accuracy of each seed, % | mean, % |", "|---|---|---|---:|"]
    for row in _pipelines("delay"):
        each = ", ".join(f"{100 * one:.2f}" for one in row["accuracies"])
        what = f"{row['model'].rpartition('/')[2]}, {row['data']}, {row['epochs']}"
        lines.append(f"| `{row['form']}` | {what} | {each} | {100 * statistics.mean(row['accuracies']):.2f} |")
    return "\n".join(lines)


def _pipelines(what: str) -> list[dict[str, Any]]:
    return [row for row in _recorded("pipelines") if row["what"] == what]


TABLES: Mapping[str, Callable[[], str]] = {
    "methods": methods_table,
    "presets": presets_table,
    "saved": saved_table,
    "rivals": rivals_table,
    "memory": memory_table,
    "time": time_table,
    "conversion": conversion_table,
    "measured": measured_table,
    "narrow": narrow_table,
    "narrowed": narrowed_table,
    "trained": trained_table,
    "runs": runs_table,
    "short": short_table,
    "published": published_table,
    "figures": figures_table,
    "tried": tried_line,
    "parts": parts_table,
    "order": order_table,
    "eight": eight_table,
    "path": path_table,
    "live": live_table,
    "delayed": delayed_table,
}


def pages() -> list[Path]:
    """Return the README and the pages of ``docs/``."""
    return [HERE.parent / "README.md", *sorted((HERE.parent / "docs").rglob("*.md"))]


def main() -> None:
    """Replace the tables of all pages."""
    for page in pages():
        text = page.read_text(encoding="utf-8")
        for name, make in TABLES.items():
            start, end = f"<!-- generated: {name} -->\n", "<!-- /generated -->"
            if start in text:
                before, _, rest = text.partition(start)
                text = before + start + make() + "\n" + end + rest.partition(end)[2]
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
