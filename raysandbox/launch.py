"""Start ``raysandbox-launch`` with a plan, and read what it reports.

The launcher is the monitor of what it starts: it dies last, and takes all of
it down when its owner's end of the life pipe closes.
"""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from raysandbox.errors import ProfileError, SetupError, UnsupportedError
from raysandbox.native import library_path
from raysandbox.plan import IdRange, Plan

__all__ = [
    "IdLease",
    "Launched",
    "Outcome",
    "is_readable",
    "is_worker_id",
    "launcher_path",
    "lease_ids",
    "program_path",
    "start",
    "worker_ids",
]

EXIT_SETUP = 125

# Above all ranges that systemd and /etc/subuid hand out (systemd.io/UIDS-GIDS).
_DEFAULT_RANGE = (0x70000000, 65536)
_IDS_PER_LAUNCH = 4
_LOCK_DIR = "/run/raysandbox/ids"


def launcher_path() -> str:
    """Return the path of the launcher.

    Raises:
        SetupError: It is not installed: the wheel was built without it.
    """
    return program_path("launch")


def program_path(name: str) -> str:
    """Return the path of one of our programs: launch, worker or node.

    Raises:
        SetupError: As `launcher_path`.
    """
    path = os.path.join(os.path.dirname(library_path()), f"raysandbox-{name}")
    for needed in (path, library_path()):
        if not os.access(needed, os.R_OK):
            raise SetupError(
                step="launcher",
                detail=f"{needed} is missing: install the raysandbox wheel, or run "
                "`make native` in a source tree",
            )
    return path


@dataclass(slots=True)
class IdLease:
    """Host ids that nobody else uses while the lock is held.

    Attributes:
        ids: The ids; one (the caller's) for an ordinary user.
        lock_fd: Open lock file to pass to the launcher, or -1.
    """

    ids: IdRange
    lock_fd: int = -1

    def close(self) -> None:
        """Give up this process's hold; the launcher's own stays."""
        if self.lock_fd >= 0:
            os.close(self.lock_fd)
            self.lock_fd = -1


def _configured_range() -> tuple[int, int]:
    text = os.environ.get("RAYSANDBOX_UID_RANGE")
    if not text:
        return _DEFAULT_RANGE
    match = re.fullmatch(r"([0-9]{1,10}):([0-9]{1,10})", text)
    if match is not None:
        first, count = int(match[1]), int(match[2])
        # Never ids of people or of the system, whatever was configured.
        if first >= 65536 and _IDS_PER_LAUNCH <= count <= 0xFFFFFFFE - first:
            return first, count
    raise ProfileError(
        source="RAYSANDBOX_UID_RANGE",
        value=text,
        reason="must be FIRST:COUNT with FIRST of at least 65536 and COUNT of at "
        f"least {_IDS_PER_LAUNCH}",
    )


def _refuse_unmapped(first: int, count: int) -> None:
    """Refuse ids that this user namespace does not have; see user_namespaces(7)."""
    for name in ("uid_map", "gid_map"):
        with open(f"/proc/self/{name}") as file:
            ranges = [tuple(map(int, line.split())) for line in file]
        if not any(
            start <= first and first + count <= start + length
            for start, _, length in ranges
        ):
            shown = ", ".join(f"{r[0]} to {r[0] + r[2] - 1}" for r in ranges)
            raise UnsupportedError(
                feature="own host user",
                need=f"ids {first} to {first + count - 1} for jails",
                have=f"only {shown} in this user namespace ({name})",
                remedy="set RAYSANDBOX_UID_RANGE to some of those, map more ids, or "
                "start as an ordinary user",
            )


