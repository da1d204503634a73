"""What a driver calls: start Ray with the sandbox, and name a task's profile."""

from __future__ import annotations

import os
from typing import Any

from raysandbox.errors import ProfileError

__all__ = ["HOOK", "init", "tag"]

#: For ``runtime_env={"worker_process_setup_hook": HOOK}`` on any cluster.
HOOK = "raysandbox.worker_hook"


def tag(profile: str = "strict", amount: float = 1) -> dict[str, float]:
    """Return the resources that make a task run under ``profile``.

    ``@ray.remote(resources=raysandbox.tag("strict"))``: the task runs only on
    nodes that offer the profile, in a jail that enforces it.

    Args:
        profile: Name of the profile.
        amount: Share of the node's count for this profile; above 0. A node whose
            policy counts the profile takes a whole one, and refuses less.

    Raises:
        ProfileError: The name can't be a profile's, or the amount is not
            above 0: such a task would run without its tag.
    """
    from raysandbox import client
    from raysandbox import profile as profiles
    from raysandbox.policy import TAG_PREFIX

    if not isinstance(profile, str) or not profiles.is_name(profile):
        raise ProfileError(
            source="<tag>",
            value=profile,
            reason="must be a profile's name: a-z, 0-9, _ and -",
        )
    if not amount > 0:
        raise ProfileError(source="<tag>", value=amount, reason="must be above 0")
    client.install()
    return {f"{TAG_PREFIX}{profile}": amount}


def init(
    *args: Any, wall: bool = True, policy: str | None = None, **options: Any
) -> Any:
    """Start or join Ray with every worker in the sandbox.

    Takes ``ray.init``'s arguments and returns what it returns. A local cluster
    offers what its policy says: ``policy``, else ``RAYSANDBOX_POLICY`` or
    ``/etc/raysandbox/policy.toml``, else all profiles that `raysandbox profiles
    list` shows. On an existing one (``address=``) the nodes decide.

    Args:
        args: As for ``ray.init``.
        wall: On a local cluster, start every worker behind a wall of its own
            (see `raysandbox.node.wall`). False leaves the jails alone: for hosts
            that can't raise it.
        policy: Path of a local cluster's policy.
        options: As for ``ray.init``.

    Raises:
        ProfileError: ``runtime_env`` has a setup hook already; only one runs.
            Or a policy that can't be used.
        UnsupportedError: The host can't raise the wall; nothing was started.
        SetupError: The launcher is missing.
    """
    import ray

    from raysandbox import client, launch

    client.install()
    launch.launcher_path()
    address = args[0] if args else options.get("address")
    is_local = address in (None, "local") and not os.environ.get("RAY_ADDRESS")
    if is_local and wall:
        return _init_behind_wall(args, options, policy or "")
    if policy is not None:
        raise ProfileError(
            source="raysandbox.init",
            where="policy",
            value=policy,
            reason="is for local clusters with a wall: elsewhere the nodes have one",
        )
    environment = dict(options.pop("runtime_env", None) or {})
    if environment.get("worker_process_setup_hook", HOOK) != HOOK:
        raise ProfileError(
            source="runtime_env",
            where="worker_process_setup_hook",
            value=environment["worker_process_setup_hook"],
            reason=f"must be {HOOK!r} or absent: a worker runs one hook",
        )
    environment["worker_process_setup_hook"] = HOOK
    options["runtime_env"] = environment
    if is_local:
        from raysandbox import profile as profiles
        from raysandbox.policy import MOST_AT_ONCE, TAG_PREFIX

        tags = {f"{TAG_PREFIX}{name}": MOST_AT_ONCE for name in profiles.names()}
        options["resources"] = {**tags, **(options.get("resources") or {})}
    return ray.init(*args, **options)


def _init_behind_wall(args: Any, options: dict[str, Any], policy: str) -> Any:
    """Start a local cluster; the launcher is in place for that long only."""
    import ray

    from raysandbox.node import launch
    from raysandbox.node.start import local

    if ray.is_initialized():
        # Nothing would be started: Ray says so, or ignores it when told to.
        return ray.init(*args, **options)
    launch.install(local(policy))
    # A cluster that happens to run here was not started by us.
    if not args:
        options["address"] = "local"
    try:
        return ray.init(*args, **options)
    finally:
        launch.uninstall()
