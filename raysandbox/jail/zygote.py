"""The warm parent: forks jails on request and says when they are gone.

Started by ``raysandbox-launch --zygote`` as pid 1 of its own pid namespace. It
talks to its worker alone, over the control socket, and never reads a byte that
a jail wrote; nothing that came from a user runs or is imported here. When it
dies, the kernel kills every jail with it.

Control messages are JSON, one packet each::

    worker → zygote   {"op": "config", "path": [...], "preload": [...],
                       "ray": DIR}                             + plan (memfd)
                      {"op": "slot", "slot": S, "dir": BOOL}
                           + stdout, stderr[, cgroup directory], tasks files...
                      {"op": "spawn", "id": N, "slot": S, "user": U}
                           + call socket
                      {"op": "kill", "id": N}
    zygote → worker   {"op": "hello"}
                      {"op": "ready", "id": N, "pid": P}      [+ notify fd]
                      {"op": "failed", "id": N, "step": S, "errno": E, ...}
                      {"op": "exit", "id": N, "status": WAIT_STATUS}
"""

from __future__ import annotations

import array
import gc
import json
import os
import pickle
import select
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

from raysandbox import wire
from raysandbox.errors import SetupError
from raysandbox.jail import ray_facade, runner
from raysandbox.native import ForkServer

__all__ = ["MAX_FDS", "main", "receive_message", "send_message", "warm_up"]

# The first message has paths in it; all others are a few hundred bytes.
MAX_CONFIG_BYTES = 128 << 10
MAX_MESSAGE_BYTES = 16 << 10
MAX_FDS = 24
# As a plain number: each operation on the enumeration costs a microsecond.
_CLOEXEC = int(socket.MSG_CMSG_CLOEXEC)
_CONTROL_BYTES = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)
# More than it takes the interpreter to specialize what it runs (3.11 and later).
_REHEARSALS = 20


def send_message(
    sock: socket.socket, message: dict[str, object], fds: list[int] | None = None
) -> None:
    """Send one control message, with descriptors beside it."""
    rights = []
    if fds:
        data = array.array("i", fds)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, data)]
    sock.sendmsg([json.dumps(message).encode()], rights)


def receive_message(
    sock: socket.socket, limit_bytes: int = MAX_MESSAGE_BYTES
) -> tuple[dict[str, Any] | None, list[int]]:
    """Receive one control message; (None, []) when the other side is gone."""
    ints = array.array("i")
    packet, ancillary, _, _ = sock.recvmsg(limit_bytes, _CONTROL_BYTES, _CLOEXEC)
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            ints.frombytes(data[: len(data) - len(data) % ints.itemsize])
    return (json.loads(packet) if packet else None), list(ints)


class _Slot:
    """What jails that run one after the other share: pipes and a group."""

    def __init__(self, fds: list[int], directory: bool) -> None:
        self.fds = fds
        self.stdout, self.stderr, *self.groups = fds
        self.directory = self.groups.pop(0) if directory else -1

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)


class _ForkHooks:
    """Python's fork hooks that the fork of a jail can do without.

    Those of `threading` and `logging` put back what other threads left locked or
    unfinished. The zygote has no other thread, and each page that such code touches
    is copied for each jail. A jail's own forks need them: see `hand_over`. Where an
    import did start a thread, they are left in place.
    """

    def __init__(self) -> None:
        self._register: Callable[..., None] = os.register_at_fork
        self._held: list[dict[str, Any]] = []
        os.register_at_fork = self._hold

    def _hold(self, **hooks: Any) -> None:
        modules = {getattr(hook, "__module__", None) for hook in hooks.values()}
        if modules <= {"threading", "logging"}:
            self._held.append(hooks)
        else:
            self._register(**hooks)

    def close(self) -> None:
        """Hooks of what is imported from here on run in each jail's fork."""
        os.register_at_fork = self._register
        if "threading" in sys.modules and sys.modules["threading"].active_count() > 1:
            self._release()

    def _release(self) -> None:
        held, self._held = self._held, []
        for hooks in held:
            self._register(**hooks)

    def hand_over(self) -> None:
        """In a jail: from here on they run in its forks."""
        self._release()
        if "threading" in sys.modules:
            # The one thing of theirs that a fork without threads changes.
            sys.modules["threading"].main_thread()._set_native_id()


