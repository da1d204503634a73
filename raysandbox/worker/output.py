"""Forwards what a jail prints to the worker's own stdout and stderr.

Ray's log monitor routes a worker's lines by magic prefixes that the worker
prints itself (``:job_id:…``); a line of a task that looks like one is forwarded
with a blank in front.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from typing import IO, Any, TextIO, cast

__all__ = ["Lossy", "Output", "Pump", "lose_what_does_not_fit"]

_CHUNK = 64 << 10
_TICK_S = 0.2
_PIPE_BYTES = 64 << 10
_MAGIC = (b":job_id:", b":task_name:", b":actor_name:")


def _is_magic(line: bytes) -> bool:
    """Whether a line is one of Ray's own, or may become one.

    A task can write a prefix in two pieces: what could still become one counts.
    """
    return line.startswith(_MAGIC) or any(magic.startswith(line) for magic in _MAGIC)


class Lossy:
    """A worker's stdout or stderr, which loses what a full disk does not take.

    Ray itself writes markers there around each task, and a worker in which that
    fails ends, with the task's answer in its hands.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write what can be written; always as if all of it was."""
        try:
            self._stream.write(text)
        except OSError:
            return len(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """As :meth:`write`, for each."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Write what waits, or lose it."""
        try:
            self._stream.flush()
        except OSError:
            return

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Output:
    """The stdout and stderr of jails that run one after the other.

    Attributes:
        seen_bytes: What the present one has printed so far.
        limit_bytes: More is thrown away, and :attr:`over_limit` is set.
        write_fds: What a jail gets as descriptors 1 and 2.
    """

    def __init__(self, limit_bytes: int, sinks: tuple[IO[str], IO[str]]) -> None:
        self.limit_bytes, self.seen_bytes = limit_bytes, 0
        self._sinks = sinks
        self._fds: dict[int, int] = {}  # read end → index of its sink
        self.write_fds: list[int] = []
        self._line_start = [True, True]
        self._lock = threading.Lock()
        self._poll = select.poll()
        try:
            for index in range(2):
                read_end, write_end = os.pipe2(os.O_CLOEXEC)
                os.set_blocking(read_end, False)
                self._fds[read_end] = index
                self._poll.register(read_end, select.POLLIN)
                self.write_fds.append(write_end)
        except OSError:
            self.close()
            raise

    @property
    def over_limit(self) -> bool:
        """Whether more came than is allowed."""
        return self.seen_bytes > self.limit_bytes

    @property
    def read_fds(self) -> list[int]:
        """The ends that are still open."""
        return list(self._fds)

    def drain(self, fd: int) -> bool:
        """Forward what is there; False at the end of the stream."""
        with self._lock:
            index = self._fds.get(fd)
            if index is None:
                return False
            for _ in range(16):
                try:
                    chunk = os.read(fd, _CHUNK)
                except BlockingIOError:
                    return True
                if not chunk:
                    return False
                self._forward(index, chunk)
            return True

    def drain_all(self) -> None:
        """Forward what is there on both streams.

        What another thread has taken out is forwarded, and counted, too by the end.
        """
        if self._fds:
            for fd, _ in self._poll.poll(0):
                self.drain(fd)
            self._lock.acquire()
            self._lock.release()

    def _forward(self, index: int, chunk: bytes) -> None:
        room = self.limit_bytes - self.seen_bytes
        self.seen_bytes += len(chunk)
        chunk = chunk[: max(0, room)]
        if not chunk:
            return
        lines = chunk.splitlines(keepends=True)
        for number, line in enumerate(lines):
            if (number or self._line_start[index]) and _is_magic(line):
                lines[number] = b" " + line
        self._line_start[index] = chunk.endswith((b"\n", b"\r"))
        _write(self._sinks[index], b"".join(lines).decode("utf-8", "replace"))

    def finish(self) -> int:
        """Forward the rest of a jail that is gone; return what it printed.

        A line that it left open is ended, so that the next one starts its own, and
        whatever it did to its ends of the pipes is undone.
        """
        self.drain_all()
        with self._lock:
            for fd in self.write_fds:
                _make_as_new(fd)
            for index, sink in enumerate(self._sinks):
                if not self._line_start[index]:
                    self._line_start[index] = True
                    _write(sink, "\n")
            seen, self.seen_bytes = self.seen_bytes, 0
        return seen

    def close(self) -> None:
        """Give up the descriptors."""
        with self._lock:
            for fd in (*self._fds, *self.write_fds):
                os.close(fd)
            for fd in self._fds:
                self._poll.unregister(fd)
            self._fds.clear()
            self.write_fds.clear()


def _make_as_new(fd: int) -> None:
    """Undo what whoever had this end of a pipe could change of it for all."""
    # No O_NONBLOCK, which makes others' writes fail, and no packets (O_DIRECT).
    fcntl.fcntl(fd, fcntl.F_SETFL, 0)
    if fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) != _PIPE_BYTES:
        # Refused where its user has many pipes, and then it works as it is.
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)


