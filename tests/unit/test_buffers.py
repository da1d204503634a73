"""Memory files that a worker fills again: whoever got one sees its own argument alone.

The attacker has what a jail gets: a descriptor. Here it is in this process, with
this user's rights, which is more than any jail has.
"""

from __future__ import annotations

import array
import ctypes
import errno
import functools
import mmap
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from raysandbox import wire
from raysandbox.profile import Profile, load
from raysandbox.worker import buffers, pool

SIZE = buffers.LEAST_BYTES
SECRET = b"\xa5"

libc = ctypes.CDLL(None, use_errno=True)
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
libc.mmap.restype = ctypes.c_void_p
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

PUNCH_HOLE_KEEP_SIZE = 3
MADV_REMOVE = 9


class Clock:
    """A clock that the test moves."""

    now = 100.0

    def __call__(self) -> float:
        """Return its time, in seconds."""
        return self.now


@pytest.fixture
def clock() -> Clock:
    """What the worker's files take for time."""
    return Clock()


@pytest.fixture
def kept(clock: Clock) -> Iterator[buffers.Buffers]:
    """A worker's files; nothing of them stays mapped or open."""
    made = buffers.Buffers(clock)
    made.serve("01")
    yield made
    made.drop_all()
    assert "raysandbox-kept" not in Path("/proc/self/maps").read_text()
    for name in os.listdir("/proc/self/fd"):
        try:
            assert "raysandbox-kept" not in os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue


def lend(
    kept: buffers.Buffers,
    jail: object,
    size: int = SIZE,
    fill: bytes = SECRET,
    *,
    is_shared: bool = True,
) -> int:
    """Lend a file with one argument of this size; return its descriptor."""
    content = [(0, memoryview(fill * size))]
    lent = kept.lend(jail, content, size, is_new=True, is_shared=is_shared)
    assert lent is not None
    lent.fill()
    return lent.fd


def lend_nothing(kept: buffers.Buffers, size: int) -> object:
    """Ask for a file of this size."""
    content = [(0, memoryview(b"x"))]
    return kept.lend("jail", content, size, is_new=True, is_shared=True)


def is_free(kept: buffers.Buffers) -> bool:
    """Whether the kernel knows of nobody who has the one file."""
    kept._take_in()
    file = kept._kept[0]
    return not file.is_out and not file.is_spoilt


def inode(fd: int) -> int:
    """Tell files apart."""
    return os.fstat(fd).st_ino


# -- what the other side can do with its descriptor ----------------------------------


def _writable(fd: int) -> int:
    return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)


