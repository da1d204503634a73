"""``raysandbox run``: a command under a profile."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from raysandbox.cli.look import application
from raysandbox.errors import ProfileError

if TYPE_CHECKING:
    from raysandbox.kernel.cgroup import Usage

__all__ = ["app"]

app = application()


def _used(usage: Usage) -> str:
    memory, cpu = usage.memory_peak_bytes, usage.cpu_time_s
    peak = "unknown" if memory is None else f"{memory / (1 << 20):.1f} MiB"
    return f"peak memory {peak}, CPU {'unknown' if cpu is None else f'{cpu:.3f} s'}"


@app.command(
    # What stands behind the command is its own, also if it looks like an option.
    context_settings={"allow_interspersed_args": False}
)
def run(
    command: Annotated[
        list[str],
        typer.Argument(
            metavar="COMMAND", help="Program and arguments, as seen inside."
        ),
    ],
    profile: Annotated[
        str,
        typer.Option(
            "--profile", "-p", metavar="NAME", help="A profile's name, or a .toml file."
        ),
    ] = "strict",
    env: Annotated[
        list[str] | None,
        typer.Option(
            "--env",
            "-e",
            metavar="NAME=VALUE",
            help="A variable for the command; repeatable.",
        ),
    ] = None,
    directory: Annotated[
        list[str] | None,
        typer.Option(
            "--directory",
            "-d",
            metavar="PATH",
            help="Part of @working_dir, read-only; repeatable.",
        ),
    ] = None,
    chdir: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Where it starts; default: /scratch."),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Report walls and usage.")
    ] = False,
) -> None:
    """Run COMMAND behind every wall of a profile.

    Exit status: the command's own; 128+N if signal N ended it; 124 if a time
    limit did; 125 if nothing was run, and why is on stderr.

    \b
    raysandbox run -- python3 -c 'print(open("/etc/passwd").read())'
    raysandbox run --profile standard -d /data/in -- python3 /data/in/job.py
    """  # noqa: D301 - click's mark: keep the lines as they are
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
        console.print(_used(done.usage), markup=False)
    sys.stdout.flush()
    raise SystemExit(done.exit_code)
