"""The command line: one module for each command, loaded when it is called."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any, NoReturn

import typer
from rich.console import Console
from typer.core import TyperGroup

from raysandbox import __version__
from raysandbox.errors import RaysandboxError

__all__ = ["app", "main"]

# Name: module, its typer application, and the line in the list of commands.
_COMMANDS = {
    "run": ("run", "app", "Run a command under a profile."),
    "doctor": ("doctor", "app", "What this host and user can enforce."),
    "profiles": ("profiles", "app", "List, show and check profiles."),
    "policy": ("policy", "app", "What this node's operator allows, and to whom."),
    "ps": ("ps", "ps_app", "Workers and jails of this machine's nodes."),
    "top": ("ps", "top_app", "The same, live."),
    "metrics": ("metrics", "app", "The same, for Prometheus."),
    "events": ("ps", "events_app", "What became of jails; filter, follow."),
    "kill": ("ps", "kill_app", "End a jail or a worker."),
    "demo": ("demo", "app", "The same attacks on stock Ray and in the sandbox."),
    "start": ("start", "app", "Start a node: `ray start`, every worker behind a wall."),
    "cluster": ("cluster", "app", "A hardened cluster: identities, guard, nodes."),
    "audit": ("audit", "app", "Query and verify the audit log."),
}

_EXIT_ERROR = 125


class _Lazy(TyperGroup):
    """Imports a command when it is asked for: ``--help`` stays quick."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in _COMMANDS:
            return None
        module, name, summary = _COMMANDS[cmd_name]
        if cmd_name not in sys.argv[1:]:
            # Only its line in the list is going to be printed.
            stub = typer.Typer(add_completion=False)
            stub.command(name=cmd_name, help=summary)(lambda: None)
            return typer.main.get_command(stub)
        found = getattr(import_module(f"raysandbox.cli.{module}"), name)
        command = typer.main.get_command(found)
        command.name = cmd_name
        return command


app = typer.Typer(
    cls=_Lazy,
    name="raysandbox",
    help="Run Ray tasks, and other programs, that you don't trust.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"raysandbox {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Run Ray tasks, and other programs, that you don't trust."""


def fail(error: RaysandboxError, code: int = _EXIT_ERROR) -> NoReturn:
    """Print an error of ours as one message, and leave."""
    Console(stderr=True, soft_wrap=True).print(
        f"raysandbox: {error}", markup=False, highlight=False
    )
    raise SystemExit(code)


def main() -> Any:
    """Entry point: errors of ours are messages, not tracebacks."""
    try:
        return app()
    except RaysandboxError as error:
        fail(error)
