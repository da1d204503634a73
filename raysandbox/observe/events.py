"""The event logs of this machine's nodes: read, filter, follow.

Each worker writes lines of JSON into ``raysandbox_events*.jsonl``, in the
session's log directory or where the policy says; the proxy in front of the object
store writes ``raysandbox_store*.jsonl`` there. A worker of
``boundary = "worker"`` runs its users' code and may write any bytes there: a
line that is no event is counted, not shown, and whatever is printed is escaped.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from raysandbox.worker.events import OLD_NAME

__all__ = ["Filter", "Reader", "summary"]

_PREFIXES, _SUFFIX = ("raysandbox_events", "raysandbox_store"), ".jsonl"
_MOST_LINE = 1 << 20
_CHUNK = 1 << 20
_HEAD = 64
_YEAR_9999 = 250_000_000_000
_REQUIRED = {"time": (int, float), "event": (str,)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which events are wanted; what is not given does not matter.

    Attributes:
        events: Kinds (``jail_ended``, ``task_refused``).
        profiles, jobs, tasks, outcomes: Patterns with ``*`` and ``?``; an
            outcome is its part before the first colon.
        denied: Only with denied system calls, refusals or quotas.
        since: Unix time.
    """

    events: tuple[str, ...] = ()
    profiles: tuple[str, ...] = ()
    jobs: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    outcomes: tuple[str, ...] = ()
    denied: bool = False
    since: float = 0.0

    def takes(self, event: dict[str, Any]) -> bool:
        """Whether this event is wanted."""
        outcome = str(event.get("outcome", "")).partition(":")[0]
        return (
            event["time"] >= self.since
            and _any(self.events, [event["event"]])
            and _any(self.profiles, [str(event.get("profile", ""))])
            and _any(self.jobs, [str(event.get("job", ""))])
            and _any(self.tasks, task_names(event))
            and _any(self.outcomes, [outcome])
            and (not self.denied or _is_denied(event))
        )


def task_names(event: dict[str, Any]) -> list[str]:
    """Return the names of the tasks that an event is about."""
    many = event.get("tasks")
    one = event.get("task")
    names = [str(each) for each in many] if isinstance(many, list) else []
    return names or ([str(one)] if one is not None else [])


def _any(patterns: Sequence[str], values: Sequence[str]) -> bool:
    return not patterns or any(
        fnmatchcase(value, pattern) for pattern in patterns for value in values
    )


def _is_denied(event: dict[str, Any]) -> bool:
    return (
        event["event"]
        in ("task_refused", "quota_refused", "link_ended", "link_refused")
        or bool(event.get("denied_count"))
        or str(event.get("outcome", "")) in ("TaskDenied", "TaskQuotaExceeded")
    )


@dataclass(slots=True)
class _File:
    """A log that is being read: where we are, and a line not yet whole.

    Attributes:
        head: Its first bytes: others are another log's, in the same place.
        latest: Time of its latest event.
        again: It was cut: events up to this time were there before.
        aside: It had the name of a log that was set aside.
    """

    offset: int = 0
    rest: bytes = b""
    skipping: bool = False
    head: bytes = b""
    latest: float = 0.0
    again: float = -1.0
    aside: bool = False


@dataclass(slots=True)
class Reader:
    """Reads the logs of some directories, again and again.

    Attributes:
        directories: Where they are.
        malformed: Lines so far that were no events.
    """

    directories: Sequence[str]
    malformed: int = 0
    # By device and inode: a log that is renamed goes on where it was.
    _files: dict[tuple[int, int], _File] = field(default_factory=dict)

    def read(self) -> list[dict[str, Any]]:
        """Return the events that were added since the last call, oldest first."""
        seen: dict[tuple[int, int], _File] = {}
        by_file = [self._read(path, seen) for path in self._paths()]
        self._files = seen
        # A log before the one that was set aside, which is older: else a log that is
        # set aside in between is missed. In order where the clock saw one moment.
        found = [event for events in reversed(by_file) for event in events]
        found.sort(key=lambda event: event["time"])
        return found

    def follow(self, pause_s: float = 0.3) -> Iterator[dict[str, Any]]:
        """Yield events as they come, for ever."""
        while True:
            yield from self.read()
            time.sleep(pause_s)

    def _paths(self) -> list[str]:
        paths = []
        for directory in self.directories:
            try:
                names = os.listdir(directory)
            except OSError:
                continue
            paths += [
                os.path.join(directory, name)
                for name in sorted(names)
                if name.startswith(_PREFIXES) and name.endswith(_SUFFIX)
            ]
        return paths

    def _read(
        self, path: str, seen: dict[tuple[int, int], _File]
    ) -> list[dict[str, Any]]:
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            fd = os.open(path, flags)
        except OSError:
            return []
        found: list[dict[str, Any]] = []
        try:
            there = os.fstat(fd)
            key = (there.st_dev, there.st_ino)
            if key in seen:
                return []  # renamed while we looked
            file, aside = self._files.get(key) or _File(), path.endswith(OLD_NAME)
            if file.aside and not aside:
                file = (
                    _File()
                )  # of a log that is gone: the kernel used its number again
            seen[key], file.aside = file, aside
            head = os.pread(fd, _HEAD, 0)
            if there.st_size < file.offset or not head.startswith(file.head):
                file.offset, file.rest, file.again = 0, b"", file.latest
            file.head = head
            while chunk := os.pread(fd, _CHUNK, file.offset):
                file.offset += len(chunk)
                *lines, file.rest = (file.rest + chunk).split(b"\n")
                for line in lines:
                    if file.skipping:
                        file.skipping = False
                        continue
                    self._take(line, found)
                if len(file.rest) > _MOST_LINE:
                    self.malformed += 1
                    file.rest, file.skipping = b"", True
        except OSError:
            pass
        finally:
            os.close(fd)
        if found:
            latest = max(event["time"] for event in found)
            # A clock that nobody has must not hide what comes later.
            file.latest = max(file.latest, min(latest, time.time() + 1))
        return [event for event in found if event["time"] > file.again]

    def _take(self, line: bytes, found: list[dict[str, Any]]) -> None:
        if not line.strip():
            return
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            self.malformed += 1
            return
        good = isinstance(event, dict) and all(
            isinstance(event.get(key), kinds) and not isinstance(event[key], bool)
            for key, kinds in _REQUIRED.items()
        )
        if not good or not 0 <= event["time"] < _YEAR_9999:
            self.malformed += 1
            return
        found.append(event)


def summary(event: dict[str, Any]) -> str:
    """Return what an event says beside time, kind, profile and task; not escaped."""
    parts = []
    if event.get("outcome"):
        parts.append(str(event["outcome"]))
    for key in ("reason", "limit"):
        if event.get(key):
            parts.append(str(event[key]))
    for key in ("job_bytes", "job_objects"):
        value = event.get(key)
        if isinstance(value, list) and len(value) == 2:
            parts.append(f"{key} {value[0]} of {value[1]}")
    if event.get("ended_by"):
        parts.append(f"ended by {event['ended_by']}")
    for key, name, scale in (
        ("cpu_time_s", "cpu {:.3g} s", 1.0),
        ("memory_peak_bytes", "peak {:.0f} MiB", 1 << 20),
        ("denied_count", "{:.0f} denied", 1.0),
    ):
        value = event.get(key)
        if isinstance(value, int | float) and value and abs(value) < 1e18:
            parts.append(name.format(value / scale))
    denied = event.get("denied")
    if isinstance(denied, list) and denied:
        parts.append(str(denied[0]))
    return "; ".join(parts)
