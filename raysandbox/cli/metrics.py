"""``raysandbox metrics``: what `ps` shows, for Prometheus."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from raysandbox.cli.look import application
from raysandbox.errors import ProfileError
from raysandbox.observe import page

__all__ = ["app"]

app = application()


@app.command()
def metrics(
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Replace this file (*.prom in the directory of a textfile collector).",
        ),
    ] = None,
) -> None:
    """Print what jobs store, against their quotas, and what runs, for Prometheus.

    What jails came to is in Ray's own metrics already. As for `ps`, the user that
    Ray runs as, or root, sees all of it.
    """
    text = page.page()
    if output is None:
        sys.stdout.buffer.write(text)
        return
    try:
        # In one step: a collector may read at any time.
        fd, name = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}.")
        with open(fd, "wb") as file:
            file.write(text)
            os.fchmod(fd, 0o644)
        os.replace(name, output)
    except OSError as error:
        raise ProfileError(
            source="--output",
            value=str(output),
            reason=f"can't be written: {os.strerror(error.errno or 0)}",
        ) from error
