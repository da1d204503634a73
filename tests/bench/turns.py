"""Both sides of a comparison, interleaved."""

from __future__ import annotations

import statistics
from collections.abc import Callable


def turns(rounds: int, *calls: Callable[[], float]) -> list[float]:
    """Let the calls take turns; return the median of each."""
    seen: list[list[float]] = [[] for _ in calls]
    for number in range(rounds):
        # Whoever goes first may find warmer caches: that takes turns too.
        order = range(len(calls)) if number % 2 else reversed(range(len(calls)))
        for index in order:
            seen[index].append(calls[index]())
    return [statistics.median(each) for each in seen]
