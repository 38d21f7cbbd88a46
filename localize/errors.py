"""Every error that localize raises on purpose.

A message has three parts, in the user's words: what is wrong with the input, the facts (value, place, nearest valid
choices), and what to type next::

    error: recipe asks for 16 segments, tv/resnet18 has 9 cuts.
      cuts: relu, layer1.0, layer1.1, ...
      help: -K 10, -K max, or --cut-by node
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any


class Advice(str):
    """What to type next, in Python; ``flags`` is what to type on the command line.

    Without ``flags`` every ``name=value`` in it is a flag there: ``d_min=4 or less`` is ``--d-min 4 or less``.
    """

    flags: str

    def __new__(cls, python: str, flags: str | None = None) -> Advice:
        advice = super().__new__(cls, python)
        advice.flags = re.sub(r"\b([a-z]\w*)=('[^']*'|\"[^\"]*\"|[\w.]+)", _flag, python) if flags is None else flags
        return advice

    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]  # typeshed has the one of str itself
        return str(self), self.flags


def _flag(found: re.Match[str]) -> str:
    name, value = found.group(1).replace("_", "-"), found.group(2).strip("'\"")
    return {"True": f"--{name}", "False": f"--no-{name}"}.get(value, f"--{name} {value}")


class Notice(UserWarning):
    """A warning of this package.

    Args:
        told: what is the case.
        help: what to type if it should not be, an :class:`Advice` where that differs on the command line.
    """

    def __init__(self, told: str, help: str = "") -> None:
        self.told, self.help = told, help
        super().__init__(f"{told} {help}".rstrip())

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.told, self.help)

    @property
    def on_command_line(self) -> str:
        """The warning, with flags for what to type."""
        return f"{self.told} {self.help.flags if isinstance(self.help, Advice) else self.help}".rstrip()


class LocalizeError(Exception):
    """Base of all errors of this package.

    Args:
        problem: one sentence, what is wrong with the input.
        facts: lines with values, places and valid choices.
        help: what to type next; an :class:`Advice` where that differs on the command line.

    ``exit_code`` is what the command line returns: 1 the answer is no, 2 wrong use, 3 this model cannot be converted,
    4 the environment lacks something.
    """

    exit_code = 2

    def __init__(self, problem: str, *, facts: Iterable[str] | str = (), help: str = "") -> None:
        self.problem = problem
        self.facts = (facts,) if isinstance(facts, str) else tuple(facts)
        self.help = help
        super().__init__(str(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.problem, self.facts, self.help), vars(self)

    def __str__(self) -> str:
        return self._text(self.help)

    @property
    def on_command_line(self) -> str:
        """The message, with flags for what to type next."""
        return self._text(self.help.flags if isinstance(self.help, Advice) else self.help)

    def _text(self, help: str) -> str:
        lines = [self.problem, *(f"  {fact}" for fact in self.facts)]
        if help:
            lines.append(f"  help: {help}")
        return "\n".join(lines)


def _rebuild(cls: type[LocalizeError], problem: str, facts: tuple[str, ...], help: str) -> LocalizeError:
    """Make an error whatever its own class takes; the rest of its data follows."""
    error = cls.__new__(cls)
    LocalizeError.__init__(error, problem, facts=facts, help=help)
    return error


class ReportedError(LocalizeError):
    """An error that another process of the same run reports; the command line does not print it again.

    Args:
        problem: the message of that process.
        exit_code: what that process returns. All processes return the same, whichever is seen to end first.
    """

    def __init__(self, problem: str, exit_code: int) -> None:
        super().__init__(problem)
        self.exit_code = exit_code


class UnknownNameError(LocalizeError, LookupError):
    """A model, method, option or recipe was named that does not exist (or a bare name that several sources have)."""


class OptionError(LocalizeError, ValueError):
    """An option has a value that it cannot take.

    Args:
        problem: as for every :class:`LocalizeError`.
        facts: as for every :class:`LocalizeError`.
        help: as for every :class:`LocalizeError`.
        option: name of the option that the error is about, as it is written in Python and in a recipe; None where the
            error is about no single option.
    """

    def __init__(
        self, problem: str, *, facts: Iterable[str] | str = (), help: str = "", option: str | None = None
    ) -> None:
        super().__init__(problem, facts=facts, help=help)
        self.option = option


class RecipeError(LocalizeError, ValueError):
    """A recipe is not a recipe: not YAML, an unknown key, a value of the wrong type.

    Args:
        problem: as for every :class:`LocalizeError`.
        facts: as for every :class:`LocalizeError`.
        help: as for every :class:`LocalizeError`.
        keys: keys and indices that lead to the value the error is about; none where it is about the whole recipe.
    """

    def __init__(
        self,
        problem: str,
        *,
        facts: Iterable[str] | str = (),
        help: str = "",
        keys: tuple[str | int, ...] = (),
    ) -> None:
        super().__init__(problem, facts=facts, help=help)
        self.keys = keys


class ModelError(LocalizeError, TypeError):
    """The given model cannot be taken as it is: wrapped, compiled, or not an ``nn.Module``."""


class TraceError(LocalizeError, RuntimeError):
    """The model's forward could not be captured as a graph."""

    exit_code = 3


class CutError(LocalizeError, ValueError):
    """The model cannot be cut where, or as often as, it was asked for."""


class TiedWeightsError(CutError):
    """A cut would separate two uses of one parameter."""

    exit_code = 3


class MethodError(LocalizeError, ValueError):
    """The method does not apply to this model."""

    exit_code = 3


class PlanError(MethodError):
    """What a method has returned is not a plan that a step can be made of: a mistake in the method."""


class InputError(LocalizeError, ValueError):
    """A batch does not have the shape or type the training step was generated for."""


class AuditError(LocalizeError, AssertionError):
    """The generated training step does not do what the plan declares."""

    exit_code = 1


class MissingError(LocalizeError, RuntimeError):
    """Something outside localize is missing: a package, a data set, a device, or a free output folder."""

    exit_code = 4


class VersionError(LocalizeError, RuntimeError):
    """A file says a version that this localize does not read: a later one wrote it, or it is not a version at all."""

    exit_code = 4


def nearest(name: str, choices: Iterable[str], *, n: int = 3) -> list[str]:
    """Return up to ``n`` of ``choices`` that are spelled most like ``name``, best first, each once.

    Args:
        name: what was typed.
        choices: what it could have been.
        n: number of names, at most.
    """
    return difflib.get_close_matches(name, dict.fromkeys(choices), n=n, cutoff=0.5)


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return ``"did you mean 'x' or 'y'?"`` for the names nearest to ``name``, or an empty string.

    Args:
        name: what was typed.
        choices: what it could have been.
    """
    close = nearest(name, choices)
    return f"did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
