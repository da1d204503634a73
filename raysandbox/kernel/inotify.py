"""inotify: what happens to files, told in order. See inotify(7)."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator

__all__ = ["CLOSE_NOWRITE", "CLOSE_WRITE", "OPEN", "Events"]

CLOSE_WRITE, CLOSE_NOWRITE, OPEN = 0x8, 0x10, 0x20

# struct inotify_event: watch (-1: events were lost), mask, cookie, length of a name.
_EVENT = struct.Struct("<iIII")
_BUFFER_BYTES = 64 << 10


class Events:
    """One instance: the files that are watched, and what is still to be read."""

    def __init__(self) -> None:
        """Make one.

        Raises:
            OSError: The user has too many (EMFILE), or it may not.
        """
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._checked(self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))

    def watch(self, fd: int, mask: int) -> int:
        """Watch the file behind a descriptor, until it is gone; return its number.

        Raises:
            OSError: It can't be watched.
        """
        path = f"/proc/self/fd/{fd}".encode()
        return self._checked(
            self._libc.inotify_add_watch(self._fd, path, ctypes.c_uint32(mask))
        )

    def read(self) -> Iterator[tuple[int, int]]:
        """Yield (number, mask) of what has happened; -1: events were lost.

        Of the same event twice in a row the kernel tells one.
        """
        while True:
            try:
                data = os.read(self._fd, _BUFFER_BYTES)
            except BlockingIOError:
                return
            at = 0
            while at < len(data):
                watch, mask, _, length = _EVENT.unpack_from(data, at)
                at += _EVENT.size + length
                yield watch, mask

    def close(self) -> None:
        """Watch nothing any more."""
        os.close(self._fd)

    @staticmethod
    def _checked(result: int) -> int:
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return result
