"""The audit log: what an attack on its files leaves to see."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysandbox.cluster.audit import (
    PER_CALLER,
    PER_FOLD,
    AuditLog,
    Fold,
    plain,
    query,
    tail_problem,
    verify,
)
from raysandbox.cluster.errors import ClusterError
from tests.require import require
from tests.unit.small_disk import run_on_small_disk

RECORD = {"who": "driver/alice", "method": "/ray.rpc.X/Put", "object": "k", "ok": True}


def _record(index: int, **more: object) -> dict[str, object]:
    return {"t": time.time(), **RECORD, "object": f"key{index:04d}", **more}


def _fill(path: Path, count: int, rotate: int = 1 << 30, keep: int = 99) -> None:
    log = AuditLog(path, rotate, keep)
    for index in range(count):
        log.append([_record(index)])
    log.close()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A log of 40 lines in several files."""
    path = tmp_path / "audit"
    _fill(path, 40, rotate=2000)
    assert len(list(path.glob("audit-*.jsonl"))) >= 3
    assert verify(path).lines == 40
    return path


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines(keepends=True)


def _middle(path: Path) -> Path:
    return sorted(path.glob("audit-*.jsonl"))[1]


def _change(path: Path) -> None:
    file = _middle(path)
    file.write_text(file.read_text().replace("driver/alice", "driver/bobby", 1))


def _rehash(path: Path) -> None:
    """Change a line and give it a hash that fits its own predecessor."""
    import hashlib

    file = _middle(path)
    lines = _lines(file)
    before = json.loads(lines[0])["h"]
    body, _, _ = lines[1].replace("alice", "mallo").rpartition(',"h":"')
    body += "}"
    digest = hashlib.sha256(f"{before}\n{body}".encode()).hexdigest()
    lines[1] = f'{body[:-1]},"h":"{digest}"}}\n'
    file.write_text("".join(lines))


def _delete(path: Path) -> None:
    file = _middle(path)
    lines = _lines(file)
    file.write_text("".join(lines[:2] + lines[3:]))


def _reorder(path: Path) -> None:
    file = _middle(path)
    lines = _lines(file)
    lines[1], lines[2] = lines[2], lines[1]
    file.write_text("".join(lines))


def _duplicate(path: Path) -> None:
    file = _middle(path)
    lines = _lines(file)
    file.write_text("".join([*lines[:2], lines[1], *lines[2:]]))


def _half(path: Path) -> None:
    file = _middle(path)
    file.write_text(file.read_text()[:-30])


def _junk(path: Path) -> None:
    file = _middle(path)
    file.write_bytes(file.read_bytes() + b"\xff\x00[1]\n")


def _drop_middle(path: Path) -> None:
    _middle(path).unlink()


def _drop_oldest(path: Path) -> None:
    sorted(path.glob("audit-*.jsonl"))[0].unlink()


def _drop_closed(path: Path) -> None:
    for file in path.glob("audit-*.jsonl"):
        file.unlink()


def _cut_lines(path: Path) -> None:
    file = path / "audit.jsonl"
    file.write_text("".join(_lines(file)[:-1]))


def _cut_file(path: Path) -> None:
    (path / "audit.jsonl").unlink()


def _cut_mid_line(path: Path) -> None:
    file = path / "audit.jsonl"
    file.write_text(file.read_text()[:-10])


def _empty(path: Path) -> None:
    (path / "audit.jsonl").write_text("")


def _replay_file(path: Path) -> None:
    """Put an older closed file in the place of the current one."""
    shutil.copy(_middle(path), path / "audit.jsonl")


def _drop_head(path: Path) -> None:
    (path / "head.json").unlink()


def _bad_head(path: Path) -> None:
    (path / "head.json").write_text('{"n": "40", "h": 3}')


def _first_line(path: Path) -> None:
    """Change the very first line and drop those before it: none."""
    file = sorted(path.glob("audit-*.jsonl"))[0]
    file.write_text(file.read_text().replace("key0000", "key9999", 1))


@pytest.mark.parametrize(
    "attack",
    [
        _change, _rehash, _delete, _reorder, _duplicate, _half, _junk, _drop_middle,
        _drop_oldest, _drop_closed, _cut_lines, _cut_file, _cut_mid_line, _empty,
        _replay_file, _drop_head, _bad_head, _first_line,
    ],
    ids=lambda f: f.__name__.strip("_"),
)  # fmt: skip
def test_tampering_is_seen(log: Path, attack: Callable[[Path], None]) -> None:
    """Each way of changing the files breaks verification, which held before."""
    attack(log)
    with pytest.raises(ClusterError):
        verify(log)


