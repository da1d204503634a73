"""Which profile a task of this worker gets: the node's policy, as a worker has it.

What decides must not come from a client. A job's runtime_env puts variables into
a worker's environment before any of our code runs, so nothing of the
environment is believed here. The node's own word is read from

1. `SEALED`, which the launcher puts into a worker's view of the file system on a
   read-only mount: policy, profiles and variables in one piece;
2. else the environment of raylet, our ancestor, which is the node's.

A policy that is named but can't be used refuses every task. Where there is none
at all (the hook on a cluster that was started without raysandbox) the client's
tag decides alone.

Who asks is taken from the GCS's job table, not from the task, which may claim
any namespace.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from raysandbox import policy as policies
from raysandbox import profile as profiles
from raysandbox.errors import ProfileError, TaskRefused
from raysandbox.worker import seams

__all__ = ["CHOSEN", "IMAGE", "SEALED", "Gate", "profile_of"]

#: Where the launcher puts the sealed policy for a worker.
SEALED = "/run/raysandbox/node"
#: Where the prelude says which interpreter of the policy's it put in the place of the
#: node's own; beside the sealed policy.
CHOSEN = "/run/raysandbox/interpreter"
#: What this worker sees instead of the host's files; the launcher sealed it, too.
IMAGE = "RAYSANDBOX_IMAGE"

_OURS = "RAYSANDBOX_"
# A worker's ancestors up to raylet: interpreter, shell, wrapper, and room.
_MOST_ANCESTORS = 16


def profile_of(resources: Mapping[str, Any]) -> profiles.Profile:
    """Return the profile that the tag names; untagged: the strictest.

    Raises:
        ProfileError: Two tags, or a tag that names no usable profile.
    """
    tag = policies.tag_of(resources)
    return profiles.strictest() if tag is None else profiles.load(tag)


class Gate:
    """The node's policy in one worker.

    Attributes:
        node: What decides, or None where the node has no policy.
        problem: Why no task may run, or None.
        launched: The node's launcher started this worker.
        interpreter: Of the policy's, as Ray's agent calls it: what runs this worker,
            and what it sees; "" for the node's own.
        system: What ``@system`` stands for in an image; nothing for the usual.
    """

    def __init__(self) -> None:
        self.node: policies.Node | None = None
        self.problem: ProfileError | None = None
        self.launched = False
        self.interpreter = ""
        self.system: tuple[str, ...] = ()
        self._profiles: dict[tuple[str, frozenset[str], float], profiles.Profile] = {}
        self._requests: dict[str, policies.Request] = {}
        self._runtime_env_seen: str | None = None
        # What was asked last, and the answer.
        self._last: tuple[tuple[Any, ...], profiles.Profile] | None = None
        try:
            self._load()
        except ProfileError as error:
            self.problem = error

    def _load(self) -> None:
        if os.path.lexists(SEALED):
            sealed = _read_sealed(SEALED)
            self.node = policies.unseal(sealed)
            variables = policies.sealed_variables(sealed)
            self.launched = True
            _restore(variables)
            self.system = tuple(json.loads(variables.get(IMAGE, "[]")))
            if os.path.lexists(CHOSEN):
                self.interpreter = _read_sealed(CHOSEN).decode()
            return
        _restore(_raylet_variables())
        named = policies.ENV in os.environ
        if named or os.path.lexists(policies.SITE_FILE):
            self.node = policies.load_node(policies.find())

    @property
    def policy(self) -> policies.Policy | None:
        """The policy alone."""
        return self.node.policy if self.node is not None else None

    def profile(
        self, worker: Any, task: str, resources: Mapping[str, Any]
    ) -> profiles.Profile:
        """Return the profile of the task that this worker is about to run.

        Args:
            worker: Ray's.
            task: Its name, for errors.
            resources: Those that raylet gave it, by name.

        Raises:
            TaskRefused: The policy has no profile for it.
            ProfileError: The tag or the policy can't be used.
        """
        if self.problem is not None:
            raise self.problem
        asked = resources, worker.current_job_id, worker.runtime_env
        if self._last is None or self._last[0] != asked:
            self._last = asked, self._find(worker, task, resources)
        return self._last[1]

    def _find(
        self, worker: Any, task: str, resources: Mapping[str, Any]
    ) -> profiles.Profile:
        if self.node is None:
            key = ("", frozenset(resources), 1.0)
            if key not in self._profiles:
                self._profiles[key] = profile_of(resources)
            return self._profiles[key]
        self._check_runtime_env(self.node, worker, task, resources)
        amount = policies.amount_of(
            {name: sum(part for _, part in ids) for name, ids in resources.items()}
        )
        key = (worker.current_job_id.hex(), frozenset(resources), amount)
        if key not in self._profiles:
            self._profiles[key] = self._decide(
                self.node, worker, task, resources, amount
            )
        return self._profiles[key]

    def _decide(
        self,
        node: policies.Node,
        worker: Any,
        task: str,
        resources: Mapping[str, Any],
        amount: float,
    ) -> profiles.Profile:
        tag = policies.tag_of(resources)
        known = self._job(worker)
        request = policies.Request(
            tag=tag,
            amount=amount,
            namespace=known.namespace,
            metadata=known.metadata,
        )
        decision = policies.decide(node.policy, request)
        if decision.profile is None:
            raise TaskRefused(
                task=task,
                profile=str(tag),
                limit=f"policy rule {decision.rule!r}" if decision.rule else "policy",
                seen=decision.why,
                remedy=decision.remedy,
            )
        return node.profiles[decision.profile]

    def _job(self, worker: Any) -> policies.Request:
        """Return what the GCS knows of the job; asked for once."""
        job = worker.current_job_id.hex()
        if job not in self._requests:
            found = seams.job_of(worker.gcs_client, job)
            if found is None:
                raise ProfileError(
                    source="<policy>",
                    value=job,
                    reason="the GCS's job table has no such job: who asks is unknown",
                )
            self._requests[job] = policies.Request(
                namespace=found[0], metadata=found[1]
            )
        return self._requests[job]

    def _check_runtime_env(
        self, node: policies.Node, worker: Any, task: str, resources: Mapping[str, Any]
    ) -> None:
        text = worker.runtime_env
        if text == self._runtime_env_seen:
            return
        from raysandbox.api import HOOK

        wanted = json.loads(text or "{}")
        refused = policies.runtime_env_refusals(node.policy, wanted, own_hook=HOOK)
        if not refused and (why := self._other_interpreter(node, wanted)):
            refused = [why]
        if refused:
            raise TaskRefused(
                task=task,
                profile=policies.tag_of(resources) or node.policy.untagged,
                limit="policy runtime_env",
                seen="; ".join(refused),
                remedy="leave it out of the runtime_env, or have the operator allow "
                "it, where the policy can",
            )
        self._runtime_env_seen = text

    def _other_interpreter(self, node: policies.Node, wanted: dict[str, Any]) -> str:
        """Say what the job asks for and this worker is not; "" if it is that.

        Nothing but the launcher can show an image to a worker, and it alone puts
        another interpreter there.
        """
        asked = policies.as_made(node.policy, wanted).get("py_executable") or ""
        if asked == self.interpreter or not (
            self.launched or policies.image_of(wanted)
        ):
            return ""
        have = self.interpreter or "the node's own Python and files"
        return f"{asked or have} is asked for, and this worker has {have}"


def _read_sealed(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    with open(fd, "rb") as file:
        if not os.fstatvfs(fd).f_flag & os.ST_RDONLY:
            raise ProfileError(
                source=path,
                reason="is not on a read-only mount: the launcher did not put it there",
            )
        return file.read()


def _raylet_variables() -> dict[str, str]:
    """Return our variables as raylet has them: the node's, not a client's.

    Raises:
        ProfileError: Raylet can't be found or looked at.
    """
    pid = os.getppid()
    for _ in range(_MOST_ANCESTORS):
        try:
            if os.path.basename(os.readlink(f"/proc/{pid}/exe")) == "raylet":
                with open(f"/proc/{pid}/environ", "rb") as file:
                    pairs = file.read().decode(errors="surrogateescape").split("\0")
                return dict(
                    pair.split("=", 1) for pair in pairs if pair.startswith(_OURS)
                )
            with open(f"/proc/{pid}/stat") as file:
                pid = int(file.read().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError) as error:
            raise _no_raylet(str(error)) from error
        if pid <= 1:
            break
    raise _no_raylet("no ancestor of this worker is raylet")


def _no_raylet(why: str) -> ProfileError:
    return ProfileError(
        source="<policy>",
        reason=f"whether this node has a policy can't be told from raylet ({why}); "
        "start the node with `raysandbox start`, which passes the policy on itself",
    )


def _restore(variables: Mapping[str, str]) -> None:
    """Set our variables to the node's: what a client put there is gone."""
    for name in [name for name in os.environ if name.startswith(_OURS)]:
        if name not in variables:
            del os.environ[name]
    os.environ.update(variables)
