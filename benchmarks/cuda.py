"""What one NVIDIA GPU does: convert, train, audit, compile and resume on it; peak memory and time of a step.

One command, at most eight minutes, one line of JSON for each result, with the device and the versions::

    python benchmarks/cuda.py > rows.jsonl

Every part runs in a process of its own and is stopped at its time limit, so one that fails or hangs costs no other
part. A case that fails is a line with ``error``, and one that its part had no time for is a line with ``skipped``. The
exit code is 1 if any line is not ``ok``, as where a loss is not finite.

``steps`` measures ten local steps, and backprop and checkpointing on the same nets. Rows with ``predicted`` are about
peak memory, of the second of two steps. ``predicted`` is :func:`localize.estimate.memory.predict`: bytes of live
tensors, for the CPU's operations. ``allocated`` is the most that the caching allocator gave out
(``torch.cuda.max_memory_allocated``): it includes workspaces of convolutions and rounds every tensor up; ``requested``
is the same without rounding. What was allocated before the model was moved to the device is subtracted. Rows with
``ms`` are about time. The steps of a net are interleaved: in each round every step runs once, between two CUDA events.
Ratios are taken within the round, and all times are medians over ``n`` rounds. ``half`` does both under autocast to
float16, with a gradient scaler, and to bfloat16. ``plans`` does both for a step that ``localize plan`` chooses within a
budget.

Without a GPU, or with ``--toy``, everything runs at a size for a CPU. That shows that the script works; times are then
those of the processor, and ``allocated`` is what torch's profiler saw of the CPU's allocator.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from measuring import allocated
from safetensors.torch import load_file
from torch import Tensor

import localize
from localize import build
from localize.errors import MissingError
from localize.estimate import memory, planner
from localize.ir import CutSpec
from localize.recipes import Recipe
from localize.runtime.devices import choose_device
from localize.runtime.model import LocalModel
from localize.train import TrainConfig, resume, run, runs
from localize.train.checkpoints import files

Row = dict[str, Any]
SOFT = 0.8
"""Share of a part's time limit after which it begins no further case."""
NOT_OK = 3
"""Exit code of a part that came to its end with a row that is not ok."""


@dataclass(frozen=True)
class Net:
    """A net, its batch, and the steps that are compared with its backprop and checkpointing."""

    model: str
    batch: int
    steps: Mapping[str, Recipe]

    def built(self, name: str, *, scaled: bool) -> LocalModel:
        """Return the local model of a step, always with the same weights."""
        torch.manual_seed(0)
        schedule = {**self.steps[name].schedule, **({"loss_scaling": True} if scaled else {})}
        return build.build(replace(self.steps[name], model=self.model, schedule=schedule)).train()


@dataclass(frozen=True)
class Size:
    """How much is run."""

    methods: Mapping[str, Recipe]
    compiled: tuple[str, ...]
    plans: tuple[tuple[str, int, float], ...]
    """Net, images in a batch, and the budget as a share of backprop's peak."""
    nets: tuple[Net, ...]
    half: Net
    pixels: int
    batch: int
    rounds: int
    epochs: int
    max_steps: int | None
    accuracy: float
    """Share of the test images that a trained net has to get right."""


def rivals(segments: int) -> dict[str, Recipe]:
    """Return what local steps are compared with: backprop, and its activation checkpointing in ``segments`` parts.

    The number is that of the schedule that needs the least memory of those in ``memory.jsonl``.
    """
    return {"backprop": Recipe("backprop"), "checkpoint": Recipe("checkpoint", cut=CutSpec(segments))}


