"""What one NVIDIA GPU does: convert, train, audit, compile and resume on it; peak memory and time of a step.

One command, at most eight minutes, one line of JSON for each result, with the device and the versions::

    python benchmarks/cuda.py > rows.jsonl

Every part runs in a process of its own and is stopped at its time limit, so one that fails or hangs costs no other
part. A case that fails is a line with ``error``, and one that its part had no time for is a line with ``skipped``. The
exit code is 1 if any line is not ``ok``.

``memory`` is about the second step of a model that is alone on the device. ``predicted`` is
:func:`localize.memory.predict`: bytes of live tensors, on the CPU's operations. ``allocated`` is what the caching
allocator gave out at most (``torch.cuda.max_memory_allocated``): it includes workspaces and rounds every tensor up.
``requested`` is the same without rounding. ``time`` interleaves the steps of a net: in each round every step runs once,
between two CUDA events. Ratios are taken within the round; printed are medians over the rounds. ``half`` does both
under autocast to float16, with a gradient scaler, and to bfloat16.

Without a GPU, or with ``--toy``, everything runs at a size for a CPU. That shows that the script works; times are then
those of the processor, and ``allocated`` is what torch's profiler saw of the CPU's allocator.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
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
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from measuring import allocated
from safetensors.torch import load_file
from torch import Tensor

import localize
from localize import folder, memory
from localize.devices import choose_device
from localize.ir import CutSpec
from localize.recipes import Recipe
from localize.runtime import LocalModel
from localize.train import TrainConfig, resume, run, runs
from localize.train.checkpoints import files

Row = dict[str, Any]
SOFT = 0.8
"""Share of a part's time limit after which it begins no further case."""


@dataclass(frozen=True)
class Net:
    """A net, its batch, and the steps that are held against its backprop and checkpointing."""

    model: str
    batch: int
    steps: Mapping[str, Recipe]

    def built(self, name: str, *, data: bool, scaled: bool = False) -> LocalModel:
        """Return the local model of a step, always with the same weights; without ``data`` it has none."""
        torch.manual_seed(0)
        schedule = {**self.steps[name].schedule, **({"loss_scaling": True} if scaled else {})}
        recipe = replace(self.steps[name], model=self.model, schedule=schedule)
        return folder.build(recipe, data=data).train()


@dataclass(frozen=True)
class Size:
    """How much is run."""

    nets: tuple[Net, ...]
    half: Net
    pixels: int
    batch: int
    rounds: int
    epochs: int
    accuracy: float
    """Share of the test images that a trained net has to get right."""


def rivals(segments: int) -> dict[str, Recipe]:
    """Return what local steps are held against: backprop, and its activation checkpointing in ``segments`` parts.

    The number is that of the schedule that needs the least memory of those in ``memory.jsonl``.
    """
    return {"backprop": Recipe("backprop"), "checkpoint": Recipe("checkpoint", cut=CutSpec(segments))}


DCL = {"dcl": Recipe("dcl")}
AUGLOCAL = {"auglocal --d 2": Recipe("auglocal", {"d": 2})}
FULL = Size(
    nets=(
        Net(
            "cifar/resnet110",
            1024,
            rivals(28)
            | AUGLOCAL
            | {
                "auglocal --d 2 --recompute all": Recipe("auglocal", {"d": 2}, schedule={"recompute": "all"}),
                "auglocal --d 6": Recipe("auglocal", {"d": 6}),
                "dcl --cut-by node": Recipe("dcl", cut=CutSpec("max", by="node")),
            }
            | DCL,
        ),
        Net("cifar/vit", 512, rivals(6) | DCL | {"dcl --micro-batch 128": Recipe("dcl", schedule={"micro_batch": 128})}),
        Net("cifar/vgg8b", 128, rivals(6) | DCL),
        Net("tv/resnet50", 64, rivals(17) | DCL | AUGLOCAL),
    ),
    half=Net("cifar/resnet110", 1024, rivals(28) | DCL | AUGLOCAL),
    pixels=32,
    batch=16,
    rounds=10,
    epochs=3,
    accuracy=0.5,
)
TOY = Size(
    nets=(Net("cifar/resnet20", 8, rivals(4) | DCL | AUGLOCAL),),
    half=Net("cifar/fc_mnist", 8, rivals(2) | DCL),
    pixels=8,
    batch=4,
    rounds=2,
    epochs=1,
    accuracy=0.0,
)
METHODS: Mapping[str, Recipe] = {
    **{name: Recipe(name) for name in ("backprop", "checkpoint", "accumulate", "dcl", "dfa", "infopro", "mlaan", "predsim")},
    **AUGLOCAL,
    "auglocal --d 2 --recompute all": Recipe("auglocal", {"d": 2}, schedule={"recompute": "all"}),
}  # fmt: skip
"""Between them they use every way in which a text trains: routes, copies, replaced backwards, parts, recomputation."""


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
    if arguments.part is None:
        return max([in_process(name, part.limit, sys.argv[1:]) for name, part in PARTS.items()])
    device = choose_device(arguments.device)
    return write(arguments.part, TOY if arguments.toy or device.type == "cpu" else FULL, device)


