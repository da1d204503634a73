"""What each worker's jails are doing, in a file that it maps: live state for ``ps``.

Theory of operation. A worker has one small file in the session's log directory
and holds it mapped. A task that starts or ends is one ``struct.pack_into`` into
that memory, no system call. Whoever looks (`read`) opens the file and asks the
kernel who holds its POSIX lock: that is the worker, by its pid, and no file can
claim to be another's. A file that nobody locks is a dead worker's.

::

    0     header: magic, version, pid, its start time, JSON about the worker
    4096  16 records of 512 bytes, one for each jail that has had a call

A record is written under a sequence number that is odd meanwhile; a reader that
sees it odd, or changed, reads again. The last part of a record goes the other
way: the operator's request to end this jail (`Board.asked_to_end`).

A worker of ``boundary = "worker"`` runs its users' code and may write anything
here. So everything is checked on reading, nothing is believed that the kernel
can say better, and text is escaped by whoever prints it.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import struct
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "FILE_PREFIX",
    "Board",
    "JailState",
    "Place",
    "WorkerState",
    "ask_to_end",
    "read",
    "sweep",
]

FILE_PREFIX = "raysandbox_state-"
_SUFFIX = ".bin"

_MAGIC = b"RSBSTAT1"
_HEADER = struct.Struct("<8sIIQI")  # magic, version, pid, start time, length of JSON
_HEADER_BYTES = 4096
_VERSION = 1
_RECORDS = 16
_RECORD_BYTES = 512
_SIZE = _HEADER_BYTES + _RECORDS * _RECORD_BYTES

_SEQUENCE = struct.Struct("<I")
# state, number, calls, denials, oom kills, refused forks, started, since, cpu time,
# job, task, actor, profile, name, group
_BODY = struct.Struct("<BxxxIIIIIddd4s24s16s48s120s96s")
# The start of it: all that a call of the same name changes.
_CALL = struct.Struct("<BxxxIIIIIddd4s24s")
# number of the jail to end, who asks
_REQUEST = struct.Struct("<I60s")
_NUMBER = struct.Struct("<I")
_REQUEST_AT = _RECORD_BYTES - _REQUEST.size
assert _SEQUENCE.size + _BODY.size <= _REQUEST_AT  # noqa: S101

# Places in it of what changes from call to call.
_STATE, _CALLS, _DENIALS, _SINCE, _TASK, _ACTOR, _NAME = 0, 2, 3, 7, 10, 11, 13
_FREE, _RUNNING, _IDLE = range(3)
_STATES = {_RUNNING: "running", _IDLE: "idle"}
# struct flock: l_type, l_whence, l_start, l_len, l_pid.
_FLOCK = struct.Struct("@hhqqi")
# A file is made a moment before it is locked.
_YOUNG_S = 10.0
_short = struct.error
_MOST_TRIES = 100


def _text(value: str, size: int) -> bytes:
    """Cut a text to ``size`` bytes of UTF-8; what the name stands for is lost."""
    return value.encode("utf-8", "replace")[:size]


def _words(data: bytes) -> str:
    return data.rstrip(b"\0").decode("utf-8", "replace")


# --- the worker's side ----------------------------------------------------------------


class Place:
    """One jail's record, as its worker writes it."""

    __slots__ = ("_at", "_board", "_name", "_sequence", "fields", "number")

    def __init__(self, board: Board, index: int) -> None:
        self._board = board
        self._at = _HEADER_BYTES + index * _RECORD_BYTES
        self._sequence = 0
        self.number = 0
        self.fields: list[Any] = []
        self._name = ""

    def write(
        self,
        *,
        running: bool,
        calls: int,
        denials: int,
        started: float,
        job: bytes,
        task: bytes,
        actor: bytes,
        profile: str,
        name: str,
        group: str,
        before: tuple[float, int, int] = (0.0, 0, 0),
    ) -> None:
        """Say what the jail does now.

        Args:
            running: A task is in it; else it waits for one.
            calls: How many it has had.
            denials: System calls denied so far.
            started: Unix time of its first call.
            job: Ray's job id, 4 bytes.
            task: Ray's task id, 24 bytes.
            actor: Ray's actor id, 16 bytes, or nothing.
            profile: The profile's name.
            name: The task's or method's name.
            group: Name of its control group, or ``""``.
            before: CPU time, oom kills and refused forks of the group before
                this jail, to be taken off what the group says.
        """
        cpu_time_s, oom_kills, refused = before
        self._name = name
        self.fields = [
            _RUNNING if running else _IDLE,
            self.number,
            calls,
            denials,
            oom_kills,
            refused,
            started,
            time.time(),
            cpu_time_s,
            job,
            task,
            actor,
            _text(profile, 48),
            _text(name, 120),
            _text(group, 96),
        ]
        self._put()

    def call(self, calls: int, denials: int, task: bytes, name: str) -> bool:
        """Say that the jail has its next call; the rest is as `write` had it.

        Returns:
            Whether somebody asked for its end: see `asked_to_end`.
        """
        fields = self.fields
        fields[_STATE], fields[_CALLS], fields[_DENIALS] = _RUNNING, calls, denials
        fields[_SINCE], fields[_TASK] = time.time(), task
        memory, at = self._board.memory, self._at
        if name == self._name:
            self._put(_CALL, _ACTOR)
        else:
            fields[_NAME], self._name = _text(name, 120), name
            self._put()
        (asked,) = _NUMBER.unpack_from(memory, at + _REQUEST_AT)
        return bool(asked == self.number)

    def idle(self, denials: int) -> None:
        """Say that the jail has answered and waits for its next call."""
        fields = self.fields
        if fields[_STATE] == _IDLE:
            return
        fields[_STATE], fields[_DENIALS], fields[_SINCE] = _IDLE, denials, time.time()
        self._put()

    def denied(self, denials: int) -> None:
        """Say that system calls were denied."""
        if self.fields[_DENIALS] != denials:
            self.fields[_DENIALS] = denials
            self._put()

    def _put(self, body: struct.Struct = _BODY, fields: int | None = None) -> None:
        memory, at, sequence = self._board.memory, self._at, self._sequence
        _SEQUENCE.pack_into(memory, at, sequence | 1)
        body.pack_into(memory, at + _SEQUENCE.size, *self.fields[:fields])
        self._sequence = sequence = (sequence + 2) & 0xFFFFFFFF
        _SEQUENCE.pack_into(memory, at, sequence)

    def asked_to_end(self) -> str | None:
        """Return who asked for this jail's end, or None."""
        memory, at = self._board.memory, self._at + _REQUEST_AT
        if _NUMBER.unpack_from(memory, at)[0] != self.number:
            return None
        _, who = _REQUEST.unpack_from(memory, at)
        return _words(who) or "?"

    def free(self) -> None:
        """Say that the jail is gone; the record serves another."""
        if self.fields:
            self.fields[_STATE] = _FREE
            self._put()
        self._board.give_back(self)