DCL = {"dcl": Recipe("dcl")}
AUGLOCAL = {"auglocal --d 2": Recipe("auglocal", {"d": 2})}
RECOMPUTED = {"auglocal --d 2 --recompute all": Recipe("auglocal", {"d": 2}, schedule={"recompute": "all"})}
METHODS: Mapping[str, Recipe] = {
    **{name: Recipe(name) for name in ("backprop", "checkpoint", "accumulate", "dfa", "infopro", "mlaan", "predsim")},
    **DCL,
    **AUGLOCAL,
    **RECOMPUTED,
}
"""Together they use routes over several segments, copies, replaced backwards, parts of the batch and recomputation."""
FULL = Size(
    methods=METHODS,
    compiled=("dcl", "auglocal --d 2"),
    plans=(("tv/resnet50", 64, 0.12), ("cifar/resnet110", 1024, 0.06)),
    nets=(
        Net("cifar/vgg8b", 128, rivals(6) | DCL),
        Net(
            "cifar/vit", 512, rivals(6) | DCL | {"dcl --micro-batch 128": Recipe("dcl", schedule={"micro_batch": 128})}
        ),
        Net("tv/resnet50", 64, rivals(17) | DCL | AUGLOCAL),
        Net(
            "cifar/resnet110",
            1024,
            rivals(28)
            | DCL
            | {"dcl --cut-by node": Recipe("dcl", cut=CutSpec("max", by="node"))}
            | AUGLOCAL
            | RECOMPUTED
            | {"auglocal --d 6": Recipe("auglocal", {"d": 6})},
        ),
    ),
    half=Net("cifar/resnet110", 1024, rivals(28) | DCL),
    pixels=32,
    batch=16,
    rounds=10,
    epochs=3,
    max_steps=None,
    accuracy=0.5,
)
TOY = Size(
    methods=DCL | RECOMPUTED,
    compiled=("dcl",),
    plans=(("cifar/resnet20", 8, 0.5),),
    nets=(Net("cifar/resnet20", 8, rivals(4) | DCL),),
    half=Net("cifar/fc_mnist", 8, rivals(2) | DCL),
    pixels=8,
    batch=4,
    rounds=2,
    epochs=1,
    max_steps=6,
    accuracy=0.0,
)
NET_SECONDS = 15.0
"""After these no further round is timed on a net."""


@dataclass(frozen=True)
class Case:
    """Something that is run and gives rows; one that raises is a row too."""

    name: str
    run: Callable[[], Iterator[Row]]


@dataclass(frozen=True)
class Part:
    """Cases that run in one process, and the seconds after which it is killed."""

    cases: Callable[[Size, torch.device], Iterator[Case]]
    limit: float


def main() -> int:
    """Run all parts, or the one that is named; return 1 if a row is not ok."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="cuda, cuda:N, cpu, or auto (default)")
    parser.add_argument("--toy", action="store_true", help="a size for a CPU; always so on one")
    parser.add_argument("--part", choices=PARTS, help="this part alone, in this process")
    arguments = parser.parse_args()
    try:
        device = choose_device(arguments.device)
    except MissingError as error:
        sys.exit(f"error: {error}")
    if arguments.part is None:
        done = [in_process(name, part.limit, sys.argv[1:]) for name, part in PARTS.items()]
        return int(not all(done))
    if device.index is not None:
        torch.cuda.set_device(device)  # events are recorded on the current one
    return write(arguments.part, TOY if arguments.toy or device.type == "cpu" else FULL, device)


def in_process(name: str, limit: float, given: list[str]) -> bool:
    """Run a part in a process of its own, which writes its rows; return whether it came to its end and all are ok."""
    child = subprocess.Popen([sys.executable, __file__, *given, "--part", name], start_new_session=True)
    problem = f"stopped at its limit of {limit:.0f} s"
    try:
        child.wait(limit)
        problem = f"the process ended with exit code {child.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # with the processes that compile for it
        child.wait()
    if child.returncode not in (0, NOT_OK):
        print(json.dumps({"part": name, "ok": False, "error": problem}), flush=True)
    return child.returncode == 0


def write(name: str, size: Size, device: torch.device) -> int:
    """Run the cases of a part and print their rows; return ``NOT_OK`` if one is not ok."""
    about = {"toy": size is TOY, **versions(device)}
    code = 0
    for row in rows(PARTS[name], size, device):
        print(json.dumps({"part": name} | row | about), flush=True)
        code = code if row["ok"] else NOT_OK
    return code


def rows(part: Part, size: Size, device: torch.device) -> Iterator[Row]:
    """Yield the rows of a part: what its cases give, what they raise, and those that there was no time for."""
    started = time.monotonic()
    for case in part.cases(size, device):
        if time.monotonic() - started > SOFT * part.limit:
            yield {"case": case.name, "ok": False, "skipped": f"{SOFT * part.limit:.0f} s were over"}
            continue
        try:
            for row in case.run():
                yield {"case": case.name, "ok": "error" not in row} | row
        except Exception as error:
            yield {"case": case.name, "ok": False} | failed(error)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def failed(error: Exception) -> Row:
    """Return what an exception says, and the line that raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(last.filename).name}:{last.lineno}"
    return {"error": f"{type(error).__name__}: {str(error).strip()[:500]}", "at": place}


