"""Check one model: every stage of the compiler, without data or with it; what was found is a row of plain values."""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import localize
from localize import auditor, methods, zoo
from localize.build import some_labels
from localize.compiler import assemble, design, transform
from localize.cutting.cuts import candidates, notes, place
from localize.cutting.split import split
from localize.errors import AuditError, LocalizeError, TiedWeightsError
from localize.graph.operations import parameters_of
from localize.graph.shapes import Shapes
from localize.graph.trace import trace
from localize.ir import Cut, Trunk, facts
from localize.methods import Method
from localize.runtime.model import LocalModel

Row = dict[str, Any]
Shape = tuple[int, ...]

BATCH = 6
"""Number of images that the text is run on: the tracer has not seen it."""

LARGEST = 60_000_000
"""Number of parameters above which a model is not run with data."""

RATE = 0.01
"""Learning rate of the one step."""

_PACKAGE = Path(localize.__file__).parent


class Wrong(Exception):
    """What ran gave something else than it should have."""


def static(name: str, say: Callable[[str], None] = lambda stage: None) -> Row:
    """Convert a model that has no data, by each of ``methods.CHECKED``.

    The stages are those of the compiler: build, trace, cuts; for each method place, split, plan, assemble (lower, emit,
    load, static audit); and run, on a batch of another size than the tracer's, on the meta device: every segment
    and head, and by the last method a whole training step, which have to give scores of shape (6, classes).

    Args:
        name: canonical name of the model.
        say: is told every stage before it begins.

    Returns:
        ``ok``, ``failures`` (of each the stage, the class of the error, its message, and where it was raised if that is
        a fault of this package), ``seconds`` of each stage, and what was found. It raises nothing.
    """
    row: Row = {"ok": False, "failures": [], "seconds": {}}
    stages = _Stages(row, say)
    with suppress(Stopped), _collected(row):
        with stages.at("build"):
            source = zoo.resolve(name)
            model = zoo.create_empty(source.name)
            shape = zoo.input_shape_of(source, model)
            row |= {"input_shape": list(shape), "parameters": sum(p.numel() for p in model.parameters())}
        with stages.at("trace"):
            trunk = trace(model, torch.empty((2, *shape), device="meta"), name=source.name)
            row |= _of_trunk(trunk)
        with stages.at("cuts"):
            row |= _of_cuts(trunk, candidates(trunk))
        row["methods"] = {method: {} for method, _ in methods.CHECKED}
        for method, options in methods.CHECKED:
            found = row["methods"][method]
            with suppress(Stopped), _collected(found):
                local = _convert(trunk, methods.create(method, **options), stages, found)
                with stages.at(f"{method}: run"):
                    _run_without_data(local, step=method == methods.CHECKED[-1][0])
    row["ok"] = not row["failures"]
    return row


def run(name: str, say: Callable[[str], None] = lambda stage: None) -> Row:
    """Convert a model with fresh weights by the last of ``methods.CHECKED``, on the CPU, and train it for one step.

    The images are two, random, and of half the side where the model takes that. Before and after the conversion the
    model gives the same logits in eval mode, bit for bit, and has the same keys; the step runs, and its losses are
    finite; after it, every check of the measured audit holds but for central differences, which take as much time as
    all the others and have no answer at the kinks of freshly initialised models (a block that begins as the identity
    between two ReLUs).

    A model of more than ``LARGEST`` parameters is left out: ``left_out`` says so.

    Args:
        name: canonical name of the model.
        say: is told every stage before it begins.

    Returns:
        As :func:`static` does.
    """
    row: Row = {"ok": False, "failures": [], "seconds": {}}
    stages = _Stages(row, say)
    with suppress(Stopped), _collected(row):
        with stages.at("build"):
            row["parameters"] = sum(p.numel() for p in zoo.create_empty(name).parameters())
            if row["parameters"] > LARGEST:
                row["left_out"] = f"more than {LARGEST:,} parameters"
        if "left_out" not in row:
            _run(name, stages, row)
    row["ok"] = not row["failures"]
    return row


