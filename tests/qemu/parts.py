"""What of the tests runs on the second kernel."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PARTS", "Part"]


@dataclass(frozen=True, slots=True)
class Part:
    """A run of pytest in there.

    Attributes:
        arguments: Of pytest.
        at_least: How many tests must pass.
    """

    arguments: tuple[str, ...]
    at_least: int


PARTS = {
    "surfaces": Part(
        (
            "tests/attacks/test_surfaces.py",
            "tests/unit/test_cgroup.py",
            "tests/unit/test_totals.py",
            # Half a gigabyte, page by page, takes emulation minutes.
            (
                "--deselect=tests/unit/test_totals.py"
                "::test_one_that_takes_all_memory_is_not_the_end_of_the_others"
            ),
        ),
        605,
    ),
    # As root alone: an emulated jail takes four seconds to start.
    "own": Part(("tests/attacks/test_own.py", "-k", "root"), 20),
}
