"""Runs Ray's tasks and actors in jails: from a tag to a profile, from call to result.

One executor serves one Ray worker process, on its main thread. It holds a pool
of jails for each profile that was asked for, decides which of them a call goes
to, and turns what comes back into what Ray stores.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import ray

from raysandbox import client, datacodec, plan, policy, wire
from raysandbox import profile as profiles
from raysandbox.errors import (
    JailProtocolError,
    ProfileError,
    RaysandboxError,
    SetupError,
    TaskKilled,
    TaskQuotaExceeded,
    TaskRefused,
    TaskUnsupported,
)
from raysandbox.jail import runner
from raysandbox.jail.runner import Op
from raysandbox.kernel import cgroup
from raysandbox.node import spilling, store_proxy
from raysandbox.observe import state
from raysandbox.sealed import SealedError
from raysandbox.worker import entrypoint, hints, inside, quota, seams, store
from raysandbox.worker.buffers import Buffers
from raysandbox.worker.events import EventLog
from raysandbox.worker.figures import Figures
from raysandbox.worker.gate import Gate
from raysandbox.worker.output import Pump
from raysandbox.worker.pool import (
    Environment,
    Jail,
    Pool,
    groups_of_process,
)

__all__ = ["JailExecutor"]

# A zygote costs memory: those of the profiles used last stay.
_MOST_POOLS = 2
_ERROR_PARTS = 6
# How an answer of one part begins that is the pickle of one value.
_ONE_PICKLE = runner.ENTRY.pack(runner.MODE_PICKLE, 0, 0, 1)
_HEAD_BYTES = runner.ENTRY.size
_SPLIT = runner.CALL_HEAD.pack(Op.SPLIT, 0, bytes(24))
_RETRY = runner.CALL_HEAD.pack(Op.RETRY, 0, bytes(24))
_ORDINARY = "use an ordinary function or an actor with ordinary methods"
_ENTRYPOINT = (
    "an entrypoint of the Jobs API, whose driver would have all that the worker has"
)
_NO_JOBS = (
    "start the driver yourself, with ray.init(address=...) on a machine of the "
    "cluster, or have the operator name a profile for it in the policy: "
    "jobs.entrypoint"
)


class _Quotas(NamedTuple):
    """What one profile allows here; None is no limit.

    Attributes:
        profile: The profile.
        of_job: What a job may hold on this node.
        put_bytes: What one task may return, in bytes.
        put_objects: And in objects.
    """

    profile: profiles.Profile
    of_job: quota.Limits
    put_bytes: int | None
    put_objects: int | None


class _Last(NamedTuple):
    """The last task of a jail that lives on, if it had no arguments.

    Whatever is the same when the next one comes need not be looked at again: Ray
    runs tasks of one function by the thousand.

    Attributes:
        info: Its function; of the worker's one job.
        name: Its name.
        runtime_env: As Ray has it.
        refused: Entries of the module path that were kept for jails.
        pool: Of its jail.
        jail: Which also has what it was told.
        most_bytes: Of a result that is under every limit; 0 where results are data.
        split: Has the jail take its answer apart.
    """

    info: seams.FunctionBytes
    name: str
    runtime_env: str
    refused: int
    pool: Pool
    jail: Jail
    most_bytes: int
    split: Callable[[], list[Any]]


class JailExecutor(seams.Executor):
    """See the module.

    Attributes:
        environment: What jails see of the worker; made when the first call
            comes, since a prestarted worker does not know its job before.
    """

    def __init__(self, trusted: seams.TrustedPath, gate: Gate) -> None:
        self._trusted, self._pump, self._gate = trusted, Pump(self._look), gate
        self._worker: Any = seams.global_worker()
        self._core: Any = self._worker.core_worker
        self._resources_root = os.path.realpath(seams.runtime_resources()) + "/"
        self._pools: dict[str, Pool] = {}
        self._buffers = Buffers()
        self._resource_paths: dict[str, bool] = {}
        self._runtime_env: tuple[str, dict[str, str]] = ("", {})
        self._setup: dict[str, str] = {}
        self._resources: Mapping[str, Any] = {}
        self._task_id = bytes(24)
        # What the last call was told, and what kind of call that was.
        self._told_last = b""
        self._told_kind: tuple[Any, ...] = ()
        self._last: _Last | None = None
        self._events: EventLog | None = None
        self._board = self._open_board()
        self._figures = Figures()
        self._job = ""  # hex of the job whose call runs
        # Hex of the job that this worker is bound to, and the profile inside.
        self._bound = ("", "")
        self._full = hints.FullStore()
        # The jail whose answer Ray has not taken in yet, and its pool.
        self._pending: tuple[Pool, Jail, bool] | None = None
        self._job_jail: tuple[str, Pool, Jail] | None = None
        self._actor: tuple[Pool, Jail] | None = None
        self._actor_end = ""
        # A worker serves jails or one profile of its own, for life.
        self._serves_jails = False
        self.profile_inside: profiles.Profile | None = None
        # Names of resources that were looked at: their tag is the right one.
        self._checked: set[tuple[str, ...]] = set()
        # Leaves after its task: nothing but luck keeps others from coming.
        self._leaves = False
        self._refusal: RaysandboxError | None = None
        self._lock = threading.RLock()
        self._limits_of: dict[str, _Quotas] = {}
        self._quotas = quota.Quotas(
            quota.directory(seams.session_dir()),
            lambda ids: store.which_kept(
                seams.store_socket(), spilling.directory(seams.session_dir()), ids
            ),
            lambda: seams.live_jobs(self._worker.gcs_client),
        )

    def _open_board(self) -> state.Board | None:
        """Make the file in which ``raysandbox ps`` sees this worker.

        Without it tasks run all the same, and the worker's log says so.
        """
        policy_ = self._gate.policy
        about = {
            "worker": self._worker.worker_id.hex(),
            "node": self._worker.current_node_id.hex(),
            "started": time.time(),
            "policy": policy_.digest if policy_ is not None else "",
        }
        try:
            about["bases"] = groups_of_process().described()
            if not self._gate.launched:  # behind the node's wall its keeper does it
                state.sweep(seams.session_log_dir())
            return state.Board(seams.session_log_dir(), about["worker"], about)
        except (OSError, ValueError, RaysandboxError) as error:
            sys.stderr.write(f"raysandbox: ps can't see this worker: {error}\n")
            return None

    # -- what the seams call --------------------------------------------------

    def task(
        self,
        info: seams.FunctionBytes,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run a function in a jail of its profile; see :class:`seams.Executor`."""
        with self._lock:
            # Whatever comes now, it is no more what its jail did last.
            last, self._last = self._last, None
            if last is not None and not args and not kwargs:
                result = self._call_again(last, info)
                if result is not None:
                    return result
            self._settle()
            self._bind()
            self._buffers.serve(self._job)
            name = str(self._worker.current_task_name)
            profile = self._profile(name)
            self._begin_jail(profile)
            layout, parts = self._arguments(profile, name, args, kwargs)
            pool = self._pool(profile)
            jail, keep = self._jail_for(pool)
            self._pending = (pool, jail, keep)
            result = self._call(pool, jail, name, Op.TASK, info, layout, parts)
            # With its first call a jail is told more.
            if keep and not layout and jail.served > 1:
                self._last = self._as_last(pool, jail, info, name)
            return result

    def _as_last(
        self, pool: Pool, jail: Jail, info: seams.FunctionBytes, name: str
    ) -> _Last:
        own, limits = pool.profile.object_store, self._limits(pool.profile)
        most_bytes = min(own.max_put_bytes, own.max_result_bytes, quota.INLINE_BYTES)
        if limits.put_bytes is not None:
            most_bytes = min(most_bytes, limits.put_bytes)
        if pool.profile.results.mode == "data" or limits.put_objects == 0:
            most_bytes = 0
        env, refused = str(self._worker.runtime_env), len(self._trusted.refused)
        split = functools.partial(self._split, pool, jail, name)
        return _Last(info, name, env, refused, pool, jail, most_bytes, split)

    def _call_again(
        self, last: _Last, info: seams.FunctionBytes
    ) -> seams.SealedResult | None:
        """Do what `task` does, for a task that is what the last one was.

        None if it is not, or its jail was gone before: nothing was run.
        """
        core, pool, jail, task = self._core, last.pool, last.jail, last.name
        if (
            last.info is not info
            or jail.status is not None
            or core.resource_ids() != self._resources
            or core.get_current_task_name() != task
            or core.get_current_runtime_env() != last.runtime_env
            or len(self._trusted.refused) != last.refused
            or self._quotas.is_in_use
        ):
            return None
        self._task_id = core.get_current_task_id().binary()
        attempt = core.get_current_task_attempt_number()
        served, place, notify = jail.served + 1, jail.place, jail.notify
        denied = notify.count if notify is not None else 0
        if place is not None and place.call(served, denied, self._task_id, task):
            return None  # somebody asked for its end
        jail.served, self._pending = served, (pool, jail, True)
        try:
            head = runner.CALL_HEAD.pack(Op.TASK, attempt, self._task_id)
            frame = pool.call_again(jail, task, head)
        except BaseException as error:
            # Cancelled, or the jail is gone: in both cases nobody answers.
            self._abandon(pool, jail, error)
            raise
        if frame is None:
            jail.served -= 1
            return None
        if frame.kind == wire.ERROR:
            self._raise(pool, jail, task, frame)
        self._last = last
        parts = frame.parts
        if len(parts) == 1 and len(parts[0]) <= last.most_bytes:
            part = bytes(parts[0])
            value = None
            if part == runner.NONE:
                value = seams.serialize_none()
            elif part.startswith(_ONE_PICKLE):
                value = seams.serialize_python(part[_HEAD_BYTES:], ())
            if value is not None:
                jail.outcome = jail.outcome or "ok"
                return seams.SealedResult(value, last.split)
        return self._result(pool, jail, task, frame)

    def actor(
        self,
        info: seams.FunctionBytes,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run a constructor or a method; an actor has one jail for life."""
        with self._lock:
            self._settle()
            self._bind()
            self._buffers.serve(self._job)
            name = f"{info.name}.{method}"
            if method == "__init__":
                return self._new_actor(info, name, args, kwargs)
            if self._actor is None or self._actor[1].status is not None:
                raise TaskKilled(
                    task=name,
                    profile=self._profile(name).name,
                    seen=f"the actor's jail has ended: {self._actor_end or 'unknown'}",
                    remedy="make the actor again",
                )
            pool, jail = self._actor
            layout, parts = self._arguments(pool.profile, name, args, kwargs)
            self._pending = (pool, jail, True)
            return self._call(pool, jail, name, Op.METHOD, info, layout, parts, method)

    def _new_actor(
        self,
        info: seams.FunctionBytes,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        profile = self._profile(name)
        core = self._core
        self._begin_jail(profile)
        if core.current_actor_is_asyncio():
            if name == entrypoint.NAME:
                raise self._unsupported(profile, name, _ENTRYPOINT, _NO_JOBS)
            raise self._unsupported(profile, name, "an actor with async methods")
        if core.current_actor_max_concurrency() > 1:
            raise self._unsupported(profile, name, "an actor with max_concurrency > 1")
        layout, parts = self._arguments(profile, name, args, kwargs)
        pool = self._pool(profile)
        jail = self._take(pool)
        self._actor = (pool, jail)
        self._pending = (pool, jail, True)
        self._call(pool, jail, name, Op.NEW, info, layout, parts)

    def is_retryable(self, error: BaseException, allowed: bytes) -> bool:
        """Ask the jail, which alone can open the list of types and the error."""
        with self._lock:
            if not isinstance(error, SealedError) or self._pending is None:
                return False
            pool, jail, _ = self._pending
            try:
                frame = pool.call(jail, "retry_exceptions", [b"", _RETRY, allowed])
            except RaysandboxError:
                return False
            return frame.kind == wire.RESULT and bytes(frame.parts[-1]) == b"1"

    def formatted(self, error: BaseException | None) -> str | None:
        """Return the jail's traceback; nothing of the worker's own."""
        with self._lock:
            self._settle()
        if isinstance(error, SealedError):
            return _as_worker_traceback(error.formatted)
        if isinstance(error, RaysandboxError):
            name = f"{type(error).__module__}.{type(error).__qualname__}"
            return _as_worker_traceback(f"{name}: {error}\n")
        return None

    def serialized(self) -> None:
        """Ray has the answer: a jail for one task ends here."""
        pending = self._pending
        if pending is not None and pending[2] and not self._quotas.is_in_use:
            return  # the jail lives on, and there is nothing else to let go of
        with self._lock:
            self._settle()

    # -- boundary = "worker" ------------------------------------------------------

    def opens(self) -> bool:
        """See :class:`seams.Executor`; runs before anything of a task is opened."""
        with self._lock:
            self._refusal = None
            try:
                profile = self._profile(str(self._worker.current_task_name))
                if profile.boundary != "worker":
                    return False
                self._refuse_entrypoint(profile)
                if self._serves_jails:
                    self._give_up_jails(profile)
                self._enter(profile)
            except inside.NotRestrictedError as error:
                seams.leave(str(error))
            except RaysandboxError as error:
                # For the task's owner: the call itself raises it.
                self._refusal = error
                return False
            return True

    def _give_up_jails(self, profile: profiles.Profile) -> None:
        """End all jails: from here on this worker serves one profile.

        Raylet sends a task of ``boundary = "worker"`` to any idle worker of its job,
        and one that left instead would cost the task a retry. Nothing of a jailed
        task ran in this process.
        """
        self._settle()
        self._last = None
        try:
            for name in list(self._pools):
                self._retire(name)
        except (OSError, subprocess.TimeoutExpired, RaysandboxError) as error:
            self._leave(profile.name, f"its jails don't end ({error})")
        if self._actor is not None or self._is_entrypoint():
            self._leave(profile.name, "it has served tasks in jails")
        self._buffers.drop_all()
        # What is open stays open for a task inside.
        self._quotas.close()
        if self._events is not None:
            self._events.close()
        self._serves_jails = False

    def _enter(self, profile: profiles.Profile) -> None:
        """Raise the profile's walls around this process, then take the seals off."""
        hosts = self._is_entrypoint()
        self._bind(inside=profile, drivers=hosts)
        seams.speak_for_job(self._worker)
        boundaries = _boundaries(self._gate.node)
        log = EventLog(self._log_directory())
        try:
            log.open()
        except OSError as error:
            raise SetupError(
                step="event_log", errno=error.errno or 0, detail=log.path
            ) from error
        ports, loose = seams.ray_ports()
        about = {
            "node": self._worker.current_node_id.hex(),
            "worker": self._worker.worker_id.hex(),
            "job": self._worker.current_job_id.hex(),
            "pid": os.getpid(),
        }
        # Out of reach behind the walls.
        secrets = entrypoint.credentials(os.environ) if hosts else {}
        output = entrypoint.output_log() if hosts else ""
        entered = inside.enter(
            profile,
            inside.Worker(
                launched=self._gate.launched,
                python_path=[path for path in self._trusted if path],
                system=self._gate.system,
                working_dirs=self._user_directories(),
                variables=self._variables(),
                ports=ports,
                loose_ports=loose,
                ray_log_dir=seams.session_log_dir(),
                event_dir=self._log_directory(),
                event=about,
                driver_ports=(seams.worker_ports() or frozenset({0}))
                if hosts
                else None,
                log=output,
            ),
        )
        self.profile_inside = profile
        self._show_inside(profile, entered.group)
        marker = client.marker_of(self._worker.runtime_env)
        self._leaves = marker != profile.name and self._worker.actor_id.is_nil()
        client.remember({**boundaries, profile.name: True})
        log.write(
            "worker_entered",
            **about,
            profile=profile.name,
            threads=entered.threads,
            took_s=round(entered.took_s, 4),
            leaves_after_task=self._leaves,
            hosts_drivers=hosts,
            protections=plan.described(entered.protections),
        )
        log.close()
        seams.unseal()
        if hosts:
            entrypoint.host(
                self._worker,
                profile=profile.name,
                log=output,
                python_path=[path for path in self._trusted if path],
                user_path=self._user_directories(),
                variables={**self._variables(), **secrets},
            )
        # The job's own set-up, which the walls had to come before.
        problem = seams.preload(self._first()["modules"])
        problem = problem or seams.run_setup_hook(self._worker.runtime_env)
        if problem:
            seams.leave(problem)

    def _is_entrypoint(self) -> bool:
        # "ACTOR:CLASS.METHOD", the first of which is a client's to choose.
        name = str(self._worker.current_task_name).rpartition(":")[2]
        return name == entrypoint.NAME and not self._worker.actor_id.is_nil()

    def _refuse_entrypoint(self, profile: profiles.Profile) -> None:
        """Refuse to host drivers, unless the policy has this profile for them."""
        if not self._is_entrypoint():
            return
        node = self._gate.node
        named = node.policy.jobs.entrypoint if node is not None else None
        if not self._gate.launched or named != profile.name:
            name = entrypoint.NAME
            raise self._unsupported(profile, name, _ENTRYPOINT, _NO_JOBS)
        entrypoint.check()

    def _show_inside(self, profile: profiles.Profile, group: str) -> None:
        """Write down that tasks run in this process; the last word is theirs."""
        place = self._board.take() if self._board is not None else None
        if place is None:
            return
        actor = self._worker.actor_id
        place.write(
            running=True,
            calls=0,
            denials=0,
            started=time.time(),
            job=self._worker.current_job_id.binary(),
            task=self._worker.current_task_id.binary(),
            actor=b"" if actor.is_nil() else actor.binary(),
            profile=profile.name,
            name=str(self._worker.current_task_name),
            group=group,
        )

    def guarded(self, info: Any) -> Any:
        """See :class:`seams.Executor`."""
        served, original = self.profile_inside, info.function
        if served is None or not self._worker.actor_id.is_nil():
            return info

        @functools.wraps(original)
        def run(*args: Any, **kwargs: Any) -> Any:
            self._check_inside(served)
            return original(*args, **kwargs)

        return seams.with_function(info, run, 1 if self._leaves else info.max_calls)

    def why_full(self) -> str:
        """See :class:`seams.Executor`."""
        return self._full.explain(self.profile_inside, self._gate.policy)

    def _check_inside(self, served: profiles.Profile) -> None:
        """Serve no other profile's task, even if raylet should send one."""
        resources = self._core.resource_ids()
        key = tuple(resources)
        if key in self._checked:
            return
        if self._gate.node is None:
            # Profiles can't be read any more; the tag alone decides here.
            asked = policy.tag_of(resources)
        else:
            asked = self._profile(str(self._worker.current_task_name)).name
        if asked != served.name:
            self._leave(str(asked), f"it serves {served.name!r} for life")
        self._checked.add(key)

    def _begin_jail(self, profile: profiles.Profile) -> None:
        if profile.boundary == "worker":
            if self._refusal is not None:
                raise self._refusal
            self._leave(profile.name, "it has served tasks in jails")
        self._serves_jails = True

    def _leave(self, asked: str, why: str) -> NoReturn:
        """End this worker: the task is tried again in one that may serve it."""
        seams.leave(
            f"raysandbox: a task of profile {asked!r} came to a worker that "
            f"can't serve it: {why}. It is tried again elsewhere, which counts as a "
            "retry; `import raysandbox` where tasks are submitted avoids it"
        )

    # -- profiles, pools and jails ----------------------------------------------

    def _profile(self, task: str) -> profiles.Profile:
        # Of an actor's calls, too: they have what it was made with.
        resources = self._core.resource_ids()
        if resources != self._resources:
            # Else the very same: who kept something for it sees that at once.
            self._resources = resources
        try:
            return self._gate.profile(self._worker, task, self._resources)
        except TaskRefused as error:
            if self._refusal is not None:
                raise  # written down when the worker first looked
            self._figures.policy_refused(error.limit)
            # A worker without jails has no pump that would do it.
            self._figures.flush()
            self._log("task_refused", task=task, rule=error.limit, reason=error.seen)
            raise

    def _pool(self, profile: profiles.Profile) -> Pool:
        pool = self._pools.pop(profile.name, None)
        if pool is None:
            while len(self._pools) >= _MOST_POOLS:
                self._retire(next(iter(self._pools)))
            pool = Pool(
                profile, self._environment(), self._pump, self._record, self._buffers
            )
        self._pools[profile.name] = pool  # the one used last comes last
        return pool

    def _retire(self, name: str) -> None:
        pool = self._pools.pop(name)
        if self._job_jail is not None and self._job_jail[1] is pool:
            self._job_jail = None
        pool.stop()

    def _environment(self) -> Environment:
        directory = os.path.dirname(os.path.abspath(ray.__file__))
        return Environment(
            python_path=[path for path in self._trusted if path],
            ray_directory=directory,
            system=self._gate.system,
            working_dirs=self._user_directories(),
            variables=dict(os.environ),
        )

    def _user_directories(self) -> list[str]:
        """Directories of the runtime environment: Ray made them for this job.

        Not the driver's own directory, which Ray puts on the path of workers
        too: it may be anybody's home.
        """
        return [
            path
            for path in dict.fromkeys([*self._trusted.refused, os.getcwd()])
            if self._is_resource(path)
        ]

    def _is_resource(self, path: str) -> bool:
        """Whether Ray unpacked this for a runtime environment."""
        known = self._resource_paths.get(path)
        if known is None:
            real = os.path.realpath(path)
            known = real.startswith(self._resources_root) and os.path.exists(real)
            self._resource_paths[path] = known
        return known

    def _jail_for(self, pool: Pool) -> tuple[Jail, bool]:
        """Return a jail, and whether it outlives the call."""
        if pool.profile.boundary != "job":
            return self._take(pool), False
        job = self._job
        if self._job_jail is not None:
            known_job, known_pool, jail = self._job_jail
            known_pool.look()  # it may have ended meanwhile
            if known_job == job and known_pool is pool and jail.status is None:
                return jail, True
            self._job_jail = None
            known_pool.end(jail, wait=True)
        jail = self._take(pool)
        self._job_jail = (job, pool, jail)
        return jail, True

    def _take(self, pool: Pool) -> Jail:
        """Return a jail that is ready for its first call."""
        asked = time.monotonic()
        jail = pool.take()
        self._figures.jail_started(
            pool.profile.name, time.monotonic() - asked, pool.walls
        )
        return jail

    def _settle(self) -> None:
        """Let go of the jail and of the arguments of the last call."""
        self._quotas.let_go()
        pending, self._pending = self._pending, None
        if pending is not None and not pending[2]:
            pending[0].end(pending[1])

    def _look(self) -> None:
        """Between calls: take in the ends of jails. Runs in the pump's thread."""
        self._figures.flush()
        if self._lock.acquire(blocking=False):
            try:
                for pool in self._pools.values():
                    pool.rest()
                    pool.look()
                self._buffers.trim()
            finally:
                self._lock.release()

    def _record(self, jail: Jail, pool: Pool, usage: cgroup.Usage) -> None:
        """Write the event of a jail's end."""
        if jail.place is not None:
            jail.place.free()
            jail.place = None
        self._figures.jail_ended(pool.profile.name, jail.outcome, jail.denied_count)
        if jail.inquest and jail.outcome == TaskQuotaExceeded.__name__:
            self._figures.quota_refused(pool.profile.name, "limits.output")
        self._log(
            "jail_ended",
            profile=pool.profile.name,
            tasks=jail.tasks,
            calls=jail.served,
            outcome=jail.outcome,
            memory_peak_bytes=usage.memory_peak_bytes,
            cpu_time_s=usage.cpu_time_s,
            oom_kills=usage.oom_kills,
            forks_refused=usage.pids_denied,
            output_bytes=jail.output_bytes,
            denied=jail.denials,
            denied_count=jail.denied_count,
            **({"ended_by": jail.ended_by} if jail.ended_by else {}),
            protections=pool.shown,
        )

    def _log_directory(self) -> str:
        chosen = self._gate.policy
        directory = chosen.audit.directory if chosen is not None else "session"
        return seams.session_log_dir() if directory == "session" else directory

    def _log(self, event: str, **fields: Any) -> None:
        if self._events is None:
            self._events = EventLog(self._log_directory())
        self._events.write(
            event,
            node=self._worker.current_node_id.hex(),
            worker=self._worker.worker_id.hex(),
            job=self._worker.current_job_id.hex(),
            **fields,
        )

    # -- one call ----------------------------------------------------------------

    def _arguments(
        self,
        profile: profiles.Profile,
        task: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> tuple[list[str | None], list[Any]]:
        of_job = self._limits(profile).of_job
        if not args and not kwargs:
            self._quotas.hold(self._job, of_job, ())
            return [], []
        layout: list[str | None] = [None] * len(args)
        layout += kwargs
        parts: list[Any] = []
        sizes: list[int] = []
        own = profile.object_store
        for index, value in enumerate((*args, *kwargs.values())):
            metadata, data = _sealed_parts(value)
            size = memoryview(data).nbytes
            if size > own.max_argument_bytes:
                shown = layout[index] or f"number {index + 1}"
                raise self._over(
                    profile,
                    task,
                    "object_store.max_argument",
                    f"{own.max_argument_bytes} bytes",
                    f"argument {shown} of {size} bytes",
                    "pass less, or ask for a profile with a larger limit",
                )
            sizes.append(size)
            parts += [metadata, data]
        for seen, limit, key, unit in (
            (sum(sizes), own.max_arguments_bytes, "max_arguments", "bytes"),
            (len(sizes), own.max_argument_objects, "max_argument_objects", "objects"),
        ):
            if limit is not None and seen > limit:
                raise self._over(
                    profile,
                    task,
                    f"object_store.{key}",
                    f"{limit} {unit}",
                    f"arguments of {seen} {unit} together",
                    "pass less, or ask for a profile with a larger limit",
                )
        refusal = self._quotas.hold(self._job, of_job, sizes)
        if refusal is not None:
            raise self._over_job(profile, task, refusal)
        return layout, parts

    def _bind(
        self, inside: profiles.Profile | None = None, *, drivers: bool = False
    ) -> None:
        """Say to the proxy in front of Ray's sockets, if there is one, whose we are.

        Before any code of a user runs in this process: later words can only take.

        Args:
            inside: The profile whose tasks run in this very process; None where
                they run in jails, whose quotas are counted here.
            drivers: Whether what they start may be drivers.

        Raises:
            SetupError: The proxy refused, or is gone.
        """
        job = self._job = self._worker.current_job_id.hex()
        bound = (job, inside.name if inside is not None else "")
        if self._bound == bound:
            return
        if not os.path.lexists(store_proxy.BIND):
            # It is there from before this process, or never.
            self._bound = bound
            return
        limits, actor = None, True
        if inside is not None:
            of, actor = self._limits(inside), not self._worker.actor_id.is_nil()
            limits = store_proxy.Limits(
                job_bytes=of.of_job.stored_bytes,
                job_objects=of.of_job.stored_objects,
                worker_bytes=of.put_bytes,
                worker_objects=of.put_objects,
                job_fetch_bytes=of.of_job.argument_bytes,
                job_fetch_objects=of.of_job.argument_objects,
                fetch_bytes=inside.object_store.max_arguments_bytes,
                fetch_objects=inside.object_store.max_argument_objects,
                fetch_each=inside.object_store.max_argument_bytes,
            )
        store_proxy.bind(
            store_proxy.BIND,
            bytes.fromhex(job),
            actor=actor,
            drivers=drivers,
            limits=limits,
        )
        self._bound = bound

    def _limits(self, profile: profiles.Profile) -> _Quotas:
        """What the profile allows, or the node's policy if that is less."""
        known = self._limits_of.get(profile.name)
        if known is not None and known.profile is profile:
            return known
        own, chosen = profile.object_store, self._gate.policy
        job_bytes, job_objects = own.max_job_bytes, own.max_job_objects
        put_bytes: int | None = own.max_put_bytes
        put_objects = own.max_put_objects
        if chosen is not None:
            node = chosen.object_store
            job_bytes = _least(job_bytes, node.max_job_bytes)
            job_objects = _least(job_objects, node.max_job_objects)
            put_bytes = _least(put_bytes, node.max_task_bytes)
            put_objects = _least(put_objects, node.max_task_objects)
        of_job = quota.Limits(
            stored_bytes=job_bytes,
            stored_objects=job_objects,
            argument_bytes=own.max_job_arguments_bytes,
            argument_objects=own.max_job_argument_objects,
        )
        found = _Quotas(profile, of_job, put_bytes, put_objects)
        self._limits_of[profile.name] = found
        return found

    def _over(
        self,
        profile: profiles.Profile,
        task: str,
        limit: str,
        allowed: str,
        seen: str,
        remedy: str,
    ) -> TaskQuotaExceeded:
        self._log("quota_refused", task=task, profile=profile.name, limit=limit)
        self._figures.quota_refused(profile.name, limit)
        return TaskQuotaExceeded(
            task=task,
            profile=profile.name,
            limit=limit,
            allowed=allowed,
            seen=seen,
            remedy=remedy,
        )

    def _over_job(
        self, profile: profiles.Profile, task: str, refusal: quota.Refusal
    ) -> TaskQuotaExceeded:
        return self._over(
            profile,
            task,
            refusal.limit,
            refusal.allowed,
            refusal.seen,
            "drop references to objects that are no longer needed, or ask for a "
            f"larger {refusal.limit} in the profile and the node's policy",
        )

    def _count_results(
        self, pool: Pool, jail: Jail, task: str, sizes: list[int]
    ) -> None:
        """Count what Ray is about to store; in the order of the return values."""
        profile = pool.profile
        limits = self._limits(profile)
        try:
            for seen, limit, key, unit in (
                (sum(sizes), limits.put_bytes, "max_put", "bytes"),
                (len(sizes), limits.put_objects, "max_put_objects", "objects"),
            ):
                if limit is not None and seen > limit:
                    raise self._over(
                        profile,
                        task,
                        f"object_store.{key}",
                        f"{limit} {unit}",
                        f"results of {seen} {unit} together",
                        "return less, or ask for a profile with a larger limit",
                    )
            refusal = self._quotas.store(
                self._job,
                limits.of_job,
                self._task_id,
                sizes,
            )
            if refusal is not None:
                raise self._over_job(profile, task, refusal)
        except TaskQuotaExceeded:
            jail.outcome = "TaskQuotaExceeded"
            raise

    def _told(
        self,
        profile: profiles.Profile,
        info: seams.FunctionBytes,
        layout: list[str | None],
        method: str,
        task: str,
        first: Mapping[str, Any],
    ) -> bytes:
        """Return what a jail is told with each call of a kind alike."""
        worker, actor_id = self._worker, self._worker.actor_id
        visible = self._visible()
        user = [path for path in self._trusted.refused if path in visible]
        return _json(
            {
                **first,
                "function": info.number,
                "method": method,
                "layout": layout,
                "module": info.module,
                "results": profile.results.mode,
                "max_result_bytes": profile.object_store.max_result_bytes,
                "first_path": user,
                "env": self._variables(),
                "cwd": self._working_directory(),
                "context": {
                    "profile": profile.name,
                    "boundary": profile.boundary,
                    "job_id": self._job,
                    "actor_id": None if actor_id.is_nil() else actor_id.hex(),
                    "actor_name": None
                    if actor_id.is_nil()
                    else worker.actor_name or None,
                    "node_id": worker.current_node_id.hex(),
                    "worker_id": worker.worker_id.hex(),
                    "namespace": worker.namespace,
                    "task_name": task,
                    "function_name": worker.current_task_function_name,
                    "resources": {
                        name: sum(amount for _, amount in mapping)
                        for name, mapping in self._resources.items()
                    },
                },
            }
        )

    def _tell(
        self,
        pool: Pool,
        jail: Jail,
        info: seams.FunctionBytes,
        layout: list[str | None],
        method: str,
        task: str,
    ) -> bytes:
        """Return what a jail is told; nothing if it was told just that last."""
        is_first = not jail.served
        kind = (
            pool.profile.name, is_first, info.number, method, layout, task,
            self._resources, [*self._trusted.refused],
        )  # fmt: skip
        if self._told_kind != kind:
            # Reads the runtime_env, which also says what comes first.
            self._variables()
            first = self._first() if is_first else {}
            self._told_last = self._told(
                pool.profile, info, layout, method, task, first
            )
            self._told_kind = kind
        before, jail.told = jail.told, self._told_last
        return b"" if jail.told == before else jail.told

    def _visible(self) -> list[str]:
        return self._user_directories() if self._trusted.refused else []

    def _variables(self) -> dict[str, str]:
        """The runtime environment's own variables: a task's, so they pass."""
        text = self._worker.runtime_env
        if text != self._runtime_env[0]:
            variables = json.loads(text).get("env_vars") or {}
            chosen = policy.jail_variables(self._gate.policy, variables)
            self._setup = seams.setup_hook_of(variables)
            self._runtime_env = (text, chosen)
        return self._runtime_env[1]

    def _first(self) -> dict[str, Any]:
        """What a jail does before its first call: the job's own set-up."""
        modules = os.environ.get("__RAYSANDBOX_PRELOAD", "").split(",")
        return {"setup": self._setup, "modules": [*filter(None, modules)]}

    def _working_directory(self) -> str | None:
        directory = os.getcwd()
        return directory if self._is_resource(directory) else None

    def _call(
        self,
        pool: Pool,
        jail: Jail,
        task: str,
        operation: int,
        info: seams.FunctionBytes,
        layout: list[str | None],
        parts: list[Any],
        method: str = "",
    ) -> seams.SealedResult:
        worker = self._worker
        shown = task if operation == Op.TASK else str(worker.current_task_name)
        told = self._tell(pool, jail, info, layout, method, shown)
        if operation != Op.METHOD:
            parts.insert(0, b"" if info.number in jail.functions else info.code)
        attempt = self._core.get_current_task_attempt_number()
        self._task_id = worker.current_task_id.binary()
        head = runner.CALL_HEAD.pack(operation, attempt, self._task_id)
        jail.serves(task)
        self._show(pool, jail, task)
        try:
            # The next jail is forked while this one works.
            ahead = None if self._keeps(jail) else pool.prepare
            frame = pool.call(jail, task, [told, head, *parts], then=ahead)
        except BaseException as error:
            # Cancelled, or the jail is gone: in both cases nobody answers.
            self._abandon(pool, jail, error)
            raise
        if frame.kind == wire.ERROR:
            self._raise(pool, jail, task, frame)
        if operation != Op.METHOD:
            jail.functions.add(info.number)
        return self._result(pool, jail, task, frame)

    def _show(self, pool: Pool, jail: Jail, task: str) -> None:
        """Write down for whoever looks that this jail has a call now."""
        if jail.place is None:
            if self._board is None:
                return
            jail.place = self._board.take()
            if jail.place is None:
                return
            jail.first_call = time.time()
            jail.place.write(
                running=True,
                calls=jail.served,
                denials=jail.denied_count,
                task=self._task_id,
                name=task,
                **self._about(pool, jail),
            )
            return
        jail.place.call(jail.served, jail.denied_count, self._task_id, task)

    def _about(self, pool: Pool, jail: Jail) -> dict[str, Any]:
        """Return what stays the same in a jail's record."""
        group, actor = jail.slot.group, self._worker.actor_id
        before = group.before if group is not None else cgroup.Usage()
        return {
            "started": jail.first_call,
            "job": self._worker.current_job_id.binary(),
            "actor": b"" if actor.is_nil() else actor.binary(),
            "profile": pool.profile.name,
            "group": group.leaf if group is not None else "",
            "before": (
                before.cpu_time_s or 0.0,
                before.oom_kills or 0,
                before.pids_denied or 0,
            ),
        }

    def _keeps(self, jail: Jail) -> bool:
        """Whether this jail outlives its call."""
        return (
            self._pending is not None
            and self._pending[1] is jail
            and (self._pending[2])
        )

    def _abandon(self, pool: Pool, jail: Jail, error: BaseException) -> None:
        self._pending = None
        if not jail.outcome:
            jail.outcome = type(error).__name__
        if self._actor is not None and self._actor[1] is jail:
            self._actor_end = f"{type(error).__name__}: {error}"
        if self._job_jail is not None and self._job_jail[2] is jail:
            self._job_jail = None
        pool.end(jail)

    def _result(
        self, pool: Pool, jail: Jail, task: str, frame: wire.Frame
    ) -> seams.SealedResult:
        (value,), sizes = self._open(pool, jail, task, frame, most=1)
        self._count_results(pool, jail, task, sizes)
        jail.outcome = jail.outcome or "ok"

        return seams.SealedResult(
            value, functools.partial(self._split, pool, jail, task)
        )

    def _split(self, pool: Pool, jail: Jail, task: str) -> list[Any]:
        """Have the jail take its last answer apart."""
        answer = pool.call(jail, task, [b"", _SPLIT])
        if answer.kind == wire.ERROR:
            self._raise(pool, jail, task, answer)
        values, sizes = self._open(pool, jail, task, answer, most=1 << 16)
        self._count_results(pool, jail, task, sizes)
        return [seams.SealedResult(each, _no_split) for each in values]

    def _open(
        self, pool: Pool, jail: Jail, task: str, frame: wire.Frame, *, most: int
    ) -> tuple[list[Any], list[int]]:
        """Turn a RESULT frame into what Ray serializes, by the profile's mode.

        Returns:
            The values, and how many bytes each of them has.
        """
        profile = pool.profile
        try:
            return _values(frame, profile, most)
        except (wire.WireError, datacodec.DataDecodeError) as error:
            broken = JailProtocolError(
                task=task,
                profile=profile.name,
                seen=str(error),
                remedy="the task's code wrote to the jail's own socket; it was ended",
            )
            self._abandon(pool, jail, broken)
            raise broken from None

    def _raise(self, pool: Pool, jail: Jail, task: str, frame: wire.Frame) -> NoReturn:
        """Raise what an ERROR frame says."""
        profile, parts = pool.profile, [bytes(part) for part in frame.parts]
        if len(parts) != _ERROR_PARTS or len(parts[0]) != runner.ERROR_HEAD.size:
            broken = JailProtocolError(
                task=task, profile=profile.name, seen="an error of an unknown form"
            )
            self._abandon(pool, jail, broken)
            raise broken
        kind, number = runner.ERROR_HEAD.unpack(parts[0])
        name, message, trace, blob, path = (
            parts[1].decode("utf-8", "replace"),
            parts[2].decode("utf-8", "replace"),
            parts[3].decode("utf-8", "replace"),
            parts[4],
            parts[5].decode("utf-8", "replace"),
        )
        jail.outcome = f"exception: {name}"
        if kind == runner.ERROR_QUOTA:
            self._figures.quota_refused(profile.name, "object_store.max_result")
            raise TaskQuotaExceeded(
                task=task,
                profile=profile.name,
                limit="object_store.max_result",
                allowed=f"{profile.object_store.max_result_bytes} bytes",
                seen=f"a result of {message} bytes",
                remedy="return less, or ask for a profile with a larger limit",
            )
        if kind == runner.ERROR_UNSUPPORTED:
            raise self._unsupported(profile, task, message)
        if kind == runner.ERROR_RESULT:
            raise TaskUnsupported(
                task=task,
                profile=profile.name,
                limit='results.mode = "data"',
                seen=message,
                remedy="return plain data (numbers, text, containers, numpy, Arrow, "
                'pandas), or ask for a profile with results.mode = "pickle"',
            )
        if name == "builtins.SystemExit":
            raise TaskKilled(
                task=task,
                profile=profile.name,
                seen=f"sys.exit({message})",
                remedy="return instead: a task that exits has no result",
            )
        hint = self._hint(pool, jail, name, number, message, path)
        if hint:
            trace = f"{trace.rstrip()}\n{hint}\n"
            message = f"{message}\n{hint}"
        raise SealedError(
            name,
            message,
            trace,
            blob if profile.results.mode == "pickle" else b"",
            hint,
        )

    def _hint(
        self, pool: Pool, jail: Jail, name: str, number: int, message: str, path: str
    ) -> str:
        """Say which rule of the profile stood in the way, if one did."""
        return hints.explain(
            pool.profile,
            name=name,
            number=number,
            message=message,
            path=path,
            denials=jail.denials,
            usage=jail.current_usage(),
            hidden=[p for p in self._trusted.refused if p not in self._visible()],
        )

    def _unsupported(
        self, profile: profiles.Profile, task: str, what: str, remedy: str = _ORDINARY
    ) -> TaskUnsupported:
        return TaskUnsupported(
            task=task,
            profile=profile.name,
            limit=f'boundary = "{profile.boundary}"',
            seen=what,
            remedy=remedy,
        )


def _boundaries(node: policy.Node | None) -> dict[str, bool]:
    """Say of each profile whether it is a worker's own boundary."""
    if node is not None:
        return {name: it.boundary == "worker" for name, it in node.profiles.items()}
    found = {}
    for name in profiles.names():
        try:
            found[name] = profiles.load(name).boundary == "worker"
        except ProfileError:
            continue  # whoever asks for it is told
    return found


def _least(*limits: int | None) -> int | None:
    """Return the smallest; None is no limit."""
    return min((limit for limit in limits if limit is not None), default=None)


def _no_split() -> NoReturn:
    raise TypeError("one of several results is not taken apart again")


_encode_json = json.JSONEncoder(separators=(",", ":")).encode


def _json(meta: Mapping[str, Any]) -> bytes:
    return _encode_json(meta).encode()


def _sealed_parts(value: Any) -> tuple[bytes, Any]:
    """Return metadata and data of an argument as it came."""
    if isinstance(value, seams.SealedArgument):
        return value.metadata, value.data if value.data is not None else b""
    if type(value) is bytes:
        return b"RAW", value
    if type(value) is str:
        return runner.PLAIN_TEXT, value.encode("utf-8", "surrogatepass")
    raise TaskUnsupported(
        task="?", profile="?", seen=f"an argument of type {type(value).__name__}"
    )


def _values(
    frame: wire.Frame, profile: profiles.Profile, most: int
) -> tuple[list[Callable[[Any, Callable[..., Any]], Any]], list[int]]:
    """Check a RESULT frame; return what serializes each value, and its bytes."""
    parts = frame.parts
    if len(parts) == 1:
        parts = [parts[0][:_HEAD_BYTES], parts[0][_HEAD_BYTES:]]
    if not parts or len(parts[0]) % runner.ENTRY.size:
        raise wire.WireError("a result without its table")
    entries = list(runner.ENTRY.iter_unpack(parts[0]))
    if not entries or len(entries) > most:
        raise wire.WireError(f"{len(entries)} values where 1 to {most} belong")
    if sum(entry[3] for entry in entries) != len(parts) - 1:
        raise wire.WireError("a table that does not fit its parts")
    made, sizes, position, total = [], [], 1, 0
    for mode, zero, zeros, count in entries:
        pieces = parts[position : position + count]
        position += count
        sizes.append(sum([part.nbytes for part in pieces]))
        total += sizes[-1]
        if zero or zeros or not pieces:
            raise wire.WireError("a table of an unknown form")
        if total > profile.object_store.max_put_bytes:
            raise wire.WireError(
                f"results of {total} bytes where object_store.max_put allows "
                f"{profile.object_store.max_put_bytes}"
            )
        made.append(_value(mode, pieces, profile))
    return made, sizes


def _value(
    mode: int, parts: list[memoryview], profile: profiles.Profile
) -> Callable[[Any, Callable[..., Any]], Any]:
    if profile.results.mode == "data":
        if mode != runner.MODE_DATA:
            raise wire.WireError("a result that is not plain data")
        limits = datacodec.DecodeLimits.for_result(
            profile.object_store.max_result_bytes
        )
        value = datacodec.decode(parts, limits)
        return lambda context, serialize: serialize(context, value)
    if mode == runner.MODE_NONE and len(parts) == 1 and not parts[0].nbytes:
        return lambda _context, _serialize: seams.serialize_none()
    if mode == runner.MODE_RAW and len(parts) == 1:
        return lambda _context, _serialize: seams.serialize_raw(bytes(parts[0]))
    if mode == runner.MODE_PICKLE:
        inband, *buffers = parts
        return lambda _context, _serialize: seams.serialize_python(
            bytes(inband), buffers
        )
    raise wire.WireError(f"a result of unknown mode {mode}")


def _as_worker_traceback(text: str) -> str:
    """Prepare a text for Ray, which drops lines 2 and 3 of a task's traceback.

    Those are the frame of Ray's own loop in a stock worker.
    """
    first, _, rest = text.partition("\n")
    return f"{first}\n\n\n{rest}"