class _Zygote:
    """One worker's, one profile's: the jails that it has forked."""

    def __init__(
        self, control: socket.socket, server: ForkServer, hooks: _ForkHooks
    ) -> None:
        self.control, self.server, self.hooks = control, server, hooks
        # By the descriptor that becomes readable when it ends: pid and number.
        self.jails: dict[int, tuple[int, int]] = {}
        self.slots: dict[int, _Slot] = {}
        self.poll = select.poll()

    def serve(self) -> None:
        """Answer requests until the worker closes the control socket."""
        self.poll.register(self.control, select.POLLIN)
        while True:
            for fd, _ in self.poll.poll():
                if fd in self.jails:
                    self.reap(fd)
                    continue
                message, fds = receive_message(self.control)
                if message is None:
                    return
                if message["op"] == "spawn":
                    self.spawn(message, fds[0])
                elif message["op"] == "slot":
                    known = self.slots.pop(message["slot"], None)
                    if known is not None:
                        known.close()
                    self.slots[message["slot"]] = _Slot(fds, message["dir"])
                elif message["op"] == "kill":
                    self.kill(message["id"])

    def spawn(self, message: dict[str, Any], call: int) -> None:
        """Fork a jail; in the jail, never come back."""
        jail_id, slot = int(message["id"]), self.slots[message["slot"]]
        try:
            pid, handle, notify = self.server.fork(
                int(message["user"]),
                slot.groups,
                call,
                stdout_fd=slot.stdout,
                stderr_fd=slot.stderr,
                cgroup_dir_fd=slot.directory,
            )
        except SetupError as error:
            answer = {"step": error.step, "errno": error.errno}
            answer |= {"detail": error.detail, "id": jail_id, "op": "failed"}
            send_message(self.control, answer)
        else:
            if pid == 0:
                # Closed already by the walls; only Python does not know yet.
                self.control.detach()
                self.hooks.hand_over()
                runner.run(socket.socket(fileno=call))
            self.jails[handle] = pid, jail_id
            self.poll.register(handle, select.POLLIN)
            ready = {"op": "ready", "id": jail_id, "pid": pid}
            send_message(self.control, ready, [notify] if notify >= 0 else None)
            if notify >= 0:
                os.close(notify)
        os.close(call)

    def kill(self, jail_id: object) -> None:
        """End a jail; its pid namespace goes with it."""
        for pid, known in self.jails.values():
            if known == jail_id:
                os.kill(pid, signal.SIGKILL)

    def reap(self, handle: int) -> None:
        """Tell the worker about a jail that has ended."""
        pid, jail_id = self.jails.pop(handle)
        self.poll.unregister(handle)
        os.close(handle)
        _, status = os.waitpid(pid, 0)
        answer = {"op": "exit", "id": jail_id, "status": status}
        send_message(self.control, answer)


def _rehearse() -> None:
    """Run what each jail runs, on a task of our own that does nothing.

    What the interpreter fills in when code runs for the first times (inline caches,
    method caches, modules that codecs look up) is then shared, not made and copied
    in each jail anew.
    """
    told = {
        "module": __name__, "results": "data", "max_result_bytes": 1 << 20,
        "function": 0, "method": "", "layout": [], "context": {}, "first_path": [],
        "env": {}, "cwd": None,
    }  # fmt: skip
    parts = [
        json.dumps(told).encode(),
        runner.CALL_HEAD.pack(runner.Op.TASK, 0, bytes(24)),
        pickle.dumps(_nothing),
    ]
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        for number in range(_REHEARSALS):
            wire.send(ours, wire.CALL, number, parts)
            runner.rehearse(theirs)
            frame = wire.receive(ours, limit_bytes=1 << 20, max_parts=64)
            if frame is None or frame.kind != wire.RESULT:
                raise SetupError(step="rehearsal", detail="a task of our own failed")


def _nothing() -> None:
    """Do nothing."""


def warm_up(path: list[str], preload: list[str], ray: str) -> _ForkHooks:
    """Become what jails are forked from: all that they share is in memory.

    Args:
        path: Module search path.
        preload: Modules to import.
        ray: Directory of Ray's package.
    """
    sys.path[:] = path
    sys.dont_write_bytecode = True
    hooks = _ForkHooks()
    ray_facade.install(ray)
    for name in preload:
        # A module that is not there is the task's business, if it wants it.
        try:
            __import__(name)
        except ImportError:
            continue
    _rehearse()
    hooks.close()
    gc.collect()
    gc.freeze()
    return hooks


def main(control_fd: int) -> None:
    """Configure from the first message, warm up, serve."""
    control = socket.socket(fileno=control_fd)
    message, fds = receive_message(control, MAX_CONFIG_BYTES)
    if message is None:
        return
    size = os.fstat(fds[0]).st_size
    plan = os.pread(fds[0], size, 0)
    os.close(fds[0])
    hooks = warm_up(message["path"], message["preload"], message["ray"])
    # After the imports: it forks once by libc, which is what OpenBLAS ends its
    # threads for. A jail's fork tells libraries nothing.
    server = ForkServer(plan)
    try:
        send_message(control, {"op": "hello"})
        _Zygote(control, server, hooks).serve()
    except (ConnectionError, BrokenPipeError):
        return  # the worker is gone
