"""Look at the installation: versions, devices, data, extras, allocator, and whether a small net can be trained."""

from __future__ import annotations

import os
import platform
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

import torch
import torchvision

import localize
from localize import methods, zoo
from localize.errors import LocalizeError
from localize.ir import CutSpec
from localize.train.data.sources import DATASETS, Bundled, ClassFolders, Downloaded

DISTRIBUTION = "torch-localize"
SETTINGS = (
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_NO_CUDA_MEMORY_CACHING",
    "CUDA_VISIBLE_DEVICES",
    "CUBLAS_WORKSPACE_CONFIG",
    "LD_PRELOAD",
    "MALLOC_ARENA_MAX",
    "MALLOC_TRIM_THRESHOLD_",
    "OMP_NUM_THREADS",
)
"""Environment variables that decide how much memory a step takes, or how fast it is."""

Kind = Literal["ok", "missing", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    section: str
    name: str
    kind: Kind
    told: str
    help: str = ""
    """What to type, where something is missing or wrong."""


def examine(*, check: bool) -> Iterator[Finding]:
    """Yield what is found, section by section; with ``check`` a small net is trained and audited at the end."""
    yield from versions()
    yield from devices()
    yield from allocator()
    yield from extras()
    yield from data()
    if check:
        yield self_check()


def versions() -> Iterator[Finding]:
    """Yield the versions of Python and of the libraries, and who else is called ``localize``."""
    yield Finding("versions", "python", "ok", f"{platform.python_version()} on {platform.platform()}")
    yield Finding("versions", "localize", "ok", f"{localize.__version__} in {os.path.dirname(localize.__file__)}")
    for name in ("torch", "torchvision", "timm", "numpy", "scikit-learn", "networkx"):
        yield Finding("versions", name, "ok", metadata.version(name))
    if not hasattr(torchvision.ops, "nms"):
        yield Finding("versions", "torchvision", "problem", "its operators are missing", "install both from one index")
    others = sorted(set(metadata.packages_distributions().get("localize", ())) - {DISTRIBUTION})
    if others:
        yield Finding(
            "versions",
            "localize",
            "problem",
            f"the installed distribution {others[0]} has a package of this name too, and one hides the other",
            f"pip uninstall {others[0]}; then pip install --force-reinstall --no-deps {DISTRIBUTION}",
        )


def devices() -> Iterator[Finding]:
    """Yield the processors, the accelerators, and the compiler that ``--compile`` needs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("devices", "cpu", "ok", f"{cores} cores, {torch.get_num_threads()} threads of torch")
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        memory = f"{about.total_memory / 2**30:.1f} GiB"
        yield Finding("devices", f"cuda:{i}", "ok", f"{about.name}, {memory}, capability {about.major}.{about.minor}")
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        yield Finding("devices", "cuda", "missing", f"no device; torch was {built}")
    names = (os.environ.get("CXX", ""), "g++", "clang++")
    compiler = next((path for name in names if (path := shutil.which(name))), None)
    if compiler is None:
        yield Finding("devices", "compiler", "missing", "no C++ compiler, which --compile needs", "install g++")
    else:
        yield Finding("devices", "compiler", "ok", compiler)


def allocator() -> Iterator[Finding]:
    """Yield the settings of memory allocators, and of threads."""
    for name in SETTINGS:
        if name in os.environ:
            yield Finding("allocator", name, "ok", os.environ[name])
    if torch.cuda.is_available():
        yield Finding("allocator", "cuda", "ok", f"backend {torch.cuda.get_allocator_backend()}")
    if not any(name in os.environ for name in SETTINGS):
        yield Finding("allocator", "environment", "ok", "nothing is set")


def extras() -> Iterator[Finding]:
    """Yield the optional extras of the distribution, with what each of them lacks."""
    try:
        required = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        yield Finding("extras", DISTRIBUTION, "missing", "not installed: run from a checkout", "pip install .")
        return
    lacking: dict[str, list[str]] = {}
    for requirement in required:
        if found := re.search(r"extra == ['\"]([\w-]+)['\"]", requirement):
            name = re.match(r"[\w.-]+", requirement)
            missing = lacking.setdefault(found[1], [])
            if name is not None and not _is_installed(name[0]):
                missing.append(name[0])
    for extra, missing in lacking.items():
        if missing:
            help = f"pip install '{DISTRIBUTION}[{extra}]'"
            yield Finding("extras", extra, "missing", f"without {', '.join(missing)}", help)
        else:
            yield Finding("extras", extra, "ok", "installed")


def data() -> Iterator[Finding]:
    """Yield the data sets: those that come with a package, and what the others need."""
    for name, source in DATASETS.items():
        if isinstance(source, Bundled):
            yield _bundled(name, source)
    fetched = [name for name, source in DATASETS.items() if isinstance(source, Downloaded)]
    how = "--data-dir DIR; --download fetches them"
    yield Finding("data", ", ".join(fetched), "missing", "read from a folder", how)
    folders = [name for name, source in DATASETS.items() if isinstance(source, ClassFolders)]
    yield Finding("data", ", ".join(folders), "missing", "your own class folders", "--data-dir DIR")


def self_check() -> Finding:
    """Train ResNet-20 in four segments for a step, and audit it."""
    begun = time.perf_counter()
    method, options = methods.CHECKED[-1]
    name = f"resnet20 by {method}"
    try:
        torch.manual_seed(0)
        model = zoo.create_model("cifar/resnet20")
        x, y = torch.randn(4, 3, 8, 8), torch.randint(0, 10, (4,))
        local = localize.transform(model, method, example_input=x, cut=CutSpec(segments=4), **options)
        result = local.step(x, y, torch.optim.SGD(local.param_groups(lr=0.1), lr=0.1))
        report = localize.audit(local, (x, y))
    except (LocalizeError, RuntimeError) as error:
        first = str(error).partition("\n")[0]
        return Finding("self-check", name, "problem", f"{type(error).__name__}: {first}", "reinstall torch")
    seconds = time.perf_counter() - begun
    if not report.ok or not all(torch.isfinite(loss) for loss in result.losses.values()):
        return Finding("self-check", name, "problem", report.verdict, "localize --version; then report it")
    told = f"{len(result.losses)} losses, {len(report.checks)} checks hold, {seconds:.0f} s"
    return Finding("self-check", name, "ok", told)


def _bundled(name: str, source: Bundled) -> Finding:
    try:
        train, test = source.read()
    except LocalizeError as error:
        return Finding("data", name, "missing", error.problem, error.help)
    return Finding("data", name, "ok", f"bundled, {len(train.labels):,} training and {len(test.labels):,} test images")


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
