"""What a jail prints can't speak to Ray's log monitor."""

from __future__ import annotations

import io
import os

import pytest

from raysandbox.worker.output import Output


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