def _run(name: str, stages: _Stages, row: Row) -> None:
    with stages.at("forward"):
        model, images, before = _with_data(name)
        row["input_shape"] = list(images.shape[1:])
        keys = tuple(model.state_dict())
    with stages.at("convert"):
        method, options = methods.CHECKED[-1]
        given = {"example_input": images, "name": name, **options}
        try:
            local = transform(model.train(), method, **given)
        except TiedWeightsError:
            local = transform(model, method, shared=True, **given)
        row["shared"] = bool(local.plan.segments.tied)
    with stages.at("compare"):
        with torch.no_grad():
            after = _logits(local.eval()(images))
        if not before.isfinite().all():
            raise Wrong("the logits of the model in eval mode are not finite")
        if not torch.equal(after, before):
            raise Wrong(f"{int((after != before).sum())} of {before.numel()} logits in eval mode have changed")
        if tuple(local.trunk.state_dict()) != keys:
            raise Wrong("the keys of the model have changed")
    with stages.at("step"):
        labels = some_labels(local.plan.segments.trunk, len(images))
        result = local.train().step(images, labels, torch.optim.SGD(local.param_groups(lr=RATE), lr=RATE))
        for loss, value in result.losses.items():
            if not value.isfinite():
                raise Wrong(f"{loss} is {value.item()}")
    with stages.at("audit"):
        report = auditor.audit(local, (images, labels), numeric=False)
        row["checks"] = len(report.checks)
        report.raise_if_failed()


