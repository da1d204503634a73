"""``raysandbox run``: a command under a profile."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from rich.console import Console

from raysandbox.errors import ProfileError

__all__ = ["app"]

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
)
def run(
    command: Annotated[
        list[str], typer.Argument(help="Program and arguments, as seen inside.")
    ],
    profile: Annotated[
        str,
        typer.Option("--profile", "-p", help="Name of a profile, or a .toml file."),
    ] = "strict",
    env: Annotated[
        list[str] | None,
        typer.Option("--env", "-e", help="NAME=VALUE for the command; repeatable."),
    ] = None,
    directory: Annotated[
        list[str] | None,
        typer.Option(
            "--directory", "-d", help="Part of @working_dir, read-only; repeatable."
        ),
    ] = None,
    chdir: Annotated[
        str | None, typer.Option(help="Where it starts; default: /scratch.")
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Report walls and usage.")
    ] = False,
) -> None:
    r"""Run COMMAND behind every wall of a profile.

    Exit status: the command's own; 128+N if signal N ended it; 124 if a time
    limit did; 125 if nothing was run, and why is on stderr.

    \b
    raysandbox run -- python3 -c 'print(open("/etc/passwd").read())'
    raysandbox run --profile standard -d /data/in -- python3 /data/in/job.py
    """
    from raysandbox import profile as profiles
    from raysandbox import run as runner

    chosen = (
        profiles.load_file(profile)
        if profile.endswith(".toml")
        else profiles.load(profile)
    )
    variables = {}
    for each in env or ():
        name, equals, value = each.partition("=")
        if not equals or not name:
            raise ProfileError(source="--env", value=each, reason="must be NAME=VALUE")
        variables[name] = value
    done = runner.run(
        chosen,
        command,
        environment=variables,
        working_dirs=[os.path.abspath(each) for each in directory or ()],
        chdir=chdir,
    )
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    if done.reason:
        console.print(
            f"raysandbox: {command[0]} was ended under profile {chosen.name!r}: "
            f"{done.reason}",
            markup=False,
        )
    if verbose:
        for wall in done.protections:
            reason = f" ({wall.reason})" if wall.reason else ""
            console.print(f"{wall.name}: {wall.state.value}{reason}", markup=False)
        usage = done.usage
        console.print(
            f"peak memory {usage.memory_peak_bytes} bytes, cpu {usage.cpu_time_s} s",
            markup=False,
        )
    sys.stdout.flush()
    raise SystemExit(done.exit_code)