class Board:
    """One worker's file.

    Attributes:
        memory: The mapping.
        path: Where it is.
    """

    def __init__(
        self, directory: str, worker_id: str, about: Mapping[str, Any]
    ) -> None:
        """Make it, or take the one that the launcher made for this worker.

        Args:
            directory: The session's log directory.
            worker_id: Ray's id of this worker, hexadecimal.
            about: What `WorkerState` says of the worker.

        Raises:
            OSError: It can't be made, or somebody else holds it.
            ValueError: ``about`` is larger than a header takes.
        """
        self.path = os.path.join(directory, f"{FILE_PREFIX}{worker_id}{_SUFFIX}")
        text = json.dumps(about).encode()
        if len(text) > _HEADER_BYTES - _HEADER.size:
            raise ValueError(f"{len(text)} bytes about a worker")
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        # Open for as long as we live: closing any descriptor ends the lock.
        self._fd = os.open(self.path, flags, 0o640)
        fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(self._fd, _SIZE)
        self.memory = mmap.mmap(self._fd, _SIZE)
        self.memory[:] = bytes(_SIZE)
        pid = os.getpid()
        start = _start_time(pid) or 0
        self.memory[_HEADER.size : _HEADER.size + len(text)] = text
        _HEADER.pack_into(self.memory, 0, _MAGIC, _VERSION, pid, start, len(text))
        self._free = [Place(self, index) for index in range(_RECORDS)]
        self._number = 0

    def take(self) -> Place | None:
        """Return a record for a new jail; None if all are in use."""
        if not self._free:
            return None
        place = self._free.pop()
        self._number += 1
        place.number = self._number
        return place

    def give_back(self, place: Place) -> None:
        """Take a record back; see `Place.free`."""
        self._free.append(place)


