"""Large arguments share memory files, one after the other; never two at a time."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path
from typing import Any

import numpy
import pytest
import ray

import raysandbox

_ITEMS = 1 << 18  # of eight bytes: 2 MiB


def _array(value: int) -> Any:
    return numpy.full(_ITEMS, float(value))


def _files() -> list[int]:
    """Return the inodes of the kept files that this jail maps."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [int(line.split()[4]) for line in lines if "raysandbox-kept" in line]


def _where(array: Any) -> tuple[float, list[int], int]:
    return float(array.sum()), _files(), os.getppid()


def _remote(function: Any, profile: str) -> Any:
    return ray.remote(max_retries=0, resources=raysandbox.tag(profile))(function)


@pytest.mark.parametrize("profile", ["strict", "fast"])
def test_each_task_reads_its_own_argument(profile) -> None:
    """Values come as they were sent, though a file serves several tasks.

    The control: at least one file did.
    """
    task = _remote(_where, profile)
    seen = []
    for value in range(8):
        total, files, _ = ray.get(task.remote(_array(value)), timeout=60)
        assert total == value * _ITEMS
        assert len(files) == 1
        seen += files
    assert len(set(seen)) < len(seen)


class Keeper:
    """Keeps what it gets: a jail that serves one call after the other."""

    def keep(self, array: Any) -> list[int]:
        """Keep an array; return the files that it is in."""
        self.array = array
        return _files()

    def leave(self, array: Any) -> int:
        """Leave a child that has this array and adds it up when it is asked."""
        asked, answer = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            os.read(asked[0], 1)
            os.write(answer[1], str(float(array.sum())).encode())
            os._exit(0)
        self.ask, self.answer, self.child = asked[1], answer[0], child
        return child

    def sums(self, array: Any) -> list[float]:
        """Add up the array that was kept, and this one."""
        return [float(self.array.sum()), float(array.sum())]

    def ask_child(self, array: Any) -> list[float]:
        """Let the child add up its array; add up this one."""
        os.write(self.ask, b"x")
        told = float(os.read(self.answer, 100))
        os.waitpid(self.child, 0)
        return [told, float(array.sum())]

    def files(self, array: Any) -> list[int]:
        """Return the files that this array is in, and those of others."""
        del array
        return _files()


def test_an_array_that_is_kept_stays_as_it_was() -> None:
    """Kept by an actor, or in a child that a method left: the next call's is another.

    Guards against filling a file again because its call has been answered. The
    control: what nobody keeps is filled again.
    """
    keeper = ray.remote(resources=raysandbox.tag("standard"))(Keeper).remote()
    used = [
        tuple(ray.get(keeper.files.remote(_array(1)), timeout=60)) for _ in range(6)
    ]
    assert len(set(used)) < len(used)
    ray.get(keeper.keep.remote(_array(3)))
    ray.get(keeper.leave.remote(_array(4)))
    for value in (5, 6, 7):
        sums = ray.get(keeper.sums.remote(_array(value)))
        assert sums == [3 * _ITEMS, value * _ITEMS]
    assert ray.get(keeper.ask_child.remote(_array(8))) == [4 * _ITEMS, 8 * _ITEMS]
    assert ray.get(keeper.sums.remote(_array(9))) == [3 * _ITEMS, 9 * _ITEMS]
    ray.kill(keeper)


def test_a_task_can_not_change_what_later_ones_get() -> None:
    """Every way to change a file fails that works on an ordinary one in that jail."""

    def attack(array: Any) -> tuple[list[str], list[str], float]:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

        def writable(fd: int) -> int:
            return os.open(f"/proc/self/fd/{fd}", os.O_RDWR)

        def protect(fd: int) -> None:
            del fd
            if libc.mprotect(array.ctypes.data & -4096, 1 << 20, 3) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")
            array.ctypes.data_as(ctypes.POINTER(ctypes.c_double))[0] = -1.0

        ways = {
            "write": lambda fd: os.pwrite(writable(fd), b"y", 0),
            "map": lambda fd: mmap.mmap(writable(fd), 4096),
            "cut": lambda fd: os.ftruncate(writable(fd), 0),
            "mode": lambda fd: os.fchmod(fd, 0o777) or os.pwrite(writable(fd), b"y", 0),
        }
        plain = os.memfd_create("plain")
        os.ftruncate(plain, 4096)
        fds = []
        for name in os.listdir("/proc/self/fd"):
            try:
                if "raysandbox-kept" in os.readlink(f"/proc/self/fd/{name}"):
                    fds.append(int(name))
            except OSError:
                continue
        worked, control = [], []
        for fd, into in ((plain, control), *((fd, worked) for fd in fds)):
            for name, way in ways.items():
                try:
                    way(fd)
                except OSError:
                    continue
                into.append(name)
        try:
            protect(0)
            worked.append("protect")
        except OSError:
            pass
        return control, worked if fds else ["no file"], float(array.sum())

    for profile in ("strict", "fast"):
        control, worked, total = ray.get(
            _remote(attack, profile).remote(_array(2)), timeout=60
        )
        assert control == ["write", "map", "cut", "mode"]
        assert worked == []
        assert total == 2 * _ITEMS
        following = ray.get(_remote(_where, profile).remote(_array(3)), timeout=60)
        assert following[0] == 3 * _ITEMS
