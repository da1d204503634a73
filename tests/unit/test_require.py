"""The switch that turns a skip into a failure can't be turned off by mistake."""

from __future__ import annotations

import pytest

from tests import require

ABSENT = "module:no_such_module_anywhere"


@pytest.mark.parametrize(
    ("demanded", "need", "mandatory"),
    [
        ("", "cgroup:memory", False),
        ("all", "cgroup:memory", True),
        ("cgroup", "cgroup:memory", True),
        ("cgroup:memory", "cgroup:memory", True),
        ("cgroup:memory", "cgroup:pids", False),
        ("cgroup:memory", "cgroup", False),
        ("landlock:4", "landlock:4", True),
        ("landlock:4", "landlock", True),
        ("landlock:4", "landlock:5", False),
        ("userns,  landlock:4\tcgroup1", "cgroup1", True),
        ("cgroup1", "cgroup2", False),
    ],
)
def test_what_a_demand_covers(
    monkeypatch: pytest.MonkeyPatch, demanded: str, need: str, mandatory: bool
) -> None:
    """A demand covers itself and what it implies, and nothing else."""
    monkeypatch.setenv(require.ENV, demanded)
    assert require._mandatory(need) is mandatory


def test_missing_need_skips_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same lack: a skip with its reason, or a failure that names the switch."""
    monkeypatch.delenv(require.ENV, raising=False)
    with pytest.raises(pytest.skip.Exception, match="no Python module"):
        require.require(ABSENT)
    monkeypatch.setenv(require.ENV, "module")
    with pytest.raises(pytest.fail.Exception, match="demands 'module:no_such"):
        require.require(ABSENT)


def test_typing_mistake_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the test and in the environment alike."""
    with pytest.raises(ValueError, match="unknown need 'cgruop'"):
        require.require("cgruop")
    monkeypatch.setenv(require.ENV, "landlok:4")
    with pytest.raises(ValueError, match="unknown need 'landlok:4'"):
        require.require(ABSENT)