def _start_time(pid: int) -> int | None:
    """Return field 22 of ``/proc/PID/stat``: clock ticks since boot."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return None


# --- the reader's side --------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class JailState:
    """One jail that has had a call, as its worker tells it.

    Attributes:
        jail_id: ``PID.NUMBER`` of its worker and itself.
        index: Which record of the worker's file.
        number: Of the jail in its worker.
        state: ``"running"`` or ``"idle"``.
        job, task, actor: Ray's ids, hexadecimal; ``""`` for none.
        name: The task's name. Whoever wrote the task chose it.
        profile: The profile's name.
        calls: How many calls it has had.
        denials: System calls denied so far.
        started: Unix time of its first call.
        since: Unix time of its last change.
        group: Name of its control group, or ``""``.
        before: What the group had used before: CPU time, oom kills, forks.
    """

    jail_id: str
    index: int
    number: int
    state: str
    job: str
    task: str
    actor: str
    name: str
    profile: str
    calls: int
    denials: int
    started: float
    since: float
    group: str
    before: tuple[float, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerState:
    """One living worker of raysandbox.

    Attributes:
        path: Its file.
        pid: Its process: the kernel's word, by the file's lock.
        start_time: Clock ticks since boot when that process started.
        worker, node: Ray's ids, hexadecimal.
        started: Unix time of its start.
        policy: Digest of its policy, or ``""``.
        bases: Version, directory and controllers of each hierarchy in which it
            makes groups, as it sees them.
        jails: Those that have had a call.
    """

    path: str
    pid: int
    start_time: int
    worker: str
    node: str
    started: float
    policy: str
    bases: list[tuple[int, str, list[str]]]
    jails: list[JailState] = field(default_factory=list)


def read(directory: str) -> list[WorkerState]:
    """Return the living workers that have a file in this directory."""
    found = []
    for path in _files(directory):
        # Whatever it holds, it is one file that tells us nothing.
        with suppress(OSError, ValueError, ArithmeticError, RecursionError, _short):
            state = _read_file(path)
            if state is not None:
                found.append(state)
    return sorted(found, key=lambda state: state.pid)


def _files(directory: str) -> list[str]:
    try:
        names = os.listdir(directory)
    except OSError:
        return []
    return [
        os.path.join(directory, name)
        for name in names
        if name.startswith(FILE_PREFIX) and name.endswith(_SUFFIX)
    ]


def _open(path: str, flags: int = os.O_RDONLY) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)


def _holder(fd: int) -> int:
    """Return the process that holds the file's lock, 0 if there is none."""
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, asked))
    return 0 if kind == fcntl.F_UNLCK else int(pid)


def _read_file(path: str) -> WorkerState | None:
    fd = _open(path)
    try:
        holder = _holder(fd)
        if holder <= 0 or os.fstat(fd).st_size != _SIZE:
            return None
        return _parse(path, holder, lambda at, size: os.pread(fd, size, at))
    finally:
        os.close(fd)