def _with_data(name: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Build a model, small where it can be; return it in eval mode, two images, and its logits."""
    half = _half(zoo.resolve(name).input_shape)
    shape = half if half is not None and _takes(name, half) else None
    model = zoo.create_model(name, input_shape=shape)
    sizes = zoo.input_shape_of(zoo.resolve(name), model, shape)
    images = torch.randn(2, *sizes, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model, images, _logits(model.eval()(images))


def _half(shape: Shape | None) -> Shape | None:
    """Return a shape of half the sides, in multiples of 32; None where no side is 64 or more. Frames are kept."""
    if shape is None or max(shape[-2:]) < 64:
        return None
    return (*shape[:-2], *(side if side < 64 else side // 2 // 32 * 32 for side in shape[-2:]))


def _takes(name: str, shape: Shape) -> bool:
    """Tell whether a model can be built for images of this shape, and runs on them in both modes."""
    try:
        model = zoo.create_empty(name, input_shape=shape)
        with torch.no_grad():
            for mode in (True, False):
                model.train(mode)(torch.empty((2, *shape), device="meta"))
    except Exception:  # what a model says to a size that it does not take
        return False
    return True


def _logits(output: Any) -> torch.Tensor:
    """Return the first tensor of what a model returns."""
    if isinstance(output, Mapping):
        output = list(output.values())
    return output if isinstance(output, torch.Tensor) else _logits(output[0])


def _of_trunk(trunk: Trunk) -> Row:
    total = sum(p.numel() for p in trunk.twin.parameters())
    modules = {path: trunk.twin.get_submodule(path) for path in trunk.leaves}
    return {
        "classes": trunk.num_classes,
        "nodes": len(trunk.graph.nodes),
        "eval_differs": trunk.eval_differs,
        "leaves": [
            {"name": path, "kind": type(m).__name__, "share": _share(sum(p.numel() for p in m.parameters()), total)}
            for path, m in modules.items()
        ],
    }


def _of_cuts(trunk: Trunk, cuts: Sequence[Cut]) -> Row:
    weights = {node: parameters_of(node, trunk.twin) for node in trunk.graph.nodes}
    heaviest = max(weights, key=lambda node: sum(p.numel() for p in weights[node].values()))
    total = sum({name: p.numel() for owned in weights.values() for name, p in owned.items()}.values())
    macs = sum(facts(node).macs for node in trunk.graph.nodes)
    return {
        "cuts": len(cuts),
        "live": max((len(cut.values) for cut in cuts), default=0),
        "notes": list(notes(trunk)),
        "largest": {
            "macs": _largest(cuts, [cut.macs_before for cut in cuts], macs),
            "parameters": _largest(cuts, [cut.parameters_before for cut in cuts], total),
            "layer": {
                "name": str(heaviest.target),
                "share": _share(sum(p.numel() for p in weights[heaviest].values()), total),
            },
        },
    }


def _largest(cuts: Sequence[Cut], before: Sequence[int], total: int) -> Row:
    """Return the largest piece between two cuts: its share of the total, and where it begins and ends."""
    names = ["input", *(cut.name for cut in cuts), "output"]
    ends = [0, *before, total]
    sizes = [stop - start for start, stop in zip(ends, ends[1:], strict=False)]
    i = max(range(len(sizes)), key=sizes.__getitem__)
    return {"share": _share(sizes[i], total), "from": names[i], "to": names[i + 1]}


def _convert(trunk: Trunk, method: Method, stages: _Stages, found: Row) -> LocalModel:
    """Convert a traced model by one method; write down into ``found`` what there is."""
    with stages.at(f"{method.name}: place"):
        layout = place(trunk, method.cut, grain=method.grain, together=method.together)
        found["layers"] = len(layout.layers)
    with stages.at(f"{method.name}: split"):
        try:
            segments = split(layout)
        except TiedWeightsError:
            segments = split(layout, shared=True)
        sizes = [segment.size for segment in segments.segments]
        found |= {"segments": len(sizes), "largest": _share(max(sizes), sum(sizes)), "shared": bool(segments.tied)}
    with stages.at(f"{method.name}: plan"):
        plan = design(segments, method)
    with stages.at(f"{method.name}: assemble"):
        return assemble(plan)


def _run_without_data(local: LocalModel, *, step: bool) -> None:
    """Run the forward of every segment and head, or a whole training step."""
    trunk = local.plan.segments.trunk
    x = torch.empty((BATCH, *trunk.input_shape), device="meta")
    with torch.device("meta"), Shapes():  # as a model's own new tensors do where they name no device
        found: Mapping[str, Tensor | None]
        if step:
            y = torch.zeros((BATCH, *trunk.output_size), dtype=torch.long, device="meta")
            found = local.step(x, y, torch.optim.SGD(local.param_groups(lr=0.1), lr=0.1)).scores
        else:
            found = local.scores(x)
    for name, scores in ((name, scores) for name, scores in found.items() if scores is not None):
        wanted = (BATCH, trunk.num_classes)  # of pixels only at the output: local heads classify images
        if tuple(scores.shape) not in (wanted, (*wanted, *trunk.output_size)):
            raise Wrong(f"{name} are {tuple(scores.shape)}, not {wanted}")


def _share(part: float, whole: float) -> float:
    return round(part / whole, 4) if whole else 0.0


# ------------------------------------------------------------------------------------------------------------- stages


class Stopped(Exception):
    """A stage has failed, and is in the row; the stages after it cannot run."""


class _Stages:
    """Time every stage into a row, and make what it raises a failure of the row."""

    def __init__(self, row: Row, say: Callable[[str], None]) -> None:
        self.row, self.say = row, say

    @contextmanager
    def at(self, stage: str) -> Iterator[None]:
        self.say(stage)
        start = time.perf_counter()
        try:
            yield
        except Exception as error:  # whatever a model does has to become a row
            self.row["failures"].append(failure(stage, error))
            raise Stopped from error
        finally:
            self.row["seconds"][stage] = round(time.perf_counter() - start, 2)


@contextmanager
def _collected(found: Row) -> Iterator[None]:
    """Write down what is warned of, each message once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            found["warnings"] = list(dict.fromkeys(str(one.message) for one in caught))


def failure(stage: str, error: BaseException) -> Row:
    """Describe what a stage raised. For what is no error of this package's own, ``at`` says where it was raised."""
    if isinstance(error, AuditError):
        stage = stage.replace("assemble", "audit")
    found = {"stage": stage, "error": type(error).__name__, "message": str(error)}
    if not isinstance(error, LocalizeError | Wrong):
        frames = traceback.extract_tb(error.__traceback__)
        inside = [frame for frame in frames if Path(frame.filename).is_relative_to(_PACKAGE)]
        places = dict.fromkeys(f"{Path(f.filename).name}:{f.lineno} in {f.name}" for f in [*inside[-1:], frames[-1]])
        found["at"] = ", ".join(places)
    return found
