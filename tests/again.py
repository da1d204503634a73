"""One more try for tests that wait for many processes, on a machine that is shared.

Only where RAYSANDBOX_TEST_AGAIN is set, as `.ci/run` does. What a first try that
failed said is printed at the end: it may be a race of ours. Never tried again are
attacks, which must fail every time, what needs no Ray, and what stays behind.
"""

from __future__ import annotations

import os

import pytest

from tests.lanes import KINDS, kind_of

__all__ = ["AGAIN", "LEFT_BEHIND", "allow", "print_first_tries"]

#: How the one failure begins that a second try would hide.
LEFT_BEHIND = "left behind by the tests"
AGAIN = bool(os.environ.get("RAYSANDBOX_TEST_AGAIN"))
_MOST_LINES = 40


def allow(item: pytest.Item) -> None:
    """Mark a test that may be tried again."""
    attack = "attack" in item.nodeid or item.path.stem in ("test_sealed", "test_wall")
    kind = kind_of(item.nodeid)
    # The second kernel has run its part once, whoever asks.
    if AGAIN and KINDS[kind].mark and kind != "qemu" and not attack:
        item.add_marker(pytest.mark.flaky(reruns=1, rerun_except=LEFT_BEHIND))


def print_first_tries(reporter: pytest.TerminalReporter) -> None:
    """Print what failed once."""
    for report in reporter.stats.get("rerun", []):
        reporter.write_sep("_", f"failed at the first try: {report.nodeid}")
        lines = str(report.longrepr or "").splitlines()
        reporter.write_line("\n".join(lines[-_MOST_LINES:]))