def in_process(name: str, limit: float, given: list[str]) -> int:
    """Run a part in a process of its own, which writes its rows; return its exit code, 1 if it was stopped."""
    child = subprocess.Popen([sys.executable, __file__, *given, "--part", name], start_new_session=True)
    try:
        code = child.wait(limit)
        problem = f"the process ended with exit code {code}"
    except subprocess.TimeoutExpired:
        code, problem = None, f"stopped at its limit of {limit:.0f} s"
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)  # with the processes that compile for it
            child.wait()
    if code not in (0, 1):
        print(json.dumps({"part": name, "ok": False, "error": problem}), flush=True)
    return int(code != 0)


def write(name: str, size: Size, device: torch.device) -> int:
    """Run the cases of a part and print their rows; return 1 if one is not ok."""
    about = {"toy": size is TOY, **versions(device)}
    code = 0
    for row in rows(PARTS[name], size, device):
        print(json.dumps({"part": name} | row | about), flush=True)
        code = max(code, int(not row["ok"]))
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


# Whether it works


def converting(size: Size, device: torch.device) -> Iterator[Case]:
    """Convert models that lie on the device: the text is that of a model on the CPU."""
    for name, recipe in METHODS.items():

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


def images(
    size: Size, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Return random images and labels; always the same ones."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size.batch, 3, size.pixels, size.pixels, generator=generator, dtype=torch.float64)
    return x.to(device, dtype), (torch.arange(size.batch) % 10).to(device)


def training(size: Size, device: torch.device) -> Iterator[Case]:
    """Train as on the CPU, in float64; and train a run from the command's configuration to its end."""
    for name, recipe in METHODS.items():

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
        max_steps=None if size is FULL else 6,
        device=str(device),
        output=output,
        **settings,
    )


def a_run(size: Size, device: torch.device) -> Iterator[Row]:
    """Train on the digits, with everything that the trainer does on the device."""
    with tempfile.TemporaryDirectory() as place, redirect_stdout(sys.stderr):
        for name, settings in {"float32": {}, "float16, channels_last": {"amp": True, "amp_dtype": "float16", "channels_last": True}}.items():  # fmt: skip
            done = run(config(size, device, f"{place}/{name}", model_ema=False, **settings), progress=False)
            last = done.metrics[-1]
            found = {"type": name, "test_accuracy": last["test_accuracy"], "epochs": last["epoch"]}
            found |= {"images_per_second": last["images_per_second"]}
            yield found | {"ok": last["test_accuracy"] >= size.accuracy}


def auditing(size: Size, device: torch.device) -> Iterator[Case]:
    """Audit local models that lie on the device."""
    for name, recipe in METHODS.items():

        def case(recipe: Recipe = recipe) -> Iterator[Row]:
            started = time.perf_counter()
            report = localize.audit(small(recipe, size, device=device), images(size, device))
            failing = {check.id: str(check.evidence)[:300] for check in report.checks if not check.ok}
            seconds = round(time.perf_counter() - started, 2)
            yield {"ok": not failing, "checks": len(report.checks), "failing": failing, "seconds": seconds}

        yield Case(name, case)


def compiling(size: Size, device: torch.device) -> Iterator[Case]:
    """Compile steps: losses are those of the plain step, up to the rounding of float32."""
    for name in ("dcl", "auglocal --d 2") if size is FULL else ("dcl",):

        def case(recipe: Recipe = METHODS[name]) -> Iterator[Row]:
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


# What it costs


def remembering(size: Size, device: torch.device) -> Iterator[Case]:
    """Hold the predicted peak of every step against what the allocator gave out."""
    for net in size.nets:
        for name in net.steps:
            yield Case(f"{net.model}, {net.batch}: {name}", lambda net=net, name=name: iter([peak(net, name, device)]))


