"""Start a node: `ray start`, in this process, with the node's policy and launcher.

Three doors to the same thing: `raysandbox start` (`start`), a local cluster of
`raysandbox.init()` (`local`), and ``RAYSANDBOX=1`` in the environment of a plain
`ray start` (`arm`, called by `raysandbox.node.autostart`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from raysandbox import policy as policies
from raysandbox import profile as profiles
from raysandbox.errors import ProfileError
from raysandbox.node import interpreters, job_agent, launch

if TYPE_CHECKING:
    from raysandbox.cluster.settings import ClusterDir

__all__ = ["arm", "local", "start"]

# Workers' ports of local clusters, below those of the kernel. Ranges may overlap:
# raylet passes over a port that is taken.
_FIRST_PORT, _PORTS, _PLACES, _APART = 10_000, 512, 340, 64


def arm(policy: str = "") -> launch.Launcher:
    """Put the launcher in front of whatever this process starts of Ray.

    Args:
        policy: Path of the policy; "" for the usual places.

    Raises:
        UnsupportedError: A seam of Ray's is missing; nothing was changed.
        SetupError: The launcher is not installed.
    """
    launcher = launch.Launcher(lambda: policies.load_node(policies.find(policy)))
    launch.install(launcher)
    return launcher


def start(
    argv: Sequence[str], *, policy: str = "", cluster: ClusterDir | None = None
) -> None:
    """Run `ray start` with every worker behind the node's wall.

    Args:
        argv: The arguments of `ray start`.
        policy: As for `arm`.
        cluster: Identities and guard of a hardened cluster to be part of.

    Raises:
        RaysandboxError: Nothing was started, or it was ended again.
    """
    # Before anything is started, not when raylet is about to be.
    problems = []
    try:
        node = policies.load_node(policies.find(policy))
        interpreters.look(node.policy)
    except ProfileError as error:
        if cluster is None:
            raise
        problems.append(str(error))
    launcher = arm(policy)
    if cluster is not None:
        from raysandbox.cluster import start as hardened

        launcher.wrapper = str(cluster.run / "launcher" / "worker")
        launcher.wrap = False
        launcher.entrypoints = job_agent.HERE
        launch.uninstall()  # it comes after the cluster's own
        hardened.start(
            cluster,
            argv,
            program=launcher.wrapper,
            after=lambda: launch.install(launcher),
            problems=problems,
        )
        return
    from ray.scripts.scripts import cli

    cli.main(["start", *argv], prog_name="raysandbox", standalone_mode=False)


def local(policy: str = "") -> launch.Launcher:
    """Return a launcher for a cluster of this process alone.

    Where the operator has no policy the one who starts it is the operator: all
    profiles are offered, untagged tasks get the strictest, and there are no totals.

    Args:
        policy: As for `arm`.
    """
    path = policies.find(policy)
    named = bool(policy or os.environ.get(policies.ENV)) or os.path.lexists(path)

    def load() -> policies.Node:
        return policies.load_node(path) if named else policies.resolve(_local_policy())

    first = _FIRST_PORT + os.getpid() % _PLACES * _APART
    return launch.Launcher(load, use_totals=named, ports=(first, first + _PORTS - 1))


def _local_policy() -> policies.Policy:
    offered = []
    for name in profiles.names():
        try:
            profiles.load(name)
        except ProfileError as error:
            warnings.warn(f"profile {name!r} is not offered: {error}", stacklevel=2)
            continue
        offered.append(name)
    return policies.Policy(
        description="a local cluster of the one who started it",
        offer=dict.fromkeys(offered, policies.MOST_AT_ONCE),
        rules=(policies.Rule(name="everybody", profiles=tuple(offered), metadata={}),),
        runtime_env=policies.RuntimeEnv(
            pip="allow",
            uv="allow",
            remote_uris="allow",
            why="What its installer runs here its owner could run here too.",
        ),
    )
