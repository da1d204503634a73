"""Rays of their own: each is a process, so that one more or less harms nobody."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.node.drive import Side
from tests.node.home import Home


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[..., Side]]:
    """Start a Ray: kind and options; all end with the module."""
    started: list[Side] = []

    def make(kind: str, **options: Any) -> Side:
        started.append(Side(kind, **options))
        return started[-1]

    yield make
    for side in started:
        side.leave()
    for side in started:
        side.close()


@pytest.fixture(scope="module")
def proxied(start: Callable[..., Side]) -> Side:
    """A Ray behind the proxy, with 60 MB for each job and a store of 200 MiB."""
    return start("proxy", limits={"job_bytes": 60_000_000})


@pytest.fixture(scope="module")
def home() -> Iterator[Home]:
    made = Home()
    yield made
    made.server.close()