def test_older_copy_of_everything_needs_an_anchor(tmp_path: Path) -> None:
    """A whole directory put back as it was passes the chain alone.

    It fails with an anchor or a hash that was noted elsewhere.
    """
    path, anchors = tmp_path / "audit", tmp_path / "elsewhere"
    first = AuditLog(path, 1 << 30, 9, anchors)
    first.append([_record(1)])
    first.close()
    shutil.copytree(path, tmp_path / "old")
    second = AuditLog(path, 1 << 30, 9, anchors)
    second.append([_record(2)])
    second.close()
    noted = verify(path, anchors=anchors)
    assert noted.anchors >= 2
    assert verify(path, noted.hash).last == 2
    shutil.rmtree(path)
    shutil.copytree(tmp_path / "old", path)
    assert verify(path).lines == 1
    with pytest.raises(ClusterError, match="cut off, or an older copy"):
        verify(path, anchors=anchors)
    with pytest.raises(ClusterError, match="no line has the hash"):
        verify(path, noted.hash)


def test_log_written_anew_fails_against_the_anchor(tmp_path: Path) -> None:
    """A consistent log with other content is not the one that was anchored."""
    path, anchors = tmp_path / "audit", tmp_path / "elsewhere"
    first = AuditLog(path, 1 << 30, 9, anchors)
    first.append([_record(1), _record(2)])
    first.close()
    shutil.rmtree(path)
    _fill(path, 5)
    assert verify(path).lines == 5
    with pytest.raises(ClusterError, match=r"another hash|not the one"):
        verify(path, anchors=anchors)


@pytest.mark.parametrize("text", ["", "x\n", '{"n":1}\n', "[" * 5000 + "\n"])
def test_anchor_file_without_anchors_is_refused(tmp_path: Path, text: str) -> None:
    """An anchor file that was emptied or garbled verifies nothing."""
    path = tmp_path / "audit"
    _fill(path, 2)
    (tmp_path / "anchors").write_text(text)
    with pytest.raises(ClusterError, match="anchors"):
        verify(path, anchors=tmp_path / "anchors")
    with pytest.raises(ClusterError, match="can't be read"):
        verify(path, anchors=tmp_path / "none")


def test_rotation_says_what_it_removed(tmp_path: Path) -> None:
    """The oldest files go by rotation and verify; one file more gone does not."""
    path = tmp_path / "audit"
    _fill(path, 100, rotate=1500, keep=3)
    found = verify(path)
    assert found.first > 1
    assert found.last >= 100
    assert any("removed by rotation" in note for note in found.notes)
    assert len(list(path.glob("audit-*.jsonl"))) == 3
    oldest = min(path.glob("audit-*.jsonl"))
    kept = oldest.read_bytes()
    oldest.write_text(oldest.read_text().replace("driver/alice", "driver/bobby", 1))
    with pytest.raises(ClusterError, match="does not match its hash"):
        verify(path)
    oldest.write_bytes(kept)
    verify(path)
    oldest.unlink()
    with pytest.raises(ClusterError, match="removed by somebody"):
        verify(path)


def test_writer_goes_on_after_a_crash_in_a_line(tmp_path: Path) -> None:
    """Half a line, as a crash leaves it, is a note and not a break.

    The next writer takes it out, says so, and the chain goes on.
    """
    path = tmp_path / "audit"
    _fill(path, 3)
    with (path / "audit.jsonl").open("a") as file:
        file.write('{"n":4,"who":"driver/ali')
    found = verify(path)
    assert found.lines == 3
    assert "half a line" in found.notes[0]
    log = AuditLog(path, 1 << 30, 9)
    assert log.torn == '{"n":4,"who":"driver/ali'
    log.append([_record(4)])
    log.close()
    found = verify(path)
    assert (found.lines, found.notes) == (4, [])


