"""The application: how commands are registered, and how errors become messages."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import localize
from localize.cli.flags import SETTINGS, command_with_flags
from localize.cli.printed import say
from localize.errors import LocalizeError, Notice, ReportedError

_UsageError: type[typer.BadParameter] = typer.BadParameter.__mro__[1]
"""The error that click, or typer's copy of it, raises if it cannot parse the command line."""
_WITH_FLAGS: dict[str, Callable[..., None]] = {}


class _Group(TyperGroup):
    """Turns our errors into messages, and stub commands into commands with flags."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        if name in _WITH_FLAGS:
            command = command_with_flags(name, _WITH_FLAGS[name], rest)
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:
        try:
            with _notices():
                return super().invoke(ctx)
        except _UsageError as error:
            if not _reports():
                raise typer.Exit(error.exit_code) from error
            raise
        except LocalizeError as error:
            if isinstance(error, ReportedError) or not _reports():
                raise typer.Exit(error.exit_code) from error
            say(f"error: {error.on_command_line}", err=True)
            if not error.help:
                say(f"  help: localize {ctx.invoked_subcommand} --help", err=True)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            say("interrupted", err=True)
            raise typer.Exit(130) from error


@contextlib.contextmanager
def _notices() -> Iterator[None]:
    """Print our own warnings as one line each, and all others as Python does."""
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(message: Warning | str, *where: Any, **options: Any) -> None:
            if isinstance(message, Notice):
                say(f"warning: {message.on_command_line}", err=True)
            else:
                others(message, *where, **options)

        warnings.showwarning = show
        yield


def _reports() -> bool:
    """Return whether this process prints an error; if several processes fail alike, only one prints it."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        return True
    from localize.train.parallel import reports

    return reports()


app = typer.Typer(name="localize", cls=_Group, **SETTINGS)


def with_flags(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command whose parameters are groups of flags in ``_FLAGS``, or dataclasses of flags."""
    _WITH_FLAGS[function.__name__] = function
    app.command(function.__name__, help=function.__doc__)(lambda: None)
    return function


def main() -> None:
    """Run the command line."""
    app(prog_name="localize")


def _print_version(asked: bool) -> None:
    if asked:
        say(f"localize {localize.__version__}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Rewrite a torchvision or timm model so that every segment is trained by its own loss, and prove that it is."""
