"""Zygotes and jails of one worker: start, wait, end, and say what happened.

Knows nothing of Ray. A call goes to a jail that is waiting already; while it
runs, the next one is forked. What a jail sends is checked by ``wire``; how it
ended becomes one of the errors of :mod:`raysandbox.errors`.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raysandbox import launch, plan, wire
from raysandbox.errors import (
    InternalError,
    JailProtocolError,
    SetupError,
    TaskDenied,
    TaskKilled,
    TaskOutOfMemory,
    TaskQuotaExceeded,
    TaskTimedOut,
)
from raysandbox.jail.zygote import receive_message, send_message
from raysandbox.kernel import cgroup, seccomp_notify
from raysandbox.observe import state
from raysandbox.probe import probe
from raysandbox.profile import Profile
from raysandbox.run import cgroup_limits, limit_protections
from raysandbox.worker.buffers import Buffers
from raysandbox.worker.output import Output, Pump

__all__ = ["Environment", "Jail", "Pool", "groups_of_process"]

_START_S = 60.0
_READY_S = 30.0
_SLICE_S = 0.1
_TIMEVAL = struct.Struct("@ll")
_CHECK_S = 0.25
# Of tasks, in the event of a jail's end: one may serve for days.
_MOST_NAMES = 64
# Between the end of a dying jail's socket and the word of its end: the kernel takes
# its mounts down in between, which on a busy host takes its time.
_DYING_S = 3.0
# One jail works, one is ready, one is on its way out.
_SLOTS = 3
# What every call needs; msgpack comes with Ray.
_ALWAYS_PRELOADED = ("msgpack", "raysandbox.datacodec")
# As a file's name it would come with that file's directory on the path.
_ZYGOTE = (
    "import sys; sys.path[:0] = sys.argv[2:]; "
    "from raysandbox.jail.zygote import main; main(int(sys.argv[1]))"
)
_POOLS = itertools.count(1)
_MAX_REPLY_PARTS = 1 << 16
# Structure, texts and the like beside the result itself.
_REPLY_OVERHEAD_BYTES = 2 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What of the worker a jail must see again.

    Attributes:
        python_path: Module search path of the trusted part.
        ray_directory: Where Ray's package is.
        system: What ``@system`` stands for; see `plan.Context`.
        working_dirs: Directories of the runtime environment.
        variables: Environment to choose from.
        extra_variables: Environment that passes regardless (runtime_env).
        preload: Whether ``profile.preload`` may be imported in the zygote:
            not where the modules are the user's own.
    """

    python_path: Sequence[str]
    ray_directory: str
    system: Sequence[str] = ()
    working_dirs: Sequence[str] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    extra_variables: Mapping[str, str] = field(default_factory=dict)
    preload: bool = True


@dataclass(slots=True)
class Slot:
    """A place for one jail at a time: its host user, its pipes, its group."""

    number: int
    output: Output | None = None
    group: cgroup.Cgroup | None = None


