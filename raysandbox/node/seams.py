"""The places in Ray's start-up that raysandbox changes, all of them, here.

Ray starts each of its processes through one function,
``ray._private.services.start_ray_process(command, process_type, …)``, and gives
raylet the commands of what raylet starts itself (workers, agents) as arguments.
`install` puts a chain of rewriters in front of that function; each sees every
process's type, command and environment before it starts, and may change them.
Workers, and so the launcher, hang on `RayletCommand.wrap_workers`.

Seams are checked before anything starts: a Ray whose internals have moved is
refused with its version and the seam's name, never run half changed.
"""

from __future__ import annotations

import inspect
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from raysandbox.errors import UnsupportedError

__all__ = [
    "SUPPORTED",
    "VERSIONS",
    "Process",
    "RayletCommand",
    "check",
    "install",
    "minor",
    "missing",
    "remove",
    "started",
]

#: Ray's minor versions that were tried, each with the first seam that it lacks.
#: "" is none: a node started there and its tasks ran in jails. To try one (again):
#: ``python -m tests.node.versions 2.55.0``.
VERSIONS: Mapping[str, str] = {
    "2.50": "workers/default_worker.py: --worker-id",
    "2.51": "workers/default_worker.py: --worker-id",
    "2.52": "workers/default_worker.py: --worker-id",
    "2.53": "workers/default_worker.py: --worker-id",
    "2.54": "",
    "2.55": "",
    "2.56": "",
    "2.57": "",
    "2.58": "",
    "2.59": "",
    "2.60": "",
}
SUPPORTED = tuple(version for version, lacks in VERSIONS.items() if not lacks)

_WORKER_COMMANDS = (
    "--python_worker_command",
    "--java_worker_command",
    "--cpp_worker_command",
)
_PROCESSES = ("GCS_SERVER", "RAYLET", "DASHBOARD", "MONITOR", "LOG_MONITOR")
_RAYLET_ARGUMENTS = (
    *_WORKER_COMMANDS,
    "--dashboard_agent_command",
    "--runtime_env_agent_command",
    "--node_ip_address",
    "--session_dir",
    "--log_dir",
    "--resource_dir",
    "--raylet_socket_name",
    "--store_socket_name",
    "--static_resource_list",
    "--min_worker_port",
    "--max_worker_port",
    "--node_manager_port",
    "--node_id",
)
_SOURCES: Mapping[str, tuple[str, ...]] = {
    # Named by raylet: a worker's log files are made before it starts.
    "workers/default_worker.py": (
        "--worker-id",
        "--object-spilling-config",
        "external_storage.setup_external_storage(",
    ),
    # Where what is spilled is written down; see `spilling`.
    "external_storage.py": (
        "class FileSystemStorage(ExternalStorage)",
        "def spill_objects(self, object_refs, owner_addresses)",
        "def delete_spilled_objects(self, urls: List[str])",
        "_external_storage = FileSystemStorage(",
    ),
    # Where the policy is asked before an environment is made; see `env_agent`.
    "runtime_env/agent/main.py": (
        "from runtime_env_agent import RuntimeEnvAgent",
        "await agent.GetOrCreateRuntimeEnv(request)",
    ),
    "runtime_env/agent/runtime_env_agent.py": (
        "class RuntimeEnvAgent",
        "async def GetOrCreateRuntimeEnv(self, request)",
    ),
}
_GCS_ARGUMENTS = ("--gcs_server_port", "--node-ip-address", "--session-dir")


class Process:
    """A process that Ray is about to start.

    Attributes:
        kind: Ray's name for it: gcs_server, raylet, dashboard, monitor,
            log_monitor, reaper, ray_client_server.
        command: Its argument vector.
        env: What is set on top of the starter's environment.
    """

    def __init__(self, kind: str, command: list[str], env: dict[str, str]) -> None:
        self.kind, self.command, self.env = kind, command, env

    def argument(self, name: str) -> str:
        """Return the value of ``name=value``; UnsupportedError if there is none."""
        for item in self.command:
            if item.startswith(name + "="):
                return item[len(name) + 1 :]
        raise _moved(f"{self.kind}'s argument {name}")

    def set_argument(self, name: str, value: str) -> None:
        """Replace the value of ``name=value``; it must be there."""
        self.argument(name)
        self.command = [
            f"{name}={value}" if item.startswith(name + "=") else item
            for item in self.command
        ]


