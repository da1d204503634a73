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
        ),
        606,
    ),
    # The worker's wall and groups, and their keeper.
    "worker": Part(
        (
            "tests/node/test_keeper.py",
            "tests/node/test_wall.py",
            "-k",
            "root or keeper",
        ),
        49,
    ),
    # As root alone: an emulated jail takes four seconds to start.
    "own": Part(("tests/attacks/test_own.py", "-k", "root"), 20),
}
