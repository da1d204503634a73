"""Memory files that a worker fills with one large argument after the other.

Theory of operation. A new memory file costs three times the copy into it: the
kernel allocates and clears each page. So a worker keeps a few for a while, with
a writable mapping of its own, and copies the next argument over the last one.
Who gets such a file could see what comes later, or have it change under him, so
two things must hold before it is written again:

1. The jail that it went to is wholly gone, or it is the very jail that gets the
   next argument as well (``boundary = "job"``, an actor): then there is nobody
   to hide it from. A jail is gone when its pid namespace is.
2. The kernel says that nobody else has the file open or mapped. Each jail gets an
   open file of its own, and inotify(7) tells when the last descriptor, mapping and
   message that holds it is gone, and whether anybody has opened it again, after
   which it is not used any more. That also finds the array that a task in such a
   jail has kept, a descriptor under way, and whatever else we did not think of.

Neither is enough alone. A descriptor made with ``O_PATH`` and pages that were
spliced into a pipe are not seen by the second; a child that a task left in a
living jail is not seen by the first. What a jail could hand to somebody outside it
is of no use there: the file's mode lets its owner alone open it. Where a jail runs
as the worker's own user and could hand one on, nobody else gets its file after it.

A file goes to its jail before it is filled, so that both work at the same time,
where nobody is there to read what is still in it: to a jail that has run nothing
of a user's yet, which reads it after the call has come; or to the one that had it.

The other side can't change a file at all: it gets a read-only descriptor, and
the seals refuse new writable mappings, writing, holes and every change of the
size. The writable mapping from before the seals is ours alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import mmap
import os
import time
from collections.abc import Callable, Sequence

from raysandbox import wire
from raysandbox.kernel import inotify

__all__ = ["IDLE_S", "LEAST_BYTES", "MOST_BYTES", "MOST_FILES", "Buffers", "Kept"]

#: Smaller arguments get a file of their own: there is little to save.
LEAST_BYTES = 1 << 20
#: All files that a worker keeps, together.
MOST_BYTES = 256 << 20
#: One is read by the jail that works, one by the jail on its way out.
MOST_FILES = 2
#: What was not used for so long is given back.
IDLE_S = 3.0

_F_ADD_SEALS = 1033
# Against further seals, shrinking, growing, and all writing but by mappings
# that are there already (Linux 5.1).
_SEALED = 1 | 2 | 4 | 16
_TOLD = inotify.OPEN | inotify.CLOSE_NOWRITE | inotify.CLOSE_WRITE
_MADV_POPULATE_WRITE = 23  # Linux 5.14
# Other threads of this process get their turn in between.
_CHUNK = 4 << 20

Pieces = Sequence[tuple[int, memoryview]]


class Kept:
    """One memory file, and who has it.

    Attributes:
        size: Of the file, in bytes; it never changes.
        watch: Its number among the events.
        holder: Who got it last and may still be there.
        is_shared: Another jail may get it once that one is gone.
        used: When it was last lent, in seconds of its owner's clock.
        is_out: Somebody else has it open or mapped.
        is_spoilt: It was opened by somebody else: who has it can't be told.
    """

    def __init__(self, events: inotify.Events, pieces: Pieces, end: int) -> None:
        self.size = -(-end // mmap.PAGESIZE) * mmap.PAGESIZE
        self.holder: object = None
        self.used = 0.0
        self.is_shared = self.is_out = self.is_spoilt = False
        self._filled = end
        self._is_mapped = False
        fd = os.memfd_create("raysandbox-kept", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, self.size)
            # The first time, writing is cheaper than faulting each page in.
            for offset, view in pieces:
                wire.write(fd, view, offset)
            self._map = mmap.mmap(fd, self.size)
            try:
                with contextlib.suppress(OSError):
                    self._map.madvise(mmap.MADV_DONTFORK)
                fcntl.fcntl(fd, _F_ADD_SEALS, _SEALED)
                os.fchmod(fd, 0o400)
                self.watch = events.watch(fd, _TOLD)
            except BaseException:
                self._map.close()
                raise
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd

    def open(self) -> int:
        """Return a new descriptor of it, for reading alone.

        The caller reads the events before anybody else gets it.
        """
        return os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)

    def happened(self, mask: int) -> None:
        """Take in an event."""
        if mask == inotify.CLOSE_NOWRITE and self.is_out:
            self.is_out = False
        else:
            self.is_spoilt = True

    def fill(self, pieces: Pieces, end: int) -> None:
        """Write the next content over the last; nothing of that stays.

        Args:
            pieces: Where each goes, in order.
            end: Where the last one ends.
        """
        if not self._is_mapped:
            self._is_mapped = True
            with contextlib.suppress(OSError):  # an older kernel: page by page
                self._map.madvise(_MADV_POPULATE_WRITE)
        at, filled = 0, max(end, self._filled)
        # If anything goes wrong in the middle, all of it counts as written.
        self._filled = filled
        with memoryview(self._map) as memory:
            for offset, view in pieces:
                _clear(memory, at, offset)
                for start in range(0, view.nbytes, _CHUNK):
                    part = view[start : start + _CHUNK]
                    at = offset + start + part.nbytes
                    memory[offset + start : at] = part
                at = offset + view.nbytes
            _clear(memory, at, filled)
        self._filled = end

    def close(self) -> None:
        """Let go of it; who has it keeps what is in it."""
        self._map.close()
        os.close(self._fd)


class Buffers:
    """The files that one worker keeps; see the module."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._events: inotify.Events | None = None
        self._kept: list[Kept] = []
        self._job = ""
        self._works: bool | None = None

    @property
    def kept_bytes(self) -> int:
        """How much memory they take now."""
        return sum(kept.size for kept in self._kept)

    def serve(self, job: str) -> None:
        """What comes from here on is this job's: nothing of another one stays."""
        if job != self._job:
            self.drop_all()
            self._job = job

    def lend(
        self,
        holder: object,
        pieces: Pieces,
        end: int,
        *,
        is_new: bool,
        is_shared: bool,
    ) -> wire.Lent | None:
        """Return a file for this content, None if none is kept for such.

        Args:
            holder: The jail that it goes to.
            pieces: Where each goes, in order; nothing else is in it.
            end: Where the last one ends, in bytes.
            is_new: No code of a user has run in that jail yet.
            is_shared: Another jail may get the file after it.

        Raises:
            OSError: No memory is left.
        """
        if not LEAST_BYTES <= end <= MOST_BYTES or not self._can_tell():
            return None
        found = self._reopened(holder, end)
        if found is not None:
            kept, fd = found
            # What is still in it this jail has seen, or nobody in it sees.
            is_ahead = is_new or kept.holder is holder
            fill: Callable[[], None] = functools.partial(kept.fill, pieces, end)
        else:
            self._make_room(end)
            try:
                kept = self._new(pieces, end)
                fd, is_ahead, fill = self._open(kept), False, _nothing
            except OSError:
                return None  # what was lacking may not be lacking for an ordinary one
        kept.holder, kept.is_shared, kept.used = holder, is_shared, self._clock()
        return wire.Lent(fd, is_ahead, fill)

    def _reopened(self, holder: object, end: int) -> tuple[Kept, int] | None:
        """Return a file that may be filled again, and its new descriptor."""
        self._take_in()
        for kept in list(self._kept):
            # A much larger file would have to be cleared, or keep its memory.
            fits = kept.size // 2 <= end <= kept.size
            free = kept.holder is None or kept.holder is holder
            if fits and free and not kept.is_out and not kept.is_spoilt:
                fd = self._open(kept)
                if not kept.is_spoilt:
                    return kept, fd
                os.close(fd)
            if kept.is_spoilt:
                self._drop(kept)
        return None

    def _new(self, pieces: Pieces, end: int) -> Kept:
        if self._events is None:
            self._events = inotify.Events()
        kept = Kept(self._events, pieces, end)
        self._kept.append(kept)
        return kept

    def _open(self, kept: Kept) -> int:
        """Open a file for a jail; the event of that is ours."""
        fd = kept.open()
        kept.is_out = True
        if self._take_in(kept) != [inotify.OPEN]:
            kept.is_spoilt = True
        return fd

    def _take_in(self, own: Kept | None = None) -> list[int]:
        """Read what has happened; return what happened to `own`."""
        if self._events is None:
            return []
        files, found = {kept.watch: kept for kept in self._kept}, []
        for watch, mask in self._events.read():
            if own is not None and watch == own.watch:
                found.append(mask)
            elif watch in files:
                files[watch].happened(mask)
            elif watch < 0:
                for kept in self._kept:
                    kept.is_spoilt = True
        return found

    def _make_room(self, end: int) -> None:
        while self._kept and (
            len(self._kept) >= MOST_FILES
            or self.kept_bytes + end + mmap.PAGESIZE > MOST_BYTES
        ):
            self._drop(min(self._kept, key=lambda kept: kept.used))

    def _can_tell(self) -> bool:
        """Whether this kernel has the seal, and tells of a file what it must."""
        if self._works is None:
            try:
                self._works = _kernel_tells()
            except OSError:
                self._works = False
        return self._works

    def is_gone(self, holder: object) -> None:
        """A jail has ended, with all its processes and all that it wrote read."""
        for kept in [kept for kept in self._kept if kept.holder is holder]:
            if kept.is_shared:
                kept.holder = None
            else:
                self._drop(kept)

    def is_lost(self, holder: object) -> None:
        """What became of a jail is not known."""
        for kept in [kept for kept in self._kept if kept.holder is holder]:
            self._drop(kept)

    def trim(self) -> None:
        """Give back what was not used for a while; called often."""
        if self._kept:
            before = self._clock() - IDLE_S
            for kept in [kept for kept in self._kept if kept.used < before]:
                self._drop(kept)

    def drop_all(self) -> None:
        """Give everything back."""
        for kept in list(self._kept):
            self._drop(kept)
        self._stop()

    def _drop(self, kept: Kept) -> None:
        self._kept.remove(kept)
        kept.close()
        if not self._kept:
            self._stop()

    def _stop(self) -> None:
        if self._events is not None:
            self._events.close()
            self._events = None


def _nothing() -> None:
    """It is filled already."""


def _clear(memory: memoryview, start: int, end: int) -> None:
    for at in range(start, end, _CHUNK):
        stop = min(at + _CHUNK, end)
        memory[at:stop] = bytes(stop - at)


def _kernel_tells() -> bool:
    """Try it: of a file in use, of a mapping alone, of an end, of another opening."""
    probe = Buffers()
    try:
        kept = probe._new([(0, memoryview(b"x"))], 1)
        fd = probe._open(kept)
        try:
            # Holds a duplicate of the descriptor, as the mapping does in the kernel.
            mapping = mmap.mmap(fd, kept.size, mmap.MAP_SHARED, mmap.PROT_READ)
        finally:
            os.close(fd)
        probe._take_in()
        is_out = kept.is_out
        mapping.close()
        probe._take_in()
        is_back = not kept.is_out and not kept.is_spoilt
        os.close(kept.open())
        probe._take_in()
        return is_out and is_back and kept.is_spoilt
    finally:
        probe.drop_all()
