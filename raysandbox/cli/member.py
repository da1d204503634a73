"""What the commands about a cluster directory share."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from raysandbox.cluster.audit import plain
from raysandbox.cluster.errors import ClusterError
from raysandbox.cluster.settings import ClusterDir
from raysandbox.errors import RaysandboxError

__all__ = ["Addresses", "Dir", "Json", "fail", "opened", "reload_guard"]

Dir = Annotated[
    Path,
    typer.Option("--cluster", envvar="RAYSANDBOX_CLUSTER", help="cluster directory"),
]
Addresses = Annotated[
    list[str], typer.Option("--address", help="IP address; may be given again")
]
Json = Annotated[bool, typer.Option("--json", help="as JSON")]


def fail(error: RaysandboxError) -> NoReturn:
    """Print an error of ours and leave with 1."""
    lines = [plain(line) for line in str(error).split("\n")]
    Console(stderr=True, soft_wrap=True).print(
        "raysandbox: " + "\n".join(lines), markup=False, highlight=False
    )
    raise typer.Exit(1)


def opened(path: Path) -> ClusterDir:
    """Open a cluster directory, or fail."""
    try:
        return ClusterDir(path)
    except ClusterError as error:
        fail(error)


def reload_guard(cluster: ClusterDir) -> bool:
    """Have a running guard take up inventory and revocations; whether one runs.

    Raises:
        ClusterError: One runs, and it is another user's.
    """
    from raysandbox.cluster.start import _running

    pid = _running(cluster)
    if not pid:
        return False
    try:
        os.kill(pid, signal.SIGHUP)
    except ProcessLookupError:
        return False
    except PermissionError:
        raise ClusterError(
            where=f"guard, pid {pid}",
            what="runs as another user and was not told of the change",
            remedy="run `raysandbox cluster reload` as that user",
        ) from None
    return True