def _checked(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _on_writable(act: Callable[[int], object]) -> Callable[[int], None]:
    def attack(fd: int) -> None:
        other = _writable(fd)
        try:
            act(other)
        finally:
            os.close(other)

    return attack


def _made_writable(fd: int) -> None:
    address = libc.mmap(None, SIZE, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    try:
        _checked(libc.mprotect(address, SIZE, mmap.PROT_READ | mmap.PROT_WRITE))
    finally:
        libc.munmap(address, SIZE)


def _removed(fd: int) -> None:
    address = libc.mmap(None, SIZE, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    try:
        _checked(libc.madvise(address, SIZE, MADV_REMOVE))
    finally:
        libc.munmap(address, SIZE)


CHANGES: dict[str, Callable[[int], object]] = {
    "write": _on_writable(lambda fd: os.pwrite(fd, b"y", 0)),
    "shrink": _on_writable(lambda fd: os.ftruncate(fd, 0)),
    "grow": _on_writable(lambda fd: os.ftruncate(fd, 2 * SIZE)),
    "map": _on_writable(lambda fd: mmap.mmap(fd, SIZE).close()),
    "punch a hole": _on_writable(
        lambda fd: _checked(libc.fallocate(fd, PUNCH_HOLE_KEEP_SIZE, 0, 4096))
    ),
    "make a mapping writable": _made_writable,
    "remove pages": _removed,
}


@pytest.mark.parametrize("what", CHANGES)
def test_who_got_a_file_can_not_change_it(what, kept) -> None:
    """Nothing that a descriptor allows changes what the worker maps.

    Guards against forged arguments, and against SIGBUS in the worker, which
    would write behind the end of a file that was cut.
    """
    plain = os.memfd_create("control")
    os.write(plain, SECRET * SIZE)
    CHANGES[what](plain)  # the control: an ordinary memory file
    os.close(plain)
    fd = lend(kept, "jail")
    with pytest.raises(PermissionError) as caught:
        CHANGES[what](fd)
    # By its seals; where we are not root, by the file's mode before that.
    assert caught.value.errno in (errno.EPERM, errno.EACCES)
    assert os.fstat(fd).st_size == SIZE
    assert os.pread(fd, 2 * SIZE, 0) == SECRET * SIZE
    os.close(fd)
    kept.is_gone("jail")
    os.close(lend(kept, "next", fill=b"n"))


def test_the_seals_stand_without_the_files_mode(kept) -> None:
    """A jail with the worker's own user gives itself the mode back: seals stay.

    As root the mode is no wall at all.
    """
    fd = lend(kept, "jail")
    os.fchmod(fd, 0o777)
    other = _writable(fd)
    for act in (
        lambda: os.pwrite(other, b"y", 0),
        lambda: os.ftruncate(other, 0),
        lambda: mmap.mmap(other, SIZE),
        lambda: _checked(libc.fallocate(other, PUNCH_HOLE_KEEP_SIZE, 0, 4096)),
    ):
        with pytest.raises(PermissionError):
            act()
    os.close(other)
    os.close(fd)


# -- who still has it ----------------------------------------------------------------


def _keep_open(fd: int) -> Callable[[], object]:
    other = os.dup(fd)
    return lambda: os.close(other)


def _keep_reopened(fd: int) -> Callable[[], object]:
    other = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    return lambda: os.close(other)


def _keep_mapped(fd: int) -> Callable[[], object]:
    address = libc.mmap(None, SIZE, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    return lambda: libc.munmap(address, SIZE)


def _keep_mapped_privately(fd: int) -> Callable[[], object]:
    address = libc.mmap(None, SIZE, mmap.PROT_READ, mmap.MAP_PRIVATE, fd, 0)
    return lambda: libc.munmap(address, SIZE)


def _keep_last_page(fd: int) -> Callable[[], object]:
    address = libc.mmap(None, SIZE, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    rest = SIZE - mmap.PAGESIZE
    libc.munmap(address, rest)
    return lambda: libc.munmap(address + rest, mmap.PAGESIZE)


def _keep_under_way(fd: int) -> Callable[[], object]:
    ends = socket.socketpair()
    socket.send_fds(ends[0], [b"x"], [fd])
    ends[0].close()
    return ends[1].close


def _keep_in_a_child(fd: int) -> Callable[[], object]:
    address = libc.mmap(None, SIZE, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    child = os.fork()
    if child == 0:
        os.close(fd)
        signal.pause()
    libc.munmap(address, SIZE)

    def end() -> None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

    return end


HOLDS = {
    "a descriptor": _keep_open,
    "a descriptor that it opened itself": _keep_reopened,
    "a mapping": _keep_mapped,
    "a private mapping": _keep_mapped_privately,
    "one page of a mapping": _keep_last_page,
    "a descriptor that is under way": _keep_under_way,
    "a mapping in a child": _keep_in_a_child,
}


@pytest.mark.parametrize("how", HOLDS)
@pytest.mark.parametrize("following", ["the same jail", "another one"])
def test_a_file_that_anybody_still_has_is_not_filled_again(
    how, following, kept
) -> None:
    """The array that a task kept stays as it was, whoever comes next.

    Even if its jail is taken for gone: the kernel is asked each time.
    """
    fd = lend(kept, "the same jail")
    release = HOLDS[how](fd)
    first = inode(fd)
    check = os.dup(fd)
    os.close(fd)
    if following == "another one":
        kept.is_gone("the same jail")
    other = lend(kept, following, fill=b"n")
    assert inode(other) != first
    assert os.pread(check, SIZE, 0) == SECRET * SIZE
    os.close(other)
    # The control: once it lets go, that very file is filled again; but never one
    # that it has opened anew, which it could do any number of times.
    kept.is_gone(following)
    os.close(check)
    release()
    kept.is_gone("the same jail")
    names = set()
    for jail in ("a", "b"):
        again = lend(kept, jail)
        names.add(inode(again))
        os.close(again)
    assert (first in names) == (how != "a descriptor that it opened itself")


@pytest.mark.parametrize("how", ["a path descriptor", "pages in a pipe"])
def test_what_the_kernel_does_not_count_waits_for_the_jails_end(how, kept) -> None:
    """Two ways to come back that no event tells of: a living jail's file is its own.

    Guards against trusting the events alone.
    """
    fd = lend(kept, "jail")
    first = inode(fd)
    if how == "a path descriptor":
        held = [os.open(f"/proc/self/fd/{fd}", os.O_PATH)]
    else:
        held = list(os.pipe())
        os.splice(fd, held[1], 4096, offset_src=0)
    os.close(fd)
    # The control: for the kernel this file is free.
    assert is_free(kept)
    other = lend(kept, "another", fill=b"n")
    assert inode(other) != first
    if how == "a path descriptor":
        back = os.open(f"/proc/self/fd/{held[0]}", os.O_RDONLY)
        assert os.pread(back, SIZE, 0) == SECRET * SIZE
        os.close(back)
    else:
        assert os.read(held[0], 4096) == SECRET * 4096
    os.close(other)
    for each in held:
        os.close(each)
    # Its own jail gets it again, if nobody was seen to open it.
    again = lend(kept, "jail")
    assert (inode(again) == first) == (how != "a path descriptor")
    os.close(again)


def test_a_file_that_could_be_opened_elsewhere_goes_to_its_own_jail_alone(kept) -> None:
    """Where a descriptor can leave a jail and be of use outside, nobody gets its file.

    Guards against one that was sent over a socket by name, made with O_PATH, which
    no event tells of; the control is the same without that.
    """
    seen = []
    for is_shared in (True, False):
        for jail in ("a", "a", "b"):
            fd = lend(kept, jail, is_shared=is_shared)
            seen.append(inode(fd))
            os.close(fd)
            if jail != "a" or len(seen) % 3 == 2:
                kept.is_gone(jail)
        kept.drop_all()
    assert seen[0] == seen[1] == seen[2]
    assert seen[3] == seen[4] != seen[5]


def test_whose_descriptors_can_leave_is_told_by_the_profile() -> None:
    """Only a jail without sockets by name and shared directories keeps what it has."""

    def changed(section: str, **values: object) -> Profile:
        strict = load("strict")
        part = getattr(strict, section).model_copy(update=values)
        return strict.model_copy(update={section: part})

    assert pool._is_alone(load("strict"))
    assert not pool._is_alone(load("standard"))
    for other in (
        changed("filesystem", read=("@python", "/srv")),
        changed("filesystem", write=("@scratch", "/srv")),
        changed("syscalls", allow={"socket": "why"}),
    ):
        assert not pool._is_alone(other)


def test_a_jail_of_unknown_fate_keeps_its_file(kept) -> None:
    """Where nobody says that a jail is gone, its file serves nobody else."""
    fd = lend(kept, "jail")
    first = inode(fd)
    check = os.dup(fd)
    os.close(fd)
    kept.is_lost("jail")
    assert kept.kept_bytes == 0
    other = lend(kept, "another", fill=b"n")
    assert inode(other) != first
    assert os.pread(check, SIZE, 0) == SECRET * SIZE
    os.close(check)
    os.close(other)


# -- what is in it -------------------------------------------------------------------


def test_nothing_of_an_earlier_argument_is_left(kept) -> None:
    """A shorter argument's file holds it and zeros: in gaps and behind the end."""
    fd = lend(kept, "first")
    first = inode(fd)
    # The control: all of the file was the secret.
    assert os.pread(fd, SIZE, 0) == SECRET * SIZE
    os.close(fd)
    kept.is_gone("first")
    end = SIZE // 2 + 4096 + 3
    contents = {0: b"t" * 24, 128: b"a", 4096: b"b" * (end - 4096)}
    file = kept._kept[0]
    file.fill([(at, memoryview(content)) for at, content in contents.items()], end)
    fd = file.open()
    assert inode(fd) == first
    expected = bytearray(SIZE)
    for at, content in contents.items():
        expected[at : at + len(content)] = content
    assert os.pread(fd, 2 * SIZE, 0) == expected
    os.close(fd)
    # And when a longer one comes after it, once more.
    file.fill([(0, memoryview(b"c" * SIZE))], SIZE)
    fd = file.open()
    assert os.pread(fd, SIZE, 0) == b"c" * SIZE
    os.close(fd)


def test_what_a_failed_copy_left_is_cleared_by_the_next(kept) -> None:
    """An argument whose copy broke off in the middle is not the next one's tail."""
    os.close(lend(kept, "first", fill=b"1"))
    file = kept._kept[0]
    bad = memoryview(b"x" * SIZE).cast("H")  # not bytes: can't be copied as such
    with pytest.raises(ValueError, match="different structures"):
        file.fill([(0, memoryview(SECRET * (SIZE // 2))), (SIZE // 2, bad)], SIZE)
    file.fill([(0, memoryview(b"3" * 100))], 100)
    fd = file.open()
    assert os.pread(fd, SIZE, 0) == b"3" * 100 + bytes(SIZE - 100)
    os.close(fd)


def test_another_jobs_argument_comes_in_another_file(kept) -> None:
    """A change of the job leaves nothing: not mapped, not open, not filled again."""
    fd = lend(kept, "jail")
    first = inode(fd)
    kept.is_gone("jail")
    kept.serve("01")  # the control: the same job keeps it
    assert kept.kept_bytes == SIZE
    kept.serve("02")
    assert kept.kept_bytes == 0
    os.close(fd)
    fd = lend(kept, "jail")
    assert inode(fd) != first
    os.close(fd)


# -- how much ------------------------------------------------------------------------


def test_what_is_kept_has_a_bound(kept) -> None:
    """However many arguments of whatever size come, and whoever keeps them."""
    held = []
    for round_ in range(12):
        fd = lend(kept, object(), size=(1 + round_ % 3) * SIZE + round_)
        if round_ % 2:
            held.append(fd)
        else:
            os.close(fd)
        assert len(kept._kept) <= buffers.MOST_FILES
        assert kept.kept_bytes <= buffers.MOST_BYTES
    for fd in held:
        os.close(fd)


def test_sizes_that_are_not_worth_it_or_too_much_are_not_kept(kept) -> None:
    """Small ones cost little; one over the bound gets a file of its own."""
    for size in (buffers.LEAST_BYTES - 1, buffers.MOST_BYTES + 1):
        assert lend_nothing(kept, size) is None
    assert kept.kept_bytes == 0


def test_what_is_not_used_is_given_back(kept, clock) -> None:
    """A worker that gets no large argument for a while keeps no memory for one."""
    os.close(lend(kept, "jail"))
    clock.now += buffers.IDLE_S - 0.1
    kept.trim()
    assert kept.kept_bytes == SIZE
    clock.now += 0.2
    kept.trim()
    assert kept.kept_bytes == 0
    assert "raysandbox-kept" not in Path("/proc/self/maps").read_text()


def test_a_kernel_that_can_not_tell_keeps_nothing(kept, monkeypatch) -> None:
    """Where no event comes, or not each of them, no file is filled again."""
    monkeypatch.setattr(buffers.Kept, "happened", lambda _self, _mask: None)
    assert lend_nothing(kept, SIZE) is None
    assert kept.kept_bytes == 0


# -- over the socket -----------------------------------------------------------------

TAKE = {"limit_bytes": 4 * SIZE, "max_parts": 8}


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The worker's end and the jail's."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield ends
    for end in ends:
        end.close()


def test_a_kept_file_arrives_and_no_worker_takes_one(kept, pair) -> None:
    """A jail reads its parts; a worker refuses what its sender could change.

    The first time it comes filled, then ahead: both read the same.
    """
    worker, jail = pair
    parts = [b"meta", b"", os.urandom(SIZE)]
    lend_it = functools.partial(kept.lend, "jail", is_new=True, is_shared=True)
    files = set()
    for _ in range(3):
        wire.send(worker, wire.CALL, 1, parts, lend_it)
        frame = wire.receive(jail, takes_kept=True, **TAKE)
        assert frame is not None
        assert [bytes(part) for part in frame.parts] == parts
        assert all(part.readonly for part in frame.parts)
        files.add(inode(kept._kept[0]._fd))
        del frame  # and its mapping with it: the file is free again
    assert len(files) == len(kept._kept) == 1
    kept.drop_all()
    for _ in range(2):
        wire.send(jail, wire.RESULT, 1, parts, lend_it)
        with pytest.raises(wire.WireError, match="unknown flags"):
            wire.receive(worker, **TAKE)


def test_a_file_comes_ahead_only_where_nobody_reads_what_is_in_it(kept) -> None:
    """Not to a jail in which code of a user runs and that had not this argument.

    Guards against a thread that an earlier task left in its jail, and that reads
    what another jail's task got before the next call's argument is over it.
    """

    def ahead(jail: str, *, is_new: bool) -> bool:
        content = memoryview(SECRET * SIZE)
        lent = kept.lend(jail, [(0, content)], SIZE, is_new=is_new, is_shared=True)
        assert lent is not None
        lent.fill()
        os.close(lent.fd)
        return lent.is_ahead

    assert not ahead("first", is_new=True)  # a new file comes filled
    assert ahead("first", is_new=False)  # its own argument
    kept.is_gone("first")
    assert not ahead("old", is_new=False)
    kept.is_gone("old")
    assert ahead("new", is_new=True)  # the control
    assert len(kept._kept) == 1


@pytest.mark.parametrize("what", ["two of them", "another length", "another body"])
def test_a_body_is_the_one_that_was_announced(what, kept, pair) -> None:
    """What follows a file that came ahead is its own frame and no other."""
    worker, jail = pair
    content = [(0, memoryview(bytes(SIZE)))]
    lent = kept.lend("jail", content, SIZE, is_new=True, is_shared=True)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [lent.fd]))]

    def packet(flags: int, size: int = SIZE) -> bytes:
        return wire._HEADER.pack(b"RSB1", wire.CALL, flags, 0, 1, 0, size)

    worker.sendmsg([packet(wire._AHEAD)], rights)
    if what == "two of them":
        worker.sendmsg([packet(wire._AHEAD)], rights)
    elif what == "another length":
        worker.sendmsg([packet(wire._IN_KEPT, SIZE - 1)])
    else:
        worker.sendmsg([packet(wire._IN_KEPT)], rights)
    with pytest.raises(wire.WireError):
        wire.receive(jail, takes_kept=True, **TAKE)
    os.close(lent.fd)