def _parse(path: str, holder: int, get: Any) -> WorkerState:
    magic, version, _, _, length = _HEADER.unpack(get(0, _HEADER.size))
    if magic != _MAGIC or version != _VERSION or length > _HEADER_BYTES - _HEADER.size:
        raise ValueError("not a state file of this version")
    about = json.loads(get(_HEADER.size, length))
    if not isinstance(about, dict):
        raise ValueError("not about a worker")
    jails = [_record(index, holder, get) for index in range(_RECORDS)]
    return WorkerState(
        path=path,
        pid=holder,
        start_time=_start_time(holder) or 0,
        worker=str(about.get("worker", "")),
        node=str(about.get("node", "")),
        started=_number(about.get("started")),
        policy=str(about.get("policy", "")),
        bases=_bases(about.get("bases")),
        jails=[jail for jail in jails if jail is not None],
    )


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _bases(value: object) -> list[tuple[int, str, list[str]]]:
    found = []
    for each in value if isinstance(value, list) else []:
        if not isinstance(each, list) or len(each) != 3:
            raise ValueError("not a base of control groups")
        version, path, controllers = each
        if version not in (1, 2) or not isinstance(controllers, list):
            raise ValueError("not a base of control groups")
        found.append((int(version), str(path), [str(name) for name in controllers]))
    return found


def _record(index: int, pid: int, get: Any) -> JailState | None:
    at = _HEADER_BYTES + index * _RECORD_BYTES
    for _ in range(_MOST_TRIES):
        record = get(at, _REQUEST_AT)
        (sequence,) = _SEQUENCE.unpack_from(record)
        (after,) = _SEQUENCE.unpack(get(at, _SEQUENCE.size))
        if sequence == after and not sequence & 1:
            break
    else:
        raise ValueError("always being written")
    (
        state,
        number,
        calls,
        denials,
        oom_kills,
        refused,
        started,
        since,
        cpu_time_s,
        job,
        task,
        actor,
        profile,
        name,
        group,
    ) = _BODY.unpack_from(record, _SEQUENCE.size)
    if state not in _STATES:
        return None
    return JailState(
        jail_id=f"{pid}.{number}",
        index=index,
        number=number,
        state=_STATES[state],
        job=_hex(job),
        task=_hex(task),
        actor=_hex(actor),
        name=_words(name),
        profile=_words(profile),
        calls=calls,
        denials=denials,
        started=started,
        since=since,
        group=_words(group),
        before=(cpu_time_s, oom_kills, refused),
    )


def _hex(data: bytes) -> str:
    return data.hex() if data.strip(b"\0\xff") else ""


def ask_to_end(worker: WorkerState, jail: JailState, who: str) -> None:
    """Ask a worker to end one of its jails; it looks several times a second.

    Args:
        worker: As it was read.
        jail: One of its jails.
        who: Who asks, and why; the task's owner sees it.

    Raises:
        OSError: The file can't be written by us, or it is another worker's now.
    """
    fd = _open(worker.path, os.O_RDWR)
    try:
        if _holder(fd) != worker.pid or os.fstat(fd).st_size != _SIZE:
            raise FileNotFoundError(worker.path)
        at = _HEADER_BYTES + jail.index * _RECORD_BYTES + _REQUEST_AT
        os.pwrite(fd, _REQUEST.pack(jail.number, _text(who, 60)), at)
    finally:
        os.close(fd)


def sweep(directory: str) -> list[str]:
    """Remove the files of workers that are gone; return their paths."""
    gone = []
    for path in _files(directory):
        with suppress(OSError):
            fd = _open(path)
            try:
                old = time.time() - os.fstat(fd).st_mtime > _YOUNG_S
                if old and _holder(fd) == 0:
                    os.unlink(path)
                    gone.append(path)
            finally:
                os.close(fd)
    return gone
