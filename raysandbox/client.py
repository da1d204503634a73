"""The submitting side: tasks of a worker boundary ask for workers of their own.

Raylet chooses an idle worker by job, language and runtime environment, not by
resources, so two tags could meet in one worker. A variable in the runtime
environment, named after the profile, keeps them apart: whoever submits puts it
there, in one place each for tasks and actors. A client without it is served
too, by workers that leave after each task.

`import raysandbox` where tasks are submitted does it, and so does ``RAYSANDBOX=1``
in the environment of a driver that never imports it (`raysandbox.node.autostart`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from raysandbox.errors import ProfileError, UnsupportedError

__all__ = [
    "MARKER",
    "NODE",
    "find_node",
    "install",
    "mark",
    "marker_of",
    "remember",
]

#: Variable of the runtime environment that holds the profile's name.
MARKER = "RAYSANDBOX_WORKER_PROFILE"
#: Variable of an entrypoint of the Jobs API: id of the node that it runs on.
NODE = "RAYSANDBOX_NODE_ID"
# Profiles known by now: whether each is a worker's own boundary.
_inside: dict[str, bool] = {}
# What was worked out already: tag by resources' names, runtime environments.
_tags: dict[tuple[str, ...], str] = {}
_serialized: dict[tuple[str, str], tuple[Any, str]] = {}
_MOST = 256


def marker_of(runtime_env: str) -> str:
    """Return the profile that a serialized runtime environment is marked with."""
    if MARKER not in runtime_env:
        return ""
    variables = json.loads(runtime_env).get("env_vars") or {}
    return str(variables.get(MARKER, ""))


def remember(profiles: Mapping[str, bool]) -> None:
    """Take over what profiles there are, for when their files are out of reach."""
    _inside.update(profiles)


def _is_inside(name: str) -> bool:
    if name not in _inside:
        from raysandbox import profile as profiles

        try:
            _inside[name] = profiles.load(name).boundary == "worker"
        except ProfileError:
            # Of another machine's, perhaps: workers of its own do no harm.
            _inside[name] = True
    return _inside[name]


def _wanted(resources: Mapping[str, Any] | None) -> str:
    """Return the profile to mark a task with, or ``""``; asked for each task."""
    if not resources:
        return ""
    key = tuple(resources)
    found = _tags.get(key)
    if found is None:
        from raysandbox import policy

        try:
            found = policy.tag_of(resources) or ""
        except ProfileError:
            found = ""  # the worker says what is wrong with it
        if len(_tags) > _MOST:
            _tags.clear()
        _tags[key] = found
    return found if found and _is_inside(found) else ""


def install() -> None:
    """Mark what this process submits from now on; more than once is once.

    Raises:
        UnsupportedError: This version of Ray submits in another way.
    """
    from ray import actor, remote_function

    mark(remote_function)
    mark(actor)


def find_node(module: Any) -> None:
    """Tell a driver in a worker's wall which node it is on.

    Ray looks for raylet's process, which can't be seen from there.

    Args:
        module: ``ray._private.services``.
    """
    node = os.environ.get(NODE)
    if node:
        module.find_node_ids = lambda: {node}


def mark(module: Any) -> None:
    """Do that for functions (``ray.remote_function``) or actors (``ray.actor``).

    Either may be all that there is of Ray so far.

    Raises:
        UnsupportedError: As in `install`.
    """
    for name in ("RemoteFunction", "ActorClass"):
        owner = vars(module).get(name)
        if owner is None or owner.__module__ != module.__name__:
            continue
        original = getattr(owner, "_remote", None)
        if original is None:
            break
        if not hasattr(original, "_raysandbox"):
            _patch(owner, original, is_actor=name == "ActorClass")
        return
    import ray

    raise UnsupportedError(
        feature="Ray's submission seam",
        need="RemoteFunction._remote and ActorClass._remote",
        have=f"Ray {ray.__version__} without one of them in {module.__name__}",
        remedy="install a Ray version that raysandbox supports",
    )


def _patch(owner: Any, original: Any, *, is_actor: bool) -> None:
    import functools

    @functools.wraps(original)
    def remote(self: Any, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        wanted = _wanted(options.get("resources"))
        if wanted or _own_marker():
            made, serialized = _marked(options.get("runtime_env"), wanted)
            options["runtime_env"] = made
            if not is_actor:
                options["serialized_runtime_env_info"] = serialized
        return original(self, args, kwargs, **options)

    remote._raysandbox = True  # type: ignore[attr-defined]
    owner._remote = remote


def _own_marker() -> str:
    """Return the marker that what we submit would inherit."""
    import ray

    worker = ray._private.worker.global_worker
    if worker.mode != ray.WORKER_MODE:
        return ""
    return marker_of(worker.runtime_env)


def _marked(runtime_env: Any, wanted: str) -> tuple[Any, str]:
    """Return a runtime environment with the marker, and as Ray serializes it."""
    plain = dict(runtime_env or {})
    text = json.dumps(plain, sort_keys=True, default=repr) if plain else ""
    key = (text, wanted)
    if key not in _serialized:
        from ray._private.utils import get_runtime_env_info
        from ray.runtime_env import RuntimeEnv

        variables = {**(plain.get("env_vars") or {}), MARKER: wanted}
        made = RuntimeEnv(**{**plain, "env_vars": variables})
        info = get_runtime_env_info(made, is_job_runtime_env=False, serialize=True)
        if len(_serialized) > _MOST:
            _serialized.clear()
        _serialized[key] = made, info
    return _serialized[key]
