"""The supervisor's side of seccomp user notification, for denied calls only.

A jail's filter sends the calls that it denies here instead of answering them
itself. We write down what was asked and deny it: nothing is ever decided by
what the arguments point to, and no call is ever continued, so there is no race
to win against us. See seccomp_unotify(2).
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raysandbox.profile import Profile

__all__ = ["Listener"]

# struct seccomp_notif: id, pid, flags, then struct seccomp_data: nr, arch,
# instruction_pointer, args[6]. struct seccomp_notif_resp: id, val, error, flags.
_NOTIFICATION = struct.Struct("<QIIiIQ6Q")
_RESPONSE = struct.Struct("<QqiI")
# _IOWR('!', 0, struct seccomp_notif), _IOWR('!', 1, struct seccomp_notif_resp)
_RECV = 0xC0000000 | _NOTIFICATION.size << 16 | ord("!") << 8 | 0
_SEND = 0xC0000000 | _RESPONSE.size << 16 | ord("!") << 8 | 1

#: After this many, a jail's denials are answered slowly: whoever floods us
#: with them waits, and costs the worker next to nothing.
FREE_DENIALS = 64
_TARPIT_S = 0.01
_KEPT = 32


class Listener:
    """One jail's notifications.

    Attributes:
        fd: The notification descriptor.
        denials: The first few denied calls, described.
        count: How many there were.
        killed: The first denied call: with ``action = "kill"`` the one that
            the jail was killed for.
    """

    def __init__(self, fd: int, profile: Profile, kill: Callable[[], None]) -> None:
        self.fd, self._profile, self._kill = fd, profile, kill
        self.denials: list[str] = []
        self.count, self.killed = 0, ""
        # Held while the descriptor is used: closed, its number may be another's.
        self._lock = threading.Lock()

    def handle(self) -> bool:
        """Answer one notification; False when the jail is gone."""
        with self._lock:
            return self.fd >= 0 and self._answer()

    def _answer(self) -> bool:
        buffer = bytearray(_NOTIFICATION.size)
        try:
            fcntl.ioctl(self.fd, _RECV, buffer)
        except OSError as error:
            # ENOENT: the caller was killed meanwhile; ENODEV, EBADF: all are.
            return error.errno in (errno.ENOENT, errno.EINTR)
        cookie, _pid, _flags, number, _arch, _ip, *args = _NOTIFICATION.unpack(buffer)
        self._record(number, args)
        if self._profile.syscalls.action == "kill":
            # Never answered: the caller waits until it is dead.
            self._kill()
            return True
        if self.count > FREE_DENIALS:
            time.sleep(_TARPIT_S)
        answer = bytearray(_RESPONSE.pack(cookie, 0, -errno.EPERM, 0))
        try:
            fcntl.ioctl(self.fd, _SEND, answer)
        except OSError as error:
            return error.errno == errno.ENOENT
        return True

    def _record(self, number: int, args: list[int]) -> None:
        from raysandbox.kernel import seccomp

        self.count += 1
        if len(self.denials) < _KEPT:
            rule = seccomp.rule_for(number, args, self._profile.syscalls)
            text = f"{seccomp.describe(number, args)}: {rule}"
            if text not in self.denials:
                self.denials.append(text)
                self.killed = self.killed or text

    def close(self) -> None:
        """Close the descriptor; calls still waiting fail with ENOSYS."""
        with self._lock:
            if self.fd >= 0:
                os.close(self.fd)
                self.fd = -1
