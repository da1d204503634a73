"""Interpreters of the operator's: what is looked at before a node starts."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from raysandbox.errors import ProfileError
from raysandbox.node import interpreters


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory that the policy's owner alone can write."""
    tmp_path.chmod(0o755)
    return tmp_path


def script(directory: Path, prints: str) -> str:
    path = directory / "python"
    path.write_text(f"#!/bin/sh\n{prints}\n")
    path.chmod(0o755)
    return str(path)


def test_one_with_the_node_s_versions_is_taken():
    """What belongs to it is what its worker must see."""
    interpreters._roots.cache_clear()
    (roots,) = interpreters.look({sys.executable: "py_executable"}).values()
    assert any(Path(sys.executable).is_relative_to(root) for root in roots)
    assert any(Path(os.__file__).is_relative_to(root) for root in roots)


OLD = '{"ray": "2.0.0", "raysandbox": "0", "python": "3", "roots": []}'


@pytest.mark.parametrize(
    ("prints", "says"),
    [
        ("echo no module named ray >&2; exit 1", "can't import ray and raysandbox: no"),
        ("echo hello", "is no Python that starts"),
        (f"echo '{OLD}'", "has ray 2.0.0, and the node has"),
    ],
)
def test_what_it_lacks_is_named(directory, prints, says):
    """With key and path; a worker that can't start would be tried for ever."""
    path = script(directory, prints)
    with pytest.raises(ProfileError) as caught:
        interpreters.look({path: "py_executable"})
    assert f"runtime_env.py_executable = '{path}': " in str(caught.value).replace(
        '"', "'"
    )
    assert says in str(caught.value)


def test_one_that_others_can_write_is_refused(directory):
    """It would run in the worker, which has Ray's credentials."""
    path = script(directory, "exit 0")
    os.chmod(path, 0o777)
    with pytest.raises(ProfileError, match="group or others can write it"):
        interpreters.look({path: "py_executable"})
    with pytest.raises(ProfileError, match="can't be read"):
        interpreters.look({f"{directory}/none": "conda.x"})
