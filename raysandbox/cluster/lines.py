"""A file that grows by whole lines: what a crash or a full disk leaves of one goes."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["LineFile"]

# From the end of a file, where a line that a crash cut off is looked for.
_TAIL_BYTES = 1 << 20


class LineFile:
    """Appends lines; one process writes it.

    Args:
        path: The file; made with mode 0600.

    Attributes:
        fd: Its descriptor.
        end: Its size in bytes, were it ours alone to change.
        torn: The piece of a line that was at its end, taken out; or ``b""``.

    Raises:
        OSError: It can't be opened, or is a link.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        self.path, self.fd = path, os.open(path, flags, 0o600)
        self.end = os.fstat(self.fd).st_size
        start = max(0, self.end - _TAIL_BYTES)
        data = os.pread(self.fd, self.end - start, start)
        self.torn = data[data.rfind(b"\n") + 1 :]
        if self.torn:
            self.end -= len(self.torn)
            os.ftruncate(self.fd, self.end)

    def append(self, lines: bytes) -> None:
        """Append whole lines, all or none.

        Raises:
            OSError: Nothing of them is in the file.
        """
        self.settle()
        try:
            view = memoryview(lines)
            while view:
                view = view[os.write(self.fd, view) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self.fd, self.end)
            raise
        self.end += len(lines)

    def settle(self) -> None:
        """Take out what an earlier failure left and could not take back.

        Raises:
            OSError: It is still there.
        """
        if os.fstat(self.fd).st_size != self.end:
            os.ftruncate(self.fd, self.end)

    def is_in_place(self) -> bool:
        """Whether the file that has our name is still this one."""
        mine = os.fstat(self.fd)
        try:
            there = os.stat(self.path, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)

    def close(self) -> None:
        """Close it."""
        os.close(self.fd)