@dataclass(slots=True)
class Jail:
    """One jail, from the request to its last word."""

    jail_id: int
    slot: Slot
    call: socket.socket
    ready: bool = False
    notify: seccomp_notify.Listener | None = None
    status: int | None = None
    calls: int = 0
    timed_out: str = ""
    # When its present call was sent, and when it was last looked at more closely.
    called: float = field(default_factory=time.monotonic)
    checked: float = 0.0
    # Its record for whoever looks, and who asked for its end.
    place: state.Place | None = None
    ended_by: str = ""
    # How many tasks it was given, and the first different names among them.
    served: int = 0
    tasks: list[str] = field(default_factory=list)
    # The functions it has; what it was told last.
    functions: set[int] = field(default_factory=set)
    told: bytes = b""
    outcome: str = ""
    # Its end is being looked into: the event waits for the finding.
    inquest: bool = False
    usage: cgroup.Usage = field(default_factory=cgroup.Usage)
    output_bytes: int = 0
    first_call: float = 0.0

    def serves(self, task: str) -> None:
        """Note that it is given a task of this name."""
        self.served += 1
        if len(self.tasks) < _MOST_NAMES and task not in self.tasks:
            self.tasks.append(task)

    @property
    def running_s(self) -> float:
        """For how long its present call has been running."""
        return time.monotonic() - self.called

    @property
    def over_output(self) -> bool:
        """Whether it has printed more than it may."""
        return self.slot.output is not None and self.slot.output.over_limit

    def current_usage(self) -> cgroup.Usage:
        """Read what it has used so far."""
        return self.slot.group.usage() if self.slot.group else cgroup.Usage()

    @property
    def denials(self) -> list[str]:
        """System calls that were denied so far, described."""
        return list(self.notify.denials) if self.notify is not None else []

    @property
    def denied_count(self) -> int:
        """How many system calls were denied so far."""
        return self.notify.count if self.notify is not None else 0

    def is_asked_to_end(self) -> bool:
        """Tell the record what changed; see whether somebody wants us gone."""
        if self.place is None:
            return False
        self.place.denied(self.denied_count)
        self.ended_by = self.ended_by or self.place.asked_to_end() or ""
        return bool(self.ended_by)


