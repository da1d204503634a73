"""What the jobs of a node hold of its object store, counted by their workers.

One small file for each job, shared by all workers of the node that serve it:
trusted processes, which alone see it (it is not in a jail's view). What counts is

*stored*: results and puts, from the moment they are handed to Ray until the node
has let go of them: what raylet spilled from the store to files still counts. Nobody
tells a worker when that is, so at the quota it asks which of the job's objects the
node still has, and what is gone no longer counts.
Small results, which Ray sends to their owner instead of storing them, do not count.

*arguments*: of the tasks that run now. Each worker has a slot for its own task's;
a lock that the kernel drops with the process says whether the slot counts.

Updates are made under ``flock``, so that a worker that dies while it holds it
releases it; a file that it left half updated is put right by the next recount.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from raysandbox.errors import SetupError

__all__ = [
    "INLINE_BYTES",
    "JobFile",
    "Limits",
    "Quotas",
    "Refusal",
    "Usage",
    "directory",
    "usage_of",
]

#: Ray's max_direct_call_object_size: smaller results travel in the reply.
INLINE_BYTES = 100 << 10

# Of bytes and of objects, as a profile writes them.
_STORED_KEYS = ("object_store.max_job", "object_store.max_job_objects")
_ARGUMENT_KEYS = (
    "object_store.max_job_arguments",
    "object_store.max_job_argument_objects",
)
_MAGIC = b"RSXQUOT1"
_HEADER = struct.Struct("<8sQQQQdd")
_SLOT = struct.Struct("<QQ")
_SLOTS = 1024
# Object id, when it was counted (ms, the low 32 bits), bytes.
_ENTRY = struct.Struct("<28sIQ")
_SLOTS_AT = 64
_ENTRIES_AT = _SLOTS_AT + _SLOT.size * _SLOTS
_GROW = 64 << 10
# struct flock of Linux, for locks that belong to an open file (fcntl(2)).
_FLOCK = struct.Struct("hhxxxxqqixxxx")
_F_OFD_GETLK, _F_OFD_SETLK = 36, 37
_LOCKS_AT = 1 << 40  # past the file's end, where only locks are
# The store frees an object up to a second after its owner let go of it; then raylet
# has a worker remove what was spilled.
_GRACE_S = 5.0
_RECOUNT_S = 0.25
# A result that was just counted may not be in the store yet.
_YOUNG_S, _COPY_BYTES_PER_S = 1.0, 200e6

WhichStored = Callable[[Sequence[bytes]], set[bytes]]


class _Header(NamedTuple):
    """The start of the file, in the order of `_HEADER`.

    Attributes:
        slots: All that were ever taken lie below it.
        recounted_s: When the last recount ended, on CLOCK_MONOTONIC.
        took_s: What it took.
    """

    magic: bytes = _MAGIC
    entries: int = 0
    stored_bytes: int = 0
    slots: int = 0
    refused: int = 0
    recounted_s: float = 0.0
    took_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What a job may hold on this node; None is no limit.

    Attributes:
        stored_bytes: Results and puts that the node has, in memory or in files.
        stored_objects: How many.
        argument_bytes: Arguments of all its tasks that run.
        argument_objects: How many.
    """

    stored_bytes: int | None = None
    stored_objects: int | None = None
    argument_bytes: int | None = None
    argument_objects: int | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """What a job holds now; see `Limits`."""

    stored_bytes: int
    stored_objects: int
    argument_bytes: int
    argument_objects: int
    refused: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why something does not fit.

    Attributes:
        limit: Key of the limit (``"object_store.max_job"``).
        allowed: What it allows, in words.
        seen: What is held and what was to be added, in words.
    """

    limit: str
    allowed: str
    seen: str


def directory(session_dir: str) -> str:
    """Return where the files of a session of Ray are."""
    return os.path.join(session_dir, "raysandbox", "quota")


class JobFile:
    """The count of one job; see the module."""

    def __init__(self, path: str) -> None:
        self._fd = _open_shared(path)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            if os.fstat(self._fd).st_size < _ENTRIES_AT + _GROW:
                os.ftruncate(self._fd, _ENTRIES_AT + _GROW)
            self._map = mmap.mmap(self._fd, 0)
            magic = bytes(self._map[: len(_MAGIC)])
            if magic == bytes(len(_MAGIC)):
                _HEADER.pack_into(self._map, 0, *_Header())
            elif magic != _MAGIC:
                raise SetupError(step="quota_file", detail=f"{path} is not one of ours")
            self._slot = self._take_slot()
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def close(self) -> None:
        """Give the slot back, and what it holds."""
        self.let_go()
        self._map.close()
        os.close(self._fd)

    # -- arguments ------------------------------------------------------------

    def hold(self, limits: Limits, size: int, objects: int) -> Refusal | None:
        """Count the arguments of the task that is about to run, bytes and number.

        Without the lock: each slot has one writer, and who writes before it sums
        up is seen by everybody who sums up later.
        """
        own = self._read_slot(self._slot)
        self._write_slot(self._slot, own[0] + size, own[1] + objects)
        if self._arguments_fit(limits):
            return None
        with self._locked():
            self._clear_dead_slots()
            if self._arguments_fit(limits):
                return None
            self._write_slot(self._slot, *own)
            self._add(refused=1)
            held_bytes, held_objects = self._held()
        return _refusal(
            "arguments",
            _ARGUMENT_KEYS,
            _Wanted(held_bytes, size, limits.argument_bytes),
            _Wanted(held_objects, objects, limits.argument_objects),
        )

    def let_go(self) -> None:
        """The task is over: its arguments no longer count."""
        self._write_slot(self._slot, 0, 0)

    def _arguments_fit(self, limits: Limits) -> bool:
        held_bytes, held_objects = self._held()
        return not (
            _over(held_bytes, limits.argument_bytes)
            or _over(held_objects, limits.argument_objects)
        )

    def _held(self) -> tuple[int, int]:
        return _sum_of_slots(self._map, self._header().slots)

    def _take_slot(self) -> int:
        for slot in range(_SLOTS):
            if self._lock_slot(slot):
                self._write_slot(slot, 0, 0)  # of a worker that died
                old = self._header()
                new = old._replace(slots=max(old.slots, slot + 1))
                _HEADER.pack_into(self._map, 0, *new)
                return slot
        raise SetupError(
            step="quota_slot", detail=f"more than {_SLOTS} workers serve one job here"
        )

    def _lock_slot(self, slot: int) -> bool:
        wanted = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _LOCKS_AT + slot, 1, 0)
        try:
            fcntl.fcntl(self._fd, _F_OFD_SETLK, wanted)
        except BlockingIOError:
            return False
        return True

    def _is_alive(self, slot: int) -> bool:
        if slot == self._slot:
            return True
        wanted = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _LOCKS_AT + slot, 1, 0)
        found = fcntl.fcntl(self._fd, _F_OFD_GETLK, wanted)
        return bool(_FLOCK.unpack(found)[0] != fcntl.F_UNLCK)

    def _clear_dead_slots(self) -> None:
        for slot in range(self._header().slots):
            if self._read_slot(slot) != (0, 0) and not self._is_alive(slot):
                self._write_slot(slot, 0, 0)

    def _read_slot(self, slot: int) -> tuple[int, int]:
        size, objects = _SLOT.unpack_from(self._map, _SLOTS_AT + _SLOT.size * slot)
        return size, objects

    def _write_slot(self, slot: int, size: int, objects: int) -> None:
        _SLOT.pack_into(self._map, _SLOTS_AT + _SLOT.size * slot, size, objects)

    # -- what is stored ---------------------------------------------------------

    def store(
        self,
        limits: Limits,
        objects: Sequence[tuple[bytes, int]],
        which_stored: WhichStored,
    ) -> Refusal | None:
        """Count objects that are about to be stored, as (id, bytes).

        Waits up to five seconds for the node to let go of others.
        """
        until = time.monotonic() + _GRACE_S
        size = sum(each for _, each in objects)
        while True:
            with self._locked():
                now = self._header()
                refusal = _refusal(
                    "results and puts",
                    _STORED_KEYS,
                    _Wanted(now.stored_bytes, size, limits.stored_bytes),
                    _Wanted(now.entries, len(objects), limits.stored_objects),
                )
                if refusal is None:
                    self._append(objects)
                    return None
            hopeless = _over(size, limits.stored_bytes) or _over(
                len(objects), limits.stored_objects
            )
            if hopeless or time.monotonic() > until:
                with self._locked():
                    self._add(refused=1)
                return refusal
            since_s = time.monotonic() - now.recounted_s
            if since_s >= max(_RECOUNT_S, 4 * now.took_s):
                self._recount(which_stored)
            else:
                time.sleep(_RECOUNT_S / 4)

    def take_back(self, ids: Iterable[bytes]) -> None:
        """What was counted is not stored after all."""
        gone = set(ids)
        with self._locked():
            self._keep(entry for entry in self._entries() if entry[0] not in gone)

    def _append(self, objects: Sequence[tuple[bytes, int]]) -> None:
        count = self._header().entries
        need = _ENTRIES_AT + _ENTRY.size * (count + len(objects))
        if need > len(self._map):
            os.ftruncate(self._fd, max(need + _GROW, 2 * len(self._map)))
            self._remap()
        for number, (object_id, each) in enumerate(objects, count):
            at = _ENTRIES_AT + _ENTRY.size * number
            _ENTRY.pack_into(self._map, at, object_id, _now_ms(), each)
        # Last, so that an update that is cut short counts nothing twice.
        self._add(entries=len(objects), stored=sum(each for _, each in objects))

    def _recount(self, which_stored: WhichStored) -> None:
        """Ask the store, without the lock; then drop what is gone."""
        begun = time.monotonic()
        with self._locked():
            known = list(self._entries())
        asked = [each[0] for each in known if not _is_young(each[1], each[2])]
        gone = set(asked) - which_stored(asked)
        now = time.monotonic()
        with self._locked():
            self._keep(
                entry
                for entry in self._entries()
                if entry[0] not in gone or _is_young(entry[1], entry[2])
            )
            done = self._header()._replace(recounted_s=now, took_s=now - begun)
            _HEADER.pack_into(self._map, 0, *done)

    def _entries(self) -> Iterator[tuple[bytes, int, int]]:
        count = self._header().entries
        end = _ENTRIES_AT + _ENTRY.size * count
        return iter(list(_ENTRY.iter_unpack(bytes(self._map[_ENTRIES_AT:end]))))

    def _keep(self, entries: Iterable[tuple[bytes, int, int]]) -> None:
        kept = list(entries)
        packed = b"".join(_ENTRY.pack(*entry) for entry in kept)
        self._map[_ENTRIES_AT : _ENTRIES_AT + len(packed)] = packed
        old = self._header()
        self._add(
            entries=len(kept) - old.entries,
            stored=sum(entry[2] for entry in kept) - old.stored_bytes,
        )

    # -- the file -----------------------------------------------------------------

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            if _ENTRIES_AT + _ENTRY.size * self._header().entries > len(self._map):
                self._remap()  # another worker made it longer
            yield
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _remap(self) -> None:
        self._map.close()
        self._map = mmap.mmap(self._fd, 0)

    def _header(self) -> _Header:
        return _Header(*_HEADER.unpack_from(self._map, 0))

    def _add(self, *, entries: int = 0, stored: int = 0, refused: int = 0) -> None:
        """Add to the counts."""
        old = self._header()
        new = old._replace(
            entries=max(0, old.entries + entries),
            stored_bytes=max(0, old.stored_bytes + stored),
            refused=old.refused + refused,
        )
        _HEADER.pack_into(self._map, 0, *new)


def _open_shared(path: str) -> int:
    """Open a file, or make it: for workers with other users too, if its directory is.

    It has its mode by the time it has its name: another worker may open it at once.
    """
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    parent, name = os.path.split(path)
    mode = 0o666 if os.stat(parent).st_mode & 0o002 else 0o600
    new = os.path.join(parent, f".{name}.{os.getpid()}")
    while True:
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, flags)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new)  # of a worker that died half-way
        fd = os.open(new, flags | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.fchmod(fd, mode)
            os.link(new, path)
        except FileExistsError:
            os.close(fd)  # another worker was faster
        except FileNotFoundError:
            os.close(fd)  # taken for a job's that has ended
        except BaseException:
            os.close(fd)
            raise
        else:
            return fd
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(new)


def usage_of(path: str) -> Usage:
    """Return what a job's file says now, without taking part.

    Raises:
        OSError: There is no such file.
        SetupError: It is not one of ours.
    """
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        data = file.read(_ENTRIES_AT)
    if not data.startswith(_MAGIC) or len(data) < _ENTRIES_AT:
        raise SetupError(step="quota_file", detail=f"{path} is not one of ours")
    now = _Header(*_HEADER.unpack_from(data))
    held = _sum_of_slots(data, now.slots)
    return Usage(now.stored_bytes, now.entries, *held, now.refused)


def _sum_of_slots(data: bytes | mmap.mmap, slots: int) -> tuple[int, int]:
    numbers = struct.unpack_from(f"<{2 * slots}Q", data, _SLOTS_AT)
    return sum(numbers[::2]), sum(numbers[1::2])


class Quotas:
    """The quotas of one worker: of whichever job it serves now.

    Args:
        directory: Where the files are; made for its owner alone.
        which_stored: Which objects the node has, of those asked for by id.
        live_jobs: Which jobs run, as hex; asked when a new job's file is made, to
            remove those of jobs that have ended.

    Attributes:
        is_in_use: Something was counted since the last `hold`.
    """

    def __init__(
        self,
        directory: str,
        which_stored: WhichStored,
        live_jobs: Callable[[], set[str]],
    ) -> None:
        self._directory = directory
        self._which_stored, self._live_jobs = which_stored, live_jobs
        self._job = ""
        self._file: JobFile | None = None
        self._holds = False
        self._counted: list[bytes] = []
        self.is_in_use = False

    def hold(self, job: str, limits: Limits, sizes: Sequence[int]) -> Refusal | None:
        """Count a task's arguments, until `let_go`."""
        self._counted = []  # of a task that is over
        self.is_in_use = False
        if not sizes or (
            limits.argument_bytes is None and limits.argument_objects is None
        ):
            return None
        refusal = self._of(job).hold(limits, sum(sizes), len(sizes))
        self._holds = self._holds or refusal is None
        self.is_in_use = self._holds
        return refusal

    def let_go(self) -> None:
        """The task is over."""
        if self._holds and self._file is not None:
            self._file.let_go()
        self._holds = False

    def store(
        self, job: str, limits: Limits, task_id: bytes, sizes: Sequence[int]
    ) -> Refusal | None:
        """Count what a task returns, in the order of its return values.

        A second call for one task counts instead of the first: its one value was
        taken apart into several.
        """
        if self._counted and self._file is not None:
            self._file.take_back(self._counted)
            self._counted = []
        objects = [
            (task_id + index.to_bytes(4, "little"), size)
            for index, size in enumerate(sizes, 1)
            if size >= INLINE_BYTES
        ]
        if not objects:
            return None
        refusal = self._of(job).store(limits, objects, self._which_stored)
        if refusal is None:
            self._counted = [object_id for object_id, _ in objects]
            self.is_in_use = True
        return refusal

    def _of(self, job: str) -> JobFile:
        if self._file is not None and self._job == job:
            return self._file
        if self._file is not None:
            self._file.close()
        self._file, self._holds = None, False
        try:
            if not os.path.isdir(self._directory):
                os.makedirs(os.path.dirname(self._directory), 0o700, exist_ok=True)
                os.makedirs(self._directory, 0o700, exist_ok=True)
            path = os.path.join(self._directory, job)
            if not os.path.exists(path):
                self._remove_ended()
            self._file, self._job = JobFile(path), job
        except OSError as error:
            raise SetupError(
                step="quota_file", errno=error.errno or 0, detail=self._directory
            ) from error
        return self._file

    def _remove_ended(self) -> None:
        others = os.listdir(self._directory)
        live = self._live_jobs() if others else set()
        for name in others:
            if name not in live:
                try:
                    os.unlink(os.path.join(self._directory, name))
                except FileNotFoundError:
                    continue  # another worker was faster


def _over(value: int, limit: int | None) -> bool:
    return limit is not None and value > limit


class _Wanted(NamedTuple):
    held: int
    more: int
    limit: int | None


def _refusal(
    what: str, keys: tuple[str, str], size: _Wanted, objects: _Wanted
) -> Refusal | None:
    """Return why it does not fit, if it does not."""
    for wanted, unit, key in (
        (size, "bytes", keys[0]),
        (objects, "objects", keys[1]),
    ):
        if _over(wanted.held + wanted.more, wanted.limit):
            return Refusal(
                limit=key,
                allowed=f"{wanted.limit} {unit}",
                seen=f"{wanted.more} {unit} more, while the job's {what} on this node "
                f"are {size.held} bytes in {objects.held} objects",
            )
    return None


def _now_ms() -> int:
    return int(time.monotonic() * 1000) & 0xFFFFFFFF


def _is_young(counted_ms: int, size: int) -> bool:
    age_s = ((_now_ms() - counted_ms) & 0xFFFFFFFF) / 1000
    return age_s < _YOUNG_S + size / _COPY_BYTES_PER_S
