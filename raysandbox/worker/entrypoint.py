"""An entrypoint of the Jobs API, behind the walls of the worker that hosts it.

`ray job submit` makes an actor, ``JobSupervisor``, and that starts the entrypoint as
a process of its own: a driver. Where the policy's ``jobs.entrypoint`` names a profile
with ``boundary = "worker"``, the actor is in a worker behind that profile's walls, and
so is all that it starts. What Ray's own code expects there besides is given here:

- the output goes to the worker's own log, since the job's is the agent's file; the
  agent is told which that is (`LOG_KEY`), and reads it (`raysandbox.node.job_agent`);
- nothing looks whether the supervisor lives: its group ends with it;
- the driver has the node's Python first on its path, and the token, as every driver.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from raysandbox import client
from raysandbox.errors import UnsupportedError

__all__ = [
    "LOG_KEY",
    "LOG_NAMESPACE",
    "NAME",
    "check",
    "credentials",
    "host",
    "output_log",
]

#: Ray's name for the creation of the actor that starts an entrypoint.
NAME = "JobSupervisor.__init__"
#: In the GCS's key-value store: submission to "LOG OFFSET", the name of a worker's log
#: and where in it the entrypoint's output begins.
LOG_KEY = "raysandbox:entrypoint-log:{submission}"
LOG_NAMESPACE = b"raysandbox"

# What of the output is told with a failure, as Ray has it.
_LAST_LINES, _LAST_BYTES = 10, 20_000
_STOP = "RAY_JOB_STOP_SIGNAL"
# A shell's word for a program that was killed.
_KILLED = 128 + signal.SIGKILL
_WHY_KILLED = (
    "raysandbox: it was killed, under profile {profile!r}: over the profile's memory "
    "(oom_kills of its worker's end in `raysandbox events`), or since it broke Ray's "
    "protocol (link_ended)\n"
)
_METHODS = ("_configure_logger", "_exec_entrypoint", "_get_driver_env_vars")
# A driver must not think that it is this worker.
_NOT_INHERITED = ("RAYSANDBOX_", "__RAY_", "_RAY_", "RAY_AUTH_TOKEN_PATH")


def check() -> None:
    """Look whether this version of Ray starts entrypoints as it is taken to.

    Raises:
        UnsupportedError: It does not; nothing was changed.
    """
    import ray
    from ray.dashboard.modules.job import job_supervisor

    for name in _METHODS:
        if not hasattr(job_supervisor.JobSupervisor, name):
            raise UnsupportedError(
                feature="entrypoints of the Jobs API",
                need=f"JobSupervisor.{name}",
                have=f"Ray {ray.__version__}, which has none",
                remedy="install a Ray version that raysandbox supports, or leave "
                "jobs.entrypoint out of the policy",
            )


def credentials(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables by which a driver has the cluster's token, if there is one.

    Called before the walls are up: behind them the token's file is out of reach.
    """
    path = environ.get("RAY_AUTH_TOKEN_PATH", "")
    if not path or not os.path.exists(path):
        return {}
    with open(path) as file:
        return {"RAY_AUTH_TOKEN": file.read().strip()}


def output_log() -> str:
    """Return the path of this worker's own output."""
    return os.readlink("/proc/self/fd/1")


def _let_interrupt() -> None:
    """Unblock what Ray blocks in its own processes; as its supervisor does."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def host(
    worker: Any,
    *,
    profile: str,
    log: str,
    python_path: Sequence[str],
    user_path: Sequence[str],
    variables: Mapping[str, str],
) -> None:
    """Let Ray's JobSupervisor work in this process, which `check` found possible.

    Args:
        worker: Ray's.
        profile: Name of the one whose walls are up.
        log: `output_log`.
        python_path: Where the node's own modules are.
        user_path: Directories of the job's runtime environment, which come first.
        variables: `credentials`, and the job's own.
    """
    from ray.dashboard.modules.job import job_log_storage_client, job_supervisor

    supervisor = job_supervisor.JobSupervisor
    gcs, begins = worker.gcs_client, 0
    child: subprocess.Popen[bytes] | None = None
    search = ":".join(dict.fromkeys([*user_path, *python_path]))

    def configure_logger(self: Any) -> None:
        self._logger.addHandler(logging.StreamHandler())
        self._logger.propagate = False

    def driver_variables(self: Any, resources_specified: bool = False) -> Any:
        from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

        config = {
            "runtime_env": self._get_driver_runtime_env(resources_specified),
            "metadata": self._metadata,
        }
        return {
            RAY_JOB_CONFIG_JSON_ENV_VAR: json.dumps(config),
            "RAY_ADDRESS": gcs.address,
            "PYTHONUNBUFFERED": "1",
        }

    def execute(self: Any, env: dict[str, str], logs_path: str) -> Any:
        nonlocal begins, child
        sys.stdout.flush()
        begins = os.stat(log).st_size
        gcs.internal_kv_put(
            LOG_KEY.format(submission=self._job_id).encode(),
            f"{os.path.basename(log)} {begins}".encode(),
            True,
            LOG_NAMESPACE,
        )
        kept = {
            name: value
            for name, value in env.items()
            if not name.startswith(_NOT_INHERITED)
        }
        kept |= {
            "PATH": f"{os.path.dirname(sys.executable)}:{kept['PATH']}",
            # It can't make files among Ray's logs; what it says there is seldom asked.
            "RAY_LOG_TO_STDERR": "1",
            "RAY_BACKEND_LOG_LEVEL": kept.get("RAY_BACKEND_LOG_LEVEL", "warning"),
            # Marks tasks with boundary = "worker", as an import would.
            "RAYSANDBOX": "1",
            client.NODE: worker.current_node_id.hex(),
            **variables,
        }
        kept["PYTHONPATH"] = ":".join(
            filter(None, [variables.get("PYTHONPATH"), search])
        )
        said = f"Running entrypoint for job {self._job_id}: {self._entrypoint}\n"
        sys.stdout.write(said)
        sys.stdout.flush()
        child = subprocess.Popen(  # noqa: S602 - an entrypoint is a line of shell
            self._entrypoint,
            shell=True,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=1,
            stderr=1,
            env=kept,
            preexec_fn=_let_interrupt if env.get(_STOP) == "SIGINT" else None,
        )
        return child

    async def last_lines(self: Any, job_id: str, most: int = _LAST_LINES) -> str:
        with open(log, "rb") as file:
            file.seek(max(begins, os.fstat(file.fileno()).st_size - _LAST_BYTES))
            lines = file.read(_LAST_BYTES).decode(errors="replace").splitlines(True)
        said = "".join(lines[-most:])
        killed = child is not None and child.returncode in (-signal.SIGKILL, _KILLED)
        return said + _WHY_KILLED.format(profile=profile) if killed else said

    supervisor._configure_logger = configure_logger
    supervisor._get_driver_env_vars = driver_variables
    supervisor._exec_entrypoint = execute
    storage = job_log_storage_client.JobLogStorageClient
    storage.get_log_file_path = lambda self, job_id: log
    storage.get_last_n_log_lines = last_lines
