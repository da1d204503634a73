"""Landlock: what each ABI has, and that the running kernel agrees."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from raysandbox.kernel import landlock
from tests.require import require

# Documentation/userspace-api/landlock.rst, "Previous limitations".
HISTORY = [
    # ABI, rights on files, on TCP, scopes
    (1, 13, 0, 0),
    (2, 14, 0, 0),
    (3, 15, 0, 0),
    (4, 15, 2, 0),
    (5, 16, 2, 0),
    (6, 16, 2, 2),
    (7, 16, 2, 2),
]


@pytest.mark.parametrize(("abi", "files", "ports", "scopes"), HISTORY)
def test_each_abi_governs_what_its_kernel_has(abi, files, ports, scopes) -> None:
    """A right that the kernel does not know would make it refuse the ruleset."""
    governed = landlock.handled(abi)
    assert governed.fs == (1 << files) - 1
    assert governed.net == (1 << ports) - 1
    assert governed.scoped == (1 << scopes) - 1


@pytest.mark.parametrize("abi", [0, -1])
def test_no_landlock_governs_nothing(abi) -> None:
    """And is never taken for some."""
    assert landlock.handled(abi) == (0, 0, 0)


def test_a_later_abi_is_used_as_the_last_known() -> None:
    """A kernel of the year after next still gets all that we know."""
    assert landlock.handled(99) == landlock.handled(7)


def test_abis_only_add() -> None:
    """What a later kernel governs includes what an earlier one did."""
    for abi in range(1, 7):
        older, newer = landlock.handled(abi), landlock.handled(abi + 1)
        assert all(a & b == a for a, b in zip(older, newer))


def test_groups_of_rights_are_apart() -> None:
    """Reading never allows a change, writing never makes a device or its ioctls."""
    assert landlock.READ & landlock.WRITE_FILE == 0
    assert landlock.READ == landlock.EXECUTE | landlock.READ_FILE | landlock.READ_DIR
    devices = 1 << 6 | 1 << 11 | landlock.IOCTL_DEV  # MAKE_CHAR, MAKE_BLOCK
    assert landlock.WRITE & devices == 0
    assert landlock.WRITE | devices == landlock.handled(7).fs
    # READ_DIR, REMOVE_*, MAKE_* and REFER make no sense on a file.
    assert landlock.FILE_RIGHTS & landlock.READ_DIR == 0


def test_the_kernel_takes_the_table_for_its_abi() -> None:
    """All that the table says is accepted, and one bit more is not."""
    require("landlock")
    libc = ctypes.CDLL(None, use_errno=True)
    abi = landlock.abi_version()
    governed = landlock.handled(abi)

    def create(*masks: int) -> int:
        attr = (ctypes.c_uint64 * 3)(*masks)
        fd = libc.syscall(444, attr, ctypes.c_size_t(24), 0)
        if fd >= 0:
            os.close(fd)
        return int(fd)

    assert create(*governed) >= 0
    if abi <= 7:
        assert create(governed.fs + 1, 0, 0) == -1
        assert create(1, governed.net + 1, 0) == -1
        assert create(1, 0, governed.scoped + 1) == -1


def in_child(act: Callable[[], None]) -> int:
    """Run ``act`` in a fresh process; return 0, or the errno it failed with."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            act()
            code = 0
        except OSError as error:
            code = error.errno or 98
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _pairs(tmp_path: Path) -> dict[str, Callable[[], object]]:
    inside, outside = tmp_path / "in", tmp_path / "out"
    for directory in (inside, outside):
        directory.mkdir()
        (directory / "file").write_text("x")
    return {
        "read inside": (inside / "file").read_text,
        "read outside": (outside / "file").read_text,
        "write inside": lambda: (inside / "file").write_text("y"),
        "list outside": lambda: os.listdir(outside),
        "truncate outside": lambda: os.truncate(outside / "file", 0),
        "link out": lambda: os.link(inside / "file", outside / "link"),
    }


@pytest.mark.parametrize(
    ("what", "access", "code"),
    [
        ("read inside", landlock.READ, 0),
        ("write inside", landlock.READ, 13),
        ("write inside", landlock.READ | landlock.WRITE, 0),
        ("read outside", landlock.READ, 13),
        ("list outside", landlock.READ, 13),
        ("truncate outside", landlock.READ | landlock.WRITE, 13),
        ("link out", landlock.READ | landlock.WRITE, 13),
    ],
)
def test_restrict_self_denies_what_is_not_named(what, access, code, tmp_path) -> None:
    """Each works before, and is denied after with its exact errno."""
    require("landlock:3")
    act = _pairs(tmp_path)[what]
    assert in_child(lambda: act() and None) == 0
    (tmp_path / "out" / "link").unlink(missing_ok=True)

    def restricted() -> None:
        landlock.restrict_self({str(tmp_path / "in"): access})
        act()

    assert in_child(restricted) == code


def test_an_older_abi_still_denies(tmp_path) -> None:
    """Governing what ABI 1 has is what a kernel of 2021 enforces."""
    require("landlock")
    (tmp_path / "in").mkdir()
    (tmp_path / "file").write_text("x")

    def restricted() -> None:
        landlock.restrict_self({str(tmp_path / "in"): landlock.READ}, abi=1)
        (tmp_path / "file").read_text()

    assert in_child(restricted) == 13


def test_a_process_with_threads_is_refused() -> None:
    """The rules would hold for one of them."""
    import threading

    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    with pytest.raises(RuntimeError, match="one of several threads"):
        landlock.restrict_self({"/": landlock.READ})
    stop.set()
    thread.join()
