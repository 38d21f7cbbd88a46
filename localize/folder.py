"""The folder that ``localize convert`` writes, and back from it to a model.

::

    recipe.yaml     what was asked, every default written out
    train_step.py   the training step: what runs, and what is audited again
    plan.json       what was built: segments, losses, blocks, costs
    ownership.csv   which losses train which parameter
    audit.json      the checks, for programs
    audit.md        the checks, for people
    graph.svg       the picture
    rank_0.py, ...  with --stages: the training step of each rank, and partition.json
    README.md       a card: how to train, audit and export

The same recipe and versions give the same bytes: no times, no ids, no paths.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from localize import recipes
from localize.auditor import MAX_BYTES, audit, ownership_csv, static, to_dict, to_markdown
from localize.build import build, random_batch, versions
from localize.errors import MissingError
from localize.files import VERSION, check_version, flush
from localize.ir import AuditReport, Check, LocalLoss, Plan
from localize.pictures.plan import graph_svg
from localize.pipeline import described
from localize.recipes import Recipe, trust
from localize.recipes.validation import kind_of
from localize.runtime.model import LocalModel

STEP, PLAN, AUDIT = "train_step.py", "plan.json", "audit.json"


FILES = (recipes.FILE_NAME, STEP, PLAN, "ownership.csv", AUDIT, "audit.md", "graph.svg", "README.md")


def describe(local: LocalModel) -> dict[str, Any]:
    """Return what was built, as plain values: the object of ``plan.json`` and of ``convert --json``.

    ``parameters`` count elements, frozen ones included; ``macs`` are the multiply-adds of convolutions and linear
    layers for one image; ``fvcore_flops`` adds 2 per BatchNorm element and 1 per pooled input element. ``totals``
    count what one training forward runs: a segment that two losses run counts twice.
    """
    plan = local.plan
    trunk = plan.segments.trunk
    return {
        "version": VERSION,
        "model": trunk.name,
        "method": plan.method,
        "options": dict(plan.options),
        **({"loss": dict(plan.loss)} if plan.loss else {}),
        "input_shape": list(trunk.input_shape),
        "inputs": [{"name": a.name, "shape": list(a.shape or ()), "type": str(a.dtype)} for a in trunk.inputs],
        "constants": {a.name: repr(a.constant) for a in trunk.arguments if a.shape is None},
        "num_classes": trunk.num_classes,
        "update": plan.update,
        "segments": [
            {
                "index": segment.index,
                "name": segment.name,
                "parameters": segment.size,
                "ends_at": segment.ends_at,
                "features": [{"kind": f.kind, "shape": list(f.shape)} for f in segment.features],
                **({"schedule": told} if (told := plan.schedule_of(segment)) else {}),
            }
            for segment in plan.segments.segments
        ],
        "losses": [_describe_loss(loss) for loss in plan.losses],
        "outputs": list(_describe_outputs(plan)),
        "leaves": list(trunk.leaves),
        "blocks": [
            {
                "name": block.name,
                "role": block.role,
                "parameters": block.size,
                "macs": block.macs,
                "fvcore_flops": block.fvcore_flops,
                **_plain(block.facts),
            }
            for block in plan.blocks
        ],
        "frozen": list(plan.frozen),
        **({"scores": plan.scores} if plan.scores != "all" else {}),
        **({"answer": plan.answer} if plan.answer != "output" else {}),
        "recomputed": list(plan.recompute),
        **(
            {
                "micro_batch": [plan.part_size(loss) for loss in plan.losses],
                "exact": plan.exact,
                **({"kept": dict(plan.kept)} if plan.kept else {}),
            }
            if plan.micro_batch
            else {}
        ),
        "copies": [dataclasses.asdict(copy) for copy in plan.copies],
        "feedback": [list(pair) for pair in plan.feedback],
        "reference": plan.reference,
        "deviations": list(plan.deviations),
        "totals": _totals(local),
        "versions": versions(),
    }


def describe_audit(report: AuditReport) -> dict[str, Any]:
    """Return what an audit has found, as plain values: the object of ``audit.json`` and of ``audit --json``."""
    return {"version": VERSION, **to_dict(report)}


def _describe_outputs(plan: Plan) -> Iterator[dict[str, Any]]:
    """Yield the further outputs of the model, each with what trains it: nothing, where the deviations say why."""
    for side in plan.segments.trunk.sides:
        trained = [(loss, term) for loss in plan.losses for term in loss.terms if term.side == side.name]
        yield {
            "name": side.name,
            "trained_by": [loss.name for loss, _ in trained],
            "weight": trained[0][1].weight if trained else 0.0,
        }


def _describe_loss(loss: LocalLoss) -> dict[str, Any]:
    heads = [term.head for term in loss.terms]
    return {
        "name": loss.name,
        "route": [loss.route.start, loss.route.stop],
        "head": next((head for head in heads if head is not None), None),
        "weight": loss.terms[0].weight,
        "reach": list(loss.reach),
        "terms": [
            {
                "loss": term.loss,
                "head": term.head,
                "weight": term.weight,
                "uses": [dataclasses.asdict(use) for use in term.uses],
                "target": dataclasses.asdict(term.target),
                "at": loss.route.stop if term.at is None else term.at,
                "detached": term.detached,
                **({"options": dict(term.options)} if term.options else {}),
                **({"weights": term.weights} if term.weights is not None else {}),
                **({"stream": term.stream} if term.stream is not None else {}),
                **({"output": term.side} if term.side is not None else {}),
            }
            for term in loss.terms
        ],
        **({"part": list(loss.part)} if loss.part else {}),
    }


def _totals(local: LocalModel) -> dict[str, int]:
    plan = local.plan
    trunk = sum(parameter.numel() for parameter in local.trunk.parameters())
    heads = sum(parameter.numel() for parameter in local.heads.parameters())
    return {
        "trunk_parameters": trunk,
        "training_parameters": trunk + heads,
        "trunk_macs": sum(block.macs for block in plan.blocks if block.role == "segment"),
        "training_macs": _run(plan, "macs"),
        "trunk_fvcore_flops": sum(block.fvcore_flops for block in plan.blocks if block.role == "segment"),
        "training_fvcore_flops": _run(plan, "fvcore_flops"),
    }


def _run(plan: Plan, cost: str) -> int:
    """Add up the cost of every block that one training forward of an image runs.

    A segment that two losses run counts twice, and so does a block that is recomputed; streams count one by one.
    """
    streams = plan.input.streams if plan.input else 1
    total = 0.0
    for loss in plan.losses:
        share = streams / (loss.part[1] if loss.part else 1)
        for k in range(loss.route.start, loss.route.stop + 1):
            run = [f"segment_{k}", *(f"side_{name}" for name in plan.segments.segments[k].sides)]
            times = 2 if f"segment_{k}" in plan.recompute else 1
            total += share * times * sum(getattr(plan.block(name), cost) for name in run)
        read = {name for t in loss.terms for name in (t.head, t.target.block, *(use.block for use in t.uses)) if name}
        total += share * sum(getattr(plan.block(name), cost) * (1 + (name in plan.recompute)) for name in read)
    return round(total)


def resolved(local: LocalModel, recipe: Recipe) -> Recipe:
    """Return the recipe that ``local`` was made by, with model, shapes and options written out."""
    trunk = local.plan.segments.trunk
    return dataclasses.replace(
        recipe,
        model=trunk.name,
        num_classes=trunk.num_classes,
        input_shape=tuple(trunk.input_shape),
        options=dict(local.plan.options),
        loss=dict(local.plan.loss),
        outputs={
            **recipe.outputs,
            **{output["name"]: output["weight"] for output in _describe_outputs(local.plan) if output["trained_by"]},
        },
    )


def texts(
    local: LocalModel, recipe: Recipe, report: AuditReport, built_with: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return the files of the folder by name; ``built_with`` are versions of libraries, default those at hand."""
    plan = describe(local)
    plan["versions"] = dict(built_with or plan["versions"])
    return {
        recipes.FILE_NAME: recipes.dump(resolved(local, recipe)),
        STEP: local.source,
        PLAN: to_json(plan),
        "ownership.csv": ownership_csv(local),
        AUDIT: to_json(describe_audit(report)),
        "audit.md": to_markdown(report, f"Audit of {plan['model']} by {plan['method']}"),
        "graph.svg": graph_svg(local),
        "README.md": _card(plan, report),
    }