class Pool:
    """The zygote of one profile in this worker, and its jails."""

    def __init__(
        self,
        profile: Profile,
        environment: Environment,
        pump: Pump,
        on_end: Callable[[Jail, Pool, cgroup.Usage], None],
        buffers: Buffers,
    ) -> None:
        self.profile, self.environment = profile, environment
        self.protections: tuple[plan.Protection, ...] = ()
        #: Name and state of each of them.
        self.walls: tuple[tuple[str, str], ...] = ()
        #: The same in words, for events.
        self.shown: dict[str, str] = {}
        self._pump, self._on_end = pump, on_end
        self._buffers = buffers
        self._launched: launch.Launched | None = None
        self._socket: socket.socket | None = None
        self._poll = select.poll()
        self._groups: cgroup.Cgroups | None = None
        self._jails: dict[int, Jail] = {}
        self._spare: Jail | None = None
        self._slots: list[Slot] = []
        self._free_slots: list[Slot] = []
        self._group_number = 0
        # Groups of several pools of this process, told apart by their names.
        self._tag = f"p{next(_POOLS)}-"
        self._next_id = 0
        self._mapped = 1
        self._shares_files = False
        # Of a reply.
        self._most_bytes = profile.object_store.max_result_bytes + _REPLY_OVERHEAD_BYTES

    # -- the zygote ---------------------------------------------------------

    def start(self) -> None:
        """Start the zygote; a failure leaves nothing behind."""
        host, profile = probe(), self.profile
        self._groups = self._discover_groups()
        lease = launch.lease_ids()
        try:
            self._mapped = lease.ids.count
            python = plan.python_paths(self.environment.python_path)
            compiled = plan.compile(
                profile,
                host,
                plan.Context(
                    ids=lease.ids,
                    zygote=True,
                    notify=True,
                    working_dirs=self.environment.working_dirs,
                    python=python,
                    system=self.environment.system,
                    environment=self.environment.variables,
                    extra_environment=self.environment.extra_variables,
                    cgroup_clean=self._owned(),
                ),
            )
            self.protections = (
                *limit_protections(self._groups.support(cgroup_limits(profile))),
                *compiled.protections,
            )
            self._shares_files = self._mapped > 1 or _is_alone(profile)
            self.walls = tuple((w.name, w.state.value) for w in self.protections)
            self.shown = plan.described(self.protections)
            ours, theirs = _pair()
            with theirs, contextlib.ExitStack() as undo:
                undo.enter_context(ours)
                self._launched = launch.start(
                    compiled,
                    [
                        # Not a virtual environment's, which may be the job's own.
                        os.path.realpath(sys.executable),
                        "-I",
                        "-S",
                        "-c",
                        _ZYGOTE,
                        str(theirs.fileno()),
                        _package_parent(),
                    ],
                    lease=lease,
                    zygote=True,
                    keep_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                )
                undo.pop_all()
        finally:
            lease.close()
        self._socket = ours
        self._poll = select.poll()
        self._poll.register(ours, select.POLLIN)
        self._slots = [Slot(number) for number in range(1, 1 + _SLOTS)]
        self._free_slots = list(self._slots)
        try:
            self._configure(compiled.encode())
        except OSError as error:
            raise self._lost() from error

    def _discover_groups(self) -> cgroup.Cgroups:
        groups, limits = groups_of_process(), cgroup_limits(self.profile)
        if self.profile.limits.required:
            groups.require(limits, profile=self.profile.name)
        return groups

    def _configure(self, encoded: bytes) -> None:
        plan_fd = os.memfd_create("plan", os.MFD_CLOEXEC)
        try:
            os.write(plan_fd, encoded)
            send_message(
                self._control,
                {
                    "op": "config",
                    "path": [_package_parent(), *self.environment.python_path],
                    "preload": [*_ALWAYS_PRELOADED, *self._preload()],
                    "ray": self.environment.ray_directory,
                },
                [plan_fd],
            )
        finally:
            os.close(plan_fd)
        message, _ = self._receive(_START_S)
        if message.get("op") != "hello":
            raise SetupError(step="zygote", detail=f"unexpected answer {message!r}")

    def _preload(self) -> Sequence[str]:
        return self.profile.preload if self.environment.preload else ()

    def _receive(self, timeout_s: float) -> tuple[dict[str, Any], list[int]]:
        if not launch.is_readable(self._control.fileno(), timeout_s):
            self.stop()
            raise SetupError(step="zygote", errno=errno.ETIMEDOUT)
        try:
            message, fds = receive_message(self._control)
        except ConnectionResetError:
            message, fds = None, []
        if message is None:
            raise self._lost()
        return message, fds

    def _lost(self) -> SetupError:
        """Say why the zygote is gone, and be ready to start another."""
        launched, self._launched = self._launched, None
        detail = "the zygote died"
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._spare = None
        for jail in list(self._jails.values()):
            jail.status = signal.SIGKILL
            self._forget(jail, "lost")
            self._buffers.is_lost(jail)
        try:
            if launched is not None:
                launched.kill()
                outcome = launched.wait(_READY_S)
                detail = f"the zygote ended with status {outcome.exit_code}"
        except SetupError as error:
            return error  # the launcher says which step it was
        except subprocess.TimeoutExpired:
            detail = "the zygote does not end"
        finally:
            self._strip_all()
        return SetupError(step="zygote", detail=detail)

    def stop(self) -> None:
        """End the zygote and every jail of it."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._launched is not None:
            self._launched.kill()
            try:
                self._launched.wait(_READY_S)
            finally:
                self._launched = None
                self._spare = None
                for jail in list(self._jails.values()):
                    jail.status = signal.SIGKILL
                    self._forget(jail, "stopped")
                    self._buffers.is_lost(jail)
                self._strip_all()

    def _strip_all(self) -> None:
        for slot in self._slots:
            self._strip(slot)
        self._slots, self._free_slots = [], []

    @property
    def _control(self) -> socket.socket:
        if self._socket is None:
            raise InternalError(what="a jail is asked for before its zygote")
        return self._socket

    def look(self) -> None:
        """Take in what the zygote has said meanwhile; between calls only."""
        for jail in list(self._jails.values()):
            if jail.place is not None and jail.is_asked_to_end():
                jail.outcome = "TaskKilled"
                self.kill(jail)
        try:
            while self._socket is not None and self._poll.poll(0):
                self._handle(*self._receive(0))
        except SetupError:
            return  # the next take() says why

    def rest(self) -> None:
        """Say of the jails that no call is running; between calls only."""
        for jail in self._jails.values():
            if jail.place is not None:
                jail.place.idle(jail.denied_count)

    # -- jails --------------------------------------------------------------

    def prepare(self) -> None:
        """Ask for the next jail, unless one is on its way."""
        if self._spare is None:
            self._spare = self._spawn()

    def take(self) -> Jail:
        """Return a jail that is ready; the caller sends it its first call.

        Raises:
            SetupError: It could not be made; nothing was run.
        """
        # The one that waits, or its zygote, may have died meanwhile, or be about to:
        # nothing of a task was in it, so another one takes its place.
        self.look()
        was_there = self._socket is not None
        try:
            return self._take()
        except SetupError:
            if not was_there or self._socket is not None:
                raise
        return self._take()

    def _take(self) -> Jail:
        if self._socket is None:
            self.start()
        jail, self._spare = self._spare or self._spawn(), None
        deadline = time.monotonic() + _READY_S
        while not jail.ready:
            self._handle(*self._receive(max(0.0, deadline - time.monotonic())))
        return jail

    def _spawn(self) -> Jail:
        while not self._free_slots:
            self._handle(*self._receive(_READY_S))
        slot = self._free_slots[0]
        self._furnish(slot)
        ours, theirs = _pair()
        self._free_slots.pop(0)  # from here on it is the jail's
        self._next_id += 1
        jail = Jail(self._next_id, slot, ours)
        self._jails[jail.jail_id] = jail
        user = slot.number if self._mapped > 1 else 0
        request = {"op": "spawn", "id": jail.jail_id, "slot": slot.number, "user": user}
        with theirs:
            self._send(request, [theirs.fileno()])
        return jail

    def _send(self, message: dict[str, Any], fds: list[int]) -> None:
        """Send a request to the zygote.

        Raises:
            SetupError: It is gone; the next call starts another one.
        """
        try:
            send_message(self._control, message, fds)
        except OSError as error:
            raise self._lost() from error

    def _furnish(self, slot: Slot) -> None:
        """Give a slot its pipes, once, and a group that counts from zero."""
        if slot.output is not None and (slot.group is None or slot.group.reset()):
            return
        if slot.output is None:
            slot.output = self._new_output()
        if slot.group is not None:
            slot.group.remove()
            slot.group = None
        fds = []
        if self._groups is not None:
            self._group_number += 1
            slot.group = self._groups.create(
                f"{self._tag}{self._group_number}",
                cgroup_limits(self.profile),
                required=self.profile.limits.required,
            )
            fds = slot.group.procs_fds()
        message = {"op": "slot", "slot": slot.number, "dir": False}
        try:
            self._send(message, [*slot.output.write_fds, *fds])
        finally:
            for fd in fds:
                os.close(fd)

    def _new_output(self) -> Output:
        try:
            # A jail's profile always has one.
            limit = self.profile.limits.output_bytes or 0
            output = Output(limit, (sys.stdout, sys.stderr))
            try:
                for fd in output.read_fds:
                    self._pump.add(fd, functools.partial(output.drain, fd))
            except BaseException:
                for fd in output.read_fds:
                    self._pump.remove(fd)
                output.close()
                raise
        except (OSError, RuntimeError) as error:
            # RuntimeError: no process was left for the pump's thread.
            number = getattr(error, "errno", None) or errno.EAGAIN
            raise SetupError(step="output", errno=number, detail=str(error)) from error
        return output

    def _strip(self, slot: Slot) -> None:
        """Take a slot's pipes and group away."""
        if slot.output is not None:
            for fd in slot.output.read_fds:
                self._pump.remove(fd)
            slot.output.close()
            slot.output = None
        if slot.group is not None:
            slot.group.kill()
            slot.group.remove()
            slot.group = None

    def _owned(self) -> list[tuple[str, str]]:
        """Groups of this pool, for the monitor to remove when we can't."""
        if self._groups is None:
            return []
        return [(path, prefix + self._tag) for path, prefix in self._groups.owned]

    def _handle(self, message: dict[str, Any], fds: list[int]) -> None:
        """Take in one message of the zygote."""
        jail = self._jails.get(message["id"])
        if jail is None:
            for fd in fds:
                os.close(fd)
            return
        if message["op"] == "ready":
            jail.ready = True
            if fds:
                jail.notify = seccomp_notify.Listener(
                    fds[0], self.profile, lambda: self.kill(jail)
                )
                self._pump.add(fds[0], jail.notify.handle)
        elif message["op"] == "failed":
            self._forget(jail, "set-up failed")
            if self._spare is jail:
                self._spare = None
            raise SetupError(
                step=message["step"],
                errno=message["errno"],
                detail=message.get("detail", ""),
            )
        elif message["op"] == "exit":
            jail.status = message["status"]
            if self._spare is jail:
                self._spare = None
            self._forget(jail, "")
            # Its pid namespace is gone, and its pipes have been read.
            self._buffers.is_gone(jail)

    def _forget(self, jail: Jail, outcome: str) -> None:
        """Free all that a jail that has ended held."""
        self._jails.pop(jail.jail_id, None)
        self._free_slots.append(jail.slot)
        jail.call.close()
        if jail.notify is not None:
            self._pump.remove(jail.notify.fd)
            jail.notify.close()
        jail.usage = jail.current_usage()
        if jail.slot.output is not None:
            jail.output_bytes = jail.slot.output.finish()
        if jail.calls and not jail.inquest:
            jail.outcome = jail.outcome or outcome or "ended"
            self._on_end(jail, self, jail.usage)

    def kill(self, jail: Jail) -> None:
        """Ask the zygote to end a jail; ``end`` waits for it."""
        if self._socket is not None and jail.status is None:
            # A zygote that is gone took the jail along; its end is seen elsewhere.
            with contextlib.suppress(OSError):
                send_message(self._control, {"op": "kill", "id": jail.jail_id})

    def end(self, jail: Jail, *, wait: bool = False) -> None:
        """End a jail; its outcome is handled when the zygote says it is gone."""
        self.kill(jail)
        while wait and jail.status is None and self._socket is not None:
            self._handle(*self._receive(_READY_S))

    # -- calls --------------------------------------------------------------

    def call(
        self,
        jail: Jail,
        task: str,
        parts: Sequence[Any],
        then: Callable[[], None] | None = None,
    ) -> wire.Frame:
        """Send a call and wait for its one reply.

        Args:
            jail: Where to.
            task: Its name, for errors.
            parts: Of the frame.
            then: Called once it is on its way: what can be done meanwhile.

        Raises:
            TaskError: What became of it, if there is no reply.
        """
        jail.calls += 1
        number = jail.calls & 0xFFFFFFFF
        try:
            lend = functools.partial(
                self._buffers.lend,
                jail,
                is_new=jail.calls == 1,
                is_shared=self._shares_files,
            )
            wire.send(jail.call, wire.CALL, number, list(parts), lend)
        except OSError as error:
            raise self._post_mortem(jail, task, f"before the call: {error}") from None
        if then is not None:
            then()
        return self.wait(jail, task, number)

    def call_again(self, jail: Jail, task: str, head: bytes) -> wire.Frame | None:
        """Have a jail do what it did last; see :meth:`call`.

        Returns:
            Its reply; None if it was gone before.
        """
        jail.calls += 1
        number = jail.calls & 0xFFFFFFFF
        try:
            wire.send_whole(jail.call, wire.CALL, number, head)
        except OSError:
            self._dies(jail)
            return None
        return self.wait(jail, task, number)

    def wait(self, jail: Jail, task: str, number: int) -> wire.Frame:
        """Wait for the reply to call ``number``; see :meth:`call`."""
        jail.called = jail.checked = time.monotonic()
        while True:
            try:
                frame = wire.receive(
                    jail.call,
                    limit_bytes=self._most_bytes,
                    max_parts=_MAX_REPLY_PARTS,
                )
                break
            except BlockingIOError:
                self._look_after(jail, task)  # nothing came for a while: see `_pair`
            except (wire.WireError, OSError, ValueError) as error:
                raise self._protocol_error(jail, task, str(error)) from None
        if frame is None:
            if not self._dies(jail):
                what = "the end of its replies, and it lives on"
                raise self._protocol_error(jail, task, what)
            raise self._post_mortem(jail, task, "")
        if frame.call != number or frame.kind == wire.CALL:
            raise self._protocol_error(jail, task, "a reply to another call")
        # What it printed last may still be in the pipes.
        output = jail.slot.output
        if output is not None:
            output.drain_all()
            if output.over_limit:
                raise self._post_mortem(jail, task, "")
        return frame

    def _look_after(self, jail: Jail, task: str) -> None:
        """Raise if a jail that has not answered yet is over a limit, or gone."""
        while self._poll.poll(0):
            self._handle(*self._receive(0))
        if jail.status is not None:
            raise self._post_mortem(jail, task, "")
        limit_s, now = self.profile.limits.wall_time_s, time.monotonic()
        if limit_s is not None and now >= jail.called + limit_s:
            jail.timed_out = "limits.wall_time"
            raise self._post_mortem(jail, task, "")
        if jail.over_output:
            raise self._post_mortem(jail, task, "")
        if now >= jail.checked + _CHECK_S:
            jail.checked = now
            self._buffers.trim()
            self._check_usage(jail, task)
            if jail.is_asked_to_end():
                raise self._post_mortem(jail, task, "")

    def _dies(self, jail: Jail) -> bool:
        """Whether a jail that closed its socket has ended, or is about to."""
        until = time.monotonic() + _DYING_S
        while jail.status is None:
            left = until - time.monotonic()
            if left <= 0 or not launch.is_readable(self._control.fileno(), left):
                return False
            self._handle(*self._receive(0))
        return True

    def _check_usage(self, jail: Jail, task: str) -> None:
        """End a jail that is over what only its whole group shows."""
        limit, usage = self.profile.limits.cpu_time_s, jail.current_usage()
        if limit is not None and (usage.cpu_time_s or 0) > limit:
            jail.timed_out = "limits.cpu_time"
            raise self._post_mortem(jail, task, "")
        # Version 1 kills one process; the task is what ran out of memory.
        if usage.oom_kills:
            raise self._post_mortem(jail, task, "")

    def _protocol_error(self, jail: Jail, task: str, what: str) -> JailProtocolError:
        jail.outcome = "JailProtocolError"
        self.end(jail, wait=True)
        return JailProtocolError(
            task=task,
            profile=self.profile.name,
            seen=what,
            remedy="the task's code wrote to the jail's own socket; it was ended",
        )

    def _post_mortem(self, jail: Jail, task: str, when: str) -> Exception:
        """End a jail that owes an answer, and say what became of it."""
        jail.inquest = True
        error = self._inquest(jail, task, when)
        jail.outcome = type(error).__name__
        self._on_end(jail, self, jail.usage)
        return error

    def _inquest(self, jail: Jail, task: str, when: str) -> Exception:
        limits = self.profile.limits
        # Before it goes: a jail that we kill now was not killed by this.
        usage, over_output = jail.current_usage(), jail.over_output
        self.end(jail, wait=True)
        common = {"task": task, "profile": self.profile.name, "hint": self.hint(jail)}
        status = jail.status if jail.status is not None else 0
        if jail.ended_by:
            return TaskKilled(
                seen=f"ended by the operator ({jail.ended_by})",
                remedy="ask whoever runs this node",
                **common,
            )
        if jail.timed_out:
            wall = jail.timed_out == "limits.wall_time"
            allowed = limits.wall_time_s if wall else limits.cpu_time_s
            seen = jail.running_s if wall else usage.cpu_time_s
            return TaskTimedOut(
                limit=jail.timed_out,
                allowed=f"{allowed:g} s",
                seen=_seconds(seen) + ("" if wall else " of CPU"),
                remedy="make it faster, or ask for a profile with a larger limit",
                **common,
            )
        if over_output:
            return TaskQuotaExceeded(
                limit="limits.output",
                allowed=f"{limits.output_bytes} bytes",
                seen=f"{jail.output_bytes} bytes",
                remedy="print less, or return the text as a result",
                **common,
            )
        if usage.oom_kills:
            return TaskOutOfMemory(
                limit="limits.memory",
                allowed=_mebibytes(limits.memory_bytes),
                seen=f"a peak of {_mebibytes(usage.memory_peak_bytes)}",
                remedy="use less memory, or ask for a profile with a larger limit",
                **common,
            )
        killer = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        lethal = self.profile.syscalls.action == "kill"
        if killer == signal.SIGSYS or (lethal and jail.notify and jail.notify.killed):
            return TaskDenied(
                limit="syscalls.action",
                allowed="no call outside syscalls.groups",
                seen=(jail.notify and jail.notify.killed) or "SIGSYS: a foreign ABI",
                remedy="don't make this call, or ask for a profile that allows it",
                **common,
            )
        cpu = limits.cpu_time_s
        if (
            killer == signal.SIGKILL
            and cpu is not None
            and usage.cpu_time_s is not None
            and usage.cpu_time_s >= cpu
        ):
            return TaskTimedOut(
                limit="limits.cpu_time",
                allowed=f"{cpu:g} s",
                seen=f"{_seconds(usage.cpu_time_s)} of CPU",
                remedy="make it faster, or ask for a profile with a larger limit",
                **common,
            )
        how = (
            f"signal {killer} ({signal.Signals(killer).name})"
            if killer
            else f"exit status {os.waitstatus_to_exitcode(status)}"
        )
        return TaskKilled(
            seen=f"{how} {when}".strip(),
            remedy="look at what it printed last",
            **common,
        )

    def hint(self, jail: Jail) -> str:
        """Return which denied calls were seen, as a sentence, or ``""``."""
        denials = jail.denials
        return f"denied on the way: {'; '.join(denials[:5])}" if denials else ""


