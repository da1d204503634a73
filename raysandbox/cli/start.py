"""`raysandbox start`: `ray start`, with every worker behind the node's wall."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from raysandbox.cli.look import application
from raysandbox.errors import RaysandboxError

__all__ = ["app"]

app = application()


@app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": ["--help"],
    }
)
def start(
    context: typer.Context,
    policy: Annotated[
        str,
        typer.Option(help="The node's policy; else RAYSANDBOX_POLICY or the site's."),
    ] = "",
    cluster: Annotated[
        Optional[Path],  # noqa: UP045 - typer reads it when the module is loaded
        typer.Option(help="Directory of a hardened cluster to be part of."),
    ] = None,
) -> None:
    """Start a node; every other argument is `ray start`'s own.

    Nothing is started without a policy (`raysandbox policy init`) that only its
    owner can write, nor where Ray or the host lacks what the policy requires.

    \b
    raysandbox start --head --num-cpus=8
    raysandbox start --address 10.0.0.1:6379 --policy ./policy.toml --block
    """  # noqa: D301 - click's mark: keep the lines as they are
    from raysandbox.cli import fail

    opened = None
    if cluster is not None:
        from raysandbox.cli.member import opened as open_directory

        opened = open_directory(cluster)
    try:
        if opened is not None:
            from raysandbox.cluster.start import speak

            # The next import is Ray's too, which reads then who it is.
            speak(opened)
        from raysandbox.node.start import start as run

        run(context.args, policy=policy, cluster=opened)
    except RaysandboxError as error:
        fail(error)