def reaudit(
    path: str | Path, accept: Collection[int] = (), *, trust_code: bool = False
) -> tuple[LocalModel, AuditReport]:
    """Audit a folder as it lies there: the text of its step, its execution on a random batch, and its other files.

    Model and files are made again from the folder's recipe, and each file that says something else is named. Nothing of
    its text runs before the audit has matched every statement with the plan.

    Returns:
        What the recipe makes, and what the audit found about the folder's text.

    Raises:
        MissingError: the folder has no recipe or no training step, or its plan or audit is not what convert writes.
        VersionError: a later version of localize has written it.
        LocalizeError: the recipe cannot be carried out.
    """
    folder = Path(path)
    for name in (recipes.FILE_NAME, STEP):
        if not (folder / name).is_file():
            raise MissingError(
                f"{path} is not a folder that convert has written.",
                facts=f"it has no {name}." if folder.is_dir() else "there is no such folder.",
                help="localize convert MODEL --method NAME -o DIR makes one",
            )
    for name in (PLAN, AUDIT):
        _check_version_of(folder / name)
    recipe = recipes.load(folder)
    trust.refuse_untrusted(folder, recipe, trust_code=trust_code)
    local = build(recipe)
    edited = local.with_source(_read(folder / STEP), str(folder / STEP))
    report = audit(edited, random_batch(local), accept=accept)
    return edited, dataclasses.replace(report, checks=(*report.checks, _files(folder, local, recipe)))


