"""What a driver calls: start Ray with the sandbox, and name a task's profile."""

from __future__ import annotations

import os
from typing import Any

from raysandbox.errors import ProfileError

__all__ = ["HOOK", "init", "tag"]

#: For ``runtime_env={"worker_process_setup_hook": HOOK}`` on any cluster.
HOOK = "raysandbox.worker_hook"

# How many sandboxed tasks of one profile a local node runs at once: CPUs bound
# it, not this.
_LOCAL_TAGS = 1_000_000


def tag(profile: str = "strict", amount: float = 1) -> dict[str, float]:
    """Return the resources that make a task run under ``profile``.

    ``@ray.remote(resources=raysandbox.tag("strict"))``: the task runs only on
    nodes that offer the profile, in a jail that enforces it.

    Args:
        profile: Name of the profile.
        amount: Share of the node's count for this profile; above 0.

    Raises:
        ProfileError: The name can't be a profile's, or the amount is not
            above 0: such a task would run without its tag.
    """
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
    return {f"{TAG_PREFIX}{profile}": amount}


def init(*args: Any, **options: Any) -> Any:
    """Start or join Ray with every worker of this job in the sandbox.

    Takes ``ray.init``'s arguments and returns what it returns. A local cluster
    offers all profiles that ``raysandbox profiles list`` shows; on an existing
    one (``address=``) the nodes decide what they offer.

    Raises:
        ProfileError: ``runtime_env`` has a setup hook already; only one runs.
        SetupError: The launcher is missing.
    """
    import ray

    from raysandbox import launch
    from raysandbox import profile as profiles
    from raysandbox.policy import TAG_PREFIX

    launch.launcher_path()
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
    address = args[0] if args else options.get("address")
    if address in (None, "local") and not os.environ.get("RAY_ADDRESS"):
        tags = {f"{TAG_PREFIX}{name}": _LOCAL_TAGS for name in profiles.names()}
        options["resources"] = {**tags, **(options.get("resources") or {})}
    return ray.init(*args, **options)
