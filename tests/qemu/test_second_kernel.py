"""The walls on Debian's 6.1 kernel: Landlock ABI 2, cgroup version 2 alone."""

from __future__ import annotations

import os
import re
from concurrent.futures import Future

import pytest

from tests.qemu.parts import PARTS
from tests.qemu.run import Result, lacks


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
@pytest.mark.parametrize("part", PARTS)
def test_walls(part: str, machines: dict[str, Future[Result]]) -> None:
    """What needs no Ray holds there too, as root and as an ordinary user."""
    assert _passed(_closing_line(machines[part].result())) >= PARTS[part].at_least
