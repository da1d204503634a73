"""One JSON line for each jail's end, in Ray's session log directory.

A log takes at most twice `MOST_BYTES`. Where many workers append to one file, the
first that finds it full renames it to `OLD_NAME`, in the place of an older one, under
the file's lock; the others notice at their next event. Behind the node's wall each
worker has a file of its own, bound over the common name, which can't be renamed:
there the older half is cut off.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from typing import Any

__all__ = ["FILE_NAME", "MOST_BYTES", "OLD_NAME", "EventLog"]

FILE_NAME = "raysandbox_events.jsonl"
OLD_NAME = "raysandbox_events.old.jsonl"
#: Of one file.
MOST_BYTES = 16 << 20

_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


class EventLog:
    """Appends events; one write each, so that workers' lines do not mix."""

    def __init__(self, directory: str, *, most_bytes: int = MOST_BYTES) -> None:
        self.path = os.path.join(directory, FILE_NAME)
        self._most_bytes = most_bytes
        self._fd = -1

    def open(self) -> None:
        """Open the file now: for a process that soon can't.

        Raises:
            OSError: It can't be opened for appending.
        """
        if self._fd < 0:
            self._fd = os.open(self.path, _FLAGS, 0o640)

    def write(self, event: str, **fields: Any) -> None:
        """Append one event; a full disk must not fail the task."""
        line = {"time": round(time.time(), 3), "event": event, **fields}
        try:
            self.open()
            data = json.dumps(line, default=str).encode() + b"\n"
            if os.fstat(self._fd).st_size + len(data) > self._most_bytes:
                self._make_room()
            os.write(self._fd, self._end_of_cut_line() + data)
        except OSError:
            return

    def _end_of_cut_line(self) -> bytes:
        """Return what ends the line before ours, if a full disk has cut it."""
        size = os.fstat(self._fd).st_size
        whole = size == 0 or os.pread(self._fd, 1, size - 1) == b"\n"
        return b"" if whole else b"\n"

    def _make_room(self) -> None:
        """Set the full file aside, unless another worker just did."""
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            if self._is_current():
                try:
                    os.rename(self.path, self.path.removesuffix(FILE_NAME) + OLD_NAME)
                except OSError:
                    # Bound over its name, or in a directory that is not ours.
                    self._cut()
                    return
            full, self._fd = self._fd, -1
        finally:
            if self._fd >= 0:
                fcntl.flock(self._fd, fcntl.LOCK_UN)
        os.close(full)
        self.open()

    def _is_current(self) -> bool:
        """Whether the name still leads to the file that we have open."""
        try:
            there = os.stat(self.path, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(there, os.fstat(self._fd))

    def _cut(self) -> None:
        size = os.fstat(self._fd).st_size
        kept = os.pread(self._fd, self._most_bytes // 2, size - self._most_bytes // 2)
        os.ftruncate(self._fd, 0)
        os.write(self._fd, kept.partition(b"\n")[2])

    def close(self) -> None:
        """Let go of the file; nothing more is appended."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
