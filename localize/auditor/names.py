"""What names of a text may stand for: modules of the model, functions that the plan names, constants of torch.

Nothing is imported or looked up by what a text says. The functions that a plan names are written down first, under
every name by which they can be written; what a text writes is compared with these names.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from localize.ir import Plan

OPS = "localize.ops."
_PLACES = {
    "torch.nn.functional": torch.nn.functional, "torch": torch, "torch.linalg": torch.linalg, "torch.fft": torch.fft,
    "torch.special": torch.special,
}  # fmt: skip
_OPERATIONS = (type(torch.ops.aten.mul), type(torch.ops.aten.mul.Tensor))
_PREFIXES = ("fft_", "linalg_", "special_")


@dataclass
class Functions:
    """The functions that a plan names: under which names each can be written."""

    canonical: dict[str, str] = field(default_factory=dict)
    """The one name of a function, by each name that it can be written under."""
    modules: set[str] = field(default_factory=lambda: {"torch", "torch.nn.functional"})
    """Modules that a text may import."""
    held: dict[int, tuple[Any, str]] = field(default_factory=dict)
    """Every function with its one name, by its identity."""

    def add(self, function: Any) -> str:
        """Take in a function of a recorded graph; return its one name."""
        known = self.held.get(id(function))
        if known is not None:
            return known[1]
        names = list(dict.fromkeys(_names_of(function)))
        self.held[id(function)] = (function, names[0])
        for name in names:
            self.canonical.setdefault(name, names[0])
            self._may_import(name)
        return names[0]

    def add_named(self, dotted: str) -> str:
        """Take in a function that the plan names; return its one name."""
        thing = looked_up(dotted)
        if thing is not None and id(thing) in self.held:
            name = self.held[id(thing)][1]
            self.canonical.setdefault(dotted, name)
        else:
            name = self.canonical.setdefault(dotted, dotted)
            if thing is not None:
                self.held[id(thing)] = (thing, name)
        self._may_import(dotted)
        return name

    def named(self, dotted: str) -> str | None:
        """Return the one name of the function that a text calls so, or None if the plan names no such function."""
        if dotted in self.canonical:
            return self.canonical[dotted]
        thing = looked_up(dotted)
        known = None if thing is None else self.held.get(id(thing))
        return known[1] if known is not None and known[0] is thing else None

    def add_word(self, word: str) -> None:
        """Take in a function of ``localize.ops`` that stands for a word of the plan."""
        self.canonical[f"{OPS}{word}"] = f"{OPS}{word}"
        self.modules.add(OPS.rstrip("."))

    def _may_import(self, dotted: str) -> None:
        """Let a text import the module that a function is in; those of torch are reached from torch itself."""
        parts = dotted.split(".")
        homes = [".".join(parts[:i]) for i in range(len(parts) - 1, 0, -1) if ".".join(parts[:i]) in sys.modules]
        self.modules.update(home for home in homes[:1] if parts[0] != "torch")


def looked_up(dotted: str) -> Any:
    """Return what a dotted name refers to in modules that are loaded; nothing is imported, no code of a module runs."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        thing: Any = sys.modules.get(".".join(parts[:count]))
        if thing is None:
            continue
        for part in parts[count:]:
            if isinstance(thing, type):
                thing = getattr(thing, part, None)
            else:
                thing = vars(thing).get(part) if hasattr(thing, "__dict__") else None
        return thing
    return None


def _names_of(function: Any) -> Iterator[str]:
    """Yield the names under which a function can be imported."""
    name = getattr(function, "__name__", None) or str(function)
    short = name
    for prefix in _PREFIXES:
        short = short.removeprefix(prefix)
    for place, module in _PLACES.items():
        for candidate in (name, short):
            if vars(module).get(candidate) is function:
                yield f"{place}.{candidate}"
    if isinstance(function, _OPERATIONS):
        yield f"torch.ops.{str(function).replace('::', '.')}"
    home, qualified = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    yield f"{home or 'torch'}.{qualified or name}"


@cache
def torch_constants() -> dict[str, Any]:
    """Return types, layouts and memory formats of torch by their dotted names."""
    kinds = (torch.dtype, torch.layout, torch.memory_format)
    return {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, kinds)}


@dataclass(frozen=True)
class Model:
    """The modules that ``trunk`` and ``heads`` stand for, each under one path, however it is written."""

    roots: dict[str, nn.Module]
    paths: dict[int, str]
    modules: dict[str, nn.Module]
    """Every module by its one path."""

    @classmethod
    def of(cls, trunk: nn.Module, heads: nn.Module) -> Model:
        """Return the modules below a trunk and its heads."""
        roots = {"trunk": trunk, "heads": heads}
        paths: dict[int, str] = {}
        modules: dict[str, nn.Module] = {}
        for root, model in roots.items():
            for path, module in model.named_modules():
                full = f"{root}.{path}" if path else root
                paths.setdefault(id(module), full)
                modules[paths[id(module)]] = module
        return cls(roots, paths, modules)

    def module(self, path: str) -> str:
        """Return the one path of a module, given below which root it is and by which names."""
        root, *parts = path.split(".")
        found = self.roots[root]
        for part in parts:
            child = found._modules.get(part)
            if child is None:
                return path
            found = child
        return self.paths[id(found)]

    def attribute(self, path: str) -> str:
        """Return the one path of an attribute."""
        owner, _, name = path.rpartition(".")
        return f"{self.module(owner)}.{name}"

    def child(self, module: nn.Module, name: str) -> nn.Module | None:
        """Return a module's child by its name."""
        return module._modules.get(name)

    def item(self, module: nn.Module, key: Any) -> str | None:
        """Return the name of what ``module[key]`` is, a child or a parameter; None where there is nothing."""
        if isinstance(module, nn.Sequential | nn.ModuleList) and type(key) is int:
            names = list(module._modules)
            return names[key] if 0 <= key < len(names) else None
        if isinstance(module, nn.ModuleDict) and isinstance(key, str):
            return key if key in module._modules else None
        if isinstance(module, nn.ParameterList) and type(key) is int:
            return str(key) if 0 <= key < len(module) else None
        if isinstance(module, nn.ParameterDict) and isinstance(key, str):
            return key if key in module else None
        return None

    def tensor(self, module: nn.Module, name: str) -> bool:
        """Tell whether a module holds a tensor, or a list or dict of parameters, under a name."""
        return (
            module._parameters.get(name) is not None
            or module._buffers.get(name) is not None
            or isinstance(vars(module).get(name), Tensor)
        )


@dataclass
class Vocabulary:
    """Everything that a text may name."""

    model: Model
    functions: Functions
    segments: dict[str, int]
    """Names of the functions that run a segment, with its number."""
    returned: dict[str, int]
    """How many values each of them returns."""

    @classmethod
    def of(cls, plan: Plan, trunk: nn.Module, heads: nn.Module) -> Vocabulary:
        """Return what the text of a plan may name: so far without the functions of its recorded graphs."""
        functions = Functions()
        segments = {segment.name: segment.index for segment in plan.segments.segments}
        returned = {one.name: len(one.outputs) + len(one.sides) for one in plan.segments.segments}
        return cls(Model.of(trunk, heads), functions, segments, returned)
