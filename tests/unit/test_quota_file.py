"""The file of a job's counts, which workers with users of their own make and open."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from raysandbox.worker.quota import JobFile, usage_of

ROUNDS, WORKERS, FIRST_ID = 200, 6, 60_000


def _worker(directory: Path, uid: int, begin: int, done: int) -> None:
    """Open each file the moment that its turn comes; say what became of it."""
    os.chdir(directory)  # which these users could not walk to
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    for number in range(ROUNDS):
        os.read(begin, 1)
        try:
            JobFile(f"./{number:08x}").close()
        except BaseException as error:
            os.write(done, f"{type(error).__name__}: {error}\n".encode())
        else:
            os.write(done, b"made\n")


@pytest.mark.root
def test_workers_of_other_users_that_make_it_at_once_share_it(tmp_path):
    """None finds it before its mode is that of a shared file; nothing else is left."""
    directory = tmp_path / "quota"
    directory.mkdir()
    directory.chmod(0o777)
    done, done_inside = os.pipe()
    begins, pids = [], []
    for index in range(WORKERS):
        begin_inside, begin = os.pipe()
        pid = os.fork()
        if pid == 0:
            signal.alarm(60)
            try:
                _worker(directory, FIRST_ID + index, begin_inside, done_inside)
            finally:
                os._exit(0)
        os.close(begin_inside)
        begins.append(begin)
        pids.append(pid)
    os.close(done_inside)
    with open(done) as answers:
        for _ in range(ROUNDS):
            for begin in begins:
                os.write(begin, b"x")
            for _ in begins:
                assert answers.readline() == "made\n"
    for begin, pid in zip(begins, pids, strict=True):
        os.close(begin)
        os.waitpid(pid, 0)
    names = sorted(entry.name for entry in directory.iterdir())
    assert names == [f"{number:08x}" for number in range(ROUNDS)]
    assert {(directory / name).stat().st_mode & 0o777 for name in names} == {0o666}
    assert usage_of(str(directory / names[0])).argument_bytes == 0


def test_it_is_its_owners_where_the_directory_is(tmp_path):
    """As where raylet is no root and all workers have its user."""
    path = tmp_path / "01000000"
    JobFile(str(path)).close()
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["01000000"]