def _files(folder: Path, local: LocalModel, recipe: Recipe) -> Check:
    """Compare the other files of a folder with those that its recipe and its model give.

    What the checks found is theirs to say again. A picture and a card are compared where this version has written them.
    An option of the method that neither recipe nor plan states is one that a later version has added: it is at its
    default.
    """
    wanted = texts(local, recipe, static(local), _versions_of(folder / PLAN))
    stated = {name: _read(folder / name) for name in wanted if (folder / name).is_file()}
    told = json.loads(stated[PLAN]).get("options") if PLAN in stated else None
    later = {*local.plan.options} - {*recipe.options} - {*(told if isinstance(told, dict) else ())}
    complete = resolved(local, recipe)
    before = {name: value for name, value in complete.options.items() if name not in later}
    wanted[recipes.FILE_NAME] = recipes.dump(dataclasses.replace(complete, options=before))
    if recipes.dump(recipe) == wanted[recipes.FILE_NAME]:
        stated.pop(recipes.FILE_NAME)  # the same, whatever its comments, order and quotes
    lines = []
    for name in (recipes.FILE_NAME, PLAN, "ownership.csv", "graph.svg", "README.md"):
        if name not in stated or (name in ("graph.svg", "README.md") and not _is_of_this_version(stated.get(PLAN, ""))):
            continue
        found, right = stated[name], wanted[name]
        if name == PLAN:
            right = to_json(_as_before(json.loads(right), later, version=_is_of_this_version(found)))
        if found != right:
            lines.append(f"{name}, {_first_difference(found, right)}")
    claim = "recipe, plan, ownership, picture and card of the folder say what its recipe and its model give"
    return Check("folder.files", not lines, claim, "\n".join(lines) or "nothing differs")


def _as_before(plan: dict[str, Any], later: Collection[str], *, version: bool) -> dict[str, Any]:
    """Return a plan without options that were added later, and with or without its version."""
    options = {name: value for name, value in plan["options"].items() if name not in later}
    return {key: value for key, value in {**plan, "options": options}.items() if version or key != "version"}


def _is_of_this_version(plan: str) -> bool:
    """Tell whether a plan is of the form that this version writes."""
    return f'"version": {VERSION}' in plan


def _first_difference(found: str, wanted: str) -> str:
    """Describe the first line in which two texts differ."""
    pairs = itertools.zip_longest(found.splitlines(), wanted.splitlines(), fillvalue="nothing")
    for number, (one, other) in enumerate(pairs, start=1):
        if one != other:
            return f"line {number}: {one.strip()[:80]!r}, where recipe and model give {other.strip()[:80]!r}"
    return "which differs in its line ends"


def _versions_of(path: Path) -> dict[str, str] | None:
    """Return the versions of libraries that a folder was written with."""
    try:
        stated = json.loads(_read(path)).get("versions")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    if not isinstance(stated, dict) or stated.keys() != versions().keys():
        return None
    return stated if all(isinstance(value, str) for value in stated.values()) else None


