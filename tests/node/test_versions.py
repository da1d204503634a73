"""Which versions of Ray a node starts on: a table, checked against the one here."""

from __future__ import annotations

import subprocess
import sys

import pytest
import ray

from raysandbox.errors import UnsupportedError
from raysandbox.node import seams


def test_the_installed_ray_has_every_seam():
    """The table calls it supported, and nothing that is looked at is missing."""
    assert seams.VERSIONS[seams.minor(ray.__version__)] == ""
    assert seams.missing(gcs=True) == ""
    seams.check(gcs=True)


def test_every_version_has_an_answer():
    """From the first of 2.5x to the newest that was tried, none is left out."""
    names = [f"2.{number}" for number in range(50, 50 + len(seams.VERSIONS))]
    assert list(seams.VERSIONS) == names
    assert seams.minor(ray.__version__) == names[-1]


def test_an_untried_version_is_refused(monkeypatch):
    """Newer than the table: refused with its version, though no seam is missing."""
    monkeypatch.setattr(ray, "__version__", "2.61.0")
    with pytest.raises(UnsupportedError, match=r"never ran.*have Ray 2\.61\.0"):
        seams.check()


MOVED = """
import sys, ray
from ray._private import services, ray_constants
del {where}
from raysandbox.cli import main
sys.argv = ["raysandbox", "start", "--head"]
main()
"""


@pytest.mark.parametrize(
    ("where", "seam"),
    [
        ("services.start_ray_process", "services.start_ray_process"),
        ("ray_constants.PROCESS_TYPE_RAYLET", "ray_constants.PROCESS_TYPE_RAYLET"),
    ],
)
def test_start_names_the_seam_that_is_missing(tmp_path, where, seam):
    """A Ray whose internals have moved starts nothing; the error has its version."""
    policy = tmp_path / "policy.toml"
    policy.write_text("")
    policy.chmod(0o600)
    done = subprocess.run(
        [sys.executable, "-c", MOVED.format(where=where)],
        env={"RAYSANDBOX_POLICY": str(policy), "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert seam in done.stderr, done.stderr
    assert ray.__version__ in done.stderr