def _split_range() -> tuple[IdRange, IdRange]:
    """Return the ids of launches and those of Ray workers: a quarter."""
    first, count = _configured_range()
    launches = count - count // 4
    return IdRange(first, launches), IdRange(first + launches, count // 4)


def is_worker_id(number: int) -> bool:
    """Say whether a host id is one that a single Ray worker has for itself."""
    ids = _split_range()[1]
    return ids.first <= number < ids.first + ids.count


def worker_ids() -> tuple[IdRange, str]:
    """Return the host ids of Ray workers, and the file that says whose they are.

    Raises:
        SetupError: The file's directory can't be made, or the range is too small.
    """
    ids = _split_range()[1]
    if ids.count < 2:
        raise SetupError(
            step="worker_ids", detail="RAYSANDBOX_UID_RANGE has fewer than 8 ids"
        )
    _make_lock_dir()
    return ids, f"{_LOCK_DIR}/workers-{ids.first}"


def _make_lock_dir() -> None:
    try:
        os.makedirs(_LOCK_DIR, mode=0o700, exist_ok=True)
    except OSError as error:
        raise SetupError(
            step="lease_ids", errno=error.errno or 0, detail=_LOCK_DIR
        ) from error


def lease_ids() -> IdLease:
    """Take host ids for one launch: its root's and its jails'.

    Raises:
        SetupError: All of the range is in use, or the locks can't be made.
        ProfileError: ``RAYSANDBOX_UID_RANGE`` is no range.
        UnsupportedError: We are root of a user namespace without these ids.
    """
    if os.geteuid() != 0:
        return IdLease(IdRange(os.geteuid(), 1))
    ids = _split_range()[0]
    _refuse_unmapped(ids.first, ids.count)
    _make_lock_dir()
    last = ids.first + ids.count - _IDS_PER_LAUNCH
    try:
        for start_id in range(ids.first, last + 1, _IDS_PER_LAUNCH):
            fd = os.open(
                f"{_LOCK_DIR}/{start_id}",
                os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW,
                0o600,
            )
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                continue
            return IdLease(IdRange(start_id, _IDS_PER_LAUNCH), fd)
    except OSError as error:
        raise SetupError(
            step="lease_ids", errno=error.errno or 0, detail=_LOCK_DIR
        ) from error
    raise SetupError(
        step="lease_ids",
        detail=f"all {ids.count} host ids from {ids.first} are in use by other jails; "
        "set RAYSANDBOX_UID_RANGE to a larger range",
    )


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a launch ended.

    Attributes:
        exit_code: The launcher's exit status: the command's, 128+N for signal
            N, 124 for the wall time, 125 for a failed set-up.
        signal: The signal that ended the command, or 0.
        timed_out: Whether the wall time ran out.
    """

    exit_code: int
    signal: int = 0
    timed_out: bool = False


@dataclass(slots=True)
class Launched:
    """A running launcher.

    Attributes:
        process: The monitor, or what forked it.
        is_zygote: The monitor is not our child, and ends with the life pipe.
    """

    process: subprocess.Popen[bytes]
    status_fd: int
    life_fd: int
    is_zygote: bool = False
    _status: bytes = field(default=b"")

    def wait(self, timeout_s: float | None = None) -> Outcome:
        """Wait for the end.

        Raises:
            SetupError: A step of the set-up failed; nothing was run.
            subprocess.TimeoutExpired: It is still running.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        # A zygote's monitor is not our child: its end of the pipe tells.
        if self.is_zygote and not self._drain(deadline):
            raise subprocess.TimeoutExpired(self.process.args, timeout_s or 0.0)
        code = self.process.wait(timeout_s)
        self._drain(deadline)
        self.close()
        lines = self._status.decode("utf-8", "replace").splitlines()
        words = [line.split(" ", 3) for line in lines]
        for word in words:
            if word[0] == "error":
                raise SetupError(
                    step=word[1], errno=int(word[2]), detail="".join(word[3:])
                )
        exits = [int(word[1]) for word in words if word[0] == "exit"]
        if self.is_zygote:
            code = exits[0] if exits else EXIT_SETUP
        if code == EXIT_SETUP and not exits:
            raise SetupError(step="launch", detail="the launcher died unheard")
        number = next((int(word[1]) for word in words if word[0] == "signal"), 0)
        if code < 0:
            return Outcome(128 - code, -code)
        return Outcome(code, number, ["timeout"] in words)

    def _drain(self, deadline: float | None) -> bool:
        """Read what the launcher says up to its end; False if time is up first."""
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not is_readable(self.status_fd, left):
                return False
            chunk = os.read(self.status_fd, 4096)
            if not chunk:
                return True
            self._status += chunk

    def ended(self, timeout_s: float) -> bool:
        """Wait for the inside's end; its cgroups stay until :meth:`wait`.

        For launches that linger only.
        """
        deadline = time.monotonic() + timeout_s
        while b"ended\n" not in self._status:
            left = max(0.0, deadline - time.monotonic())
            if not is_readable(self.status_fd, left):
                return False
            chunk = os.read(self.status_fd, 4096)
            if not chunk:
                break  # it never came so far
            self._status += chunk
        return True

    def release(self) -> None:
        """Let a launch that lingers remove its cgroups and exit."""
        if self.life_fd >= 0:
            os.close(self.life_fd)
            self.life_fd = -1

    def kill(self, number: int = signal.SIGTERM) -> None:
        """End the inside; the monitor cleans up after it and exits 128+number."""
        if self.is_zygote:
            self.release()
        elif self.process.poll() is None:
            self.process.send_signal(number)

    def close(self) -> None:
        """Close our ends; an inside that still runs is ended by that."""
        for name in ("status_fd", "life_fd"):
            fd = getattr(self, name)
            if fd >= 0:
                os.close(fd)
                setattr(self, name, -1)


def is_readable(fd: int, timeout_s: float | None) -> bool:
    """Wait until something can be read, or the time is up; None waits for ever.

    Not select(2), which can't see a descriptor above 1023, and a busy worker has
    thousands.
    """
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))


