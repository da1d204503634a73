"""Where spill workers write down what they have put into files."""

from __future__ import annotations

from pathlib import Path

import pytest

from raysandbox.node.spilling import Registry, fused, which_spilled

IDS = [bytes([number]) * 28 for number in range(1, 4)]
NAMES = [each.hex() for each in IDS]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with objects, named as Ray names it."""
    made = tmp_path / "objects" / "0123-multi-3"
    made.parent.mkdir()
    made.touch()
    return made


@pytest.fixture
def path(tmp_path: Path) -> str:
    made = tmp_path / "spilled"
    made.mkdir()
    return str(made)


def test_an_object_is_there_from_before_it_is_spilled_until_its_file_is_gone(
    path, file
):
    """And nothing is left behind; once more does nothing."""
    registry = Registry(path)
    batch = registry.add(NAMES)
    assert which_spilled(path, [*IDS, bytes(28)]) == {*IDS}
    registry.done(str(file), batch, NAMES)
    assert which_spilled(path, IDS) == {*IDS}
    registry.remove(str(file))
    registry.remove(str(file))
    assert not list(Path(path).iterdir())


def test_what_was_not_spilled_after_all_is_not_there(path):
    """As where the disk is full."""
    registry = Registry(path)
    registry.cancel(registry.add(NAMES), NAMES)
    assert not list(Path(path).iterdir())


def test_the_end_of_an_older_file_takes_nothing_of_a_newer_one(path, file):
    """An object that was lost and made again counts, whichever file goes first."""
    registry = Registry(path)
    newer = file.with_name("4567-multi-1")
    registry.done(str(file), registry.add(NAMES), NAMES)
    registry.done(str(newer), registry.add(NAMES[:1]), NAMES[:1])
    registry.remove(str(file))
    assert which_spilled(path, IDS) == {IDS[0]}
    registry.remove(str(newer))
    assert not list(Path(path).iterdir())


def test_what_a_worker_left_that_ended_is_taken_out(path, file):
    """Of files that are gone, and of no others; also where some of it was done."""
    registry = Registry(path)
    there = file.with_name("4567-multi-1")
    there.touch()
    registry.done(str(there), registry.add(NAMES[:1]), NAMES[:1])
    registry.done(str(file), registry.add(NAMES[1:]), NAMES[1:])
    file.unlink()
    Path(path, NAMES[1]).unlink()
    registry.clean()
    assert which_spilled(path, IDS) == {IDS[0]}
    assert {each.name for each in Path(path).iterdir()} == {NAMES[0], there.name}


def test_each_job_has_files_of_its_own():
    """And so have large objects; many small ones share some."""
    ids = [bytes(20) + job + bytes(4) for job in (b"aaaa", b"bbbb")] * 1000
    found = list(fused(ids))
    assert len(found) <= 2 * 64
    assert all(len({ids[index] for index in each}) == 1 for each in found)
    assert sorted(index for each in found for index in each) == list(range(2000))
    assert list(fused(ids[:4])) == [[0], [2], [1], [3]]