def peak(net: Net, name: str, device: torch.device, dtype: torch.dtype | None = None) -> Row:
    """Return the bytes of a step that were predicted, and those that the allocator gave out."""
    predicted = memory.predict(net.built(name, data=False), net.batch, autocast=dtype)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    step = on_device(net, name, device, dtype)
    step()
    found: Row = {"net": net.model, "batch": net.batch, "step": name, "predicted": predicted.peak}
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        stats = torch.cuda.memory_stats(device)
        found["allocated"] = stats["allocated_bytes.all.peak"] - before
        found["requested"] = stats["requested_bytes.all.peak"] - before
    else:
        found["allocated"] = predicted.resident + allocated(step.local, step.x, step.y, step.optimizer)
    return found | {"ratio": found["allocated"] / predicted.peak}


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
        with nullcontext() if self.dtype is None else torch.autocast(self.x.device.type, self.dtype):
            return self.local.step(self.x, self.y, self.optimizer, scaler=self.scaler).losses


def stepping(local: LocalModel, x: Tensor, y: Tensor, dtype: torch.dtype | None = None) -> Step:
    """Return the step of a local model on a batch; in float16 with a gradient scaler."""
    scaler = torch.amp.GradScaler(x.device.type) if dtype is torch.float16 else None
    return Step(local, x, y, memory.sgd(local.param_groups(lr=0.01)), dtype, scaler)


def on_device(net: Net, name: str, device: torch.device, dtype: torch.dtype | None = None) -> Step:
    """Return a step of a net on the device, on random images."""
    local = net.built(name, data=True, scaled=dtype is torch.float16).to(device)
    x, y = folder.random_batch(local, net.batch)
    return stepping(local, x.to(device), y.to(device), dtype)


def timing(size: Size, device: torch.device) -> Iterator[Case]:
    """Time the steps of every net in turn."""
    for net in size.nets:
        yield Case(f"{net.model}, {net.batch}", lambda net=net: timed(net, size.rounds, device))


def timed(net: Net, rounds: int, device: torch.device, dtype: torch.dtype | None = None) -> Iterator[Row]:
    """Yield a row for each step of a net: its time, and its ratios to backprop and to checkpointing."""
    steps, errors = {}, {}
    for name in net.steps:
        try:
            steps[name] = on_device(net, name, device, dtype)
        except Exception as error:
            errors[name] = failed(error)
    times = interleaved(steps, rounds, device, errors)
    for name in net.steps:
        row: Row = {"net": net.model, "batch": net.batch, "step": name}
        if name in errors:
            yield row | errors[name]
            continue
        row |= {"ms": 1e3 * statistics.median(times[name]), "n": len(times[name])}
        for base in ("backprop", "checkpoint"):
            row[f"to_{base}"] = ratio(times[name], times[base]) if base in times else None
        yield row


def interleaved(
    steps: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device, errors: dict[str, Row]
) -> dict[str, list[float]]:
    """Return the seconds of every step in every round, after two rounds that are not timed.

    A step that raises is left out of the result; what it raised is in ``errors``.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(2 + rounds):
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


def halving(size: Size, device: torch.device) -> Iterator[Case]:
    """Train, measure and time under autocast to float16, with a gradient scaler, and to bfloat16."""
    for dtype in (torch.float16, torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        for name in size.half.steps:

            def case(name: str = name, dtype: torch.dtype = dtype) -> Iterator[Row]:
                step = on_device(size.half, name, device, dtype)
                losses = [{key: float(loss) for key, loss in step().items()} for _ in range(5)]
                finite = all(value == value and abs(value) < float("inf") for one in losses for value in one.values())
                scale = None if step.scaler is None else step.scaler.get_scale()
                row = {"ok": finite, "scale": scale, "first": losses[0], "last": losses[-1]}
                del step
                yield row | peak(size.half, name, device, dtype)

            yield Case(f"{kind}: {name}", case)
        yield Case(f"{kind}: time", lambda dtype=dtype: timed(size.half, size.rounds, device, dtype))


PARTS: Mapping[str, Part] = {
    "convert": Part(converting, 40),
    "train": Part(training, 60),
    "audit": Part(auditing, 60),
    "resume": Part(resuming, 40),
    "compile": Part(compiling, 80),
    "memory": Part(remembering, 75),
    "time": Part(timing, 55),
    "half": Part(halving, 60),
}
"""In the order in which they run. Their limits are 470 seconds together: the whole ends within eight minutes."""


if __name__ == "__main__":
    sys.exit(main())