def _read(path: Path) -> str:
    """Return a text as it lies there; of one that no audit reads, its beginning."""
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1).decode("utf-8", errors="replace")


def _check_version_of(path: Path) -> None:
    """Refuse a plan or an audit that a later version has written; a folder without the file is none."""
    if not path.is_file():
        return
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise MissingError(f"{path} is not JSON.", facts=str(error), help="localize convert again") from error
    if not isinstance(held, dict):
        raise MissingError(
            f"{path} is not what convert writes.",
            facts=f"it holds {kind_of(held)}, not an object.",
            help="localize convert again",
        )
    check_version(held.get("version"), str(path))


def to_json(value: Any) -> str:
    """Return the JSON text that this package writes and prints."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def check_free(path: str | Path, *, force: bool = False) -> None:
    """Refuse a name for a new folder that is taken; ``force`` allows what an earlier ``convert`` has written there.

    Raises:
        MissingError: the name is taken.
    """
    path = Path(path)
    if not os.path.lexists(path):
        return
    if not force:
        raise MissingError(f"{path} exists.", help="another -o, or --force to replace it")
    if path.is_symlink() or not path.is_dir():
        raise MissingError(f"{path} exists and is not a folder.", help="another -o")
    foreign = sorted(child.name for child in path.iterdir() if not _is_ours(child.name))
    if foreign:
        raise MissingError(
            f"{path} holds files that localize has not written.",
            facts=f"--force replaces the whole folder, and would delete {', '.join(foreign[:5])}.",
            help="another -o",
        )


def _is_ours(name: str) -> bool:
    return name in (*FILES, described.FILE) or re.fullmatch(r"rank_\d+\.py", name) is not None


def write(
    local: LocalModel,
    recipe: Recipe,
    report: AuditReport,
    path: str | Path,
    *,
    force: bool = False,
    ranks: Mapping[str, str] | None = None,
) -> Path:
    """Write the folder in one step: it is there whole, or not at all.

    Args:
        local: what was built.
        recipe: by what.
        report: what its audit found.
        path: folder to make.
        force: replace what an earlier call has written there.
        ranks: what :func:`localize.pipeline.described.files` returns, where the step is shared out to ranks.

    Raises:
        MissingError: the name is taken, or cannot be written.
    """
    check_free(path, force=force)
    written = write_files({**texts(local, recipe, report), **(ranks or {})}, path)
    trust.remember(resolved(local, recipe))
    return written


def write_files(files: Mapping[str, str], path: str | Path) -> Path:
    """Write texts as a folder, in one step, in the place of what is there.

    Everything is written and flushed beside the final name first; the rename is the last step. What fails before it
    leaves no trace; what fails in it puts back what was there.

    Raises:
        MissingError: it cannot be written.
    """
    given, path = path, Path(os.path.abspath(path))
    made = [parent for parent in (path.parent, *path.parent.parents) if not parent.exists()]
    fresh = old = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        fresh.chmod(0o777 & ~_umask())
        for name, text in files.items():
            with open(fresh / name, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        flush(fresh)
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent)) / "old"
            path.rename(old)
        fresh.rename(path)
        flush(path.parent)
    except BaseException as error:
        if old is not None and old.exists() and not path.exists():
            old.rename(path)
        if fresh is not None:
            shutil.rmtree(fresh, ignore_errors=True)
        for parent in made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        if isinstance(error, OSError):
            raise MissingError(f"{given} cannot be written.", facts=str(error), help="another -o") from error
        raise
    finally:
        if old is not None and path.exists():
            shutil.rmtree(old.parent, ignore_errors=True)
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _plain(value: Any) -> Any:
    """Return mappings as dicts and sequences as lists, all the way down, for JSON."""
    if isinstance(value, Mapping):
        return {str(key): _plain(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(child) for child in value]
    return value


_CARD = """\
# {model}, trained by {method}

Written by `localize convert`. `train_step.py` is the training step: what it says is what runs.

## What was asked

| | |
|---|---|
| model | `{model}`, input {shape}, {num_classes} classes |
| method | `{method}` |
{options}
## What was built

{segments} segments, {losses} losses, {heads} heads and shared blocks. {checks}{outputs}{leaves}{schedule}