def test_writer_survives_sigkill(tmp_path: Path) -> None:
    """A writer that is killed at any moment leaves a log that verifies."""
    code = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from raysandbox.cluster.audit import AuditLog
        log = AuditLog(Path(sys.argv[1]), 20_000, 50)
        print("ready", flush=True)
        while True:
            log.append([{"t": 0, "who": "x" * 300}] * 7)
            log.sync()
        """
    )
    path = tmp_path / "audit"
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.15)
        process.kill()
        process.wait()
        process.stdout.close()
        AuditLog(path, 20_000, 50).close()
        assert tail_problem(path) == ""
    assert verify(path).lines > 20


@pytest.mark.parametrize("where", ["current", "seam", "end"])
def test_starting_guard_looks_at_the_end(log: Path, where: str) -> None:
    """The current file, its seam with the one before, and what was cut off it."""
    current = log / "audit.jsonl"
    assert tail_problem(log) == ""
    lines = _lines(current)
    if where == "current":
        current.write_text("".join(lines).replace("alice", "bobby", 1))
    elif where == "seam":
        current.write_text("".join(lines[1:]))
    else:
        current.write_text("".join(lines[:-1]))
    assert tail_problem(log) != ""


def test_second_writer_is_refused(tmp_path: Path) -> None:
    """Two guards on one log would write two chains into it."""
    log = AuditLog(tmp_path / "a", 1 << 30, 9)
    with pytest.raises(ClusterError, match="another process writes"):
        AuditLog(tmp_path / "a", 1 << 30, 9)
    log.close()
    AuditLog(tmp_path / "a", 1 << 30, 9).close()


def test_file_taken_away_from_a_running_writer_is_said(tmp_path: Path) -> None:
    """Lines don't go on into a file that has no name any more."""
    path = tmp_path / "audit"
    log = AuditLog(path, 1 << 30, 9)
    log.append([_record(1)])
    (path / "audit.jsonl").rename(path / "hidden")
    with pytest.raises(OSError, match="removed or replaced"):
        log.sync()
    log.append([_record(2)])
    log.close()
    with pytest.raises(ClusterError, match="begins with line 2"):
        verify(path)


@pytest.mark.root
def test_full_disk_loses_no_line_and_breaks_no_chain(tmp_path: Path) -> None:
    """On a disk that fills up an append fails whole, the chain as before.

    With room again the same records go in. The file system is real, 256 KiB in a
    mount namespace of its own.
    """
    require("root")
    code = """
        import os, sys
        from pathlib import Path
        from raysandbox.cluster.audit import AuditLog, verify
        disk = Path(sys.argv[1])
        log = AuditLog(disk / "audit", 1 << 30, 9)
        batch, failed = [{"t": 0, "who": "x" * 500}] * 20, 0
        (disk / "ballast").write_bytes(bytes(100 << 10))
        for turn in range(40):
            try:
                log.append(batch)
                log.sync()
            except OSError as error:
                failed += 1
                assert error.errno == 28, error
                if failed == 3:
                    before = log.number
                    assert os.stat(disk / "audit/audit.jsonl").st_size == log._file.end
                    assert before % 20 == 0, before
                    (disk / "ballast").unlink()
                    log.append(batch)
                    log.sync()
                    assert log.number == before + 20
                    break
        assert failed == 3, failed
        log.close()
        print(verify(disk / "audit").lines, before + 20)
        """
    lines, wanted = run_on_small_disk(tmp_path / "disk", 256, code).split()
    assert lines == wanted


def test_rotation_that_fails_leaves_the_log_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the next file can't be made, the old one goes on and nothing is lost."""
    path = tmp_path / "audit"
    log = AuditLog(path, 500, 9)
    log.append([_record(n) for n in range(5)])
    (path / "audit-000000000005.jsonl").mkdir()
    with pytest.raises(OSError, match="directory"):
        log.append([_record(6)])
    (path / "audit-000000000005.jsonl").rmdir()
    log.append([_record(6)])
    log.close()
    assert verify(path).lines == 6


def test_query_finds_by_who_what_since_and_denied(tmp_path: Path) -> None:
    """Filters combine; lines that are none are passed over."""
    path = tmp_path / "audit"
    log = AuditLog(path, 1 << 30, 9)
    log.append(
        [
            _record(1),
            _record(2, who="driver/bob", ok=False, why="not yours"),
            _record(3, who="driver/bob", t=time.time() - 5000),
            _record(4, t="yesterday"),
        ]
    )
    log.close()
    with (path / "audit.jsonl").open("ab") as file:
        file.write(b'\xff\n[1]\nnull\n{"n":1}\n')

    def found(**how: object) -> list[str]:
        return [r["object"] for r in query(path, **how)]  # type: ignore[arg-type]

    assert found() == ["key0001", "key0002", "key0003", "key0004"]
    assert found(who="bob") == ["key0002", "key0003"]
    assert found(who="bob", since_s=60) == ["key0002"]
    assert found(denied=True) == ["key0002"]
    assert found(what="X/Put", who="alice", since_s=60) == ["key0001"]
    assert found(what="not yours") == ["key0002"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=200), max_size=8))
