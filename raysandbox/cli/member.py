"""What the commands about a cluster directory share."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from raysandbox.cluster.audit import plain
from raysandbox.cluster.errors import ClusterError
from raysandbox.cluster.settings import ClusterDir
from raysandbox.errors import ProfileError, RaysandboxError

__all__ = ["Addresses", "Dir", "fail", "opened", "speak_as", "take_up"]

Dir = Annotated[
    Path,
    typer.Option("--cluster", envvar="RAYSANDBOX_CLUSTER", help="Cluster directory."),
]
Addresses = Annotated[
    list[str], typer.Option("--address", help="IP address; repeatable.")
]


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


def speak_as(cluster: ClusterDir, argv: Sequence[str], policy: str) -> None:
    """Check all that a start needs, then give this process its identity.

    Raises:
        ClusterError: With everything that is wrong; Ray was not imported.
    """
    from raysandbox import policy as policies
    from raysandbox.cluster.start import check, speak

    problems = []
    try:
        policies.load_node(policies.find(policy))
    except ProfileError as error:
        problems.append(str(error))
    check(cluster, argv, problems)
    speak(cluster)


def take_up(cluster: ClusterDir, wait_s: float = 90.0) -> bool:
    """Have running helpers take up what has changed, and wait until they have.

    Returns:
        Whether any run here that have; others do when they start.

    Raises:
        ClusterError: They run and belong to another user, refuse the change, or
            don't say within `wait_s` seconds that it is in force.
    """
    from raysandbox.cluster.start import _running

    pid = _running(cluster)
    if not pid:
        return False
    loaded = cluster.run / "loaded.json"
    wanted = cluster.digest()
    try:
        loaded.unlink(missing_ok=True)
        os.kill(pid, signal.SIGHUP)
    except ProcessLookupError:
        return False
    except PermissionError:
        raise ClusterError(
            where=f"guard, pid {pid}",
            what="runs as another user and was not told of the change",
            remedy="run `raysandbox cluster reload` as that user",
        ) from None
    end = time.monotonic() + wait_s
    while time.monotonic() < end:
        with contextlib.suppress(OSError, ValueError):
            said = json.loads(loaded.read_text())
            if said["problem"]:
                raise ClusterError(
                    where=f"guard, pid {pid}",
                    what=f"goes on with what it had: {said['problem']}",
                    remedy="put that right, then `raysandbox cluster reload`",
                )
            if said["digest"] == wanted:
                print("in force")
                return True
        if _running(cluster) != pid:
            return False
        time.sleep(0.05)
    raise ClusterError(
        where=f"guard, pid {pid}",
        what="did not say that the change is in force",
        remedy=f"look at {cluster.run}/supervisor.log and envoy.log",
    )
