"""raysandbox: run Ray tasks that you don't trust.

Importing this package is cheap: each name is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raysandbox.api import init, tag
    from raysandbox.errors import (
        InternalError,
        JailProtocolError,
        ProfileError,
        RaysandboxError,
        SetupError,
        TaskDenied,
        TaskError,
        TaskKilled,
        TaskOutOfMemory,
        TaskQuotaExceeded,
        TaskRefused,
        TaskTimedOut,
        TaskUnsupported,
        UnsupportedError,
    )
    from raysandbox.worker.hook import worker_hook

__version__ = "0.1.0"

__all__ = [
    "InternalError",
    "JailProtocolError",
    "ProfileError",
    "RaysandboxError",
    "SetupError",
    "TaskDenied",
    "TaskError",
    "TaskKilled",
    "TaskOutOfMemory",
    "TaskQuotaExceeded",
    "TaskRefused",
    "TaskTimedOut",
    "TaskUnsupported",
    "UnsupportedError",
    "init",
    "tag",
    "worker_hook",
]

_HOME = {"init": "raysandbox.api", "tag": "raysandbox.api"}
_HOME["worker_hook"] = "raysandbox.worker.hook"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'raysandbox' has no attribute {name!r}")
    value = getattr(import_module(_HOME.get(name, "raysandbox.errors")), name)
    globals()[name] = value
    return value
