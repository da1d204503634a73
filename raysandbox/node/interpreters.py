"""Interpreters besides the node's own: those that the operator's policy names.

A runtime_env's ``py_executable`` may be one of ``runtime_env.py_executable`` in the
policy, and its ``conda`` a name that ``runtime_env.conda`` has: the worker runs it in
the place of the node's own, and so do its jails. Nobody else may be able to change it,
since it runs in the worker; and it must have the node's versions of Ray and raysandbox,
since it speaks their protocols. Both are looked at when the node starts: of the file
and the way to it. Its modules are the operator's to keep.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raysandbox.errors import ProfileError
from raysandbox.profile.load import check_trusted

__all__ = ["look"]

_LIMIT_S = 60
# -I: as in a worker, nothing of whoever starts it.
_CODE = """
import json, sys
import ray, raysandbox
from raysandbox import plan
print(json.dumps({
    "ray": ray.__version__, "raysandbox": raysandbox.__version__,
    "python": "%d.%d" % sys.version_info[:2], "roots": plan.python_paths(),
}))
"""


def look(paths: Mapping[str, str]) -> Mapping[str, list[str]]:
    """Return what each of these interpreters and its modules are, as paths.

    Args:
        paths: Of interpreters; each with the policy's key that has it.

    Raises:
        ProfileError: One can't be used; by name, with what it lacks.
    """
    return {path: _roots(path, key) for path, key in paths.items()}


@functools.cache  # asked before anything is started, and when raylet is
def _roots(path: str, key: str) -> list[str]:
    check_trusted(Path(path))
    try:
        done = subprocess.run(
            [path, "-I", "-c", _CODE],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
            cwd="/",
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
            check=True,
        )
        found = json.loads(done.stdout)
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip().splitlines() or ["nothing"])[-1]
        raise _unusable(
            path, key, f"can't import ray and raysandbox: {said}"
        ) from error
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        raise _unusable(path, key, f"is no Python that starts: {error}") from error
    for name, ours in _ours().items():
        if found[name] != ours:
            why = f"has {name} {found[name]}, and the node has {ours}"
            raise _unusable(path, key, why)
    return [str(root) for root in found["roots"]]


def _ours() -> dict[str, Any]:
    import ray

    import raysandbox

    return {
        "ray": ray.__version__,
        "raysandbox": raysandbox.__version__,
        # Ray compares both, and refuses a driver of another.
        "python": f"{sys.version_info[0]}.{sys.version_info[1]}",
    }


def _unusable(path: str, key: str, why: str) -> ProfileError:
    where = f"runtime_env.{key}"
    return ProfileError(source="<policy>", where=where, value=path, reason=why)