def _is_alone(profile: Profile) -> bool:
    """Whether no descriptor can leave a jail of this profile.

    Not by sockets that it makes, nor by datagrams of a connected pair, which reach
    whatever socket is in a directory that it shares with others.
    """
    calls, files = profile.syscalls, profile.filesystem
    if "local_sockets" in calls.groups or calls.oci is not None:
        return False
    if not {"socket", "connect", "bind"}.isdisjoint(calls.allow):
        return False
    return all(path.startswith("@") for path in (*files.read, *files.write))


@functools.cache
def groups_of_process() -> cgroup.Cgroups:
    """Look for the groups of this process once; remove those of dead ones."""
    groups = cgroup.discover()
    groups.sweep()
    return groups


def _pair() -> tuple[socket.socket, socket.socket]:
    """Return the worker's end, which waits for _SLICE_S at most, and the other."""
    try:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # One call waits and reads; a poll before it would be a second.
        limit = _TIMEVAL.pack(0, int(_SLICE_S * 1e6))
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        return ours, theirs
    except OSError as error:
        raise SetupError(step="socketpair", errno=error.errno or 0) from error


def _seconds(duration_s: float | None) -> str:
    return "unknown" if duration_s is None else f"{duration_s:.1f} s"


def _mebibytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / (1 << 20):.0f} MiB"


def _package_parent() -> str:
    return os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
