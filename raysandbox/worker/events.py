"""One JSON line for each jail's end, in Ray's session log directory."""

from __future__ import annotations

import json
import os
import time
from typing import Any

__all__ = ["FILE_NAME", "EventLog"]

FILE_NAME = "raysandbox_events.jsonl"


class EventLog:
    """Appends events; one write each, so that workers' lines do not mix."""

    def __init__(self, directory: str) -> None:
        self.path = os.path.join(directory, FILE_NAME)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = os.open(self.path, flags, 0o640)

    def write(self, event: str, **fields: Any) -> None:
        """Append one event; a full disk must not fail the task."""
        line = {"time": round(time.time(), 3), "event": event, **fields}
        try:
            os.write(self._fd, json.dumps(line, default=str).encode() + b"\n")
        except OSError:
            return

    def close(self) -> None:
        """Let go of the file; nothing more is appended."""
        os.close(self._fd)
