"""Find what ``FILE.py:NAME`` or ``module:NAME`` names, and spell what was found."""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator
from functools import reduce
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from localize.errors import LocalizeError, UnknownNameError, did_you_mean

_PREFIX = "localize_file_"
"""What the module of a file is called, before the stem of the file, which may be that of another module."""
_LOCAL: dict[str, Any] = {}
"""What can be reached by no name, such as a class in a function, by how it was spelled."""


class CodeError(LocalizeError, ImportError):
    """Code from outside of this package cannot be imported."""


def is_spelled(text: str) -> bool:
    """Tell whether a text has the form ``FILE.py:NAME`` or ``module:NAME``."""
    place, _, name = text.rpartition(":")
    parts = place.removesuffix(".py").split(".") if not place.endswith(".py") else ["file"]
    return bool(place) and all(part.isidentifier() for part in (*parts, *_parts(name)))


def load(text: str, *, like: str = "NAME", fits: Callable[[Any], bool] = lambda value: True) -> Any:
    """Return what ``FILE.py:NAME`` or ``module:NAME`` names; a module is also looked for in the current directory.

    Args:
        text: the name.
        like: what messages call NAME.
        fits: tells what could have been meant, for messages; what does not fit is returned all the same.

    Raises:
        UnknownNameError: there is no such file or module, or no such name in it.
        CodeError: it cannot be imported.
    """
    if text in _LOCAL:
        return _LOCAL[text]
    place, _, name = (text, "", "") if text.endswith(".py") else text.rpartition(":")
    if not place:
        raise UnknownNameError(f"{text!r} names no {like.lower()}.", help=f"{text}:{like}, or FILE.py:{like}")
    module = load_file(Path(place), like=like) if place.endswith(".py") else _load_module(place, like)
    fitting = sorted(
        key
        for key, value in vars(module).items()
        if not key.startswith("_") and fits(value) and getattr(value, "__module__", None) == module.__name__
    )
    facts = f"functions and classes in it: {', '.join(fitting) or 'none'}"
    if not name:
        raise UnknownNameError(
            f"{text!r} names a file, not a {like.lower()}.", facts=facts, help=f"{place}:{(*fitting, like)[0]}"
        )
    try:
        return reduce(getattr, _parts(name), module)
    except AttributeError as error:
        raise UnknownNameError(
            f"{place!r} defines no {name!r}.", facts=facts, help=f"{place}:{(*fitting, like)[0]}"
        ) from error


def load_file(path: Path, *, like: str = "NAME") -> ModuleType:
    """Import a file under a name of its own, once; its folder is importable meanwhile, as for ``python FILE.py``.

    Raises:
        UnknownNameError: there is no such file.
        CodeError: it cannot be imported.
    """
    if not path.is_file():
        beside = [other.name for other in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise UnknownNameError(
            f"there is no file {str(path)!r}.",
            facts=did_you_mean(path.name, beside) or (),
            help=f"a path to a Python file, relative to where you are: FILE.py:{like}",
        )
    resolved = path.resolve()
    name = _module_name(resolved)
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, resolved, loader=_FromSource(name, str(resolved)))
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with _importable(resolved.parent):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise CodeError(
            f"{path.as_posix()!r} could not be imported.",
            facts=told(error),
            help=f"python {path.as_posix()}   # repair what it reports",
        ) from error
    return module


def _module_name(file: Path) -> str:
    """Return what the module of a file is called: by its stem, and by its folders too where another file has that name.

    It is an identifier, since the generated text imports losses from it.
    """
    parts = [re.sub(r"\W", "_", part) for part in file.with_suffix("").parts]
    names = (_PREFIX + "_".join(parts[-count:]) for count in range(1, len(parts) + 1))
    numbered = (f"{_PREFIX}{parts[-1]}_{number}" for number in itertools.count(2))
    free = (name for name in itertools.chain(names, numbered) if _file_of(name) in (None, str(file)))
    return next(free)


def _file_of(module: str) -> str | None:
    """Return the file of a module that has been imported; None for one that has not."""
    return getattr(sys.modules.get(module), "__file__", None)


def spelled(value: Any) -> str:
    """Return how a class or function is named: by its file where :func:`load` has read it from one, else by its module.

    What its module does not hold under its name, such as a class that a function defines, or one that a later cell of a
    notebook has defined again, is remembered: it is found in this process only, by a text that names nothing else.
    """
    module, name = value.__module__, value.__qualname__
    place = module
    if module.startswith(_PREFIX):
        file = Path(str(sys.modules[module].__file__))
        place = os.path.relpath(file) if file.is_relative_to(Path.cwd()) else str(file)
    text = f"{Path(place).as_posix()}:{name}" if place is not module else f"{module}:{name}"
    try:
        found = reduce(getattr, name.split("."), sys.modules[module])
    except (AttributeError, KeyError):
        found = None
    if found is value:
        return text
    numbered = (f"{text}.<{number}>" for number in itertools.count(2))
    texts = itertools.chain([text] if "<locals>" in name else [], numbered)
    text = next(one for one in texts if _LOCAL.get(one, value) is value)
    _LOCAL[text] = value
    return text


def origin(module: str) -> str:
    """Return the file that a module, or the package that it is a part of, would be imported from; empty for none.

    Nothing is imported.
    """
    with _importable(Path.cwd()):
        try:
            spec = importlib.util.find_spec(module.partition(".")[0])
        except ValueError:  # __main__ has none
            spec = None
    return (spec.origin or "") if spec is not None else ""


def told(error: BaseException) -> str:
    """Return what an exception says, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")


def _load_module(name: str, like: str) -> ModuleType:
    try:
        with _importable(Path.cwd()):
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise UnknownNameError(
                f"there is no module {error.name!r}.",
                facts="it is neither installed nor in the current directory.",
                help=f"pip install it, or FILE.py:{like}",
            ) from error
        raise _unimportable(name, error) from error
    except (Exception, SystemExit) as error:
        raise _unimportable(name, error) from error


def _unimportable(name: str, error: BaseException) -> CodeError:
    return CodeError(
        f"module {name!r} could not be imported.",
        facts=told(error),
        help=f"python -c 'import {name}'   # repair what it reports",
    )


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let what lies in a folder be imported."""
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        sys.path.remove(entry)


def _parts(name: str) -> list[str]:
    """Return the parts of a qualified name, without ``<locals>`` and the numbers that :func:`spelled` adds."""
    return re.sub(r"\.<\w+>", "", name).split(".") if name else [""]


class _FromSource(importlib.machinery.SourceFileLoader):
    """Compiles the file at every start: beside it nothing is left, and an edit within its second is not missed."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)
