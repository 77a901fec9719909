"""The `lattica` command: our own commands, and those that installed packages add.

A package adds commands by an entry point of the group `lattica.commands`: a function `register(app)` in a
module that imports quickly, since every command loads it.
"""

from __future__ import annotations

import sys
from importlib.metadata import entry_points
from typing import Annotated, Final

import typer

import lattica
from lattica.cli import node, peers

COMMANDS_GROUP: Final = "lattica.commands"


def make_app() -> typer.Typer:
    """The whole command, plug-ins included."""
    app = typer.Typer(
        name="lattica",
        help="A peer-to-peer mesh for AI: connect machines, run one model across them.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,  # a bug's traceback is for us, and plain is what people paste
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    node.register(app)
    peers.register(app)
    for entry in sorted(entry_points(group=COMMANDS_GROUP), key=lambda entry: entry.name):
        try:
            entry.load()(app)
        except Exception as error:  # what works without that package must go on working
            print(f"warning: the commands of {entry.value} cannot be loaded: {error}", file=sys.stderr)
    return app


def _version(wanted: bool) -> None:
    if wanted:
        print(f"lattica {lattica.__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    return


def main() -> None:
    """The console script."""
    make_app()(prog_name="lattica")
