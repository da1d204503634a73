"""The walls on Debian's 6.1 kernel: Landlock ABI 2, cgroup version 2 alone."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from tests.qemu.run import Result, lacks, run

HERE = Path.cwd()


@pytest.fixture(scope="module")
def _kernel() -> None:
    if why := lacks():
        if "kernel" in os.environ.get("RAYSANDBOX_TEST_REQUIRE", "").split():
            pytest.fail(why)
        pytest.skip(why)


def _closing_line(result: Result) -> str:
    plain = re.sub(r"\x1b\[[0-9;]*m", "", result.output)
    lines = [line for line in plain.splitlines() if re.search(r"\d+ passed", line)]
    tail = plain[-6000:] + result.console[-2000:]
    assert lines, f"no closing line (timed out: {result.timed_out}):\n{tail}"
    assert result.exit == 0, tail
    return lines[-1]


def _passed(line: str) -> int:
    found = re.search(r"(\d+) passed", line)
    assert found is not None
    return int(found[1])


@pytest.mark.usefixtures("_kernel")
@pytest.mark.parametrize(
    ("tests", "at_least"),
    [
        (["tests/attacks/test_surfaces.py", "tests/unit/test_cgroup.py"], 600),
        # As root alone: an emulated jail takes four seconds to start.
        (["tests/attacks/test_own.py", "-k", "root"], 20),
    ],
    ids=["surfaces", "own"],
)
def test_walls(tests: list[str], at_least: int) -> None:
    """What needs no Ray holds there too, as root and as an ordinary user."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *tests]
    result = run(
        [*command, "--timeout", "300"],
        cwd=str(HERE),
        env={"RAYSANDBOX_TEST_ALONE": "1"},
        timeout_s=540,
    )
    assert _passed(_closing_line(result)) >= at_least
