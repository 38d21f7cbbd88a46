"""Arguments and flags of the commands, by hand and from the dataclasses that declare options."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Optional, get_args, get_type_hints

import typer

SETTINGS: dict[str, Any] = {
    "no_args_is_help": True,
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"], "max_content_width": 110},
}
DEVICES = "cpu, cuda, cuda:N, or auto (cuda where there is one)"
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="Model by name: see `localize models`.")]
OptionalModel = Annotated[
    Optional[str],  # noqa: UP045  typer reads this at run time
    typer.Argument(metavar="MODEL", help="Model by name; may be left out where the recipe names one."),
]
MethodName = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--method", "-m", metavar="NAME", help="Method, or packaged recipe, by name."),
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
    typer.Option("--cut-at", metavar="NAME,NAME", help="Cut behind these: names as `localize inspect` prints them."),
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
        help="Do not train these parameters, such as 'layer1.*'; may be given several times.",
    ),
]
Leaf = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--leaf", metavar="PATH", help="Take this module whole: no cut in it; may be given several times."),
]
OutputField = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--output-field", metavar="NAME", help="Output that holds the class scores: a field, or output_1 by its place."
    ),
]
Classes = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--num-classes", metavar="N", help="Number of classes; default: what the model was made for."),
]
InputShape = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--input-shape", metavar="C,H,W", help="Size of one image; default: what the model was made for."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else, on stdout.")]
Shared = Annotated[
    bool, typer.Option("--shared", help="Let several losses train parameters that are used on both sides of a cut.")
]
TrustCode = Annotated[
    bool, typer.Option("--trust-code", help="Run the file of code that the folder names: it can do all that you can.")
]


Force = Annotated[bool, typer.Option("--force", help="Replace what an earlier call has written.")]


@dataclasses.dataclass(frozen=True)
class _Flag:
    """A flag made of a dataclass field: ``d_min`` becomes ``--d-min``."""

    name: str
    kind: type
    help: str
    choices: tuple[str, ...] = ()

    @property
    def parameter(self) -> inspect.Parameter:
        spelled = "--" + self.name.replace("_", "-")
        if self.kind is bool:
            declared = typer.Option(f"{spelled}/--no-{spelled[2:]}", help=self.help, show_default=False)
        else:
            metavar = "|".join(self.choices) or {int: "N", float: "F", tuple: "N,N"}.get(self.kind, "TEXT")
            declared = typer.Option(spelled, metavar=metavar, help=self.help, show_default=False)
        kind = bool if self.kind is bool else str
        annotation = Annotated[Optional[kind], declared]  # noqa: UP045
        return inspect.Parameter(self.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


class Without:
    """``Annotated[Asked, Without("method")]``: the command takes no flag for this field, which keeps its default."""

    def __init__(self, *names: str) -> None:
        self.names = names


def command_with_flags(name: str, function: Callable[..., None]) -> Any:
    """Make the command of a function: its parameters are flags, groups of them (``_FLAGS``), or dataclasses of both."""
    signature = inspect.signature(function, eval_str=True)
    expanded = {p.name: list(_fields_of(p.annotation)) for p in signature.parameters.values()}
    objects = {key: fields for key, fields in expanded.items() if fields}
    plain = [p for p in signature.parameters.values() if p.name not in objects]
    parameters = [field for p in signature.parameters.values() for field in expanded[p.name] or [p]]
    groups = {p.name: list(_FLAGS[p.name]()) for p in parameters if p.name in _FLAGS}
    flags = [flag for group in groups.values() for flag in group]
    parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in parameters if p.name not in groups]
    assert len({flag.name for flag in flags} | {p.name for p in parameters}) == len(flags) + len(parameters)

    def command(**given: Any) -> None:
        for group, members in groups.items():
            given[group] = {flag.name: value for flag in members if (value := given.pop(flag.name)) is not None}
        made = {
            key: _class_of(signature.parameters[key].annotation)(**{field.name: given[field.name] for field in fields})
            for key, fields in objects.items()
        }
        function(**{p.name: given[p.name] for p in plain}, **made)

    parameters += [flag.parameter for flag in flags]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    one = typer.Typer(add_completion=False, **SETTINGS | {"no_args_is_help": False})
    one.command(name, help=function.__doc__)(command)
    return typer.main.get_command(one)


def _class_of(annotation: Any) -> Any:
    """Return the class in ``Annotated[Class, ...]``."""
    return (get_args(annotation) or (annotation,))[0]


def _fields_of(annotation: Any) -> Iterator[inspect.Parameter]:
    """Yield the fields of an annotation that is a dataclass as parameters, without those it says it is without."""
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


def _method_flags() -> Iterator[_Flag]:
    """Yield one flag for every option that some method has, saying what it means to whom."""
    from localize import methods

    flags: dict[str, _Flag] = {}
    for method in methods.names():
        for item in dataclasses.fields(methods.get(method)):
            flag = _Flag(
                item.name,
                type(item.default),
                f"{method}: {item.metadata['help']}; default {'none' if item.default == '' else item.default}.",
                item.metadata["choices"],
            )
            flags[item.name] = _merged(flags[item.name], flag) if item.name in flags else flag
    yield from flags.values()


def _merged(one: _Flag, other: _Flag) -> _Flag:
    """Return the flag of an option that two methods have."""
    kind = one.kind if one.kind is other.kind else str
    choices = tuple(dict.fromkeys((*one.choices, *other.choices))) if one.choices and other.choices else ()
    return _Flag(one.name, kind, f"{one.help} {other.help}", choices)


def _training_flags() -> Iterator[_Flag]:
    """Yield one flag for every setting of the trainer."""
    from localize.recipes.settings import settings

    for item in settings():
        if item.name != "output":
            default = f"; default {item.default}" if item.default is not None else ""
            choices = item.metadata["choices"]
            yield _Flag(item.name, item.metadata["type"], f"{item.metadata['help']}{default}.", choices)


def _schedule_flags() -> Iterator[_Flag]:
    """Yield one flag for every option of a schedule."""
    from localize.passes.schedule import Schedule

    for item in dataclasses.fields(Schedule):
        about = item.metadata
        yield _Flag(item.name, type(item.default), f"{about['help']}; default {item.default}.", about["choices"])


_FLAGS: Mapping[str, Callable[[], Iterator[_Flag]]] = {
    "options": _method_flags,
    "schedule": _schedule_flags,
    "settings": _training_flags,
}


def read_number(text: Any, kind: type, of: type = int) -> Any:
    """Return the number, or numbers of type ``of``, or the truth value, that ``text`` spells.

    What spells none stays as it is, and is refused by whose option it is. A switch is spelled only where another method
    has an option of the same name that is none.
    """
    try:
        if kind is bool:
            return {"true": True, "false": False}.get(str(text).lower(), text)
        if kind is tuple:
            return tuple(of(part) for part in text.split(","))
        return kind(text) if kind in (int, float) else text
    except ValueError:
        return text
