"""Interpreters besides the node's own: those that the operator's policy names.

A runtime_env's ``py_executable`` may be one of ``runtime_env.py_executable`` in the
policy, and its ``conda`` a name that ``runtime_env.conda`` has: the worker runs it in
the place of the node's own, and so do its jails. With ``image_uri`` they see an image's
root file system, too, and ``nsight`` is a program that starts the interpreter. Nobody
else may be able to change it, since it runs in the worker; and it must have the node's
versions of Ray and raysandbox, since it speaks their protocols. Both are looked at when
the node starts: of the file and the way to it. Its modules are the operator's to keep.
"""

from __future__ import annotations

import functools
import json
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysandbox import plan, profile
from raysandbox.errors import ProfileError, RaysandboxError
from raysandbox.policy import Interpreter, Policy
from raysandbox.profile.load import check_trusted
from raysandbox.run import run

__all__ = ["Found", "look"]

_LIMIT_S = 60
# -I: as in a worker, nothing of whoever starts it.
_CODE = """
import json, sys
import ray, ray._private.workers.default_worker as script, raysandbox
from raysandbox import plan
from raysandbox.kernel import seccomp
seccomp.name(0)  # needs libseccomp, as every jail's filter does
print(json.dumps({
    "ray": ray.__version__, "raysandbox": raysandbox.__version__,
    "python": "%d.%d" % sys.version_info[:2], "roots": plan.python_paths(),
    "script": script.__file__,
}))
"""


@dataclass(frozen=True, slots=True)
class Found:
    """What one comes to.

    Attributes:
        named: As the policy has it.
        roots: Paths of the interpreter and its modules, as its worker sees them.
        script: Ray's worker script, the same.
    """

    named: Interpreter
    roots: Sequence[str]
    script: str


def look(policy: Policy) -> list[Found]:
    """Look at each interpreter that a node's policy names.

    Raises:
        ProfileError: One can't be used; by name, with what it lacks.
    """
    return [_look(each) for each in policy.runtime_env.interpreters().values()]


@functools.cache  # asked before anything is started, and when raylet is
def _look(named: Interpreter) -> Found:
    for path in (*named.read, *named.write):
        if not os.path.exists(path):
            raise _unusable(named, f"needs {path}, which does not exist")
    if not os.path.isfile(plan.inside(named.root, named.path)):
        or_else = " (python = PATH says where it is)" if named.root else ""
        raise _unusable(named, f"does not exist{or_else}")
    check_trusted(Path(named.path), named.root)
    try:
        found = _ask(named)
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip().splitlines() or ["nothing"])[-1]
        raise _unusable(named, f"can't use ray and raysandbox: {said}") from error
    except (OSError, subprocess.TimeoutExpired, ValueError, RaysandboxError) as error:
        raise _unusable(named, f"is no Python that starts: {error}") from error
    for name, ours in _ours().items():
        if found.get(name) != ours:
            have = found.get(name, "none")
            raise _unusable(named, f"has {name} {have}, and the node has {ours}")
    roots = [str(root) for root in found["roots"]]
    if named.root:
        _refuse_writers(named)
    if not any(plan.is_below(named.path, root) for root in roots):
        roots.append(named.path)  # what starts an interpreter elsewhere
    return Found(named, roots, str(found["script"]))


def _refuse_writers(named: Interpreter) -> None:
    """Refuse files of an image that others can change: they run in the worker.

    All that is seen of it, since links lead from the modules to anywhere in there.
    Where nobody else gets to the image it does not matter what its files' modes say.
    """
    owners = {0, os.geteuid()}
    if any(
        not above.stat().st_mode & (stat.S_IXGRP | stat.S_IXOTH)
        and above.stat().st_uid in owners
        for above in Path(os.path.realpath(named.root)).parents
    ):
        return
    for path in _files(named.root):
        there = os.lstat(path)
        if stat.S_ISLNK(there.st_mode):
            continue
        writers = stat.S_IMODE(there.st_mode) & (stat.S_IWGRP | stat.S_IWOTH)
        if writers or there.st_uid not in owners:
            whose = f"mode {there.st_mode & 0o7777:04o} of uid {there.st_uid}"
            raise _unusable(
                named,
                f"is in an image with files that others can change: {path}, {whose} "
                "(chmod -R go-w and chown -R root, or chmod 0700 a directory above)",
            )


def _files(root: str) -> Iterator[str]:
    """Yield all files and directories that are seen of an image."""
    for seen in plan.image_paths(root):
        top = f"{root}{seen}"
        if os.path.islink(top) or not os.path.exists(top):
            continue  # where it leads is seen by itself
        yield top
        for at, directories, files in os.walk(top):
            yield from (os.path.join(at, name) for name in (*directories, *files))


def _ask(named: Interpreter) -> Mapping[str, Any]:
    """Return what the interpreter says of itself.

    Raises:
        CalledProcessError: It failed.
        TimeoutExpired: It took too long.
        ValueError: It said something else.
        OSError: It is no program.
        RaysandboxError: This host can't show its root file system to it.
    """
    command = [named.path, "-I", "-c", _CODE]
    said = _ask_inside(named, command) if named.root else _ask_here(command)
    for line in reversed(said.splitlines()):  # a profiler says something, too
        if line.startswith("{"):
            return dict(json.loads(line))
    raise ValueError(f"it says {said[-200:]!r}")


def _ask_here(command: list[str]) -> str:
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_LIMIT_S,
        cwd="/",
        env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
        check=True,
    ).stdout


def _ask_inside(named: Interpreter, command: list[str]) -> str:
    """Ask behind walls: what an image has was made elsewhere."""
    base = profile.load("standard")
    limits = base.limits.model_copy(update={"wall_time_s": _LIMIT_S, "required": False})
    files = base.filesystem.model_copy(update={"read": ("@system",)})
    with (
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as errors,
        open(os.devnull) as nothing,
    ):
        done = run(
            base.model_copy(update={"limits": limits, "filesystem": files}),
            command,
            root=named.root,
            system=plan.image_paths(named.root),
            stdin=nothing.fileno(),
            stdout=out.fileno(),
            stderr=errors.fileno(),
        )
        out.seek(0)
        errors.seek(0)
        said, failed = out.read(), errors.read()
    if done.reason:
        raise ValueError(done.reason)
    if done.exit_code:
        raise subprocess.CalledProcessError(done.exit_code, command, said, failed)
    return said


def _ours() -> dict[str, Any]:
    import ray

    import raysandbox

    return {
        "ray": ray.__version__,
        "raysandbox": raysandbox.__version__,
        # Ray compares both, and refuses a driver of another.
        "python": f"{sys.version_info[0]}.{sys.version_info[1]}",
    }


def _unusable(named: Interpreter, why: str) -> ProfileError:
    path = plan.inside(named.root, named.path) if named.root else named.path
    where = f"runtime_env.{named.key}"
    return ProfileError(source="<policy>", where=where, value=path, reason=why)
