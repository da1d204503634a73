"""Ray's runtime_env agent, which makes nothing that the node's policy refuses.

``python env_agent.py POLICY SCRIPT ARGS…`` or ``… POLICY -m MODULE ARGS…``

The agent has raylet's rights and stands behind no wall. For some keys of a
runtime_env it runs what a client chose, before there is a worker: an installer
(pip, uv, conda) and with it a package's own ``setup.py``, a container engine, a
profiler with options of the client's. It reads and fetches packages from files and
places that are closed to the client. So the policy is asked here, before any of
that, and once more in the worker (`raysandbox.worker.gate`), which has its answer
from elsewhere. What is allowed runs here, outside of every wall: see the policy's
table ``[runtime_env]``.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

__all__ = ["SEAM", "guard", "main", "unpack_without_ids"]

#: Module and class of Ray's that are asked to make an environment, by raylet, by
#: other nodes' processes and by whoever has the cluster's token.
SEAM = ("ray._private.runtime_env.agent.runtime_env_agent", "RuntimeEnvAgent")


def guard(
    agent: type,
    refusals: Callable[[dict[str, Any]], list[str]],
    as_made: Callable[[dict[str, Any]], Mapping[str, Any]] = lambda wanted: wanted,
) -> None:
    """Put `refusals` in front of an agent's class.

    Args:
        agent: Ray's RuntimeEnvAgent.
        refusals: Says what of a runtime_env is refused; nothing if it returns none.
        as_made: What the agent is to make instead of one that is not.
    """
    from ray.core.generated import runtime_env_agent_pb2 as messages

    original: Callable[[Any, Any], Awaitable[Any]] = agent.GetOrCreateRuntimeEnv  # type: ignore[attr-defined]
    let_go: Callable[[Any, Any], Awaitable[Any]] = agent.DeleteRuntimeEnvIfPossible  # type: ignore[attr-defined]

    def rewrite(request: Any, wanted: dict[str, Any]) -> None:
        made = as_made(wanted)
        if made is not wanted:
            request.serialized_runtime_env = json.dumps(made, sort_keys=True)

    async def create(self: Any, request: Any) -> Any:
        try:
            # As Ray reads it: the first that is found wrong is the only one seen.
            wanted = json.loads(request.serialized_runtime_env)
            why = "; ".join(refusals(wanted))
        except (ValueError, AttributeError, TypeError) as error:
            why = f"the runtime_env can't be read: {error}"
        if not why:
            rewrite(request, wanted)
            return await original(self, request)
        return messages.GetOrCreateRuntimeEnvReply(
            status=messages.AGENT_RPC_STATUS_FAILED,
            error_message=f"raysandbox: {why}. Nothing of it was made. Leave it out "
            "of the runtime_env, or have the operator allow it, where the policy can",
        )

    async def delete(self: Any, request: Any) -> Any:
        # It has its references under what was made.
        with contextlib.suppress(ValueError, AttributeError, TypeError):
            rewrite(request, json.loads(request.serialized_runtime_env))
        return await let_go(self, request)

    agent.GetOrCreateRuntimeEnv = create  # type: ignore[attr-defined]
    agent.DeleteRuntimeEnvIfPossible = delete  # type: ignore[attr-defined]


def unpack_without_ids() -> None:
    """Let no file of a package run with the rights of the agent's user.

    Ray gives each member of an archive the mode that the archive says: with "set
    user id" a client's program would be root's, for every user of the machine.
    """
    original = os.chmod

    def chmod(path: Any, mode: int, **more: Any) -> None:
        original(path, mode & ~(stat.S_ISUID | stat.S_ISGID), **more)

    os.chmod = chmod


def main(argv: list[str]) -> None:
    """Put the policy in front, then become the agent.

    Raises:
        ProfileError: The policy can't be used; nothing serves, and raylet ends.
    """
    policy_file, *command = argv
    # As `python SCRIPT` would: modules are found from the node's packages, and not
    # from the directory of this file, whose names could hide others.
    sys.path[0] = __file__.rpartition("/raysandbox/")[0]
    import importlib

    from raysandbox import policy
    from raysandbox.api import HOOK
    from raysandbox.node.become import become

    with open(policy_file, "rb") as file:
        node = policy.unseal(file.read())

    def refusals(wanted: dict[str, Any]) -> list[str]:
        return policy.runtime_env_refusals(node.policy, wanted, own_hook=HOOK)

    module = importlib.import_module(SEAM[0])

    def as_made(wanted: dict[str, Any]) -> Mapping[str, Any]:
        return policy.as_made(node.policy, wanted)

    guard(getattr(module, SEAM[1]), refusals, as_made)
    unpack_without_ids()
    # The agent's script imports its siblings by their bare names.
    sys.modules[SEAM[0].rpartition(".")[2]] = module
    become(command)


if __name__ == "__main__":
    main(sys.argv[1:])
