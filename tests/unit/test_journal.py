"""The journal of facts: crashes, damage, a full disk, growth."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysandbox.cluster.errors import ClusterError
from raysandbox.cluster.journal import Journal
from tests.require import require
from tests.unit.small_disk import run_on_small_disk
from tests.unit.test_access import (
    ALICE,
    ALICES,
    BOB,
    KV,
    WORKER,
    World,
    delete,
    fun,
    get,
    put,
)


def test_facts_come_back_in_order(tmp_path: Path) -> None:
    """What was written, by the next process; the file is for its owner alone."""
    path = tmp_path / "facts"
    journal = Journal(path)
    for index in range(5):
        journal.write(["keys", "é\n", str(index), index])
    assert [fact[3] for fact in Journal(path).facts()] == [0, 1, 2, 3, 4]
    assert path.stat().st_mode & 0o777 == 0o600


def test_line_that_a_crash_cut_off_takes_no_other_with_it(tmp_path: Path) -> None:
    """The next fact would be appended to it, and both be lost."""
    path = tmp_path / "facts"
    Journal(path).write(["jobs", "a", "b"])
    with path.open("a") as file:
        file.write('["jobs","c')
    journal = Journal(path)
    journal.write(["jobs", "d", "e"])
    assert [fact[1] for fact in Journal(path).facts()] == ["a", "d"]


@pytest.mark.parametrize("line", ["x", "{}", "[1]", "[" * 3000, '"a"', "null", "\xff"])
def test_damage_is_named_and_not_passed_over(tmp_path: Path, line: str) -> None:
    """A lost fact would give an owned key to whoever comes first."""
    path = tmp_path / "facts"
    path.write_bytes(b'["jobs","a","b"]\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(ClusterError, match=r"facts:2: is damaged"):
        list(Journal(path).facts())


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=100))
def test_any_bytes_are_facts_or_an_error(data: bytes) -> None:
    """Opened, they are cut to whole lines; read, they are lists or a ClusterError."""
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "facts"
        path.write_bytes(data)
        journal = Journal(path)
        try:
            assert all(len(fact) >= 3 for fact in journal.facts())
        except ClusterError:
            return
        journal.write(["jobs", "a", "b"])
        assert list(Journal(path).facts())[-1] == ["jobs", "a", "b"]


def test_growth_is_bounded_by_what_is_true(tmp_path: Path) -> None:
    """A driver that writes one key again and again does not fill the head's disk."""
    journal = Journal(tmp_path / "facts", compact_bytes=20_000)
    world = World()
    world.access._journal = lambda fact: (
        journal.compact(world.access.facts()) if journal.wants_compaction else None,
        journal.write(fact),
    )[0]
    for index in range(3000):
        world.now += 1
        world.ok(ALICE, KV + "Put", put(b"k", bytes(index % 50)))
    assert (tmp_path / "facts").stat().st_size < 50_000


def test_compacted_journal_says_the_same(tmp_path: Path) -> None:
    """After a rewrite the decisions are what they were."""
    world = World()
    world.ok(ALICE, KV + "Put", put(b"k"))
    world.ok(ALICE, KV + "Put", put(b"gone"))
    world.ok(ALICE, KV + "Del", delete(b"gone"))
    world.ok(WORKER, KV + "Get", get(fun(ALICES), b"fun"))
    journal = Journal(tmp_path / "facts")
    journal.compact(world.access.facts())
    again = World()
    again.access = again.new()
    again.access.replay(Journal(tmp_path / "facts").facts())
    before = sorted(json.dumps(fact) for fact in world.access.facts())
    assert sorted(json.dumps(fact) for fact in again.access.facts()) == before
    again.no(BOB, KV + "Put", put(b"k"))
    again.ok(BOB, KV + "Put", put(b"gone"))


def test_what_could_not_be_written_down_is_not_known() -> None:
    """Known now and forgotten at the next start would be worse than refused."""
    world = World()

    def full(fact: list[object]) -> None:
        raise OSError(28, "No space left on device")

    world.access._journal = full
    with pytest.raises(OSError, match="No space"):
        world.ask(ALICE, KV + "Put", put(b"k"))
    world.access._journal = lambda fact: None
    world.ok(BOB, KV + "Put", put(b"k"))


@pytest.mark.root
def test_full_disk_leaves_whole_facts(tmp_path: Path) -> None:
    """On a disk that fills up a fact is in the file whole, or not at all."""
    require("root")
    code = """
        import sys
        from pathlib import Path
        from raysandbox.cluster.journal import Journal
        path = Path(sys.argv[1]) / "facts"
        journal, good = Journal(path), 0
        try:
            while True:
                journal.write(["keys", "x" * 900, "y"])
                good += 1
        except OSError as error:
            assert error.errno == 28
        assert len(list(Journal(path).facts())) == good > 10
        """
    run_on_small_disk(tmp_path / "disk", 64, code)