| | parameters | multiply-adds for one image |
|---|---:|---:|
| the model | {trunk_parameters:,} | {trunk_macs:,} |
| all that training runs | {training_parameters:,} | {training_macs:,} |

Parameters count elements, frozen ones included. Multiply-adds are those of convolutions and linear layers in one
forward; what two losses run counts twice. The exported model has the parameters and the cost of the first line.

## Files

| file | |
|---|---|
| `recipe.yaml` | what was asked, every default written out |
| `train_step.py` | the training step |
| `plan.json` | segments, losses, blocks, costs |
| `ownership.csv` | which losses train which parameter |
| `audit.md`, `audit.json` | the checks, and what each found |
| `graph.svg` | the picture |

## How to go on

Check the folder again, after an edit too; train; take the plain model out. An audit makes the model from
`recipe.yaml`. It runs nothing of `train_step.py` before each statement of it is matched with the plan; then it runs the
step on copies of the model, with your rights:

```
localize audit .
localize train --recipe recipe.yaml --output run
localize export run -o backbone.safetensors
```

In Python, from this folder:

```python
import localize, torch

model = localize.zoo.create_model("{model}", num_classes={num_classes})
local = localize.transform(model, "recipe.yaml", example_input=torch.zeros(2, {sizes}))
optimizer = torch.optim.SGD(local.param_groups(lr=0.1, weight_decay=1e-4), lr=0.1)
# result = local.step(images, labels, optimizer), for every batch; then local.export()
```

Built with {versions}.
"""


def _loss_told(plan: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what class scores are trained by, where it is not the plain cross-entropy."""
    if "loss" in plan:
        told = {k: f"of {len(v)} classes" if k == "weights" else v for k, v in plan["loss"].items()}
        yield "loss of labels", ", ".join(f"{k} {v}" for k, v in told.items()).removeprefix("name ")


def _outputs_told(outputs: Sequence[Mapping[str, Any]]) -> str:
    """Say what trains the model's further outputs; nothing where it has none."""
    trained = [
        f"`{o['name']}` (weight {o['weight']:g}) by {', '.join(o['trained_by'])}" for o in outputs if o["trained_by"]
    ]
    left = [f"`{o['name']}`" for o in outputs if not o["trained_by"]]
    told = f"\n\nFurther outputs of the model, trained on the labels: {'; '.join(trained)}." if trained else ""
    return told + (f"\n\nFurther outputs that nothing trains (audit.md says why): {', '.join(left)}." if left else "")


def _leaves_told(leaves: Sequence[str]) -> str:
    """Say which modules are called whole; nothing where there are none."""
    named = ", ".join(f"`{path}`" for path in leaves)
    return f"\n\nModules that are called whole, without a cut inside: {named}." if leaves else ""


def _schedule_told(segments: Sequence[Mapping[str, Any]]) -> str:
    """Say how segments spend memory and arithmetic; nothing where all run as usual."""
    told = [f"- to `{one['ends_at']}`: {one['schedule']}" for one in segments if "schedule" in one]
    return "\n\n" + "\n".join(told) if told else ""


def _card(plan: Mapping[str, Any], report: AuditReport) -> str:
    failed = [check.id for check in report.checks if not check.ok]
    found = f"All {len(report.checks)} checks of the text hold; `localize audit` also runs the step."
    if failed:
        found = f"Checks that fail: {', '.join(failed)}."
    return _CARD.format(
        model=plan["model"],
        method=plan["method"],
        shape=" x ".join(str(size) for size in plan["input_shape"]),
        sizes=", ".join(str(size) for size in plan["input_shape"]),
        num_classes=plan["num_classes"],
        options="".join(f"| `{name}` | {value} |\n" for name, value in (*plan["options"].items(), *_loss_told(plan))),
        segments=len(plan["segments"]),
        losses=len(plan["losses"]),
        heads=sum(block["role"] not in ("segment", "tied", "side") for block in plan["blocks"]),
        outputs=_outputs_told(plan["outputs"]),
        leaves=_leaves_told(plan["leaves"]),
        schedule=_schedule_told(plan["segments"]),
        checks=found,
        versions=", ".join(f"{name} {version}" for name, version in plan["versions"].items()),
        **plan["totals"],
    )
