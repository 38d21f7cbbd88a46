"""Arguments and flags of the commands: written by hand, or made from the dataclasses that declare options."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, Optional, get_args, get_type_hints

import typer

from localize.cli import helping, tables

SETTINGS: dict[str, Any] = {
    "no_args_is_help": True,
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"], "max_content_width": 110},
}
DEVICES = "cpu, cuda, cuda:N, or auto (cuda if there is one)"
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="Model by name: see `localize models`.")]
OptionalModel = Annotated[
    Optional[str],  # noqa: UP045  typer reads this at run time
    typer.Argument(metavar="MODEL", help="Model by name; optional if the recipe names one."),
]
MethodName = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--method",
        "-m",
        metavar="NAME",
        help="Method or packaged recipe by name, or a class of your own: FILE.py:CLASS, module:CLASS.",
        autocompletion=tables.complete_method,
    ),
]
RecipeFile = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--recipe", "-r", metavar="FILE", help="Recipe: a file, or a folder that convert has written."),
]
SegmentCount = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--segments", "-K", metavar="N|max", help="Number of segments; max: one per local layer."),
]
CutAt = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--cut-at", metavar="NAME,NAME", help="Cut after these: names as `localize inspect` prints them."),
]
CutBy = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--cut-by", metavar="layer|node|parameters|macs|memory", help="What -K balances."),
]
Freeze = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--freeze",
        metavar="GLOB",
        help="Do not train these parameters, such as 'layer1.*'; repeatable.",
    ),
]
Leaf = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--leaf", metavar="PATH", help="Take this module as a whole, with no cut inside; repeatable."),
]
OutputField = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--output-field", metavar="NAME", help="Output with the class scores: a field, or its position: output_1."
    ),
]
Classes = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--num-classes", metavar="N", help="Number of classes; default: the model's own."),
]
InputShape = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--input-shape", metavar="C,H,W", help="Size of one image; default: the model's own."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else, on stdout.")]
Shared = Annotated[
    bool, typer.Option("--shared", help="Let several losses train parameters that both sides of a cut use.")
]
LossName = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--loss",
        metavar="NAME",
        help="Loss of class scores: cross-entropy, focal or bce; default cross-entropy.",
    ),
]
Smoothing = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--smoothing", metavar="F", help="Share of each label that is spread over all classes; default 0."),
]
ClassWeights = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--class-weights",
        metavar="FILE|F,F",
        help="Weight of each class: numbers separated by commas, or a file (JSON, or one per line).",
    ),
]
FocalGamma = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--focal-gamma",
        metavar="F",
        help="--loss focal: how strongly easy examples are down-weighted; default 2.",
    ),
]
OF_LOSS = ("loss", "smoothing", "class_weights", "focal_gamma")
"""The fields with these flags."""
TrustCode = Annotated[
    bool, typer.Option("--trust-code", help="Run the code file that the folder names; it can do anything you can.")
]


Force = Annotated[bool, typer.Option("--force", help="Replace files of an earlier call.")]


_VALUES: Mapping[str, str] = MappingProxyType({"int": "N", "float": "F", "tuple": "N,N", "words": "WORD,WORD"})
"""Placeholder in help for the value of a flag, by the kind of its option."""


@dataclasses.dataclass(frozen=True)
class _Flag:
    """A flag made of a dataclass field: ``d_min`` becomes ``--d-min``."""

    option: tables.Option
    panel: str
    hidden: bool = False
    """Whether only --help-all shows it."""

    @property
    def name(self) -> str:
        return self.option.name

    @property
    def parameter(self) -> inspect.Parameter:
        spelled, told = "--" + self.name.replace("_", "-"), self.option.told
        about: dict[str, Any] = {"show_default": False, "rich_help_panel": self.panel, "hidden": self.hidden}
        if self.option.kind == "bool":
            declared = typer.Option(f"{spelled}/--no-{spelled[2:]}", help=told, **about)
        else:
            metavar = "|".join(self.option.choices) or _VALUES.get(self.option.kind)
            declared = typer.Option(spelled, metavar=metavar or "TEXT", help=told, **about)
        kind: Any = Optional[bool if self.option.kind == "bool" else str]  # noqa: UP045  typer reads it so
        annotation = Annotated[kind, declared]
        return inspect.Parameter(self.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


class Without:
    """``Annotated[Asked, Without("method")]``: the command takes no flag for this field, which keeps its default."""

    def __init__(self, *names: str) -> None:
        self.names = names


def command_with_flags(name: str, function: Callable[..., None], words: Sequence[str] = ()) -> Any:
    """Make the command of a function: its parameters are flags, groups of them (``_FLAGS``), or dataclasses of both.

    ``words`` are the words typed after the command; help shows the options of the method that they name.
    """
    signature = inspect.signature(function, eval_str=True)
    expanded = {p.name: list(_fields_of(p.annotation)) for p in signature.parameters.values()}
    objects = {key: fields for key, fields in expanded.items() if fields}
    plain = [p for p in signature.parameters.values() if p.name not in objects]
    parameters = [field for p in signature.parameters.values() for field in expanded[p.name] or [p]]
    groups = {p.name: list(_FLAGS[p.name](words)) for p in parameters if p.name in _FLAGS}
    parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in parameters if p.name not in groups]
    own = {p.name for p in parameters}
    shared = {flag.name: flag for group in groups.values() for flag in group if flag.name in own}
    parameters = [_with_help_of(p, shared[p.name]) if p.name in shared else p for p in parameters]
    groups = {name: [flag for flag in group if flag.name not in shared] for name, group in groups.items()}
    flags = [flag for group in groups.values() for flag in group]
    assert len({flag.name for flag in flags} | own) == len(flags) + len(parameters)

    def command(*, help_all: helping.HelpAll = False, **given: Any) -> None:
        for group, members in groups.items():
            given[group] = {flag.name: value for flag in members if (value := given.pop(flag.name)) is not None}
        made = {
            key: _class_of(signature.parameters[key].annotation)(**{field.name: given[field.name] for field in fields})
            for key, fields in objects.items()
        }
        function(**{p.name: given[p.name] for p in plain}, **made)

    parameters += [flag.parameter for flag in flags]
    parameters.append(inspect.signature(command, eval_str=True).parameters["help_all"])
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    one = typer.Typer(add_completion=False, **SETTINGS | {"no_args_is_help": False})
    one.command(name, help=function.__doc__, cls=helping.Command)(command)
    return typer.main.get_command(one)


def _with_help_of(parameter: inspect.Parameter, flag: _Flag) -> inspect.Parameter:
    """Return a parameter whose help also describes the methods' option of the same name.

    If a method was named, the option is listed among the method's options.
    """
    kind, declared = get_args(parameter.annotation)
    declared = copy.copy(declared)
    values = f" ({'|'.join(flag.option.choices)})" if flag.option.choices else ""
    declared.help = f"{declared.help} Of the method: {flag.option.told.rstrip('.')}{values}."
    declared.rich_help_panel = None if flag.hidden else flag.panel
    return parameter.replace(annotation=Annotated[kind, declared])


def _class_of(annotation: Any) -> Any:
    """Return the class in ``Annotated[Class, ...]``."""
    return (get_args(annotation) or (annotation,))[0]


def _fields_of(annotation: Any) -> Iterator[inspect.Parameter]:
    """Yield the fields of a dataclass annotation as parameters, except those named by :class:`Without`."""
    kind = _class_of(annotation)
    if not dataclasses.is_dataclass(kind):
        return
    absent = {name for about in get_args(annotation)[1:] if isinstance(about, Without) for name in about.names}
    hints = get_type_hints(kind, include_extras=True)
    for item in dataclasses.fields(kind):
        if item.name not in absent:
            default = None if item.default is dataclasses.MISSING else item.default
            yield inspect.Parameter(
                item.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[item.name]
            )


def _method_flags(words: Sequence[str]) -> Iterator[_Flag]:
    """Yield a flag for each option of the named method, or of any packaged method if none was named.

    Without a name all options are accepted but hidden, so an error can list the methods that have the option.
    """
    named = asked_for(words)
    if {"-h", "--help", "--help-all"} & set(words) and (problem := tables.problem_of(named)):
        typer.echo(problem, err=True)
    shown = tables.options_of(named) if named else ()
    spelled = {one.name for about in tables.methods().values() for one in about.options if one.kind != "bool"}
    for option in shown:
        if option.kind == "bool" and option.name in spelled:  # a flag takes a value either for all methods or for none
            option = dataclasses.replace(option, kind="str", choices=("true", "false"))
        yield _Flag(option, f"Options of {named}")
    others: dict[str, list[tuple[str, tables.Option]]] = {}
    for method, about in tables.methods().items():
        for option in about.options:
            if option.name not in {one.name for one in shown}:
                others.setdefault(option.name, []).append((method, option))
    yield from (_Flag(_merged(owners), "Options of methods", hidden=True) for owners in others.values())


def _merged(owners: Sequence[tuple[str, tables.Option]]) -> tables.Option:
    """Return one option for the options of several methods, with the meaning for each method."""
    kinds = {option.kind for _, option in owners}
    choices = tuple(dict.fromkeys(choice for _, option in owners for choice in option.choices))
    told = " ".join(f"{method}: {option.told}." for method, option in owners)
    kind = kinds.pop() if len(kinds) == 1 else "str"
    return tables.Option(owners[0][1].name, kind, None, told, choices if all(one.choices for _, one in owners) else ())


def asked_for(words: Sequence[str]) -> str:
    """Return the method named on the command line, directly or through a recipe; empty if there is none."""
    for number, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag in ("--method", "-m", "--recipe", "-r"):
            value = value if equals else (words[number + 1] if number + 1 < len(words) else "")
            return tables.method_of(value)
    return ""


def _shared_flags(options: Iterable[tables.Option]) -> Iterator[_Flag]:
    """Yield one flag for each option that does not depend on the method."""
    for option in options:
        yield _Flag(option, helping.panel(option.name), hidden=not helping.is_shared(option.name))


_FLAGS: Mapping[str, Callable[[Sequence[str]], Iterator[_Flag]]] = {
    "options": _method_flags,
    "schedule": lambda words: _shared_flags(tables.schedule()),
    "settings": lambda words: _shared_flags(tables.settings()),
}


def read_like(text: Any, default: Any) -> Any:
    """Return the value of ``text`` for an option with this default; without a default, the text decides the type."""
    if default is None:
        looks = (read_number(text, kind) for kind in (bool, int, float))
        return next((value for value in looks if not isinstance(value, str)), text)
    if isinstance(default, tuple):
        return tuple(read_like(part, default[0] if default else None) for part in str(text).split(","))
    return read_number(text, type(default))


def read_number(text: Any, kind: type, of: type = int) -> Any:
    """Return ``text`` as a number, as numbers of type ``of``, or as a truth value.

    Other text is returned unchanged, for the owner of the option to refuse. A switch has a text only if another method
    has an option of the same name that is not a switch.
    """
    try:
        if kind is bool:
            return {"true": True, "false": False}.get(str(text).lower(), text)
        if kind is tuple:
            return tuple(of(part) for part in text.split(","))
        return kind(text) if kind in (int, float) else text
    except ValueError:
        return text
