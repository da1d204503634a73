"""One JSON line for each jail's end, in Ray's session log directory."""

from __future__ import annotations

import json
import os
import time
from typing import Any

__all__ = ["FILE_NAME", "EventLog"]

FILE_NAME = "raysandbox_events.jsonl"

_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


class EventLog:
    """Appends events; one write each, so that workers' lines do not mix."""

    def __init__(self, directory: str) -> None:
        self.path = os.path.join(directory, FILE_NAME)
        self._fd = -1

    def write(self, event: str, **fields: Any) -> None:
        """Append one event; a full disk must not fail the task."""
        line = {"time": round(time.time(), 3), "event": event, **fields}
        try:
            if self._fd < 0:
                self._fd = os.open(self.path, _FLAGS, 0o640)
            data = json.dumps(line, default=str).encode() + b"\n"
            os.write(self._fd, self._end_of_cut_line() + data)
        except OSError:
            return

    def _end_of_cut_line(self) -> bytes:
        """Return what ends the line before ours, if a full disk has cut it."""
        size = os.fstat(self._fd).st_size
        whole = size == 0 or os.pread(self._fd, 1, size - 1) == b"\n"
        return b"" if whole else b"\n"

    def close(self) -> None:
        """Let go of the file; nothing more is appended."""
        os.close(self._fd)