def _write(sink: IO[str], text: str) -> None:
    try:
        sink.write(text)
        sink.flush()
    except (OSError, ValueError):
        return  # the worker's own log is gone or full; the task is not to blame


def lose_what_does_not_fit() -> None:
    """Keep a full disk from ending this process; see :class:`Lossy`."""
    sys.stdout = cast(TextIO, Lossy(sys.stdout))
    sys.stderr = cast(TextIO, Lossy(sys.stderr))


def _safely(act: Callable[[], bool | None]) -> bool:
    """Whether it went well: without the pump every later jail would hang."""
    try:
        return bool(act())
    except Exception:  # noqa: BLE001 - whatever it is, others are waiting
        traceback.print_exc()
        return False


class Pump:
    """One thread that waits for all descriptors that jails write to.

    Args:
        on_tick: Called a few times a second, whatever else goes on.
    """

    def __init__(self, on_tick: Callable[[], None]) -> None:
        self._on_tick = on_tick
        self._epoll = select.epoll()
        self._lock = threading.Lock()
        self._handlers: dict[int, Callable[[], bool]] = {}
        # Removed since the last look: what was reported of these numbers is of
        # descriptors that are closed, and each may be another one's by now.
        self._stale: set[int] = set()
        self._thread: threading.Thread | None = None

    def add(self, fd: int, handler: Callable[[], bool]) -> None:
        """Call ``handler`` when ``fd`` is readable, until it returns False.

        Raises:
            OSError: The descriptor can't be waited for.
            RuntimeError: No thread can be started.
        """
        with self._lock:
            if fd not in self._handlers:
                self._epoll.register(fd, select.EPOLLIN)
            self._handlers[fd] = handler
        if self._thread is None:
            thread = threading.Thread(
                target=self._run, name="raysandbox-pump", daemon=True
            )
            thread.start()
            self._thread = thread

    def remove(self, fd: int) -> None:
        """Forget a descriptor; must be called before it is closed."""
        with self._lock:
            self._stale.add(fd)
            self._forget(fd)

    def _forget(self, fd: int) -> None:
        if self._handlers.pop(fd, None) is not None:
            with contextlib.suppress(OSError):
                self._epoll.unregister(fd)

    def _serve(self, fd: int, events: int) -> None:
        """Handle what was reported of a descriptor, if it is still the same one.

        Nothing is lost: what is true of its successor is reported again.
        """
        with self._lock:
            handler = None if fd in self._stale else self._handlers.get(fd)
        if handler is None:
            return
        # Hung up alone: nothing to read, now or later.
        if events & select.EPOLLIN and _safely(handler):
            return
        with self._lock:
            if self._handlers.get(fd) is handler:
                self._forget(fd)

    def _run(self) -> None:
        next_tick = time.monotonic() + _TICK_S
        while True:
            with self._lock:
                self._stale.clear()
            for fd, events in self._epoll.poll(_TICK_S):
                self._serve(fd, events)
            if time.monotonic() >= next_tick:
                _safely(self._on_tick)
                next_tick = time.monotonic() + _TICK_S
