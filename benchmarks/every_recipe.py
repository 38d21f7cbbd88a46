"""Every packaged recipe loads, converts its model, and trains for two steps on random images of its data set's size.

Model, classes, image size, cuts, optimizer and learning rate of the first epoch are the recipe's; only the batch is
smaller. A recipe that names no model is tried on the models of ``ANY_MODEL``, and the first that its method applies to
is taken. A row says what was converted, the seconds it took, and the largest local loss of each step; a loss that is
not finite, or a step that leaves every weight as it was, fails. Results go into a JSONL file one by one; what is found
there is not repeated::

    nice -n 19 python benchmarks/every_recipe.py --threads 1
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import localize
from localize import recipes, zoo
from localize.errors import LocalizeError, MethodError
from localize.recipes import Recipe
from localize.runtime.model import LocalModel
from localize.train import TrainConfig, optimizers, passes
from localize.train.schedules import learning_rate

ANY_MODEL = ("cifar/resnet20", "cifar/fc_mnist")
STEPS = 2


def main() -> None:
    """Run what is missing and print the table; exit code 1 if a recipe fails."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipes", nargs="*", help="only these")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--print", action="store_true", help="print what is there, and run nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = read(args.results)
    for name in () if args.print else args.recipes or recipes.names():
        if name not in found:
            found[name] = tried(name, args.batch_size)
            with args.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found[name]) + "\n")
            print(line(found[name]), flush=True)
    print(table(list(found.values())))
    raise SystemExit(not all(row["ok"] for row in found.values()))


def tried(name: str, batch_size: int) -> dict[str, Any]:
    """Return the row of a recipe; what it raises is in the row."""
    row: dict[str, Any] = {"recipe": name, "ok": False, "batch_size": batch_size}
    try:
        return row | {"ok": True, **steps(recipes.load(name), batch_size)}
    except (LocalizeError, RuntimeError, ValueError, AssertionError, TypeError, KeyError) as error:
        return row | {"error": type(error).__name__, "message": str(error)}


def steps(recipe: Recipe, batch_size: int) -> dict[str, Any]:
    """Convert the model of a recipe, train it for ``STEPS`` steps, and say what was found.

    Raises:
        LocalizeError: the recipe cannot be carried out, or a loss is not finite.
        AssertionError: no weight has changed.
    """
    torch.manual_seed(0)
    started = time.perf_counter()
    local = convert(recipe)
    converted = time.perf_counter()
    config = TrainConfig(local.plan.segments.trunk.name, recipe=recipe, **recipe.train)
    optimizer = optimizers.create_optimizer(local, config)
    optimizers.set_learning_rate(optimizer, learning_rate(config, 1))
    local.train()
    before = [parameter.detach().clone() for parameter in local.parameters()]
    x = torch.randn(batch_size, *local.plan.segments.trunk.input_shape)
    y = torch.arange(batch_size) % local.plan.segments.trunk.num_classes
    losses = []
    for step in range(STEPS):
        values = local.step(x, y, optimizer).losses
        found = torch.stack([loss.float() for loss in values.values()])
        passes.check_finite(local, list(values), found[None], step)
        losses.append(float(found.max()))
    finished = time.perf_counter()
    changed = sum(not torch.equal(a, b) for a, b in zip(before, local.parameters(), strict=True))
    assert changed, "two steps have changed no weight"
    return {
        "model": local.plan.segments.trunk.name,
        "method": local.plan.method,
        "input_shape": list(local.plan.segments.trunk.input_shape),
        "classes": local.plan.segments.trunk.num_classes,
        "segments": len(local.plan.segments),
        "losses": len(local.plan.losses),
        "convert_seconds": round(converted - started, 2),
        "step_seconds": round((finished - converted) / STEPS, 2),
        "largest_loss": losses,
    }


def convert(recipe: Recipe) -> LocalModel:
    """Make the model of a recipe and give it local losses; of no model, the first that its method applies to."""
    refused: MethodError | None = None
    for name in [recipe.model] if recipe.model else ANY_MODEL:
        model = zoo.create_model(name, recipe.num_classes, input_shape=recipe.input_shape, **recipe.model_options)
        shape = zoo.input_shape_of(zoo.resolve(name), model, recipe.input_shape)
        try:
            return localize.transform(model, recipe, example_input=torch.zeros(2, *shape), name=name)
        except MethodError as error:
            refused = error
    assert refused is not None
    raise refused


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Return the rows in a file by the names of their recipes."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {row["recipe"]: row for row in map(json.loads, lines)}


def line(row: dict[str, Any]) -> str:
    """Return a row as a line of the table."""
    if not row["ok"]:
        return f"| `{row['recipe']}` | {row['error']}: {row['message'].splitlines()[0] if row['message'] else ''} |"
    sizes = "x".join(map(str, row["input_shape"]))
    first, last = row["largest_loss"][0], row["largest_loss"][-1]
    seconds = f"{row['convert_seconds']:.1f} | {row['step_seconds']:.2f}"
    return (
        f"| `{row['recipe']}` | {row['model']} | {sizes} | {row['segments']} | {row['losses']} | {seconds} "
        f"| {first:.3g} | {last:.3g} |"
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Return all rows, sorted by name, and how many recipes train."""
    head = [
        "| recipe | model | image | segments | losses | convert, s | step, s | largest loss | behind one step |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    body = [line(row) for row in sorted(rows, key=lambda row: row["recipe"])]
    return "\n".join([*head, *body, "", f"{sum(row['ok'] for row in rows)} of {len(rows)} recipes train"])


if __name__ == "__main__":
    main()