def start(
    plan: Plan,
    command: Sequence[str],
    *,
    lease: IdLease,
    zygote: bool = False,
    linger: bool = False,
    keep_fds: Sequence[int] = (),
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
) -> Launched:
    """Start the launcher; the inside may still fail to come up (see ``wait``).

    Args:
        plan: What to enforce.
        command: Program and arguments, as seen inside.
        lease: Host ids; the launcher holds the lock from here on too.
        zygote: The command is a zygote: outer walls only.
        linger: Its cgroups stay until :meth:`Launched.release`.
        keep_fds: Descriptors that the inside keeps, under the same numbers.
        stdin: Descriptor, as for subprocess; None to inherit.
        stdout: As stdin.
        stderr: As stdin.

    Raises:
        SetupError: The launcher is missing or can't be started.
    """
    fds: list[int] = []
    try:
        plan_fd = os.memfd_create("raysandbox-plan", os.MFD_CLOEXEC)
        fds.append(plan_fd)
        os.write(plan_fd, plan.encode())
        status_read, status_write = os.pipe()
        fds += [status_read, status_write]
        life_read, life_write = os.pipe()
        fds += [life_read, life_write]
        arguments = [
            launcher_path(),
            f"--plan-fd={plan_fd}",
            f"--status-fd={status_write}",
            f"--life-fd={life_read}",
            *(f"--keep-fd={fd}" for fd in keep_fds),
        ]
        if zygote:
            arguments.append("--zygote")
        if linger:
            arguments.append("--linger")
        passed = [plan_fd, status_write, life_read, *keep_fds]
        if lease.lock_fd >= 0:
            passed.append(lease.lock_fd)
        process = subprocess.Popen(
            [*arguments, "--", *command],
            pass_fds=passed,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            close_fds=True,
        )
        fds.remove(status_read)
        fds.remove(life_write)
    except OSError as error:
        # No descriptor, no process, no memory left for us: the host's business.
        raise SetupError(
            step="start_launcher", errno=error.errno or 0, detail=error.filename or ""
        ) from error
    finally:
        for fd in fds:
            os.close(fd)
    return Launched(process, status_read, life_write, zygote)
