"""How every command looks: plain help, one kind of option for JSON."""

from __future__ import annotations

from typing import Annotated, Any

import typer

__all__ = ["AsJson", "application"]

AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]


def application(help: str | None = None, **options: Any) -> typer.Typer:  # noqa: A002
    """Return a typer application; with `help` a group of commands."""
    return typer.Typer(
        help=help,
        no_args_is_help=help is not None and "invoke_without_command" not in options,
        add_completion=False,
        rich_markup_mode=None,
        **options,
    )
