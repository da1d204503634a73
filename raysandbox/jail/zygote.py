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
import select
import signal
import socket
import sys
from typing import Any

from raysandbox.errors import SetupError
from raysandbox.jail import ray_facade, runner
from raysandbox.native import ForkServer

__all__ = ["MAX_FDS", "main", "receive_message", "send_message"]

MAX_MESSAGE_BYTES = 128 << 10
MAX_FDS = 24


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
    sock: socket.socket, flags: int = 0
) -> tuple[dict[str, Any] | None, list[int]]:
    """Receive one control message; (None, []) when the other side is gone."""
    ints = array.array("i")
    packet, ancillary, _, _ = sock.recvmsg(
        MAX_MESSAGE_BYTES,
        socket.CMSG_SPACE(MAX_FDS * ints.itemsize),
        flags | socket.MSG_CMSG_CLOEXEC,
    )
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


class _Zygote:
    """One worker's, one profile's: the jails that it has forked, by pid."""

    def __init__(self, control: socket.socket, server: ForkServer) -> None:
        self.control, self.server = control, server
        self.jails: dict[int, int] = {}
        self.slots: dict[int, _Slot] = {}

    def serve(self) -> None:
        """Answer requests until the worker closes the control socket."""
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        poll = select.poll()
        poll.register(self.control, select.POLLIN)
        poll.register(wake_read, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd == wake_read:
                    os.read(wake_read, 4096)
                    self.reap()
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
            pid, notify = self.server.fork(
                int(message["user"]),
                slot.groups,
                [call],
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
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                # Closed already by the walls; only Python does not know yet.
                self.control.detach()
                runner.run(socket.socket(fileno=call))
            self.jails[pid] = jail_id
            ready = {"op": "ready", "id": jail_id, "pid": pid}
            send_message(self.control, ready, [notify] if notify >= 0 else None)
            if notify >= 0:
                os.close(notify)
        os.close(call)

    def kill(self, jail_id: object) -> None:
        """End a jail; its pid namespace goes with it."""
        for pid, known in self.jails.items():
            if known == jail_id:
                os.kill(pid, signal.SIGKILL)

    def reap(self) -> None:
        """Tell the worker about every jail that has ended."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            jail_id = self.jails.pop(pid, None)
            if jail_id is not None:
                answer = {"op": "exit", "id": jail_id, "status": status}
                send_message(self.control, answer)


def main(control_fd: int) -> None:
    """Configure from the first message, warm up, serve."""
    control = socket.socket(fileno=control_fd)
    message, fds = receive_message(control)
    if message is None:
        return
    size = os.fstat(fds[0]).st_size
    plan = os.pread(fds[0], size, 0)
    os.close(fds[0])
    sys.path[:] = message["path"]
    sys.dont_write_bytecode = True
    ray_facade.install(str(message["ray"]))
    for name in message["preload"]:
        # A module that is not there is the task's business, if it wants it.
        try:
            __import__(name)
        except ImportError:
            continue
    server = ForkServer(plan)
    gc.collect()
    gc.freeze()
    try:
        send_message(control, {"op": "hello"})
        _Zygote(control, server).serve()
    except (ConnectionError, BrokenPipeError):
        return  # the worker is gone