class RayletCommand:
    """Raylet's command line, and the commands of what it starts."""

    def __init__(self, process: Process) -> None:
        self.process = process
        for name in _RAYLET_ARGUMENTS:
            process.argument(name)

    def wrap_workers(self, program: str, python: str) -> None:
        """Start every worker through `program`, in place of the interpreter.

        The rest of the command stays as raylet expects it: raylet looks for
        ``setup_worker.py`` second, and drops it when a worker needs no
        runtime_env. `program` must end in an exec, so that the worker has the
        pid that raylet started.
        """
        for name in _WORKER_COMMANDS:
            value = self.process.argument(name)
            if not value:
                continue
            first = subprocess.list2cmdline([python])
            if not value.startswith(first + " "):
                raise _moved(f"the interpreter at the start of {name}")
            self.process.set_argument(name, program + value[len(first) :])

    def refuse_other_languages(self, program: str) -> None:
        """Let `program` refuse Java and C++ workers, installed or not.

        Raylet drops the first two words of such a command when the second is
        ``setup_worker.py``, and ends itself when it is asked for a language
        that has no command: so there is one, and its second word is ours.
        """
        for language in ("java", "cpp"):
            name = f"--{language}_worker_command"
            rest = self.process.argument(name).split(" ")[2:]
            command = " ".join([program, f"--refused={language}", *rest])
            if "RAY_WORKER_DYNAMIC_OPTION_PLACEHOLDER" not in command:
                command += " RAY_WORKER_DYNAMIC_OPTION_PLACEHOLDER"
            self.process.set_argument(name, command)

    def wrap_agent(self, name: str, python: str, *words: str) -> None:
        """Start an agent through ``python WORDS SCRIPT …``."""
        value = self.process.argument(name)
        first = subprocess.list2cmdline([python])
        if not value.startswith(first + " "):
            raise _moved(f"the interpreter at the start of {name}")
        rest = value[len(first) :].replace(" -u ", " ", 1)
        ours = subprocess.list2cmdline(words)
        self.process.set_argument(name, f"{first} -u {ours}{rest}")


Rewriter = Callable[[Process], None]
_rewriters: list[Rewriter] = []
_started: list[tuple[str, Any]] = []


def _moved(seam: str) -> UnsupportedError:
    import ray

    return UnsupportedError(
        feature=f"Ray's internals: {seam}",
        need=f"Ray {', '.join(SUPPORTED)}",
        have=f"Ray {ray.__version__}, where it is not as expected",
        remedy="install a supported Ray, or a raysandbox that knows this one",
    )


def minor(version: str) -> str:
    """Return the key of a version in `VERSIONS`."""
    return ".".join(version.split(".")[:2])


def check(*, gcs: bool = False) -> None:
    """Check that the installed Ray is one that was tried, and has every seam.

    Args:
        gcs: Also those of the GCS, which only a hardened cluster changes.

    Raises:
        UnsupportedError: Names the version and the first seam that is missing.
    """
    import ray

    lacks = missing(gcs=gcs)
    if lacks:
        raise _moved(lacks)
    if minor(ray.__version__) not in SUPPORTED:
        raise _moved("none that is looked at is missing, but this version never ran")


def missing(*, gcs: bool = False) -> str:
    """Return the first seam that the installed Ray lacks, or ``""``.

    Args:
        gcs: See `check`.
    """
    from ray._private import ray_constants, services

    start = getattr(services, "start_ray_process", None)
    if start is None:
        return "services.start_ray_process"
    original = getattr(start, "__wrapped__", start)
    parameters = inspect.signature(original).parameters
    for name in ("command", "process_type", "env_updates"):
        if name not in parameters:
            return f"services.start_ray_process({name})"
    for name in _PROCESSES:
        if not hasattr(ray_constants, f"PROCESS_TYPE_{name}"):
            return f"ray_constants.PROCESS_TYPE_{name}"
    private = Path(services.RAY_PATH) / "_private"
    for script, words in _SOURCES.items():
        source = (private / script).read_text() if (private / script).exists() else ""
        for name in words:
            if name not in source:
                return f"{script}: {name}"
    functions: dict[str, tuple[str, ...]] = {"start_raylet": _RAYLET_ARGUMENTS}
    if gcs:
        functions["start_gcs_server"] = _GCS_ARGUMENTS
    for function, names in functions.items():
        source = inspect.getsource(getattr(services, function))
        for name in names:
            if name not in source:
                return f"services.{function}: {name}"
    return ""


def install(rewriter: Rewriter, *, gcs: bool = False) -> None:
    """Add a rewriter of everything that Ray starts from this process.

    Args:
        rewriter: What it is.
        gcs: See `check`.

    Raises:
        UnsupportedError: See `check`; nothing was changed.
    """
    check(gcs=gcs)
    from ray._private import services

    _rewriters.append(rewriter)
    if hasattr(services.start_ray_process, "raysandbox"):
        return
    original = getattr(
        services.start_ray_process, "__wrapped__", services.start_ray_process
    )

    def start_ray_process(
        command: list[str],
        process_type: str,
        *args: Any,
        env_updates: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> Any:
        process = Process(process_type, list(command), dict(env_updates or {}))
        for rewrite in _rewriters:
            rewrite(process)
        info = original(
            process.command, process_type, *args, env_updates=process.env, **kwargs
        )
        _started.append((process_type, info.process))
        return info

    start_ray_process.__wrapped__ = original  # type: ignore[attr-defined]
    start_ray_process.raysandbox = True  # type: ignore[attr-defined]
    services.start_ray_process = start_ray_process


def remove(rewriter: Rewriter) -> None:
    """Take a rewriter out again."""
    _rewriters.remove(rewriter)


def started() -> list[tuple[str, Any]]:
    """Return (kind, Popen) of what was started through the seam, oldest first."""
    return list(_started)
