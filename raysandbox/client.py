"""The submitting side: tasks of a worker boundary ask for workers of their own.

Raylet chooses an idle worker by job, language and runtime environment, not by
resources, so two tags could meet in one worker. A variable in the runtime
environment, named after the profile, keeps them apart: whoever submits puts it
there, in one place each for tasks and actors. A client without it is served
too, by workers that leave after each task.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from raysandbox.errors import ProfileError, UnsupportedError

__all__ = ["MARKER", "install", "marker_of", "remember"]

#: Variable of the runtime environment that holds the profile's name.
MARKER = "RAYSANDBOX_WORKER_PROFILE"
# Profiles known by now: whether each is a worker's own boundary.
_inside: dict[str, bool] = {}
_serialized: dict[tuple[str, str], tuple[Any, str]] = {}


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
    from raysandbox import policy

    if not resources:
        return ""
    try:
        name = policy.tag_of(resources)
    except ProfileError:
        return ""  # the worker says what is wrong with it
    return name if name and _is_inside(name) else ""


def install() -> None:
    """Mark what this process submits from now on; more than once is once.

    Raises:
        UnsupportedError: This version of Ray submits in another way.
    """
    import ray
    from ray.actor import ActorClass
    from ray.remote_function import RemoteFunction

    for owner in (RemoteFunction, ActorClass):
        original = getattr(owner, "_remote", None)
        if original is None:
            raise UnsupportedError(
                feature="Ray's submission seam",
                need=f"{owner.__name__}._remote",
                have=f"Ray {ray.__version__} without it",
                remedy="install a Ray version that raysandbox supports",
            )
        if not hasattr(original, "_raysandbox"):
            _patch(owner, original, is_actor=owner is ActorClass)


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
    from ray._private.utils import get_runtime_env_info
    from ray.runtime_env import RuntimeEnv

    plain = dict(runtime_env or {})
    key = (json.dumps(plain, sort_keys=True, default=repr), wanted)
    if key not in _serialized:
        variables = {**(plain.get("env_vars") or {}), MARKER: wanted}
        made = RuntimeEnv(**{**plain, "env_vars": variables})
        info = get_runtime_env_info(made, is_job_runtime_env=False, serialize=True)
        if len(_serialized) > 256:
            _serialized.clear()
        _serialized[key] = made, info
    return _serialized[key]
