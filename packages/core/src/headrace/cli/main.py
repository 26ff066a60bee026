"""The `headrace` command: which sub-commands there are, and how failures look."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from headrace.cli import demo, doctor, engine, hold, inspect, join, plan, resume, status, timeline, update
from headrace.cli.console import show_error
from headrace.errors import HeadraceError

COMMANDS = (demo, engine, update, plan, hold, join, status, resume, inspect, doctor, timeline)
"""Modules with `register(app)`, in the order of the help page."""


class _Commands(TyperGroup):
    """Turns a `HeadraceError` of any sub-command into one line on stderr and exit code 1."""

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 - typer keeps its context class to itself
        try:
            return super().invoke(ctx)
        except HeadraceError as error:
            show_error(error, debug=bool(ctx.params.get("debug")))
            raise typer.Exit(1) from error


app = typer.Typer(
    name="headrace",
    cls=_Commands,
    help="Puts new weights into LLM inference engines while they serve.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if not wanted:
        return
    try:
        typer.echo(f"headrace {version('headrace')}")
    except PackageNotFoundError:
        typer.echo("headrace, run from a source tree without being installed")
    raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Puts new weights into LLM inference engines while they serve."""


for _command in COMMANDS:
    _command.register(app)
