"""What a jail prints can't speak to Ray's log monitor."""

from __future__ import annotations

import contextlib
import io
import os
import threading

import pytest

from raysandbox.worker.output import Lossy, Output, Pump


def _forwarded(*writes: bytes) -> str:
    sink = io.StringIO()
    output = Output(1 << 16, (sink, io.StringIO()))
    try:
        for each in writes:
            os.write(output.write_fds[0], each)
            output.drain_all()
        output.finish()
    finally:
        output.close()
    return sink.getvalue()


@pytest.mark.parametrize(
    "writes",
    [
        [b":job_id:01000000\nfor another driver\n"],
        [b"first\n:job_id:01000000\n"],
        [b":job", b"_id:01000000\n"],
        [b":", b"task_name:other\n"],
        [b"first\n:", b"actor_name:", b"other\n"],
        [b"first", b"\n:task_name:other\n"],
    ],
)
def test_a_line_of_rays_own_is_not_forwarded_as_one(writes: list[bytes]) -> None:
    """However it is cut into pieces, a magic prefix never starts a line."""
    text = _forwarded(*writes)
    assert ":" in text
    assert not [line for line in text.split("\n") if line.startswith(":")]


def test_other_lines_are_forwarded_as_they_are() -> None:
    """An honest colon stays where it is."""
    assert _forwarded(b":wq\na:job_id:1\n", b"open") == ":wq\na:job_id:1\nopen\n"


def test_what_another_thread_forwards_is_waited_for() -> None:
    """The pump may have taken the last lines out: they count before the answer does."""
    begun, go_on = threading.Event(), threading.Event()

    class Slow(io.StringIO):
        def write(self, text: str) -> int:
            begun.set()
            go_on.wait(10)
            return super().write(text)

    sink = Slow()
    output = Output(1 << 16, (sink, io.StringIO()))
    os.write(output.write_fds[0], b"last words\n")
    (fd, _) = output.read_fds
    pump = threading.Thread(target=output.drain, args=(fd,))
    pump.start()
    assert begun.wait(10)
    threading.Timer(0.2, go_on.set).start()
    output.drain_all()
    assert sink.getvalue() == "last words\n"
    pump.join()
    output.close()


def test_a_full_disk_is_no_error_for_the_worker() -> None:
    """Markers that Ray prints, and what a jail printed, are lost and no more.

    Guards against a worker that ends between a task's answer and its delivery.
    """
    full = open("/dev/full", "w", buffering=1)
    with pytest.raises(OSError, match="No space left"):
        full.write("x\n")
    lossy = Lossy(full)
    print("x", file=lossy, flush=True)
    lossy.writelines(["a\n", "b\n"])
    assert lossy.write("abc\n") == 4
    assert lossy.fileno() == full.fileno()
    output = Output(1 << 20, (lossy, lossy))
    os.write(output.write_fds[0], b"no line end")
    assert output.finish() == len("no line end")
    output.close()
    with contextlib.suppress(OSError):
        full.close()


def test_a_handler_that_fails_does_not_stop_the_pump() -> None:
    """One bad descriptor costs itself alone: other jails' output goes on."""
    seen = threading.Event()
    pump = Pump(lambda: None)
    bad_read, bad_write = os.pipe()
    good_read, good_write = os.pipe()

    def fail() -> bool:
        raise RuntimeError("a handler's own mistake")

    pump.add(bad_read, fail)
    os.write(bad_write, b"x")
    pump.add(good_read, lambda: bool(os.read(good_read, 1)) and not seen.set())
    os.write(good_write, b"x")
    assert seen.wait(10)
    pump.remove(good_read)
    for fd in (bad_read, bad_write, good_read, good_write):
        os.close(fd)


def test_a_number_that_is_used_again_keeps_its_new_handler() -> None:
    """News of a closed descriptor is not taken for news of the next one.

    The pump has both events in its hands when the second descriptor is closed,
    and the next one, as the kernel has it, gets its number.
    """
    turns, entered = threading.Semaphore(0), threading.Semaphore(0)
    seen = threading.Event()
    slow_read, slow_write = os.pipe2(os.O_CLOEXEC)
    old_read, old_write = os.pipe2(os.O_CLOEXEC)

    def slow() -> bool:
        entered.release()
        os.read(slow_read, 1)
        return turns.acquire(timeout=10)

    def new() -> bool:
        os.read(new_read, 1)
        seen.set()
        return True

    pump = Pump(lambda: None)
    pump.add(slow_read, slow)
    pump.add(old_read, lambda: True)
    os.write(slow_write, b"x")
    assert entered.acquire(timeout=10)
    os.write(slow_write, b"x")
    os.close(old_write)  # hung up: both are reported next, in this order
    turns.release()
    assert entered.acquire(timeout=10)
    pump.remove(old_read)
    os.close(old_read)
    new_read, new_write = os.pipe2(os.O_CLOEXEC)
    assert new_read == old_read
    pump.add(new_read, new)
    turns.release()
    # What was in the pump's hands has been handled when this one is.
    os.write(slow_write, b"x")
    assert entered.acquire(timeout=10)
    turns.release()
    os.write(new_write, b"x")
    try:
        assert seen.wait(5), "the new descriptor is not waited for"
    finally:
        for fd in (slow_read, new_read):
            pump.remove(fd)
        for fd in (slow_read, slow_write, new_read, new_write):
            os.close(fd)