def test_any_bytes_are_refused_or_skipped(lines: list[bytes]) -> None:
    """No content of a file makes verification or a query fall over."""
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        (path / "audit.jsonl").write_bytes(b"\n".join(lines))
        (path / "head.json").write_bytes(lines[0] if lines else b"{}")
        with pytest.raises(ClusterError):
            verify(path)
        assert list(query(path)) == []
        tail_problem(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x),
    max_leaves=6,
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=6), JSON), min_size=1, max_size=5))
def test_any_record_survives(records: list[dict[str, object]]) -> None:
    """Whatever a record holds is one line, verifies and is found again."""
    import tempfile

    for record in records:
        for key in ("n", "h", "event"):
            record.pop(key, None)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        log = AuditLog(path, 300, 99)
        log.append(records)
        log.append(records)
        log.close()
        assert verify(path).lines == 2 * len(records)
        back = [
            {k: v for k, v in record.items() if k not in ("n", "h")}
            for record in query(path)
        ]
        assert back == records + records


def test_flood_of_different_refusals_is_bounded() -> None:
    """A caller that makes each refusal different gets few lines and a count.

    The others' refusals are still there.
    """
    fold = Fold()
    for index in range(5000):
        fold.add(
            {
                "t": 1.0, "who": "driver/mallory", "role": "driver", "ok": False,
                "source": "10.0.0.9:1234", "method": f"/x/{index}", "why": "no",
                "in": 2,
            }
        )  # fmt: skip
    fold.add({"t": 1.0, "who": "driver/alice", "source": "10.0.0.8:1", "why": "once"})
    kept = fold.take()
    assert len(kept) == PER_CALLER + 2
    many = [r for r in kept if r.get("event") == "refusals_folded"]
    assert many[0]["count"] == 5000 - PER_CALLER
    assert (many[0]["who"], many[0]["ok"]) == ("driver/mallory", False)
    assert any(r["who"] == "driver/alice" for r in kept)
    assert fold.take() == []


def test_flood_from_many_sources_is_bounded() -> None:
    """Strangers that come from anywhere, without an identity, are one line."""
    fold = Fold()
    for index in range(20_000):
        source = f"[2001:db8::{index:x}]:1"
        fold.add({"t": 1.0, "who": "", "source": source, "why": "bad certificate"})
    kept = fold.take()
    assert len(kept) == PER_FOLD + 1
    assert sum(r.get("count", 1) for r in kept) == 20_000


def test_equal_refusals_are_one_line_with_a_count() -> None:
    """Equal but for the port: counted; the bytes add up."""
    fold = Fold()
    for port in range(9):
        fold.add({"t": 1.0, "who": "a/b", "source": f"1.2.3.4:{port}", "in": 10})
    (kept,) = fold.take()
    assert (kept["count"], kept["in"]) == (9, 90)


@given(st.text())
def test_plain_text_is_printable(text: str) -> None:
    """Nothing that a terminal would obey or reorder is left."""
    assert plain(text).isprintable()


def test_escape_sequences_do_not_reach_the_terminal(tmp_path: Path) -> None:
    """A key named by a hostile driver is shown with its escapes spelled out.

    Positive control: the bytes are in the record.
    """
    hostile = "\x1b]0;owned\x07\x1b[2J\u202egnp\x9b31m\r\n"
    path = tmp_path / "cluster"
    path.mkdir()
    log = AuditLog(path / "audit", 1 << 30, 9)
    log.append([_record(1, object=hostile, who=hostile, why=hostile, ok=False)])
    log.close()
    assert next(query(path / "audit"))["object"] == hostile
    out = subprocess.run(
        [sys.executable, "-m", "raysandbox", "audit", "--cluster",
         str(path)],
        capture_output=True, env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    text = out.stdout.decode()
    assert text.count("\n") == 1
    assert text.rstrip("\n").isprintable()
    assert re.search(r"\\x1b\]0;owned\\x07.*\\u202e.*\\x9b31m", text)
