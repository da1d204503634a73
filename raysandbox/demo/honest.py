"""Honest work, and how long it takes on this side."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import Any

__all__ = ["JOBS", "measure"]


def nothing() -> None:
    """Do nothing: what is measured is the way there and back."""


def count_words(text: str) -> dict[str, int]:
    """Count words, as every tutorial does."""
    found: dict[str, int] = {}
    for word in text.split():
        found[word] = found.get(word, 0) + 1
    return found


def digest(rounds: int) -> str:
    """Compute without touching anything."""
    state = b""
    for _ in range(rounds):
        state = hashlib.sha256(state).digest()
    return state.hex()


def total(array: Any) -> float:
    """Sum an array of 16 MB."""
    return float(array.sum())


#: Name: what it is, how often, the function, and its argument's maker.
JOBS: tuple[tuple[str, int, Callable[..., Any], Callable[[], tuple[Any, ...]]], ...] = (
    ("no-op task", 100, nothing, tuple),
    ("count 50,000 words", 10, count_words, lambda: ("to be or not to " * 10_000,)),
    ("hash 150,000 times", 10, digest, lambda: (150_000,)),
    ("sum 16 MB of numpy", 10, total, lambda: (_array(),)),
)


def _array() -> Any:
    import numpy

    return numpy.arange(2_000_000, dtype="float64")


def measure(remote: Callable[[Callable[..., Any]], Any]) -> dict[str, float]:
    """Return milliseconds per task of each job, tasks submitted together."""
    import ray

    found = {}
    for name, count, function, make in JOBS:
        task = remote(function)
        arguments = [ray.put(value) for value in make()]
        ray.get([task.remote(*arguments) for _ in range(4)])
        begun = time.perf_counter()
        ray.get([task.remote(*arguments) for _ in range(count)])
        found[name] = (time.perf_counter() - begun) / count * 1e3
    return found
