"""Ray's agent of a node whose policy runs entrypoints of the Jobs API.

``python job_agent.py PROFILE WHERE SCRIPT ARGS…`` or ``… -m MODULE ARGS…``

The agent makes an actor for each entrypoint, and reads the entrypoint's output. Here
that actor asks for the policy's profile by its tag, as any task would, so that the
profile's count bounds how many run at once; and the output is read from the log of
the worker that hosts it (`raysandbox.worker.entrypoint`). WHERE is `HERE` or
`ANYWHERE`.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import AsyncIterator
from typing import Any

__all__ = ["ANYWHERE", "HERE", "main", "serve"]

#: Entrypoints are hosted on the agent's own node alone, or where Ray finds room for
#: what they ask for. The dashboard asks the agent there for the output, with the
#: cluster's token, and in a hardened cluster no agent is reached from elsewhere.
HERE, ANYWHERE = "here", "anywhere"

_LOG = re.compile(rb"(worker-[0-9a-f]{56}-[0-9a-f]{8}-[0-9]{1,10}\.out) ([0-9]{1,15})")
# Of an output that is longer the end is shown.
_MOST_BYTES = 16 << 20
_AT_ONCE = 20_000


class _Tagged:
    """Ray's actor class, whose actors ask for a profile, and maybe for a node."""

    def __init__(self, actor: Any, tag: str, where: str) -> None:
        self._actor, self._tag, self._where = actor, tag, where

    def options(self, **options: Any) -> Any:
        # A whole one, whatever part of it a client would like to have.
        resources = {**(options.pop("resources", None) or {}), self._tag: 1}
        if self._where == HERE:
            import ray

            node = ray.get_runtime_context().get_node_id()
            wanted = options.pop("label_selector", None) or {}
            key = ray._raylet.RAY_NODE_ID_KEY
            options["label_selector"] = {**wanted, key: node}
        return self._actor.options(**options, resources=resources)


def serve(tag: str, where: str) -> None:
    """Change Ray's job manager of this process.

    Args:
        tag: Resource by which the policy's profile is asked for.
        where: `HERE` or `ANYWHERE`.
    """
    from ray.dashboard.modules.job import job_log_storage_client, job_manager

    from raysandbox.worker.entrypoint import LOG_KEY, LOG_NAMESPACE

    manager = job_manager.JobManager
    original = manager.__init__

    def initialize(self: Any, gcs_client: Any, *args: Any, **kwargs: Any) -> None:
        original(self, gcs_client, *args, **kwargs)
        self._supervisor_actor_cls = _Tagged(self._supervisor_actor_cls, tag, where)
        self._log_client = Logs(gcs_client)

    class Logs(job_log_storage_client.JobLogStorageClient):  # type: ignore[misc]
        """The agent's own words on a job, then what its entrypoint wrote."""

        def __init__(self, gcs_client: Any) -> None:
            self._gcs = gcs_client

        def get_logs(self, job_id: str) -> str:
            own: str = super().get_logs(job_id)
            return own + _end_of(*self._hosted(job_id))

        async def tail_logs(self, job_id: str) -> AsyncIterator[Any]:
            hosted, begins = "", 0
            async for lines in super().tail_logs(job_id):
                if lines is None:
                    hosted, begins = self._hosted(job_id)
                    if hosted:
                        break
                yield lines
            with open(hosted, errors="replace") as file:
                file.seek(begins)
                while True:
                    text = file.read(_AT_ONCE)
                    yield [text] if text else None

        def _hosted(self, job_id: str) -> tuple[str, int]:
            """Return a job's log, and where it begins; "" if none is known yet."""
            key = LOG_KEY.format(submission=job_id).encode()
            told = self._gcs.internal_kv_get(key, LOG_NAMESPACE) or b""
            # Whoever drives the cluster may write there.
            match = _LOG.fullmatch(told)
            if match is None:
                return "", 0
            logs = os.path.dirname(self.get_log_file_path(job_id))
            path = os.path.join(logs, match[1].decode())
            # Another node's may be gone, or never was here.
            return (path, int(match[2])) if os.path.isfile(path) else ("", 0)

    manager.__init__ = initialize


def _end_of(path: str, begins: int) -> str:
    if not path:
        return ""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        left_out = max(0, size - begins - _MOST_BYTES)
        file.seek(begins + left_out)
        text = file.read(_MOST_BYTES).decode(errors="replace")
    return f"[raysandbox: {left_out} bytes are left out]\n{text}" if left_out else text


def main(argv: list[str]) -> None:
    """Change what is to be changed, then become the agent."""
    profile, where, *command = argv
    # As in `raysandbox.node.env_agent`.
    sys.path[0] = __file__.rpartition("/raysandbox/")[0]
    from raysandbox.node.become import become
    from raysandbox.policy import TAG_PREFIX

    serve(f"{TAG_PREFIX}{profile}", where)
    become(command)


if __name__ == "__main__":
    main(sys.argv[1:])