def versions(device: torch.device) -> Row:
    """Return the device and the versions that results depend on."""
    found: Row = {"device": platform.machine(), "python": platform.python_version(), "localize": localize.__version__}
    found |= {name: metadata.version(name) for name in ("torch", "torchvision", "timm")}
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found |= {"device": about.name, "capability": f"{about.major}.{about.minor}", "bytes": about.total_memory}
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return found


def converting(size: Size, device: torch.device) -> Iterator[Case]:
    """Convert models that lie on the device: the text is that of a model on the CPU."""
    for name, recipe in size.methods.items():

        def case(recipe: Recipe = recipe) -> Iterator[Row]:
            started = time.perf_counter()
            here, there = small(recipe, size), small(recipe, size, device=device)
            places = {parameter.device.type for parameter in there.parameters()}
            same = here.source == there.source
            seconds = round(time.perf_counter() - started, 2)
            yield {"ok": same and places == {device.type}, "same_text": same, "seconds": seconds}

        yield Case(name, case)


def small(
    recipe: Recipe, size: Size, *, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> LocalModel:
    """Return a ResNet-20 in four segments, transformed on a device, in train mode."""
    torch.manual_seed(0)
    model = localize.zoo.create_model("cifar/resnet20").to(device, dtype)
    x, _ = images(size, device, dtype)
    cut = CutSpec("max" if recipe.method == "predsim" else 4)
    whole = recipe.method in ("backprop", "accumulate")
    recipe = recipe if whole else replace(recipe, cut=cut)
    return localize.transform(model, recipe, example_input=x[:2]).train()


def images(size: Size, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return random images and labels; always the same ones."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size.batch, 3, size.pixels, size.pixels, generator=generator, dtype=torch.float64)
    return x.to(device, dtype), (torch.arange(size.batch) % 10).to(device)


def training(size: Size, device: torch.device) -> Iterator[Case]:
    """Train as on the CPU, in float64; and train a run from the command's configuration to its end."""
    for name, recipe in size.methods.items():

        def case(recipe: Recipe = recipe) -> Iterator[Row]:
            here = small(recipe, size, dtype=torch.float64)
            there = copy.deepcopy(here).to(device)
            ours, theirs = trained(here, size), trained(there, size)
            far = farthest(ours, theirs) + farthest(here.state_dict(), there.state_dict())
            yield {"ok": far < 1e-6, "difference": far}

        yield Case(f"{name}: three steps as on the CPU", case)
    yield Case("a run", lambda: a_run(size, device))


def trained(local: LocalModel, size: Size, steps: int = 3) -> dict[str, Tensor]:
    """Train for some steps on one batch; return all losses."""
    parameter = next(local.parameters())
    x, y = images(size, parameter.device, parameter.dtype)
    optimizer = memory.sgd(local.param_groups(lr=0.01))
    found = {}
    for step in range(steps):
        found |= {f"{step} {name}": loss for name, loss in local.step(x, y, optimizer).losses.items()}
    return found


def farthest(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Return the largest difference of two states, relative to the largest value of the tensor."""
    assert ours.keys() == theirs.keys()
    found = [0.0]
    for name, one in ours.items():
        one, other = one.detach().cpu().double(), theirs[name].detach().cpu().double()
        found.append(float((one - other).abs().max() / one.abs().max().clamp_min(1e-12)))
    return max(found)


def config(size: Size, device: torch.device, output: str, **settings: Any) -> TrainConfig:
    """Return a run of ResNet-20 on the digits."""
    return TrainConfig(
        "cifar/resnet20",
        recipe="auglocal",
        options={"d": 2},
        cut=CutSpec(4),
        input_shape=(3, size.pixels, size.pixels),
        epochs=size.epochs,
        max_steps=size.max_steps,
        device=str(device),
        output=output,
        **settings,
    )


def a_run(size: Size, device: torch.device) -> Iterator[Row]:
    """Train on the digits, with everything that the trainer does on the device."""
    half = {"amp": True, "amp_dtype": "float16", "channels_last": True}
    for name, settings in {"float32": {}, "float16, channels_last": half}.items():
        with tempfile.TemporaryDirectory() as place, redirect_stdout(sys.stderr):
            done = run(config(size, device, f"{place}/run", **settings), progress=False)
        last = done.metrics[-1]
        found = {"type": name, "test_accuracy": last["test_accuracy"], "epochs": last["epoch"]}
        yield found | {"images_per_second": last["images_per_second"], "ok": last["test_accuracy"] >= size.accuracy}


def auditing(size: Size, device: torch.device) -> Iterator[Case]:
    """Audit local models that lie on the device."""
    for name, recipe in size.methods.items():

        def case(recipe: Recipe = recipe) -> Iterator[Row]:
            started = time.perf_counter()
            report = localize.audit(small(recipe, size, device=device), images(size, device))
            failing = {check.id: str(check.evidence)[:300] for check in report.checks if not check.ok}
            seconds = round(time.perf_counter() - started, 2)
            yield {"ok": not failing, "checks": len(report.checks), "failing": failing, "seconds": seconds}

        yield Case(name, case)


def compiling(size: Size, device: torch.device) -> Iterator[Case]:
    """Compile steps: losses are those of the plain step, up to the rounding of float32."""
    for name in size.compiled:

        def case(recipe: Recipe = size.methods[name]) -> Iterator[Row]:
            plain = small(recipe, size, device=device)
            fast = localize.compile(copy.deepcopy(plain))
            difference = farthest(trained(plain, size), trained(fast, size))
            reasons = sorted({function.reason for function in fast.functions if function.reason})
            steps = {"plain": stepping(plain, *images(size, device)), "compiled": stepping(fast, *images(size, device))}
            times = interleaved(steps, size.rounds, device, {})
            found = {"graphs": fast.graphs, "functions": len(fast.functions), "not_compiled": reasons}
            found |= {"seconds": round(fast.compile_seconds, 1), "difference": difference}
            found |= {"time_to_plain": ratio(times["compiled"], times["plain"])}
            yield found | {"ok": not reasons and difference < 1e-2}

        yield Case(name, case)


def resuming(size: Size, device: torch.device) -> Iterator[Case]:
    """Go on from the last checkpoint but one, and compare the end with that of the undisturbed run."""

    def case() -> Iterator[Row]:
        torch.backends.cudnn.deterministic = True
        with tempfile.TemporaryDirectory() as place, redirect_stdout(sys.stderr):
            whole, cut = Path(place, "whole"), Path(place, "cut")
            run(config(size, device, str(whole), checkpoint_every=5), progress=False)
            shutil.copytree(whole, cut)
            files(cut)[-1].unlink()
            shutil.rmtree(cut / "export")
            resume(cut, progress=False)
            ours, theirs = (load_file(path / runs.BACKBONE) for path in (whole, cut))
        far = farthest(ours, theirs)
        yield {"ok": far < 1e-3, "difference": far, "bit_for_bit": far == 0.0}

    yield Case("resnet20 auglocal --d 2", case)


def measuring_steps(size: Size, device: torch.device) -> Iterator[Case]:
    """Measure the steps of every net."""
    for net in size.nets:
        yield Case(f"{net.model}, {net.batch}", lambda net=net: measured(net, size.rounds, device))


def halving(size: Size, device: torch.device) -> Iterator[Case]:
    """Measure steps under autocast to float16, with a gradient scaler, and to bfloat16."""
    net = size.half
    for dtype in (torch.float16, torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        yield Case(f"{net.model}, {net.batch}, {kind}", lambda dtype=dtype: measured(net, size.rounds, device, dtype))


def planning(size: Size, device: torch.device) -> Iterator[Case]:
    """Plan a step of DCL within each budget, and measure it."""
    for model, batch, share in size.plans:

        def case(model: str = model, batch: int = batch, share: float = share) -> Iterator[Row]:
            choice = planner.plan(Recipe("dcl", model=model), planner.Share(share), batch)
            way = choice.fitting[0]
            assert way.recipe is not None, "a plan of a method has a recipe"
            steps = {"backprop": Recipe("backprop"), way.name: way.recipe}
            for row in measured(Net(model, batch, steps), size.rounds, device):
                yield row | {"budget": choice.budget}

        yield Case(f"{model}, {batch}, {share:.0%}", case)


def measured(net: Net, rounds: int, device: torch.device, dtype: torch.dtype | None = None) -> Iterator[Row]:
    """Yield two rows for each step of a net: its peak memory, and then its time beside backprop and checkpointing."""
    about: Row = {"net": net.model, "batch": net.batch}
    steps: dict[str, Step] = {}
    for name in net.steps:
        try:
            steps[name], found = peak(net.built(name, scaled=dtype is torch.float16), net.batch, device, dtype)
            yield about | {"step": name} | found
        except Exception as error:
            yield about | {"step": name} | failed(error)
    errors: dict[str, Row] = {}
    times = interleaved(steps, rounds, device, errors)
    for name, step in steps.items():
        if name in errors:
            yield about | {"step": name} | errors[name]
            continue
        row = about | {"step": name, "ms": 1e3 * statistics.median(times[name]), "n": len(times[name])}
        for base in ("backprop", "checkpoint"):
            row[f"to_{base}"] = ratio(times[name], times[base]) if base in times else None
        row["ok"] = all(math.isfinite(loss) for loss in step().values())
        yield row | ({} if step.scaler is None else {"scale": step.scaler.get_scale()})


def peak(local: LocalModel, batch: int, device: torch.device, dtype: torch.dtype | None) -> tuple[Step, Row]:
    """Return a step on the device, and the bytes that were predicted for it and that the allocator gave out."""
    predicted = memory.predict(local, batch, autocast=dtype)
    gc.collect()
    cuda = device.type == "cuda"
    if cuda:
        torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)  # cuBLAS keeps a workspace from now on
        before = torch.cuda.memory_allocated(device)
    x, y = build.random_batch(local, batch)
    step = stepping(local.to(device), x.to(device), y.to(device), dtype)
    step()
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        step()
        stats = torch.cuda.memory_stats(device)
        found = {"allocated": torch.cuda.max_memory_allocated(device) - before}
        found |= {"requested": stats["requested_bytes.all.peak"] - before}
    else:
        with step.autocast():
            found = {"allocated": predicted.resident + allocated(local, step.x, step.y, step.optimizer)}
    return step, {"predicted": predicted.peak} | found | {"ratio": found["allocated"] / predicted.peak}


@dataclass(frozen=True)
class Step:
    """A training step on one batch, under autocast if it has a type."""

    local: LocalModel
    x: Tensor
    y: Tensor
    optimizer: torch.optim.Optimizer
    dtype: torch.dtype | None = None
    scaler: torch.amp.GradScaler | None = None

    def __call__(self) -> dict[str, Tensor]:
        """Run it; return the losses."""
        with self.autocast():
            return self.local.step(self.x, self.y, self.optimizer, scaler=self.scaler).losses

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context that the step runs in."""
        return nullcontext() if self.dtype is None else torch.autocast(self.x.device.type, self.dtype)


def stepping(local: LocalModel, x: Tensor, y: Tensor, dtype: torch.dtype | None = None) -> Step:
    """Return the step of a local model on a batch; in float16 with a gradient scaler."""
    scaler = torch.amp.GradScaler(x.device.type) if dtype is torch.float16 else None
    return Step(local, x, y, memory.sgd(local.param_groups(lr=0.01)), dtype, scaler)


def interleaved(
    steps: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device, errors: dict[str, Row]
) -> dict[str, list[float]]:
    """Return the seconds of every step in every round, after two rounds that are not timed.

    A step that raises is left out of the result; what it raised is in ``errors``. There are fewer rounds where
    ``NET_SECONDS`` are over, and at least one.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    started = time.monotonic()
    for number in range(2 + rounds):
        if number > 2 and time.monotonic() - started > NET_SECONDS:
            break
        for name, step in steps.items():
            if name in errors:
                continue
            try:
                seconds = stopwatch(step, device)
            except Exception as error:
                errors[name] = failed(error)
                continue
            if number >= 2:
                times[name].append(seconds)
    return {name: found for name, found in times.items() if name not in errors}


def stopwatch(step: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of a step: between two events on CUDA, of the processor on a CPU."""
    if device.type != "cuda":
        started = time.process_time()
        step()
        return time.process_time() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def ratio(times: list[float], base: list[float]) -> float:
    """Return the median of the ratios within the rounds."""
    return statistics.median(one / other for one, other in zip(times, base, strict=True))


PARTS: Mapping[str, Part] = {
    "convert": Part(converting, 25),
    "train": Part(training, 40),
    "audit": Part(auditing, 35),
    "resume": Part(resuming, 25),
    "compile": Part(compiling, 70),
    "steps": Part(measuring_steps, 150),
    "half": Part(halving, 45),
    "plans": Part(planning, 80),
}
"""In the order in which they run. Their limits add up to 470 seconds, so that the whole ends within eight minutes."""


if __name__ == "__main__":
    sys.exit(main())
